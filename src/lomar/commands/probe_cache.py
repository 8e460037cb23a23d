"""Features of images, made once and kept in the probe's folder until it is done."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lomar.commands.frozen import FrozenEncoder, Part, left_out
from lomar.commands.progress import watched
from lomar.downstream.embedding import begun, read_embedding
from lomar.downstream.embedding_writer import EmbeddingWriter, Plan, check_finished
from lomar.downstream.features import Wanted
from lomar.errors import UserError
from lomar.training.signals import StopRequest

IMAGES_AT_ONCE = 64


class StoppedError(Exception):
    """SIGINT or SIGTERM came while features were made."""


@dataclass(frozen=True)
class Cached:
    """Features of the images that can be used.

    Args:
        rows: (N, all numbers), float32 or float16; zeros of images that cannot be used.
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
    part: Part,
    wanted: Sequence[Wanted],
    plan: Plan,
    path: Path,
    say: Callable[[str], object],
    stop: StopRequest,
) -> Cached:
    """The features of central crops, from a file, or made and written to it row by row: what was begun goes on.

    Args:
        encoder: makes them.
        part: the images.
        wanted: what to read; all of it stands in one row.
        plan: the file, see `cache_plan`.
        path: where it is to be.
        say: tells what is left out.
        stop: whether to end.

    Raises:
        StoppedError: it was asked for.
        UserError: no image can be used, or the file is another probe's.
        OSError: the file cannot be written.
    """
    if not path.exists():
        _make(encoder, part, wanted, plan, path, stop)
    check_finished(path, plan)
    found = read_embedding(path)
    good = torch.from_numpy(np.array(found.good))
    names = left_out(part, good, encoder, say)
    usable = good.nonzero().flatten()
    rows = torch.from_numpy(np.array(found.features))
    return Cached(rows, usable, torch.from_numpy(part.labelled.labels)[usable], names)


def cache_plan(part: Part, wanted: Sequence[Wanted], width: int, dtype: np.dtype, encoder: str) -> Plan:
    """What the file of a part's features is to hold.

    Args:
        part: the images.
        wanted: what of them.
        width: numbers of a row.
        dtype: float32 or float16.
        encoder: a digest of its weights.
    """
    source = part.labelled.source
    kinds = [[each.features, each.layer] for each in wanted]
    about = {"root": source.root, "weights": encoder, "images": source.fingerprint(), "features": kinds}
    return Plan(about, len(part), (width,), dtype.name, source.relative_path)


def _make(
    encoder: FrozenEncoder, part: Part, wanted: Sequence[Wanted], plan: Plan, path: Path, stop: StopRequest
) -> None:
    with closing((EmbeddingWriter.begin if begun(path) is None else EmbeddingWriter.resume)(path, plan)) as writer:
        batches = encoder.features(part.labelled.source, wanted, IMAGES_AT_ONCE, writer.rows)
        with encoder.autocast(), closing(watched(batches, part.name, len(part), writer.rows)) as seen:
            for found, good in seen:
                writer.write(torch.cat(found, dim=1).numpy(), good.numpy())
                if stop.signal_number and writer.rows < len(part):
                    writer.keep()
                    raise StoppedError
        writer.finish()
