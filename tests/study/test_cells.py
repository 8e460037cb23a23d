"""Claims about what a cell's commands are and what is kept of them: which images, which layer, what it cost."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lomar import cli
from lomar.methods.cost import step_flops
from lomar.methods.recipes import RECIPES, compose
from lomar.methods.tokenizer import DVAEEncoder
from lomar.options import PretrainOptions, read_config
from lomar.study import cells
from lomar.study.cells import CONFIG, RESULT, Setup, divergence, needs_tokenizer, result_of, steps
from lomar.study.plan import Cell, Job
from lomar.training.loop import AGAIN_NOT_FINITE, HALVED

LATE = Cell("lomar-late", (("views", 2),), 2.5, 0.004, 3)
NONE = Cell("", (), 0, 0, 3)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    hardware = {"device": "cpu", "precision": "fp32", "workers": 0}
    return Setup(tmp_path, "16x3x2", 56, 8, 4, 7.0, 16, 5, hardware, tmp_path / "tok.safetensors")


def options(words: list[str]) -> tuple[str, dict[str, Any]]:
    """A command's name, and its options as lomar reads them."""
    name, rest = cli.command_in(words)
    return name, cli.parse(name, rest)


def test_a_cell_pretrains_without_labels_and_is_judged_on_val_and_a_rate_is_chosen_by_the_probe_alone(
    setup: Setup, tmp_path: Path
) -> None:
    first = [step.name for step in steps(Job(LATE, False), setup)]
    assert first == ["pretraining", "probe"]
    setup.folder(LATE).mkdir(parents=True)
    (setup.folder(LATE) / RESULT).write_text('{"probe": {"layer": 2}}')
    pretrain, probe, knn, finetune = (options(step.words) for step in steps(Job(LATE, True), setup))
    images = tmp_path / "images"
    run = str(tmp_path / "cells" / LATE.name / "run")
    assert pretrain[0] == "pretrain" and pretrain[1]["data"] == str(images / "pretrain.txt")
    assert pretrain[1]["eval_data"] == str(images / "watch.csv") and pretrain[1]["eval_every"] == 0.5
    assert (pretrain[1]["epochs"], pretrain[1]["base_lr"], pretrain[1]["seed"], pretrain[1]["views"]) == (
        2.5,
        0.004,
        3,
        2,
    )
    assert "tokenizer" not in pretrain[1]
    for name, given in (probe, knn):
        assert given["data"] == str(images / "judge.csv") and given["model"] == run and given["seed"] == 3, name
    assert probe[0] == "probe" and probe[1]["features"] == ("pooled",)
    assert knn[0] == "knn" and knn[1]["layers"] == (2,) and knn[1]["k"] == (20,)
    assert finetune[0] == "finetune" and finetune[1]["data"] == str(images / "finetune.csv")
    assert finetune[1]["epochs"] == finetune[1]["eval_every"] == 7 and finetune[1]["batch_size"] == 16


def test_without_pretraining_random_weights_of_the_same_size_are_judged_alike(setup: Setup) -> None:
    commands = dict(options(step.words) for step in steps(Job(NONE, True), setup) if step.name != "knn")
    assert set(commands) == {"probe", "finetune"}
    for given in commands.values():
        assert (given["model"], given["image_size"], given["patch_size"]) == ("scratch:16x3x2", (56,), 8)
        assert given["seed"] == 3


def test_rows_of_tokens_are_given_the_tokenizer_and_no_other(setup: Setup) -> None:
    beit = Cell("beit", (), 1, 0.004, 0)
    _, given = options(steps(Job(beit, False), setup)[0].words)
    assert given["tokenizer"] == str(setup.tokenizer)
    assert [needs_tokenizer(name) for name in ("beit", "beit-lomar", "mae", "dino", "")] == [True, True] + [False] * 3


def test_a_run_need_not_measure_itself(setup: Setup) -> None:
    _, given = options(steps(Job(LATE, False), replace(setup, evaluations=0))[0].words)
    assert "eval_data" not in given and given["eval_every"] == 2.5


def write_config(run: Path, values: dict[str, Any]) -> None:
    """As `lomar pretrain` keeps its options."""
    run.mkdir(parents=True, exist_ok=True)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    (run / CONFIG).write_text(yaml.safe_dump(plain))


@pytest.fixture
def run(setup: Setup) -> Path:
    """A finished run of four steps of four images: 1, 1, 3 and 100 seconds, the last of which was a pause."""
    folder = setup.folder(LATE) / "run"
    values = dict(RECIPES["lomar-late"].options) | {"method": "lomar-late", "model": "16x3x2", "mask_layer": 2}
    values |= {"image_size": 56, "patch_size": 8, "batch_size": 4, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    values |= {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 1}
    values |= {"channels": 3, "pixel_type": "uint8"}
    write_config(folder, values)
    rows = [{"step": 0, "knn": 0.1}]
    rows += [
        {"step": n + 1, "images_per_s": 4 / s, "loss": 1.0 - n / 10, "data_wait": 0.1 * n, "elapsed_s": s}
        for n, s in enumerate((1, 1, 3, 100))
    ]
    rows[-1]["peak_bytes"] = 5e8
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.log").write_text("all went well\n")
    return folder


def test_time_is_that_of_all_steps_and_not_of_pauses(setup: Setup, run: Path) -> None:
    found = steps(Job(LATE, False), setup)[0].read()
    assert found["minutes"] == pytest.approx((1 + 1 + 3 + 2) / 60, abs=1e-3)  # the pause counts as a median step
    assert found["images"] == 16 and found["images_per_s"] == pytest.approx(16 / 7, abs=0.01)
    assert found["peak_bytes"] == 5e8 and found["loss"] == pytest.approx(0.85) and found["data_wait"] == 0.15
    assert not found["diverged"]


def test_flops_are_of_forward_and_backward_pass_and_a_tokenizers_forward_pass(
    setup: Setup, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = read_config(str(run / CONFIG), PretrainOptions)
    read = steps(Job(LATE, False), setup)[0].read
    assert read()["flops_of_image"] == step_flops(compose(values, 0, 255.0))
    values["target"] = "tokens"
    write_config(run, values)
    tokenizer = SimpleNamespace(encoder=DVAEEncoder(3, 8, 16, 1), vocab=16)
    monkeypatch.setattr(cells, "load_tokenizer", lambda path: tokenizer)
    tokens = step_flops(compose(values, 16, 255.0))
    assert read()["flops_of_image"] == tokens + cells.tokenizer_flops((7, 7), 3, 8, 16, 1)


def test_flops_of_a_run_with_a_teacher_are_its_methods(setup: Setup, run: Path) -> None:
    values = dict(RECIPES["dino"].full) | dict(RECIPES["dino"].options)
    values |= {"method": "dino", "model": "16x3x2", "image_size": 56, "patch_size": 8, "batch_size": 4}
    values |= {"local_size": 24, "mean": (0.5,) * 3, "std": (0.5,) * 3, "channels": 3, "pixel_type": "uint8"}
    write_config(run, values)
    found = steps(Job(LATE, False), setup)[0].read()
    assert found["flops_of_image"] == step_flops(RECIPES["dino"].compose(values, 0, 255.0)) and found["images"] == 16


def test_a_rate_that_had_to_be_halved_counts_as_diverged(setup: Setup, run: Path) -> None:
    (run / "train.log").write_text(f"the loss is not finite; back to step 0 {HALVED}\n")
    assert steps(Job(LATE, False), setup)[0].read()["diverged"]


def test_a_loss_that_is_not_finite_again_is_known_from_other_failures(tmp_path: Path) -> None:
    log = tmp_path / "cell.log"
    log.write_text(f"$ lomar pretrain\nlomar: failed: step 3: the loss is not finite; {AGAIN_NOT_FINITE}\n")
    assert divergence(log) == {"diverged": True}
    log.write_text("lomar: failed: no memory is left\n")
    assert divergence(log) is None


def test_of_a_probe_the_chosen_head_is_kept_and_what_chose_it(setup: Setup) -> None:
    folder = setup.folder(LATE) / "probe"
    folder.mkdir(parents=True)
    chosen = {"input": "pooled of layer 2", "base_lr": 0.1, "held_out": {"top1": 0.4}, "val": {"top1": 0.3}}
    (folder / "probe.json").write_text(json.dumps({"chosen": chosen, "heads": []}))
    found = steps(Job(LATE, False), setup)[1].read()
    assert found == {"layer": 2, "base_lr": 0.1, "held_out": 0.4, "top1": 0.3}


def test_of_fine_tuning_the_last_weights_count(setup: Setup) -> None:
    folder = setup.folder(LATE) / "classifier"
    folder.mkdir(parents=True)
    rows = [{"step": 1, "epoch": 3.5, "top1": 0.9}, {"step": 2, "epoch": 7, "top1": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert steps(Job(LATE, True), setup)[3].read() == {"top1": 0.5, "epoch": 7}


@pytest.mark.parametrize("content", ["", "[1]", '{"probe": {'])
def test_a_result_that_is_no_object_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / RESULT).write_text(content)
    assert result_of(tmp_path) == {} == result_of(tmp_path / "missing")
