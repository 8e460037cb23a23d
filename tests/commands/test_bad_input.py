"""Claims about what cannot be done: one clear line, status 2, and --out as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import lomar as package
from lomar.errors import UserError
from lomar.training.checkpoint import Checkpoints

Command = Callable[..., Any]


def refused(outcome: Any) -> str:
    """The message of a refusal: status 2, one line on standard error, and nothing else."""
    assert outcome.status == 2, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("lomar: error: ") and outcome.err.count("\n") == 1
    return outcome.err.removeprefix("lomar: error: ").rstrip("\n")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def some_image(path: Path, side: int = 40) -> Path:
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return path


# Command lines


def test_data_and_out_are_needed(lomar: Command, out: Path) -> None:
    assert refused(lomar("pretrain", "--out", out)).startswith("--data is missing")
    assert refused(lomar("pretrain --data sample")).startswith("--out is missing")
    assert refused(lomar("pretrain")).startswith("--out is missing")
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--window-size 5", "--window-size 5 is larger than the 4x4 grid of patches"),
        ("--image-size 33", "--image-size 33 is not a multiple of --patch-size 8; 32 would be"),
        ("--image-size 4", "--image-size 4 is not a multiple of --patch-size 8; 8 would be"),
        ("--mask-ratio 0.1", "--mask-ratio 0.1 hides 0 of the 9 patches of a window"),
        ("--mask-layer 3", "--mask-layer is 3; --model 16x3x2 has blocks 0 to 2"),
        (
            "--predict-share 0.05",
            "--predict-share 0.05 predicts 0 of the 7 hidden patches of a view; it must predict some",
        ),
        ("--predict-share 0.99", "--predict-share 0.99 predicts 7 of the 7 hidden patches of a view; take 1 for all"),
        (
            "--mask blockwise --mask-min-block 1 --predict-share 0.5",
            "of --mask blockwise all hidden patches are predicted",
        ),
        (
            "--predict-choice uniform",
            "--predict-choice is for --predict-share below 1, which this method does not have",
        ),
        ("--workers 100000", "--workers is '100000'; it must be a whole number, at least 0 and at most 256"),
        ("--window-layout released --views 3", "--views is 3; with --window-layout released a 4x4 grid"),
        ("--crop-scale 0.9 0.3", "--crop-scale is 0.9 0.3; the smaller share comes first"),
        ("--epochs 3 --max-steps 2", "--epochs and --max-steps are both given"),
        ("--method lomr", "--method is 'lomr'; `lomar recipes` lists what there is (did you mean lomar?)"),
        ("--mean 0.5 --std 0.2", "--mean has 1 numbers; the images have 3 channels"),
        ("--mean 0.5 0.5 0.5 --std 0.2", "--std has 1 numbers; the images have 3 channels"),
        ("--channels 4", "has 3 channels, but --channels is 4"),
        ("--channels 1 --statistics imagenet", "--statistics imagenet is for 3 channels; the images have 1"),
        ("--channels 1 --patch-size 1 --image-size 9", "--patch-size 1 with 1 channel"),
        ("--config nowhere.yaml", "--config nowhere.yaml: No such file or directory"),
        ("--data nowhere", "--data nowhere: no such folder or file"),
        ("--eval-data nowhere", "--eval-data nowhere: no such folder or file"),
        ("--resume --overwrite", "--resume and --overwrite are both given"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_made(
    words: str, message: str, pretrain: Command, out: Path
) -> None:
    assert message in refused(pretrain(out, words))
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(lomar: Command, out: Path, tmp_path: Path) -> None:
    message = "--device is cuda, but torch finds no usable GPU here; it can be cpu"
    config = tmp_path / "gpu.yaml"
    config.write_text("device: cuda")
    assert refused(lomar("pretrain --data sample --device cuda --out", out)) == message
    assert refused(lomar("pretrain --data sample --out", out, "--config", config)) == message
    assert not out.exists()


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_what_compiling_lacks_is_named(
    command: str, lomar: Command, out: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = ["--model", "scratch:16x1x2"] if command == "finetune" else []
    message = refused(lomar(command, "--device cpu --compile yes --data", photos, "--out", out, *model))
    assert message == "--compile is yes, which takes a compiler (no-such-compiler), not found here; it can be no"
    assert not out.exists()


def test_fewer_images_in_a_batch_than_processes(pretrain: Command, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("RANK", "0")
    assert refused(pretrain(out)) == "--batch-size 4 is smaller than the 5 processes"
    assert not out.exists()


@pytest.mark.parametrize("text", ["batch_sise: 3", "batch_size: no", "batch_size: ["])
def test_a_wrong_config_is_refused_by_its_name(text: str, pretrain: Command, out: Path, tmp_path: Path) -> None:
    config = tmp_path / "some.yaml"
    config.write_text(text)
    assert str(config) in refused(pretrain(out, "--config", config))
    assert not out.exists()


# Images


def test_an_empty_folder_is_refused(pretrain: Command, out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no image in this folder" in refused(pretrain(out, "--data", tmp_path / "empty"))
    assert not out.exists()


def test_a_folder_without_a_readable_image_is_refused_with_an_example(
    pretrain: Command, out: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.jpg").write_text("hello")
    message = refused(pretrain(out, "--data", folder))
    assert message.startswith("--data: none of 1 files can be read, for example") and "a.jpg" in message
    assert not out.exists()


def test_images_of_one_pixel_are_refused(pretrain: Command, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dots"
    folder.mkdir()
    for number in range(3):
        some_image(folder / f"{number}.png", side=1)
    assert "only 1 x 1 pixels" in refused(pretrain(out, "--data", folder))
    assert not out.exists()


def test_too_large_a_share_of_bad_images_is_refused(pretrain: Command, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    some_image(folder / "good.png")
    (folder / "bad.png").write_bytes(b"x")
    message = refused(pretrain(out, "--data", folder))
    assert "1 of 2 files cannot be read" in message and "--max-bad-share allows 25%" in message
    assert not out.exists()


def test_evaluation_images_that_cannot_be_read_are_refused_before_anything_is_made(
    pretrain: Command, out: Path, tmp_path: Path
) -> None:
    for label in ("a", "b"):
        (tmp_path / "eval" / label).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "eval" / label / f"{number}.png").write_text("no")
    message = refused(pretrain(out, "--eval-data", tmp_path / "eval"))
    assert "--eval-data" in message and "can be read as 3 channels of uint8" in message
    assert not out.exists()


def test_evaluation_images_without_classes_are_said_to_have_none(
    pretrain: Command, out: Path, rows: Callable[[Path], list[Any]], photos: Path
) -> None:
    outcome = pretrain(out, "--max-steps 1", "--eval-data", photos / "red")
    assert outcome.status == 0 and f"--eval-data {photos / 'red'} has no two classes" in outcome.out
    assert "effective_rank" in rows(out)[0]


def test_a_small_image_is_enlarged_with_a_warning(pretrain: Command, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    some_image(folder / "a.png", side=9)
    outcome = pretrain(out, "--data", folder, "--max-steps 1")
    assert outcome.status == 0
    assert "warning: the smallest image's shorter side is 9 px; it will be enlarged to --image-size 32" in outcome.out


def test_a_truncated_image_among_good_ones_is_skipped_counted_and_listed(
    pretrain: Command, out: Path, photos: Path, tmp_path: Path, rows: Callable[[Path], list[Any]]
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        (folder / f"{number}.png").write_bytes(path.read_bytes())
    broken = folder / "br\N{LATIN SMALL LETTER O WITH DIAERESIS}[k]en.png"
    broken.write_bytes((folder / "0.png").read_bytes()[:700])
    outcome = pretrain(out, "--data", folder, "--max-steps 5")
    assert outcome.status == 0
    assert "9 images" in outcome.out and "1 of them cannot be read and will be skipped" in outcome.out
    assert outcome.out.count("skipped an unreadable image") == 1
    listed = (out / "bad_files.txt").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 1 and listed[0].split("\t")[0] == str(broken)
    assert [row["step"] for row in rows(out)] == [0, 1, 2, 3, 4, 5]


def test_a_bad_file_whose_name_is_no_text_is_listed_too(
    pretrain: Command, out: Path, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        (folder / f"{number}.png").write_bytes(path.read_bytes())
    Path(str(folder) + "/b\udcff\nd.png").write_bytes(b"x")
    assert pretrain(out, "--data", folder, "--max-steps 5").status == 0
    assert len((out / "bad_files.txt").read_text(encoding="utf-8").splitlines()) == 1


# The run's folder


def test_a_folder_that_holds_a_run_is_not_touched_without_overwrite(pretrain: Command, out: Path) -> None:
    assert pretrain(out, "--max-steps 1").status == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    message = refused(pretrain(out, "--max-steps 1"))
    assert message == f"--out {out} already holds a run; --resume goes on with it, --overwrite deletes it"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_overwrite_begins_anew_and_keeps_what_is_not_the_runs(
    pretrain: Command, out: Path, rows: Callable[[Path], list[Any]]
) -> None:
    assert pretrain(out, "--max-steps 3").status == 0
    (out / "notes.txt").write_text("mine")
    assert pretrain(out, "--max-steps 2 --overwrite").status == 0
    assert [row["step"] for row in rows(out)] == [0, 1, 2]
    assert (out / "notes.txt").read_text() == "mine"


def test_overwrite_deletes_nothing_where_no_run_is(pretrain: Command, out: Path) -> None:
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "thesis.png").write_text("mine")
    assert pretrain(out, "--max-steps 1 --overwrite").status == 0
    assert (out / "figures" / "thesis.png").read_text() == "mine"


def test_what_is_left_of_a_run_is_not_taken_for_a_new_one(pretrain: Command, out: Path) -> None:
    assert pretrain(out, "--max-steps 1").status == 0
    (out / "config.yaml").unlink()
    assert "already holds a run" in refused(pretrain(out, "--max-steps 2"))
    assert "holds no run to resume" in refused(pretrain(out, "--resume"))


def test_out_that_is_a_file_or_below_one_is_refused(pretrain: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert refused(pretrain(file)) == f"--out {file} is a file; it must be a folder"
    assert refused(pretrain(file / "run")) == f"--out {file / 'run'} cannot be written: Not a directory"
    assert file.read_text() == "mine"


# Resuming


def test_a_resumed_run_keeps_what_changes_its_results(lomar: Command, pretrain: Command, out: Path) -> None:
    assert pretrain(out, "--max-steps 1").status == 0
    message = refused(lomar("pretrain", "--out", out, "--resume --batch-size 2"))
    assert message == (f"--batch-size is 2, but the run in {out} has 4; a resumed run keeps what changes its results")
    config = out.parent / "other.yaml"
    config.write_text("views: 1")
    assert "--views is 1" in refused(lomar("pretrain", "--out", out, "--resume", "--config", config))
    assert lomar("pretrain", "--out", out, "--resume --batch-size 4 --model auto --workers 0").status == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "nonsense", "--method is 'nonsense'; `lomar recipes` lists what there is"),
        ("model", "auto", "it must settle model"),
        ("model", None, "--model is None; it must be text"),
        ("model", "small", "do not fit this run's configuration"),
        ("epochs", 3, "it must settle one of epochs and max_steps"),
        ("mean", [0.5], "--mean has 1 numbers; the images have 3 channels"),
        ("window_size", 99, "--window-size 99 is larger than the 4x4 grid"),
        ("views", "many", "--views is 'many'; it must be a whole number, at least 1"),
        ("viws", 3, "there is no option 'viws' (did you mean views?)"),
        ("precision", "fp8", "--precision is 'fp8'; it can be auto, fp32, bf16"),
        ("data", "nowhere", "--data nowhere: no such folder or file"),
    ],
)
def test_a_configuration_edited_to_nonsense_is_refused(
    key: str, value: Any, message: str, lomar: Command, pretrain: Command, out: Path
) -> None:
    assert pretrain(out, "--max-steps 1").status == 0
    file = out / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {key: value}))
    outcome = lomar("pretrain", "--out", out, "--resume")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and message in outcome.err


def test_a_configuration_that_lacks_an_option_is_refused(lomar: Command, pretrain: Command, out: Path) -> None:
    assert pretrain(out, "--max-steps 1").status == 0
    file = out / "config.yaml"
    values = yaml.safe_load(file.read_text())
    del values["views"], values["std"]
    file.write_text(yaml.safe_dump(values))
    assert refused(lomar("pretrain", "--out", out, "--resume")) == f"{file} is not complete: it lacks views, std"


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "other"])
def test_where_all_checkpoints_are_corrupt_they_are_named(
    damage: str, lomar: Command, pretrain: Command, out: Path
) -> None:
    assert pretrain(out, "--max-steps 1").status == 0
    checkpoints = Checkpoints(out / "checkpoints")
    assert checkpoints.steps() == [1, 0]
    for step in (1, 0):
        path = checkpoints.path(step)
        if damage == "other":
            checkpoints.save(step, {"weights": torch.zeros(3)})
        else:
            whole = path.read_bytes()
            path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[damage])
    metrics = (out / "metrics.jsonl").read_bytes()
    outcome = lomar("pretrain", "--out", out, "--resume")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert str(checkpoints.folder) in outcome.err
    assert (out / "metrics.jsonl").read_bytes() == metrics


# Python


def test_in_python_the_same_mistakes_are_a_user_error(tmp_path: Path, photos: Path) -> None:
    for keys, message in (
        ({"bach_size": 3}, "there is no option 'bach_size' (did you mean batch_size?)"),
        ({"batch_size": 0}, "--batch-size is 0; it must be a whole number, at least 1"),
        ({"data": str(photos)}, "--out is missing"),
        ({"out": tmp_path / "run"}, "--data is missing"),
    ):
        with pytest.raises(UserError) as caught:
            package.pretrain(**keys)
        assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


def test_in_python_a_run_returns_its_folder(tmp_path: Path, photos: Path, miniature: None, no_pictures: None) -> None:
    out = tmp_path / "run"
    returned = package.pretrain(
        data=photos, out=out, model="16x3x2", image_size=32, patch_size=8, window_size=3, workers=0, max_steps=1
    )
    assert returned == out
    assert package.load(returned).embed_dim == 16
