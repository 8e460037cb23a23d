"""A study's numbers: of each row the mean and the deviation over its seeds, as far as they are there."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lomar.study.grids import Entry
from lomar.study.plan import Plan, Results, diverged

JUDGED = {"knn": "k-NN", "probe": "linear probe", "finetuned": "fine-tuned"}


@dataclass(frozen=True)
class Spread:
    """A mean, and the standard deviation of a sample where it has two at least."""

    mean: float
    deviation: float | None

    def text(self, form: str) -> str:
        """35.2 (0.3)"""
        return form.format(self.mean) + (f" ({form.format(self.deviation)})" if self.deviation is not None else "")


@dataclass(frozen=True)
class Row:
    """What is known of an entry.

    Args:
        entry: it.
        base_lr: the rate that was chosen; None where there is none, or not yet.
        at_edge: whether it is the lowest or the highest that was tried.
        epochs: of pretraining.
        seeds: that were judged to the end.
        accuracy: top-1 by "knn", "probe" and "finetuned", from 0 to 1.
        layers: the block after which k-NN and probe read features, from 1, of each seed; chosen on images held out.
        diverged: rates at which a run diverged.
        minutes, images_per_s, peak_bytes, flops_of_image: of pretraining; medians over the seeds.
    """

    entry: Entry
    base_lr: float | None
    at_edge: bool
    epochs: float | None
    seeds: int
    accuracy: dict[str, Spread]
    layers: list[int]
    diverged: list[float]
    minutes: float | None
    images_per_s: float | None
    peak_bytes: float | None
    flops_of_image: float | None


def rows(plan: Plan, found: Results) -> list[Row]:
    """A row for each entry, in order."""
    return [_row(plan, entry, found) for entry in plan.entries]


def _row(plan: Plan, entry: Entry, found: Results) -> Row:
    cells = [plan.cell(entry, seed, found) for seed in plan.seeds]
    results = [found.get(cell.name, {}) for cell in cells if cell]
    judged = [result for result in results if not diverged(result) and all(name in result for name in JUDGED)]
    tried = [*plan.sweep(entry, found), *(cell for cell in cells if cell)]
    runs = [result["pretraining"] for result in judged if "pretraining" in result]

    def median(name: str) -> float | None:
        values = [run[name] for run in runs if run.get(name) is not None]
        return statistics.median(values) if values else None

    return Row(
        entry=entry,
        base_lr=plan.rate(entry, found) if entry.method else None,
        at_edge=bool(entry.method) and not entry.rate_of and plan.at_edge(entry, found),
        epochs=plan.length(entry, found) if entry.method else None,
        seeds=len(judged),
        accuracy={name: spread([result[name]["top1"] for result in judged]) for name in JUDGED} if judged else {},
        layers=[result["probe"]["layer"] for result in judged],
        diverged=sorted({cell.base_lr for cell in tried if diverged(found.get(cell.name, {}))}),
        minutes=median("minutes"),
        images_per_s=median("images_per_s"),
        peak_bytes=median("peak_bytes"),
        flops_of_image=median("flops_of_image"),
    )


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation."""
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def cells(found: Sequence[Row]) -> list[list[str]]:
    """The table's titles, then the text of each row."""
    course, cost = ("rate", "epochs", "seeds"), ("minutes", "images/s", "peak, GB", "MFLOP an image")
    titles = ["", *course, *JUDGED.values(), "features of layer", *cost]
    return [titles, *(_cells(row) for row in found)]


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str, factor: float = 1) -> str:
        return "-" if value is None else form.format(value * factor)

    accuracies = (row.accuracy.get(name) for name in JUDGED)
    return [
        row.entry.name,
        number(row.base_lr, "{:g}") + " *" * row.at_edge + f" (as {row.entry.rate_of})" * bool(row.entry.rate_of),
        number(row.epochs, "{:g}"),
        str(row.seeds),
        *(Spread(100 * s.mean, s.deviation and 100 * s.deviation).text("{:.1f}") if s else "-" for s in accuracies),
        ", ".join(map(str, dict.fromkeys(row.layers))) or "-",
        number(row.minutes, "{:.1f}"),
        number(row.images_per_s, "{:.0f}"),
        number(row.peak_bytes, "{:.2f}", 1e-9),
        number(row.flops_of_image, "{:.0f}", 1e-6),
    ]


def values(row: Row) -> dict[str, Any]:
    """The same as plain values, for JSON."""
    return {
        "name": row.entry.name,
        "method": row.entry.method,
        "changes": dict(row.entry.changes),
        "base_lr": row.base_lr,
        "best_rate_at_edge": row.at_edge,
        "epochs": row.epochs,
        "seeds": row.seeds,
        "accuracy": {name: {"mean": s.mean, "deviation": s.deviation} for name, s in row.accuracy.items()},
        "layers": row.layers,
        "diverged_at": row.diverged,
        "pretraining_minutes": row.minutes,
        "images_per_s": row.images_per_s,
        "peak_bytes": row.peak_bytes,
        "flops_of_image": row.flops_of_image,
    }
