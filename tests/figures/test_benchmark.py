"""Claims about the pictures of time and memory."""

from pathlib import Path

import pytest
from PIL import Image

from lomar.figures.benchmark import against_image_size, against_window_size

SIZES = [
    {"name": name, "image_px": px, "s_per_image": factor * px / 1e5, "peak_bytes_per_image": factor * px * 1e6}
    for name, factor in (("lomar", 1), ("mae", 3))
    for px in (224, 448)
]
WINDOWS = [{"name": "lomar", "window": side, "views": 9 - side, "s_per_image": side / 1e3} for side in (5, 7)]


@pytest.mark.parametrize(("draw", "rows"), [(against_image_size, SIZES), (against_window_size, WINDOWS)])
def test_a_picture_shows_what_was_timed_and_leaves_out_what_was_not(draw, rows, tmp_path: Path) -> None:
    unmeasured = {"name": "beit", "image_px": 896, "window": 14, "views": 1}
    draw(rows, tmp_path / "all.png")
    draw([*rows, unmeasured, unmeasured | {"s_per_image": None}], tmp_path / "more.png")
    draw(rows[:-1], tmp_path / "fewer.png")
    pictures = [Image.open(tmp_path / f"{name}.png") for name in ("all", "more", "fewer")]
    assert all(min(picture.size) > 600 for picture in pictures)
    whole, more, fewer = (picture.tobytes() for picture in pictures)
    assert whole == more and whole != fewer


@pytest.mark.parametrize("draw", [against_image_size, against_window_size])
def test_without_a_time_there_is_nothing_to_draw(draw, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row has a time"):
        draw([{"name": "beit", "image_px": 896}], tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
