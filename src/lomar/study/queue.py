"""Cells one after another, or several at once: by this process, and by any other that works in the same folder.

Each cell is claimed by a lock on its folder, so that an array of SLURM jobs with one shared folder is a queue.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lomar.errors import UserError
from lomar.files import LOCK_FILE, only_writer, write_atomically
from lomar.study.cells import (
    CELLS,
    RESULT,
    Found,
    Setup,
    Step,
    needs_tokenizer,
    result_of,
    steps,
)
from lomar.study.plan import Job, Plan

LOG_FILE = "cell.log"
ASK_AGAIN_S = 5.0  # what others have finished is looked for

# words of a command, its log, the environment -> exit status, and the most memory the process held, in bytes
Run = Callable[[Sequence[str], Path, Mapping[str, str]], tuple[int, int]]


class Children:
    """Commands of lomar as processes of their own, which a wish to stop reaches."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def run(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> tuple[int, int]:
        """Run `lomar` with the words; see `Run`. What it prints is added to the log.

        In a session of its own: Ctrl-C reaches this process alone, which then asks its children to save and end.
        """
        with log.open("ab") as out:
            out.write(f"$ lomar {shlex.join(words)}\n".encode(errors="surrogateescape"))
            out.flush()
            with self._lock:
                if self.stopping.is_set():
                    return -signal.SIGTERM, 0
                child = subprocess.Popen(
                    [sys.executable, "-m", "lomar", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=os.environ | environment,
                    start_new_session=True,
                )
                self._running.add(child)
            try:
                _, status, usage = os.wait4(child.pid, 0)
            finally:
                with self._lock:
                    self._running.discard(child)
            child.returncode = os.waitstatus_to_exitcode(status)  # so that nobody waits for it again
        scale = 1 if sys.platform == "darwin" else 1024
        return child.returncode, usage.ru_maxrss * scale

    def stop(self) -> None:
        """Ask all to save and end; no other begins."""
        with self._lock:
            self.stopping.set()
            for child in self._running:
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()


@dataclass
class Queue:
    """What there is to do, and who does it.

    Args:
        plan: the study.
        setup: common to its cells.
        tokenizer: the words that train one, run before a cell needs it; none where one was given.
        run: runs a command.
        stopping: set when no other command is to begin.
        say: tells how far it is.
        done: called after each command that went well.
    """

    plan: Plan
    setup: Setup
    tokenizer: Sequence[str]
    run: Run
    stopping: threading.Event
    say: Callable[[str], None]
    done: Callable[[], object]
    failed: dict[str, str] = field(default_factory=dict)
    _claimed: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def found(self) -> dict[str, Found]:
        """What is known of every cell that has begun, here or elsewhere."""
        folder = self.setup.out / CELLS
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return {name: result for name in names if (result := result_of(folder / name))}

    def remaining(self) -> list[Job]:
        """Jobs that could run and are not done; those that failed here are left out."""
        found = self.found()
        return [
            job
            for job in self.plan.jobs(found)
            if job.cell.name not in self.failed
            and any(step.name not in found.get(job.cell.name, {}) for step in steps(job, self.setup))
        ]

    def work(self, places: Sequence[Mapping[str, str]]) -> None:
        """Work until nothing can be done any more, as many cells at a time as there are places.

        Args:
            places: what the environment of each place's commands has beside this process's.
        """
        errors: list[BaseException] = []

        def worker(place: Mapping[str, str]) -> None:
            try:
                self._worker(place)
            except BaseException as error:  # told by the thread that waits
                errors.append(error)
                self.stopping.set()

        threads = [threading.Thread(target=worker, args=(place,), daemon=True) for place in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # so that signals are answered
        if errors:
            raise errors[0]

    def _worker(self, place: Mapping[str, str]) -> None:
        while not self.stopping.is_set():
            remaining = self.remaining()
            if not remaining:
                return
            if not any(self._taken(job, place) for job in remaining):
                self.stopping.wait(ASK_AGAIN_S)  # all that can run is being run

    def _taken(self, job: Job, place: Mapping[str, str]) -> bool:
        """Do what is next of a job, if nobody else is at it; whether something was done."""
        if self.stopping.is_set():
            return True
        if needs_tokenizer(job.cell) and not self._has_tokenizer():
            with self._claim(self.setup.out / "tokenizer", "tokenizer") as mine:
                return mine and self._made_tokenizer(job, place)
        folder = self.setup.folder(job.cell)
        with self._claim(folder, job.cell.name) as mine:
            return mine and self._advanced(job, folder, place)

    def _has_tokenizer(self) -> bool:
        return not self.tokenizer or self.setup.tokenizer.exists()

    def _made_tokenizer(self, job: Job, place: Mapping[str, str]) -> bool:
        if self._has_tokenizer():
            return False
        self.say("tokenizer: begins")
        status, _ = self.run(self.tokenizer, self.setup.out / "tokenizer" / LOG_FILE, place)
        if status and not self.stopping.is_set():
            for other in self.plan.jobs(self.found()):
                if needs_tokenizer(other.cell):
                    self._fails(other.cell.name, self.setup.out / "tokenizer" / LOG_FILE, status)
        return True

    def _advanced(self, job: Job, folder: Path, place: Mapping[str, str]) -> bool:
        """Do all that is left of a job."""
        result = result_of(folder)
        name = job.cell.name
        for number, step in enumerate(steps(job, self.setup)):
            if step.name in result:
                continue
            if self.stopping.is_set():
                return True
            step = steps(job, self.setup)[number]  # the words of later commands depend on what earlier ones found
            self.say(f"{name}: {step.name} begins")
            began = time.monotonic()
            found = self._step(step, folder, place)
            if found is None:
                return True
            result = {**result, step.name: found, "cell": _described(job)}
            _write(folder / RESULT, result)
            self.say(f"{name}: {step.name} done in {_clock(time.monotonic() - began)}{_shown(found)}")
            self.done()
        return True

    def _step(self, step: Step, folder: Path, place: Mapping[str, str]) -> Found | None:
        """What a command left; None where it failed or was stopped."""
        if step.written:
            step.written.unlink(missing_ok=True)
        status, peak_bytes = self.run(step.words, folder / LOG_FILE, place)
        if status:
            if not self.stopping.is_set():
                self._fails(folder.name, folder / LOG_FILE, status)
            return None
        return step.read() | {"command": shlex.join(["lomar", *step.words]), "peak_bytes": peak_bytes}

    def _fails(self, name: str, log: Path, status: int) -> None:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        reason = said[-1].strip() if said else f"ended with status {status}"
        if status < 0:
            reason = f"ended by signal {-status}" + ", perhaps for want of memory" * (status == -signal.SIGKILL)
        self.failed[name] = f"{reason} (see {log})"
        self.say(f"{name}: failed: {self.failed[name]}")

    @contextlib.contextmanager
    def _claim(self, folder: Path, name: str) -> Iterator[bool]:
        """Whether nobody else, in this process or another, is at a cell; it is this one's until the end."""
        with self._lock:
            taken = name in self._claimed
            self._claimed.add(name)
        if taken:
            yield False
            return
        try:
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(only_writer(folder / LOCK_FILE, name))
                    for lock in folder.glob(f"*/{LOCK_FILE}"):  # of a command that outlived a study that was killed
                        with only_writer(lock, name):
                            pass
                except UserError:  # another process has it
                    yield False
                    return
                yield True
        finally:
            with self._lock:
                self._claimed.discard(name)


@contextlib.contextmanager
def in_turn(lock: Path) -> Iterator[None]:
    """What one process does at a time: the others wait, for it is done soon."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(only_writer(lock, str(lock)))
            except UserError:
                time.sleep(0.05)
                continue
            yield
            return


def _described(job: Job) -> dict[str, Any]:
    cell = job.cell
    return {
        "method": cell.method,
        "changes": dict(cell.changes),
        "epochs": cell.epochs,
        "base_lr": cell.base_lr,
        "seed": cell.seed,
    }


def _write(path: Path, result: Mapping[str, Any]) -> None:
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _shown(found: Found) -> str:
    known = {"images_per_s": "{:.0f} images/s", "held_out": "{:.1%} held out", "top1": "{:.1%}"}
    words = [form.format(found[name]) for name, form in known.items() if found.get(name) is not None]
    if "held_out" in found:
        words = words[:1]  # what is held out chooses; val is for the table
    return f": {', '.join(words)}" if words else ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
