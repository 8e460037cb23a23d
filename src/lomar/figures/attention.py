"""Pictures of where a patch looks, as the paper's Fig. 1: arrays in, a picture out."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lomar.figures.sheet import (
    INK,
    PAPER,
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
    title_px,
    typeface,
)

COLOURS = "inferno"  # perceptually uniform: equal steps of attention look equal, in grey too
QUERY = (0, 229, 255)  # a colour that neither the map nor most photographs have
# How much of a map's colour is the image: enough to recognise it where attention is none, little where it is most.
IMAGE_SHARES = 0.35, 0.1


@dataclass(frozen=True)
class AttentionPanel(Window):
    """One window of one image, a patch of it or the cls token, and where that looks in some layers.

    The window may be all of the image, and nothing of it hidden. Shapes beside those of `Window`: L layers.

    Attributes:
        query: raster index in the window of the patch that looks; None where the cls token does.
        shares: (L, K * K), shares of its attention on the patches of the window in raster order.

    Raises:
        ValueError: a shape that does not fit the others, or a patch outside of the window.
    """

    query: int | None
    shares: NDArray[np.floating]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares.ndim != 2 or self.shares.shape[1] != self.hidden.size:
            raise ValueError(f"shares must be (L, {self.hidden.size}), not {self.shares.shape}")
        if self.query is not None and not 0 <= self.query < self.hidden.size:
            raise ValueError(f"patch {self.query} is outside of a window of {self.hidden.size}")


def figure1(
    panels: Sequence[AttentionPanel], layers: Sequence[int], distances: Sequence[float], caption: str
) -> Image.Image:
    """One row an image: the masked window in its place, the patch that looks outlined, then a heat map for each layer.

    Each map has all of the colours, from no attention to its own highest, which is written below it.

    Args:
        panels: one or more, each with as many maps as there are layers.
        layers: numbers of the layers, for the titles.
        distances: mean attention distance of each layer in patches, for the titles.
        caption: set below and wrapped; the explanation of the colours is added, and what must be said about windows
            shown enlarged, channels and contrast.

    Raises:
        ValueError: no panel or layer, or numbers of maps, layers and distances that differ.
    """
    if not panels or not layers:
        raise ValueError("no panel to draw")
    for count in (len(distances), *(len(panel.shares) for panel in panels)):
        if count != len(layers):
            raise ValueError(f"{count} maps or distances for {len(layers)} layers")
    side = tile_side(max(panel.side_px for panel in panels))
    rows = []
    for panel in panels:
        image = rgb(panel.original, shown_range(panel.original))
        window = image[panel.box()]
        first = _with_query(panel, panel.in_place(image, panel.masked(window)), side)
        rows.append([_above(first, _colour_bar(side))])
        for shares in panel.shares:
            heat = _with_query(panel, panel.in_place(image, _heated(panel, window, shares)), side)
            rows[-1].append(_above(heat, _centred(f"0 to {shares.max():.1%}", side)))
    masked = any(panel.hidden.any() for panel in panels)
    titles = [f"layer {layer}: {distance:.1f} patches" for layer, distance in zip(layers, distances, strict=True)]
    return sheet(rows, [Group("", ("masked" if masked else "image", *titles))], full_caption(caption, panels))


def _heated(panel: AttentionPanel, window: Rgb, shares: NDArray[np.floating]) -> Rgb:
    """The window in grey under the colours of the shares, the highest of which has the last colour."""
    # NaN, which a diverged model has, is drawn as none.
    relative = np.nan_to_num(panel.spread(shares / max(shares.max(), np.finfo(np.float32).tiny)))  # (K * P, K * P)
    colours = matplotlib.colormaps[COLOURS](relative)[..., :3] * 255  # (K * P, K * P, 3)
    image = np.interp(relative, (0, 1), IMAGE_SHARES)[..., None]
    grey = window.mean(axis=2, keepdims=True)
    return ((1 - image) * colours + image * grey).round().astype(np.uint8)


def _with_query(panel: AttentionPanel, pixels: Rgb, side: int) -> Image.Image:
    """The window and its surroundings as a tile, with the query outlined where it is a patch."""
    region = panel.surroundings()
    drawn = tile(pixels[region], side)
    if panel.query is not None:
        outline(drawn, panel.patch_box(panel.query), region, QUERY)
    return drawn


def _above(tile: Image.Image, strip: Image.Image) -> Image.Image:
    """A tile with a strip of the same width below it."""
    both = Image.new("RGB", (tile.width, tile.height + strip.height), PAPER)
    both.paste(tile, (0, 0))
    both.paste(strip, (0, tile.height))
    return both


def _centred(text: str, side: int) -> Image.Image:
    """A strip with words in its middle."""
    letters = typeface(title_px(side) - 2)
    strip = Image.new("RGB", (side, round(1.5 * letters.size)), PAPER)
    ImageDraw.Draw(strip).text((side / 2, strip.height / 2), text, INK, letters, anchor="mm")
    return strip


def _colour_bar(side: int) -> Image.Image:
    """A strip with all the colours, from "none" to "most"."""
    strip = _centred("", side)
    draw, letters = ImageDraw.Draw(strip), typeface(title_px(side) - 2)
    left, right = (round(letters.getlength(f"{word} ")) for word in ("none", "most"))
    draw.text((0, strip.height / 2), "none", INK, letters, anchor="lm")
    draw.text((side, strip.height / 2), "most", INK, letters, anchor="rm")
    steps = np.linspace(0, 1, side - left - right)
    bar = (matplotlib.colormaps[COLOURS](steps)[None, :, :3] * 255).round().astype(np.uint8)
    strip.paste(Image.fromarray(bar.repeat(strip.height // 2, axis=0)), (left, strip.height // 4))
    return strip
