"""Position encodings, as functions of patch coordinates.

Tokens travel with integer coordinates (row, column) in patches, so windows, visible-only tokens, rectangular images and
any resolution need no special case. Contextual relative position is LoMaR's, the relative bias BEiT's, sine and cosine
of the absolute place MAE's and MoCo v3's, a learned table of absolute places DINO's.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from torch import Tensor, nn

Grid = tuple[int, int]  # rows and columns, in patches

# Piecewise index of Wu et al. 2021 ("Rethinking and Improving Relative Position Encoding") with LoMaR's ratio 1.9.
ALPHA, BETA, GAMMA = 1.9, 3.8, 15.2
REACH = int(BETA)  # farthest index per axis: 3
SIDE = 2 * REACH + 1  # indices per axis: 7
CLS_BUCKET = SIDE * SIDE  # 49: any pair with the cls token in it
BUCKETS = CLS_BUCKET + 1
NOWHERE = -(2**15)  # row and column of the cls token
_MERGED = 3  # from this distance on the index is one less than the distance: 3 shares that of 2
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


def piecewise_indices(delta: Tensor) -> Tensor:
    """`piecewise_index` of integer distances, counted from 0.

    In arithmetic: a table would have to be copied to the device at every step.
    """
    delta = delta.clamp(-_SATURATION, _SATURATION)
    return delta.sign() * (delta.abs() - (delta.abs() >= _MERGED).to(delta.dtype)) + REACH


def with_cls(coordinates: Tensor) -> Tensor:
    """int32 (R, 1 + N, 2): coordinates (R, N, 2) of patch tokens, with a cls token at `NOWHERE` put first."""
    return nn.functional.pad(coordinates.int(), (0, 0, 1, 0), value=NOWHERE)


def contextual_buckets(at: Tensor) -> Tensor:
    """Which vector of the position table each query-key pair uses.

    Args:
        at: integer (R, N, 2), row and column of every token, `NOWHERE` of cls; R may be 1 for all rows alike.

    Returns:
        int64 (R, N, N): 7 * row index + column index of (query - key), each index counted from 0; `CLS_BUCKET` where
        the query or the key is the cls token.

    Source: LoMaR section 3.2 "Relative positional encoding"; "product" method of Wu et al. 2021.
    """

    def along(axis: int) -> Tensor:
        position = at[..., axis]
        return piecewise_indices(position[:, :, None] - position[:, None, :])  # (R, N, N)

    cls = at[..., 0] == NOWHERE  # (R, N)
    return (SIDE * along(0) + along(1)).masked_fill(cls[:, :, None] | cls[:, None, :], CLS_BUCKET).long()


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


def relative_index(coordinates: Tensor, grid: Grid) -> Tensor:
    """Which row of a relative-bias table each query-key pair uses, with a cls token put first.

    Args:
        coordinates: integer (R, N, 2), whose differences stay within the grid; R may be 1 for all rows alike.
        grid: (H, W) that the table covers.

    Returns:
        int64 (R, 1 + N, 1 + N): (query row - key row + H - 1) * (2 W - 1) + query column - key column + W - 1; the last
        three rows of the table are cls to patch, patch to cls, cls to cls.

    Source: BEiT, microsoft/unilm at 768a3c8.
    """
    rows, columns = grid
    span = 2 * columns - 1
    delta = coordinates[:, :, None] - coordinates[:, None]  # (R, N, N, 2)
    index = (delta[..., 0] + rows - 1) * span + delta[..., 1] + columns - 1
    to_patch = (2 * rows - 1) * span
    index = nn.functional.pad(index, (0, 0, 1, 0), value=to_patch)
    index = nn.functional.pad(index, (1, 0), value=to_patch + 1)
    index[:, 0, 0] = to_patch + 2
    return index


class RelativeBias(nn.Module):
    """A learned number for each head and each difference of positions, added to the logits.

    Zero at the start.

    Args:
        grid: (H, W) patches; differences of up to H - 1 rows and W - 1 columns have numbers of their own.
        heads: attention heads.

    Source: BEiT; shared by all blocks in pretraining, one for each block in fine-tuning.
    """

    def __init__(self, grid: Grid, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads))

    def relate(self, coordinates: Tensor, extent: Grid | None = None) -> tuple[Tensor, Grid]:
        """Rows of the table for tokens with cls first, and the grid that the table must cover for them.

        Args:
            coordinates: integer (R, N, 2).
            extent: (rows, columns) that the coordinates fill, where that may be more than the table covers.
        """
        grid = self.grid if extent is None else (max(extent[0], self.grid[0]), max(extent[1], self.grid[1]))
        return relative_index(coordinates, grid), grid

    def forward(self, relation: tuple[Tensor, Grid]) -> Tensor:
        """What `relate` gave -> (R, heads, 1 + N, 1 + N); the table is resized if it covers too little."""
        index, grid = relation
        table = self.table if grid == self.grid else resize_bias(self.table, self.grid, grid)
        return table[index].permute(0, 3, 1, 2)

    def set_grid(self, grid: Grid) -> None:
        """Cover another grid for good: the table is resized."""
        if grid != self.grid:
            self.table = nn.Parameter(resize_bias(self.table.detach(), self.grid, grid))
            self.grid = grid


def resize_bias(table: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """A relative-bias table for another grid: fine where distances are short, stretched where they are long.

    Args:
        table: ((2 H - 1)(2 W - 1) + 3, heads).
        grid: (H, W) that it covers.
        new_grid: (H', W') to cover.

    Returns:
        ((2 H' - 1)(2 W' - 1) + 3, heads); the three rows for cls are kept.

    Source: BEiT: cubic splines through the old numbers, placed at geometrically growing distances.
    """
    old_sides, sides = [2 * side - 1 for side in grid], [2 * side - 1 for side in new_grid]
    down, across = (torch.from_numpy(_stretch(old, new)).to(table) for old, new in zip(old_sides, sides, strict=True))
    patches = table[:-3].reshape(*old_sides, -1)
    resized = torch.einsum("ar,rch,bc->abh", down, patches, across).flatten(0, 1)
    return torch.cat([resized, table[-3:]])


@lru_cache(maxsize=16)
def _stretch(old: int, new: int) -> np.ndarray:
    """(new, old): the linear map of spline interpolation from `old` geometric places to `new` whole ones.

    A smaller range keeps the numbers of the differences it has.
    """
    if new <= old:
        cut = (old - new) // 2
        return np.eye(old)[cut : cut + new]
    if old == 1:
        return np.ones((new, 1))
    places = np.concatenate([[0.0], np.cumsum(growth(old, new) ** np.arange(old // 2))])
    places = np.concatenate([-places[:0:-1], places])  # (old,)
    wanted = np.arange(-(new // 2), new // 2 + 1).clip(places[0], places[-1])  # `old` 3 has no places to grow
    spline = make_interp_spline(places, np.eye(old), k=min(3, old - 1))
    return np.asarray(spline(wanted))


def growth(old: int, new: int) -> float:
    """The ratio q of geometric places, by bisection: 1 + q + q^2 + ... (old // 2 terms) reaches new // 2.

    BEiT searches in 1.01 to 1.5; the bound here grows where that is not enough.
    """
    low, high = 1.0, 1.5
    terms = np.arange(old // 2)
    if len(terms) == 1:  # 1 + nothing: whatever q is, the only place but the middle is at 1
        return low
    while (high**terms).sum() < new // 2:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if (middle**terms).sum() > new // 2:
            high = middle
        else:
            low = middle
    return high


def sincos_table(grid: Grid, width: int) -> Tensor:
    """Sines and cosines of the places of a grid, zeros for cls first.

    Args:
        grid: (H, W), in patches.
        width: D, a multiple of 4: D / 4 each of sin and cos of the column, then of the row, with frequencies
            10000^(-k / (D / 4)).

    Returns:
        float32 (1, 1 + H * W, D), patches in raster order.

    Raises:
        ValueError: the width is not a multiple of 4.

    Source: MAE (MoCo v3 puts the row first: the halves change places).
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that 4 divides, not {width}")
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = grid_coordinates(*grid).double()[:, :, None].mul(frequency).unbind(1)  # (H * W, D / 4) each
    places = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()
    return nn.functional.pad(places, (0, 0, 1, 0))[None]


def learned_table(grid: Grid, width: int) -> Tensor:
    """A table of absolute positions that is to be learned: normal numbers of deviation 0.02, cls first.

    Args:
        grid: (H, W), in patches.
        width: D.

    Returns:
        float32 (1, 1 + H * W, D), patches in raster order.

    Source: DINO, after DeiT; their cut at +-2 is a hundred deviations away.
    """
    return nn.init.trunc_normal_(torch.empty(1, 1 + grid[0] * grid[1], width), std=0.02)


def resize_absolute(table: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """A table of absolute positions for another grid, by bicubic interpolation; the row of cls is kept.

    Args:
        table: (1, 1 + H * W, D).
        grid: (H, W) of the table.
        new_grid: (H', W').

    Returns:
        (1, 1 + H' * W', D).

    Source: MAE, after DeiT. DINO's code asks for a factor of (H' + 0.1) / H in the place of the size.
    """
    if grid == new_grid:
        return table
    kind = torch.promote_types(table.dtype, torch.float32)  # half a precision is too little to interpolate in
    places = table[:, 1:].reshape(1, *grid, -1).permute(0, 3, 1, 2).to(kind)
    places = nn.functional.interpolate(places, new_grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], places.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
