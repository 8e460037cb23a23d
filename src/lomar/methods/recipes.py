"""Methods by name: each one composition of views, mask, architecture and target, with its own defaults."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lomar.methods.architectures import MaskedEncoder
from lomar.methods.masks import UniformMask
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.targets import NormalisedPixels
from lomar.methods.views import LocalWindows, ReleasedWindows
from lomar.model import SIZES, Encoder


@dataclass(frozen=True)
class Composition:
    """All that rebuilds a method from its name: plain values, saved beside the weights.

    Args:
        method: a name in `RECIPES`.
        model: a name in `lomar.model.SIZES`.
        image_size: crop side, in pixels.
        patch_size: patch side P, in pixels.
        window_size: window side K, in patches.
        views: windows per image V.
        mask_ratio: share of a window's patches that are hidden.
        mask_layer: block before which mask tokens enter.
        window_layout: "independent" or "released".
        batch_size: global batch size (the released layout depends on it).
        mean, std: per channel, in units of 0 to 1.
        scale: pixel value that stands for 1.
    """

    method: str
    model: str
    image_size: int
    patch_size: int
    window_size: int
    views: int
    mask_ratio: float
    mask_layer: int
    window_layout: str
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of a crop, in patches."""
        side = self.image_size // self.patch_size
        return side, side

    def encoder(self) -> Encoder:
        """A fresh encoder without classifier."""
        width, depth, heads = SIZES[self.model]
        return Encoder(
            self.image_size, self.patch_size, len(self.mean), 0, embed_dim=width, depth=depth, num_heads=heads
        )

    def build(self) -> MaskedReconstruction:
        """The method with fresh weights.

        Raises:
            ValueError: the parts do not fit together.
        """
        return RECIPES[self.method].compose(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Composition":
        """The inverse of `to_dict`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


@dataclass(frozen=True)
class Recipe:
    """A method: how it is put together, and the option values that define it.

    Args:
        compose: builds it.
        options: defaults of `lomar pretrain` under this method.
    """

    compose: Callable[[Composition], MaskedReconstruction]
    options: Mapping[str, Any] = field(default_factory=dict)


def compose_lomar(c: Composition) -> MaskedReconstruction:
    """LoMaR (Table 1): 7x7 windows, 4 views, 80 % hidden, masks in the encoder, normalised pixels.

    The paper: ViT-B/16, 83.6 % at 400 epochs (66 h on four A100), 84.1 % at 1600 (264 h).
    """
    if c.window_layout == "released":
        views: LocalWindows = ReleasedWindows(c.grid, c.window_size, c.views, c.batch_size)
    else:
        views = LocalWindows(c.grid, c.window_size, c.views)
    return MaskedReconstruction(
        views,
        UniformMask(c.window_size**2, c.mask_ratio),
        MaskedEncoder(c.encoder(), c.mask_layer),
        NormalisedPixels(),
        c.patch_size,
        c.mean,
        c.std,
        c.scale,
    )


RECIPES = {
    "lomar": Recipe(
        compose_lomar,
        {"window_size": 7, "views": 4, "mask_ratio": 0.8, "mask_layer": 0, "window_layout": "independent"},
    ),
}
