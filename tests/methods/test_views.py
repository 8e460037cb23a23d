"""Windows: where they may lie, how they are drawn, and the released code's layout."""

from math import gcd

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lomar.data.loader import SampleKey
from lomar.methods.views import LocalWindows, ReleasedWindows, WholeImage, local_windows, released_windows
from lomar.seeding import seeded


def corners_of_batch(views: LocalWindows, batch_size: int, batch: int = 0) -> torch.Tensor:
    """(B, V, 2) for images 0 to B - 1 as one global batch."""
    keys = [SampleKey(epoch=0, index=i, batch=batch, slot=i) for i in range(batch_size)]
    return torch.stack([views.corners(key, seed=0) for key in keys])


def distinct(corners: torch.Tensor) -> list[int]:
    """Distinct windows of each image."""
    return [len({tuple(c) for c in image}) for image in corners.tolist()]


@given(st.integers(1, 13), st.integers(0, 11), st.integers(0, 7), st.integers(1, 9), st.integers(0, 2**32))
def test_windows_lie_inside_the_grid(size: int, down: int, right: int, count: int, seed: int) -> None:
    at = local_windows((size + down, size + right), size, count, seeded(seed))
    assert at.shape == (count, 2)
    assert (at >= 0).all()
    assert (at[:, 0] <= down).all()
    assert (at[:, 1] <= right).all()


def test_every_corner_of_a_rectangular_grid_is_equally_likely() -> None:
    """3 x 2 places of a 3x3 window on a 5x4 grid, 6,000 draws: each about 1,000 (five deviations: 145)."""
    at = local_windows((5, 4), 3, 6000, seeded(0, "test"))
    counts = torch.bincount(at @ torch.tensor([2, 1]), minlength=6)
    assert counts.shape == (6,)
    assert ((counts - 1000).abs() < 145).all()


@pytest.mark.parametrize("batch_size", [5, 256])
def test_four_draws_give_about_four_windows_whatever_the_batch(batch_size: int) -> None:
    """On a 14x14 grid a 7x7 window has 64 places: four draws have 64 (1 - (63/64)^4) = 3.91 distinct ones on average.

    The released layout has one at batch 256, and four at batch 5.
    """
    ours = distinct(corners_of_batch(LocalWindows((14, 14), 7, 4), batch_size))
    assert 3.8 <= sum(ours) / batch_size <= 4
    released = distinct(corners_of_batch(ReleasedWindows((14, 14), 7, 4, batch_size), batch_size))
    assert set(released) == {4 // gcd(batch_size, 4)}


def test_images_draw_their_own_windows() -> None:
    corners = corners_of_batch(LocalWindows((14, 14), 7, 4), 64)
    assert len({tuple(image.flatten().tolist()) for image in corners}) == 64


def test_a_sample_draws_the_same_windows_wherever_it_stands() -> None:
    views = LocalWindows((14, 14), 7, 4)
    here = views.corners(SampleKey(epoch=3, index=5, batch=0, slot=0), seed=1)
    assert torch.equal(here, views.corners(SampleKey(epoch=3, index=5, batch=9, slot=7), seed=1))
    for other in (SampleKey(4, 5, 0, 0), SampleKey(3, 6, 0, 0)):
        assert not torch.equal(here, views.corners(other, seed=1))
    assert not torch.equal(here, views.corners(SampleKey(3, 5, 0, 0), seed=2))


def test_the_whole_image_is_one_view_of_its_own_shape() -> None:
    views = WholeImage((7, 11))
    assert (views.size, views.count) == ((7, 11), 1)
    assert corners_of_batch(views, 3).tolist() == [[[0, 0]]] * 3


@given(st.integers(1, 40), st.integers(1, 8))
def test_the_released_layout_repeats_windows_by_the_common_divisor(images: int, count: int) -> None:
    """SPEC.md A.3: M / gcd(N, M) distinct windows an image."""
    shared = torch.randperm(8, generator=seeded(0))[:count]
    corners = released_windows(shared, shared, images)
    assert set(distinct(corners)) == {count // gcd(images, count)}


def test_the_released_layout_shares_windows_within_a_call_of_256() -> None:
    corners = corners_of_batch(ReleasedWindows((14, 14), 7, 4, 300), 300)
    first, second = corners[:256].flatten(0, 1), corners[256:].flatten(0, 1)
    assert len(first.unique(dim=0)) == len(second.unique(dim=0)) == 4
    assert not torch.equal(first.unique(dim=0), second.unique(dim=0))
    for axis in (0, 1):  # no two shared windows have a row or a column in common
        assert len(first[:, axis].unique()) == 4
    assert not torch.equal(corners, corners_of_batch(ReleasedWindows((14, 14), 7, 4, 300), 300, batch=1))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="7x7 patches does not fit a grid of 9x6"):
        local_windows((9, 6), 7, 1, seeded(0))
    with pytest.raises(ValueError, match="at most 2 windows here, not 3"):
        ReleasedWindows((8, 8), 7, 3, 4)
