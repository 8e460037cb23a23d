"""Position encodings, as functions of patch coordinates.

Tokens travel with integer coordinates (row, column) in patches, so windows, visible-only tokens, rectangular images and
any resolution need no special case.
"""

import math

import torch
from torch import Tensor, nn

# Piecewise index of Wu et al. 2021 ("Rethinking and Improving Relative Position Encoding") with LoMaR's ratio 1.9.
ALPHA, BETA, GAMMA = 1.9, 3.8, 15.2
REACH = int(BETA)  # farthest index per axis: 3
SIDE = 2 * REACH + 1  # indices per axis: 7
CLS_BUCKET = SIDE * SIDE  # 49: any pair with the cls token in it
BUCKETS = CLS_BUCKET + 1
_SATURATION = 4  # from this distance on the index is REACH; far positions reuse near ones' vectors


def piecewise_index(delta: int) -> int:
    """Index of a signed distance along one axis: exact when near, logarithmic when far, at most `REACH`.

    0 -> 0, 1 -> 1, 2 and 3 -> 2, 4 and more -> 3; the sign is kept.

    Args:
        delta: query position minus key position, in patches.

    Source: the rounding takes in alpha and comes before the clip, as the released LoMaR code does it.
    """
    distance = abs(delta)
    if distance <= ALPHA:
        return delta
    grown = round(ALPHA + math.log(distance / ALPHA) / math.log(GAMMA / ALPHA) * (BETA - ALPHA))
    return int(math.copysign(min(grown, BETA), delta))


def contextual_buckets(coordinates: Tensor) -> Tensor:
    """Which vector of the position table each query-key pair uses, with a cls token put first.

    Args:
        coordinates: integer (R, N, 2), row and column of every patch token; R may be 1 for all rows alike.

    Returns:
        int64 (R, 1 + N, 1 + N): 7 * row index + column index of (query - key), each index counted from 0; `CLS_BUCKET`
        where the query or the key is the cls token.

    Source: LoMaR section 3.2 "Relative positional encoding"; "product" method of Wu et al. 2021.
    """
    near = range(-_SATURATION, _SATURATION + 1)
    index = torch.tensor([piecewise_index(d) + REACH for d in near], device=coordinates.device)

    def along(axis: int) -> Tensor:
        position = coordinates[..., axis]
        delta = position[:, :, None] - position[:, None, :]  # (R, N, N)
        return index[delta.clamp(-_SATURATION, _SATURATION) + _SATURATION]

    return nn.functional.pad(SIDE * along(0) + along(1), (1, 0, 1, 0), value=CLS_BUCKET)


def grid_coordinates(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """int64 (rows * columns, 2): row and column of every patch of a grid, in raster order."""
    return torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device)).reshape(-1, 2)


class ContextualPosition(nn.Module):
    """The table R of contextual relative position: one learned vector per bucket, shared by the heads of a block.

    Zero at the start, so that position is learned from nothing.

    Args:
        head_dim: width d of one attention head.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(head_dim, BUCKETS))
