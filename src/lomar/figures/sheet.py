"""What pictures of windows share: a window of an image, tiles, and the sheet they stand on with titles and a caption.

Drawn with Pillow, so that a pixel of the image is a square of whole pixels in the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, isqrt
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Tiles are enlarged by a whole factor to at least the first side, and reduced only above the second.
SMALLEST_TILE_PX = 200
LARGEST_TILE_PX = 448
# Where the image is wider than this many windows, the surroundings of the window are shown and not all of it.
SURROUNDINGS = 3

PAPER = (255, 255, 255)
INK = (30, 30, 30)
RULE = (170, 170, 170)
HIDDEN = 128  # the mid-grey of a hidden patch
OUTLINE = (235, 64, 37)
GHOST = 0.18  # how much of the image shows through outside the window: enough to find the place, no more

Rgb = NDArray[np.uint8]  # (height, width, 3)
Region = tuple[slice, slice]  # rows and columns of an image, in pixels
Limits = tuple[NDArray[np.float32], NDArray[np.float32]]  # values shown black and white


@dataclass(frozen=True)
class Window:
    """One window of one image and what was hidden of it.

    Pixels are floats of 0 to 1, or integers as read from the file; integers wider than 8 bits are stretched for
    showing (their full range is mostly empty). Shapes: C channels, S image side, K window side in patches, P patch
    side in pixels.

    Attributes:
        original: (C, S, S) the image.
        corner: row and column of the window's top-left patch.
        patch_px: P.
        hidden: (K * K,) bool in raster order, True where hidden.

    Raises:
        ValueError: a shape that does not fit the others, or a window that leaves the image.
    """

    original: NDArray[np.generic]
    corner: tuple[int, int]
    patch_px: int
    hidden: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.original.ndim != 3 or self.original.shape[1] != self.original.shape[2]:
            raise ValueError(f"original must be (C, S, S), not {self.original.shape}")
        if self.hidden.ndim != 1 or isqrt(self.hidden.size) ** 2 != self.hidden.size:
            raise ValueError(f"hidden must be (K * K,), not {self.hidden.shape}")
        last = self.side_px - self.window_px
        if not all(0 <= place * self.patch_px <= last for place in self.corner):
            raise ValueError(
                f"a window of {self.window_px} px at patch {self.corner} leaves an image of {self.side_px} px"
            )

    @property
    def side_px(self) -> int:
        """S, the image's side."""
        return self.original.shape[1]

    @property
    def side(self) -> int:
        """K, the window's side in patches."""
        return isqrt(self.hidden.size)

    @property
    def window_px(self) -> int:
        """K * P, the window's side."""
        return self.side * self.patch_px

    @property
    def is_whole(self) -> bool:
        """Whether the window is the whole image."""
        return self.side_px == self.window_px

    @property
    def is_small(self) -> bool:
        """Whether the window is too small a part of the image to be looked at in the whole of it."""
        return self.side_px > SURROUNDINGS * self.window_px

    def box(self) -> Region:
        """Rows and columns of the window in the image, in pixels."""
        top, left = (place * self.patch_px for place in self.corner)
        return slice(top, top + self.window_px), slice(left, left + self.window_px)

    def patch_box(self, index: int) -> Region:
        """Rows and columns, in the image and in pixels, of a patch given by its raster index in the window."""
        top, left = ((a + b) * self.patch_px for a, b in zip(self.corner, divmod(index, self.side), strict=True))
        return slice(top, top + self.patch_px), slice(left, left + self.patch_px)

    def whole(self) -> Region:
        """All of the image."""
        return slice(0, self.side_px), slice(0, self.side_px)

    def surroundings(self) -> Region:
        """The part of the image to show around the window: a square of some windows, or all of it."""
        side = min(self.side_px, SURROUNDINGS * self.window_px)
        starts = [min(max(0, axis.start - (side - self.window_px) // 2), self.side_px - side) for axis in self.box()]
        return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)

    def in_place(self, image: Rgb, window: Rgb) -> Rgb:
        """The window's pixels where they belong, the rest of the image a pale grey hint."""
        grey = image.mean(axis=2, keepdims=True)
        faint = GHOST * grey + (1 - GHOST) * 255
        placed = np.repeat(faint, 3, axis=2).round().astype(np.uint8)
        placed[self.box()] = window
        return placed

    def masked(self, window: Rgb) -> Rgb:
        """The window's pixels with its hidden patches grey."""
        return np.where(self.spread(self.hidden)[..., None], np.uint8(HIDDEN), window)

    def spread(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """A value for each patch (K * K,) -> for each pixel of the window (K * P, K * P)."""
        return values.reshape(self.side, self.side).repeat(self.patch_px, axis=0).repeat(self.patch_px, axis=1)


def shown_range(original: NDArray[np.generic]) -> Limits:
    """Values shown black and white, (C, 1, 1) each or broadcastable to it."""
    if not _is_stretched(original):
        white = 255.0 if original.dtype == np.uint8 else 1.0
        return np.zeros((1, 1, 1), np.float32), np.full((1, 1, 1), white, np.float32)
    # Bands of an RGB image share one range, which keeps its colours; bands of another kind have each their own.
    axes = (0, 1, 2) if original.shape[0] in (1, 3) else (1, 2)
    low, high = np.percentile(original.astype(np.float32), (2, 98), axis=axes, keepdims=True)
    # An image of one value has no contrast to stretch; any other white avoids a division by zero.
    return low.astype(np.float32), np.where(high > low, high, low + 1).astype(np.float32)


def _is_stretched(original: NDArray[np.generic]) -> bool:
    """Whether an image's own values, rather than its type's range, decide what is black and white."""
    plain = original.dtype == np.uint8 or np.issubdtype(original.dtype, np.floating)
    return original.shape[0] not in (1, 3) or not plain


def rgb(pixels: NDArray[np.generic], limits: Limits) -> Rgb:
    """Pixels (C, h, w) as (h, w, 3): one channel is grey, the first three of more are red, green, blue."""
    low, high = limits
    # NaN, which a diverged model predicts, is drawn black.
    shown = np.nan_to_num(np.clip((pixels.astype(np.float32) - low) / (high - low), 0, 1))
    if len(shown) == 1:
        shown = np.repeat(shown, 3, axis=0)
    elif len(shown) == 2:
        shown = np.concatenate([shown, np.zeros_like(shown[:1])])
    return (shown[:3].transpose(1, 2, 0) * 255).round().astype(np.uint8)


def tile_side(pixels: int) -> int:
    """Side of the tiles for images of a side of `pixels`: a whole multiple of it unless it is too large."""
    return min(LARGEST_TILE_PX, pixels * ceil(SMALLEST_TILE_PX / pixels))


def tile(pixels: Rgb, side: int) -> Image.Image:
    """Square pixels at a side; enlarged by a whole factor they stay squares."""
    whole = side % pixels.shape[0] == 0
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def outline(tile: Image.Image, box: Region, shown: Region, colour: tuple[int, int, int] = OUTLINE) -> None:
    """Draws a frame around a box on the tile of a region, outside the box where there is room."""
    side = tile.width
    width = max(2, side // 100)
    scale = side / (shown[0].stop - shown[0].start)
    rows, columns = (
        (round((inner.start - outer.start) * scale) - width, round((inner.stop - outer.start) * scale) + width)
        for inner, outer in zip(box, shown, strict=True)
    )
    top, bottom = max(0, rows[0]), min(side, rows[1]) - 1
    left, right = max(0, columns[0]), min(side, columns[1]) - 1
    ImageDraw.Draw(tile).rectangle((left, top, right, bottom), outline=colour, width=width)


@dataclass(frozen=True)
class Group:
    """Columns that belong together: a heading over all (may be empty) and a title for each."""

    heading: str
    titles: tuple[str, ...]


def title_px(side: int) -> int:
    """Size of the letters of titles and caption beside tiles of a side."""
    return max(14, side // 14)


def sheet(
    tiles: Sequence[Sequence[Image.Image]], groups: Sequence[Group], caption: str, letters_px: int | None = None
) -> Image.Image:
    """Tiles of one size in rows and grouped columns, with headings above and the caption below.

    Args:
        tiles: rows of as many as the groups have titles.
        groups: of columns.
        caption: wrapped.
        letters_px: size of titles and caption; None goes by the tiles' width.
    """
    side, height = tiles[0][0].size
    gap = _gap(side)
    margin = 3 * gap
    letters, bold = (
        typeface(letters_px or title_px(side), "DejaVuSans"),
        typeface(max(15, side // 13), "DejaVuSans-Bold"),
    )
    line_px = round(1.45 * letters.size)

    lefts: list[int] = []
    spans: list[tuple[int, int]] = []  # left and right of each group
    x = margin
    for group in groups:
        start = x
        for _ in group.titles:
            lefts.append(x)
            x += side + gap
        spans.append((start, x - gap))
        x += 2 * gap
    width = x - 3 * gap + margin

    lines = wrapped(caption, letters, width - 2 * margin)
    has_headings = any(group.heading for group in groups)
    top = margin + line_px * (2 if has_headings else 1) + (2 * gap if has_headings else 0)
    below = top + len(tiles) * (height + gap) + gap
    paper = Image.new("RGB", (width, below + len(lines) * line_px + margin), PAPER)
    draw = ImageDraw.Draw(paper)

    for group, (left, right) in zip(groups, spans, strict=True):
        if group.heading:
            draw.text(((left + right) / 2, margin), group.heading, INK, bold, anchor="ma")
            rule = margin + line_px + gap // 2
            draw.line([(left, rule), (right - 1, rule)], RULE, max(1, side // 200))
    titles = [title for group in groups for title in group.titles]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left + side / 2, top - gap), title, INK, letters, anchor="md")
    for index, row in enumerate(tiles):
        for left, tile in zip(lefts, row, strict=True):
            paper.paste(tile, (left, top + index * (height + gap)))
    for index, line in enumerate(lines):
        draw.text((margin, below + index * line_px), line, INK, letters)
    return paper


def tiles_of(picture: Image.Image, columns: int) -> list[list[Image.Image]]:
    """The square tiles of a sheet of one group without heading, row by row: what `sheet` was given.

    Args:
        picture: the sheet, as it is or as read from a file.
        columns: titles of the group.

    Returns:
        [] where a picture of this size is no such sheet, with letters of the tiles' size.
    """
    for side in range(1, picture.width // columns + 1):
        gap = _gap(side)
        if columns * side + (columns - 1) * gap + 6 * gap != picture.width:
            continue
        line_px = round(1.45 * title_px(side))
        top = 3 * gap + line_px
        # The most rows of tiles that leave a caption of whole lines, be it empty, are all of them.
        for rows in range((picture.height - top) // (side + gap), 0, -1):
            left_px = picture.height - top - rows * (side + gap) - 4 * gap
            if left_px >= 0 and left_px % line_px == 0:
                return [
                    [
                        picture.crop((left, below, left + side, below + side))
                        for left in range(3 * gap, picture.width - side, side + gap)
                    ]
                    for below in range(top, top + rows * (side + gap), side + gap)
                ]
    return []


def _gap(side: int) -> int:
    """Between tiles of a side; the margin is three of them."""
    return max(4, side // 40)


def full_caption(caption: str, windows: Sequence[Window]) -> str:
    """The caption and, once each, what must be said about channels and contrast."""
    return with_notes(caption, [window.original for window in windows])


def with_notes(caption: str, originals: Sequence[NDArray[np.generic]]) -> str:
    """The same, of images (C, S, S)."""
    notes = dict.fromkeys(note for original in originals if (note := _note(original)))
    return " ".join([caption, *notes]).strip()


def _note(original: NDArray[np.generic]) -> str:
    """How an image's values became colours, where that is not plain; else empty."""
    if not _is_stretched(original):
        return ""
    channels = original.shape[0]
    stretched = "stretched from the image's 2nd to its 98th percentile."
    if channels in (1, 3):
        return f"Contrast is {stretched}"
    if channels == 2:
        return f"The two channels are shown as red and green, each {stretched}"
    return f"The first three of {channels} channels are shown as red, green and blue, each {stretched}"


@cache
def typeface(size_px: int, name: str = "DejaVuSans") -> ImageFont.FreeTypeFont:
    """DejaVu, which comes with matplotlib and so is the same on every machine."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size_px)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """Lines of whole words no wider than the width, a longer word alone on its line; newlines are kept."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width_px:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
