"""Claims about `lomar study`: it trains, judges and tells; goes on; and refuses what does not fit."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lomar import cli
from lomar.commands import study_settling
from lomar.commands.automatic import Hardware
from lomar.commands.study_settling import settle
from lomar.errors import UserError
from lomar.study.queue import Children

TINY = (
    "--model 16x2x2 --image-size 56 --patch-size 8 --epochs 1 --batch-size 8 --finetune-epochs 1 "
    "--finetune-batch-size 8 --evaluations 1 --device cpu --precision fp32 --jobs 1 --seeds 0 --base-lrs 0.01"
)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """12 images of each of two classes that train, two of each that judge."""
    root = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 12), ("val", 2)):
        for name in ("red", "blue"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.open(photos / name / f"{number % 4}.png")
                image.rotate(10 * number).save(root / split / name / f"{number}.png")
    return root


def settled(words: str) -> Any:
    _, arguments = cli.command_in(["study", *shlex.split(words)])
    return settle(cli.parse("study", arguments))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, miniature: None) -> list[list[str]]:
    """Commands run here, without new processes; they are returned as they come."""
    asked: list[list[str]] = []

    def run(self: Children, words: Sequence[str], log: Path, place: Mapping[str, str]) -> int:
        asked.append(list(words))
        with log.open("a") as out, redirect_stdout(out), redirect_stderr(out):
            return cli.main(words)

    monkeypatch.setattr(Children, "run", run)
    # Handlers of signals are the main thread's alone; a command in a thread of this process does without.
    monkeypatch.setattr(signal, "signal", lambda number, handler: signal.SIG_DFL)
    return asked


def test_methods_are_trained_judged_and_told_of_and_what_is_done_is_not_done_again(
    lomar: Any, labelled: Path, tmp_path: Path, in_this_process: list[list[str]]
) -> None:
    words = f"study table1 --rows none lomar-late --data {labelled} --out {tmp_path / 'out'} --labels 4 {TINY}"
    first = lomar(words)
    assert first.status == 0, first.err
    assert [asked[0] for asked in in_this_process] == [
        *("probe", "knn", "finetune"),
        *("pretrain", "probe", "knn", "finetune"),
    ]
    table = [line for line in first.out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["none", "lomar-late"]
    assert "chosen by a linear probe, on a tenth of the images that it learns from, held out; never on val" in first.out
    assert (
        "of 4 val images of 2 classes" in first.out and "fine-tuning from 4 of each class, for 1 epochs," in first.out
    )
    assert (tmp_path / "out" / "table1.md").read_text() == first.out
    report = json.loads((tmp_path / "out" / "table1.json").read_text())
    late = report["rows"][1]
    assert late["seeds"] == 1 and 0 <= late["accuracy"]["knn"]["mean"] <= 1 and late["peak_bytes"] > 10**7
    cell = report["cells"]["lomar-late,epochs=1,lr=0.01,seed=0"]
    assert cell["knn"]["layer"] == cell["probe"]["layer"]
    assert cell["pretraining"]["images"] == 24 and cell["pretraining"]["flops_of_image"] > 0
    assert cell["finetuned"]["command"].startswith("lomar finetune --model ")
    with Image.open(tmp_path / "out" / "table1.png") as picture:
        assert picture.width > 1000
    in_this_process.clear()
    assert lomar(words).status == 0 and in_this_process == []


@pytest.mark.parametrize("method", ["dino", "mocov3"])
def test_a_method_that_compares_views_is_trained_and_judged_like_the_others(
    method: str, lomar: Any, labelled: Path, tmp_path: Path, in_this_process: list[list[str]]
) -> None:
    done = lomar(f"study table1 --rows {method} --data {labelled} --out {tmp_path / 'out'} --labels 4 {TINY}")
    assert done.status == 0, done.err
    assert [asked[0] for asked in in_this_process] == ["pretrain", "probe", "knn", "finetune"]
    report = json.loads((tmp_path / "out" / "table1.json").read_text())
    cell = report["cells"][f"{method},epochs=1,lr=0.01,seed=0"]
    assert cell["pretraining"]["images"] == 24 and cell["pretraining"]["flops_of_image"] > 0
    assert set(report["rows"][0]["accuracy"]) == {"knn", "probe", "finetuned"}


def test_a_rehearsal_shows_methods_that_compare_views(lomar: Any, labelled: Path, tmp_path: Path) -> None:
    shown = lomar(f"study table1 --dry-run --data {labelled} --out {tmp_path / 'out'} {TINY}")
    for method in ("dino", "mocov3"):
        assert f"  {method}: {method}, 1 epochs\n" in shown.out
        assert f"  {method}, mae's time: {method}, as long as mae\n" in shown.out


def test_a_rehearsal_runs_nothing_and_shows_the_commands(lomar: Any, labelled: Path, tmp_path: Path) -> None:
    shown = lomar(f"study fig6 --dry-run --data {labelled} --out {tmp_path / 'out'} {TINY}")
    assert shown.status == 0 and not (tmp_path / "out").exists()
    assert "  30% hidden: lomar, mask_ratio=0.3, 1 epochs\n" in shown.out
    commands = [line.strip() for line in shown.out.splitlines() if line.strip().startswith("lomar ")]
    for line in commands:
        name, arguments = cli.command_in(shlex.split(line.replace("LAYER", "2"))[1:])
        cli.parse(name, arguments)
    assert [line.split()[1] for line in commands] == ["pretrain", "probe", "knn", "finetune"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", r"which study is missing: table1, .*; see lomar study --help"),
        ("table1 --out OUT", r"--data is missing; see lomar study --help"),
        ("table2 --data DATA --out OUT", r"there is no study 'table2' \(did you mean table3\?\); it can be table1, "),
        ("late --rows 'block 7, all' --data DATA --out OUT", r"--rows: late has no row 'block 7, all' \(did you mean "),
        ("late --model 16x2 --data DATA --out OUT", r"--model '16x2' is no size; it can be "),
        ("late --image-size 50 --data DATA --out OUT", r"--image-size 50 is not made of patches of --patch-size 4"),
        ("late --data DATA --out FILE", r"--out \S+ is a file; it must be a folder"),
        ("late --data DATA --out DATA", r"--out \S+ is not empty and holds no study; give a new folder"),
        ("late --data MISSING --out OUT", r"--data MISSING"),
        ("beit --data DATA --out OUT", r"there is no study 'beit'"),
        (
            "table3 --tokenizer nothing --data DATA --out OUT",
            r"--tokenizer: there is no tokenizer \S+nothing; it can be ",
        ),
        (
            "fig5 --patch-size 8 --data DATA --out OUT",
            r"row 'simple, relative, 9x9' cannot be trained: .*; --rows names ",
        ),
        (
            "table1 --patch-size 1 --data DATA --out OUT",
            r"row 'lomar-small-patches' cannot be trained: --patch-size 1 can",
        ),
        (
            "table1 --rows mocov3 --batch-size 1 --data DATA --out OUT",
            r"row 'mocov3' cannot be trained: --batch-size is 1; mocov3 compares images with each other: 2 ",
        ),
        (
            "table1 --patch-size 7 --data DATA --out OUT",
            r"row 'lomar-small-patches' cannot be trained: --image-size 56 ",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    lomar: Any, labelled: Path, tmp_path: Path, words: str, message: str
) -> None:
    (tmp_path / "file").touch()
    for name, path in {"DATA": labelled, "OUT": tmp_path / "out", "FILE": tmp_path / "file"}.items():
        words = words.replace(name, str(path))
    found = lomar("study", *map(Path, shlex.split(words)), "--device cpu")
    assert found.status == 2 and found.err.count("\n") == 1
    assert re.match(f"lomar: error: {message}", found.err), found.err
    assert not (tmp_path / "out").exists()


def test_runs_of_other_settings_are_not_mixed(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    study_settling.keep_settings(settled(f"table1 --data {labelled} --out {out} {TINY}"))
    assert settled(f"late --data {labelled} --out {out} --device cpu").setup.model == "16x2x2"
    with pytest.raises(UserError, match=r"--epochs is 2.0, but the runs in \S+ have 1.0; leave it out, or"):
        settled(f"table1 --data {labelled} --out {out} --epochs 2 --device cpu")
    (out / "study.yaml").write_text("epochs: [")
    with pytest.raises(UserError, match="is damaged"):
        settled(f"table1 --data {labelled} --out {out} --device cpu")


def test_settings_hold_what_changes_results_alone(labelled: Path, tmp_path: Path) -> None:
    study_settling.keep_settings(settled(f"table1 --data {labelled} --out {tmp_path} {TINY}"))
    assert set(yaml.safe_load((tmp_path / "study.yaml").read_text())) == {
        *("model", "image_size", "patch_size", "epochs", "batch_size", "tokenizer", "bank", "labels", "precision"),
        *("finetune_epochs", "finetune_batch_size", "evaluations"),
    }


def test_with_gpus_each_cell_has_one_and_runs_are_of_a_larger_scale(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(study_settling, "find_hardware", lambda device: Hardware("cuda", "GPU", 10**10, 16, True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    found = settled(f"table1 --data {labelled} --out {tmp_path / 'out'}")
    assert found.places == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    assert (found.setup.model, found.plan.epochs, found.plan.seeds) == ("small", 300, (0, 1, 2))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert settled(f"table1 --data {labelled} --out {tmp_path / 'out'} --jobs 3").places == [
        {"CUDA_VISIBLE_DEVICES": number} for number in ("0", "1", "0")
    ]


def test_without_a_gpu_cells_share_the_cores(labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_settling, "find_hardware", lambda device: Hardware("cpu", "CPU", 10**10, 32, True))
    found = settled(f"table1 --data {labelled} --out {tmp_path / 'out'}")
    assert found.places == [{"OMP_NUM_THREADS": "4"}] * 8 and found.setup.hardware["workers"] == 2
    assert settled(f"table1 --data {labelled} --out {tmp_path / 'out'} --jobs 32").setup.hardware["workers"] == 0
    assert found.plan.base_lrs == (2e-3, 4e-3, 8e-3)  # 5e-4 to 2e-3 a step of 64 images


def test_a_tokenizer_of_ones_own_is_taken_and_none_is_trained(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_settling, "load_tokenizer", lambda path: None)
    monkeypatch.chdir(tmp_path)
    found = settled(f"table3 --data {labelled} --out out --tokenizer tok.safetensors --device cpu")
    assert found.tokenizer == [] and found.setup.tokenizer == tmp_path / "tok.safetensors"
    words = settled(f"table3 --data {labelled} --out out --device cpu").tokenizer
    name, arguments = cli.command_in(words)
    assert name == "tokenizer train" and cli.parse(name, arguments)["resume"]


def test_two_that_begin_at_once_agree_on_what_they_run(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").touch()  # of the one that is a moment earlier
    words = f"table1 --data {labelled} --out {out} {TINY}"
    first, second = settled(words), settled(words.replace("--epochs 1 ", "--epochs 3 "))
    study_settling.keep_settings(first)
    study_settling.keep_settings(settled(words))
    with pytest.raises(UserError, match=r"--epochs is 3.0, but the runs in"):
        study_settling.keep_settings(second)


def test_rows_of_an_earlier_call_stay_in_the_table(
    lomar: Any, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = {name: {"top1": 0.25, "layer": 2, "held_out": 0.3} for name in ("probe", "knn", "finetuned")}
    run = {"pretraining": {"minutes": 1.0, "images_per_s": 9.0, "flops_of_image": 1e6, "peak_bytes": 1e9}}
    for name, found in {"none": cell, "mae,epochs=1,lr=0.01": cell | run}.items():
        folder = tmp_path / "out" / "cells" / f"{name},seed=0"
        folder.mkdir(parents=True)
        (folder / "cell.json").write_text(json.dumps(found))
    study_settling.keep_settings(settled(f"table1 --data {labelled} --out {tmp_path / 'new'} {TINY}"))
    (tmp_path / "new" / "study.yaml").rename(tmp_path / "out" / "study.yaml")
    shown = lomar(f"study table1 --rows none --data {labelled} --out {tmp_path / 'out'} {TINY}")
    names = [line.split("|")[1].strip() for line in shown.out.splitlines() if line.startswith("|")]
    assert shown.status == 0 and names[2:] == ["none", "mae"]


def test_sigterm_stops_the_children_which_save(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = f"study table1 --rows lomar-late --data {labelled} --out {out} --labels 4 {TINY} --epochs 2000".split()
    command = [sys.executable, "-m", "lomar", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        metrics = out / "cells" / "lomar-late,epochs=2000,lr=0.01,seed=0" / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopping: the commands that run are asked to save" in err and "failed" not in err
    assert not list(out.rglob(".lock"))
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    saved = sorted((metrics.parent / "checkpoints").glob("step-*.pt"))[-1]
    assert rows[-1]["step"] > 0 and int(saved.stem.removeprefix("step-")) == rows[-1]["step"]
