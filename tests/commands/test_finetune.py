"""Claims about `lomar finetune`, `lomar evaluate` and `lomar predict`, as typed."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from kept import last_state
from PIL import Image

import lomar as package
from lomar.commands import judging
from lomar.commands.automatic import Hardware
from lomar.commands.finetune_automatic import Start, choose_finetuning
from lomar.commands.finetune_settling import EMA_LEFT
from lomar.downstream.embedding import read_embedding
from lomar.errors import UserError
from lomar.interop.weights import save_encoder
from lomar.methods.recipes import RECIPES

Command = Callable[..., Any]  # its outcome: status, out, err

SETTINGS = (
    "--batch-size 4 --micro-batch 4 --workers 0 --precision fp32 --device cpu --base-lr 0.05 --warmup-epochs 1 "
    "--mixup 0.8 --cutmix 1.0 --erase 0.25 --drop-path 0.2 --auto-augment rand-m9-mstd0.5-inc1 --eval-every 1"
)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ of 8 and val/ of 4 images in each of two classes, told apart by their colour."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for label, channel in (("red", 0), ("blue", 2)):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
                pixels[:, :, channel] += 120
                Image.fromarray(pixels).save(root / part / label / f"{number}.png")
    return root


@pytest.fixture
def finetune(
    lomar: Command, labelled: Path, finished_run: Path, miniature: None, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Fine-tune the small encoder in a folder, without curves; the words given win over `SETTINGS`."""
    from lomar.commands import course as module

    monkeypatch.setattr(module, "learning_curves", lambda rows, path: None)

    def run(out: Path, *words: str | Path) -> Any:
        return lomar("finetune", "--model", finished_run, "--data", labelled, SETTINGS, "--out", out, *words)

    return run


@pytest.fixture(scope="module")
def tuned(labelled: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has learnt the colours, as a user gets it; not to be changed."""
    from lomar.cli import main

    run = tmp_path_factory.mktemp("tuned") / "run"
    words = ["finetune", "--model", str(finished_run), "--data", str(labelled), "--out", str(run), "--epochs", "12"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = "--batch-size 4 --workers 0 --device cpu --base-lr 0.3 --layer-decay 1 --smoothing 0 --eval-every 3"
    assert main([*words, *settings.split()]) == 0
    torch.set_num_threads(threads)
    return run


def refused(outcome: Any) -> str:
    assert outcome.status == 2, outcome.out + outcome.err
    assert outcome.err.startswith("lomar: error: ") and outcome.err.count("\n") == 1
    return outcome.err.removeprefix("lomar: error: ").strip()


def test_it_learns_and_leaves_all_that_a_user_wants(tuned: Path, rows: Callable[[Path], list[dict]]) -> None:
    there = {path.relative_to(tuned).as_posix() for path in tuned.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "classifier.safetensors",
        "classifier-last.safetensors",
        "evaluation.json",
        "metrics.jsonl",
        "train.log",
        "figures/curves.png",
        "figures/confusion.png",
        "checkpoints/step-000000048.pt",
    } <= there
    judged = [row for row in rows(tuned) if "top1" in row]
    assert [row["step"] for row in judged] == [12, 24, 36, 48] and max(r["top1"] for r in judged) == 1.0
    told = json.loads((tuned / "evaluation.json").read_text())
    assert told["top1"] == 1.0 and told["images"] == 8 and told["unreadable"] == 0
    assert told["classes"][0] == {"class": "blue", "images": 4, "accuracy": 1.0, "most_often_taken_for": None}


def test_the_classifier_is_a_timm_model_that_knows_its_classes_and_pixels(tuned: Path, labelled: Path) -> None:
    classifier = package.load(tuned)
    assert classifier.pretrained_cfg is not None
    assert classifier.pretrained_cfg["label_names"] == ["blue", "red"] and classifier.num_classes == 2
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, 2] = 0.9
    mean, std = (torch.tensor(classifier.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    assert classifier((pixels - mean) / std).argmax().item() == 0


def test_evaluate_repeats_what_the_run_found_and_writes_it(
    lomar: Command, tuned: Path, labelled: Path, tmp_path: Path
) -> None:
    outcome = lomar("evaluate", "--model", tuned, "--data", labelled, "--out", tmp_path / "new", "--workers 0")
    assert outcome.status == 0 and "top-1 100.00%" in outcome.out and "(8 images)" in outcome.out
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path / "new", tuned))
    assert ours["classes"] == theirs["classes"] and (tmp_path / "new" / "confusion.png").stat().st_size > 5000


def test_predict_writes_a_line_for_each_image(lomar: Command, tuned: Path, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.open(labelled / "val" / colour / "0.png").save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "bad, one.png").write_bytes(b"no image")
    out = tmp_path / "predictions.csv"
    outcome = lomar(
        "predict", "--model", tuned, "--images", tmp_path / "in", "--out", out, "--workers 0 --batch-size 2"
    )
    assert outcome.status == 0
    assert "2 images, their classes in" in outcome.out and "1 could not be read and have empty cells" in outcome.out
    lines = list(csv.DictReader(out.open()))
    assert [(Path(line["path"]).name, line["label"]) for line in lines] == [
        ("0.png", "red"),
        ("1.png", "blue"),
        ("bad, one.png", ""),
    ]
    assert lines[2]["probability"] == "" and 0.5 < float(lines[0]["probability"]) <= 1
    again = ("predict --overwrite --top 2 --workers 0 --model", tuned, "--images", tmp_path / "in", "--out", out)
    assert lomar(*again).status == 0
    first = next(csv.DictReader(out.open()))
    assert {first["label_1"], first["label_2"]} == {"red", "blue"}
    assert float(first["probability_1"]) + float(first["probability_2"]) == pytest.approx(1, abs=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(
    finetune: Command,
    interrupted_at: Callable[[int], None],
    course: Callable[..., Any],
    tmp_path: Path,
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = "--epochs 3 --ema 0.5 --checkpoint-steps 4"
    assert finetune(whole, words).status == 0
    interrupted_at(6)
    assert finetune(parts, words).status == 130
    from lomar.cli import main

    assert main(["finetune", "--out", str(parts), "--resume"]) == 0
    assert course(parts) == course(whole) and len(course(whole)) == 12
    for name in ("classifier.safetensors", "classifier-last.safetensors"):
        ours, theirs = (package.load(run / name).state_dict() for run in (parts, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


@pytest.mark.parametrize("other", ["--micro-batch 2", "--grad-checkpointing", "--workers 1"])
def test_what_changes_speed_alone_changes_no_result(
    finetune: Command, course: Callable[..., Any], tmp_path: Path, other: str
) -> None:
    assert finetune(tmp_path / "a", "--epochs 1").status == 0
    assert finetune(tmp_path / "b", "--epochs 1", other).status == 0
    for ours, theirs in zip(course(tmp_path / "a"), course(tmp_path / "b"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_with_an_average_the_averaged_weights_are_what_is_kept(finetune: Command, tmp_path: Path) -> None:
    assert finetune(tmp_path / "run", "--epochs 1 --ema 0.99").status == 0
    state = last_state(tmp_path / "run")
    kept = package.load(tmp_path / "run" / "classifier-last.safetensors").state_dict()
    assert torch.equal(kept["head.weight"], state["average"]["encoder.head.weight"])
    assert not torch.equal(kept["head.weight"], state["model"]["encoder.head.weight"])


def test_head_only_leaves_the_encoder_as_it_was(finetune: Command, finished_run: Path, tmp_path: Path) -> None:
    outcome = finetune(tmp_path / "run", "--epochs 1 --head-only")
    assert outcome.status == 0
    before, after = package.load(finished_run).state_dict(), package.load(tmp_path / "run").state_dict()
    same = {name for name in after if name in before and torch.equal(before[name], after[name])}
    assert set(after) - same == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def test_another_resolution_a_rectangle_and_a_run_from_scratch(
    lomar: Command, finetune: Command, labelled: Path, miniature: None, tmp_path: Path
) -> None:
    assert finetune(tmp_path / "wide", "--max-steps 2 --image-size 24 40").status == 0
    assert package.load(tmp_path / "wide").pretrained_cfg["input_size"] == (3, 24, 40)  # type: ignore[index]
    outcome = lomar(
        "finetune --model scratch:16x2x2 --image-size 32 --patch-size 8 --max-steps 2",
        SETTINGS,
        "--data",
        labelled,
        "--out",
        tmp_path / "scratch",
    )
    assert outcome.status == 0 and "all layers are new" in outcome.out
    assert package.load(tmp_path / "scratch").head.weight.std() > 0.01  # type: ignore[union-attr,operator]


def test_many_channels_of_16_bit(lomar: Command, miniature: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("wet", "dry"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(5):
            np.save(tmp_path / "data" / label / f"{i}.npy", rng.integers(0, 9000, (33, 37, 5), dtype=np.uint16))
    outcome = lomar(
        "finetune --model scratch:16x2x2 --image-size 32 --patch-size 8 --max-steps 2 --workers 0 --device cpu",
        "--batch-size 4",
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "run",
    )
    assert outcome.status == 0, outcome.err
    assert "2 classes, 4 images each; 2 to judge by, a fifth of each class, drawn" in outcome.out
    assert "timm's policies are for 8-bit gray or colour" in outcome.out
    assert (
        lomar("predict", "--model", tmp_path / "run", "--images", tmp_path / "data", "--out", tmp_path / "p.csv").status
        == 0
    )


def test_a_table_of_paths_and_labels(finetune: Command, labelled: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    files = sorted(labelled.glob("train/*/*.png"))
    table.write_text(
        "label,path,split\n" + "".join(f"{f.parent.name},{f},{'val' if f.stem == '7' else ''}\n" for f in files)
    )
    outcome = finetune(tmp_path / "run", "--max-steps 1 --data", table)
    assert outcome.status == 0 and "2 classes, 7 images each; 2 to judge by" in outcome.out


def test_the_api_is_the_command(labelled: Path, finished_run: Path, miniature: None, tmp_path: Path) -> None:
    words = {"batch_size": 4, "workers": 0, "max_steps": 1, "device": "cpu"}
    run = package.finetune(model=str(finished_run), data=str(labelled), out=str(tmp_path / "run"), **words)
    assert package.load(run).num_classes == 2
    shares = package.evaluate(model=str(run), data=str(labelled), workers=0)
    assert set(shares) == {"top1", "mean_class_top1", "val_loss"} and 0 <= shares["top1"] <= 1
    table = package.predict(model=str(run), images=str(labelled / "val"), out=str(tmp_path / "p.csv"), workers=0)
    assert len(table.read_text().splitlines()) == 9
    file = package.embed(model=str(run), data=str(labelled / "val"), out=str(tmp_path / "e.npz"), workers=0)
    assert read_embedding(file).features.shape == (8, 16)
    with pytest.raises(UserError, match=r"there is no option 'modl' \(did you mean model\?\)"):
        package.evaluate(modl="x")


def test_class_imbalance_is_told(finetune: Command, labelled: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    files = sorted(labelled.glob("train/red/*.png")) + sorted(labelled.glob("val/red/*.png"))
    rows = [f"{f},red,train\n" for f in files] + [
        f"{labelled / 'train/blue/0.png'},blue,train\n",
        f"{labelled / 'train/red/../blue/1.png'},red,val\n",
    ]
    table.write_text("path,label,split\n" + "".join(rows))
    outcome = finetune(tmp_path / "run", "--max-steps 1 --data", table)
    assert (
        "warning: 'red' has 12 times the images of 'blue' (12 and 1): look at the accuracy of each class" in outcome.out
    )
    assert "warning: no image judges 'blue'" in outcome.out


BAD = [
    ("--image-size 33", "--image-size 33 is not a multiple of the model's patches of 8 px; 32 would be"),
    ("--image-size 8 8 8", "--image-size has 3 numbers; it takes the side, or height and width"),
    ("--channels 4", "--channels is 4, which"),
    ("--patch-size 16", "--patch-size is 16, which"),
    ("--freeze-layers 4", "--freeze-layers is 4; the encoder has 3"),
    ("--auto-augment nonsense", "--auto-augment: timm knows no augmentation 'nonsense'"),
    ("--auto-augment rand-m9-foo", "timm knows no augmentation 'rand-m9-foo': 'foo' is no letter with a number"),
    ("--crop-scale 0.9 0.1", "--crop-scale is 0.9 0.1; the smaller share comes first"),
    ("--batch-size 5", "--batch-size 5 cannot be mixed two and two in 1 process; 4 can, or give --mixup 0 --cutmix 0"),
    ("--micro-batch 3", "--micro-batch 3 is odd; images are mixed two and two"),
    ("--mean 0.5", "--mean has 1 numbers; the images have 3 channels"),
    ("--model nowhere", "there is no run or file"),
    ("--model vit_tiny_patch16_224", "is a model of timm; fine-tuning is for encoders of lomar"),
    ("--model scratch:giant", "--model scratch:giant: 'giant' is no size"),
    ("--model scratch:resnet18", "--model scratch:resnet18 is a model of timm; scratch: takes a size of lomar here"),
    ("--data sample", "the images have no labels"),
    ("--recipe beit", "--recipe is 'beit'; it can be auto, mae, deit"),
    ("--repeats 0", "--repeats is '0'; it must be a whole number, at least 1"),
    ("--epochs 1 --max-steps 1", "--epochs and --max-steps are both given; give one"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(finetune: Command, tmp_path: Path, words: str, message: str) -> None:
    assert message in refused(finetune(tmp_path / "run", words))
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_named(
    lomar: Command, finetune: Command, tuned: Path, labelled: Path, tmp_path: Path
) -> None:
    assert refused(lomar("finetune")).startswith("--out is missing")
    assert refused(lomar("finetune", "--out", tmp_path / "x")).startswith("--model is missing")
    assert refused(lomar("finetune --model scratch:tiny", "--out", tmp_path / "x")).startswith("--data is missing")
    assert refused(lomar("evaluate --data x")) == "--model is missing; see lomar evaluate --help"
    assert refused(lomar("predict --images x --model y")) == "--out is missing; see lomar predict --help"
    assert "already holds a run" in refused(finetune(tuned))


def test_classes_that_do_not_match_are_refused(
    lomar: Command, tuned: Path, finished_run: Path, labelled: Path, tmp_path: Path
) -> None:
    for name in ("train/red", "train/blue", "val/red", "val/green"):
        (tmp_path / name).mkdir(parents=True)
        Image.open(labelled / "val" / "red" / "0.png").save(tmp_path / name / "0.png")
    message = refused(lomar("finetune --model", finished_run, "--data", tmp_path, "--out", tmp_path / "run"))
    assert message.endswith("class 'green' is to be judged, but no image of it is there to train on")
    message = refused(lomar("evaluate --model", tuned, "--data", tmp_path))
    assert message.endswith("the model does not know the class 'green'; it knows blue, red")
    assert "has no classifier; `lomar finetune` makes one" in refused(
        lomar("evaluate --model", finished_run, "--data", labelled)
    )
    assert "the model knows 2 classes" in refused(
        lomar("predict --top 3 --model", tuned, "--images", labelled, "--out", tmp_path / "p.csv")
    )
    assert "it must end in .csv" in refused(
        lomar("predict --model", tuned, "--images", labelled, "--out", tmp_path / "p.txt")
    )
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"x")
    assert "none of 1 can be read" in refused(
        lomar("predict --model", tuned, "--images", tmp_path / "bad", "--out", tmp_path / "p.csv")
    )
    assert not (tmp_path / "p.csv").exists()


def test_a_resumed_run_keeps_its_results_images_and_classes(
    finetune: Command, lomar: Command, labelled: Path, tmp_path: Path
) -> None:
    assert finetune(tmp_path / "run", "--max-steps 2").status == 0
    resume = ("finetune --resume --out", tmp_path / "run")
    assert "--base-lr is 1.0, but the run in" in refused(lomar(*resume, "--base-lr 1"))
    assert "is finished: 2 steps" in lomar(*resume, "--log-every 1").out
    for name in ("a", "b"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.open(labelled / "val" / "red" / "0.png").save(tmp_path / "other" / name / "0.png")
        Image.open(labelled / "val" / "red" / "1.png").save(tmp_path / "other" / name / "1.png")
    assert "the classes are not those" in refused(lomar(*resume, "--data", tmp_path / "other"))
    assert "holds no run to resume" in refused(lomar("finetune --resume --out", tmp_path / "nothing"))


def test_a_run_of_pretraining_is_neither_overwritten_nor_resumed(
    finetune: Command, lomar: Command, finished_run: Path, tmp_path: Path
) -> None:
    before = {file: file.read_bytes() for file in finished_run.rglob("*") if file.is_file()}
    other = f"--out {finished_run} holds a run of `lomar pretrain`; give another folder"
    assert refused(finetune(finished_run, "--overwrite")) == other
    assert refused(lomar("finetune --resume --out", finished_run)) == other
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "encoder.safetensors").write_bytes((finished_run / "encoder.safetensors").read_bytes())
    message = refused(finetune(beside, "--model", beside / "encoder.safetensors"))
    assert message == f"--out {beside} is the folder of --model; give another folder"
    assert {file: file.read_bytes() for file in finished_run.rglob("*") if file.is_file()} == before


def test_before_the_first_evaluation_the_classifier_is_the_last_one(
    finetune: Command, interrupted_at: Callable[[int], None], tmp_path: Path
) -> None:
    interrupted_at(3)
    finetune(tmp_path / "run", "--max-steps 12 --eval-every 3 --checkpoint-steps 2")
    best, last = (package.load(tmp_path / "run" / f"classifier{part}.safetensors") for part in ("", "-last"))
    assert torch.equal(best.head.weight, last.head.weight) and best.head.weight.std() > 1e-4


def test_a_finished_run_that_was_not_judged_is_judged_on_resuming(
    finetune: Command, lomar: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And drawn: a kill may have come before the curves."""
    monkeypatch.setattr("lomar.commands.course.learning_curves", lambda rows, path: path.write_text(f"{len(rows)}"))
    (tmp_path / "run" / "figures").mkdir(parents=True)
    assert finetune(tmp_path / "run", "--max-steps 2").status == 0
    told = (tmp_path / "run" / "evaluation.json").read_text()
    pictures = sorted(path.name for path in (tmp_path / "run" / "figures").iterdir())
    (tmp_path / "run" / "evaluation.json").unlink()
    assert pictures == ["confusion.png", "curves.png"]
    for name in pictures:
        (tmp_path / "run" / "figures" / name).unlink()
    assert lomar("finetune --resume --out", tmp_path / "run").status == 0
    assert (tmp_path / "run" / "evaluation.json").read_text() == told
    assert sorted(path.name for path in (tmp_path / "run" / "figures").iterdir()) == pictures


def test_evaluation_json_is_written_last(
    finetune: Command, lomar: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its being there says that nothing is left to do."""
    with monkeypatch.context() as patch:
        patch.setattr(judging, "confusion_matrix", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        assert finetune(tmp_path / "run", "--max-steps 2").status == 130
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert lomar("finetune --resume --out", tmp_path / "run").status == 0
    assert sorted(path.name for path in (tmp_path / "run" / "figures").iterdir()) == ["confusion.png"]


def test_where_nothing_that_judges_can_be_read_nothing_is_begun(
    finetune: Command, labelled: Path, tmp_path: Path
) -> None:
    for label in ("red", "blue"):
        (tmp_path / "val" / label).mkdir(parents=True)
        (tmp_path / "val" / label / "1.png").write_bytes(b"no image")
    assert "--val: none of 2 files can be read" in refused(finetune(tmp_path / "run", "--val", tmp_path / "val"))
    assert not (tmp_path / "run").exists()


def test_a_configuration_may_name_random_weights_and_the_folder(
    labelled: Path, miniature: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = {"model": "scratch:16x2x2", "data": str(labelled), "out": "run", "image_size": 32, "patch_size": 8}
    Path("c.yaml").write_text("".join(f"{n}: {v}\n" for n, v in (told | {"max_steps": 1, "workers": 0}).items()))
    assert package.finetune(config="c.yaml") == Path("run")
    assert package.finetune(config="c.yaml", out="again") == Path("again")


def test_what_learnt_from_a_folder_is_judged_by_what_it_had_kept_apart(
    finetune: Command, lomar: Command, labelled: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert finetune(run, "--max-steps 1 --data", labelled / "train").status == 0
    done = lomar("evaluate --model", run, "--data", labelled / "train", "--workers 0")
    assert "(4 images)" in done.out and "by the fifth of each class that fine-tuning had kept apart" in done.out
    for other in (labelled / "val", labelled):  # where not all is judged, val/ is
        done = lomar("evaluate --model", run, "--data", other, "--workers 0")
        assert "(8 images)" in done.out and "kept apart" not in done.out


def test_where_the_data_says_what_judges_nothing_is_kept_apart(
    lomar: Command, tuned: Path, labelled: Path, tmp_path: Path
) -> None:
    done = lomar("evaluate --model", tuned, "--data", labelled, "--workers 0")
    assert "(8 images)" in done.out and "kept apart" not in done.out


def test_an_earlier_table_outlives_a_failed_prediction(
    lomar: Command, tuned: Path, labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"x")
    (tmp_path / "p.csv").write_text("precious")
    words: tuple[Any, ...] = ("predict --model", tuned, "--images", tmp_path / "bad", "--out", tmp_path / "p.csv")
    assert refused(lomar(*words)) == f"--out {tmp_path / 'p.csv'} exists; --overwrite replaces it"
    assert "none of 1 can be read" in refused(lomar(*words, "--overwrite"))
    assert (tmp_path / "p.csv").read_text() == "precious"
    (tmp_path / "folder.csv").mkdir()
    words = ("predict --model", tuned, "--images", labelled, "--out", tmp_path / "folder.csv")
    assert refused(lomar(*words)) == f"--out {tmp_path / 'folder.csv'} is a folder; it must be a .csv file"


def test_an_evaluation_is_replaced_only_if_asked_for(lomar: Command, tuned: Path, labelled: Path) -> None:
    words = ("evaluate --workers 0 --model", tuned, "--data", labelled, "--out", tuned)
    before = (tuned / "evaluation.json").read_bytes()
    assert refused(lomar(*words)) == f"--out {tuned} already holds an evaluation; --overwrite replaces it"
    assert (tuned / "evaluation.json").read_bytes() == before


def test_an_average_that_is_still_at_its_beginning_is_warned_of(finetune: Command, tmp_path: Path) -> None:
    done = finetune(tmp_path / "run", "--max-steps 10 --ema 0.99")
    assert "warning: --ema 0.99 leaves 90% of the first weights in the average after 10 steps; 0.7 or none" in done.out


def test_images_that_repetition_leaves_no_time_for_are_warned_of(finetune: Command, tmp_path: Path) -> None:
    """16 images; 16 of 64 samples."""
    warning = "warning: --repeats 4 in 1 epochs leaves 75% of the images aside"
    assert warning in finetune(tmp_path / "a", "--max-steps 4 --repeats 4").out
    assert "of the images aside" not in finetune(tmp_path / "b", "--max-steps 16 --repeats 4").out


def test_after_an_error_with_workers_the_process_ends(tuned: Path, labelled: Path, tmp_path: Path) -> None:
    """They pass over the one SIGTERM that multiprocessing sends before it waits for them."""
    code = f"""
from lomar.cli import main
from lomar.model import Encoder
def forward(self, images):
    raise RuntimeError("no such thing")
Encoder.forward = forward
main(["evaluate", "--model", {str(tuned)!r}, "--data", {str(labelled)!r}, "--workers", "1", "--batch-size", "2"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "no such thing" in done.stderr


CPU = Hardware("cpu", "CPU", 2**34, 2, True)
GPU = Hardware("cuda", "GPU", 2**36, 16, True)
BASE = Start(width=768, depth=12, scratch=False, beit=False, eight_bit=True)


def test_on_imagenet_and_a_gpu_the_choices_are_the_papers() -> None:
    """SPEC A.10 and B.6."""
    found = {n: c.value for n, c in choose_finetuning({}, 1_281_167, BASE, GPU).items()}
    assert (
        found
        | {
            "batch_size": 1024,
            "epochs": 100,
            "warmup_epochs": 5.0,
            "base_lr": 5e-4,
            "layer_decay": 0.65,
            "weight_decay": 0.05,
            "betas": (0.9, 0.999),
            "drop_path": 0.1,
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "mixup": 0.8,
            "cutmix": 1.0,
            "erase": 0.25,
            "ema": 0.0,
        }
        == found
    )
    large = Start(width=1024, depth=24, scratch=False, beit=False, eight_bit=True)
    found = {n: c.value for n, c in choose_finetuning({}, 1_281_167, large, GPU).items()}
    assert found | {"epochs": 50, "base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2} == found
    beit = Start(width=768, depth=12, scratch=False, beit=True, eight_bit=True)
    found = {n: c.value for n, c in choose_finetuning({}, 1_281_167, beit, GPU).items()}
    assert found | {"base_lr": 1e-3, "warmup_epochs": 20.0} == found  # 4e-3 at 1024
    scratch = Start(width=768, depth=12, scratch=True, beit=False, eight_bit=True)
    found = {n: c.value for n, c in choose_finetuning({"batch_size": 4096}, 1_281_167, scratch, GPU).items()}
    assert (
        found
        | {
            "epochs": 300,
            "base_lr": 1e-4,
            "weight_decay": 0.3,
            "betas": (0.9, 0.95),
            "warmup_epochs": 20.0,
            "layer_decay": 1.0,
            "ema": 0.9999,
            "drop_path": 0.1,
        }
        == found
    )


def test_choices_scale_with_the_data_and_say_why() -> None:
    few, many = (choose_finetuning({}, count, BASE, GPU) for count in (1_000, 1_281_167))
    assert few["epochs"].value > many["epochs"].value and few["batch_size"].value < many["batch_size"].value
    assert "1000 images recur more often than a million" in few["epochs"].reason
    slow = choose_finetuning({}, 9_469, BASE, CPU)
    assert slow["epochs"].value < 10 and slow["mixup"].value == 0 and "only slows learning" in slow["mixup"].reason
    assert all(choice.value % 2 == 0 for choice in (few["batch_size"], many["batch_size"], slow["batch_size"]))


@pytest.mark.parametrize("processes", [1, 2, 3, 6, 8])
def test_the_batch_that_is_chosen_can_be_mixed_by_all_processes(processes: int) -> None:
    for count in (20, 9469, 10**6):
        for hardware in (CPU, GPU):
            batch = choose_finetuning({}, count, BASE, hardware, processes)["batch_size"].value
            assert batch % (2 * processes) == 0 and batch > 0


def test_random_weights_have_rates_of_their_own_in_short_runs() -> None:
    chosen = choose_finetuning({"epochs": 5}, 9469, replace(BASE, scratch=True), CPU)
    assert chosen["base_lr"].value * chosen["batch_size"].value / 256 == pytest.approx(5e-4)
    assert chosen["weight_decay"].value == 0.05 and chosen["layer_decay"].value == 1


def test_with_deit_on_imagenet_and_a_gpu_the_choices_are_its_defaults() -> None:
    """SPEC D.2: 5e-4 for 512 images, 5 epochs of warm-up; MoCo v3's encoder is given 150 epochs, random weights 300."""
    found = {n: c.value for n, c in choose_finetuning({"recipe": "deit"}, 1_281_167, BASE, GPU).items()}
    deit = {
        "pool": "token",
        "batch_size": 1024,
        "epochs": 150,
        "warmup_epochs": 5.0,
        "base_lr": 2.5e-4,
        "min_lr": 1e-5,
        "layer_decay": 1.0,
        "weight_decay": 0.05,
        "betas": (0.9, 0.999),
        "drop_path": 0.1,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "mixup": 0.8,
        "cutmix": 1.0,
        "erase": 0.25,
        "repeats": 3,
        "ema": 0.99996,
    }
    assert found | deit == found
    scratch = choose_finetuning({"recipe": "deit"}, 1_281_167, replace(BASE, scratch=True), GPU)
    assert {n: c.value for n, c in scratch.items()} | deit | {"epochs": 300} == {n: c.value for n, c in scratch.items()}


def test_an_encoder_that_pools_by_its_cls_token_is_given_deits_recipe_and_others_maes() -> None:
    by_token = replace(BASE, by_token=True)
    chosen = choose_finetuning({}, 1_281_167, by_token, GPU)
    assert chosen["recipe"].value == "deit" and chosen["recipe"].reason == "the encoder pools by its cls token"
    assert choose_finetuning({"pool": "token"}, 1_281_167, by_token, GPU)["recipe"].value == "deit"
    usual = {n: c.value for n, c in choose_finetuning({}, 1_281_167, BASE, GPU).items()}
    assert (usual["recipe"], usual["pool"], usual["min_lr"], usual["repeats"]) == ("mae", "avg", 1e-6, 1)
    for given, start in (({"pool": "avg"}, by_token), ({"recipe": "mae"}, by_token), ({"pool": "token"}, BASE)):
        found = {n: c.value for n, c in choose_finetuning(given, 1_281_167, start, GPU).items()}
        assert found | given == usual | given


def test_what_is_given_wins_over_deits_recipe() -> None:
    given = {
        "recipe": "deit",
        "pool": "avg",
        "base_lr": 1.0,
        "min_lr": 0.0,
        "layer_decay": 0.5,
        "repeats": 2,
        "ema": 0.1,
    }
    assert not set(given) & set(choose_finetuning(given, 1_281_167, BASE, GPU))


def test_deits_recipe_is_scaled_as_maes_is() -> None:
    """Short runs: no noise, no repetition, and a rate for all layers that is that of random weights."""
    short = choose_finetuning({"recipe": "deit", "epochs": 5}, 9469, BASE, CPU)
    noise = ("drop_path", "mixup", "cutmix", "erase", "ema")
    assert [short[name].value for name in noise] == [0] * 5 and short["repeats"].value == 1
    assert short["base_lr"].value * short["batch_size"].value / 256 == pytest.approx(5e-4)
    assert short["layer_decay"].value == 1 and short["base_lr"].reason == "5.0e-04 a step: DeiT's is for long runs"
    small = choose_finetuning({"recipe": "deit", "epochs": 100, "batch_size": 256}, 9469, BASE, GPU)
    assert small["base_lr"].value == pytest.approx(2.5e-4 * 2)  # with the root of the batch
    assert small["repeats"].value == 3


@pytest.mark.parametrize(("recipe", "scratch", "least"), [("mae", True, 30_000), ("deit", False, 75_000)])
def test_an_average_is_chosen_where_little_of_the_first_weights_is_left(recipe: str, scratch: bool, least: int) -> None:
    start = replace(BASE, scratch=scratch)
    few, enough = (
        choose_finetuning({"recipe": recipe, "max_steps": steps}, 1_281_167, start, GPU)["ema"].value
        for steps in (least - 1, least)
    )
    assert few == 0 and enough**least < EMA_LEFT


@pytest.fixture
def token_pooled(tmp_path: Path) -> Path:
    """A small encoder that pools by its cls token."""
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}
    composition = replace(RECIPES["mae"].composition("mae"), **small)
    encoder = composition.encoder()
    encoder.global_pool = "token"
    save_encoder(tmp_path / "encoder.safetensors", encoder, composition)
    return tmp_path / "encoder.safetensors"


def configuration(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def test_how_the_loaded_encoder_pools_decides_on_the_recipe(
    finetune: Command, token_pooled: Path, tmp_path: Path
) -> None:
    done = finetune(tmp_path / "a", "--max-steps 1 --model", token_pooled)
    assert done.status == 0 and "the encoder pools by its cls token" in done.out
    told = configuration(tmp_path / "a")
    assert (told["recipe"], told["pool"], told["layer_decay"], told["min_lr"]) == ("deit", "token", 1.0, 1e-5)
    assert package.load(tmp_path / "a").global_pool == "token"
    done = finetune(tmp_path / "b", "--max-steps 1 --recipe auto --pool avg --model", token_pooled)
    assert done.status == 0 and "cls token" not in done.out
    assert configuration(tmp_path / "b") | {"recipe": "mae", "pool": "avg"} == configuration(tmp_path / "b")
    assert finetune(tmp_path / "c", "--max-steps 1").status == 0
    assert configuration(tmp_path / "c") | {"recipe": "mae", "repeats": 1} == configuration(tmp_path / "c")


def test_deits_recipe_trains_and_a_resumed_run_equals_an_uninterrupted_one(
    finetune: Command,
    lomar: Command,
    interrupted_at: Callable[[int], None],
    course: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Interrupted between two of three times that images come."""
    words = "--recipe deit --epochs 3 --repeats 3 --ema 0.5 --checkpoint-steps 2"
    assert finetune(tmp_path / "whole", words).status == 0
    interrupted_at(4)
    assert finetune(tmp_path / "parts", words).status == 130
    assert lomar("finetune --resume --out", tmp_path / "parts").status == 0
    assert course(tmp_path / "parts") == course(tmp_path / "whole") and len(course(tmp_path / "whole")) == 12
    assert refused(lomar("finetune --resume --repeats 1 --out", tmp_path / "parts")).startswith("--repeats is 1, but")
    ours, theirs = (package.load(tmp_path / run / "classifier-last.safetensors") for run in ("parts", "whole"))
    assert ours.global_pool == "token" and torch.equal(ours.head.weight, theirs.head.weight)


def test_beits_shared_bias_is_fine_tuned_block_by_block(
    lomar: Command, labelled: Path, miniature: None, tmp_path: Path
) -> None:
    from dataclasses import replace

    small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8, "window_size": 0}
    composition = replace(RECIPES["beit"].composition("beit"), **small)
    save_encoder(tmp_path / "encoder.safetensors", composition.encoder(), composition)
    outcome = lomar(
        "finetune --max-steps 2",
        SETTINGS,
        "--model",
        tmp_path / "encoder.safetensors",
        "--data",
        labelled,
        "--out",
        tmp_path / "run --image-size 40",
    )
    assert outcome.status == 0, outcome.err


def test_a_classifier_is_drawn_converted_and_begun_with_as_an_encoder_is(
    lomar: Command, tuned: Path, labelled: Path, tmp_path: Path
) -> None:
    official = tmp_path / "tuned.pth"
    outcome = lomar("convert --to official --model", tuned, "--out", official)
    assert outcome.status == 0, outcome.err
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(package.load(official)(images), package.load(tuned)(images))
    outcome = lomar(
        "attention --model", tuned, "--images", labelled / "val" / "red" / "0.png", "--out", tmp_path / "a.png"
    )
    assert outcome.status == 0, outcome.err
    outcome = lomar(
        "pretrain --max-steps 1 --batch-size 4 --workers 0 --device cpu --image-size 32 --window-size 3 --init",
        tuned,
        "--data",
        labelled,
        "--out",
        tmp_path / "more",
    )
    assert outcome.status == 0, outcome.err
