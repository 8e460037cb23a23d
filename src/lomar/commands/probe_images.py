"""Batches of labelled images for MAE's linear probe: a new crop in each epoch, mirrored or not."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lomar.data.augment import clamped_crop
from lomar.data.decode import PixelFormat, read_image
from lomar.data.labels import Labelled
from lomar.data.loader import REPLACEMENTS, SampleKey, loaded, micro_batch_keys, stream
from lomar.data.survey import reason_for
from lomar.errors import BadImageError, UserError
from lomar.seeding import seeded


@dataclass(frozen=True)
class ProbeBatch:
    """A part of a batch.

    Args:
        pixels: (B, C, H, W) as read.
        labels: int64 (B,).
        bad: (name, reason) of files that could not be read and were replaced.
        last: whether the batch ends with it.
    """

    pixels: Tensor
    labels: Tensor
    bad: list[tuple[str, str]]
    last: bool

    def pin_memory(self) -> "ProbeBatch":
        """The same in page-locked memory. The DataLoader calls this."""
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True)
class _Crops(Dataset[ProbeBatch]):
    labelled: Labelled
    fmt: PixelFormat
    size_px: tuple[int, int]
    seed: int
    last_slot: int

    def __getitems__(self, keys: list[SampleKey]) -> ProbeBatch | UserError:
        """A UserError is returned, not raised: a worker would wrap it in its traceback."""
        pixels = np.empty((len(keys), self.fmt.channels, *self.size_px), dtype=self.fmt.dtype)
        labels = torch.empty(len(keys), dtype=torch.int64)
        bad: list[tuple[str, str]] = []
        try:
            for place, key in enumerate(keys):
                pixels[place], labels[place] = self._crop(key, bad)
        except UserError as error:
            return error
        return ProbeBatch(torch.from_numpy(pixels), labels, bad, keys[-1].slot == self.last_slot)

    def _crop(self, key: SampleKey, bad: list[tuple[str, str]]) -> tuple[np.ndarray, int]:
        """A crop (C, H, W) and its label; where a file cannot be read, another image's."""
        index, source = key.index, self.labelled.source
        for attempt in range(REPLACEMENTS + 1):
            name = source.name(index)
            try:
                generator = seeded(self.seed, key.epoch, key.index, "crop")
                image = read_image(source.read(index), name)
                box = clamped_crop(image.height, image.width, generator=generator)
                crop = image.crop(box, self.size_px, self.fmt)
            except (BadImageError, OSError) as error:
                bad.append((name, reason_for(error)))
                chooser = seeded(self.seed, key.epoch, key.index, "replacement", attempt)
                index = int(torch.randint(len(source), (1,), generator=chooser))
            else:
                mirrored = torch.rand(1, generator=generator).item() < 0.5
                return crop[:, :, ::-1] if mirrored else crop, int(self.labelled.labels[index])
        name, reason = bad[-1]
        raise UserError(f"{REPLACEMENTS + 1} files in a row cannot be read, the last {name}: {reason}")


def probe_batches(
    labelled: Labelled,
    fmt: PixelFormat,
    size_px: tuple[int, int],
    *,
    seed: int,
    batch_size: int,
    micro_batch: int,
    first_batch: int,
    total_batches: int,
    workers: int,
    pin_memory: bool,
) -> Generator[ProbeBatch, None, None]:
    """The parts of batches first_batch up to total_batches, in order. A sample depends on (seed, epoch, image) alone.

    Args:
        labelled: the images.
        fmt: what their pixels become.
        size_px: (height, width) of the crops.
        seed: of the probe.
        batch_size: images of a step.
        micro_batch: most images of a part.
        first_batch: the batch to begin with, from 0.
        total_batches: of the whole probe.
        workers: loading processes; 0 loads in this one.
        pin_memory: whether to hand out page-locked memory, for copies to a GPU.

    Raises:
        UserError: one bad file after another.
    """
    crops = _Crops(labelled, fmt, size_px, seed, last_slot=batch_size - 1)
    batches = islice(stream(len(labelled), seed, batch_size, first_batch), total_batches - first_batch)
    yield from loaded(crops, micro_batch_keys(batches, range(batch_size), micro_batch), workers, pin_memory)
