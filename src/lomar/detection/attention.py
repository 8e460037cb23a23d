"""Attention of patches alone, without cls, on the whole image or within windows, as a detector's backbone has it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lomar.model.attention import (
    ALL,
    BACKENDS,
    KEPT_TOKENS,
    Attention,
    Places,
    Relation,
    attend,
    backend_for,
    recomputed,
)
from lomar.model.positions import (
    CLS_BUCKET,
    SIDE,
    ContextualPosition,
    Grid,
    RelativeBias,
    grid_coordinates,
    piecewise_indices,
    relative_index,
    resize_bias,
)


class DecomposedPosition(nn.Module):
    """A learned vector for each distance in rows and one for each in columns; queries meet both of a key's.

    b[i, j] = q_i . (Rh[row_i - row_j] + Rw[column_i - column_j]). Zero at the start.

    Args:
        grid: (H, W) whose distances have vectors of their own; others are interpolated between them.
        head_dim: width d of one attention head.
        scaled: whether the query is divided by sqrt(d) first.

    Source: MViTv2; unscaled in detectron2's ViTDet, scaled in the ViTAE repository's.
    """

    def __init__(self, grid: Grid, head_dim: int, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, head_dim))

    def along(self, q: Tensor, extent: Grid) -> tuple[Tensor, Tensor]:
        """What each query finds in each row of keys, and in each column.

        Args:
            q: (R, heads, H * W, d).
            extent: (H, W) of its grid.

        Returns:
            (R, heads, H * W, H) and (R, heads, H * W, W).
        """
        rows, columns = extent
        if self.scaled:
            q = q * q.shape[-1] ** -0.5
        q = q.unflatten(2, extent)
        by_row = torch.einsum("rhyxd,yjd->rhyxj", q, _vectors(self.rel_pos_h, rows).to(q.dtype))
        by_column = torch.einsum("rhyxd,xjd->rhyxj", q, _vectors(self.rel_pos_w, columns).to(q.dtype))
        return by_row.flatten(2, 3), by_column.flatten(2, 3)


def _vectors(table: Tensor, side: int) -> Tensor:
    """(2 S - 1, d) vectors of distances -> (side, side, d) of query and key; interpolated where `side` is not S."""
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    at = torch.arange(side, device=table.device)
    return table[at[:, None] - at + side - 1]


def folded(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor, extent: Grid) -> Tensor:
    """Attention with a decomposed position, without its bias ever being written out.

    q . k + a[row of key] + b[column of key] is the product of (q, a, b) and (k, row as one-hot, column as one-hot).

    Args:
        q, k, v: (R, heads, H * W, d).
        by_row, by_column: of `DecomposedPosition.along`.
        extent: (H, W).

    Returns:
        (R, heads, H * W, d).
    """
    at = grid_coordinates(*extent, k.device)
    one_hot = torch.cat([F.one_hot(at[:, axis], extent[axis]) for axis in (0, 1)], dim=1).to(k.dtype)
    keys = torch.cat([k, one_hot.expand(*k.shape[:2], -1, -1)], dim=-1)
    queries = torch.cat([q * q.shape[-1] ** -0.5, by_row, by_column], dim=-1)
    lacking = -queries.shape[-1] % 8  # which the fast kernels ask for
    keys, queries = F.pad(keys, (0, lacking)), F.pad(queries, (0, lacking))
    return F.scaled_dot_product_attention(queries, keys, v, scale=1.0)


def contextual_on_grid(q: Tensor, table: Tensor, extent: Grid, along: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """LoMaR's contextual bias of the patches of a grid, by small matrix products in the place of looking it up.

    What a query finds depends on the row index and the column index of a key, each of which takes one of 7 values: a
    product picks the rows, another one the columns. What a decomposed position finds is added on the way, where it
    costs nothing.

    Args:
        q: (R, heads, H * W, d).
        table: (d, buckets), of `ContextualPosition`.
        extent: (H, W).
        along: what `DecomposedPosition.along` gives, or None.

    Returns:
        (R, heads, H * W, H * W): `contextual_bias` without cls, and the decomposed one.
    """
    of_rows, of_columns = (_picked(side, q) for side in extent)  # (H, H, 7) and (W, W, 7): query, key, index
    found = (q @ table[:, :CLS_BUCKET].to(q.dtype)).unflatten(-1, (SIDE, SIDE)).unflatten(2, extent)
    left = torch.einsum("rhyxab,yja->rhyxjb", found, of_rows).flatten(2, 3)  # (R, heads, H * W, H, 7)
    right = of_columns.transpose(1, 2).repeat(extent[0], 1, 1)  # (H * W, 7, W)
    right = right.expand(*q.shape[:2], -1, -1, -1)
    if along is not None:
        by_row, by_column = along
        left = torch.cat([left + by_row[..., None], torch.ones_like(left[..., :1])], dim=-1)
        right = torch.cat([right, by_column[..., None, :]], dim=-2)
    return (left @ right).flatten(-2)


def _picked(side: int, like: Tensor) -> Tensor:
    """(side, side, 7): the index of each distance along an axis, as one-hot."""
    at = torch.arange(side, device=like.device)
    return F.one_hot(piecewise_indices(at[:, None] - at), SIDE).to(like.dtype)


class GridAttention(Attention):
    """Multi-head self-attention of a grid of patches, which may be cut into windows.

    softmax(q k' / sqrt(d) + b) v, where b adds up what there is of: a contextual bias (LoMaR), a learned bias (BEiT),
    and a decomposed position (ViTDet).

    Windows lie side by side from the upper left corner; what they lack at the right and below are tokens of zeros,
    which are looked at like others, as in ViTDet.

    Args:
        width: token width D.
        heads: number of heads.
        grid: (H, W) of the image in patches, for which a decomposed position is made.
        window: side of the windows in patches; 0 for none.
        key_bias: whether keys have a bias.
        contextual: whether there is a contextual position.
        bias_grid: (H, W) that a learned bias covers, or None for no such bias.
        decomposed: whether there is a decomposed position.
        scaled: whether its queries are scaled.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        grid: Grid,
        window: int = 0,
        key_bias: bool = True,
        contextual: bool = False,
        bias_grid: Grid | None = None,
        decomposed: bool = False,
        scaled: bool = False,
    ) -> None:
        super().__init__(width, heads, key_bias)
        head_dim = width // heads
        self.window = window
        own = (window, window) if window else grid
        self.rpe = ContextualPosition(head_dim) if contextual else None
        self.rel_pos_bias = RelativeBias(bias_grid, heads) if bias_grid else None
        self.rel_pos = DecomposedPosition(own, head_dim, scaled) if decomposed else None

    def relate(self, coordinates: Tensor, extent: Grid | None) -> Places:
        """What the attention of one window, or of the whole image, needs to know of positions.

        Args:
            coordinates: (1, H * W, 2) of the image.
            extent: its (H, W).
        """
        assert extent is not None
        at = grid_coordinates(self.window, self.window, coordinates.device)[None] if self.window else coordinates
        index = None
        if self.rel_pos_bias is not None:
            index = relative_index(at, self._covered(self._own(extent)))[:, 1:, 1:]
        return Places(at.int(), index, extent)

    def forward(self, x: Tensor, relation: Relation, asked: slice = ALL) -> Tensor:
        """(B, H * W, D) tokens of an image -> the same shape.

        Args:
            x: tokens.
            relation: what `relate` gave.
            asked: all.
        """
        assert isinstance(relation, Places) and relation.extent is not None and asked == ALL
        if not self.window:
            return super().forward(x, relation)
        windows, padded = to_windows(x.unflatten(1, relation.extent), self.window)
        mixed = super().forward(windows, relation)
        return from_windows(mixed, self.window, padded, relation.extent).flatten(1, 2)

    def bias(self, q: Tensor, relation: Relation, asked: slice = ALL) -> Tensor | None:
        """All that is added to the logits: (R, heads, N, N), or None."""
        assert isinstance(relation, Places)
        return self._bias_of(q, relation, ALL)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, relation: Relation, asked: slice) -> Tensor:
        """(R, heads, N, d), without a bias being written out where it would be large."""
        assert isinstance(relation, Places) and relation.extent is not None
        if self.rpe is not None and self.rel_pos is None and backend_for(q, k.shape[-2]) == "fused":
            return BACKENDS["fused"](q, k, v, self.rpe.table, relation, asked)
        if self.rel_pos is not None and self.rpe is None and self.rel_pos_bias is None and q.device.type != "cpu":
            own = self._own(relation.extent)
            return folded(q, k, v, *self.rel_pos.along(q, own), own)
        if k.shape[-2] > KEPT_TOKENS and any((self.rpe, self.rel_pos, self.rel_pos_bias)):
            return recomputed(q, k, v, lambda few, row, heads: self._some_bias(few, relation, heads))
        bias = self._bias_of(q, relation, ALL)
        return attend(q, k, v, bias if bias is None else bias.to(q.dtype))

    def _own(self, extent: Grid) -> Grid:
        return (self.window, self.window) if self.window else extent

    def _covered(self, own: Grid) -> Grid:
        """The grid that a learned bias must cover: never less than it does."""
        assert self.rel_pos_bias is not None
        rows, columns = self.rel_pos_bias.grid
        return max(rows, own[0]), max(columns, own[1])

    def _some_bias(self, q: Tensor, places: Places, heads: slice) -> Tensor:
        bias = self._bias_of(q, places, heads)
        assert bias is not None
        return bias.to(q.dtype)

    def _bias_of(self, q: Tensor, places: Places, heads: slice) -> Tensor | None:
        """(R, h, N, N) of some heads, whose queries are given."""
        assert places.extent is not None
        own = self._own(places.extent)
        parts = []
        along = None if self.rel_pos is None else self.rel_pos.along(q, own)
        if self.rpe is not None:
            parts.append(contextual_on_grid(q, self.rpe.table, own, along))
        if self.rel_pos_bias is not None:
            assert places.buckets is not None
            table = resize_bias(self.rel_pos_bias.table, self.rel_pos_bias.grid, self._covered(own))
            parts.append(table[:, heads][places.buckets].permute(0, 3, 1, 2))
        if along is not None and self.rpe is None:
            by_row, by_column = along
            parts.append((by_row[..., :, None] + by_column[..., None, :]).flatten(-2))
        return sum(parts[1:], parts[0]) if parts else None


def to_windows(x: Tensor, side: int) -> tuple[Tensor, Grid]:
    """Tokens of images (B, H, W, D) -> windows (B * n, side * side, D), and (H, W) with what was added to fill them."""
    rows, columns = (-(-extent // side) * side for extent in x.shape[1:3])
    x = F.pad(x, (0, 0, 0, columns - x.shape[2], 0, rows - x.shape[1]))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, windows down, side, windows across, side, D)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2), (rows, columns)


def from_windows(windows: Tensor, side: int, padded: Grid, extent: Grid) -> Tensor:
    """What `to_windows` gave, back to (B, H, W, D)."""
    down, across = padded[0] // side, padded[1] // side
    x = windows.unflatten(1, (side, side)).unflatten(0, (-1, down, across)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, : extent[0], : extent[1]]
