"""Claims about which cells a study has and when they can run."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lomar.methods.recipes import RATIOS, RECIPES
from lomar.options import PretrainOptions, fields_of, studying
from lomar.study.grids import STUDIES, Entry, Sizes
from lomar.study.plan import Cell, Job, Plan, canonical, chosen_entries

PAPER = Sizes(224, 16, 12)
SMALL = Sizes(56, 4, 6)


def plan(*entries: Entry, rates: tuple[float, ...] = (1e-3, 2e-3), seeds: tuple[int, ...] = (0, 1)) -> Plan:
    return Plan(entries, SMALL, 8, rates, seeds)


def run_all(study: Plan, held_out: Any = lambda cell: 0.5, speed: Any = lambda cell: 100.0) -> dict[str, Any]:
    """What is known when everything that can run has run: scores and speeds are functions of the cell."""
    found: dict[str, Any] = {}
    while True:
        before = len(found)
        for job in list(study.jobs(found)):
            found[job.cell.name] = {
                "pretraining": {"images_per_s": speed(job.cell)},
                "probe": {"held_out": held_out(job.cell)},
            }
        if len(found) == before:
            return found


def test_the_names_offered_are_the_studies() -> None:
    assert list(STUDIES) == list(studying.STUDIES)


@pytest.mark.parametrize("sizes", [PAPER, SMALL, Sizes(112, 8, 12)], ids=str)
@pytest.mark.parametrize("name", STUDIES)
def test_rows_have_names_of_their_own_and_refer_to_earlier_rows(name: str, sizes: Sizes) -> None:
    entries = STUDIES[name].entries(sizes)
    seen: list[str] = []
    for entry in entries:
        assert entry.name not in seen
        assert {entry.as_long_as, entry.rate_of} - {""} <= set(seen)
        assert entry.method in ("", *RECIPES)
        assert set(entry.changes) <= set(fields_of(PretrainOptions))
        seen.append(entry.name)


def test_the_paper_s_table_has_each_method_at_equal_epochs_and_at_mae_s_time() -> None:
    entries = STUDIES["table1"].entries(PAPER)
    assert [entry.method for entry in entries if not entry.as_long_as] == [
        *("", "mae", "beit", "lomar", "lomar", "lomar-late", "dino", "mocov3")
    ]
    assert {entry.rate_of for entry in entries if entry.as_long_as == "mae"} == {
        *("beit", "lomar", "lomar-small-patches", "lomar-late", "dino", "mocov3")
    }
    assert next(e for e in entries if e.name == "lomar-small-patches").changes == {"patch_size": 8}


def test_resolutions_are_to_the_study_s_as_384_and_448_to_224() -> None:
    entries = [entry for entry in STUDIES["fig4"].entries(SMALL) if entry.method == "lomar"]
    assert [(e.changes["image_size"], e.changes["views"]) for e in entries] == [(56, 4), (96, 6), (112, 9)]
    assert all("views" not in e.changes for e in STUDIES["fig4"].entries(SMALL) if e.method == "mae")


def test_ratios_windows_and_layers_are_the_papers() -> None:
    assert [entry.changes["mask_ratio"] for entry in STUDIES["fig6"].entries(PAPER)] == list(RATIOS)
    assert {int(entry.at) for entry in STUDIES["fig5"].entries(PAPER)} == {5, 7, 9, 11, 14}
    assert {entry.changes["mask_layer"] for entry in STUDIES["late"].entries(PAPER)} == {0, 6, 8, 10, 11}
    assert {entry.changes["mask_layer"] for entry in STUDIES["late"].entries(SMALL)} == {0, 3, 4, 5}


def test_the_first_seed_runs_every_rate_and_the_others_the_best_by_what_is_held_out() -> None:
    study = plan(Entry("mae", "mae"))
    assert [(job.cell.base_lr, job.cell.seed, job.chosen) for job in study.jobs({})] == [
        (1e-3, 0, False),
        (2e-3, 0, False),
    ]
    found = run_all(study, held_out=lambda cell: cell.base_lr)
    assert {(job.cell.base_lr, job.cell.seed) for job in study.jobs(found) if job.chosen} == {(2e-3, 0), (2e-3, 1)}
    assert study.at_edge(study.entries[0], found)


def test_a_rate_is_not_chosen_before_all_are_known() -> None:
    study = plan(Entry("mae", "mae"))
    first = next(iter(study.jobs({}))).cell
    found = {first.name: {"probe": {"held_out": 0.9}}}
    assert study.rate(study.entries[0], found) is None
    assert not any(job.chosen for job in study.jobs(found))


def test_one_rate_is_not_swept_and_none_has_no_rate() -> None:
    study = plan(Entry("none", ""), Entry("mae", "mae"), rates=(1e-3,))
    assert all(job.chosen for job in study.jobs({}))
    assert [job.cell.name for job in study.jobs({})] == [
        "none,seed=0",
        "mae,epochs=8,lr=0.001,seed=0",
        "none,seed=1",
        "mae,epochs=8,lr=0.001,seed=1",
    ]
    assert not study.at_edge(study.entries[1], {})


def test_equal_time_is_as_many_epochs_as_the_speeds_of_the_first_seed_allow() -> None:
    study = plan(
        Entry("mae", "mae"), Entry("late", "lomar-late"), Entry("long", "lomar-late", as_long_as="mae", rate_of="late")
    )
    found = run_all(
        study,
        held_out=lambda cell: -cell.base_lr,
        speed=lambda cell: 1e9 if cell.seed else 320.0 if cell.method == "lomar-late" else 100.0,
    )
    assert study.length(study.entries[2], found) == 25.6
    assert "lomar-late,epochs=25.6,lr=0.001,seed=1" in found
    assert len(found) == 4 + 2 + 2  # two sweeps of two, a second seed of each, and the long row without a sweep


def test_equal_time_waits_for_what_it_is_measured_by() -> None:
    study = plan(Entry("mae", "mae"), Entry("long", "lomar", as_long_as="mae", rate_of="mae"))
    assert study.cell(study.entries[1], 0, {}) is None


@given(scores=st.lists(st.floats(0, 1), min_size=3, max_size=3), seed_scores=st.floats(0, 1))
def test_what_later_seeds_find_changes_no_cell(scores: list[float], seed_scores: float) -> None:
    rates = (1e-3, 2e-3, 4e-3)
    study = plan(Entry("mae", "mae"), Entry("lomar", "lomar", rate_of="mae"), rates=rates)
    by_rate = dict(zip(rates, scores, strict=True))
    found = run_all(study, held_out=lambda cell: seed_scores if cell.seed else by_rate[cell.base_lr])
    chosen = {job.cell.base_lr for job in study.jobs(found) if job.chosen}
    assert len(chosen) == 1 and by_rate[chosen.pop()] == max(scores)


def test_the_same_method_has_the_same_cell_in_every_study() -> None:
    assert canonical("lomar", {"mask_layer": 10, "predict_share": 0.5}, PAPER) == ("lomar-late", {})
    assert canonical("lomar", {"mask_layer": 5, "predict_share": 0.5}, SMALL) == ("lomar-late", {})
    assert canonical("lomar", {"mask_layer": 0, "predict_share": 1.0}, SMALL) == ("lomar", {})
    assert canonical("lomar", {"mask_layer": 4, "predict_share": 1.0}, SMALL) == ("lomar", {"mask_layer": 4})
    assert canonical("lomar", {"image_size": 56, "views": 4}, SMALL) == ("lomar", {})
    assert canonical("fig6-80", {}, SMALL) == ("lomar", {})
    assert canonical("dino", {"local_crops": 8}, SMALL) == ("dino", {})
    assert canonical("dino", {"local_crops": 4}, SMALL) == ("dino", {"local_crops": 4})
    assert canonical("mocov3", {}, SMALL) == ("mocov3", {})


def test_names_tell_all_that_a_cell_depends_on() -> None:
    cell = Cell("lomar", (("mask_layer", 4), ("predict_share", 0.5)), 25.6, 0.004, 7)
    assert cell.name == "lomar,mask_layer=4,predict_share=0.5,epochs=25.6,lr=0.004,seed=7"


def test_asking_for_a_row_brings_those_it_refers_to() -> None:
    entries = STUDIES["table1"].entries(SMALL)
    names = [entry.name for entry in chosen_entries(entries, ["lomar-late, mae's time"])]
    assert names == ["mae", "lomar-late", "lomar-late, mae's time"]


def test_rates_are_chosen_before_the_first_whole_row_runs() -> None:
    study = plan(Entry("mae", "mae"), Entry("lomar", "lomar"))
    found = {job.cell.name: {"probe": {"held_out": 0.1}} for job in study.jobs({})}
    jobs: list[Job] = list(study.jobs(found))
    assert [job.chosen for job in jobs] == [False] * 4 + [True] * 4
    assert [job.cell.seed for job in jobs[4:]] == [0, 0, 1, 1]
