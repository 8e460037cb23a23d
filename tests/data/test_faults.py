"""Claims about images that cannot be read, folders that change under a run, and workers that end."""

import errno
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import Dataset

from lomar.data import workers
from lomar.data.decode import PixelFormat
from lomar.data.loader import Batching, CropPlan, MicroBatch, SampleKey, pretraining_batches
from lomar.data.opening import open_source
from lomar.data.sources import ImageSource
from lomar.data.survey import channel_statistics, survey
from lomar.data.workers import loaded
from lomar.errors import TrainingError, UserError

RGB8 = PixelFormat(3, "uint8")
linux = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked there")


class OneWindow:
    """The same window for every sample."""

    def __call__(self, key: SampleKey) -> dict[str, torch.Tensor]:
        return {"corners": torch.tensor([[0, 1]])}


def batches(source: ImageSource, workers: int, first_batch: int = 0) -> Iterator[MicroBatch]:
    """Four batches of 8 samples, in micro-batches of 2."""
    return pretraining_batches(
        source,
        RGB8,
        OneWindow(),
        plan=CropPlan(16, (0.2, 1.0)),
        patch_size_px=4,
        view_size=(2, 3),
        batching=Batching(
            seed=3, batch_size=8, micro_batch=2, total_batches=4, first_batch=first_batch, workers=workers
        ),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images in two folders."""
    rng = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (23, 29, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def parts_of(found: list[MicroBatch]) -> list[tuple[list[str], bytes]]:
    return [(part.names, part.inputs["pixels"].numpy().tobytes()) for part in found]


def bad_of(found: list[MicroBatch]) -> dict[str, str]:
    return {Path(name).name: reason for part in found for name, reason in part.bad}


# Files


def damaged(kind: str, whole: bytes) -> bytes:
    huge = whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:]
    return {
        "corrupt": whole[:40] + bytes(99) + whole[139:],
        "truncated": whole[: len(whole) // 2],
        "zero-byte": b"",
        "huge": huge,
        "other": b"%PDF-1.7 no image",
    }[kind]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_of_every_kind_are_replaced_alike_and_told_once_each_time(folder: Path, workers: int) -> None:
    files = sorted(folder.rglob("*.png"))
    kinds = ("corrupt", "truncated", "zero-byte", "huge", "other")
    for path, kind in zip(files, kinds, strict=False):
        path.write_bytes(damaged(kind, path.read_bytes()))
    found = list(batches(open_source(str(folder)), workers))
    assert set(bad_of(found)) == {path.name for path in files[: len(kinds)]}
    assert all("\n" not in reason and reason for reason in bad_of(found).values())
    assert all(len(part.names) == 2 for part in found) and len(found) == 16
    assert parts_of(found) == parts_of(list(batches(open_source(str(folder)), 0)))


def test_an_image_under_a_wrong_name_is_read_by_its_content(folder: Path) -> None:
    for path in sorted(folder.rglob("*.png")):
        path.rename(path.with_suffix(".jpg"))
    found = list(batches(open_source(str(folder)), 0))
    assert bad_of(found) == {} and all(part.inputs["pixels"].any() for part in found)


class Faulty(ImageSource):
    """A source whose disk fails for some files and is slow for others."""

    failing: tuple[int, ...] = ()
    slow_s = 0.0

    def read(self, index: int) -> bytes | memoryview:
        if index in self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        time.sleep(self.slow_s * (index % 3))
        return super().read(index)


def faulty(folder: Path, failing: tuple[int, ...] = (), slow_s: float = 0.0) -> Faulty:
    source = open_source(str(folder))
    made = Faulty(source.root, (source.relative_path(index) for index in range(len(source))))
    made.failing, made.slow_s = failing, slow_s
    return made


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_fails_for_a_file_costs_that_file(folder: Path, workers: int) -> None:
    source = faulty(folder, failing=(3, 7))
    found = list(batches(source, workers))
    names = {Path(source.name(index)).name for index in (3, 7)}
    assert bad_of(found) == dict.fromkeys(names, "Input/output error")
    assert not names & {Path(name).name for part in found for name in part.names}


@pytest.mark.parametrize("workers", [1, 2])
def test_slow_files_neither_lose_nor_reorder_samples(folder: Path, workers: int) -> None:
    """A file that takes long falls to one worker while the other has faster ones."""
    quick = list(batches(open_source(str(folder)), 0))
    assert parts_of(list(batches(faulty(folder, slow_s=0.03), workers))) == parts_of(quick)


# Folders that change


def test_a_file_that_is_replaced_grown_or_removed_in_mid_run(folder: Path) -> None:
    source = open_source(str(folder))
    replaced, grown, removed = sorted(folder.rglob("*.png"))[:3]
    with closing(batches(source, 0)) as stream:
        next(stream)
        replaced.write_bytes(b"other content")
        with grown.open("ab") as file:
            file.write(bytes(999))
        removed.unlink()
        rest = list(stream) + list(batches(source, 0))
    assert set(bad_of(rest)) == {replaced.name, removed.name}
    assert bad_of(rest)[removed.name] == "No such file or directory"
    assert grown.name in {Path(name).name for part in rest for name in part.names}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", ["gone", "below", "empty"])
def test_of_a_folder_that_vanishes_one_line_says_so(folder: Path, workers: int, what: str) -> None:
    source = open_source(str(folder))
    with closing(batches(source, workers)) as stream:
        next(stream)
        if what == "gone":
            folder.rename(folder.with_name("elsewhere"))
            expected = f"the folder {folder} is gone: 21 files in a row cannot be read, the last {folder}/"
        elif what == "below":
            shutil.rmtree(folder / "a")
            shutil.rmtree(folder / "b")
            expected = f"the folder {folder}/"
        else:
            for path in folder.rglob("*.png"):
                path.unlink()
            expected = f"the folder {folder}/"
        with pytest.raises(UserError) as caught:
            list(stream)
    message = str(caught.value)
    assert message.startswith(expected) and "\n" not in message
    assert {"gone": "is gone", "below": "is gone", "empty": "is empty, as one that is no longer mounted"}[
        what
    ] in message
    assert not multiprocessing.active_children()


def test_of_a_prepared_folder_that_vanishes_too(folder: Path, tmp_path: Path, lomar: Callable[..., Any]) -> None:
    assert lomar("prepare --workers 0 --data", folder, "--out", tmp_path / "prepared").status == 0
    source = open_source(str(tmp_path / "prepared"))
    (tmp_path / "prepared").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"^the folder {tmp_path / 'prepared'} is gone: "):
        list(batches(source, 0))


# Surveys


class Counting(ImageSource):
    """A source that counts what is read of it."""

    def read(self, index: int) -> bytes | memoryview:
        self.read_indices.append(index)
        return super().read(index)


def test_a_survey_reads_its_probe_and_no_more(folder: Path) -> None:
    source = open_source(str(folder))
    paths = [source.relative_path(number % len(source)) for number in range(5_000)]
    counting = Counting(source.root, paths)
    counting.read_indices = []
    assert survey(counting, limit=50).count == 5_000
    assert len(counting.read_indices) == len(set(counting.read_indices)) == 50
    counting.read_indices = []
    channel_statistics(counting, RGB8, size_px=8, limit=40)
    assert len(counting.read_indices) == 40


# Workers


class Failing(Dataset[int]):
    """Hands on numbers, until `fails` is called at the fifth in a worker."""

    def __init__(self, fails: Callable[[], Any]) -> None:
        self.fails = fails

    def __getitems__(self, numbers: list[int]) -> Any:
        return self.fails() if numbers == [5] and multiprocessing.parent_process() is not None else numbers[0]


class Heavy:
    """A batch that cannot be handed over."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


def ends_itself(number: int) -> Callable[[], None]:
    def end() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        time.sleep(60)

    return end


def killed_with_the_lock() -> None:
    """While it asks whether it is to end, which torch's loop does between batches."""
    frame = sys._getframe()
    while "done_event" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    frame.f_locals["done_event"]._cond.acquire()
    ends_itself(signal.SIGKILL)()


def out_of_memory() -> None:
    raise MemoryError


def out_of_memory_in_torch() -> None:
    torch.empty(2**60, dtype=torch.uint8)


LESS = "give fewer --workers, or a smaller --batch-size"
FAILURES = {
    "killed": (ends_itself(signal.SIGKILL), f"was killed, most likely because the system's memory ran out; {LESS}"),
    "killed with a lock": (killed_with_the_lock, "was killed, most likely because the system's memory ran out"),
    "crashed": (ends_itself(signal.SIGSEGV), "was ended by SIGSEGV; if it comes again, a decoder fails on one"),
    "no shared memory": (ends_itself(signal.SIGBUS), "has no shared memory (/dev/shm) left to hand over a batch"),
    "ended": (lambda: os._exit(3), "has ended with status 3; if it comes again, --workers 0 shows why"),
    "ended well": (lambda: os._exit(0), "has ended with status 0"),
    "memory": (out_of_memory, f"no memory is left to read images; {LESS}"),
    "memory of torch": (out_of_memory_in_torch, f"no memory is left to read images; {LESS}"),
    "full /dev/shm": (
        lambda: Heavy(RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left (28)")),
        "has no shared memory (/dev/shm) left",
    ),
    "too many files": (lambda: Heavy(OSError(errno.EMFILE, "Too many open files")), "may not open more files"),
    "no memory to hand over": (lambda: Heavy(OSError(errno.ENOMEM, "no memory")), "has no memory left"),
}


@linux
@pytest.mark.parametrize("what", FAILURES)
def test_a_worker_that_fails_ends_the_run_with_one_line_and_the_others_end_too(
    what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fails, message = FAILURES[what]
    numbers = loaded(Failing(fails), ([number] for number in range(1000)), workers=2, pin_memory=False)
    began = time.monotonic()
    seen = []
    with pytest.raises(TrainingError) as caught:
        for number in numbers:
            seen.append(number)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert seen == list(range(len(seen))) and len(seen) <= 5  # in order, and none of those after it
    assert time.monotonic() - began < 12
    assert not multiprocessing.active_children()
    assert capfd.readouterr().err == ""


@linux
def test_a_worker_that_ends_is_noticed_where_a_batch_is_waited_for_and_nowhere_else() -> None:
    """Not in the middle of a checkpoint: torch would raise wherever the main thread is."""
    numbers = loaded(Failing(int), ([number] for number in range(1000)), workers=2, pin_memory=False)
    assert next(numbers) == 0
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    time.sleep(0.3)  # the signal has come
    with pytest.raises(TrainingError, match="was killed"):
        next(numbers)
    assert not multiprocessing.active_children()


@linux
def test_a_handler_of_ended_children_that_was_there_is_kept() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: calls.append(number))
    try:
        assert len(list(loaded(Failing(int), ([0], [1]), workers=1, pin_memory=False))) == 2
        assert calls
    finally:
        signal.signal(signal.SIGCHLD, before)


@linux
def test_a_worker_that_hangs_is_told_now_and_then_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "_LOOK_SECONDS", 1)
    monkeypatch.setattr(workers, "_PATIENCE_SECONDS", 1)
    numbers = loaded(Failing(lambda: time.sleep(3.5) or 5), ([n] for n in range(9)), workers=2, pin_memory=False)
    assert list(numbers) == list(range(9))
    told = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in told] == [f"lomar: waiting for images for {s} s" for s in (1, 2)]


@linux
@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_where_no_process_can_be_started_it_is_said_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork
    forks: list[int] = []

    def full() -> int:
        forks.append(1)
        if len(forks) == 2:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", full)
    with pytest.raises(UserError, match=r"^--workers is 3, but the system starts no more processes \(Resource temp"):
        next(loaded(Failing(int), ([n] for n in range(9)), workers=3, pin_memory=False))
    assert not multiprocessing.active_children()


def test_without_workers_memory_that_runs_out_is_one_line_too() -> None:
    class Greedy(Dataset[int]):
        def __getitems__(self, numbers: list[int]) -> int:
            raise MemoryError

    with pytest.raises(TrainingError, match="no memory is left to read images"):
        list(loaded(Greedy(), ([0],), workers=0, pin_memory=False))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_program_keeps_its_traceback(workers: int) -> None:
    class Wrong(Dataset[int]):
        def __getitems__(self, numbers: list[int]) -> int:
            raise KeyError("nothing known")

    with pytest.raises(KeyError, match="nothing known"):
        list(loaded(Wrong(), ([0],), workers=workers, pin_memory=False))


# Whole runs


def workers_of(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def lines_of_failure(text: str) -> list[str]:
    assert "Traceback" not in text and "Exception" not in text, text
    return [line for line in text.splitlines() if line.startswith("lomar: ")]


@linux
def test_a_run_whose_worker_is_killed_ends_with_status_1_and_goes_on_equal(
    spawn: Callable[..., Any],
    pretrain: Callable[..., Any],
    lomar: Callable[..., Any],
    course: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    run, length = tmp_path / "run", "--max-steps 30 --checkpoint-steps 5"
    started = spawn(run, *f"--workers 2 {length}".split())
    started.wait_for_rows(12)
    pids = workers_of(started.pid)
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    assert started.end() == 1
    assert lines_of_failure(started.err) == [
        "lomar: failed: a process that reads images was killed, most likely because the system's memory ran out; "
        + LESS
    ]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, 0)
            pytest.fail("a worker outlives the run")
    assert lomar("pretrain --resume --workers 0 --out", run).status == 0
    assert pretrain(tmp_path / "whole", length).status == 0
    assert course(run) == course(tmp_path / "whole")


@linux
def test_a_run_whose_folder_vanishes_says_so_and_goes_on_equal_when_it_is_back(
    spawn: Callable[..., Any],
    pretrain: Callable[..., Any],
    lomar: Callable[..., Any],
    course: Callable[[Path], Any],
    photos: Path,
    tmp_path: Path,
) -> None:
    run, images, length = tmp_path / "run", tmp_path / "photos", "--max-steps 30 --checkpoint-steps 5"
    shutil.copytree(photos, images)
    started = spawn(run, "--data", str(images), *f"--workers 1 {length}".split())
    started.wait_for_rows(8)
    images.rename(tmp_path / "elsewhere")
    assert started.end() == 2
    (line,) = lines_of_failure(started.err)
    assert line.startswith(f"lomar: error: the folder {images} is gone: 21 files in a row cannot be read, the last ")
    (tmp_path / "elsewhere").rename(images)
    assert lomar("pretrain --resume --workers 0 --out", run).status == 0
    assert pretrain(tmp_path / "whole", length).status == 0
    assert course(run) == course(tmp_path / "whole")
