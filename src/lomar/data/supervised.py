"""Augmented batches of labelled images, deterministic and resumable as those of pretraining.

The crop and the flip are ours, for any format; RandAugment, random erasing, mixup and CutMix are timm's. Each draw
depends on (seed, epoch, image) or, of mixing, on (seed, batch) alone.
"""

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset

from lomar.data.augment import LUMA, ColorJitter, clamped_crop, random_resized_crop
from lomar.data.decode import Image as DecodedImage
from lomar.data.decode import PixelFormat
from lomar.data.labels import Labelled
from lomar.data.loader import Batching, MicroBatch, SampleKey, batches_of, readable_sample
from lomar.data.order import Order
from lomar.seeding import globally_seeded, seeded

NO_POLICY = "none"


@dataclass(frozen=True)
class Augmentation:
    """What becomes of an image and its label before a classifier learns from them.

    Args:
        size_px: (height, width) of the crop.
        crop_scale: smallest and largest share of an image's area that a crop takes.
        classes: their number.
        clamped: whether a box that sticks out of the image is clamped, as for MAE's linear probe, or drawn again.
        policy: of timm (rand-..., augmix-..., v0), for 8-bit gray and colour; "none" for none.
        mean: of each channel, 0 to 1; what a policy fills with.
        color_jitter: strength of random brightness, contrast and saturation.
        erase: probability that a box of the image becomes noise.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        smoothing: share of the target that all classes have in common.
    """

    size_px: tuple[int, int]
    crop_scale: tuple[float, float]
    classes: int
    clamped: bool = False
    policy: str = NO_POLICY
    mean: tuple[float, ...] = ()
    color_jitter: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, two and two."""
        return self.mixup > 0 or self.cutmix > 0


def policy_transform(policy: str, size_px: tuple[int, int], mean: tuple[float, ...]) -> Callable[..., Image.Image]:
    """timm's transform of a policy, on PIL images; filled with the mean, bicubic, shifts relative to the shorter side.

    Args:
        policy: such as "rand-m9-mstd0.5-inc1", the one of MAE's and LoMaR's fine-tuning.
        size_px: (height, width) of the images.
        mean: of three channels, 0 to 1.

    Raises:
        ValueError: timm does not know the policy.
    """
    settings = {
        "translate_const": int(min(size_px) * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    wrong = [part for part in policy.split("-")[1:] if not re.fullmatch(r"t\w+|[a-z]+\d[\d.]*", part)]
    if wrong:  # timm passes over what it cannot read
        raise ValueError(f"timm knows no augmentation {policy!r}: {wrong[0]!r} is no letter with a number")
    try:
        if policy.startswith("rand"):
            return rand_augment_transform(policy, settings)
        if policy.startswith("augmix"):
            return augment_and_mix_transform(policy, settings | {"translate_pct": 0.3})
        return auto_augment_transform(policy, settings)
    except (AssertionError, KeyError, ValueError, IndexError, NotImplementedError) as error:
        raise ValueError(f"timm knows no augmentation {policy!r}") from error


@dataclass(frozen=True)
class _Augmented(Dataset[MicroBatch]):
    """Samples of the stream: crops, augmented, with soft targets."""

    labelled: Labelled
    order: Order
    fmt: PixelFormat
    augmentation: Augmentation
    normalise: Callable[[Tensor], Tensor]
    depth: int
    seed: int
    last_slot: int

    def __getitems__(self, keys: list[SampleKey]) -> MicroBatch:
        """A whole micro-batch."""
        policy = self._policy()
        erasing = (
            RandomErasing(self.augmentation.erase, mode="pixel", device="cpu") if self.augmentation.erase else None
        )
        images, labels, names = [], [], []
        bad: list[tuple[str, str]] = []
        for key in keys:
            crop, index = readable_sample(self.labelled.source, self.order, key, self.seed, bad, self._crop)
            if self.augmentation.color_jitter:
                colour = seeded(self.seed, key.epoch, key.index, "colour")
                crop = ColorJitter.draw(self.augmentation.color_jitter, colour)(crop)
            # One stream of chance for both, after the crop's: a policy may draw any number of times.
            with globally_seeded(self.seed, key.epoch, key.index, "augment"):
                image = self.normalise(torch.from_numpy(_changed(crop, policy)))
                images.append(erasing(image) if erasing else image)
            labels.append(int(self.labelled.labels[index]))
            names.append(self.labelled.source.name(index))
        inputs = dict(
            zip(("images", "targets"), self._mixed(torch.stack(images), torch.tensor(labels), keys), strict=True)
        )
        if self.depth:
            drawn = [torch.rand(self.depth, 2, generator=seeded(self.seed, k.epoch, k.index, "paths")) for k in keys]
            inputs["paths"] = torch.stack(drawn)
        return MicroBatch(inputs, names, bad, keys[-1].slot == self.last_slot)

    def _policy(self) -> Callable[..., Image.Image] | None:
        told = self.augmentation
        if told.policy == NO_POLICY:
            return None
        mean = told.mean if len(told.mean) == 3 else told.mean * 3
        return policy_transform(told.policy, told.size_px, mean)

    def _crop(self, image: DecodedImage, generator: torch.Generator) -> np.ndarray:
        """A random crop (C, H, W), mirrored or not."""
        told = self.augmentation
        draw_box = clamped_crop if told.clamped else random_resized_crop
        box = draw_box(image.height, image.width, told.crop_scale, generator=generator)
        crop = image.crop(box, told.size_px, self.fmt)
        mirrored = torch.rand(1, generator=generator).item() < 0.5
        return np.ascontiguousarray(crop[:, :, ::-1] if mirrored else crop)

    def _mixed(self, images: Tensor, labels: Tensor, keys: list[SampleKey]) -> tuple[Tensor, Tensor]:
        """Images and soft targets (B, classes), mixed two and two with the share that the whole batch has.

        timm's mixup takes the last image for the first one. Here partners are neighbours, so that neither micro-batches
        nor processes part them; in a random order that is the same. Of repeated images they are always two.
        """
        told = self.augmentation
        if not told.mixes:
            return images, mixup_target(labels, told.classes, smoothing=told.smoothing)
        mixup = Mixup(told.mixup, told.cutmix, label_smoothing=told.smoothing, num_classes=told.classes)
        order = torch.arange(len(keys))
        order = torch.cat([order[::2], order[1::2].flip(0)])  # the partner of the first is the last
        with globally_seeded(self.seed, keys[0].batch, "mix"):
            mixed, targets = mixup(images[order], labels[order])
        back = order.argsort()
        return mixed[back], targets[back]


def _changed(crop: np.ndarray, policy: Callable[..., Image.Image] | None) -> np.ndarray:
    """(C, H, W) after a policy; gray goes through it as colour."""
    if policy is None:
        return crop
    colour = np.repeat(crop, 3, axis=0) if len(crop) == 1 else crop
    try:
        changed = np.array(policy(Image.fromarray(colour.transpose(1, 2, 0)))).transpose(2, 0, 1)
    except ValueError:  # timm's Posterize may keep no bit at all, which Pillow 13 refuses
        changed = colour
    if len(crop) == 3:
        return changed
    return np.tensordot(np.array([LUMA], dtype=np.float32), changed, axes=1).round().astype(crop.dtype)


def training_batches(
    labelled: Labelled,
    fmt: PixelFormat,
    augmentation: Augmentation,
    normalise: Callable[[Tensor], Tensor],
    *,
    depth: int,
    batching: Batching,
) -> Generator[MicroBatch, None, None]:
    """One process's micro-batches of global batches first_batch up to total_batches, in order.

    Inputs are "images" (B, C, H, W) float32, "targets" (B, classes) of sum 1, and where `depth` is not 0 "paths"
    (B, depth, 2), uniform numbers for drop path.

    Args:
        labelled: the images.
        fmt: what their pixels become.
        augmentation: what is done to them.
        normalise: pixels (C, H, W) -> a model's input; must be picklable.
        depth: blocks that need numbers for drop path.
        batching: which samples, in what parts; batch, share of a process and micro-batch even where images are mixed.

    Raises:
        UserError: one bad file after another.
        ValueError: fewer samples in a batch than processes, or an odd number where images are mixed.
    """
    share = batching.share
    if augmentation.mixes and (share.start % 2 or share.stop % 2 or batching.micro_batch % 2):
        raise ValueError("images are mixed two and two: batch, shares of it and micro-batches must be even")

    def augmented(order: Order, last_slot: int) -> Dataset[MicroBatch]:
        return _Augmented(labelled, order, fmt, augmentation, normalise, depth, batching.seed, last_slot)

    return batches_of(labelled.source, augmented, batching)
