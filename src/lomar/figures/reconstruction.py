"""Pictures of masked reconstruction as the paper's Fig. 7 and Fig. 8: arrays in, a picture out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lomar.figures.sheet import (
    Group,
    Rgb,
    Window,
    full_caption,
    outline,
    rgb,
    sheet,
    shown_range,
    tile,
    tile_side,
    tiles_of,
)

# Of a figure 7: of windows, and of methods on whole images.
COLUMNS, WHOLE_COLUMNS = ("original", "window", "masked", "reconstruction"), ("original", "masked", "reconstruction")


@dataclass(frozen=True)
class Panel(Window):
    """One window of one image: what was hidden of it and what the model put there.

    Attributes:
        prediction: (C, K * P, K * P) the window as predicted, in the units of `original`; only its hidden patches
            are shown.

    Raises:
        ValueError: a shape that does not fit the others, or a window that leaves the image.
    """

    prediction: NDArray[np.generic]

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = (self.original.shape[0], self.window_px, self.window_px)
        if self.prediction.shape != expected:
            raise ValueError(f"prediction must be {expected}, not {self.prediction.shape}")


def figure7(panels: Sequence[Panel], caption: str) -> Image.Image:
    """One row an image: original, window in its place, masked window, reconstruction; as the paper's Fig. 7 and 9.

    Visible patches of the reconstruction are the true ones. Outside the window the image is only hinted at. A window
    that is a small part of its image is shown enlarged with its surroundings, and outlined in the original. Where all
    windows are whole images, as in MAE, there is no column of them.

    Args:
        panels: one or more; images of different sides are drawn at one size.
        caption: set below and wrapped; a sentence is added where a window is enlarged and where channels or contrast
            are not as in the file.

    Raises:
        ValueError: no panel.
    """
    if not panels:
        raise ValueError("no panel to draw")
    side = tile_side(max(panel.side_px for panel in panels))
    whole = all(panel.is_whole for panel in panels)
    rows = []
    for panel in panels:
        image, window, masked, reconstruction = _views(panel)
        region = panel.surroundings()
        original = tile(image, side)
        if panel.is_small:
            outline(original, panel.box(), panel.whole())
        tiles = [original]
        for pixels in (masked, reconstruction) if whole else (window, masked, reconstruction):
            tiles.append(tile(panel.in_place(image, pixels)[region], side))
            if not whole:
                outline(tiles[-1], panel.box(), region)
        rows.append(tiles)
    group = Group("", WHOLE_COLUMNS if whole else COLUMNS)
    if any(panel.is_small for panel in panels):
        caption += " The window outlined in the original is shown enlarged, with its surroundings."
    return sheet(rows, [group], full_caption(caption, panels))


def columns_of(picture: Image.Image, whole: bool) -> dict[str, list[Image.Image]]:
    """The tiles of a picture that `figure7` drew, title -> one an image; {} where it is none.

    Args:
        picture: as read from its file.
        whole: whether the windows are whole images.
    """
    titles = WHOLE_COLUMNS if whole else COLUMNS
    rows = tiles_of(picture, len(titles))
    return {title: [row[place] for row in rows] for place, title in enumerate(titles)} if rows else {}


def filled_in(panel: Panel, side: int) -> tuple[Image.Image, Image.Image]:
    """The masked window and what the model made of it, each as a tile."""
    _, _, masked, reconstruction = _views(panel)
    return tile(masked, side), tile(reconstruction, side)


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
    side = tile_side(max(panel.window_px for row in rows for panel in row))
    tiles = []
    for row in rows:
        first = row[0]
        original = tile(_views(first)[0], side)
        if not first.is_whole:
            outline(original, first.box(), first.whole())
        tiles.append([original])
        for panel in row:
            _, _, masked, reconstruction = _views(panel)
            tiles[-1] += [tile(masked, side), tile(reconstruction, side)]
    groups = [Group("", ("original",))]
    groups += [Group(f"{ratio:.0%} hidden", ("masked", "reconstruction")) for ratio in ratios]
    return sheet(tiles, groups, full_caption(caption, [panel for row in rows for panel in row]))


def _views(panel: Panel) -> tuple[Rgb, Rgb, Rgb, Rgb]:
    """The image, and its window as it is, masked and reconstructed; all in the contrast of the image."""
    limits = shown_range(panel.original)
    image = rgb(panel.original, limits)
    window = image[panel.box()]
    hidden = panel.spread(panel.hidden)[..., None]  # (K * P, K * P, 1)
    return image, window, panel.masked(window), np.where(hidden, rgb(panel.prediction, limits), window)
