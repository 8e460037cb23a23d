"""Contextual relative position, by the tables of SPEC.md A.5."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lomar.model.positions import CLS_BUCKET, contextual_buckets, grid_coordinates, piecewise_index

coordinates = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=1, max_size=7)


def test_piecewise_index_is_exact_near_and_saturates_at_four() -> None:
    for sign in (1, -1):
        assert [piecewise_index(sign * d) for d in range(7)] == [sign * i for i in (0, 1, 2, 2, 3, 3, 3)]
    assert all(piecewise_index(d) == 3 and piecewise_index(-d) == -3 for d in range(4, 1000))


def test_buckets_of_a_7x7_window_are_the_released_ones() -> None:
    patches = contextual_buckets(grid_coordinates(7, 7)[None])[0, 1:, 1:]
    first = [[24, 23, 22, 22, 21, 21, 21], [17, 16, 15, 15, 14, 14, 14], *[[10, 9, 8, 8, 7, 7, 7]] * 2]
    first += [[3, 2, 1, 1, 0, 0, 0]] * 3
    centre = [[40, 40, 39, 38, 37, 36, 36]] * 2 + [[33, 33, 32, 31, 30, 29, 29], [26, 26, 25, 24, 23, 22, 22]]
    centre += [[19, 19, 18, 17, 16, 15, 15], *[[12, 12, 11, 10, 9, 8, 8]] * 2]
    assert patches[0].view(7, 7).tolist() == first
    assert patches[24].view(7, 7).tolist() == centre
    assert patches[48, :7].tolist() == [48, 48, 48, 47, 47, 46, 45]
    assert patches[48, 48] == 24


def test_every_pair_with_the_cls_token_has_its_own_bucket() -> None:
    buckets = contextual_buckets(grid_coordinates(3, 5)[None])
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
    patches = contextual_buckets(torch.tensor([at]))[0, 1:, 1:]
    assert torch.equal(patches + patches.T, torch.full_like(patches, 48))


def test_grid_coordinates_are_row_and_column_in_raster_order() -> None:
    assert grid_coordinates(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
