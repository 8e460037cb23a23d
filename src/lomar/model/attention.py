"""Self-attention, and what its logits know of positions.

A block's attention is one of three, by what it adds to the logits: a contextual bias (LoMaR), a learned bias of its own
(BEiT, fine-tuned), or what the encoder hands to all blocks alike: a shared bias (BEiT, pretraining) or nothing (MAE).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lomar.model.positions import ContextualPosition, Grid, RelativeBias, contextual_buckets

# What `relate` makes of the coordinates for the blocks: a bias, buckets, or rows of a table and its grid.
Relation = Tensor | tuple[Tensor, Grid] | None


def contextual_bias(q: Tensor, table: Tensor, buckets: Tensor) -> Tensor:
    """b[i, j] = q_i . R[bucket(i, j)], to be added to the logits.

    The query enters unscaled, as in the released LoMaR code (the iRPE it cites scales it first).

    Args:
        q: (R, heads, N, d).
        table: (d, buckets), the vectors R as columns.
        buckets: int64 (R or 1, N, N).

    Returns:
        (R, heads, N, N).
    """
    by_bucket = q @ table.to(q.dtype)  # (R, heads, N, buckets)
    return by_bucket.gather(-1, buckets[:, None].expand(q.shape[0], q.shape[1], -1, -1))


class Attention(nn.Module):
    """Multi-head self-attention with the bias that the encoder hands to it.

    softmax(q k' / sqrt(d) + b) v.

    Args:
        width: token width D.
        heads: number of heads; D must be a multiple of it.
        key_bias: whether keys have a bias as queries and values do; BEiT's have none.
    """

    def __init__(self, width: int, heads: int, key_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def relate(self, coordinates: Tensor, extent: Grid | None) -> Relation:
        """What `bias` needs to know of the positions; worked out once for all blocks.

        Args:
            coordinates: integer (R or 1, N, 2), row and column of the patch tokens.
            extent: (rows, columns) that they fill, where that may be more than in pretraining.
        """
        return None

    def bias(self, q: Tensor, relation: Relation) -> Tensor | None:
        """What is added to the logits: (R or 1, heads, N, N), or None."""
        assert not isinstance(relation, tuple)
        return relation

    def forward(self, x: Tensor, relation: Relation) -> Tensor:
        """(R, N, D) tokens, and what `relate` gave -> (R, N, D)."""
        q, k, v = self._project(x)
        bias = self.bias(q, relation)
        bias = bias if bias is None else bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (R, heads, N, D / heads)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def weights(self, x: Tensor, relation: Relation) -> Tensor:
        """Where every token looks: (R, heads, N, N), rows of sum 1, for pictures and statistics."""
        q, k, _ = self._project(x)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        bias = self.bias(q, relation)
        return (logits if bias is None else logits + bias).softmax(dim=-1)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (R, heads, N, d)."""
        r, n, d = x.shape
        bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        return qkv.view(r, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)


class ContextualAttention(Attention):
    """Attention with contextual relative position; the relation is the buckets."""

    def __init__(self, width: int, heads: int, key_bias: bool = True) -> None:
        super().__init__(width, heads, key_bias)
        self.rpe = ContextualPosition(width // heads)

    def relate(self, coordinates: Tensor, extent: Grid | None) -> Tensor:
        """int64 (R or 1, 1 + N, 1 + N) buckets."""
        return contextual_buckets(coordinates)

    def bias(self, q: Tensor, relation: Relation) -> Tensor:
        """(R, heads, N, N)."""
        assert isinstance(relation, Tensor)
        return contextual_bias(q, self.rpe.table, relation)


class BiasedAttention(Attention):
    """Attention with a learned relative bias of the block's own."""

    def __init__(self, width: int, heads: int, key_bias: bool, grid: Grid) -> None:
        super().__init__(width, heads, key_bias)
        self.rel_pos_bias = RelativeBias(grid, heads)

    def relate(self, coordinates: Tensor, extent: Grid | None) -> tuple[Tensor, Grid]:
        """Rows of the table, and the grid it must cover."""
        return self.rel_pos_bias.relate(coordinates, extent)

    def bias(self, q: Tensor, relation: Relation) -> Tensor:
        """(R or 1, heads, N, N)."""
        assert isinstance(relation, tuple)
        return self.rel_pos_bias(relation)
