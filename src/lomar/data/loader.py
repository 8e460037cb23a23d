"""Deterministic, resumable, sharded batches of windows.

The stream of a run has no end: an epoch follows the other, each in an order of its own (`lomar.data.order`). So a batch
is always full, small data recurs with new crops, and a run can begin at any batch. Each sample is a function of (seed,
epoch, index) alone: neither the worker, the micro-batch nor the process it falls to changes it.
"""

import atexit
import contextlib
import errno
import io
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lomar.data.ahead import fetched_ahead
from lomar.data.augment import CENTRE_SHARE, ColorJitter, centre_crop, random_resized_crop
from lomar.data.decode import Image, PixelFormat, quietly, read_image
from lomar.data.order import Order, order_of
from lomar.data.sources import ImageSource
from lomar.data.survey import reason_for
from lomar.errors import BadImageError, TrainingError, UserError
from lomar.seeding import seeded

REPLACEMENTS = 20  # files tried in the place of a bad one: with a quarter bad, all fail once in 10^12
_PREFETCHED = 3  # micro-batches each worker holds ready
_LOOK_SECONDS = 5  # between two looks at workers from whom nothing comes
_PATIENCE_SECONDS = 60  # until that is told, then after twice as long each time
_LESS = "give fewer --workers, or a smaller --batch-size"

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


def share_of_batch(batch_size: int, rank: int, world_size: int) -> range:
    """The slots of every global batch that one process handles; shares differ by at most one.

    Raises:
        ValueError: fewer samples than processes.
    """
    if batch_size < world_size:
        raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} processes")
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


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
    index = key.index
    for attempt in range(REPLACEMENTS + 1):
        name = source.name(index)
        try:
            # Seeded anew for each attempt: what a bad file drew before it failed must not matter.
            return made(read_image(source.read(index), name), seeded(seed, key.epoch, key.index, "crop")), index
        except (BadImageError, OSError) as error:
            bad.append((name, reason_for(error)))
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


def pretraining_batches(
    source: ImageSource,
    fmt: PixelFormat,
    draw: Draw,
    *,
    plan: CropPlan,
    patch_size_px: int,
    view_size: tuple[int, int],
    seed: int,
    batch_size: int,
    micro_batch: int,
    first_batch: int,
    total_batches: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Generator[MicroBatch, None, None]:
    """One process's micro-batches of global batches first_batch up to total_batches, in order.

    Args:
        source: the images.
        fmt: what their pixels become.
        draw: gives the windows and masks of a sample; must be picklable.
        plan: how images are cropped.
        patch_size_px: side of a patch.
        view_size: (rows, columns) of a window in patches.
        seed: of the run.
        batch_size: samples of a global batch, over all processes.
        micro_batch: most samples of a micro-batch.
        first_batch: the global batch to begin with, from 0.
        total_batches: global batches of the whole run.
        workers: loading processes; 0 loads in this one.
        rank: number of this process.
        world_size: count of processes.
        pin_memory: whether to hand out page-locked memory, for copies to a GPU.

    Raises:
        UserError: one bad file after another.
        ValueError: fewer samples in a batch than processes.
    """
    share = share_of_batch(batch_size, rank, world_size)
    order = order_of(source, seed, batch_size)
    windows = _CropWindows(source, order, fmt, draw, plan, patch_size_px, view_size, seed, last_slot=share.stop - 1)
    batches = islice(stream(order, batch_size, first_batch), total_batches - first_batch)
    keys = micro_batch_keys(batches, share, micro_batch)
    return loaded(fetched_ahead(windows, order, share), keys, workers, pin_memory)


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


def loaded(dataset: Dataset, batches: Iterable[list], workers: int, pin_memory: bool) -> Generator[Any, None, None]:
    """What a data set makes of each list of samples, in order, in this process or in workers.

    A worker that says nothing, such as one that reads from a network that is gone, is waited for, with a line on
    standard error now and then; one that has ended ends the run.

    Raises:
        UserError: the data set raised it, or returned it in the place of a batch; or a worker cannot be started.
        TrainingError: a worker has ended, or memory ran out.
    """
    drawn, ended = 0, False

    def counted() -> Iterator[list[Any]]:
        nonlocal drawn, ended
        for samples in batches:
            drawn += 1
            yield samples
        ended = True

    loader: DataLoader = DataLoader(
        _Told(dataset),
        batch_sampler=counted(),
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_prepare_worker,
        prefetch_factor=_PREFETCHED if workers else None,
        pin_memory=pin_memory,
        timeout=_LOOK_SECONDS if workers else 0,
        # Forked workers know their parent, to end with it; those of Python 3.14's forkserver do not.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # The DataLoader draws a seed for its workers, which use none; keep that off the run's own random state.
        generator=torch.Generator(),
    )
    team = _Team()
    made = team.begun(loader)
    handed = 0
    try:
        while not (ended and handed == drawn):
            batch = team.next_of(made)
            if batch is _END:
                break
            if isinstance(batch, UserError | TrainingError):
                raise batch
            handed += 1
            yield batch
    except (UserError, TrainingError) as error:
        team.kill()
        raise error.with_traceback(None) from None  # the traceback holds the loader
    except Exception:
        team.kill()
        raise


_END = object()  # in the place of a batch


class _Team:
    """The workers of one loader."""

    waiting: "_Team | None" = None  # the one from which the main thread now waits for a batch

    def __init__(self) -> None:
        self.workers: list[BaseProcess] = []

    def begun(self, loader: DataLoader) -> Iterator[Any]:
        """Start them.

        Raises:
            UserError: the system has no room for them.
        """
        others = multiprocessing.active_children()

        def new() -> list[BaseProcess]:
            return [child for child in multiprocessing.active_children() if child not in others]

        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        reason = ""
        with contextlib.redirect_stderr(io.StringIO()):  # where a half-made loader complains of itself
            try:
                made = iter(loader)
            except OSError as error:
                reason = error.strerror or str(error)
        if reason:
            self.workers = new()
            self.kill()
            raise UserError(
                f"--workers is {loader.num_workers}, but the system starts no more processes ({reason}); give fewer"
            )
        self.workers = new()
        if handler is not None and self.workers and threading.current_thread() is threading.main_thread():
            _ChildEnded.put_in_the_place_of(handler)
        return made

    def next_of(self, made: Iterator[Any]) -> Any:
        """The next batch, or `_END`.

        Raises:
            TrainingError: a worker has ended.
        """
        waited_s, told_s = 0, _PATIENCE_SECONDS
        _Team.waiting = self  # from here on a worker's end is noticed when it comes, and before
        try:
            self.check()
            while True:
                try:
                    return next(made, _END)
                except Exception as error:
                    self.check()
                    if isinstance(error, OSError | RuntimeError) and "open files" in str(error):
                        raise TrainingError(
                            f"this process may not open more files ({error}); {_LESS}, or raise `ulimit -n`"
                        ) from error
                    if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader timed out")):
                        raise
                    waited_s += _LOOK_SECONDS
                    if waited_s >= told_s:
                        told_s *= 2
                        sys.stderr.write(
                            f"lomar: waiting for images for {waited_s} s; is the disk or network they are on slow, "
                            "or gone?\n"
                        )
        finally:
            _Team.waiting = None

    def check(self) -> None:
        """Raises TrainingError: one has ended, and why that may be."""
        for worker in self.workers:
            if worker.exitcode is not None:
                raise TrainingError(f"a process that reads images {_why_it_ended(worker.exitcode)}")

    def kill(self) -> None:
        """End them now."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join(_LOOK_SECONDS)  # no longer: one that waits for a dead network drive does not end


@dataclass(frozen=True)
class _ChildEnded:
    """A handler of SIGCHLD in the place of torch's.

    That one raises wherever the main thread happens to be, such as in the middle of a checkpoint; this one only where
    a batch is waited for, so that a loader's error comes out of the loader.

    Args:
        before: the handler before torch's.
    """

    before: Any

    @staticmethod
    def put_in_the_place_of(before: Any) -> None:
        """Handle the signal; what was done about it before torch set a handler is done as well."""
        if not isinstance(signal.getsignal(signal.SIGCHLD), _ChildEnded):
            signal.signal(signal.SIGCHLD, _ChildEnded(before))

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _Team.waiting:
            _Team.waiting.check()
        if callable(self.before):
            self.before(number, frame)


def _why_it_ended(status: int) -> str:
    """Of a worker, as the end of a sentence.

    Args:
        status: its exit status, an errno where `_end_for` ended it; minus the number of the signal that did.
    """
    name = next((each.name for each in signal.Signals if each == -status), f"signal {-status}") if status < 0 else ""
    if name == "SIGBUS" or status == errno.ENOSPC:
        return (
            "has no shared memory (/dev/shm) left to hand over a batch; "
            f"{_LESS}, or the container more of it (docker run --shm-size)"
        )
    if status == errno.ENOMEM:
        return f"has no memory left; {_LESS}"
    if status == errno.EMFILE:
        return f"may not open more files; {_LESS}, or raise `ulimit -n`"
    if name == "SIGKILL":
        return f"was killed, most likely because the system's memory ran out; {_LESS}"
    if name:
        return (
            f"was ended by {name}; if it comes again, a decoder fails on one of the files: "
            "PYTHONFAULTHANDLER=1 with --workers 0 shows where"
        )
    return f"has ended with status {status}; if it comes again, --workers 0 shows why"


@dataclass(frozen=True)
class _Told(Dataset[Any]):
    """What a data set makes of samples, or the error that ends the run.

    That is returned and not raised: the DataLoader would wrap it in a worker's traceback.
    """

    dataset: Dataset[Any]

    def __getitems__(self, samples: list[Any]) -> Any:
        try:
            with quietly():
                return self.dataset.__getitems__(samples)  # type: ignore[attr-defined]
        except (UserError, TrainingError) as error:
            return error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch's words
                raise
            return TrainingError(f"no memory is left to read images; {_LESS}")


def _end_workers() -> None:
    """At exit, after an error: multiprocessing would wait forever for workers that pass over its one SIGTERM."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


atexit.register(_end_workers)


def _end_with_parent() -> None:
    """In a worker: torch looks for the parent between batches, and never gets there while it writes one to nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _as_it_is(batch: object) -> object:
    return batch


def _prepare_worker(worker: int) -> None:
    """Leaves signals and words to the main process; torch itself keeps a worker to one thread.

    Ctrl-C, `timeout` and batch systems signal the whole process group, but only the main process may answer: it saves
    and then ends its workers, with a SIGTERM of its own where a worker does not listen. So the first SIGTERM is passed
    over, and a second one ends the worker.
    """

    def pass_over_once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, pass_over_once)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What Python has to say goes with the batches; libtiff writes of its own about files that are reported as bad.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    os.close(silence)
    # A batch that cannot be handed over would be dropped, and waited for without end.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_for)  # type: ignore[attr-defined]


def _end_for(error: Exception, batch: object) -> None:
    """In a worker: end with a status that says why a batch cannot be handed over."""
    if isinstance(error, OSError) and error.errno:
        os._exit(error.errno)
    os._exit(errno.ENOSPC if "shared memory" in str(error) or "(28)" in str(error) else 1)
