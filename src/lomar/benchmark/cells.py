"""A cell: one thing that is timed, in a process of its own, so that its peak of memory is its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

CHILD = "lomar.benchmark.child"
OUT_OF_MEMORY = "out of memory"
_MEMORY_ERRORS = ("OutOfMemoryError", "CUDA out of memory", "can't allocate memory", "MemoryError", "std::bad_alloc")


class CellError(Exception):
    """A cell could not be measured; the text says why in a few words."""


@dataclass(frozen=True)
class Cell:
    """What a child process does.

    Args:
        work: a name in `lomar.benchmark.child.WORKS`.
        values: what that takes, as plain values.
        images: that a step works on, in each process.
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16".
        compiled: whether torch.compile makes one graph of the work.
        warmup: steps before those that are timed.
        steps: steps that are timed.
        processes: that work together.
        threads: of each process on a CPU; 0 for as many as torch takes.
        memory_bytes: what each process may take on a CPU; 0 for no limit.
    """

    work: str
    values: Mapping[str, Any] = field(default_factory=dict)
    images: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    compiled: bool = False
    warmup: int = 1
    steps: int = 1
    processes: int = 1
    threads: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """What one child process found.

    Args:
        seconds: of each timed step.
        peak_bytes: most memory held during them, by one process.
    """

    seconds: list[float]
    peak_bytes: int


def measured(cell: Cell) -> Measured:
    """Measure a cell in fresh processes.

    Raises:
        CellError: it does not fit in memory (`OUT_OF_MEMORY`), or failed.
    """
    words = ["-m", CHILD, json.dumps(asdict(cell))]
    if cell.processes > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cell.processes), *words]
    # A session of its own: Ctrl-C reaches this process alone, which then ends the child with all that it started.
    with subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            out, err = child.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise
    return read_answer(out, err, child.returncode)


def read_answer(out: str, err: str, status: int) -> Measured:
    """What a child said.

    Args:
        out, err: what it wrote.
        status: its exit status; negative where a signal ended it.

    Raises:
        CellError: it found nothing, with the reason.
    """
    if any(text in err for text in _MEMORY_ERRORS) or status == -signal.SIGKILL:
        raise CellError(OUT_OF_MEMORY)  # SIGKILL is how the kernel ends what takes too much
    lines = out.splitlines()
    if status or not lines:
        said = [line for line in err.splitlines() if line.strip()]
        raise CellError(said[-1].strip() if said else f"ended with status {status}")
    return Measured(**json.loads(lines[-1]))
