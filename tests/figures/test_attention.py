"""Claims about the pictures of attention, read off their pixels."""

from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from lomar.figures import attention
from lomar.figures.attention import COLOURS, IMAGE_SHARES, QUERY, AttentionPanel, figure1
from lomar.figures.sheet import HIDDEN

SIDE, PATCH, K = 70, 10, 3  # a 7 x 7 grid; enlarged three times for a tile of 210 px
SCALE = 3
IMAGE_AT_LEAST, IMAGE_AT_MOST = IMAGE_SHARES
LOWEST, HIGHEST = (np.array(matplotlib.colormaps[COLOURS](end)[:3]) * 255 for end in (0.0, 1.0))


def panel(**changes: Any) -> AttentionPanel:
    """A black image, and the window of 3 x 3 patches at patch (1, 2); its patch (2, 0) looks at (0, 1) most."""
    shares = np.zeros((2, K * K))
    shares[0, [1, 5]] = 0.8, 0.2
    shares[1] = 1 / 9
    usual: dict[str, Any] = {
        "original": np.zeros((3, SIDE, SIDE), np.float32),
        "corner": (1, 2),
        "patch_px": PATCH,
        "hidden": np.arange(K * K) > 0,
        "query": 6,
        "shares": shares,
    }
    return AttentionPanel(**{**usual, **changes})


def tiles(figure: Image.Image, columns: int = 3) -> list[np.ndarray]:
    """The tiles of the first row, found by their place: the first painted row, and the sheet's gaps."""
    pixels, side = np.asarray(figure), SIDE * SCALE
    gap = max(4, side // 40)
    left = 3 * gap
    top = np.flatnonzero((pixels[:, left] != 255).any(axis=1))[0]
    return [pixels[top : top + side, x : x + side] for x in range(left, left + columns * (side + gap), side + gap)]


def patch(tile: np.ndarray, row: int, column: int) -> np.ndarray:
    """The colour of a patch of the window, which must be one colour; clear of outlines."""
    y, x = (1 + row) * PATCH * SCALE + 8, (2 + column) * PATCH * SCALE + 8
    inner = tile[y : y + 14, x : x + 14].reshape(-1, 3)
    assert (inner == inner[0]).all()
    return inner[0].astype(int)


def test_a_map_goes_from_the_first_colour_at_no_attention_to_the_last_at_its_highest() -> None:
    _, first, even = tiles(figure1([panel()], (2, 4), (1.5, 2.5), ""))
    assert np.abs(patch(first, 0, 1) - (1 - IMAGE_AT_MOST) * HIGHEST).max() <= 1
    assert np.abs(patch(first, 0, 0) - (1 - IMAGE_AT_LEAST) * LOWEST).max() <= 1
    between = patch(first, 1, 2).sum()
    assert patch(first, 0, 0).sum() < between < patch(first, 0, 1).sum()
    assert all(np.array_equal(patch(even, *divmod(i, K)), patch(first, 0, 1)) for i in range(K * K))


def test_the_image_is_seen_in_grey_below_the_colours() -> None:
    image = np.zeros((3, SIDE, SIDE), np.float32)
    image[1] = 0.75
    _, first, _ = tiles(figure1([panel(original=image)], (2, 4), (1.5, 2.5), ""))
    grey = 0.25 * 255
    assert np.abs(patch(first, 0, 0) - (1 - IMAGE_AT_LEAST) * LOWEST - IMAGE_AT_LEAST * grey).max() <= 1
    assert np.abs(patch(first, 0, 1) - (1 - IMAGE_AT_MOST) * HIGHEST - IMAGE_AT_MOST * grey).max() <= 1


def test_the_first_column_shows_what_the_model_saw() -> None:
    masked, *_ = tiles(figure1([panel()], (2, 4), (1.5, 2.5), ""))
    assert patch(masked, 0, 0).tolist() == [0, 0, 0]
    assert patch(masked, 0, 1).tolist() == patch(masked, 2, 2).tolist() == [HIDDEN] * 3


def test_the_query_is_outlined_in_every_column_and_nothing_else_is() -> None:
    for tile in tiles(figure1([panel()], (2, 4), (1.5, 2.5), "")):
        framed = (tile == QUERY).all(axis=2)
        rows, columns = np.flatnonzero(framed.any(axis=1)), np.flatnonzero(framed.any(axis=0))
        assert (rows[0], rows[-1]) == (3 * 30 - 2, 4 * 30 + 1)
        assert (columns[0], columns[-1]) == (2 * 30 - 2, 3 * 30 + 1)
        assert not framed[3 * 30 : 4 * 30, 2 * 30 : 3 * 30].any()


def test_outside_the_window_there_is_only_a_hint_of_the_image() -> None:
    for tile in tiles(figure1([panel()], (2, 4), (1.5, 2.5), "")):
        outside = np.ones((SIDE * SCALE, SIDE * SCALE), bool)
        outside[30 - 2 : 4 * 30 + 2, 2 * 30 - 2 : 5 * 30 + 2] = False
        assert tile[outside].min() > 200


def test_titles_give_distances_and_below_each_map_stands_its_highest_share(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    centred, sheet = attention._centred, attention.sheet
    monkeypatch.setattr(attention, "_centred", lambda text, side: said.append(text) or centred(text, side))
    monkeypatch.setattr(attention, "sheet", lambda tiles, groups, text: said.append(groups) or sheet(tiles, groups, ""))
    figure1([panel(), panel(hidden=np.zeros(9, bool))], (2, 4), (1.52, 2.48), "")
    texts, (group,) = [text for text in said[:-1] if text], said[-1]
    assert texts == ["0 to 80.0%", "0 to 11.1%"] * 2
    assert group.titles == ("masked", "layer 2: 1.5 patches", "layer 4: 2.5 patches")
    figure1([panel(hidden=np.zeros(9, bool))], (2, 4), (1.52, 2.48), "")
    assert said[-1][0].titles[0] == "image"


def test_a_small_window_of_a_large_image_is_shown_with_its_surroundings() -> None:
    small = panel(hidden=np.ones(4, bool), shares=np.eye(2, 4), query=3, corner=(5, 0))
    _, first, _ = tiles(figure1([small], (2, 4), (1.5, 2.5), ""))
    # Six of the seven patches are shown: rows 1 to 6, columns 0 to 5, so the query is at (5, 1) of them.
    framed = np.flatnonzero((first == QUERY).all(axis=2).any(axis=1))
    assert (framed[0], framed[-1]) == (5 * 35 - 2, 6 * 35 - 1)


def test_attention_of_nan_is_drawn() -> None:
    with np.errstate(all="raise"):
        figure1([panel(shares=np.full((2, 9), np.nan)), panel(shares=np.zeros((2, 9)))], (2, 4), (1.5, 2.5), "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shares": np.zeros((2, 8))}, r"shares must be \(L, 9\), not \(2, 8\)"),
        ({"query": 9}, "patch 9 is outside of a window of 9"),
        ({"corner": (5, 0)}, r"30 px at patch \(5, 0\) leaves an image of 70 px"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        panel(**changes)


@pytest.mark.parametrize(("layers", "distances"), [((2,), (1.5, 2.5)), ((2, 4), (1.5,)), ((2, 4, 6), (1, 2, 3))])
def test_layers_maps_and_distances_must_be_equally_many(layers: tuple[int, ...], distances: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="maps or distances for"):
        figure1([panel()], layers, distances, "")


def test_there_must_be_something_to_draw() -> None:
    with pytest.raises(ValueError, match="no panel"):
        figure1([], (2,), (1.5,), "")
