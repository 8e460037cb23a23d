"""Self-attention with a contextual bias."""

import torch.nn.functional as F
from torch import Tensor, nn

from lomar.model.positions import ContextualPosition


def contextual_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, buckets: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d) + b) v with b[i, j] = q_i . R[bucket(i, j)].

    The query enters the bias unscaled, as in the released LoMaR code (the iRPE it cites scales it first).

    Args:
        q, k, v: (R, heads, N, d).
        table: (d, buckets), the vectors R as columns.
        buckets: int64 (R or 1, N, N).

    Returns:
        (R, heads, N, d).
    """
    by_bucket = q @ table.to(q.dtype)  # (R, heads, N, buckets)
    index = buckets[:, None].expand(q.shape[0], q.shape[1], -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=by_bucket.gather(-1, index))


class Attention(nn.Module):
    """Multi-head self-attention whose logits know where the tokens are.

    Args:
        width: token width D.
        heads: number of heads; D must be a multiple of it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.rpe = ContextualPosition(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        """(R, N, D) tokens and int64 (R or 1, N, N) buckets -> (R, N, D)."""
        r, n, d = x.shape
        q, k, v = self.qkv(x).view(r, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        out = contextual_attention(q, k, v, self.rpe.table, buckets)  # (R, heads, N, D / heads)
        return self.proj(out.transpose(1, 2).reshape(r, n, d))
