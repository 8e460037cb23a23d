"""What several tests share: a few small images, a small encoder, and the command line in this process."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

Row = dict[str, Any]
Command = Callable[..., "Outcome"]

# A 4 x 4 grid, windows of 3 x 3 patches of which 7 are hidden; 8 images, so that an epoch is 2 steps.
SETTINGS = (
    "--model 16x3x2 --image-size 32 --patch-size 8 --window-size 3 --views 2 --batch-size 4 --micro-batch 4 "
    "--workers 0 --precision fp32 --device cpu --base-lr 0.05 --warmup-epochs 1 --eval-every 1000"
)


@dataclass(frozen=True)
class Outcome:
    """What a command line left behind."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders, red/ and blue/, of four small images each."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, channel in (("red", 0), ("blue", 2)):
        (root / label).mkdir()
        for number in range(4):
            pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
            pixels[:, :, channel] += 120
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


@pytest.fixture
def miniature() -> Iterator[None]:
    """One thread, as suits a small encoder: more would only wait."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations draw nothing: most of the time of a small run."""
    from lomar.commands import course, evaluation

    monkeypatch.setattr(evaluation.Evaluation, "_pictures", lambda self, step: None)
    monkeypatch.setattr(evaluation, "learning_curves", lambda rows, path: None)
    monkeypatch.setattr(course, "learning_curves", lambda rows, path: None)


@pytest.fixture
def lomar(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line, given as strings to be split or paths, in this process."""

    def run(*words: str | Path) -> Outcome:
        from lomar.cli import main

        arguments = [part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])]
        capsys.readouterr()
        try:
            status = main(arguments)
        except SystemExit as done:
            status = int(done.code or 0)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
def pretrain(lomar: Command, photos: Path, miniature: None, no_pictures: None) -> Command:
    """Pretrain a small encoder in a folder, without pictures; the words given win over `SETTINGS`."""

    def run(out: Path, *words: str | Path) -> Outcome:
        return lomar("pretrain", "--data", photos, SETTINGS, "--out", out, *words)

    return run


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the next run in this process end abruptly, with status 130, after a step."""
    from lomar.training.loop import Trainer

    step = Trainer._step

    def interrupt(last: int) -> None:
        def once(self: Trainer, batches: Any) -> Any:
            if self.progress.step == last:
                monkeypatch.setattr(Trainer, "_step", step)
                raise KeyboardInterrupt
            return step(self, batches)

        monkeypatch.setattr(Trainer, "_step", once)

    return interrupt


@pytest.fixture(scope="session")
def finished_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with pictures and k-NN, as a user gets it; not to be changed."""
    from lomar.cli import main

    run = tmp_path_factory.mktemp("finished") / "run"
    words = ["pretrain", "--data", str(photos), "--out", str(run), *SETTINGS.split()]
    assert main([*words, "--eval-data", str(photos), "--max-steps", "4"]) == 0
    return run


def read_rows(run: Path) -> list[Row]:
    """All rows of a run's metrics; each line must be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[Row]]:
    """`read_rows`."""
    return read_rows


@pytest.fixture(scope="session")
def course() -> Callable[[Path], list[tuple[int, float, float, float]]]:
    """(step, loss, lr, gradient norm) of each training row: what a resumed run must repeat."""
    return lambda run: [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in read_rows(run) if "loss" in r]


class Spawned:
    """A command line in a process of its own, whose steps take a while. Its standard error is kept in a file."""

    def __init__(self, process: BaseProcess, errors: Path, run: Path) -> None:
        self.process = process
        self._errors = errors
        self._run = run

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def err(self) -> str:
        return self._errors.read_text()

    def wait_for_rows(self, count: int) -> None:
        """Until the run's metrics hold this many lines."""
        self.wait_until(lambda: self._metrics().count(b"\n") >= count)

    def wait_until(self, come: Callable[[], bool]) -> None:
        """Until something has come about; fails if the process ends before or nothing comes in a minute."""
        deadline = time.monotonic() + 60
        while not come():
            assert self.process.is_alive(), f"ended with {self.process.exitcode}: {self.err}"
            assert time.monotonic() < deadline, self.err
            time.sleep(0.01)

    def end(self) -> int:
        """The exit status; minus the signal's number where one ended it."""
        self.process.join(60)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode

    def _metrics(self) -> bytes:
        path = self._run / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""


@pytest.fixture
def spawn(photos: Path, tmp_path: Path) -> Iterator[Callable[..., Spawned]]:
    """Start `pretrain` as in the fixture of that name, in a process of its own.

    Forked from a server that has imported torch, since that takes seconds; the process is killed at the end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lomar.commands.pretrain"])
    started: list[Spawned] = []

    def start(out: Path, *words: str, pictures: bool = False) -> Spawned:
        errors = tmp_path / f"errors-{len(started)}.txt"
        arguments = ["pretrain", "--data", str(photos), "--out", str(out), *SETTINGS.split(), *words]
        code = f"""
import multiprocessing, os, sys, time
multiprocessing.set_start_method("fork", force=True)  # for its workers: as in a process started by hand
target = os.open({str(errors)!r}, os.O_CREAT | os.O_WRONLY)
os.dup2(target, 1), os.dup2(os.dup(target), 2)
import torch
import lomar.commands.course as course, lomar.commands.evaluation as evaluation
from lomar.cli import main
from lomar.training.loop import Trainer
torch.set_num_threads(1)
if not {pictures}:
    evaluation.Evaluation._pictures = lambda self, step: None
    evaluation.learning_curves = course.learning_curves = lambda rows, path: None
step = Trainer._step
def slow_step(self, batches):
    time.sleep(0.05)
    return step(self, batches)
Trainer._step = slow_step
sys.exit(main({arguments!r}))
"""
        process = context.Process(target=exec, args=(code, {}))
        process.start()
        started.append(Spawned(process, errors, out))
        return started[-1]

    yield start
    for spawned in started:
        if spawned.process.is_alive():
            os.kill(spawned.pid, 9)
            spawned.process.join(10)
