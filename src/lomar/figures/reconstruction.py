"""Pictures of masked reconstruction as the paper's Fig. 7 and Fig. 8: arrays in, a picture out.

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
# Where the image is wider than this many windows, Fig. 7 shows the surroundings of the window and not all of it.
SURROUNDINGS = 3

PAPER = (255, 255, 255)
INK = (30, 30, 30)
RULE = (170, 170, 170)
HIDDEN = 128  # the mid-grey of a hidden patch
OUTLINE = (235, 64, 37)
GHOST = 0.18  # how much of the image shows through outside the window: enough to find the place, no more

Rgb = NDArray[np.uint8]  # (height, width, 3)
Region = tuple[slice, slice]  # rows and columns of an image, in pixels


@dataclass(frozen=True)
class Panel:
    """One window of one image: what was hidden of it and what the model put there.

    Pixels are floats of 0 to 1, or integers as read from the file; integers wider than 8 bits are stretched for
    showing (their full range is mostly empty). Shapes: C channels, S image side, K window side in patches, P patch
    side in pixels.

    Attributes:
        original: (C, S, S) the image.
        corner: row and column of the window's top-left patch.
        patch_px: P.
        hidden: (K * K,) bool in raster order, True where hidden.
        prediction: (C, K * P, K * P) the window as predicted, in the units of `original`; only its hidden patches
            are shown.

    Raises:
        ValueError: a shape that does not fit the others, or a window that leaves the image.
    """

    original: NDArray[np.generic]
    corner: tuple[int, int]
    patch_px: int
    hidden: NDArray[np.bool_]
    prediction: NDArray[np.generic]

    def __post_init__(self) -> None:
        if self.original.ndim != 3 or self.original.shape[1] != self.original.shape[2]:
            raise ValueError(f"original must be (C, S, S), not {self.original.shape}")
        if self.hidden.ndim != 1 or isqrt(self.hidden.size) ** 2 != self.hidden.size:
            raise ValueError(f"hidden must be (K * K,), not {self.hidden.shape}")
        expected = (self.original.shape[0], self.window_px, self.window_px)
        if self.prediction.shape != expected:
            raise ValueError(f"prediction must be {expected}, not {self.prediction.shape}")
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
    def window_px(self) -> int:
        """K * P, the window's side."""
        return isqrt(self.hidden.size) * self.patch_px

    def window_box(self) -> Region:
        """Rows and columns of the window in the image, in pixels."""
        top, left = (place * self.patch_px for place in self.corner)
        return slice(top, top + self.window_px), slice(left, left + self.window_px)


def figure7(panels: Sequence[Panel], caption: str) -> Image.Image:
    """One row an image: original, window in its place, masked window, reconstruction; as the paper's Fig. 7 and 9.

    Visible patches of the reconstruction are the true ones. Outside the window the image is only hinted at. A window
    that is a small part of its image is shown enlarged with its surroundings, and outlined in the original.

    Args:
        panels: one or more; images of different sides are drawn at one size.
        caption: set below and wrapped; a sentence is added where a window is enlarged and where channels or contrast
            are not as in the file.

    Raises:
        ValueError: no panel.
    """
    if not panels:
        raise ValueError("no panel to draw")
    side = _tile_side(max(panel.side_px for panel in panels))
    rows = []
    for panel in panels:
        image, window, masked, reconstruction = _views(panel)
        region = _surroundings(panel)
        original = _tile(image, side)
        if _is_enlarged(panel):
            _outline(original, panel, _whole(panel))
        tiles = [original]
        for pixels in (window, masked, reconstruction):
            tiles.append(_tile(_in_place(panel, image, pixels)[region], side))
            _outline(tiles[-1], panel, region)
        rows.append(tiles)
    group = _Group("", ("original", "window", "masked", "reconstruction"))
    if any(_is_enlarged(panel) for panel in panels):
        caption += " The window outlined in the original is shown enlarged, with its surroundings."
    return _sheet(rows, [group], side, _full_caption(caption, panels))


def figure8(rows: Sequence[Sequence[Panel]], ratios: Sequence[float], caption: str) -> Image.Image:
    """One row an image: the original with its window outlined, then masked and reconstructed window for each ratio.

    As the paper's Fig. 8, with the windows enlarged, since their surroundings are the same in every column.

    Args:
        rows: for each image one panel per ratio, of the same image and window.
        ratios: shares of hidden patches, for the headings, such as (0.6, 0.7, 0.8, 0.9).
        caption: set below and wrapped; a sentence is added where channels or contrast are not as in the file.

    Raises:
        ValueError: no row, or a row whose number of panels is not the number of ratios.
    """
    if not rows or not ratios:
        raise ValueError("no panel to draw")
    for row in rows:
        if len(row) != len(ratios):
            raise ValueError(f"a row has {len(row)} panels for {len(ratios)} ratios")
    side = _tile_side(max(panel.window_px for row in rows for panel in row))
    tiles = []
    for row in rows:
        first = row[0]
        original = _tile(_views(first)[0], side)
        _outline(original, first, _whole(first))
        tiles.append([original])
        for panel in row:
            _, _, masked, reconstruction = _views(panel)
            tiles[-1] += [_tile(masked, side), _tile(reconstruction, side)]
    groups = [_Group("", ("original",))]
    groups += [_Group(f"{ratio:.0%} hidden", ("masked", "reconstruction")) for ratio in ratios]
    return _sheet(tiles, groups, side, _full_caption(caption, [panel for row in rows for panel in row]))


def _views(panel: Panel) -> tuple[Rgb, Rgb, Rgb, Rgb]:
    """The image, and its window as it is, masked and reconstructed; all in the contrast of the image."""
    low, high = _shown_range(panel.original)
    image = _rgb(panel.original, low, high)
    window = image[panel.window_box()]
    sides = (isqrt(panel.hidden.size),) * 2
    patch = np.ones((panel.patch_px, panel.patch_px), dtype=bool)
    hidden = np.kron(panel.hidden.reshape(sides), patch)[..., None]  # (K * P, K * P, 1)
    masked = np.where(hidden, np.uint8(HIDDEN), window)
    reconstruction = np.where(hidden, _rgb(panel.prediction, low, high), window)
    return image, window, masked, reconstruction


def _shown_range(original: NDArray[np.generic]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
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


def _rgb(pixels: NDArray[np.generic], low: NDArray[np.float32], high: NDArray[np.float32]) -> Rgb:
    """Pixels (C, h, w) as (h, w, 3): one channel is grey, the first three of more are red, green, blue."""
    # NaN, which a diverged model predicts, is drawn black.
    shown = np.nan_to_num(np.clip((pixels.astype(np.float32) - low) / (high - low), 0, 1))
    if len(shown) == 1:
        shown = np.repeat(shown, 3, axis=0)
    elif len(shown) == 2:
        shown = np.concatenate([shown, np.zeros_like(shown[:1])])
    return (shown[:3].transpose(1, 2, 0) * 255).round().astype(np.uint8)


def _in_place(panel: Panel, image: Rgb, window: Rgb) -> Rgb:
    """The window where it belongs, the rest of the image a pale grey hint."""
    grey = image.mean(axis=2, keepdims=True)
    faint = GHOST * grey + (1 - GHOST) * 255
    placed = np.repeat(faint, 3, axis=2).round().astype(np.uint8)
    placed[panel.window_box()] = window
    return placed


def _tile_side(pixels: int) -> int:
    """Side of the tiles for images of a side of `pixels`: a whole multiple of it unless it is too large."""
    return min(LARGEST_TILE_PX, pixels * ceil(SMALLEST_TILE_PX / pixels))


def _tile(pixels: Rgb, side: int) -> Image.Image:
    """Square pixels at a side; enlarged by a whole factor they stay squares."""
    whole = side % pixels.shape[0] == 0
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _whole(panel: Panel) -> Region:
    """All of the image."""
    return slice(0, panel.side_px), slice(0, panel.side_px)


def _is_enlarged(panel: Panel) -> bool:
    """Whether the window is too small a part of the image to be looked at in the whole of it."""
    return panel.side_px > SURROUNDINGS * panel.window_px


def _surroundings(panel: Panel) -> Region:
    """The part of the image to show around the window: a square of some windows, or all of it."""
    side = min(panel.side_px, SURROUNDINGS * panel.window_px)
    starts = [
        min(max(0, axis.start - (side - panel.window_px) // 2), panel.side_px - side) for axis in panel.window_box()
    ]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def _outline(tile: Image.Image, panel: Panel, region: Region) -> None:
    """Draws a frame around the window on the tile of a region, outside the window where there is room."""
    side = tile.width
    width = max(2, side // 100)
    scale = side / (region[0].stop - region[0].start)
    rows, columns = (
        (round((window.start - shown.start) * scale) - width, round((window.stop - shown.start) * scale) + width)
        for window, shown in zip(panel.window_box(), region, strict=True)
    )
    top, bottom = max(0, rows[0]), min(side, rows[1]) - 1
    left, right = max(0, columns[0]), min(side, columns[1]) - 1
    ImageDraw.Draw(tile).rectangle((left, top, right, bottom), outline=OUTLINE, width=width)


@dataclass(frozen=True)
class _Group:
    """Columns that belong together: a heading over all (may be empty) and a title for each."""

    heading: str
    titles: tuple[str, ...]


def _sheet(tiles: list[list[Image.Image]], groups: list[_Group], side: int, caption: str) -> Image.Image:
    """Tiles in rows and grouped columns, with headings above and the caption below."""
    gap = max(4, side // 40)
    margin = 3 * gap
    font, bold = _font(max(14, side // 14), "DejaVuSans"), _font(max(15, side // 13), "DejaVuSans-Bold")
    line_px = round(1.45 * font.size)

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

    lines = _wrapped(caption, font, width - 2 * margin)
    has_headings = any(group.heading for group in groups)
    top = margin + line_px * (2 if has_headings else 1) + (2 * gap if has_headings else 0)
    below = top + len(tiles) * (side + gap) + gap
    sheet = Image.new("RGB", (width, below + len(lines) * line_px + margin), PAPER)
    draw = ImageDraw.Draw(sheet)

    for group, (left, right) in zip(groups, spans, strict=True):
        if group.heading:
            draw.text(((left + right) / 2, margin), group.heading, INK, bold, anchor="ma")
            rule = margin + line_px + gap // 2
            draw.line([(left, rule), (right - 1, rule)], RULE, max(1, side // 200))
    titles = [title for group in groups for title in group.titles]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left + side / 2, top - gap), title, INK, font, anchor="md")
    for index, row in enumerate(tiles):
        for left, tile in zip(lefts, row, strict=True):
            sheet.paste(tile, (left, top + index * (side + gap)))
    for index, line in enumerate(lines):
        draw.text((margin, below + index * line_px), line, INK, font)
    return sheet


def _full_caption(caption: str, panels: Sequence[Panel]) -> str:
    """The caption and, once each, what must be said about channels and contrast."""
    notes = dict.fromkeys(note for panel in panels if (note := _note(panel.original)))
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
def _font(size_px: int, name: str) -> ImageFont.FreeTypeFont:
    """DejaVu, which comes with matplotlib and so is the same on every machine."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size_px)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
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
