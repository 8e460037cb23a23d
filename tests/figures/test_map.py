"""Claims about the map of thumbnails and the sheet of neighbours."""

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import cdist

from lomar.figures.map import (
    MOST_COLOURS,
    NEAREST_PX,
    Shown,
    _shortened,
    cell_px,
    colours,
    grid_of,
    map_figure,
    nearest_figure,
)
from lomar.figures.sheet import typeface


def solid(*colour: int) -> np.ndarray:
    return np.full((13, 13, 3), colour, np.uint8)


def holds(picture: Image.Image, colour: tuple[int, ...]) -> int:
    """How many pixels have a colour."""
    return int((np.asarray(picture) == np.array(colour)).all(axis=2).sum())


@pytest.mark.parametrize("count", [1, 2, 3, 7, 97, 503])
def test_each_image_has_a_cell_of_its_own(count: int) -> None:
    cells, (rows, columns) = grid_of(np.random.default_rng(0).normal(size=(count, 2)))
    assert len(np.unique(cells, axis=0)) == count == len(cells)
    assert (cells >= 0).all() and (cells < (rows, columns)).all()


def test_x_goes_to_the_right_and_y_upwards() -> None:
    cells, (rows, columns) = grid_of(np.array([[-5.0, 3.0], [9.0, 3.0], [-5.0, -2.0], [9.0, -2.0]]))
    assert cells.tolist() == [[0, 0], [0, columns - 1], [rows - 1, 0], [rows - 1, columns - 1]]


def test_images_of_one_place_stand_around_it() -> None:
    places = np.concatenate([np.zeros((9, 2)), [[-1.0, -1.0], [1.0, 1.0]]])
    cells, (rows, columns) = grid_of(places)
    assert cdist(cells[:9], [[(rows - 1) / 2, (columns - 1) / 2]]).max() < 2.5


def test_neighbours_in_the_layout_are_neighbours_on_the_map() -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(5, 2)) * 20
    places = np.concatenate([centre + rng.normal(size=(41, 2)) for centre in centres])
    cells, _ = grid_of(places)
    apart = cdist(cells, cells)
    same = np.kron(np.eye(5), np.ones((41, 41))).astype(bool)
    assert np.median(apart[same]) < np.median(apart[~same]) / 2


@pytest.mark.parametrize("places", [np.zeros((5, 2)), np.array([[0.0, 1.0], [1e9, 1.0], [5.0, 1.0]])])
def test_places_without_extent_are_laid_out(places: np.ndarray) -> None:
    cells, (rows, columns) = grid_of(places)
    assert len(np.unique(cells, axis=0)) == len(places) and columns <= 2 * rows + 1


def test_no_thumbnail_hides_another_and_each_has_its_folders_frame() -> None:
    rng = np.random.default_rng(0)
    images = [solid(200, 10 * i, 0) for i in range(11)]
    groups = [i % 2 for i in range(11)]
    picture = map_figure(images, rng.normal(size=(11, 2)), groups, ["first", "second"], "What it is.")
    side = cell_px(11)
    frame = max(2, side // 11)
    for i in range(11):
        assert holds(picture, (200, 10 * i, 0)) == (side - 1 - 2 * frame) ** 2
    framed = (side - 1) ** 2 - (side - 1 - 2 * frame) ** 2
    counts = [holds(picture, colour) for colour in colours(2)]
    assert counts[0] > 6 * framed and counts[1] > 5 * framed  # and its box in the legend
    assert counts[0] < 7 * framed and counts[1] < 6 * framed


def test_without_groups_there_are_no_frames() -> None:
    picture = map_figure([solid(9, 9, 9)] * 3, np.eye(3, 2), [0] * 3, [], "What it is.")
    assert holds(picture, (9, 9, 9)) == 3 * (cell_px(3) - 1) ** 2
    assert not any(holds(picture, colour) for colour in colours(7))  # the eighth is gray, as the edges of letters


def test_a_missing_image_is_an_empty_tile() -> None:
    picture = map_figure([solid(9, 9, 9), None, solid(9, 9, 9)], np.eye(3, 2), [0] * 3, [], "")
    assert holds(picture, (9, 9, 9)) == 2 * (cell_px(3) - 1) ** 2
    assert 0.9 < holds(picture, (232, 232, 232)) / (cell_px(3) - 1) ** 2 < 1


def test_caption_and_legend_stay_inside_the_picture() -> None:
    names = [f"a folder with the number {i}" for i in range(MOST_COLOURS)]
    places = np.random.default_rng(0).normal(size=(5, 2))
    long = map_figure([solid(9, 9, 9)] * 5, places, [0] * 5, names, "many words " * 60)
    short = map_figure([solid(9, 9, 9)] * 5, places, [0] * 5, [], "words")
    assert long.width == short.width and long.height > short.height + 100
    margins = np.asarray(long)[:, [0, 1, -2, -1]]
    assert (margins == 255).all() and (np.asarray(long)[-10:] == 255).all()


def test_colours_differ() -> None:
    for count in (2, 10, 11, MOST_COLOURS):
        assert len(set(colours(count))) == count


@pytest.mark.parametrize(
    ("images", "groups", "names", "message"),
    [
        (0, 0, 0, "0 images, 3 places and 0 groups"),
        (3, 2, 1, "3 images, 3 places and 2 groups"),
        (3, 3, 21, "21 groups; there are 20 colours"),
    ],
)
def test_what_does_not_fit_together_is_refused(images: int, groups: int, names: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        map_figure([None] * images, np.eye(3, 2), [0] * groups, ["x"] * names, "")


def test_the_sheet_has_a_row_for_each_query() -> None:
    rows = [[Shown(solid(9, 9, 9), "0.123", "red")] * 4 + [Shown(None, "0.1", "a" * 99)]] * 3
    picture = nearest_figure(rows, "What it is.")
    assert holds(picture, (9, 9, 9)) == 3 * 4 * NEAREST_PX**2
    assert picture.width > 5 * NEAREST_PX and picture.height > 3 * NEAREST_PX
    for wrong in ([], [rows[0], rows[0][:2]]):
        with pytest.raises(ValueError, match="rows must be there and of equal length"):
            nearest_figure(wrong, "")


def test_long_names_keep_their_ends() -> None:
    letters = typeface(11)
    short = _shortened("n01440764_ILSVRC2012_val_00009111.JPEG", letters, 150)
    assert short.startswith("n0144") and short.endswith("1.JPEG") and "…" in short
    assert 120 < letters.getlength(short) <= 150
    assert _shortened("0.png", letters, 150) == "0.png"
