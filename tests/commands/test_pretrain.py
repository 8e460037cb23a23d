"""Claims about a run: what it leaves, which option wins, and that it can be repeated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lomar.commands.automatic import Hardware
from lomar.commands.pretrain import RUN_FILES

Command = Callable[..., Any]
Rows = Callable[[Path], list[dict[str, Any]]]
Course = Callable[[Path], list[tuple[int, float, float, float]]]


def losses(course: list[tuple[int, float, float, float]]) -> list[float]:
    return [loss for _, loss, _, _ in course]


# The folder of a run


def test_a_run_holds_every_file_of_the_interface_and_no_other(finished_run: Path) -> None:
    for name in (
        *("config.yaml", "metrics.jsonl", "train.log", "checkpoints/step-000000004.pt"),
        *("encoder.safetensors", "reconstructor.safetensors"),
    ):
        assert (finished_run / name).stat().st_size > 0, name
    pictures = {path.name for path in (finished_run / "figures").glob("*.png")}
    assert pictures == {
        "curves.png",
        "reconstruction.png",
        "reconstruction-0000000.png",
        "reconstruction-0000004.png",
    }
    # What --overwrite would leave behind; also nothing temporary.
    assert {path.name for path in finished_run.iterdir()} <= set(RUN_FILES)
    assert not list(finished_run.rglob(".*"))


def test_the_pictures_show_something(finished_run: Path) -> None:
    for path in (finished_run / "figures").glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100 and np.asarray(picture.convert("L")).std() > 5


def test_one_row_for_each_step_and_one_for_the_random_initialisation(finished_run: Path, rows: Rows) -> None:
    first, *others = rows(finished_run)
    assert first["step"] == 0 and 0 <= first["knn_top1"] <= 1 and "loss" not in first
    assert [row["step"] for row in others] == [1, 2, 3, 4]
    for row in others:
        assert {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "elapsed_s"} <= set(row)
        assert row["epoch"] == row["step"] * 4 / 8
        assert row["loss"] > 0 and row["lr"] >= 0 and row["grad_norm"] > 0 and row["images_per_s"] > 0
        assert 0 <= row["data_wait"] <= 1
    assert [row["step"] for row in others if "knn_top1" in row] == [4]
    assert not any("effective_rank" in row for row in [first, *others])


def test_without_labels_the_effective_rank_is_measured(pretrain: Command, tmp_path: Path, rows: Rows) -> None:
    assert pretrain(tmp_path / "run", "--max-steps 2").status == 0
    found = rows(tmp_path / "run")
    assert [(row["step"], "effective_rank" in row) for row in found] == [(0, True), (1, False), (2, True)]
    assert all(1 <= row["effective_rank"] <= 8 for row in found if "effective_rank" in row)  # of 8 images


def test_evaluations_come_as_often_as_asked(pretrain: Command, tmp_path: Path, photos: Path, rows: Rows) -> None:
    outcome = pretrain(tmp_path / "run", "--max-steps 5 --eval-every 1", "--eval-data", photos)
    assert outcome.status == 0
    assert [row["step"] for row in rows(tmp_path / "run") if "knn_top1" in row] == [0, 2, 4, 5]


def test_evaluating_does_not_change_the_training(
    pretrain: Command, tmp_path: Path, photos: Path, course: Course
) -> None:
    pretrain(tmp_path / "often", "--max-steps 4 --eval-every 0.5", "--eval-data", photos)
    pretrain(tmp_path / "seldom", "--max-steps 4")
    assert course(tmp_path / "often") == course(tmp_path / "seldom")


def test_tensorboard_shows_every_row_also_of_a_resumed_run(
    lomar: Command, pretrain: Command, tmp_path: Path, interrupted_at: Callable[[int], None]
) -> None:
    run = tmp_path / "run"
    interrupted_at(3)
    assert pretrain(run, "--max-steps 6 --checkpoint-steps 2").status == 130
    assert lomar("pretrain", "--out", run, "--resume").status == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("effective_rank")] == [0, 6]


def test_a_run_ends_by_saying_how_to_load_the_encoder(pretrain: Command, tmp_path: Path) -> None:
    out = pretrain(tmp_path / "run", "--max-steps 1").out
    assert f'encoder = lomar.load("{tmp_path / "run"}")' in out
    assert out.strip().endswith("encoder(images) is (B, D)")


def test_the_log_holds_the_command_and_what_was_said(pretrain: Command, tmp_path: Path) -> None:
    out = pretrain(tmp_path / "run", "--max-steps 3 --log-every 2").out
    log = (tmp_path / "run" / "train.log").read_text()
    assert "step 2/3" in out and "step 3/3" in out and "step 1/3" not in out
    assert "step 2/3" in log and "step 3/3" in log and "INFO" in log


# Which value counts


def settled(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def test_a_flag_wins_over_config_over_recipe_over_automatic(
    lomar: Command, tmp_path: Path, photos: Path, miniature: None, no_pictures: None
) -> None:
    config = tmp_path / "some.yaml"
    config.write_text(
        "views: 3\nwindow-size: 3\nimage_size: 32\npatch_size: 8\nmodel: 16x3x2\nseed: 5\nworkers: 0\nmax_steps: 9\n"
        f"data: {photos}\n"
    )
    run = tmp_path / "run"
    assert lomar("pretrain --views 2 --max-steps 1 --config", config, "--out", run).status == 0
    found = settled(run)
    assert (found["views"], found["max_steps"]) == (2, 1)  # flags
    assert (found["window_size"], found["seed"], found["image_size"]) == (3, 5, 32)  # --config
    assert (found["mask_ratio"], found["mask_layer"], found["window_layout"]) == (0.8, 0, "independent")  # recipe
    assert found["batch_size"] == 32 and found["channels"] == 3  # automatic
    assert found["weight_decay"] == 0.05  # default
    assert found["warmup_epochs"] == pytest.approx(0.025 * 32 / 8)  # 2.5 % of one step of 32 of 8 images


def test_the_word_auto_counts_as_not_given(pretrain: Command, tmp_path: Path, rows: Rows) -> None:
    outcome = pretrain(tmp_path / "run", "--model auto --device auto --precision auto --max-steps 1")
    found = settled(tmp_path / "run")
    assert found["model"] in ("tiny", "small", "base") and found["precision"] in ("fp32", "bf16")
    assert found["device"] in ("cpu", "cuda") and f"--model        {found['model']}" in outcome.out


def test_steps_asked_for_by_flag_replace_the_epochs_of_a_config(pretrain: Command, tmp_path: Path) -> None:
    config = tmp_path / "some.yaml"
    config.write_text("epochs: 7")
    assert pretrain(tmp_path / "run", "--max-steps 2 --config", config).status == 0
    assert (settled(tmp_path / "run")["epochs"], settled(tmp_path / "run")["max_steps"]) == (None, 2)


def test_the_device_of_a_config_counts(
    lomar: Command, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lomar.commands import settling

    asked: list[str] = []

    def find(device: str) -> Hardware:
        asked.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(settling, "find_hardware", find)
    config = tmp_path / "some.yaml"
    config.write_text("device: cpu")
    lomar("pretrain --data", photos, "--out", tmp_path / "run", "--config", config)
    lomar("pretrain --data", photos, "--out", tmp_path / "run")
    assert asked == ["cpu", "auto"]


def test_the_folder_may_be_named_by_the_config(pretrain: Command, lomar: Command, tmp_path: Path) -> None:
    config = tmp_path / "some.yaml"
    config.write_text(f"out: {tmp_path / 'run'}\ndata: sample\nmask_ratio: 0.01")
    assert "--mask-ratio 0.01 hides 0" in lomar("pretrain --config", config).err


def test_epochs_are_passes_over_the_images(pretrain: Command, tmp_path: Path, rows: Rows) -> None:
    assert pretrain(tmp_path / "run", "--epochs 1.5").status == 0
    assert [(row["step"], row["epoch"]) for row in rows(tmp_path / "run")][1:] == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_with_data_and_out_alone_every_choice_is_told_with_its_reason(
    lomar: Command, tmp_path: Path, photos: Path, miniature: None, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lomar.commands import automatic

    monkeypatch.setattr(automatic, "_epochs", lambda count, gpu: (1, "a test"))
    monkeypatch.setattr(automatic, "_model", lambda count, gpu: ("16x3x2", "a test"))
    out = lomar("pretrain --data", photos, "--out", tmp_path / "run").out
    for name in (
        *("device", "precision", "channels", "statistics", "model", "image-size", "patch-size"),
        *("batch-size", "base-lr", "epochs", "workers", "micro-batch"),
    ):
        line = next(line for line in out.splitlines() if line.startswith(f"  --{name} "))
        assert len(line.split()) >= 3, line
    assert "8 images, shorter side 40 px" in out
    assert settled(tmp_path / "run")["image_size"] == 28  # not enlarged beyond the images' 40 px


# The same again


def test_the_same_seed_repeats_a_run_and_another_does_not(pretrain: Command, tmp_path: Path, course: Course) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        assert pretrain(tmp_path / name, f"--max-steps 3 --seed {seed}").status == 0
    assert course(tmp_path / "one") == course(tmp_path / "two")
    assert not set(losses(course(tmp_path / "one"))) & set(losses(course(tmp_path / "other")))


def test_the_resolved_configuration_gives_the_same_run(
    pretrain: Command, lomar: Command, tmp_path: Path, course: Course
) -> None:
    assert pretrain(tmp_path / "one", "--max-steps 3 --seed 3 --mean 0.4 0.5 0.6").status == 0
    assert lomar("pretrain --config", tmp_path / "one" / "config.yaml", "--out", tmp_path / "two").status == 0
    assert course(tmp_path / "one") == course(tmp_path / "two")
    assert settled(tmp_path / "one") == settled(tmp_path / "two")


def test_workers_change_nothing(pretrain: Command, tmp_path: Path, course: Course) -> None:
    for workers in (0, 2):
        assert pretrain(tmp_path / str(workers), f"--max-steps 3 --workers {workers}").status == 0
    assert course(tmp_path / "0") == course(tmp_path / "2")


def test_micro_batches_change_nothing_but_rounding_and_leave_no_image_out(
    pretrain: Command, tmp_path: Path, course: Course
) -> None:
    for micro in (1, 3, 7, 8):
        assert pretrain(tmp_path / str(micro), f"--max-steps 3 --batch-size 7 --micro-batch {micro}").status == 0
    whole = np.array(course(tmp_path / "7"))
    for micro in (1, 3, 8):
        np.testing.assert_allclose(np.array(course(tmp_path / str(micro))), whole, rtol=1e-4)


def test_training_moves_every_parameter_of_the_encoder(pretrain: Command, tmp_path: Path) -> None:
    """The encoder that is saved is the one that was trained: cls token, patches, blocks, norm."""
    assert pretrain(tmp_path / "start", "--max-steps 3 --base-lr 1e-30").status == 0
    assert pretrain(tmp_path / "end", "--max-steps 3").status == 0
    start, end = (load_file(tmp_path / name / "encoder.safetensors") for name in ("start", "end"))
    assert start.keys() == end.keys()
    assert [name for name in start if torch.equal(start[name], end[name])] == []


def test_the_loss_falls(pretrain: Command, tmp_path: Path, course: Course) -> None:
    assert pretrain(tmp_path / "run", "--max-steps 40 --base-lr 0.3").status == 0
    found = losses(course(tmp_path / "run"))
    assert np.mean(found[-8:]) < np.mean(found[:8]) - 0.02


@pytest.mark.parametrize("words", ["--mask-layer 2", "--window-layout released", "--precision bf16", "--clip-grad 0"])
def test_a_run_is_possible_with(words: str, pretrain: Command, tmp_path: Path, course: Course) -> None:
    assert pretrain(tmp_path / "run", f"--max-steps 2 {words}").status == 0
    assert np.isfinite(course(tmp_path / "run")).all()


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (5, np.uint16), (2, np.float32)])
def test_images_of_other_channels_and_types_are_pretrained_on(
    channels: int, dtype: Any, pretrain: Command, tmp_path: Path, course: Course
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(2)
    for number in range(5):
        pixels = rng.random((40, 44, channels))
        scale = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
        np.save(folder / f"{number}.npy", (pixels * scale).astype(dtype))
    assert pretrain(tmp_path / "run", "--max-steps 2", "--data", folder).status == 0
    found = settled(tmp_path / "run")
    assert (found["channels"], found["pixel_type"], found["statistics"]) == (channels, np.dtype(dtype).name, "data")
    assert found["mean"] == pytest.approx([0.5] * channels, abs=0.1)
    assert np.isfinite(course(tmp_path / "run")).all()
