"""Masks: how many patches are hidden, and which."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lomar.methods.masks import UniformMask, hide_smallest
from lomar.seeding import seeded

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
COUNTS = {  # SPEC.md A.4
    5: (7, 10, 12, 15, 17, 18, 20, 22),
    7: (14, 19, 24, 29, 34, 36, 39, 44),
    9: (24, 32, 40, 48, 56, 60, 64, 72),
    11: (36, 48, 60, 72, 84, 90, 96, 108),
    14: (58, 78, 98, 117, 137, 147, 156, 176),
}


@pytest.mark.parametrize("side", COUNTS)
def test_counts_are_the_released_ones(side: int) -> None:
    assert tuple(UniformMask(side**2, ratio).count for ratio in RATIOS) == COUNTS[side]


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(1, 5), st.integers(0, 2**32))
def test_every_view_hides_equally_many(patches: int, ratio: float, views: int, seed: int) -> None:
    if not 0 < int(patches * ratio) < patches:
        with pytest.raises(ValueError, match="hide some, not all"):
            UniformMask(patches, ratio)
        return
    hidden = UniformMask(patches, ratio).draw(views, seeded(seed))
    assert hidden.shape == (views, patches)
    assert (hidden.sum(-1) == int(patches * ratio)).all()


def test_the_smallest_noise_is_hidden() -> None:
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.2]])
    assert hide_smallest(noise, 2).tolist() == [[False, True, False, False, True]]


def test_every_patch_is_equally_likely_to_be_hidden() -> None:
    """Of 3,000 views each of 5 patches is hidden in about 3/5 (five deviations: 135)."""
    hidden = UniformMask(5, 0.6).draw(3000, seeded(0, "test")).sum(0)
    assert ((hidden - 1800).abs() < 135).all()
