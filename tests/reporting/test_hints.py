"""Claims about hints: for each, rows that lead to it and rows that just do not."""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from runs_made import CONFIG, FINETUNE, VIEWS, Row, course, judged, make_run

from lomar.reporting import hints
from lomar.reporting.hints import Hint, hints_on
from lomar.reporting.reading import RunRecord, read_run

Reader = Callable[..., RunRecord]


@pytest.fixture
def run(tmp_path: Path) -> Reader:
    """Reads a run written by hand."""

    def read(rows: Sequence[Row] = (), config: Row = CONFIG, **parts: str) -> RunRecord:
        return read_run(make_run(tmp_path / "run", rows, config, **parts))

    return read


def only(found: list[Hint]) -> Hint:
    (hint,) = found
    return hint


def test_a_quiet_run_has_none(run: Reader) -> None:
    assert hints_on(run(judged([0.35, 0.38, 0.41, 0.445, 0.45, 0.454]))) == []


def test_a_run_that_has_just_begun_has_none(run: Reader) -> None:
    assert hints_on(run()) == []
    assert hints_on(run([{"step": 0, "epoch": 0.0, "elapsed_s": 0.0, "knn_top1": 0.3}])) == []


def test_the_worst_comes_first(run: Reader) -> None:
    rows = judged([0.3, 0.3, 0.3, 0.29])
    for row in rows[1:]:
        row["data_wait"], row["loss"] = 0.3, 1.0
    severities = [hint.severity for hint in hints_on(run(rows))]
    assert severities == sorted(severities, key=hints.SEVERITIES.index) and {"problem", "advice"} <= set(severities)


@pytest.mark.parametrize(
    ("wait", "severity"), [(0.19, None), (0.21, "advice"), (0.39, "advice"), (0.41, "problem"), (1.0, "problem")]
)
def test_waiting_for_data(run: Reader, wait: float, severity: str | None) -> None:
    found = hints.waiting(run(course(data_wait=wait)))
    assert [hint.severity for hint in found] == ([severity] if severity else [])
    if found:
        assert f"{wait:.0%} of the time" in found[0].text and "--workers (now 2)" in found[0].text
        assert "lomar prepare" in found[0].text and found[0].numbers["waiting"] == pytest.approx(wait)


def test_waiting_is_weighted_by_time_and_the_start_does_not_count(run: Reader) -> None:
    # A tenth of the steps, at the start, wait alone: workers are being started.
    assert hints.waiting(run(course(data_wait=lambda share: 0.9 if share < 0.1 else 0.1))) == []
    # Half of the steps behind it wait half of their time and take nine times as long.
    rows = course()
    for row in rows[::2]:
        row["data_wait"], row["images_per_s"] = 0.5, 100 / 9
    assert only(hints.waiting(run(rows))).numbers["waiting"] == pytest.approx((0.5 * 9 + 0.05) / 10)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.35, 0.40, 0.44, 0.46], "still rising: 44.0 % to 46.0 % in the last quarter"),
        ([0.35, 0.40, 0.44, 0.449], None),
        ([0.45, 0.45, 0.452, 0.45, 0.451, 0.455], "flat since step 33 of 200"),
        ([0.40, 0.43, 0.442, 0.446, 0.451, 0.455], None),
        ([0.40, 0.46, 0.45, 0.43], "falls: 46.0 % at step 100, 43.0 % at the last evaluation"),
        ([0.40, 0.44, 0.46, 0.45], None),
        ([0.40, 0.44, 0.50], None),  # three evaluations are no course
    ],
)
def test_the_course_of_accuracy(run: Reader, values: list[float], text: str | None) -> None:
    found = hints.quality_course(run(judged(values)))
    assert (text in only(found).text) if text else found == []


def test_a_run_that_goes_on_is_not_told_to_be_longer(run: Reader) -> None:
    rows = judged([0.35, 0.40, 0.44, 0.46])
    assert hints.quality_course(run(rows, CONFIG | {"max_steps": 500})) == []


@pytest.mark.parametrize(("key", "name"), [("top1", "validation accuracy"), ("box_ap", "box AP")])
def test_other_accuracies_have_a_course_as_well(run: Reader, key: str, name: str) -> None:
    found = hints.quality_course(run(judged([0.35, 0.40, 0.44, 0.46], key, start=None), FINETUNE))
    assert only(found).text.startswith(f"{name} is still rising")


def test_below_random_initialisation(run: Reader) -> None:
    assert only(hints.below_random(run(judged([0.31, 0.304])))).severity == "problem"
    assert hints.below_random(run(judged([0.29, 0.306]))) == []
    assert hints.below_random(run(judged([0.29], start=None))) == []
    assert hints.below_random(run(judged([0.31, 0.304]), CONFIG | {"init": "weights.pth"})) == []


def test_a_run_that_goes_on_may_be_below_random_for_a_while(run: Reader, tmp_path: Path) -> None:

    folder = make_run(tmp_path / "run", judged([0.29, 0.3]), CONFIG | {"max_steps": 500})
    (folder / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert only(hints.below_random(read_run(folder))).severity == "note"


def test_effective_rank_that_collapses(run: Reader) -> None:
    fallen = hints.collapsing_rank(run(judged([40.0, 30.0, 19.0], "effective_rank", start=20.0)))
    assert "from 40.0 to 19.0" in only(fallen).text
    assert hints.collapsing_rank(run(judged([40.0, 30.0, 21.0], "effective_rank", start=20.0))) == []
    # Random weights often have twice the rank of a run that learns.
    assert hints.collapsing_rank(run(judged([17.0, 16.0, 15.0], "effective_rank", start=40.0))) == []


def test_hints_of_one_run_do_not_contradict_each_other(run: Reader) -> None:
    texts = [hint.text for hint in hints_on(run(judged([0.3, 0.3, 0.3, 0.29])))]
    assert any("Train longer" in text for text in texts) and not any("not likely to help" in text for text in texts)
    rows = judged([0.4, 0.5, 0.55, 0.6], "top1", start=None)
    for row, loss in zip([row for row in rows if "top1" in row], (1.0, 0.9, 1.0, 1.1), strict=True):
        row["val_loss"] = loss
    texts = [hint.text for hint in hints_on(run(rows, FINETUNE))]
    assert any("Train longer" in text for text in texts) and not any("overfitting" in text for text in texts)


def test_a_run_that_goes_on_is_not_called_flat_and_its_fall_is_a_note(run: Reader, tmp_path: Path) -> None:
    assert hints.quality_course(run(judged([0.45] * 6), CONFIG | {"max_steps": 10_000})) == []
    folder = make_run(tmp_path / "run", judged([0.40, 0.46, 0.45, 0.43]), CONFIG | {"max_steps": 10_000})
    (folder / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert only(hints.quality_course(read_run(folder))).severity == "note"


def test_losses_of_classifiers_may_differ_from_batch_to_batch(run: Reader) -> None:
    rows = course(loss=lambda share: 3.0 if round(share * 200) % 7 == 0 else 1.0)
    assert hints.loss_spikes(run(rows)) and hints.loss_spikes(run(rows, FINETUNE)) == []


def test_weights_that_had_learnt_may_go_on_slowly(run: Reader) -> None:
    rows = course(300, loss=0.5)
    assert hints.flat_loss(run(rows)) and hints.flat_loss(run(rows, CONFIG | {"init": "weights.pth"})) == []


def test_remedies_are_options_of_the_command(run: Reader) -> None:
    from dataclasses import fields
    from re import findall

    from lomar.reporting.reading import KINDS

    rows = judged([0.40, 0.46, 0.45, 0.30], "box_ap", start=None)
    config = {each.name: None for each in fields(KINDS["detect"])} | {"batch_size": 50, "max_steps": 200}
    found = run(rows, config)
    assert found.kind == "detect"
    named = {name for hint in hints_on(found) for name in findall(r"--([a-z-]+)", hint.text)}
    assert named == {"lr"}


def test_loss_spikes(run: Reader) -> None:
    rows = course(loss=1.0)
    rows[150]["loss"], rows[5]["loss"] = 1.49, 9.0  # just no spike; one at the start
    assert hints.loss_spikes(run(rows)) == []
    rows[150]["loss"] = 1.6
    assert (
        "One step has a loss far above its neighbours', the highest 1.6 times at step 151"
        in only(hints.loss_spikes(run(rows))).text
    )
    rows[160]["loss"] = 2.5
    assert only(hints.loss_spikes(run(rows))).text.startswith("2 steps have a loss far above their neighbours'")


def test_losses_that_were_not_finite(run: Reader) -> None:
    said = "2026-01-02 04:05:00  INFO     the loss is not finite at step 7; its batch holds a.png; back to step 5\n"
    assert "not finite once (the loss is not finite at step 7" in only(hints.not_finite(run(course(), log=said))).text
    assert "2 times" in only(hints.not_finite(run(course(), log=said * 2))).text
    rows = course()
    rows[6]["loss"] = None
    assert "at step 7" in only(hints.not_finite(run(rows, log="x"))).text


def course_of_views(steps: int = 300, **values: Any) -> list[Row]:
    return course(steps, **{"feature_deviation": 0.5, "output_entropy": 3.0, "loss": 2.0} | values)


def test_a_quiet_run_that_compares_views_has_none(run: Reader) -> None:
    """Its loss need not fall, may jump, and each tensor's gradient is clipped alone."""
    rows = course_of_views(grad_norm=50.0)
    rows[200]["loss"] = 9.0
    assert hints_on(run(rows, VIEWS)) == []
    masked = CONFIG | {"max_steps": 300}
    assert {"flat_loss", "loss_spikes", "always_clipped"} == {
        rule.__name__ for rule in (hints.flat_loss, hints.loss_spikes, hints.always_clipped) if rule(run(rows, masked))
    }


@pytest.mark.parametrize(
    ("deviation", "entropy", "there"),
    [(0.049, 3.0, True), (0.051, 3.0, False), (0.5, 0.009, True), (0.5, 0.011, False)],
)
def test_a_collapse(run: Reader, deviation: float, entropy: float, there: bool) -> None:
    ends = {
        "feature_deviation": lambda share: 0.5 if share < 0.85 else deviation,
        "output_entropy": lambda share: 3.0 if share < 0.85 else entropy,
    }
    found = hints.collapsed(run(course_of_views(**ends), VIEWS))
    assert [hint.severity for hint in found] == ["problem"] * there
    if there:
        assert "over the last 30 steps" in found[0].text and "(--base-lr)" in found[0].text


def test_a_collapse_is_not_told_of_the_first_epoch_nor_of_one_that_was_left(run: Reader) -> None:
    assert hints.collapsed(run(course_of_views(99, feature_deviation=0.01), VIEWS)) == []  # 100 steps are an epoch
    left = course_of_views(feature_deviation=lambda share: 0.01 if share < 0.85 else 0.3)
    assert hints.collapsed(run(left, VIEWS)) == []


def test_gradients_that_are_always_clipped(run: Reader) -> None:
    rows = course(grad_norm=4.0)
    found = only(hints.always_clipped(run(rows)))
    assert "100% of the steps" in found.text and "--clip-grad is 3" in found.text
    assert hints.always_clipped(run(rows, CONFIG | {"clip_grad": 0.0})) == []
    for row in rows[40::8]:
        row["grad_norm"] = 2.0  # an eighth of them are not
    assert hints.always_clipped(run(rows)) == []


def test_a_run_that_was_interrupted_with_a_high_rate(run: Reader) -> None:
    config = CONFIG | {"max_steps": 400}
    found = only(hints.ended_early(run(course(lr=lambda share: 1e-3 * (1 - share / 2)), config)))
    assert "step 200 of 400, with the learning rate at 50% of its highest" in found.text and "--resume" in found.text
    assert hints.ended_early(run(course(lr=lambda share: 1e-3 * (1 - 0.95 * share)), config)) == []
    assert hints.ended_early(run(course(lr=1e-3))) == []  # finished


def test_few_images_and_many_epochs(run: Reader) -> None:
    def of(images: int, epochs: float) -> list[Hint]:
        steps = round(epochs * images / 50)
        return hints.few_images(run([{"step": steps, "epoch": epochs, "loss": 1.0}], CONFIG | {"max_steps": steps}))

    assert "1,900 images, each seen 100 times" in only(of(1900, 100.0)).text
    assert of(2000, 100.0) == [] and of(1900, 0.5) == []
    assert "1,700 times" in only(of(5000, 1700.0)).text
    assert of(5000, 1600.0) == []


@pytest.mark.parametrize(("count", "severity"), [(49, None), (50, "advice"), (499, "advice"), (500, "problem")])
def test_bad_files(run: Reader, count: int, severity: str | None) -> None:
    bad = "".join(f"{number}.png\tcut short\n" for number in range(count))
    found = hints.bad_files(run(course(), bad=bad))
    assert [hint.severity for hint in found] == ([severity] if severity else [])


def test_throughput_that_drops(run: Reader) -> None:
    def dropped(to: float) -> Any:
        return run(course(images_per_s=lambda share: 100.0 if share < 0.6 else to))

    assert "100 images a second in the second quarter, 69 in the last" in only(hints.slowed(dropped(69.0))).text
    assert hints.slowed(dropped(71.0)) == []


def test_memory_of_a_gpu_that_is_little_used(run: Reader) -> None:
    assert (
        "At most 49%" in only(hints.spare_memory(run(course(gpu_memory=lambda share: 0.49 * min(1, 2 * share))))).text
    )
    assert hints.spare_memory(run(course(gpu_memory=0.51))) == []
    assert hints.spare_memory(run(course())) == []


def test_a_loss_that_is_flat_from_the_start(run: Reader) -> None:
    assert only(hints.flat_loss(run(course(loss=lambda share: 1 - 0.015 * share)))).severity == "problem"
    assert hints.flat_loss(run(course(loss=lambda share: 1 - 0.03 * share))) == []
    assert hints.flat_loss(run(course(loss=1.0), FINETUNE)) == []  # of labels, which a low rate may learn slowly
    assert hints.flat_loss(run(course(150, loss=1.0))) == []


def test_a_validation_loss_that_rises(run: Reader) -> None:
    assert (
        "0.9 at step 100, 1 at the end"
        in only(hints.overfitted(run(judged([1.2, 0.9, 0.95, 1.0], "val_loss", start=None), FINETUNE))).text
    )
    assert hints.overfitted(run(judged([1.2, 0.9, 0.95, 0.98], "val_loss", start=None), FINETUNE)) == []


def test_every_hint_says_what_to_do_or_what_it_means_in_a_sentence_or_two(run: Reader) -> None:
    rows = judged([0.3, 0.3, 0.3, 0.29])
    for row in rows[1:]:
        row |= {"data_wait": 0.5, "loss": 1.0, "grad_norm": 5.0, "gpu_memory": 0.1}
    found = hints_on(run(rows, bad="a\tb\n" * 1))
    assert len(found) >= 4
    for hint in found:
        assert hint.numbers and hint.text.endswith((".", "'")) and len(hint.text) < 300, hint
