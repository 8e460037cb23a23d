"""Small charts of one run or several as SVG, for a page: text stays text, and colours follow a dark screen."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from lomar.figures.curves import COLLAPSE, COLOURS, STYLE, Row, Values, leave_out_outliers, smoothed

WIDTH_IN, HEIGHT_IN = 3.75, 2.3  # at 96 CSS pixels an inch: 360 px wide, as a phone's screen
MOST_POINTS = 500  # of a line: more cannot be told apart, and make the page large
MOST_RUNS = 2

# Colours in a chart that stand for a role -> on a light screen, on a dark one. Those of the lines are told apart by
# colour-blind readers on either.
_ROLES = {
    "#1f2021": ("--ink", "#222222", "#d8dbe0"),
    "#e4e5e6": ("--grid", "#e4e4e4", "#34383f"),
    "#8a8b8c": ("--axis", "#777777", "#8b919a"),
    "#666768": ("--untrained", "#666666", "#a0a6ae"),
    COLOURS[0].lower(): ("--first", COLOURS[0], "#56b4e9"),
    COLOURS[1].lower(): ("--second", COLOURS[1], "#f0883e"),
}
_INK, _GRID, _AXIS, _UNTRAINED = list(_ROLES)[:4]
_CHART_STYLE: dict[Any, Any] = STYLE | {
    "font.size": 8.5,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _AXIS,
    "xtick.color": _AXIS,
    "ytick.color": _AXIS,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "text.parse_math": False,  # a name may hold a "$"
    "svg.fonttype": "none",
    "path.simplify_threshold": 0.5,
}


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        key: of what it shows, as in the rows.
        title: what it shows, with its unit.
        svg: the picture, whole in itself.
        alt: what can be read off it, in words.
        foreseen: whether it is one that every reader looks for; the others are for whoever wants all.
    """

    key: str
    title: str
    svg: bytes
    alt: str
    foreseen: bool = True


@dataclass(frozen=True)
class _Measure:
    """What a key of the rows is.

    Args:
        title: with its unit.
        factor: of the values, for the unit.
        noisy: whether each step has one, which is drawn light under its mean.
        log: whether the scale is logarithmic.
        zero: whether the scale begins at zero.
        now_and_then: whether it is measured now and then, and drawn as points.
    """

    title: str
    factor: float = 1.0
    noisy: bool = False
    log: bool = False
    zero: bool = False
    now_and_then: bool = False


# In the order of a page. What else the rows hold comes behind, under its own name.
_MEASURES = {
    "knn_top1": _Measure("k-NN top-1 accuracy (%)", 100, now_and_then=True),
    "effective_rank": _Measure("effective rank of the features", now_and_then=True),
    "top1": _Measure("validation top-1 accuracy (%)", 100, now_and_then=True),
    "val_top1": _Measure("validation top-1 accuracy (%)", 100, now_and_then=True),
    "held_out_top1": _Measure("held-out top-1 accuracy (%)", 100, now_and_then=True),
    "box_ap": _Measure("average precision of boxes (%)", 100, now_and_then=True),
    "mask_ap": _Measure("average precision of masks (%)", 100, now_and_then=True),
    "mean_class_top1": _Measure("mean accuracy over classes (%)", 100, now_and_then=True),
    "top5": _Measure("validation top-5 accuracy (%)", 100, now_and_then=True),
    "psnr_db": _Measure("decoded at (dB)", now_and_then=True),
    "vocab_used": _Measure("tokens used (%)", 100, now_and_then=True),
    "loss": _Measure("loss", noisy=True),
    **{key: _Measure(label, noisy=True, zero=True) for key, label in COLLAPSE.items()},
    "val_loss": _Measure("loss on images that judge", now_and_then=True),
    "lr": _Measure("learning rate", zero=True),
    "grad_norm": _Measure("gradient norm", noisy=True, log=True),
    "images_per_s": _Measure("images a second", noisy=True, zero=True),
    "data_wait": _Measure("waiting for data (% of the time)", 100, noisy=True, zero=True),
    "gpu_memory": _Measure("GPU memory at its fullest (%)", 100, zero=True),
}
_NO_MEASURES = ("step", "epoch", "elapsed_s")
_OF_QUALITY = [key for key, measure in _MEASURES.items() if measure.now_and_then]


def charts_of(runs: Mapping[str, Sequence[Row]]) -> list[Chart]:
    """A chart of each measure that any of the runs has: of one run against the step, of several against the epoch.

    Of several runs the first quality and the loss are drawn against the time as well.

    Args:
        runs: name for the legend -> rows of `metrics.jsonl`, in order; at most `MOST_RUNS`.

    Raises:
        ValueError: there are more runs than colours.
    """
    if len(runs) > MOST_RUNS:
        raise ValueError(f"{len(runs)} runs; there are {MOST_RUNS} colours")
    several = len(runs) > 1
    x = "epoch" if several and all(_points(rows, "epoch", "step")[0].size for rows in runs.values()) else "step"
    held = {key for rows in runs.values() for row in rows for key in row}
    keys = [key for key in _MEASURES if key in held]
    keys += sorted(held - set(_MEASURES) - set(_NO_MEASURES))
    charts = [chart for key in keys if (chart := _chart(runs, key, x)) is not None]
    if several:
        quality = next((key for key in _OF_QUALITY if key in held), "loss")
        timed = (_chart(runs, key, "elapsed_s") for key in dict.fromkeys((quality, "loss")))
        charts += [chart for chart in timed if chart is not None]
    return charts


def distance_chart(runs: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    """How far patches look, layer by layer.

    Args:
        runs: name -> of each layer the mean attention distance in patches, and what it would be if spread evenly.
    """
    with rc_context(_CHART_STYLE):
        figure, axes = _empty(whole=True)
        for colour, (name, layers) in zip(COLOURS, runs.items(), strict=False):
            numbers = np.arange(1, len(layers) + 1)
            distances, even = np.asarray(layers, np.float64).reshape(-1, 2).T
            axes.plot(numbers, distances, color=colour, marker="o", markersize=3.5, label=_legend(name))
            axes.plot(numbers, even, color=_UNTRAINED if len(runs) == 1 else colour, linestyle="--", linewidth=1)
        axes.plot([], [], color=_UNTRAINED, linestyle="--", linewidth=1, label="if spread evenly")
        highest = max((value for layers in runs.values() for layer in layers for value in layer), default=1.0)
        axes.set_ylim(0, 1.1 * max(highest, 1e-9))
        axes.set_xlabel("layer")
        _add_legend(axes)
        told = (f"{name}: " + ", ".join(f"{distance:.1f}" for distance, _ in layers) for name, layers in runs.items())
        alt = "Mean attention distance in patches, layer by layer. " + "; ".join(told)
        return Chart("distance", "attention distance (patches)", _svg(figure, "distance"), alt)


def _chart(runs: Mapping[str, Sequence[Row]], key: str, x: str) -> Chart | None:
    """The chart of a measure; None where there is no number."""
    measure = _MEASURES.get(key, _Measure(key.replace("_", " ")))
    lines = {name: _points(rows, x, key) for name, rows in runs.items()}
    if not any(where.size for where, _ in lines.values()):
        return None
    if key not in _MEASURES:  # told from how often it is measured
        steps = max(len(_points(rows, x, "step")[0]) for rows in runs.values())
        now_and_then = max(where.size for where, _ in lines.values()) < steps / 2
        measure = replace(measure, now_and_then=now_and_then, noisy=not now_and_then)
        if key.startswith(("box_", "mask_")):  # average precisions and recalls
            measure = replace(measure, title=f"{measure.title} (%)", factor=100.0)
    told = []
    with rc_context(_CHART_STYLE):
        figure, axes = _empty(whole=x == "step")
        for colour, (name, (where, values)) in zip(COLOURS, lines.items(), strict=False):
            values = values * measure.factor
            if not where.size:
                continue
            _draw(axes, where, values, measure, colour, _legend(name))
            told.append(f"{name}: {values[0]:.4g} at first, {values[-1]:.4g} at last")
        if measure.now_and_then:
            _baselines(axes, runs, key, measure)
        _scale(axes, [values * measure.factor for _, values in lines.values() if values.size], measure)
        # The same for all charts of a page, so that a place in one is the same place in the next.
        furthest = max(_points(rows, x, "step")[0].max(initial=0.0) for rows in runs.values())
        axes.set_xlim(-0.02 * furthest, 1.02 * furthest if furthest > 0 else 1)
        axes.set_xlabel({"elapsed_s": "hours"}.get(x, x))
        _add_legend(axes)
        against = {"elapsed_s": "time", "epoch": "epochs", "step": "steps"}[x]
        title = f"{measure.title}, over time" if x == "elapsed_s" else measure.title
        alt = f"Curve of {measure.title} against {against}. {'; '.join(told)}."
        return Chart(key, title, _svg(figure, f"{key}-{x}"), alt, key in _MEASURES)


def _empty(whole: bool) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
    return figure, axes


def _draw(axes: Axes, where: Values, values: Values, measure: _Measure, colour: str, name: str) -> None:
    if measure.now_and_then:
        axes.plot(where, values, color=colour, marker="o", markersize=3.5, label=name)
        return
    if measure.noisy and where.size > 2:
        places, low, _, high = binned(where, values)
        if places.size < where.size:
            axes.fill_between(places, low, high, color=colour, alpha=0.22, linewidth=0)
        else:
            axes.plot(where, values, color=colour, alpha=0.3, linewidth=0.7)
        values = smoothed(values)
    places, _, middle, _ = binned(where, values)
    axes.plot(places, middle, color=colour, label=name, marker="o" if where.size == 1 else None, markersize=3.5)


def binned(where: Values, values: Values, most: int = MOST_POINTS) -> tuple[Values, Values, Values, Values]:
    """Places, and lowest, mean and highest value, of at most so many stretches of a line, of equally many points."""
    if where.size <= most:
        return where, values, values, values
    edges = np.linspace(0, where.size, most + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, where.size))
    means = (np.add.reduceat(each, edges) / counts for each in (where, values))
    places, middle = means
    return places, np.minimum.reduceat(values, edges), middle, np.maximum.reduceat(values, edges)


def _baselines(axes: Axes, runs: Mapping[str, Sequence[Row]], key: str, measure: _Measure) -> None:
    """The value at step 0 as a dashed line across."""
    found = False
    for colour, rows in zip(COLOURS, runs.values(), strict=False):
        step, values = _points(rows, "step", key)
        for untrained in measure.factor * values[step == 0][:1]:
            axes.axhline(
                untrained, color=_UNTRAINED if len(runs) == 1 else colour, linestyle="--", linewidth=1, zorder=1
            )
            found = True
    if found:
        axes.plot([], [], color=_UNTRAINED, linestyle="--", linewidth=1, label="before training")


def _scale(axes: Axes, lines: Sequence[Values], measure: _Measure) -> None:
    if measure.log and all((values > 0).all() for values in lines):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if measure.zero:
        highest = np.percentile(np.concatenate(list(lines)), 99.5)
        axes.set_ylim(0, 1.08 * highest if highest > 0 else 1)
    elif measure.noisy:
        leave_out_outliers(axes, lines)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useOffset=False)


def _add_legend(axes: Axes) -> None:
    """A legend where there is more than one line to name."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=7.5, handlelength=1.4, borderaxespad=0.2)


def _legend(name: str) -> str:
    """A run's name, cut where it is long; matplotlib leaves out what begins with an underscore."""
    name = "".join(letter if letter.isprintable() else "�" for letter in name)  # a control letter is not XML
    name = name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"
    return f" {name}" if name.startswith("_") else name


def _points(rows: Sequence[Row], x: str, y: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and y of the rows that have both as finite numbers; hours where x is `elapsed_s`."""
    pairs = [(row[x], row[y]) for row in rows if _is_number(row.get(x)) and _is_number(row.get(y))]
    both = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    both = both[np.isfinite(both).all(axis=1)]
    return both[:, 0] / (3600.0 if x == "elapsed_s" else 1.0), both[:, 1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _svg(figure: Figure, name: str) -> bytes:
    """The figure as SVG without reference to anything outside, whose colours follow the reader's screen."""
    held = io.StringIO()
    with rc_context({"svg.hashsalt": name}), catch_warnings():
        simplefilter("ignore", UserWarning)  # a letter that matplotlib's own typeface lacks; the reader's may have it
        FigureCanvasSVG(figure).print_svg(held, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = held.getvalue()
    text = text[text.index("<svg") :]  # without a document type, which names an address
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    for colour, (role, _, _) in _ROLES.items():
        text = text.replace(colour, f"var({role})")
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, 'DejaVu Sans', sans-serif", text)
    light, dark = (";".join(f"{each[0]}:{each[side]}" for each in _ROLES.values()) for side in (1, 2))
    style = f"<style>svg{{{light}}}@media (prefers-color-scheme: dark){{svg{{{dark}}}}}</style>"
    head, rest = text.split(">", 1)
    return f"{head}>{style}{rest}".encode()
