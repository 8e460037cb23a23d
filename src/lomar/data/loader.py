"""Deterministic, resumable, sharded batches of windows.

The stream of a run has no end: an epoch follows the other, each in an order of its own (`lomar.data.order`). So a batch
is always full, small data recurs with new crops, and a run can begin at any batch. Each sample is a function of (seed,
epoch, index) alone: neither the worker, the micro-batch nor the process it falls to changes it.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from lomar.data.ahead import fetched_ahead
from lomar.data.augment import CENTRE_SHARE, ColorJitter, centre_crop, random_resized_crop
from lomar.data.decode import Image, PixelFormat, read_image
from lomar.data.order import POOLED_GB, Order, order_of
from lomar.data.sources import ImageSource
from lomar.data.survey import reason_for
from lomar.data.workers import loaded
from lomar.errors import BadImageError, UserError
from lomar.seeding import seeded

REPLACEMENTS = 20  # files tried in the place of a bad one: with a quarter bad, all fail once in 10^12

T = TypeVar("T")


class SampleKey(NamedTuple):
    """One sample of the stream: image `index` in its `epoch`, at place `slot` of global batch `batch`; all from 0."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    batch: int
    slot: int


# What is random about a sample's views, by name; "corners" int64 (V, 2), row and column in patches, is among it.
Draw = Callable[[SampleKey], dict[str, torch.Tensor]]


@dataclass
class MicroBatch:
    """A part of one process's share of a global batch.

    Args:
        inputs: what the method takes, by name: "pixels" (B, V, C, h, w) of uint8, uint16 or float32; all that was drawn
            for the samples, (B, ...) each; "tokenised" (B, C, t, t) if asked for.
        names: the file of each sample.
        bad: (name, reason) of files that could not be read and were replaced.
        last: whether this ends the process's share of its global batch.
    """

    inputs: dict[str, torch.Tensor]
    names: list[str]
    bad: list[tuple[str, str]]
    last: bool

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same with its tensors on a device; the copy overlaps with work if the memory was pinned."""
        return replace(self, inputs={name: t.to(device, non_blocking=True) for name, t in self.inputs.items()})

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory. The DataLoader calls this."""
        return replace(self, inputs={name: t.pin_memory() for name, t in self.inputs.items()})


def stream(order: Order, batch_size: int, first_batch: int) -> Iterator[list[SampleKey]]:
    """The global batches of a run from any batch on, without end.

    Args:
        order: what comes when.
        batch_size: samples of a global batch.
        first_batch: where to begin.
    """
    for batch in count(first_batch):
        yield [SampleKey(*order.at(batch, slot), batch, slot) for slot in range(batch_size)]


def share_of(count: int, rank: int, world_size: int) -> range:
    """The numbers, of 0 to count, that fall to one process; shares differ by at most one."""
    return range(rank * count // world_size, (rank + 1) * count // world_size)


def share_of_batch(batch_size: int, rank: int, world_size: int) -> range:
    """The slots of every global batch that one process handles; shares differ by at most one.

    Raises:
        ValueError: fewer samples than processes.
    """
    if batch_size < world_size:
        raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} processes")
    return share_of(batch_size, rank, world_size)


def micro_batch_keys(batches: Iterable[list[SampleKey]], share: range, micro_batch: int) -> Iterator[list[SampleKey]]:
    """One process's share of each global batch, cut into lists of at most `micro_batch` samples."""
    for batch in batches:
        for start in range(share.start, share.stop, micro_batch):
            yield batch[start : min(start + micro_batch, share.stop)]


@dataclass(frozen=True)
class CropPlan:
    """What becomes of an image before windows are cut from it.

    Args:
        size_px: side of the square crop.
        scale: smallest and largest share of an image's area that a crop takes.
        color_jitter: strength of random brightness, contrast and saturation.
        tokenised_px: side of a second picture of the same crop, for a tokenizer; 0 for none.
    """

    size_px: int
    scale: tuple[float, float]
    color_jitter: float = 0.0
    tokenised_px: int = 0


@dataclass(frozen=True)
class _CropWindows(Dataset[MicroBatch]):
    """Samples of the stream: a random crop of an image, mirrored or not, and windows cut from it."""

    source: ImageSource
    order: Order
    fmt: PixelFormat
    draw: Draw
    plan: CropPlan
    patch_size_px: int
    view_size: tuple[int, int]
    seed: int
    last_slot: int

    def __getitems__(self, keys: list[SampleKey]) -> MicroBatch:
        """A whole micro-batch, so that every window is copied once, into its place."""
        draws = [self.draw(key) for key in keys]
        drawn = {name: torch.stack([each[name] for each in draws]) for name in draws[0]}
        corners_px = drawn["corners"].numpy() * self.patch_size_px  # (B, V, 2)
        side_px = [patches * self.patch_size_px for patches in self.view_size]
        pixels = np.empty((*corners_px.shape[:2], self.fmt.channels, *side_px), dtype=self.fmt.dtype)
        tokenised: list[np.ndarray] = []
        names: list[str] = []
        bad: list[tuple[str, str]] = []
        for key, at_px, windows in zip(keys, corners_px, pixels, strict=True):
            crops, index = readable_sample(self.source, self.order, key, self.seed, bad, self._crops)
            if self.plan.color_jitter:
                jitter = ColorJitter.draw(self.plan.color_jitter, seeded(self.seed, key.epoch, key.index, "colour"))
                crops = [jitter(crop) for crop in crops]
            cut_windows(crops[0], at_px, windows)
            tokenised += crops[1:]
            names.append(self.source.name(index))
        inputs = {"pixels": torch.from_numpy(pixels), **drawn}
        if tokenised:
            inputs["tokenised"] = torch.from_numpy(np.stack(tokenised))
        return MicroBatch(inputs, names, bad, keys[-1].slot == self.last_slot)

    def _crops(self, image: Image, generator: torch.Generator) -> list[np.ndarray]:
        """The crop (C, S, S) of an image, and after it the one for a tokenizer, if there is one; mirrored or not."""
        plan = self.plan
        box = random_resized_crop(image.height, image.width, plan.scale, generator=generator)
        crops = [image.crop(box, (plan.size_px, plan.size_px), self.fmt)]
        if plan.tokenised_px:
            # Lanczos, as BEiT's tokenizer was given its images.
            crops.append(image.crop(box, (plan.tokenised_px, plan.tokenised_px), self.fmt, lanczos=True))
        mirrored = torch.rand(1, generator=generator).item() < 0.5
        return [crop[:, :, ::-1] for crop in crops] if mirrored else crops


def readable_sample(
    source: ImageSource,
    order: Order,
    key: SampleKey,
    seed: int,
    bad: list[tuple[str, str]],
    made: Callable[[Image, torch.Generator], T],
) -> tuple[T, int]:
    """What is made of a sample's image, or of others in its place until one can be read; and that image's number.

    Args:
        source: the images.
        order: which are tried in the place of a bad one.
        key: the sample.
        seed: of the run.
        bad: (name, reason) of files that cannot be read are added to it.
        made: of an image and the sample's own chance, a function of (seed, epoch, image); may raise BadImageError.

    Raises:
        UserError: one bad file after another.
    """

    def read(index: int) -> T:
        # Seeded anew for each attempt: what a bad file drew before it failed must not matter.
        return made(read_image(source.read(index), source.name(index)), seeded(seed, key.epoch, key.index, "crop"))

    return first_readable(source, order, key, bad, read)


def first_readable(
    source: ImageSource, order: Order, key: SampleKey, bad: list[tuple[str, str]], read: Callable[[int], T]
) -> tuple[T, int]:
    """What is read of a sample's image, or of others in its place until one can be read; and that image's number.

    Args:
        source: the images.
        order: which are tried in the place of a bad one.
        key: the sample.
        bad: (name, reason) of files that cannot be read are added to it.
        read: of an image's number; may raise BadImageError or OSError.

    Raises:
        UserError: one bad file after another.
    """
    index = key.index
    for attempt in range(REPLACEMENTS + 1):
        try:
            return read(index), index
        except (BadImageError, OSError) as error:
            bad.append((source.name(index), reason_for(error)))
            last = index
            index = order.instead(key.epoch, key.index, attempt)
    name, reason = bad[-1]
    raise UserError(
        f"{_lost_folder(source, last)}{REPLACEMENTS + 1} files in a row cannot be read, the last {name}: {reason}"
    )


def _lost_folder(source: ImageSource, index: int) -> str:
    """What has become of the folder that a file was in, as the beginning of a sentence; "" where it is there."""
    if source.by_shard() is not None:
        return ""  # it was never on this machine
    path = os.fsdecode(source.path(index))
    if source.members and source.members.hold(index):
        path = source.members.shards[source.members.shard[index]].path
    gone, folder = "", os.path.dirname(path)  # noqa: PTH120 (of bytes that may be no text)
    while folder and not os.path.isdir(folder) and gone != folder:  # noqa: PTH112
        gone, folder = folder, os.path.dirname(folder)  # noqa: PTH120
    if gone:
        return f"the folder {gone} is gone: "
    with contextlib.suppress(OSError):
        if folder and not os.listdir(folder):  # noqa: PTH208
            return f"the folder {folder} is empty, as one that is no longer mounted: "
    return ""


def cut_windows(crop: np.ndarray, corners_px: np.ndarray, windows: np.ndarray) -> None:
    """Copies windows out of a crop.

    Args:
        crop: (C, H, W).
        corners_px: (V, 2), row and column of each window in pixels.
        windows: (V, C, h, w), written.
    """
    height, width = windows.shape[2:]
    for window, (row, column) in zip(windows, corners_px, strict=True):
        window[...] = crop[:, row : row + height, column : column + width]


@dataclass(frozen=True)
class Batching:
    """Which samples of a run's stream come to one process, and in what parts.

    Args:
        seed: of the run.
        batch_size: samples of a global batch, over all processes.
        micro_batch: most samples of a micro-batch.
        total_batches: global batches of the whole run.
        first_batch: the global batch to begin with, from 0.
        workers: loading processes; 0 loads in this one.
        rank: number of this process.
        world_size: count of processes.
        pin_memory: whether to hand out page-locked memory, for copies to a GPU.
        shuffle_gb: GiB of shards at an address that images are drawn from at a time, in all processes together.
        repeats: how often two images come, each time changed anew, before others do (repeated augmentation).
    """

    seed: int
    batch_size: int
    micro_batch: int
    total_batches: int
    first_batch: int = 0
    workers: int = 0
    rank: int = 0
    world_size: int = 1
    pin_memory: bool = False
    shuffle_gb: float = POOLED_GB
    repeats: int = 1

    @property
    def share(self) -> range:
        """The slots of every global batch that this process handles.

        Raises:
            ValueError: fewer samples in a batch than processes.
        """
        return share_of_batch(self.batch_size, self.rank, self.world_size)


def batches_of(
    source: ImageSource, dataset: Callable[[Order, int], Dataset[MicroBatch]], batching: Batching
) -> Generator[MicroBatch, None, None]:
    """One process's micro-batches, in order.

    Args:
        source: the images.
        dataset: order of the images and the last slot of this process's share -> what turns lists of `SampleKey` into
            micro-batches, which must be picklable.
        batching: which samples, in what parts.

    Raises:
        UserError: one bad file after another.
        ValueError: fewer samples in a batch than processes.
    """
    share = batching.share
    order = order_of(source, batching.seed, batching.batch_size, batching.shuffle_gb, batching.repeats)
    left = batching.total_batches - batching.first_batch
    batches = islice(stream(order, batching.batch_size, batching.first_batch), left)
    keys = micro_batch_keys(batches, share, batching.micro_batch)
    data = fetched_ahead(dataset(order, share.stop - 1), order, share)
    return loaded(data, keys, batching.workers, batching.pin_memory)


def pretraining_batches(
    source: ImageSource,
    fmt: PixelFormat,
    draw: Draw,
    *,
    plan: CropPlan,
    patch_size_px: int,
    view_size: tuple[int, int],
    batching: Batching,
) -> Generator[MicroBatch, None, None]:
    """One process's micro-batches of windows.

    Args:
        source: the images.
        fmt: what their pixels become.
        draw: gives the windows and masks of a sample; must be picklable.
        plan: how images are cropped.
        patch_size_px: side of a patch.
        view_size: (rows, columns) of a window in patches.
        batching: which samples, in what parts.

    Raises:
        UserError: one bad file after another.
        ValueError: fewer samples in a batch than processes.
    """

    def crop_windows(order: Order, last_slot: int) -> Dataset[MicroBatch]:
        return _CropWindows(source, order, fmt, draw, plan, patch_size_px, view_size, batching.seed, last_slot)

    return batches_of(source, crop_windows, batching)


@dataclass(frozen=True)
class _CentreCrops(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    source: ImageSource
    fmt: PixelFormat
    size_px: tuple[int, int]
    share: float

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = np.zeros((len(indices), self.fmt.channels, *self.size_px), dtype=self.fmt.dtype)
        good = torch.ones(len(indices), dtype=torch.bool)
        for place, index in enumerate(indices):
            try:
                image = read_image(self.source.read(index), self.source.name(index))
                box = centre_crop(image.height, image.width, self.size_px, self.share)
                pixels[place] = image.crop(box, self.size_px, self.fmt)
            except (BadImageError, OSError):
                good[place] = False
        return torch.from_numpy(pixels), good


def centre_crops(
    source: ImageSource,
    fmt: PixelFormat,
    size_px: int | tuple[int, int],
    workers: int,
    batch_size: int = 64,
    share: float = CENTRE_SHARE,
    first: int = 0,
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """Central crops of all images in order, for evaluation.

    Args:
        source: the images.
        fmt: what their pixels become.
        size_px: side of the square crop, or (height, width).
        workers: loading processes; 0 loads in this one.
        batch_size: images of a batch; the last batch may be smaller.
        share: of the largest such crop's sides, see `centre_crop`.
        first: the image to begin with.

    Yields:
        pixels (B, C, height, width) of fmt.dtype, and good bool (B,): False where a file cannot be read, whose
        pixels are zero.
    """
    size = (size_px, size_px) if isinstance(size_px, int) else size_px
    starts = range(first, len(source), batch_size)
    batches = (list(range(start, min(start + batch_size, len(source)))) for start in starts)
    return loaded(_CentreCrops(source, fmt, size, share), batches, workers, pin_memory=False)
