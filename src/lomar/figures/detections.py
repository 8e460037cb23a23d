"""Images with the objects found in them: boxes, masks and names; ground truth beside predictions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as coco_mask

from lomar.figures.sheet import Group, Rgb, sheet, typeface

# Okabe and Ito's seven, then those farthest from all before them, least of four kinds of sight: usual, and without
# one of the three cones (Machado et al. 2009, distances in OKLab).
COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442"),
    *("#871E4B", "#00FFD2", "#8700FF", "#9678FF", "#96C387", "#2D2DC3", "#784B00"),
)
TILE_PX = 640  # longer side of an image on a sheet
_SHEET_LETTERS_PX = 22  # beside names of half that size
_FILL = 0.42  # how much of a mask's colour lies over the image
_SHADE = 0.45  # of the dark edge that sets a frame off from an image of its colour
_SMALLEST_LETTERS_PX = 9
_SMALLER = 0.78  # size of the letters beside a small object, or where there is no room for larger
_HIDDEN = 0.05  # a name of which others would hide more than this share is left out
_NEUTRAL = (242, 242, 242)  # beside an image that does not fill its tile

Mask = NDArray[np.bool_] | Mapping[str, Any]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Objects:
    """What is in one image, or what a detector found there.

    Args:
        boxes: (n, 4): x0, y0, x1, y1 in pixels; they may leave the image.
        labels: (n,), places in the list of names.
        scores: (n,), 0 to 1, written beside the names; None of ground truth.
        masks: n of the image's size: bool (H, W), or run-length codes as pycocotools makes them; None without masks.

    Raises:
        ValueError: the parts are of unlike length.
    """

    boxes: NDArray[np.floating]
    labels: NDArray[np.integer]
    scores: NDArray[np.floating] | None = None
    masks: Sequence[Mask] | None = None

    def __post_init__(self) -> None:
        counts = [len(part) for part in (self.boxes, self.labels, self.scores, self.masks) if part is not None]
        if len(set(counts)) > 1 or self.boxes.shape != (counts[0], 4):
            raise ValueError(f"boxes {self.boxes.shape} and parts of lengths {counts} do not fit together")

    def __len__(self) -> int:
        return len(self.boxes)


def colour_of(label: int) -> Colour:
    """The colour of a category, the same in every picture; the 15th has the first's again."""
    code = COLOURS[label % len(COLOURS)]
    red, green, blue = (int(code[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue


def draw_detections(image: Rgb, objects: Objects, names: Sequence[str]) -> Rgb:
    """An image with boxes, translucent masks and names in the colours of their categories.

    Lines and letters grow with the image. Large objects are drawn first, so that small ones lie on them. The best
    scored have the first choice of a place for their name; where no place is left, only the frame stands.

    Args:
        image: (H, W, 3) uint8; left as it is.
        objects: what to draw.
        names: of the categories.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: a mask is not of the image's size.
    """
    drawn = np.array(image)
    height, width = drawn.shape[:2]
    side = sqrt(height * width)
    line = max(1, round(side / 280))
    sizes = (objects.boxes[:, 2:] - objects.boxes[:, :2]).clip(0)
    order = np.argsort(-sizes.prod(axis=1), kind="stable").tolist()
    if objects.masks is not None:
        for place in order:
            _draw_mask(drawn, _decoded(objects.masks[place], (height, width)), colour_of(objects.labels[place]), line)
    # A mask has an outline of its own, beside which its frame is thin.
    frame = line if objects.masks is None else max(1, line // 2)
    for place in order:
        _draw_frame(drawn, objects.boxes[place], colour_of(objects.labels[place]), frame)
    picture = Image.fromarray(drawn)
    _draw_names(picture, objects, names, 0.085 * side**0.8)
    return np.asarray(picture)


def _decoded(mask: Mask, size: tuple[int, int]) -> NDArray[np.bool_]:
    pixels = coco_mask.decode(dict(mask)).astype(bool) if isinstance(mask, Mapping) else mask
    if pixels.shape != size:
        raise ValueError(f"a mask is of {pixels.shape}, its image of {size}")
    return pixels


def _draw_mask(drawn: Rgb, mask: NDArray[np.bool_], colour: Colour, line: int) -> None:
    """Blends a mask's colour into the image, with an outline of `line` pixels inside its edge."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    around = 2 * line
    region = (
        slice(max(0, rows[0] - around), rows[-1] + 1 + around),
        slice(max(0, columns[0] - around), columns[-1] + 1 + around),
    )
    inside = mask[region]
    # Blurred over 2 line + 1 pixels, the mask falls from 1 to 0 across its edge: the distance to it, in pixels. The
    # picture's own edge is repeated by the filter, and so is none of the mask's.
    blurred = Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(line))
    distance = (np.asarray(blurred, np.float32) / 255 - 0.5) * (2 * line + 1)
    cover = np.clip(line / 2 + 0.6 - np.abs(distance - line / 2), _FILL, 1)  # 0.1 for the filter's rounding
    cover[distance < 0] = 1  # thinner than the outline
    cover = (cover * inside)[..., None]
    drawn[region] = (drawn[region] * (1 - cover) + np.array(colour, np.float32) * cover + 0.5).astype(np.uint8)


def _draw_frame(drawn: Rgb, box: NDArray[np.floating], colour: Colour, line: int) -> None:
    """Draws a box's frame inside it, with a dark edge on both sides."""
    height, width = drawn.shape[:2]
    x0, y0, x1, y1 = (float(value) for value in box)
    left, top = floor(max(0.0, min(x0, width - 1))), floor(max(0.0, min(y0, height - 1)))
    right, bottom = ceil(min(float(width), max(x1, left + 1))), ceil(min(float(height), max(y1, top + 1)))
    edge = max(1, line // 3)
    outer = (left - edge, top - edge, right + edge, bottom + edge)
    shade = _SHADE * min(1, line / 2)
    for region in _frame(outer, line + 2 * edge):
        drawn[region] = (drawn[region] * (1 - shade)).astype(np.uint8)
    for region in _frame((left, top, right, bottom), line):
        drawn[region] = colour


def _frame(box: tuple[int, int, int, int], line: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the four bars of a frame, none of which covers another's pixels."""
    left, top, right, bottom = box
    across, down = min(line, (right - left + 1) // 2), min(line, (bottom - top + 1) // 2)
    rows = [max(0, row) for row in (top, top + down, max(top + down, bottom - down), bottom)]
    columns = [max(0, column) for column in (left, left + across, max(left + across, right - across), right)]
    yield slice(rows[0], rows[1]), slice(columns[0], columns[3])
    yield slice(rows[2], rows[3]), slice(columns[0], columns[3])
    yield slice(rows[1], rows[2]), slice(columns[0], columns[1])
    yield slice(rows[1], rows[2]), slice(columns[2], columns[3])


class _Tag(NamedTuple):
    """A name and where it stands."""

    text: str
    letters: ImageFont.FreeTypeFont
    box: tuple[int, int, int, int]  # left, top, right, bottom
    colour: Colour


def _draw_names(picture: Image.Image, objects: Objects, names: Sequence[str], letters_px: float) -> None:
    """Writes names on tags of their colours, inside the picture and off each other where there is room."""
    boxes = np.clip(objects.boxes.astype(float), 0, [picture.width, picture.height] * 2)
    if objects.scores is None:
        order = np.argsort((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable")
    else:
        order = np.argsort(-objects.scores, kind="stable")
    sizes = [max(_SMALLEST_LETTERS_PX, round(letters_px * share)) for share in (1, _SMALLER)]
    tags: list[_Tag] = []
    for index in order.tolist():
        name = names[int(objects.labels[index])]
        score = "" if objects.scores is None else f" {objects.scores[index]:.2f}"
        colour = colour_of(int(objects.labels[index]))
        is_small = (boxes[index, 2:] - boxes[index, :2]).max() < 4 * letters_px
        for size in sizes[1:] if is_small else sizes:
            tag, hidden = _tag(name, score, colour, typeface(size), boxes, index, picture.size, tags)
            if hidden <= _HIDDEN:
                tags.append(tag)
                break
    draw = ImageDraw.Draw(picture)
    for text, letters, (left, top, right, bottom), colour in reversed(tags):  # the best on top
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
        draw.text((left + _pad(letters), (top + bottom) / 2), text, _ink_on(colour), letters, anchor="lm")


def _pad(letters: ImageFont.FreeTypeFont) -> int:
    """Beside the letters on a tag, in pixels."""
    return max(1, round(letters.size / 5))


def _tag(
    name: str,
    score: str,
    colour: Colour,
    letters: ImageFont.FreeTypeFont,
    boxes: NDArray[np.floating],
    index: int,
    picture: tuple[int, int],
    others: Sequence[_Tag],
) -> tuple[_Tag, float]:
    """An object's name where it is best read, and the share of it that other tags would hide there."""
    text = _shortened(name, letters, picture[0] * 0.6 - letters.getlength(score)) + score
    size = wide, high = ceil(letters.getlength(text)) + 2 * _pad(letters), sum(letters.getmetrics())
    x0, y0, x1, y1 = boxes[index].round().tolist()
    # In order of preference: above, inside, below; then along the sides.
    wanted = [(x0, y0 - high), (x0, y0), (x0, y1), (x1 - wide, y0 - high), (x1 - wide, y0), (x0, y1 - high)]
    wanted += [(x1 - wide, y1 - high), (x1 - wide, y1), (x1, y0), (x0 - wide, y0), (x1, y1 - high)]
    steps = range(1, int(min(8, (y1 - y0) // high)))
    wanted += [(x, y0 + step * high) for x in (x0, x1 - wide) for step in steps]
    corners = np.clip(wanted, 0, np.maximum(0, np.subtract(picture, size)))  # (places, 2)
    places = np.concatenate([corners, corners + size], axis=1)
    moved = np.abs(corners - np.array(wanted)).sum(axis=1) / high
    hidden = _common(places, np.array([other.box for other in others]).reshape(-1, 4)).sum(axis=1) / (wide * high)
    covered = _common(places, boxes) / np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 1)  # of each object
    cost = 20 * hidden + 2 * covered.sum(axis=1) + 0.5 * moved + 0.03 * np.arange(len(places))
    best = int(cost.argmin())
    left, top, right, bottom = places[best].astype(int).tolist()
    return _Tag(text, letters, (left, top, right, bottom), colour), float(hidden[best])


def _common(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Area that each of (a, 4) boxes has in common with each of (b, 4): (a, b)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return (high - low).clip(0).prod(axis=2)


def _ink_on(colour: Colour) -> Colour:
    """Black or white, whichever is read better on a colour (WCAG's contrast)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in np.array(colour) / 255]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)


def _shortened(name: str, letters: ImageFont.FreeTypeFont, width_px: float) -> str:
    """A name of one line, its end left out where it is wider."""
    name = " ".join(name.split())
    if letters.getlength(name) <= width_px:
        return name
    while name and letters.getlength(name + "…") > width_px:
        name = name[:-1]
    return name + "…"


def detections_sheet(
    rows: Sequence[tuple[Rgb, Objects | None, Objects]], names: Sequence[str], caption: str
) -> Image.Image:
    """A sheet of images: ground truth beside what was found, a row for each image.

    Args:
        rows: the image (H, W, 3); its ground truth, in all rows or in none; what was found.
        names: of the categories.
        caption: below.

    Raises:
        ValueError: no row, or ground truth in some alone.
    """
    with_truth = [truth is not None for _, truth, _ in rows]
    if not rows or len(set(with_truth)) > 1:
        raise ValueError(f"{sum(with_truth)} of {len(rows)} rows have a ground truth")
    scaled = [[_at_tile(image, objects, names) for objects in told if objects is not None] for image, *told in rows]
    width, height = (max(tile.size[axis] for row in scaled for tile in row) for axis in (0, 1))
    tiles = [[_centred(tile, (width, height)) for tile in row] for row in scaled]
    titles = ("ground truth", "found") if with_truth[0] else ("found",)
    return sheet(tiles, [Group("", titles)], caption, _SHEET_LETTERS_PX)


def _at_tile(image: Rgb, objects: Objects, names: Sequence[str]) -> Image.Image:
    """An image at the size of a tile, and then drawn on, so that lines and letters are sharp."""
    height, width = image.shape[:2]
    scale = TILE_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    masks = objects.masks
    if masks is not None:
        masks = [_resized(_decoded(mask, (height, width)), size) for mask in masks]
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    return Image.fromarray(
        draw_detections(small, Objects(objects.boxes * scale, objects.labels, objects.scores, masks), names)
    )


def _resized(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) >= 128


def _centred(tile: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A tile in the middle of one of a size."""
    if tile.size == size:
        return tile
    whole = Image.new("RGB", size, _NEUTRAL)
    whole.paste(tile, ((size[0] - tile.width) // 2, (size[1] - tile.height) // 2))
    return whole
