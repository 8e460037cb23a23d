"""Claims about learning curves, read off the axes before they are drawn."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lomar.figures import curves
from lomar.figures.curves import compare_curves, learning_curves


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = curves.save_figure

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(curves, "save_figure", keep)
    return figures


def run(steps: int = 160, untrained: float = 0.35, **evaluation: float) -> list[dict[str, Any]]:
    """Rows of a run that is evaluated at the start, halfway and at the end."""
    rows: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "elapsed_s": 0.0, "knn_top1": untrained}]
    for step in range(1, steps + 1):
        clock = {"epoch": 10 * step / steps, "elapsed_s": 7200.0 * step / steps}
        loss = math.exp(-step / steps) + 0.01 * (-1) ** step
        rows.append({"step": step, **clock, "loss": loss, "lr": 1e-4, "grad_norm": 0.5})
        if step % (steps // 2) == 0:
            rows.append({"step": step, **clock, "knn_top1": untrained + 0.1 * step / steps, **evaluation})
    return rows


def by_label(figure: Figure) -> dict[str, Axes]:
    return {axes.get_ylabel(): axes for axes in figure.axes}


def line(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [each for each in axes.lines if each.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def levels(axes: Axes) -> list[float]:
    """Heights of the dashed lines that cross the axes."""
    return [float(each.get_ydata()[0]) for each in axes.lines if each.get_linestyle() == "--" and len(each.get_xdata())]


def test_one_run_has_a_labelled_panel_for_each_thing_it_recorded(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "curves.png"
    learning_curves(run(), path)
    axes = by_label(drawn[0])
    assert list(axes) == ["loss", "learning rate", "gradient norm", "k-NN top-1 accuracy (%)"]
    assert {each.get_xlabel() for each in axes.values()} == {"optimiser step"}
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 800
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_what_tells_a_collapse_has_panels_from_zero(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [row | ({"feature_deviation": 0.4, "output_entropy": 2.5} if "loss" in row else {}) for row in run()]
    learning_curves(rows, tmp_path / "curves.png")
    axes = by_label(drawn[0])
    assert list(axes)[4:] == ["deviation of features (of 1)", "entropy of outputs (nats)"]
    assert all(each.get_ylim()[0] == 0 for each in list(axes.values())[4:])


def test_the_smoothed_loss_is_a_centred_mean_of_the_raw_one(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = run(steps=160)
    learning_curves(rows, tmp_path / "curves.png")
    raw = [row["loss"] for row in rows if "loss" in row]
    steps, shown = line(by_label(drawn[0])["loss"], "mean over 5 steps")
    assert steps == list(range(1, 161))
    assert shown[50] == pytest.approx(np.mean(raw[48:53]))
    assert shown[0] == pytest.approx(np.mean(raw[:3]))
    assert line(by_label(drawn[0])["loss"], "each step")[1] == raw


def test_the_random_initialisation_is_a_dashed_line_at_step_0s_value(tmp_path: Path, drawn: list[Figure]) -> None:
    learning_curves(run(untrained=0.35), tmp_path / "curves.png")
    quality = by_label(drawn[0])["k-NN top-1 accuracy (%)"]
    assert levels(quality) == [pytest.approx(35)]
    assert "random initialisation" in [text.get_text() for text in quality.get_legend().get_texts()]
    steps, accuracy = line(quality, "this run")
    assert steps == [0, 80, 160] and accuracy == pytest.approx([35, 40, 45])


def test_without_labels_the_effective_rank_is_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [{"step": 0, "effective_rank": 11.0}, {"step": 5, "loss": 1.0}, {"step": 5, "effective_rank": 17.0}]
    learning_curves(rows, tmp_path / "curves.png")
    axes = by_label(drawn[0])
    assert list(axes) == ["loss", "effective rank of the features"]
    assert levels(axes["effective rank of the features"]) == [11]


def test_a_loss_that_was_not_a_number_leaves_a_hole(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.5}]
    learning_curves(rows, tmp_path / "curves.png")
    assert line(by_label(drawn[0])["loss"], "each step") == ([1, 3], [1.0, 0.5])


@pytest.mark.parametrize("rows", [[], [{"step": 1, "images_per_s": 3.0}]])
def test_nothing_to_draw_is_an_error_and_leaves_no_file(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="no row"):
        learning_curves(rows, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="no row"):
        compare_curves({"run": rows}, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_runs_are_compared_by_epoch_and_by_hour(tmp_path: Path, drawn: list[Figure]) -> None:
    compare_curves({"late masks": run(untrained=0.35), "paper": run(untrained=0.31)}, tmp_path / "both.png")
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in drawn[0].axes]
    loss, quality = "loss (smoothed)", "k-NN top-1 accuracy (%)"
    hours = "elapsed time (hours)"
    assert labels == [("epoch", loss), ("epoch", quality), (hours, loss), (hours, quality)]
    assert line(drawn[0].axes[1], "paper")[0] == [0, 5, 10]
    assert line(drawn[0].axes[3], "paper")[0] == [0, 1, 2]
    for axes in (drawn[0].axes[1], drawn[0].axes[3]):
        assert levels(axes) == [pytest.approx(35), pytest.approx(31)]


def test_without_elapsed_time_in_every_run_the_hours_are_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    untimed = [{key: value for key, value in row.items() if key != "elapsed_s"} for row in run()]
    compare_curves({"timed": run(), "untimed": untimed}, tmp_path / "both.png")
    assert [axes.get_xlabel() for axes in drawn[0].axes] == ["epoch", "epoch"]


def test_a_figure_leaves_matplotlibs_settings_as_they_were(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    learning_curves(run(), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before
