"""Cells measured in turn, round after round, and what follows from their times."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lomar.benchmark.cells import Cell, CellError, Measured


@dataclass
class Row:
    """A line of the table: a cell, and what its rounds found.

    Args:
        cell: what is measured.
        title: what it is called while it is measured.
        about: what the row is, by name, for the table and the JSON.
        group: rows of the same group are compared.
        is_base: whether the others of its group are compared with this one; of several the fastest counts.
        bursts: whether steps take unequal time by nature (a loader), so that their mean counts and not their median.
        rounds: one for each round that is done.
        failed: why it could not be measured; empty if it could.
    """

    cell: Cell
    title: str
    about: dict[str, Any]
    group: str = ""
    is_base: bool = False
    bursts: bool = False
    rounds: list[Measured] = field(default_factory=list)
    failed: str = ""

    @property
    def round_s(self) -> list[float]:
        """Seconds of a step in each round."""
        middle = statistics.mean if self.bursts else statistics.median
        return [middle(found.seconds) for found in self.rounds]

    @property
    def step_s(self) -> float | None:
        """Seconds of a step: the median of the rounds; None before the first."""
        return statistics.median(self.round_s) if self.rounds else None

    @property
    def images_per_s(self) -> float | None:
        """Over all processes."""
        return self.cell.images * self.cell.processes / self.step_s if self.step_s else None

    @property
    def peak_bytes(self) -> int | None:
        """Most memory held by a process: the median of the rounds."""
        return round(statistics.median(found.peak_bytes for found in self.rounds)) if self.rounds else None


class Ratio(NamedTuple):
    """Images a second over another row's: of each round with that of the same round, then the median and the range."""

    median: float
    low: float
    high: float


def ratio(row: Row, base: Row) -> Ratio | None:
    """How many times as many images a second a row has as another; None where one of them has no round."""
    of_row, of_base = (each.cell.images * each.cell.processes for each in (row, base))
    pairs = zip(row.round_s, base.round_s, strict=False)  # an interrupted run leaves one of them a round short
    ratios = [of_row / seconds * base_s / of_base for seconds, base_s in pairs]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def base_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """What a row is compared with: the fastest base of its group; None where none was measured."""
    bases = [other for other in rows if other.is_base and other.group == row.group and other.rounds]
    return max(bases, key=lambda other: other.images_per_s or 0.0, default=None)


def measure_rounds(
    rows: Sequence[Row],
    rounds: int,
    measure: Callable[[Cell], Measured],
    note: Callable[[str], object],
    keep: Callable[[], object],
) -> None:
    """Fill `rows`: every row once in each round, in turn and back again, so that a drift meets all alike.

    Args:
        rows: changed in place; one that fails is not tried again.
        rounds: how many.
        measure: a cell, as `measured` does.
        note: says what was found.
        keep: called after each round, to write what is there.
    """
    for number in range(1, rounds + 1):
        for row in rows if number % 2 else reversed(rows):
            if row.failed:
                continue
            try:
                row.rounds.append(measure(row.cell))
                found = f"{row.round_s[-1]:.4g} s"
            except CellError as error:
                row.failed = found = str(error)
            note(f"round {number}/{rounds}: {row.title}: {found}")
        keep()
