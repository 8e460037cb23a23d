"""Time and memory against the size of the image (the paper's Figure 4) and of the window (its Figure 5, right)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, NullLocator

from lomar.figures.curves import COLOURS, STYLE, save_figure

IMAGENET_IMAGES = 1_281_167
EPOCHS_OF_FIGURE_4, EPOCHS_OF_FIGURE_5 = 300, 400
_MARKERS = "osD^vP*"

Row = Mapping[str, Any]


def against_image_size(rows: Sequence[Row], path: Path) -> None:
    """Writes time and peak memory per image against the side of the image, one curve for each name, as PNG.

    Args:
        rows: name, image_px, s_per_image, peak_bytes_per_image; a row without a time is left out.
        path: the PNG, replaced atomically.

    Raises:
        ValueError: no row has a time.
    """
    rows = _timed(rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(10.8, 4.2), dpi=150, layout="constrained")
        time, memory = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
        _draw(time, rows, "image_px", "s_per_image", 1e3)
        time.set_ylabel("training step, ms an image")
        _hours(time, EPOCHS_OF_FIGURE_4)
        _draw(memory, rows, "image_px", "peak_bytes_per_image", 1e-6)
        memory.set_ylabel("peak memory, MB an image")
        for axes in (time, memory):
            axes.set_xlabel("side of the image (px)")
            axes.legend()
        save_figure(figure, path)


def against_window_size(rows: Sequence[Row], path: Path) -> None:
    """Writes time per image against the side of the window, one curve for each method, as PNG.

    Args:
        rows: method, compiled, window, views, s_per_image; a row without a time is left out.
        path: the PNG, replaced atomically.

    Raises:
        ValueError: no row has a time.
    """
    rows = _timed(rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
        axes = figure.add_subplot(1, 1, 1)
        _draw(axes, rows, "window", "s_per_image", 1e3)
        axes.set_yscale("linear")
        axes.yaxis.set_major_locator(AutoLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0)
        views: dict[int, dict[int, None]] = {}  # several where there are images of several sizes
        for row in rows:
            views.setdefault(row["window"], {})[row["views"]] = None
        axes.set_xticks(list(views), [f"{side}x{side}\n{', '.join(map(str, of))}" for side, of in views.items()])
        axes.set_ylabel("training step, ms an image")
        axes.set_xlabel("window (patches); windows per image")
        _hours(axes, EPOCHS_OF_FIGURE_5)
        axes.legend()
        save_figure(figure, path)


def _timed(rows: Sequence[Row]) -> list[Row]:
    timed = [row for row in rows if row.get("s_per_image")]
    if not timed:
        raise ValueError("no row has a time")
    return timed


def _draw(axes: Axes, rows: Sequence[Row], x: str, y: str, factor: float) -> None:
    """A curve of each name's rows that have y, in order of x, on a logarithmic axis with plain numbers."""
    rows = [row for row in rows if row.get(y)]
    for number, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        points = sorted((row[x], factor * row[y]) for row in rows if row["name"] == name)
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[number % len(COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            label=name,
        )
    axes.set_xticks(sorted({row[x] for row in rows}))
    axes.set_yscale("log")
    values = [factor * row[y] for row in rows] or [1.0]
    axes.set_ylim(min(values) / 1.25, max(values) * 1.25)
    _plain_ticks(axes, *axes.get_ylim())


def _plain_ticks(axes: Any, low: float, high: float) -> None:
    """Round numbers on a logarithmic axis that goes from `low` to `high`, three at least if that can be."""
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8)):
        ticks = [digit * 10.0**power for power in range(-9, 12) for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 2:
            break
    axes.set_yticks(ticks, [f"{float(f'{tick:.3g}'):g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def _hours(axes: Axes, epochs: int) -> None:
    """A second scale: what so many epochs of ImageNet-1K would take at the same rate."""
    per_ms = epochs * IMAGENET_IMAGES / 1e3 / 3600

    def to_hours(ms: Any) -> Any:
        return ms * per_ms

    def to_ms(hours: Any) -> Any:
        return hours / per_ms

    second = axes.secondary_yaxis("right", functions=(to_hours, to_ms))
    second.spines["right"].set_visible(True)
    second.set_ylabel(f"hours for {epochs} epochs of ImageNet-1K")
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        _plain_ticks(second, low * per_ms, high * per_ms)
    else:
        second.yaxis.set_major_formatter("{x:g}")
