"""Several crops of each image, for methods that compare views: two large ones, and small ones beside them."""

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from lomar.data.augment import random_resized_crop
from lomar.data.decode import Image, PixelFormat, decoded_once
from lomar.data.loader import Batching, Draw, MicroBatch, SampleKey, batches_of, readable_sample
from lomar.data.order import Order
from lomar.data.sources import ImageSource

Scale = tuple[float, float]

NARROWEST = 3 / 4  # of a crop, its shorter side over the longer
SHRUNK = 0.5  # above, a decoder that shrinks saves little, and boxes would be rounded to its pixels


@dataclass(frozen=True)
class MultiCropPlan:
    """What crops become of an image, each mirrored or not by its own chance.

    Args:
        size_px: side of the two large ones.
        scale: smallest and largest share of an image's area that they take.
        local_crops: how many small ones.
        local_px: side of those.
        local_scale: as `scale`, of those.
        bilinear: whether they are resized with the bilinear filter, as MoCo v3's are, and not with the bicubic one.

    Source: SwAV's multi-crop, as DINO takes it; MoCo v3 has no small ones.
    """

    size_px: int
    scale: Scale
    local_crops: int = 0
    local_px: int = 0
    local_scale: Scale = (0.0, 0.0)
    bilinear: bool = False

    def __call__(self, image: Image, fmt: PixelFormat, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The large crops (2, C, S, S) and the small ones (V - 2, C, s, s); the file is decoded once for all."""
        image = decoded_once(image, self._zoom(image), fmt.channels)
        large = self._crops(image, fmt, generator, 2, self.size_px, self.scale)
        return large, self._crops(image, fmt, generator, self.local_crops, self.local_px, self.local_scale)

    def _zoom(self, image: Image) -> float:
        """Share of an image's sides at which its smallest crops need not be enlarged more than they must be."""
        kinds = [(self.size_px, self.scale[0])] + [(self.local_px, self.local_scale[0])] * bool(self.local_crops)
        shortest = math.sqrt(NARROWEST * image.height * image.width)
        zoom = max(side / (math.sqrt(share) * shortest) for side, share in kinds)
        return zoom if zoom < SHRUNK else 1.0

    def _crops(
        self, image: Image, fmt: PixelFormat, generator: torch.Generator, count: int, side_px: int, scale: Scale
    ) -> np.ndarray:
        crops = np.empty((count, fmt.channels, side_px, side_px), dtype=fmt.dtype)
        for place in crops:
            box = random_resized_crop(image.height, image.width, scale, generator=generator)
            crop = image.crop(box, (side_px, side_px), fmt, bilinear=self.bilinear)
            place[...] = crop[:, :, ::-1] if torch.rand(1, generator=generator).item() < 0.5 else crop
        return crops


@dataclass(frozen=True)
class _ManyCrops(Dataset[MicroBatch]):
    """Samples of the stream, as crops."""

    source: ImageSource
    order: Order
    fmt: PixelFormat
    draw: Draw
    plan: MultiCropPlan
    seed: int
    last_slot: int

    def __getitems__(self, keys: list[SampleKey]) -> MicroBatch:
        draws = [self.draw(key) for key in keys]
        inputs = {name: torch.stack([each[name] for each in draws]) for name in draws[0]}
        crops: list[tuple[np.ndarray, np.ndarray]] = []
        names: list[str] = []
        bad: list[tuple[str, str]] = []
        for key in keys:
            both, index = readable_sample(
                self.source, self.order, key, self.seed, bad, lambda image, chance: self.plan(image, self.fmt, chance)
            )
            crops.append(both)
            names.append(self.source.name(index))
        large, small = zip(*crops, strict=True)
        inputs["crops"] = torch.from_numpy(np.stack(large))
        if self.plan.local_crops:
            inputs["local_crops"] = torch.from_numpy(np.stack(small))
        return MicroBatch(inputs, names, bad, keys[-1].slot == self.last_slot)


def multicrop_batches(
    source: ImageSource,
    fmt: PixelFormat,
    draw: Draw,
    *,
    plan: MultiCropPlan,
    batching: Batching,
) -> Generator[MicroBatch, None, None]:
    """One process's micro-batches of crops.

    Inputs are "crops" (B, 2, C, S, S), where there are small ones "local_crops" (B, V - 2, C, s, s), both of fmt.dtype,
    and all that was drawn for the samples.

    Args:
        source: the images.
        fmt: what their pixels become.
        draw: what else is random about a sample; must be picklable.
        plan: how images are cropped.
        batching: which samples, in what parts.

    Raises:
        UserError: one bad file after another.
        ValueError: fewer samples in a batch than processes.
    """

    def many_crops(order: Order, last_slot: int) -> Dataset[MicroBatch]:
        return _ManyCrops(source, order, fmt, draw, plan, batching.seed, last_slot)

    return batches_of(source, many_crops, batching)
