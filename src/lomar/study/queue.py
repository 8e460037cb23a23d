"""Cells one after another, or several at once: by this process, and by any other that works in the same folder.

Each cell is claimed by a lock on its folder, so that an array of SLURM jobs with one shared folder is a queue.
"""

import contextlib
import json
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lomar.errors import UserError
from lomar.files import LOCK_FILE, only_writer, write_text
from lomar.launch import alone
from lomar.study.cells import (
    CELLS,
    RESULT,
    Found,
    Setup,
    Step,
    divergence,
    needs_tokenizer,
    result_of,
    steps,
)
from lomar.study.plan import Job, Plan, diverged

LOG_FILE, TOKENIZER_FOLDER = "cell.log", "tokenizer"
ASK_AGAIN_S = 5.0  # what others have finished is looked for

# words of a command, its log, what its environment has beside this process's -> exit status
Run = Callable[[Sequence[str], Path, Mapping[str, str]], int]


class Children:
    """Commands of lomar as processes of their own, which a wish to stop reaches."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def run(self, words: Sequence[str], log: Path, place: Mapping[str, str]) -> int:
        """Run `lomar` with the words; see `Run`. What it prints is added to the log.

        In a session of its own: Ctrl-C reaches this process alone, which then asks its children to save and end.
        """
        with log.open("ab") as out:
            out.write(f"$ lomar {shlex.join(words)}\n".encode(errors="surrogateescape"))
            out.flush()
            with self._lock:
                if self.stopping.is_set():
                    return -signal.SIGTERM
                child = subprocess.Popen(
                    [sys.executable, "-m", "lomar", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=alone() | dict(place),
                    start_new_session=True,
                )
                self._running.add(child)
            try:
                return child.wait()
            finally:
                with self._lock:
                    self._running.discard(child)

    def stop(self) -> None:
        """Ask all to save and end; no other begins."""
        with self._lock:
            self.stopping.set()
            for child in self._running:
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
        stop: asks the commands that run to save and end, and sets it.
        say: tells how far it is.
        done: called after each command that went well.
    """

    plan: Plan
    setup: Setup
    tokenizer: Sequence[str]
    run: Run
    stopping: threading.Event
    stop: Callable[[], None]
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
            and not diverged(found.get(job.cell.name, {}))
            and self._next(job, found.get(job.cell.name, {}))
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
            except BaseException as error:  # raised by the thread that waits
                errors.append(error)
                self.say(f"stopping: {error}")
                self.stop()

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
        if needs_tokenizer(job.cell.method) and not self._has_tokenizer():
            tokenizer = self.setup.tokenizer
            folder = self.setup.out / TOKENIZER_FOLDER
            with self._claim(folder, "tokenizer", tokenizer.with_name(f".{tokenizer.name}.lock")) as mine:
                return mine and self._made_tokenizer(folder, place)
        folder = self.setup.folder(job.cell)
        with self._claim(folder, job.cell.name) as mine:
            return mine and self._advanced(job, folder, place)

    def _has_tokenizer(self) -> bool:
        return not self.tokenizer or self.setup.tokenizer.exists()

    def _made_tokenizer(self, folder: Path, place: Mapping[str, str]) -> bool:
        if self._has_tokenizer():
            return False
        self.say("tokenizer: begins")
        began = time.monotonic()
        status = self.run(self.tokenizer, folder / LOG_FILE, place)
        if not status:
            taken = time.monotonic() - began
            kept = {"command": shlex.join(["lomar", *self.tokenizer]), "last_sitting_s": round(taken, 1), **_where()}
            _write(folder / RESULT, kept)
            self.say(f"tokenizer: done in {_clock(taken)}")
        elif not self.stopping.is_set():
            for other in self.plan.jobs(self.found()):
                if needs_tokenizer(other.cell.method):
                    self._fails(other.cell.name, folder / LOG_FILE, status)
        return True

    def _advanced(self, job: Job, folder: Path, place: Mapping[str, str]) -> bool:
        """Do all that is left of a job."""
        result = result_of(folder)
        name = job.cell.name
        # Asked anew each time: the words of later commands depend on what earlier ones found.
        while not diverged(result) and (step := self._next(job, result)) and not self.stopping.is_set():
            self.say(f"{name}: {step.name} begins")
            began = time.monotonic()
            found = self._step(step, folder, place)
            if found is None:
                break
            result = {**result, step.name: found, "cell": asdict(job.cell) | {"changes": dict(job.cell.changes)}}
            _write(folder / RESULT, result)
            self.say(f"{name}: {step.name} done in {_clock(time.monotonic() - began)}{_shown(found)}")
            self.done()
        return True

    def _next(self, job: Job, result: Found) -> Step | None:
        return next((step for step in steps(job, self.setup) if step.name not in result), None)

    def _step(self, step: Step, folder: Path, place: Mapping[str, str]) -> Found | None:
        """What a command left; None where it failed or was stopped."""
        if step.written:
            step.written.unlink(missing_ok=True)
        log = folder / LOG_FILE
        status = self.run(step.words, log, place)
        kept = {"command": shlex.join(["lomar", *step.words]), **_where()}
        if status:
            if self.stopping.is_set():
                return None
            if step.name == "pretraining" and (found := divergence(log)):
                return found | kept
            self._fails(folder.name, log, status)
            return None
        try:
            return step.read() | kept
        except (OSError, ValueError, LookupError, UserError) as error:
            self._fails(folder.name, log, status, f"what it left cannot be read: {error}")
            return None

    def _fails(self, name: str, log: Path, status: int, reason: str = "") -> None:
        if status < 0:
            reason = f"ended by signal {-status}" + ", perhaps for want of memory" * (status == -signal.SIGKILL)
        if not reason:
            said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            reason = said[-1].strip() if said else f"ended with status {status}"
        self.failed[name] = f"{reason} (see {log})"
        self.say(f"{name}: failed: {self.failed[name]}")

    @contextlib.contextmanager
    def _claim(self, folder: Path, name: str, *others: Path) -> Iterator[bool]:
        """Whether nobody else, in this process or another, is at a cell; it is this one's until the end.

        Args:
            folder: of the cell.
            name: of the cell.
            others: locks that its commands hold elsewhere.
        """
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
                    for lock in (*folder.glob(f"*/{LOCK_FILE}"), *others):  # of a command that outlived a killed study
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


def _where() -> Found:
    """The machine that something was found on."""
    return {"host": socket.gethostname()}


def _write(path: Path, result: Mapping[str, Any]) -> None:
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write_text(path, text)


def _shown(found: Found) -> str:
    known = {"images_per_s": "{:.0f} images/s", "held_out": "{:.1%} held out", "top1": "{:.1%}"}
    if found.get("diverged"):
        return ": diverged"
    words = [form.format(found[name]) for name, form in known.items() if found.get(name) is not None]
    if "held_out" in found:
        words = words[:1]  # what is held out chooses; val is for the table
    return f": {', '.join(words)}" if words else ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
