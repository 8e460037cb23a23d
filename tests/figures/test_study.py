"""Claims about the pictures of a study."""

from pathlib import Path

import pytest
from PIL import Image

from lomar.figures.study import Point, bars, lines


def points(seeds: bool = True) -> list[Point]:
    return [
        Point(
            f"row {n}", "late" if n % 2 else "paper", float(n), {"k-NN": (30.0 + n, 0.5 * seeds), "probe": (40.0, 0.0)}
        )
        for n in range(5)
    ]


@pytest.mark.parametrize("seeds", [True, False])
def test_bars_and_lines_are_drawn_with_one_seed_and_with_several(tmp_path: Path, seeds: bool) -> None:
    bars(points(seeds), tmp_path / "bars.png")
    lines(points(seeds), "block of the masks", tmp_path / "lines.png")
    sizes = [Image.open(tmp_path / name).size for name in ("bars.png", "lines.png")]
    assert all(width > 1500 for width, _ in sizes)
    bars(points(seeds)[:2], tmp_path / "fewer.png")
    assert Image.open(tmp_path / "fewer.png").height < sizes[0][1]


def test_without_a_row_that_was_judged_there_is_no_picture(tmp_path: Path) -> None:
    for draw in (lambda path: bars([], path), lambda path: lines([], "x", path)):
        with pytest.raises(ValueError, match="needs a row that was judged"):
            draw(tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []
