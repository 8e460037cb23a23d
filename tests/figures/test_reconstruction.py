"""Claims about the reconstruction pictures, read off their pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lomar.figures import sheet
from lomar.figures.png import save_png
from lomar.figures.reconstruction import Panel, columns_of, figure7, figure8
from lomar.figures.sheet import HIDDEN, OUTLINE, Group, tiles_of

SIDE, PATCH, K = 70, 10, 3  # a 7 x 7 grid; enlarged three times for a tile of 210 px
SCALE = 3
WHITE = [255, 255, 255]


def panel(original: np.ndarray | None = None, **changes: Any) -> Panel:
    """A blue image, and a green prediction for the window of 3 x 3 patches at patch (1, 2); the first is visible."""
    if original is None:
        original = np.zeros((3, SIDE, SIDE), np.float32)
        original[2] = 1
    prediction = np.zeros((len(original), K * PATCH, K * PATCH), np.float32)
    prediction[min(1, len(original) - 1)] = 1
    hidden = np.arange(K * K) > 0
    usual: dict[str, Any] = {
        "original": original,
        "corner": (1, 2),
        "patch_px": PATCH,
        "hidden": hidden,
        "prediction": prediction,
    }
    return Panel(**{**usual, **changes})


def tiles(figure: Image.Image, rows: int, columns: int) -> list[list[np.ndarray]]:
    """The tiles of a picture, found by their place: the first painted row, and the sheet's gaps."""
    pixels = np.asarray(figure)
    side = SIDE * SCALE if columns == 4 else K * PATCH * 7
    gap = max(4, side // 40)
    left = 3 * gap
    # The first row of pixels that the leftmost column of the first tile paints.
    top = np.flatnonzero((pixels[:, left] != 255).any(axis=1))[0]
    found = []
    for row in range(rows):
        y = top + row * (side + gap)
        xs = [left + column * (side + gap) + 2 * gap * ((column + 1) // 2) * (columns > 4) for column in range(columns)]
        found.append([pixels[y : y + side, x : x + side] for x in xs])
    return found


def patch(tile: np.ndarray, row: int, column: int, patch_px: int = PATCH * SCALE) -> np.ndarray:
    """The inner pixels of a patch of a tile, clear of outlines and of what resampling mixes."""
    y, x = row * patch_px + 12, column * patch_px + 12
    return tile[y : y + patch_px - 24, x : x + patch_px - 24]


def is_colour(pixels: np.ndarray, colour: list[int]) -> bool:
    return bool((pixels == colour).all())


def test_the_four_columns_show_original_window_masked_and_reconstruction() -> None:
    original, window, masked, reconstructed = tiles(figure7([panel()], ""), 1, 4)[0]
    blue, green, grey = [0, 0, 255], [0, 255, 0], [HIDDEN] * 3
    assert is_colour(original, blue)
    for row in range(K):
        for column in range(K):
            visible = row == column == 0
            place = (1 + row, 2 + column)
            assert is_colour(patch(window, *place), blue)
            assert is_colour(patch(masked, *place), blue if visible else grey)
            assert is_colour(patch(reconstructed, *place), blue if visible else green)


def test_outside_the_window_no_colour_of_the_image_is_left() -> None:
    for tile in tiles(figure7([panel()], ""), 1, 4)[0][1:]:
        for place in [(0, 0), (0, 3), (1, 1), (4, 2), (2, 5), (6, 6)]:
            outside = patch(tile, *place)
            assert (outside == outside[..., :1]).all() and outside.min() > 200


def test_the_outline_stands_around_the_window_and_not_on_it() -> None:
    _, window, _, _ = tiles(figure7([panel()], ""), 1, 4)[0]
    framed = (window == OUTLINE).all(axis=2)
    rows, columns = np.flatnonzero(framed.any(axis=1)), np.flatnonzero(framed.any(axis=0))
    width = 2
    assert (rows[0], rows[-1]) == (1 * 30 - width, 4 * 30 + width - 1)
    assert (columns[0], columns[-1]) == (2 * 30 - width, 5 * 30 + width - 1)
    assert not framed[1 * 30 : 4 * 30, 2 * 30 : 5 * 30].any()


def test_a_window_in_the_corner_of_the_image_keeps_its_whole_outline() -> None:
    _, window, _, _ = tiles(figure7([panel(corner=(4, 4))], ""), 1, 4)[0]
    framed = (window == OUTLINE).all(axis=2)
    assert framed[-1, 4 * 30 :].all() and framed[4 * 30 :, -1].all()


def test_pixels_of_a_small_image_become_whole_squares() -> None:
    generator = np.random.default_rng(1)
    image = generator.random((3, SIDE, SIDE)).astype(np.float32)
    original = tiles(figure7([panel(image)], ""), 1, 4)[0][0]
    expected = (image.transpose(1, 2, 0) * 255).round().astype(np.uint8)
    assert np.array_equal(original, expected.repeat(SCALE, axis=0).repeat(SCALE, axis=1))


def test_a_window_that_is_a_small_part_is_enlarged_and_the_caption_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = captions(monkeypatch)
    small = panel(hidden=np.array([False, True, True, True]), prediction=np.zeros((3, 20, 20)), corner=(5, 0))
    figure = figure7([small], "Caption.")
    original, window, _, _ = tiles(figure, 1, 4)[0]
    assert ((original == OUTLINE).all(axis=2)).any()
    # Six of the seven patches are shown: rows 1 to 6, columns 0 to 5, so the window is at (4, 0) of them.
    assert is_colour(patch(window, 4, 0, 35), [0, 0, 255])
    assert is_colour(patch(window, 5, 1, 35), [0, 0, 255])
    assert not is_colour(patch(window, 3, 0, 35), [0, 0, 255])
    assert said == ["Caption. The window outlined in the original is shown enlarged, with its surroundings."]
    figure7([panel()], "Caption.")
    assert said[1] == "Caption."


def test_each_ratio_has_its_masked_and_reconstructed_window_for_each_image() -> None:
    shown = [np.arange(9) >= visible for visible in (4, 3, 2, 1)]
    rows = [[panel(hidden=hidden) for hidden in shown], [panel(hidden=~hidden) for hidden in shown]]
    found = tiles(figure8(rows, (0.6, 0.7, 0.8, 0.9), ""), 2, 9)
    for tiles_of_image, panels in zip(found, rows, strict=True):
        assert (tiles_of_image[0] == OUTLINE).all(axis=2).any()
        for index, each in enumerate(panels):
            masked, reconstructed = tiles_of_image[1 + 2 * index], tiles_of_image[2 + 2 * index]
            for place, hidden in enumerate(each.hidden):
                where = (*divmod(place, K), 70)
                assert is_colour(patch(masked, *where), [HIDDEN] * 3 if hidden else [0, 0, 255])
                assert is_colour(patch(reconstructed, *where), [0, 255, 0] if hidden else [0, 0, 255])


def test_integers_of_8_bits_and_floats_give_the_same_picture() -> None:
    image = np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE)).astype(np.uint8)
    floats = panel(image.astype(np.float32) / 255)
    integers = panel(image, prediction=floats.prediction * 255)
    assert np.array_equal(np.asarray(figure7([floats], "")), np.asarray(figure7([integers], "")))


def ramp(low: float, high: float, dtype: type) -> np.ndarray:
    return np.tile(np.linspace(low, high, SIDE), (1, SIDE, 1)).astype(dtype)


def test_12_bits_in_a_16_bit_file_are_not_black() -> None:
    original = tiles(figure7([panel(ramp(100, 4000, np.uint16))], ""), 1, 4)[0][0]
    assert original.min() == 0 and original.max() == 255
    assert 120 < original.mean() < 135


def test_one_channel_is_grey() -> None:
    original = tiles(figure7([panel(np.full((1, SIDE, SIDE), 0.4))], ""), 1, 4)[0][0]
    assert is_colour(original, [102] * 3)


def test_the_first_three_of_five_channels_are_stretched_each_by_itself() -> None:
    image = np.concatenate(
        [ramp(0, 0.1, np.float32), ramp(0.1, 0, np.float32), ramp(0, 9, np.float32)] + [ramp(1, 2, np.float32)] * 2
    )
    original = tiles(figure7([panel(image)], ""), 1, 4)[0][0]
    assert original[0, 0].tolist() == [0, 255, 0] and original[0, -1].tolist() == [255, 0, 255]


@pytest.mark.parametrize("value", [0, 30_000])
def test_an_image_of_one_value_and_a_prediction_of_nan_are_drawn(value: int) -> None:
    flat = np.full((1, SIDE, SIDE), value, np.uint16)
    prediction = np.full((1, K * PATCH, K * PATCH), np.nan, np.float32)
    with np.errstate(divide="raise"):
        original, _, _, reconstructed = tiles(figure7([panel(flat, prediction=prediction)], ""), 1, 4)[0]
    assert is_colour(original, [0, 0, 0]) and is_colour(patch(reconstructed, 2, 3), [0, 0, 0])


def captions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the captions as they are about to be wrapped."""
    said: list[str] = []
    wrapped = sheet.wrapped

    def listen(text: str, *rest: Any) -> list[str]:
        said.append(text)
        return wrapped(text, *rest)

    monkeypatch.setattr(sheet, "wrapped", listen)
    return said


def test_the_caption_says_how_values_became_colours_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said = captions(monkeypatch)
    deep, five = ramp(0, 4000, np.uint16), np.zeros((5, SIDE, SIDE))
    figure7([panel(deep), panel(), panel(deep), panel(five)], "Caption.")
    assert said == [
        "Caption. Contrast is stretched from the image's 2nd to its 98th percentile. The first three of 5 channels "
        "are shown as red, green and blue, each stretched from the image's 2nd to its 98th percentile."
    ]


def test_a_long_caption_is_wrapped_inside_the_picture() -> None:
    caption = "Each predicted patch is given the true mean and variance of its patch. " * 8
    short, long = figure7([panel()], "Short."), figure7([panel()], caption)
    assert long.width == short.width and long.height > short.height + 50
    edge = np.asarray(long)[:, -10:]
    assert is_colour(edge, WHITE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"original": np.zeros((3, 70, 60))}, r"original must be \(C, S, S\), not \(3, 70, 60\)"),
        ({"hidden": np.zeros(8, bool)}, r"hidden must be \(K \* K,\), not \(8,\)"),
        ({"prediction": np.zeros((3, 30, 20))}, r"prediction must be \(3, 30, 30\), not \(3, 30, 20\)"),
        ({"corner": (5, 0)}, r"30 px at patch \(5, 0\) leaves an image of 70 px"),
        ({"corner": (0, -1)}, "leaves an image"),
    ],
)
def test_what_does_not_fit_is_named_with_its_shape(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        panel(**changes)


def test_a_row_must_have_a_panel_for_each_ratio_and_a_figure_a_row() -> None:
    with pytest.raises(ValueError, match="1 panels for 2 ratios"):
        figure8([[panel()]], (0.6, 0.9), "")
    with pytest.raises(ValueError, match="no panel"):
        figure8([], (0.6,), "")
    with pytest.raises(ValueError, match="no panel"):
        figure7([], "")


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    first = Image.new("RGB", (5, 3), (1, 2, 3))
    save_png(first, path)

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_png(Image.new("RGB", (7, 7)), path)
    with Image.open(path) as there:
        assert there.size == (5, 3) and there.getpixel((4, 2)) == (1, 2, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_whole_images_have_no_column_of_windows() -> None:
    """As wide as three tiles in place of four, for the same image."""
    side = 4 * 8
    original = np.random.default_rng(0).integers(0, 255, (3, side, side), dtype=np.uint8)
    hidden = np.arange(16) % 2 == 0
    whole = Panel(original, (0, 0), 8, hidden, original)
    window = Panel(original, (0, 0), 8, hidden[:9], original[:, :24, :24])
    assert whole.is_whole and not window.is_whole
    assert figure7([whole], "").width < figure7([window], "").width
    assert figure7([whole, window], "").width == figure7([window], "").width


# What was drawn, read back


@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("words", ["", "a word", "many words " * 60])
def test_the_tiles_of_a_figure_7_are_found_again(rows: int, whole: bool, words: str) -> None:
    changes: dict[str, Any] = {}
    if whole:
        changes = {"original": np.zeros((3, K * PATCH, K * PATCH), np.float32), "corner": (0, 0)}
    figure = figure7([panel(**changes) for _ in range(rows)], words)
    found = columns_of(figure, whole)
    assert list(found) == ["original", *([] if whole else ["window"]), "masked", "reconstruction"]
    assert all(len(column) == rows for column in found.values())
    side = found["original"][0].width
    for column in found.values():
        assert all(each.size == (side, side) for each in column)
    for masked, restored in zip(found["masked"], found["reconstruction"], strict=True):
        # The last patch of the window is hidden: grey, and predicted green.
        at = tuple(
            int((2.5 + start) * side / (K if whole else SIDE // PATCH)) for start in ((0, 0) if whole else (2, 1))
        )
        assert masked.getpixel(at) == (HIDDEN,) * 3
        assert restored.getpixel(at) == (0, 255, 0)


def test_the_tiles_of_every_size_are_found_again() -> None:
    for side in (200, 203, 224, 280, 320, 377, 448):
        given = [[Image.new("RGB", (side, side), (10 * row, 0, side % 256)) for _ in range(3)] for row in range(5)]
        found = tiles_of(sheet.sheet(given, [Group("", ("a", "b", "c"))], "some words " * 30), 3)
        assert [[each.tobytes() for each in row] for row in found] == [
            [each.tobytes() for each in row] for row in given
        ]


def test_another_picture_has_no_tiles() -> None:
    assert columns_of(Image.new("RGB", (640, 480)), whole=False) == {}
    assert columns_of(Image.new("RGB", (1, 1)), whole=True) == {}
