"""Features of images, made once and kept in the probe's folder until it is done."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lomar.commands.frozen import FrozenEncoder, require_some, unusable, watched
from lomar.data.labels import Labelled
from lomar.downstream.features import Wanted
from lomar.errors import UserError
from lomar.files import write_atomically
from lomar.training.loop import StopRequest

IMAGES_AT_ONCE = 64


class StoppedError(Exception):
    """SIGINT or SIGTERM came while features were made."""


@dataclass(frozen=True)
class Cached:
    """Features of the images that can be used.

    Args:
        rows: (N, all numbers), float32 or float16, also of images that cannot be used.
        usable: int64 (n,), the numbers of those that can.
        labels: int64 (n,), of the usable ones.
        unusable: names of the others.
    """

    rows: Tensor
    usable: Tensor
    labels: Tensor
    unusable: list[str]

    def __len__(self) -> int:
        return len(self.usable)


def number_type(rows: int, width: int, free_bytes: int) -> np.dtype:
    """What features are kept as: float32 where they take up to half of the free memory, else float16.

    Args:
        rows: images.
        width: numbers of each.
        free_bytes: memory.

    Raises:
        UserError: as float16 they would take more than half.
    """
    for name in ("float32", "float16"):
        dtype = np.dtype(name)
        if rows * width * dtype.itemsize <= free_bytes / 2:
            return dtype
    raise UserError(
        f"the features of {rows:,} images, {width:,} numbers each, take {rows * width * 2 / 1e9:.1f} GB as float16, "
        f"more than half of the {free_bytes / 1e9:.1f} GB that are free; give fewer --layers or --features"
    )


def cached_features(
    encoder: FrozenEncoder,
    labelled: Labelled,
    wanted: Sequence[Wanted],
    width: int,
    dtype: np.dtype,
    path: Path,
    what: str,
    where: str,
    stop: StopRequest,
) -> Cached:
    """The features of central crops, from a file or made and written to it, complete or not at all.

    Args:
        encoder: makes them.
        labelled: the images.
        wanted: what to read; all of it stands in one row.
        width: numbers of a row.
        dtype: float32 or float16.
        path: the file (.npy). Images that cannot be used have rows of NaN.
        what: the images are, for messages.
        where: the option they came from, for messages.
        stop: whether to end.

    Raises:
        StoppedError: it was asked for.
        UserError: no image can be used, or the file cannot be written.
    """
    shape = (len(labelled), width)

    def make(file: Path) -> None:
        memory = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        place = 0
        batches = encoder.features(labelled.source, wanted, IMAGES_AT_ONCE)
        with encoder.autocast(), closing(watched(batches, f"{what} images", len(labelled))) as seen:
            for found, good in seen:
                rows = torch.cat(found, dim=1).numpy().astype(dtype)
                usable = good.numpy() & np.isfinite(rows).all(axis=1)  # float16 ends at 65504
                memory[place : place + len(rows)] = np.where(usable[:, None], rows, np.nan)
                place += len(rows)
                if stop.signal_number:
                    raise StoppedError
        memory.flush()

    if not path.exists():
        try:
            write_atomically(path, make)
        except OSError as error:
            raise UserError(f"--out: {path} cannot be written: {error.strerror or error}") from error
    rows = torch.from_numpy(np.load(path))
    if tuple(rows.shape) != shape:
        raise UserError(f"{path} has the shape {tuple(rows.shape)}, not {shape}; remove it, and it is made anew")
    good = ~rows[:, 0].isnan()
    require_some(good, labelled.source, where, f"of {what}")
    usable = good.nonzero().flatten()
    return Cached(rows, usable, torch.from_numpy(labelled.labels)[usable], unusable(labelled.source, good))
