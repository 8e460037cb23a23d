"""Self-attention, and what its logits know of positions.

A block's attention is one of three, by what it adds to the logits: a contextual bias (LoMaR), a learned bias of its own
(BEiT, fine-tuned), or what the encoder hands to all blocks alike: a shared bias (BEiT, pretraining) or nothing (MAE).

How it is worked out depends on the hardware. PyTorch's fused attention has the fastest kernels on a GPU, but not for a
bias that is learned from the queries, which has kernels of its own (`lomar.model.kernels`). On a CPU plain matrix
products are up to four times as fast as the fused attention in training (docs/performance.md); where a layer's weights
would be many megabytes an image, those of a contextual bias are worked out a few heads at a time, and again in the
backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomar.model.positions import ContextualPosition, Grid, RelativeBias, contextual_buckets, with_cls

# Most tokens whose weights a CPU keeps for the backward pass: at 1024, 25 MB a layer and image of 12 heads.
KEPT_TOKENS = 1024
# And without a backward pass: more tokens' weights are slower to fetch memory for than to work out piece by piece.
WRITTEN_TOKENS = 256
_ELEMENTS_AT_ONCE = 2**21  # logits worked out at a time where they are not kept
_TRITON = find_spec("triton") is not None  # it is not on every platform


class Places(NamedTuple):
    """What a contextual bias needs to know of the tokens, cls first.

    Args:
        at: int32 (R or 1, N, 2), row and column; `positions.NOWHERE` of cls.
        buckets: int64 (R or 1, N, N), which vector of the table each pair uses; None where a kernel works that out.
        extent: (rows, columns) of the image in patches, where attention cuts it into windows.
    """

    at: Tensor
    buckets: Tensor | None
    extent: Grid | None = None


ALL = slice(None)  # of the tokens
# What `relate` makes of the coordinates for the blocks: a bias, places, or rows of a table and its grid.
Relation = Tensor | Places | tuple[Tensor, Grid] | None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(d) + b) v.

    Args:
        q: (R, heads, M, d).
        k, v: (R, heads, N, d).
        bias: b, (R or 1, heads, M, N), or None.

    Returns:
        (R, heads, M, d).
    """
    if q.device.type != "cpu" or torch.compiler.is_exporting() or not _weights_kept:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if not _written_out(k.shape[-2]) and (bias is None or not bias.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return by_products(q, k, v, bias)


def by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`attend`, by one matrix product after another; keeps the weights (R, heads, M, N).

    In bfloat16 the logits are rounded to it, as in every attention that writes them out; fused ones do not.
    """
    rows, heads, m, d = q.shape
    scale = d**-0.5
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))  # (R * heads, M or N, d)
    if bias is None:
        logits = torch.bmm(q * scale, k.transpose(1, 2))
    else:
        bias = bias.expand(rows, -1, -1, -1).flatten(0, 1)
        logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)  # (R * heads, M, N)
    return torch.bmm(logits.softmax(dim=-1), v).view(rows, heads, m, d)


def contextual_bias(q: Tensor, table: Tensor, buckets: Tensor) -> Tensor:
    """b[i, j] = q_i . R[bucket(i, j)], to be added to the logits.

    The query enters unscaled, as in the released LoMaR code (the iRPE it cites scales it first).

    Args:
        q: (R, heads, M, d).
        table: (d, buckets), the vectors R as columns.
        buckets: int64 (R or 1, M, N).

    Returns:
        (R, heads, M, N).
    """
    by_bucket = q @ table.to(q.dtype)  # (R, heads, M, buckets)
    return by_bucket.gather(-1, buckets[:, None].expand(q.shape[0], q.shape[1], -1, -1))


def contextual_by_products(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Places, asked: slice = ALL
) -> Tensor:
    """Attention with a contextual bias that is written out for every head: (R, heads, M, d)."""
    return attend(q, k, v, contextual_bias(q, table, _buckets(places, asked)))


def contextual_recomputed(q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Places, asked: slice = ALL) -> Tensor:
    """The same, a few heads at a time and again in the backward pass: nothing of size heads x M x N is kept."""
    buckets = _buckets(places, asked)

    def bias(q: Tensor, row: int, heads: slice) -> Tensor:
        return contextual_bias(q, table, buckets[row : row + 1] if len(buckets) > 1 else buckets)

    return recomputed(q, k, v, bias)


def recomputed(q: Tensor, k: Tensor, v: Tensor, bias: Callable[[Tensor, int, slice], Tensor]) -> Tensor:
    """`attend`, a few heads of a row at a time and again in the backward pass.

    Args:
        q: (R, heads, M, d).
        k, v: (R, heads, N, d).
        bias: some heads' queries (1, h, M, d), their row and which heads they are -> (1, h, M, N).

    Returns:
        (R, heads, M, d).
    """
    some = max(1, _ELEMENTS_AT_ONCE // (q.shape[-2] * k.shape[-2]))  # heads at a time

    def part(q: Tensor, k: Tensor, v: Tensor, row: int, heads: slice) -> Tensor:
        return by_products(q, k, v, bias(q, row, heads))

    rows = []
    for row in range(q.shape[0]):
        parts = []
        for start in range(0, q.shape[1], some):
            heads = slice(start, start + some)
            few = (each[row : row + 1, heads] for each in (q, k, v))
            parts.append(checkpoint(part, *few, row, heads, use_reentrant=False))
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def contextual_fused(q: Tensor, k: Tensor, v: Tensor, table: Tensor, places: Places, asked: slice = ALL) -> Tensor:
    """The same in one Triton kernel, which looks the bias up block by block: (R, heads, M, d)."""
    from lomar.model.kernels import fused_attention

    return fused_attention(q, k, v, table, places.at[:, asked], places.at)


# name -> attention with a contextual bias: q (R, heads, M, d), of the tokens that are asked for; k, v (R, heads, N, d);
# the table (d, buckets); the places of all N tokens; which of them are asked for, all if not said.
BACKENDS: dict[str, Callable[..., Tensor]] = {
    "products": contextual_by_products,
    "recomputed": contextual_recomputed,
    "fused": contextual_fused,
}


def backend_for(q: Tensor, tokens: int) -> str:
    """The fastest of `BACKENDS` for queries (R, heads, M, d) and so many keys.

    On a CPU `recomputed` where the weights of a layer are large.
    """
    if torch.compiler.is_exporting():  # first: a program of any size must not ask for its number of tokens
        return "products"
    if _may_be_fused(q.device):
        from lomar.model.kernels import supported

        if supported(q):
            return "fused"
    written = _weights_kept and _written_out(tokens)
    return "products" if written or q.device.type != "cpu" else "recomputed"


def _written_out(tokens: int) -> bool:
    """Whether a CPU writes the weights of so many keys down for all heads at once."""
    return tokens <= (KEPT_TOKENS if torch.is_grad_enabled() else WRITTEN_TOKENS)


def _may_be_fused(device: torch.device) -> bool:
    if not _TRITON or device.type != "cuda":
        return False
    from lomar.model.kernels import capable

    return capable()


_weights_kept = True


@contextmanager
def as_fused() -> Iterator[None]:
    """On a CPU, attention that keeps what fused kernels keep, so that what a GPU will keep can be counted there."""
    global _weights_kept
    _weights_kept = False
    try:
        yield
    finally:
        _weights_kept = True


def _buckets(places: Places, asked: slice) -> Tensor:
    buckets = contextual_buckets(places.at) if places.buckets is None else places.buckets
    return buckets[:, asked]


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

    def bias(self, q: Tensor, relation: Relation, asked: slice = ALL) -> Tensor | None:
        """What is added to the logits of the tokens that are asked for: (R or 1, heads, M, N), or None."""
        assert relation is None or isinstance(relation, Tensor)
        return relation if relation is None else relation[:, :, asked]

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, relation: Relation, asked: slice) -> Tensor:
        """Values mixed as the logits say: (R, heads, M, d)."""
        bias = self.bias(q, relation, asked)
        return attend(q, k, v, bias if bias is None else bias.to(q.dtype))

    def forward(self, x: Tensor, relation: Relation, asked: slice = ALL) -> Tensor:
        """(R, N, D) tokens -> (R, M, D), what those that are asked for gather from all.

        Args:
            x: tokens.
            relation: what `relate` gave.
            asked: which of the tokens look; the others are looked at alone.
        """
        q, k, v = self._project(x, asked)
        out = self.mixed(q, k, v, relation, asked)  # (R, heads, M, D / heads)
        return self.proj(out.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, relation: Relation, asked: slice = ALL) -> Tensor:
        """Where the tokens that are asked for look: (R, heads, M, N), rows of sum 1; for pictures, statistics."""
        q, k, _ = self._project(x, asked)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        bias = self.bias(q, relation, asked)
        return (logits if bias is None else logits + bias).softmax(dim=-1)

    def _project(self, x: Tensor, asked: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the tokens that are asked for, keys and values of all: (R, heads, M or N, d) each."""
        width = x.shape[-1]
        bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if asked == ALL:
            q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
        else:
            of_q, of_kv = (None, None) if bias is None else (bias[:width], bias[width:])
            q = F.linear(x[:, asked], self.qkv.weight[:width], of_q)
            k, v = F.linear(x, self.qkv.weight[width:], of_kv).chunk(2, dim=-1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (q, k, v))
        return q, k, v


class ContextualAttention(Attention):
    """Attention with contextual relative position; the relation is the places of the tokens."""

    def __init__(self, width: int, heads: int, key_bias: bool = True) -> None:
        super().__init__(width, heads, key_bias)
        self.rpe = ContextualPosition(width // heads)

    def relate(self, coordinates: Tensor, extent: Grid | None) -> Places:
        """The places of the tokens with cls first, and their buckets where no kernel works them out."""
        at = with_cls(coordinates)
        return Places(at, None if _may_be_fused(at.device) else contextual_buckets(at))

    def bias(self, q: Tensor, relation: Relation, asked: slice = ALL) -> Tensor:
        """(R, heads, M, N)."""
        assert isinstance(relation, Places)
        return contextual_bias(q, self.rpe.table, _buckets(relation, asked))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, relation: Relation, asked: slice) -> Tensor:
        """(R, heads, M, d), by the backend for this device and length."""
        assert isinstance(relation, Places)
        backend = BACKENDS[backend_for(q, k.shape[-2])]
        return backend(q, k, v, self.rpe.table, relation, asked)


class BiasedAttention(Attention):
    """Attention with a learned relative bias of the block's own."""

    def __init__(self, width: int, heads: int, key_bias: bool, grid: Grid) -> None:
        super().__init__(width, heads, key_bias)
        self.rel_pos_bias = RelativeBias(grid, heads)

    def relate(self, coordinates: Tensor, extent: Grid | None) -> tuple[Tensor, Grid]:
        """Rows of the table, and the grid it must cover."""
        return self.rel_pos_bias.relate(coordinates, extent)

    def bias(self, q: Tensor, relation: Relation, asked: slice = ALL) -> Tensor:
        """(R or 1, heads, M, N)."""
        assert isinstance(relation, tuple) and not isinstance(relation, Places)
        index, grid = relation
        return self.rel_pos_bias((index[:, asked], grid))
