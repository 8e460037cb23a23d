"""Masks: how many patches are hidden, and which."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomar.methods.masks import CHOICES, BlockwiseMask, KeptMask, Share, UniformMask, hide_largest, hide_smallest
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


@pytest.mark.parametrize(("patches", "ratio", "hidden"), [(196, 0.75, 147), (49, 0.8, 40), (576, 0.75, 432)])
def test_a_kept_mask_counts_what_stays_visible_as_mae_does(patches: int, ratio: float, hidden: int) -> None:
    """B.2: int(N (1 - ratio)) are kept; of 49 at 0.8 that hides one more than LoMaR's int(N ratio)."""
    mask = KeptMask(patches, ratio)
    assert mask.count == hidden
    assert mask.draw(3, seeded(0)).sum(-1).tolist() == [hidden] * 3


def test_a_kept_mask_keeps_the_smallest_noise() -> None:
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.2], [0.6, 0.7, 0.8, 0.9, 0.0]])
    assert (~hide_largest(noise, 3)).tolist() == [[False, True, False, False, True], [True, False, False, False, True]]
    drawn = torch.rand(4, 49, generator=seeded(1))
    kept = ~KeptMask(49, 0.8).draw(4, seeded(1))
    assert (drawn[kept].view(4, 9).max(1).values < drawn[~kept].view(4, 40).min(1).values).all()


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(1, 5), st.integers(0, 2**32))
def test_every_view_of_a_kept_mask_keeps_equally_many(patches: int, ratio: float, views: int, seed: int) -> None:
    kept = int(patches * (1 - ratio))
    if not 0 < kept < patches:
        with pytest.raises(ValueError, match="hide some, not all"):
            KeptMask(patches, ratio)
        return
    assert ((~KeptMask(patches, ratio).draw(views, seeded(seed))).sum(-1) == kept).all()


def test_blocks_hide_as_many_as_beits() -> None:
    """C.3: of 10,000 draws of the released code the mean was 74.48, the least 64, and 67.1 % hid all 75."""
    mask = BlockwiseMask((14, 14), 0.383, 16)
    assert mask.count == 75 and not mask.even
    hidden = mask.draw(3000, seeded(0, "test")).sum(-1)
    assert hidden.max() == 75 and hidden.min() >= 55
    assert hidden.float().mean().item() == pytest.approx(74.5, abs=0.1)
    assert hidden.eq(75).float().mean().item() == pytest.approx(0.67, abs=0.025)


@pytest.mark.parametrize(("min_block", "mean"), [(4, 18.95), (16, 18.5)])
def test_blocks_of_a_window_hide_nearly_19_of_49(min_block: int, mean: float) -> None:
    """C.8, whose means these are."""
    hidden = BlockwiseMask((7, 7), 0.39, min_block).draw(1000, seeded(0, "test")).sum(-1)
    assert hidden.max() == 19
    assert hidden.float().mean().item() == pytest.approx(mean, abs=0.1)


def test_a_block_is_a_rectangle_of_the_allowed_area_and_aspect_anywhere_in_the_view() -> None:
    """C.3: area from 4 to 40, aspect from 0.3 to 1 / 0.3, sides below the view's 7 x 11; up to rounding."""
    mask, generator = BlockwiseMask((7, 11), 0.55, 4), seeded(0, "test")
    shapes, covered = set(), torch.zeros(7, 11, dtype=torch.bool)
    for _ in range(500):
        hidden = torch.zeros(7, 11, dtype=torch.bool)
        assert mask._hide_block(hidden, 40, generator)
        at = hidden.nonzero()
        height, width = (at.amax(0) - at.amin(0) + 1).tolist()
        assert len(at) == height * width <= 40
        shapes.add((height, width))
        covered |= hidden
    assert {height for height, _ in shapes} == set(range(1, 7))
    assert {width for _, width in shapes} == set(range(1, 11))
    # Sides are rounded, so the true ones may be half a patch away.
    assert all((height + 0.5) / (width - 0.5) > 0.3 < (width + 0.5) / (height - 0.5) for height, width in shapes)
    assert all((height + 0.5) * (width + 0.5) > 4 for height, width in shapes)
    assert covered.all()


def test_a_block_hides_no_more_than_there_is_room_for_and_something_new() -> None:
    """With room for one patch it hides that one or nothing; where all is hidden, nothing can be added."""
    mask, found = BlockwiseMask((7, 7), 0.5, 16), []
    for seed in range(50):
        hidden = torch.zeros(7, 7, dtype=torch.bool)
        found.append(mask._hide_block(hidden, 1, seeded(seed)))
        assert hidden.sum() == found[-1]
    assert {*found} == {True, False}
    assert not mask._hide_block(torch.ones(7, 7, dtype=torch.bool), 24, seeded(0))


def test_every_place_is_hidden_in_about_as_many_views_as_its_mirror_images() -> None:
    """Blocks lie more often in the middle, but no side, and neither axis, is preferred."""
    share = BlockwiseMask((6, 6), 0.4, 4).draw(3000, seeded(0, "test")).float().mean(0).view(6, 6)
    for other in (share.flip(0), share.flip(1), share.T):
        assert (share - other).abs().max() < 0.07  # five deviations of a difference: 0.065


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.floats(0.01, 0.99),
    st.integers(1, 40),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_blocks_hide_at_least_one_patch_at_most_the_count_and_never_all(
    grid: tuple[int, int], ratio: float, min_block: int, seed: int
) -> None:
    patches = grid[0] * grid[1]
    if not 0 < int(patches * ratio) < patches:
        with pytest.raises(ValueError, match="hide some, not all"):
            BlockwiseMask(grid, ratio, min_block)
        return
    mask = BlockwiseMask(grid, ratio, min_block)
    hidden = mask.draw(3, seeded(seed))
    assert hidden.shape == (3, patches) and hidden.dtype == torch.bool
    counts = hidden.sum(-1)
    assert (counts >= 1).all() and (counts <= int(patches * ratio)).all() and (counts < patches).all()


@given(st.integers(1, 9), st.integers(2, 9), st.data(), st.sampled_from(CHOICES), st.integers(0, 2**32))
def test_a_share_is_of_the_hidden_patches_and_of_the_size_asked_for(
    rows: int, columns: int, data: st.DataObject, choice: str, seed: int
) -> None:
    hidden = KeptMask(rows * columns, data.draw(st.floats(0.05, 0.5))).draw(3, seeded(seed))
    count = data.draw(st.integers(1, int(hidden[0].sum())))
    share = Share((rows, columns), count, choice)
    predicted = share.draw(hidden, seeded(seed, "share"))
    assert (predicted <= hidden).all() and predicted.sum(-1).tolist() == [count] * 3
    assert torch.equal(predicted, share.draw(hidden, seeded(seed, "share")))


def test_furthest_patches_by_hand() -> None:
    """On a row of eleven with the middle visible: whichever is first, the further end is second."""
    hidden = torch.ones(1, 11, dtype=torch.bool)
    hidden[:, 5] = False
    for seed in range(20):
        first = int(Share((1, 11), 1).draw(hidden, seeded(seed)).nonzero()[0, 1])
        both = Share((1, 11), 2).draw(hidden, seeded(seed))[0].nonzero().flatten().tolist()
        assert set(both) == {first, 10 if first < 5 else 0}
        three = Share((1, 11), 3).draw(hidden, seeded(seed))[0].nonzero().flatten()
        assert (three[1:] - three[:-1]).min() >= 2


def test_uniform_patches_are_chosen_alike() -> None:
    """Of 3,000 views each of 5 hidden patches is predicted in about 2/5 (five deviations: 135)."""
    hidden = torch.tensor([[True, False, True, True, True, True, False]]).expand(3000, -1)
    counts = Share((1, 7), 2, "uniform").draw(hidden, seeded(0, "test")).sum(0)
    assert counts[~hidden[0]].eq(0).all() and ((counts[hidden[0]] - 1200).abs() < 135).all()
