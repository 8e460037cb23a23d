"""Batches that processes of their own read: started, waited for, ended with the run, and the run with them."""

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
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lomar.data.decode import quietly
from lomar.errors import TrainingError, UserError, is_out_of_memory

_PREFETCHED = 3  # batches each worker holds ready
_LOOK_SECONDS = 5  # between two looks at workers from whom nothing comes
_PATIENCE_SECONDS = 60  # until that is told, then after twice as long each time
_LESS = "give fewer --workers, or a smaller --batch-size"


def loaded(dataset: Dataset, batches: Iterable[list], workers: int, pin_memory: bool) -> Generator[Any, None, None]:
    """What a data set makes of each list of samples, in order, in this process or in workers.

    A worker that says nothing, such as one that reads from a network that is gone, is waited for, with a line on
    standard error now and then; one that has ended ends the run.

    Raises:
        UserError: the data set raised it, or a worker cannot be started.
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
        if (event := getattr(made, "_workers_done_event", None)) is not None:
            made._workers_done_event = _Ending(event)  # type: ignore[attr-defined]
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


class _Ending:
    """The event by which torch asks workers to end, in the place of its own.

    That one is guarded by a lock, and so waits without end if a worker was killed that held it.

    Args:
        event: torch's, which the workers look at and this process alone sets.
    """

    def __init__(self, event: Any) -> None:
        self._event = event
        self._is_set = False

    def is_set(self) -> bool:
        """Whether workers were asked to end."""
        return self._is_set

    def set(self) -> None:
        """Ask them to."""
        self._is_set = True
        asking = threading.Thread(target=self._event.set, daemon=True)
        asking.start()
        asking.join(_LOOK_SECONDS)


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
            if not is_out_of_memory(error):
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
