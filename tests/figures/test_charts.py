"""Claims about the charts of a page: whole in themselves, small, and what can be read off them."""

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from runs_made import course, judged

from lomar.figures.charts import MOST_POINTS, Chart, binned, charts_of, distance_chart


def by_key(charts: list[Chart]) -> dict[str, Chart]:
    return {chart.key: chart for chart in charts}


def words(chart: Chart) -> list[str]:
    """All text in a chart; it must be XML."""
    return [text for each in ElementTree.fromstring(chart.svg).iter() if (text := (each.text or "").strip())]


def test_each_measure_that_rows_hold_has_a_chart_in_a_fixed_order() -> None:
    charts = charts_of({"run": judged([0.4, 0.5])})
    assert [chart.key for chart in charts] == ["knn_top1", "loss", "lr", "grad_norm", "images_per_s", "data_wait"]
    assert "before training" in words(charts[0]) and "step" in words(charts[0])
    assert charts[0].alt == "Curve of k-NN top-1 accuracy (%) against steps. run: 30 at first, 50 at last."


def test_what_tells_a_collapse_stands_behind_the_loss() -> None:
    charts = charts_of({"run": course(feature_deviation=0.5, output_entropy=3.0)})
    assert [chart.key for chart in charts][:3] == ["loss", "feature_deviation", "output_entropy"]
    assert all(chart.foreseen for chart in charts)


def test_a_measure_that_nobody_foresaw_has_a_chart_of_its_own_name() -> None:
    rows = course()
    rows[-1]["some_score"] = 3.0
    for row in rows:
        row["some_loss"] = 2.0
    charts = by_key(charts_of({"run": rows}))
    assert charts["some_score"].title == "some score" and charts["some_loss"].title == "some loss"
    assert not charts["some_score"].foreseen and charts["loss"].foreseen


def test_two_runs_share_charts_with_a_legend_against_epochs_and_time() -> None:
    charts = charts_of({"one": judged([0.4, 0.5]), "two": judged([0.3, 0.6])})
    assert {"one", "two", "epoch"} <= set(words(charts[0]))
    assert [chart.title for chart in charts[-2:]] == ["k-NN top-1 accuracy (%), over time", "loss, over time"]
    assert "hours" in words(charts[-1])
    with pytest.raises(ValueError, match="3 runs; there are 2 colours"):
        charts_of({"one": [], "two": [], "three": []})


def test_a_chart_refers_to_nothing_outside_of_itself() -> None:
    for chart in [*charts_of({"run": judged([0.4, 0.5])}), distance_chart({"run": [(1.0, 2.0), (1.5, 2.0)]})]:
        text = chart.svg.decode()
        assert "<!DOCTYPE" not in text and "metadata" not in text
        names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
        assert not re.search(r"https?:|<script|@import|url\((?!#)", names)
        assert "prefers-color-scheme: dark" in text and "var(--ink)" in text


@pytest.mark.parametrize("name", ["<script>&\"'", "$x^$", "_hidden", "\x00\x1b[1m", "a" * 90, "日本"])
def test_names_of_runs_are_text(name: str) -> None:
    rows = [{"step": step, "epoch": step, "knn_top1": 0.3} for step in range(3)]
    (chart,) = charts_of({name: rows, "two": rows})
    shown = words(chart)  # parses
    assert (
        "two" in shown and len([word for word in shown if len(word) > 30 and "--" not in word and "*" not in word]) == 0
    )
    if name in ("<script>&\"'", "$x^$", "_hidden"):
        assert name in shown


def test_rows_without_numbers_have_no_chart() -> None:
    assert charts_of({"run": []}) == []
    odd: Any = [
        {"step": 1, "loss": None},
        {"step": 2, "loss": "x"},
        {"step": 3, "loss": True},
        {"step": 4, "loss": 1e999},
    ]
    assert charts_of({"run": odd}) == []
    one = charts_of({"run": [{"step": 1, "loss": 0.5}]})
    assert [chart.key for chart in one] == ["loss"]


def test_a_long_run_makes_no_larger_charts_and_keeps_its_extremes() -> None:
    rng = np.random.default_rng(0)
    where, values = np.arange(40_013.0), rng.normal(size=40_013)
    places, low, mean, high = binned(where, values)
    assert len(places) == MOST_POINTS and (low <= mean).all() and (mean <= high).all()
    assert (low.min(), high.max()) == (values.min(), values.max())
    assert np.all(np.diff(places) > 0) and mean.mean() == pytest.approx(values.mean(), abs=0.01)
    rows = [{"step": step, "epoch": step / 10, "loss": value} for step, value in enumerate(values.tolist())]
    (chart,) = charts_of({"run": rows})
    assert len(chart.svg) < 120_000


def test_few_points_are_all_drawn() -> None:
    where = np.arange(7.0)
    for each in binned(where, where):
        assert each.tolist() == where.tolist()


def test_the_distance_of_every_layer_is_told() -> None:
    chart = distance_chart({"one": [(1.25, 2.0), (1.75, 2.0)], "two": [(0.5, 2.0)]})
    assert chart.alt.endswith("one: 1.2, 1.8; two: 0.5") or chart.alt.endswith("one: 1.3, 1.8; two: 0.5")
    assert {"one", "two", "if spread evenly", "layer"} <= set(words(chart))
