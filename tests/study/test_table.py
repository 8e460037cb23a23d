"""Claims about a study's table: means, deviations, and what is not known yet."""

from typing import Any

import pytest

from lomar.commands.tables import aligned
from lomar.study.grids import Entry, Sizes
from lomar.study.plan import Plan
from lomar.study.table import Spread, cells, rows, spread, values

PLAN = Plan([Entry("none", ""), Entry("mae", "mae"), Entry("lomar", "lomar")], Sizes(56, 8, 3), 2, (1e-3, 2e-3), (0, 1))


def judged(top1: float, layer: int, **pretraining: Any) -> dict[str, Any]:
    found: dict[str, Any] = {name: {"top1": top1} for name in ("knn", "probe", "finetuned")}
    found["probe"] |= {"held_out": top1, "layer": layer}
    return found | ({"pretraining": pretraining} if pretraining else {})


FOUND = {
    "none,seed=0": judged(0.3, 2),
    "mae,epochs=2,lr=0.001,seed=0": judged(
        0.40, 3, minutes=10.0, images_per_s=50.0, peak_bytes=1e9, flops_of_image=2e6
    ),
    "mae,epochs=2,lr=0.002,seed=0": {"probe": {"held_out": 0.2}},
    "mae,epochs=2,lr=0.001,seed=1": judged(
        0.44, 2, minutes=12.0, images_per_s=70.0, peak_bytes=3e9, flops_of_image=2e6
    ),
    "lomar,epochs=2,lr=0.001,seed=0": {"probe": {"held_out": 0.9}},
}


def test_a_spread_is_mean_and_standard_deviation_of_a_sample() -> None:
    assert spread([1.0, 3.0]) == Spread(2.0, pytest.approx(2**0.5))
    assert spread([5.0]) == Spread(5.0, None)
    assert Spread(2, 0.25).text("{:.1f}") == "2.0 (0.2)" and Spread(5, None).text("{:.1f}") == "5.0"


def test_a_row_has_the_mean_over_seeds_the_blocks_that_were_chosen_and_what_it_cost() -> None:
    none, mae, lomar = rows(PLAN, FOUND)
    assert mae.accuracy["knn"].mean == pytest.approx(0.42) and mae.seeds == 2 and mae.layers == [3, 2]
    assert (mae.base_lr, mae.at_edge, mae.epochs) == (1e-3, True, 2)
    assert (mae.minutes, mae.images_per_s, mae.peak_bytes) == (11, 60, 2e9)
    assert (none.base_lr, none.epochs, none.minutes, none.accuracy["probe"].deviation) == (None, None, None, None)
    assert lomar.seeds == 0 and lomar.accuracy == {} and lomar.base_lr is None


def test_a_run_that_diverged_is_named_and_not_averaged() -> None:
    found = FOUND | {"mae,epochs=2,lr=0.002,seed=0": {"pretraining": {"diverged": True}}}
    mae = rows(PLAN, found)[1]
    assert mae.diverged == [2e-3] and mae.base_lr == 1e-3 and mae.seeds == 2
    name = "mae,epochs=2,lr=0.001,seed=1"
    halved = found | {name: {**FOUND[name], "pretraining": {**FOUND[name]["pretraining"], "diverged": True}}}
    assert rows(PLAN, halved)[1].seeds == 1


def test_the_table_says_what_is_not_known_and_what_was_at_the_edge_of_the_sweep() -> None:
    lines = aligned(cells(rows(PLAN, FOUND)))
    assert len({len(line) for line in lines}) == 1
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert table[3][:8] == ["mae", "0.001 *", "2", "2", "42.0 (2.8)", "42.0 (2.8)", "42.0 (2.8)", "3, 2"]
    assert table[2][4] == "30.0" and table[4][4:8] == ["-", "-", "-", "-"]
    assert table[3][8:] == ["11.0", "60", "2.00", "2"]


def test_the_same_stands_in_the_json() -> None:
    found = values(rows(PLAN, FOUND)[1])
    assert found["accuracy"]["finetuned"]["mean"] == pytest.approx(0.42)
    assert found["best_rate_at_edge"] and found["layers"] == [3, 2] and found["pretraining_minutes"] == 11
