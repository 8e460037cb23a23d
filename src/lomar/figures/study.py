"""Accuracy of a study's rows: bars, or lines along what was varied."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lomar.figures.curves import COLOURS, STYLE, save_figure


@dataclass(frozen=True)
class Point:
    """A row of a study.

    Args:
        name: of the row.
        group: rows of one colour, and of one line.
        at: its place along the axis; not used for bars.
        accuracy: (mean, deviation) of each judgement by name, in per cent; deviation 0 where there is one seed.
    """

    name: str
    group: str
    at: float
    accuracy: dict[str, tuple[float, float]]


def bars(points: Sequence[Point], path: Path) -> None:
    """Writes a panel of bars for each judgement, one bar a row, as PNG.

    Args:
        points: in the order of the rows; all judged alike.
        path: the PNG, replaced atomically.

    Raises:
        ValueError: there is no point.
    """
    groups = _groups(points)
    with rc_context(STYLE):
        height = 1.7 + 0.34 * len(points)
        figure = Figure(figsize=(11.5, height), dpi=150, layout="constrained")
        panels = figure.subplots(1, len(points[0].accuracy), sharey=True, squeeze=False)[0]
        places = range(len(points))
        for axes, judgement in zip(panels, points[0].accuracy, strict=True):
            means = [point.accuracy[judgement][0] for point in points]
            errors = [point.accuracy[judgement][1] for point in points]
            colours = [groups[point.group] for point in points]
            axes.barh(places, means, xerr=errors, color=colours, height=0.7, error_kw={"capsize": 3, "lw": 1})
            reach = [mean + error for mean, error in zip(means, errors, strict=True)]
            for place, mean, end in zip(places, means, reach, strict=True):
                axes.annotate(f"{mean:.1f}", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
            axes.set_xlim(0, 1.14 * max(reach))
            axes.set_title(f"{judgement}, top-1 %")
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(places, [point.name for point in points])
        panels[0].invert_yaxis()
        if len(groups) > 1:
            patches = [Patch(color=colour, label=group) for group, colour in groups.items()]
            figure.legend(handles=patches, loc="outside lower center", ncols=len(groups))
        save_figure(figure, path)


def lines(points: Sequence[Point], along: str, path: Path) -> None:
    """Writes a panel for each judgement, one line a group, with bars of one deviation, as PNG.

    Args:
        points: all judged alike.
        along: what the horizontal axis is.
        path: the PNG, replaced atomically.

    Raises:
        ValueError: there is no point.
    """
    groups = _groups(points)
    with rc_context(STYLE):
        figure = Figure(figsize=(11.5, 3.9), dpi=150, layout="constrained")
        panels: Sequence[Axes] = figure.subplots(1, len(points[0].accuracy), squeeze=False)[0]
        for axes, judgement in zip(panels, points[0].accuracy, strict=True):
            for group, colour in groups.items():
                own = sorted((point for point in points if point.group == group), key=lambda point: point.at)
                means, errors = zip(*(point.accuracy[judgement] for point in own), strict=True)
                places = [point.at for point in own]
                axes.errorbar(places, means, errors, color=colour, marker="o", capsize=3, lw=1.5, label=group)
            axes.set_title(f"{judgement}, top-1 %")
            axes.set_xlabel(along)
            varied = sorted({point.at for point in points})
            if all(at == round(at, 2) for at in varied):  # chosen values, not measured ones
                axes.set_xticks(varied)
        if len(groups) > 1:
            panels[-1].legend()
        save_figure(figure, path)


def _groups(points: Sequence[Point]) -> dict[str, str]:
    """Group -> its colour.

    Raises:
        ValueError: there is no point.
    """
    if not points:
        raise ValueError("a study's figure needs a row that was judged")
    names = dict.fromkeys(point.group for point in points)
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
