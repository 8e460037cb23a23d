"""Learning curves from the rows of `metrics.jsonl`: of one run, and of several side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image

from lomar.figures.png import save_png

Row = Mapping[str, Any]
Values = NDArray[np.float64]

# Okabe and Ito's colours, told apart by colour-blind readers; yellow left out, being too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
UNTRAINED = "#666666"

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class _Quality:
    """A judgement of the features, or of a classifier, that is made now and then."""

    key: str
    label: str
    factor: float


QUALITIES = (
    _Quality("top1", "validation top-1 accuracy (%)", 100.0),
    _Quality("box_ap", "average precision of boxes (%)", 100.0),
    _Quality("knn_top1", "k-NN top-1 accuracy (%)", 100.0),
    _Quality("effective_rank", "effective rank of the features", 1.0),
)


# What tells that a method that compares views makes all images alike.
COLLAPSE = {"feature_deviation": "deviation of features (of 1)", "output_entropy": "entropy of outputs (nats)"}


def learning_curves(rows: Sequence[Row], path: Path) -> None:
    """Writes one run's loss, learning rate, gradient norm and quality against the optimiser step, as PNG.

    Of methods that compare views also what tells a collapse. The loss is drawn raw (light) and smoothed. Quality is
    validation or k-NN accuracy where the run has it, else effective rank; its step-0 value is the dashed line "random
    initialisation". A panel without a value is left out.

    Args:
        rows: rows of `metrics.jsonl`: step, and any of loss, lr, grad_norm, top1, knn_top1, effective_rank,
            feature_deviation, output_entropy.
        path: the PNG, replaced atomically.

    Raises:
        ValueError: no row holds anything to draw.
    """
    quality = _quality_of([rows])
    drawings: dict[str, Callable[[Axes], None]] = {
        "loss": lambda axes: _draw_loss(axes, rows),
        "lr": lambda axes: _draw_plain(axes, rows, "lr", "learning rate"),
        "grad_norm": lambda axes: _draw_gradient(axes, rows),
        quality.key: lambda axes: _draw_quality(axes, {"this run": rows}, quality, "step"),
    }
    drawings |= {key: partial(_draw_from_zero, rows=rows, key=key, label=label) for key, label in COLLAPSE.items()}
    drawings = {key: draw for key, draw in drawings.items() if _points(rows, "step", key)[0].size}
    if not drawings:
        raise ValueError("no row holds a loss, learning rate, gradient norm or feature quality")
    with rc_context(STYLE):
        across = min(2, len(drawings))
        down = -(-len(drawings) // across)
        figure = Figure(figsize=(5.4 * across, 3.2 * down), dpi=150, layout="constrained")
        for place, draw in enumerate(drawings.values(), start=1):
            axes = figure.add_subplot(down, across, place)
            draw(axes)
            axes.set_xlabel("optimiser step")
        save_figure(figure, path)


def compare_curves(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Writes the smoothed loss and the feature quality of several runs, as PNG.

    Against the epoch and, where every run's rows carry `elapsed_s`, against elapsed hours too. Each run's step-0
    quality is a dashed line in its colour.

    Args:
        runs: name for the legend -> rows of `metrics.jsonl`: step, epoch, and any of loss, top1,
            knn_top1, effective_rank, elapsed_s.
        path: the PNG, replaced atomically.

    Raises:
        ValueError: no run, or no row holds a loss or a feature quality.
    """
    quality = _quality_of(list(runs.values()))
    timed = bool(runs) and all(_points(rows, "elapsed_s", "loss")[0].size for rows in runs.values())
    panels: list[tuple[str, str]] = [
        (x, key)
        for x in ("epoch", "elapsed_s")[: 1 + timed]
        for key in ("loss", quality.key)
        if any(_points(rows, x, key)[0].size for rows in runs.values())
    ]
    if not panels:
        raise ValueError("no row holds a loss or a feature quality with its epoch")
    with rc_context(STYLE):
        across = len({key for _, key in panels})
        down = -(-len(panels) // across)
        figure = Figure(figsize=(5.4 * across, 3.4 * down), dpi=150, layout="constrained")
        for place, (x, key) in enumerate(panels, start=1):
            axes = figure.add_subplot(down, across, place)
            if key == "loss":
                for colour, (name, rows) in zip(_colours(len(runs)), runs.items(), strict=True):
                    where, loss = _points(rows, x, "loss")
                    axes.plot(where, smoothed(loss), color=colour, label=name)
                axes.set_ylabel("loss (smoothed)")
                leave_out_outliers(axes, [_points(rows, x, "loss")[1] for rows in runs.values()])
            else:
                _draw_quality(axes, runs, quality, x)
            axes.set_xlabel("epoch" if x == "epoch" else "elapsed time (hours)")
            axes.legend()
        save_figure(figure, path)


def _draw_noisy(axes: Axes, step: Values, values: Values) -> None:
    """Every value, light, and their moving mean."""
    axes.plot(step, values, color=COLOURS[0], alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(step, smoothed(values), color=COLOURS[0], label=f"mean over {_span(len(values))} steps")
    axes.legend()


def _draw_loss(axes: Axes, rows: Sequence[Row]) -> None:
    step, loss = _points(rows, "step", "loss")
    _draw_noisy(axes, step, loss)
    axes.set_ylabel("loss")
    leave_out_outliers(axes, [loss])


def _draw_from_zero(axes: Axes, rows: Sequence[Row], key: str, label: str) -> None:
    _draw_noisy(axes, *_points(rows, "step", key))
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)


def _draw_plain(axes: Axes, rows: Sequence[Row], key: str, label: str) -> None:
    axes.plot(*_points(rows, "step", key), color=COLOURS[0])
    axes.set_ylabel(label)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)


def _draw_gradient(axes: Axes, rows: Sequence[Row]) -> None:
    step, norm = _points(rows, "step", "grad_norm")
    _draw_noisy(axes, step, norm)
    axes.set_ylabel("gradient norm")
    if (norm > 0).all():
        # Spans decades between the first steps and the last, and its outliers are what one looks for.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_quality(axes: Axes, runs: Mapping[str, Sequence[Row]], quality: _Quality, x: str) -> None:
    """Points joined by lines for each run, and its value at step 0 as a dashed line across."""
    for colour, (name, rows) in zip(_colours(len(runs)), runs.items(), strict=True):
        where, value = _points(rows, x, quality.key)
        axes.plot(where, quality.factor * value, color=colour, marker="o", markersize=4, label=name)
        step, value = _points(rows, "step", quality.key)
        for untrained in quality.factor * value[step == 0][:1]:
            dashed = UNTRAINED if len(runs) == 1 else colour
            axes.axhline(untrained, color=dashed, linestyle="--", linewidth=1.1, zorder=1)
    if any(row["step"] == 0 and row.get(quality.key) is not None for rows in runs.values() for row in rows):
        # One entry for the dashed lines, however many there are.
        axes.plot([], [], color=UNTRAINED, linestyle="--", linewidth=1.1, label="random initialisation")
    axes.set_ylabel(quality.label)
    axes.legend()


def _quality_of(runs: Sequence[Sequence[Row]]) -> _Quality:
    """The first judgement that any of the runs has made."""
    for quality in QUALITIES:
        if any(row.get(quality.key) is not None for rows in runs for row in rows):
            return quality
    return QUALITIES[0]


def _points(rows: Sequence[Row], x: str, y: str) -> tuple[Values, Values]:
    """x and y of the rows that have both; hours where x is `elapsed_s`."""
    pairs = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    both = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return both[:, 0] / (3600.0 if x == "elapsed_s" else 1.0), both[:, 1]


def _span(count: int) -> int:
    """Steps averaged for a smooth curve: a fortieth of the run, an odd number so that the mean is centred."""
    return count // 80 * 2 + 1


def smoothed(values: Values) -> Values:
    """Centred moving mean, over fewer values at both ends; it does not lag behind as an exponential mean does."""
    if values.size == 0:
        return values
    span = _span(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    places = np.arange(len(values))
    first, last = np.maximum(0, places - span // 2), np.minimum(len(values), places + (span + 1) // 2)
    return (sums[last] - sums[first]) / (last - first)


def leave_out_outliers(axes: Axes, losses: Sequence[Values]) -> None:
    """Keeps a few extreme first steps from flattening the curve: the top is the 99.5th percentile of the losses."""
    together = np.concatenate(list(losses))
    low, high = together.min(), np.percentile(together, 99.5)
    if high > low:
        axes.set_ylim(low - 0.04 * (high - low), high + 0.06 * (high - low))


def _colours(count: int) -> list[str]:
    """A colour for each run, from the start again after the last."""
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure of matplotlib as PNG, replaced atomically."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)
