"""What a method that compares views sees: images, and beside each its large and small crops."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lomar.figures.sheet import PAPER, Group, Rgb, rgb, sheet, shown_range, tile, tile_side, with_notes

CROPS_FILE = "crops.png"  # in a run's figures/
MOST_SMALL = 24  # crops drawn of an image


@dataclass(frozen=True)
class Crops:
    """An image and its crops, as the encoder gets them but for the normalisation.

    Attributes:
        original: (C, S, S), its central crop.
        large: (L, C, S, S), in the units of `original`.
        small: (n, C, s, s), likewise; n may be 0.
    """

    original: NDArray[np.generic]
    large: NDArray[np.generic]
    small: NDArray[np.generic]


def crops_figure(images: Sequence[Crops], caption: str) -> Image.Image:
    """One row an image: the image, its large crops, and its small ones, as many on a tile as fit at the same scale.

    Args:
        images: one or more, with as many crops of the same sides each.
        caption: set below and wrapped; sentences are added where not all small crops are drawn, and where channels or
            contrast are not as in the file.

    Raises:
        ValueError: no image.
    """
    if not images:
        raise ValueError("no image to draw")
    first = images[0]
    side = tile_side(first.original.shape[-1])
    along = max(1, first.original.shape[-1] // max(1, first.small.shape[-1]))  # small crops of a tile's row
    count = min(len(first.small), MOST_SMALL)
    rows = []
    for image in images:
        limits = shown_range(image.original)
        original, *large = (tile(rgb(each, limits), side) for each in (image.original, *image.large))
        small = [rgb(each, limits) for each in image.small[:count]]
        packed = [_packed(small[start : start + along**2], along, side) for start in range(0, count, along**2)]
        rows.append([original, *large, *packed])
    groups = [Group("", ("image",)), Group("large crops", tuple(map(str, range(1, 1 + len(first.large)))))]
    if count:
        starts = range(1, count + 1, along**2)
        titles = (f"{start} to {min(start + along**2 - 1, count)}" if along > 1 else str(start) for start in starts)
        groups.append(Group("small crops", tuple(titles)))
    if count < len(first.small):
        caption += f" Of {len(first.small)} small crops {count} are drawn."
    return sheet(rows, groups, with_notes(caption, [image.original for image in images]))


def _packed(crops: Sequence[Rgb], along: int, side: int) -> Image.Image:
    """Small crops in rows on one tile, as large as fit with a gap between them."""
    gap = max(2, side // 60)
    small_px = (side - (along - 1) * gap) // along
    paper = Image.new("RGB", (side, side), PAPER)
    for place, crop in enumerate(crops):
        down, across = divmod(place, along)
        paper.paste(tile(crop, small_px), (across * (small_px + gap), down * (small_px + gap)))
    return paper
