"""Rows and checkpoints of a run, on a disk that may be full for a while."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lomar.files import flush_to_disk
from lomar.training.checkpoint import Checkpoints
from lomar.training.records import Metrics, Row

RETRY_SECONDS = 60  # after a checkpoint that could not be written


class Keeper:
    """Keeps a run: its metrics, and now and then a checkpoint, behind the rows that belong before it."""

    def __init__(
        self, metrics: Metrics, checkpoints: Checkpoints, minutes: float, say: Callable[[str], object], place: Path
    ) -> None:
        """
        Args:
            metrics: where rows go.
            checkpoints: where states go.
            minutes: between two checkpoints.
            say: tells of what could not be written.
            place: --out, for messages.
        """
        self.metrics, self.checkpoints, self._minutes, self._say, self._place = (
            metrics,
            checkpoints,
            minutes,
            say,
            place,
        )
        self._waiting: list[Row] = []  # for which the disk had no room
        self._warned = False
        self._next_save = time.monotonic() + 60 * minutes

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() > self._next_save

    def record(self, rows: list[Row]) -> None:
        """Rows into the metrics. Those for which there is no room wait, and no checkpoint passes them by."""
        self._waiting += rows
        try:
            self._write_rows()
        except OSError as error:
            if not self._warned:
                self._say(f"warning: the metrics of {self._place} cannot be written: {why(error)}; training goes on")
            self._warned = True

    def save(self, step: int, state: dict[str, Any], needed: bool = True) -> None:
        """Write a checkpoint, see `write`.

        Args:
            step: updates done.
            state: tensors and plain values.
            needed: whether the run cannot go on without it. Else it does, and tries again soon.

        Raises:
            OSError: it is needed and cannot be written. Those before it stay.
        """
        failure = None
        try:
            self.write(step, state)
        except OSError as error:
            if needed:
                raise
            failure = self.failed(step, error)
        self.settle(failure)

    def write(self, step: int, state: dict[str, Any], export: Callable[[], object] = lambda: None) -> None:
        """Write the rows that wait, then what `export` makes, then the checkpoint.

        Args:
            step: updates done.
            state: tensors and plain values.
            export: writes files of the same step: a run that is killed after it makes them again.

        Raises:
            OSError: one of them cannot be written.
        """
        self._write_rows()
        if self.metrics.path.exists():
            flush_to_disk(self.metrics.path)  # a power cut must not leave a checkpoint without the rows before it
        export()
        self.checkpoints.save(step, state)

    def failed(self, step: int, error: OSError) -> str:
        """That a checkpoint could not be written, and why."""
        return f"the checkpoint of step {step} cannot be written to {self._place}: {why(error)}"

    def settle(self, failure: str | None) -> None:
        """When the next one is due; what is said of one that failed."""
        self._next_save = time.monotonic() + (RETRY_SECONDS if failure else 60 * self._minutes)
        if failure:
            self._say(f"warning: {failure}; training goes on, and tries to write it again in {RETRY_SECONDS} s")

    def forget(self) -> None:
        """Drop the rows that wait: the run goes back behind them."""
        self._waiting = []

    def _write_rows(self) -> None:
        self.metrics.write(self._waiting)
        self._waiting = []


def why(error: OSError) -> str:
    """The reason of an error, as a message has it."""
    return error.strerror or str(error)
