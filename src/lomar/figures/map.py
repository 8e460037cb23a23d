"""Pictures of an embedding: a map of thumbnails, and a sheet of nearest neighbours."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment

from lomar.figures.sheet import INK, PAPER, RULE, Group, Rgb, sheet, title_px, typeface

MOST_COLOURS = 20  # that can still be told apart
NEAREST_PX = 160  # side of the tiles of the neighbours' sheet
_CELLS_PER_IMAGE = 2.2  # room for the gaps between groups of images
_MAP_PX = 3000  # side of a map of many images, were it square
_CELL_PX = 24, 112  # least and most
_LONGEST = 2.0  # times as wide as high, or as high as wide
_LEAST_PX = 500  # width of the legend and the caption
_EMPTY = (232, 232, 232)

Colour = tuple[int, int, int]


def grid_of(places: NDArray[np.floating]) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """The cells of a grid that images stand in, each in its own, as near as can be to where they belong.

    The assignment that is best for all: the sum of squared distances is the smallest possible.

    Args:
        places: (n, 2), x to the right and y upwards, in any unit.

    Returns:
        int (n, 2) row and column of each; and (rows, columns) of the grid, which has about twice as many cells as
        images.
    """
    low, extent = places.min(axis=0), np.ptp(places, axis=0)
    ratio = float(np.clip(extent[0] / max(extent[1], 1e-12), 1 / _LONGEST, _LONGEST))
    rows = max(2, ceil(sqrt(len(places) * _CELLS_PER_IMAGE / ratio)))
    columns = max(2, ceil(rows * ratio))
    shares = (places - low) / np.maximum(extent, 1e-12)
    wanted = np.stack([(1 - shares[:, 1]) * (rows - 1), shares[:, 0] * (columns - 1)], axis=1)
    cells = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)  # (cells, 2)
    squared = ((wanted[:, None] - cells) ** 2).sum(axis=2)  # (n, cells)
    _, chosen = linear_sum_assignment(squared)
    return cells[chosen], (rows, columns)


def cell_px(count: int) -> int:
    """Side of the cells of a map of so many images: what thumbnails need at most."""
    return int(np.clip(_MAP_PX / sqrt(max(1, count) * _CELLS_PER_IMAGE), *_CELL_PX))


def colours(count: int) -> list[Colour]:
    """So many colours that can be told apart, at most `MOST_COLOURS`."""
    found = matplotlib.colormaps["tab10" if count <= 10 else "tab20"]
    return [_rgb(found(index)) for index in range(count)]


def _rgb(colour: Sequence[float]) -> Colour:
    red, green, blue = (round(255 * part) for part in colour[:3])
    return red, green, blue


def map_figure(
    thumbnails: Sequence[Rgb | None],
    places: NDArray[np.floating],
    groups: Sequence[int],
    names: Sequence[str],
    caption: str,
) -> Image.Image:
    """Thumbnails near where they belong, none hiding another, framed in the colour of their group.

    Args:
        thumbnails: square images; None where there is none, drawn as an empty tile.
        places: (n, 2), x to the right and y upwards, in any unit.
        groups: of each image a number, the index of its name.
        names: of the groups, for the legend; none draws no frames.
        caption: set below and wrapped.

    Raises:
        ValueError: no image, numbers that differ, or more groups than colours.
    """
    if not len(thumbnails) or len({len(thumbnails), len(places), len(groups)}) > 1:
        raise ValueError(f"{len(thumbnails)} images, {len(places)} places and {len(groups)} groups")
    if len(names) > MOST_COLOURS:
        raise ValueError(f"{len(names)} groups; there are {MOST_COLOURS} colours")
    cells, (rows, columns) = grid_of(places)
    side = cell_px(len(thumbnails))
    frame = max(2, side // 11) if names else 0
    palette = colours(len(names))
    paper = Image.new("RGB", (columns * side, rows * side), PAPER)
    draw = ImageDraw.Draw(paper)
    for thumbnail, (row, column), group in zip(thumbnails, cells.tolist(), groups, strict=True):
        left, top = column * side, row * side
        if names:
            draw.rectangle((left, top, left + side - 2, top + side - 2), fill=palette[group])  # a pixel of gap
        inner = side - 1 - 2 * frame
        paper.paste(_tile(thumbnail, inner), (left + frame, top + frame))
    return _with_text(paper, list(zip(names, palette, strict=True)), caption)


def _tile(thumbnail: Rgb | None, side: int) -> Image.Image:
    """An image at a side; a grey tile with a cross where there is none."""
    if thumbnail is not None:
        return Image.fromarray(thumbnail).resize((side, side), Image.Resampling.LANCZOS)
    empty = Image.new("RGB", (side, side), _EMPTY)
    draw = ImageDraw.Draw(empty)
    draw.line((0, 0, side, side), RULE)
    draw.line((0, side, side, 0), RULE)
    return empty


class _Entry(NamedTuple):
    """One of a legend."""

    name: str
    colour: Colour
    width_px: float


def _with_text(picture: Image.Image, legend: Sequence[tuple[str, Colour]], caption: str) -> Image.Image:
    """A picture with a margin; legend and caption below it."""
    margin = max(16, picture.width // 60)
    width = max(picture.width, _LEAST_PX)
    letters = typeface(max(14, width // 75))
    line_px, box = round(1.5 * letters.size), round(0.8 * letters.size)
    entries = [_Entry(name, colour, letters.getlength(name) + 3 * box) for name, colour in legend]
    legend_lines = _in_lines(entries, width)
    caption_lines = textwrap.wrap(caption, _letters_in(width, caption, letters))
    below = picture.height + 2 * margin
    caption_at = below + len(legend_lines) * line_px + (line_px // 2 if legend else 0)
    height = caption_at + len(caption_lines) * line_px + margin
    paper = Image.new("RGB", (width + 2 * margin, height), PAPER)
    paper.paste(picture, (margin + (width - picture.width) // 2, margin))
    draw = ImageDraw.Draw(paper)
    for number, line in enumerate(legend_lines):
        left, middle = float(margin), below + (number + 0.5) * line_px
        for entry in line:
            draw.rectangle((left, middle - box / 2, left + box, middle + box / 2), fill=entry.colour)
            draw.text((left + 1.4 * box, middle), entry.name, INK, letters, anchor="lm")
            left += entry.width_px
    for number, text in enumerate(caption_lines):
        draw.text((margin, caption_at + number * line_px), text, INK, letters)
    return paper


def _letters_in(width_px: int, text: str, font: ImageFont.FreeTypeFont) -> int:
    """Letters of a line of a text, nearly: their mean width is taken, with some to spare."""
    mean_px = font.getlength(text) / len(text) if text else font.size
    return max(20, int(0.95 * width_px / mean_px))


def _in_lines(entries: Sequence[_Entry], width_px: int) -> list[list[_Entry]]:
    """Entries, as many in a line as fit."""
    lines: list[list[_Entry]] = []
    left = float(width_px)
    for entry in entries:
        if left + entry.width_px > width_px:
            lines.append([])
            left = 0.0
        lines[-1].append(entry)
        left += entry.width_px
    return lines


@dataclass(frozen=True)
class Shown:
    """An image of the neighbours' sheet.

    Args:
        thumbnail: square; None where there is none.
        title: set below it: of a neighbour its similarity, of a query its name.
        group: its folder, set below that.
    """

    thumbnail: Rgb | None
    title: str
    group: str


def nearest_figure(rows: Sequence[Sequence[Shown]], caption: str) -> Image.Image:
    """One row a query: the query, then its neighbours, most similar first.

    Args:
        rows: of equal length, the query first.
        caption: set below and wrapped.

    Raises:
        ValueError: no row, or rows of different lengths.
    """
    if not rows or len({len(row) for row in rows}) > 1:
        raise ValueError("rows must be there and of equal length")
    tiles = [[_labelled(shown) for shown in row] for row in rows]
    numbers = tuple(str(number) for number in range(1, len(rows[0])))
    return sheet(tiles, [Group("", ("query",)), Group("", numbers)], caption)


def _labelled(shown: Shown) -> Image.Image:
    """An image with two lines below it."""
    letters = typeface(title_px(NEAREST_PX) - 1)
    line_px = round(1.25 * letters.size)
    both = Image.new("RGB", (NEAREST_PX, NEAREST_PX + 2 * line_px + 4), PAPER)
    both.paste(_tile(shown.thumbnail, NEAREST_PX), (0, 0))
    draw = ImageDraw.Draw(both)
    for number, text in enumerate((shown.title, shown.group)):
        place = NEAREST_PX / 2, NEAREST_PX + 2 + number * line_px
        draw.text(place, _shortened(text, letters, NEAREST_PX), INK, letters, anchor="ma")
    return both


def _shortened(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """A text, without its middle where it is too long."""
    if font.getlength(text) <= width_px:
        return text
    kept = len(text) - 1
    while kept > 2 and font.getlength(_ends(text, kept)) > width_px:
        kept -= 1
    return _ends(text, kept)


def _ends(text: str, kept: int) -> str:
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
