"""A confusion matrix as a picture."""

from collections.abc import Sequence
from pathlib import Path
from warnings import catch_warnings, simplefilter

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lomar.figures.curves import save_figure

MOST = 40  # classes that can be told apart in one picture
NUMBERED = 25  # of which each cell has its number
_TYPEFACES = (  # for names in other scripts, where they are installed
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Source Han Sans SC", "Microsoft YaHei"),
    *("Hiragino Sans", "Malgun Gothic", "Arial Unicode MS", "Noto Sans Devanagari", "Noto Sans Arabic"),
)


def confusion_matrix(counts: NDArray[np.integer], classes: Sequence[str], caption: str, path: Path) -> None:
    """Writes a confusion matrix as PNG: the share of each true class (row) that was taken for each class (column).

    Of more than 40 classes, those that are confused most are shown.

    Args:
        counts: images, (classes, classes).
        classes: their names.
        caption: below the picture.
        path: the PNG, replaced atomically.
    """
    totals = counts.sum(axis=1)
    if len(classes) > MOST:
        wrong = counts - np.diag(np.diag(counts))
        worst = np.sort(np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:MOST])
        caption = f"The {MOST} of {len(classes)} classes that are confused most. {caption}"
        counts, totals, classes = counts[np.ix_(worst, worst)], totals[worst], [classes[i] for i in worst]
    shares = counts / np.maximum(totals, 1)[:, None]
    count = len(classes)
    side = 1.8 + max(3.0, 0.42 * count)
    # A name may hold a "$", and letters that matplotlib's own font lacks.
    with rc_context({"font.size": 9, "text.parse_math": False, "font.family": _typefaces()}), catch_warnings():
        simplefilter("ignore", UserWarning)  # a letter that no typeface here has
        figure = Figure(figsize=(side + 0.6, side), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        names = [name if len(name) <= 24 else name[:23] + "…" for name in classes]
        axes.set_xticks(range(count), names, rotation=90 if count > 6 else 30, ha="center" if count > 6 else "right")
        axes.set_yticks(range(count), [f"{name} ({total})" for name, total in zip(names, totals, strict=True)])
        axes.set_xlabel("predicted")
        axes.set_ylabel("true class (images)")
        if count <= NUMBERED:
            for row, column in np.argwhere(counts > 0):
                share = shares[row, column]
                colour = "white" if share > 0.55 else "#222222"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7.5)
        bar = figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02)
        bar.set_label("share of the true class")
        figure.supxlabel(caption, fontsize=8.5, color="#444444", wrap=True)
        save_figure(figure, path)


def _typefaces() -> list[str]:
    """Matplotlib's own and those installed that have more letters; it takes each letter from the first that has it."""
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in _TYPEFACES if name in installed)]
