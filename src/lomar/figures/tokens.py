"""Images above what is left of them as tokens."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lomar.figures.sheet import Group, rgb, sheet, tile, tile_side


def tokens_figure(originals: NDArray[np.float32], decoded: NDArray[np.float32], caption: str) -> Image.Image:
    """One column an image: the original above, decoded from its tokens below.

    Args:
        originals: (n, C, S, S) in 0 to 1; of other channels than one or three, the first three are shown.
        decoded: the same shape.
        caption: set below and wrapped.
    """
    side = tile_side(originals.shape[-1])
    limits = np.zeros((1, 1, 1), np.float32), np.ones((1, 1, 1), np.float32)
    rows = [[tile(rgb(image, limits), side) for image in images] for images in (originals, decoded)]
    return sheet(rows, [Group("", ("",) * len(originals))], caption)
