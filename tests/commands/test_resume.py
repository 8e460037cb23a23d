"""Claims about runs that are interrupted: what follows equals an uninterrupted run."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept import last_state
from safetensors.torch import load_file

import lomar as package
from lomar.training.checkpoint import Checkpoints

Command = Callable[..., Any]
Rows = Callable[[Path], list[dict[str, Any]]]
Course = Callable[[Path], list[tuple[int, float, float, float]]]

STEPS = "--max-steps 7 --checkpoint-steps 2"


@pytest.fixture
def whole(pretrain: Command, tmp_path: Path, course: Course) -> list[tuple[int, float, float, float]]:
    """The course of the uninterrupted run."""
    assert pretrain(tmp_path / "whole", STEPS).status == 0
    return course(tmp_path / "whole")


@pytest.mark.parametrize("step", [0, 1, 2, 5, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(
    step: int,
    whole: list[tuple[int, float, float, float]],
    lomar: Command,
    pretrain: Command,
    interrupted_at: Callable[[int], None],
    tmp_path: Path,
    course: Course,
    rows: Rows,
) -> None:
    """Losses, rates and gradient norms to the last digit; no row twice, none missing."""
    run = tmp_path / "run"
    interrupted_at(step)
    assert pretrain(run, STEPS).status == 130
    assert len(course(run)) == step
    assert lomar("pretrain", "--out", run, "--resume").status == 0
    assert course(run) == whole
    assert [row["step"] for row in rows(run)] == list(range(8))
    ends = [last_state(tmp_path / name)["model"] for name in ("whole", "run")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_where_there_is_no_run_resume_begins_one_if_it_is_told_of_what(
    whole: list[tuple[int, float, float, float]],
    lomar: Command,
    pretrain: Command,
    interrupted_at: Callable[[int], None],
    tmp_path: Path,
    course: Course,
) -> None:
    """So that one command line serves a job that a cluster starts again and again."""
    run = tmp_path / "run"
    assert "holds no run to resume" in lomar("pretrain --resume --out", run).err and not run.exists()
    interrupted_at(3)
    assert pretrain(run, STEPS, "--resume").status == 130
    assert pretrain(run, STEPS, "--resume").status == 0
    assert course(run) == whole


def test_what_only_changes_speed_may_change_on_the_way(
    whole: list[tuple[int, float, float, float]],
    lomar: Command,
    pretrain: Command,
    interrupted_at: Callable[[int], None],
    tmp_path: Path,
    course: Course,
) -> None:
    run = tmp_path / "run"
    interrupted_at(3)
    pretrain(run, STEPS)
    assert lomar("pretrain", "--out", run, "--resume --workers 1 --micro-batch 3").status == 0
    np.testing.assert_allclose(np.array(course(run)), np.array(whole), rtol=1e-4)


def test_resuming_twice_is_resuming(
    whole: list[tuple[int, float, float, float]],
    lomar: Command,
    pretrain: Command,
    interrupted_at: Callable[[int], None],
    tmp_path: Path,
    course: Course,
) -> None:
    run = tmp_path / "run"
    interrupted_at(3)
    pretrain(run, STEPS)
    interrupted_at(5)
    assert lomar("pretrain", "--out", run, "--resume").status == 130
    assert lomar("pretrain", "--out", run, "--resume").status == 0
    assert course(run) == whole


def test_a_run_without_a_checkpoint_starts_at_step_0(
    whole: list[tuple[int, float, float, float]], lomar: Command, pretrain: Command, tmp_path: Path, course: Course
) -> None:
    """As a kill leaves it that comes after the configuration was written and before anything else."""
    run = tmp_path / "run"
    assert pretrain(run, STEPS).status == 0
    for path in run.rglob("*"):
        if path.is_file() and path.name != "config.yaml":
            path.unlink()
    (run / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    assert lomar("pretrain", "--out", run, "--resume").status == 0
    assert course(run) == whole


def test_resuming_a_finished_run_changes_nothing(lomar: Command, pretrain: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(run, "--max-steps 3").status == 0

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "train.log"}

    before = contents()
    outcome = lomar("pretrain", "--out", run, "--resume")
    assert outcome.status == 0 and f"the run in {run} is finished: 3 steps" in outcome.out
    assert "lomar.load" in outcome.out
    assert contents() == before


def test_when_the_last_checkpoint_stands_so_does_the_encoder_of_the_same_step(
    lomar: Command, pretrain: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, course: Course
) -> None:
    """A kill between the two files at the last step must not leave a finished run with an older encoder."""
    save = Checkpoints.save

    def killed(self: Checkpoints, step: int, state: dict[str, Any]) -> None:
        if step == 3:
            raise KeyboardInterrupt
        save(self, step, state)

    def killed_after(self: Checkpoints, step: int, state: dict[str, Any]) -> None:
        save(self, step, state)
        if step == 3:
            raise KeyboardInterrupt

    assert pretrain(tmp_path / "whole", "--max-steps 3").status == 0
    expected = load_file(tmp_path / "whole" / "encoder.safetensors")
    for name, kill in (("before", killed), ("after", killed_after)):
        monkeypatch.setattr(Checkpoints, "save", kill)
        assert pretrain(tmp_path / name, "--max-steps 3 --checkpoint-steps 2").status == 130
        monkeypatch.setattr(Checkpoints, "save", save)
        assert lomar("pretrain", "--out", tmp_path / name, "--resume").status == 0
        found = load_file(tmp_path / name / "encoder.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert course(tmp_path / name) == course(tmp_path / "whole")


def test_a_run_goes_on_with_the_same_images_alone(
    lomar: Command, pretrain: Command, interrupted_at: Callable[[int], None], photos: Path, tmp_path: Path
) -> None:
    """A file more would change which image comes when. The folder itself may move."""
    shutil.copytree(photos, tmp_path / "photos")
    interrupted_at(3)
    assert pretrain(tmp_path / "run", STEPS, "--data", tmp_path / "photos").status == 130
    shutil.copytree(photos, tmp_path / "more")
    shutil.copy(photos / "red" / "0.png", tmp_path / "more" / "red" / "4.png")
    outcome = lomar("pretrain --resume --out", tmp_path / "run", "--data", tmp_path / "more")
    assert outcome.status == 2 and "the images are not those that the run in" in outcome.err
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert lomar("pretrain --resume --out", tmp_path / "run", "--data", tmp_path / "moved").status == 0


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_in_python_a_signal_saves_and_is_raised(
    number: signal.Signals,
    raised: type[BaseException],
    photos: Path,
    tmp_path: Path,
    miniature: None,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lomar.training.loop import Trainer

    step = Trainer._step

    def signalled(self: Trainer, batches: Any) -> Any:
        signal.raise_signal(number)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_step", signalled)
    with pytest.raises(raised):
        package.pretrain(
            data=photos,
            out=tmp_path,
            model="16x3x2",
            image_size=32,
            patch_size=8,
            window_size=3,
            workers=0,
            max_steps=5,
        )
    assert last_state(tmp_path)["progress"]["step"] == 1


# Real processes


def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(
    lomar: Command, pretrain: Command, spawn: Callable[..., Any], tmp_path: Path, course: Course, rows: Rows
) -> None:
    """`kill -9` while the configuration is written, and at three moments of training, with worker processes."""
    steps = "--max-steps 16 --checkpoint-steps 2 --workers 1"
    assert pretrain(tmp_path / "whole", steps).status == 0
    for moment in (0, 1, 4, 9):
        run = tmp_path / f"killed-{moment}"
        spawned = spawn(run, *steps.split())
        if moment:
            spawned.wait_for_rows(moment)
        else:
            spawned.wait_until((run / "config.yaml").exists)
        time.sleep(random.uniform(0, 0.1))
        os.kill(spawned.pid, signal.SIGKILL)
        assert spawned.end() == -signal.SIGKILL
        assert moment == 0 or moment - 1 <= rows_before_the_tear(run) < 16
        outcome = lomar("pretrain", "--out", run, "--resume")
        assert outcome.status == 0, outcome.err
        assert course(run) == course(tmp_path / "whole")
        assert [row["step"] for row in rows(run)] == list(range(17))


def test_a_run_with_workers_and_pictures_ends_by_itself(spawn: Callable[..., Any], tmp_path: Path) -> None:
    """Drawing leaves reference cycles behind that would keep the loader, and so its workers, alive at the exit."""
    spawned = spawn(tmp_path / "run", "--max-steps", "2", "--workers", "1", pictures=True)
    assert spawned.end() == 0


def rows_before_the_tear(run: Path) -> int:
    """The last step in metrics that a kill may have torn."""
    return (run / "metrics.jsonl").read_bytes().count(b"\n") - 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_its_status(
    number: signal.Signals,
    lomar: Command,
    pretrain: Command,
    spawn: Callable[..., Any],
    tmp_path: Path,
    course: Course,
) -> None:
    """Without a checkpoint in sight, so that only the signal can have saved."""
    run = tmp_path / "run"
    spawned = spawn(run, "--max-steps", "12", "--workers", "1")
    spawned.wait_for_rows(4)
    os.kill(spawned.pid, number)
    assert spawned.end() == 128 + number
    assert "Traceback" not in spawned.err
    step = last_state(run)["progress"]["step"]
    assert 3 <= step < 12 and course(run)[-1][0] == step
    assert f"stopped after step {step}; go on with: lomar pretrain --out {run} --resume" in spawned.err
    assert lomar("pretrain", "--out", run, "--resume").status == 0
    assert pretrain(tmp_path / "whole", "--max-steps 12").status == 0
    assert course(run) == course(tmp_path / "whole")
