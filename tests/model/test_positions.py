"""Positions: LoMaR's contextual buckets (SPEC.md A.5), MAE's sines and cosines (B.3), BEiT's bias (C.1, C.6)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from timm.models.beit import gen_relative_position_index

from lomar.model.positions import (
    CLS_BUCKET,
    RelativeBias,
    contextual_buckets,
    grid_coordinates,
    piecewise_index,
    relative_index,
    resize_absolute,
    resize_bias,
    sincos_table,
    with_cls,
)

coordinates = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=1, max_size=7)


def test_piecewise_index_is_exact_near_and_saturates_at_four() -> None:
    for sign in (1, -1):
        assert [piecewise_index(sign * d) for d in range(7)] == [sign * i for i in (0, 1, 2, 2, 3, 3, 3)]
    assert all(piecewise_index(d) == 3 and piecewise_index(-d) == -3 for d in range(4, 1000))


def test_buckets_of_a_7x7_window_are_the_released_ones() -> None:
    patches = contextual_buckets(grid_coordinates(7, 7)[None])[0]
    first = [[24, 23, 22, 22, 21, 21, 21], [17, 16, 15, 15, 14, 14, 14], *[[10, 9, 8, 8, 7, 7, 7]] * 2]
    first += [[3, 2, 1, 1, 0, 0, 0]] * 3
    centre = [[40, 40, 39, 38, 37, 36, 36]] * 2 + [[33, 33, 32, 31, 30, 29, 29], [26, 26, 25, 24, 23, 22, 22]]
    centre += [[19, 19, 18, 17, 16, 15, 15], *[[12, 12, 11, 10, 9, 8, 8]] * 2]
    assert patches[0].view(7, 7).tolist() == first
    assert patches[24].view(7, 7).tolist() == centre
    assert patches[48, :7].tolist() == [48, 48, 48, 47, 47, 46, 45]
    assert patches[48, 48] == 24


def test_every_pair_with_the_cls_token_has_its_own_bucket() -> None:
    buckets = contextual_buckets(with_cls(grid_coordinates(3, 5)[None]))
    assert buckets.shape == (1, 16, 16)
    assert (buckets[:, 0] == CLS_BUCKET).all()
    assert (buckets[:, :, 0] == CLS_BUCKET).all()
    assert (buckets[:, 1:, 1:] < CLS_BUCKET).all()


@given(coordinates, st.integers(-100, 100), st.integers(-100, 100))
def test_shifting_all_coordinates_changes_nothing(at: list[tuple[int, int]], down: int, right: int) -> None:
    here = torch.tensor([at])
    assert torch.equal(contextual_buckets(here), contextual_buckets(here + torch.tensor([down, right])))


@given(coordinates)
def test_exchanging_query_and_key_mirrors_the_bucket(at: list[tuple[int, int]]) -> None:
    """Bucket 24 is the middle of the 7x7 table, and a pair and its reverse lie opposite each other."""
    patches = contextual_buckets(torch.tensor([at]))[0]
    assert torch.equal(patches + patches.T, torch.full_like(patches, 48))


def test_grid_coordinates_are_row_and_column_in_raster_order() -> None:
    assert grid_coordinates(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


# Sines and cosines.


def test_sines_and_cosines_of_base_width_are_the_released_ones() -> None:
    """B.3 (R): columns in the first half of the channels, rows in the second; nothing for cls."""
    table = sincos_table((14, 14), 768)
    assert table.shape == (1, 197, 768) and table.dtype == torch.float32
    assert not table[0, 0].any()
    right, below = table[0, 1 + 1], table[0, 1 + 14]  # places (0, 1) and (1, 0)
    assert [round(right[channel].item(), 5) for channel in (0, 192, 384, 576)] == [0.84147, 0.54030, 0.0, 1.0]
    assert [round(below[channel].item(), 5) for channel in (0, 192, 384, 576)] == [0.0, 1.0, 0.84147, 0.54030]


def test_sines_and_cosines_are_those_of_column_and_row_at_falling_frequencies() -> None:
    """By hand: a grid of 2 x 3 and width 8, with frequencies 1 and 1 / 100."""
    table = sincos_table((2, 3), 8)[0, 1:].double()
    for place, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        expected = [f(at * w) for at in (column, row) for f in (math.sin, math.cos) for w in (1, 0.01)]
        torch.testing.assert_close(table[place], torch.tensor(expected).double(), rtol=0, atol=1e-7)


def test_sines_and_cosines_need_a_width_that_4_divides() -> None:
    with pytest.raises(ValueError, match="a width that 4 divides, not 18"):
        sincos_table((2, 3), 18)


@pytest.mark.parametrize(("grid", "new"), [((3, 5), (7, 11)), ((7, 11), (5, 3)), ((5, 5), (5, 7))])
def test_absolute_positions_are_resized_as_timm_does(grid: tuple[int, int], new: tuple[int, int]) -> None:
    """Bicubic, corners not aligned, without antialiasing, as MAE; cls is kept."""
    table = torch.randn(1, 1 + grid[0] * grid[1], 12, generator=torch.Generator().manual_seed(0))
    expected = resample_abs_pos_embed(table, list(new), list(grid), num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(resize_absolute(table, grid, new), expected, rtol=0, atol=1e-6)
    assert resize_absolute(table, grid, grid) is table


# Relative bias.


def test_the_relative_index_of_14x14_patches_is_the_released_one() -> None:
    """C.1."""
    (index,) = relative_index(grid_coordinates(14, 14)[None], (14, 14))
    assert index.shape == (197, 197) and index.dtype == torch.int64
    assert (index[1:, 1:].diagonal() == 364).all() and index[1:, 1:].max() == 728 and index[1:, 1:].min() == 0
    assert (index[0, 1:] == 729).all() and (index[1:, 0] == 730).all() and index[0, 0] == 731
    assert index.sum() == 14_270_119


def test_the_relative_index_of_a_2x3_grid_by_hand() -> None:
    """Query minus key: rows -1 to 1, columns -2 to 2, five columns to a row; then cls to patch, to cls, cls to cls."""
    assert relative_index(grid_coordinates(2, 3)[None], (2, 3))[0].tolist() == [
        [17, 15, 15, 15, 15, 15, 15],
        [16, 7, 6, 5, 2, 1, 0],
        [16, 8, 7, 6, 3, 2, 1],
        [16, 9, 8, 7, 4, 3, 2],
        [16, 12, 11, 10, 7, 6, 5],
        [16, 13, 12, 11, 8, 7, 6],
        [16, 14, 13, 12, 9, 8, 7],
    ]


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 7)])
def test_the_relative_index_is_timms(grid: tuple[int, int]) -> None:
    assert torch.equal(relative_index(grid_coordinates(*grid)[None], grid)[0], gen_relative_position_index(grid))


@given(coordinates, st.integers(-100, 100), st.integers(-100, 100))
def test_shifting_all_coordinates_leaves_the_relative_index(at: list[tuple[int, int]], down: int, right: int) -> None:
    here = torch.tensor([at])
    index = relative_index(here, (101, 101))
    assert torch.equal(index, relative_index(here + torch.tensor([down, right]), (101, 101)))
    assert index.min() >= 0 and index.max() < 201 * 201 + 3


def test_a_window_uses_the_middle_of_a_larger_table_and_a_table_too_small_is_stretched() -> None:
    """The same differences have the same numbers, whatever grid the table covers, if it covers them."""
    bias = RelativeBias((5, 7), heads=2)
    torch.nn.init.normal_(bias.table)
    window = grid_coordinates(3, 2)[None]
    small = RelativeBias((3, 2), heads=2)
    small.table.data = resize_bias(bias.table.data, (5, 7), (3, 2))
    torch.testing.assert_close(bias(bias.relate(window)), small(small.relate(window)), rtol=0, atol=0)
    assert torch.equal(bias(bias.relate(window, (3, 2))), bias(bias.relate(window)))
    larger = grid_coordinates(11, 7)[None]
    found = bias(bias.relate(larger, (11, 7)))
    bias.set_grid((11, 7))
    assert bias.grid == (11, 7) and bias.table.shape == (21 * 13 + 3, 2) and bias.table.requires_grad
    assert found.shape == (1, 2, 78, 78)
    assert torch.equal(found, bias(bias.relate(larger)))


@pytest.mark.parametrize(("grid", "new"), [((7, 7), (5, 3)), ((7, 5), (7, 2)), ((3, 5), (1, 1))])
def test_a_smaller_table_of_biases_keeps_its_numbers(grid: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.arange(float((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3))[:, None]
    smaller = resize_bias(table, grid, new)
    assert smaller.shape == ((2 * new[0] - 1) * (2 * new[1] - 1) + 3, 1)
    assert torch.equal(smaller[-3:], table[-3:])

    def number(of: torch.Tensor, sides: tuple[int, int], down: int, right: int) -> float:
        return of[(down + sides[0] - 1) * (2 * sides[1] - 1) + right + sides[1] - 1].item()

    for down in range(1 - new[0], new[0]):
        for right in range(1 - new[1], new[1]):
            assert number(smaller, new, down, right) == number(table, grid, down, right)


@pytest.mark.parametrize(("grid", "new"), [((3, 5), (7, 11)), ((2, 3), (5, 4)), ((1, 3), (3, 5)), ((2, 2), (7, 3))])
def test_a_larger_table_of_biases_keeps_the_numbers_of_distances_0_and_1_and_of_the_farthest(
    grid: tuple[int, int], new: tuple[int, int]
) -> None:
    """Places grow geometrically from 1 to the new farthest distance. One row, or two, have nothing to grow."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, 2, generator=generator).double()
    larger = resize_bias(table, grid, new)
    assert torch.equal(larger[-3:], table[-3:])
    old = table[:-3].view(2 * grid[0] - 1, 2 * grid[1] - 1, 2)
    wide = larger[:-3].view(2 * new[0] - 1, 2 * new[1] - 1, 2)

    def kept(side: int, new_side: int) -> list[tuple[int, int]]:
        """Old and new index of the distances that keep their numbers."""
        near = range(-min(1, side - 1), min(1, side - 1) + 1)
        return [(side - 1 + d, new_side - 1 + d) for d in near] + [(0, 0), (2 * side - 2, 2 * new_side - 2)]

    for row, new_row in kept(grid[0], new[0]):
        for column, new_column in kept(grid[1], new[1]):
            torch.testing.assert_close(wide[new_row, new_column], old[row, column], rtol=0, atol=1e-6)


def test_a_table_of_two_patches_a_side_says_the_same_of_all_farther_ones() -> None:
    table = torch.arange(12.0)[:, None]  # 3 x 3 differences, and cls
    wide = resize_bias(table, (2, 2), (4, 3))[:-3, 0].view(7, 5)
    assert torch.allclose(wide[:, 0], torch.tensor([0.0, 0, 0, 3, 6, 6, 6]))
    assert torch.allclose(wide[3], torch.tensor([3.0, 3, 4, 5, 5]))
