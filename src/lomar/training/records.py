"""What a run writes while it learns, and what it shows: metrics, progress, log, TensorBoard."""

import contextlib
import errno
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lomar.files import write_atomically

Row = dict[str, Any]

LOG_NAME = "lomar"
LOG_FILE = "train.log"


class Metrics:
    """`metrics.jsonl`: one JSON object a line, appended; each has an integer `step`.

    The file is opened for each write, so that nothing is held back by a kill and `cut` may replace it in between.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, rows: list[Row]) -> None:
        """Appends all rows at once and hands them to the operating system.

        NaN and infinity, which JSON lacks, become null.

        Raises:
            TypeError: a value JSON has no form for, such as a tensor; nothing is written then.
            OSError: the disk is full; nothing is written then, not even a part of a line.
        """
        if not rows:
            return
        lines = "".join(json.dumps(_without_nan(row), allow_nan=False) + "\n" for row in rows)
        with self.path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            content = memoryview(lines.encode())
            try:
                while content:
                    content = content[file.write(content) or 0 :]
            except OSError:
                file.truncate(before)
                raise

    @staticmethod
    def read(path: Path) -> list[Row]:
        """The complete rows, in file order; [] where there is no file. A torn line, left by a kill, is passed over."""
        return [row for _, row in _complete_lines(path)]

    @staticmethod
    def cut(path: Path, after_step: int) -> None:
        """Keeps the complete rows whose step is at most `after_step`, byte for byte, in one atomic replacement.

        A resumed run calls it with its checkpoint's step (0 where there is none yet: that keeps the evaluation of
        the random initialisation). Does nothing where there is no file.
        """
        if not path.exists():
            return
        kept = [line + b"\n" for line, row in _complete_lines(path) if row["step"] <= after_step]
        write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(kept)))


def _complete_lines(path: Path) -> Iterator[tuple[bytes, Row]]:
    """(line without its newline, its row) for each line that is an object with a step."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # torn JSON or, after a power cut, bytes that are no text
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield line, row


def _without_nan(row: Row) -> Row:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


class Display:
    """Progress on standard output: a live bar in a terminal, otherwise a plain line every `log_every` steps.

    The same lines, and all that is said, go to the log (see `open_log`). Used as a context manager it stops itself,
    which gives the terminal its cursor back whatever happened.
    """

    def __init__(self, log_every: int, enabled: bool = True, console: Console | None = None) -> None:
        """
        Args:
            log_every: steps between two lines; the last step always has one.
            enabled: False on every process but the first: shows and logs nothing.
            console: where to show; standard output if None.
        """
        self._log_every = log_every
        self._enabled = enabled
        self._console = console or Console()
        self._log = logging.getLogger(LOG_NAME)
        self._live: Live | None = None
        self._total_steps = 0
        self._done = 0
        self._line = ""

    def start(self, total_steps: int, first_step: int) -> None:
        """Begins to show progress, anew where it was shown before.

        Args:
            total_steps: optimiser steps of the whole run.
            first_step: steps already done, above 0 when the run was resumed.
        """
        self.stop()
        self._total_steps, self._done = total_steps, first_step
        self._line = f"step {first_step}/{total_steps}"
        if self._enabled and self._console.is_interactive:
            self._live = Live(get_renderable=self._picture, console=self._console, refresh_per_second=4)
            self._live.start()

    def step(self, row: Row, eta_s: float) -> None:
        """Shows one optimiser step.

        Args:
            row: the step's metrics: step (counted from 1), epoch, loss, lr, grad_norm, images_per_s, and data_wait
                as a share of 0 to 1.
            eta_s: seconds to the end of the run; NaN while unknown.
        """
        if not self._enabled:
            return
        self._done = row["step"]
        self._line = progress_line(row, self._total_steps, eta_s)
        if self._done % self._log_every == 0 or self._done == self._total_steps:
            self._log.info(self._line)
            if self._live is None:
                self._print(self._line)

    def say(self, text: str) -> None:
        """Shows a message (above the bar, where there is one) and logs it."""
        if self._enabled:
            self._log.info(text)
            self._print(text)

    def stop(self) -> None:
        """Ends the bar and leaves its last state on the screen; a second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _picture(self) -> Table:
        # Two rows, so that a narrow terminal wraps the numbers instead of squeezing the bar away.
        rows = Table.grid(expand=True)
        rows.add_row(ProgressBar(total=self._total_steps, completed=self._done))
        rows.add_row(Text(self._line))
        return rows

    def _print(self, text: str) -> None:
        # As it stands: "[...]" in a file name is no markup, and a line in a pipe is not folded at 80 columns.
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except OSError as error:
            if error.errno != errno.ENOSPC:  # output into a file on a full disk is not worth a run
                raise


def progress_line(row: Row, total_steps: int, eta_s: float) -> str:
    """One step as one line, its numbers aligned with those of the lines above and below.

    >>> row = dict(step=120, epoch=1.52, loss=0.8123, lr=4.5e-4, grad_norm=1.21, images_per_s=183, data_wait=0.04)
    >>> progress_line(row, 800, 192)
    'step 120/800  epoch 1.52  loss 0.8123  lr 4.5e-04  grad 1.21  183 img/s  wait  4%  eta 0:03:12'
    """
    return (
        f"step {row['step']:>{len(str(total_steps))}}/{total_steps}  epoch {row['epoch']:.2f}  "
        f"loss {row['loss']:.4f}  lr {row['lr']:.1e}  grad {row['grad_norm']:.2f}  "
        f"{row['images_per_s']:.0f} img/s  wait {row['data_wait']:>3.0%}  eta {_clock(eta_s)}"
    )


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, such as 27:03:12; "?" where the time is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, whole_seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}"


class _LogFile(logging.FileHandler):
    """A log that a full disk makes lose lines, and nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def open_log(run_dir: Path) -> logging.Logger:
    """The logger "lomar", from now on also written to `run_dir/train.log`, appended and with times.

    One run at a time: a log that is still open is closed first. Close with `close_log`.
    """
    close_log()
    handler = _LogFile(run_dir / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s  %(levelname)-7s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger(LOG_NAME)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return logger


def close_log() -> None:
    """Closes the file `open_log` opened and takes it off the logger; a second call does nothing."""
    logger = logging.getLogger(LOG_NAME)
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).name == LOG_FILE:
            logger.removeHandler(handler)
            handler.close()


class TensorBoard:
    """The rows as scalars in `run_dir/tensorboard`, for `tensorboard --logdir`."""

    def __init__(self, run_dir: Path, after_step: int) -> None:
        """
        Args:
            run_dir: the run's folder.
            after_step: the step of the checkpoint resumed from: TensorBoard then hides what an interrupted run
                wrote after it, as `Metrics.cut` does. -1 for a new run.
        """
        # Imported late: of all that uses this module, only the process that writes a run needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=after_step + 1, flush_secs=30)

    def write(self, rows: list[Row]) -> None:
        """Adds every number of every row at the row's step."""
        for row in rows:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what is still waiting."""
        self._writer.close()
