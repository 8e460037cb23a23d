"""Claims about several processes that torchrun starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from kept import last_state
from processes import in_two_processes, torchrun
from shapes import SETTINGS as DETECTING
from shapes import coco_layout

Course = Callable[[Path], list[tuple[int, float, float, float]]]


def test_two_processes_give_the_losses_of_one(
    pretrain: Callable[..., Any], tmp_path: Path, photos: Path, course: Course, rows: Callable[[Path], list[Any]]
) -> None:
    """An odd batch, so that their shares differ: 3 and 2 images. One metrics file, one checkpoint, one voice."""
    assert pretrain(tmp_path / "one", "--max-steps 3 --batch-size 5").status == 0
    run = tmp_path / "two"
    settings = (
        "--model 16x3x2 --image-size 32 --patch-size 8 --window-size 3 --views 2 --batch-size 5 --micro-batch 2 "
        "--workers 0 --precision fp32 --device cpu --base-lr 0.05 --warmup-epochs 1 --eval-every 1000 --max-steps 3"
    )
    out = in_two_processes(tmp_path, "pretrain --data", photos, "--out", run, settings)
    assert out.count("step 3/3") == 1
    np.testing.assert_allclose(np.array(course(run)), np.array(course(tmp_path / "one")), rtol=1e-4)
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3]


SHARED = (
    "--model 16x3x2 --image-size 32 --patch-size 8 --window-size 3 --views 2 --batch-size 4 --micro-batch 1 "
    "--workers 0 --precision fp32 --device cpu --base-lr 0.05 --warmup-epochs 1 --eval-every 1000"
)


def test_spread_weights_learn_as_whole_ones_and_processes_may_change_on_the_way(
    lomar: Callable[..., Any],
    pretrain: Callable[..., Any],
    interrupted_at: Callable[[int], None],
    tmp_path: Path,
    photos: Path,
    course: Course,
    rows: Callable[[Path], list[Any]],
) -> None:
    """One process, then two with spread weights (FSDP), which also judge by k-NN; against one from end to end."""
    course_of_one = "--max-steps 6 --checkpoint-steps 2"
    assert pretrain(tmp_path / "one", course_of_one, "--eval-data", photos).status == 0
    run = tmp_path / "run"
    interrupted_at(3)
    assert pretrain(run, course_of_one, "--eval-data", photos).status == 130
    out = in_two_processes(tmp_path, "pretrain --resume --strategy fsdp --micro-batch 1 --out", run)
    assert out.count("step 6/6") == 1
    np.testing.assert_allclose(np.array(course(run)), np.array(course(tmp_path / "one")), rtol=1e-4)
    judged = [[row["knn_top1"] for row in rows(each) if "knn_top1" in row] for each in (run, tmp_path / "one")]
    assert judged[0] == judged[1] and len(judged[0]) == 2
    ends = [last_state(each)["model"] for each in (run, tmp_path / "one")]
    for name, weights in ends[1].items():
        np.testing.assert_allclose(ends[0][name], weights, rtol=1e-3, atol=1e-4)  # keys' biases learn from rounding
    assert lomar("pretrain --resume --out", run).status == 0


def test_processes_that_would_not_do_the_same_are_refused_in_one_line(tmp_path: Path, photos: Path) -> None:
    """As on machines with unlike hardware, or copies of the images that differ. No folder of a run is left."""
    other = "import os, sys\nif os.environ['RANK'] == '1':\n    sys.argv += ['--weight-decay', '0.1']\n"
    done = torchrun(tmp_path, other, "pretrain --data", photos, "--out", tmp_path / "run", SHARED, "--max-steps 2")
    said = [line for line in done.stderr.splitlines() if line.startswith("lomar: ")]
    assert done.returncode and said == [
        "lomar: error: process 1 of 2 has --weight-decay 0.1, the first has 0.05: "
        "they see other images or other hardware; give --weight-decay"
    ]
    assert not (tmp_path / "run").exists()


def test_processes_that_see_other_images_are_refused_in_one_line(tmp_path: Path, photos: Path) -> None:
    """As where --data is on each machine's own disk, and they differ."""
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "red" / "0.png").unlink()
    other = f"import os, sys\nif os.environ['RANK'] == '1':\n    sys.argv[3] = {str(tmp_path / 'photos')!r}\n"
    done = torchrun(tmp_path, other, "pretrain --data", photos, "--out", tmp_path / "run", SHARED, "--max-steps 2")
    said = [line for line in done.stderr.splitlines() if line.startswith("lomar: ")]
    assert done.returncode and said == [
        "lomar: error: the processes of this run do not see the same images; "
        "is --data on storage that all machines share?"
    ]


def test_a_process_that_dies_ends_the_run_and_it_goes_on(
    lomar: Callable[..., Any], pretrain: Callable[..., Any], tmp_path: Path, photos: Path, course: Course
) -> None:
    """Killed at step 3 as for want of memory: no hang, no traceback of the other one, nothing lost before step 2."""
    assert pretrain(tmp_path / "one", "--max-steps 6 --micro-batch 1").status == 0
    run = tmp_path / "run"
    killer = """
import os, signal
from lomar.training.loop import Trainer
step = Trainer._step
def dies(self, batches):
    if self.progress.step == 3 and self.fabric.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batches)
Trainer._step = dies
"""
    words = ("pretrain --data", photos, "--out", run, SHARED, "--max-steps 6 --checkpoint-steps 2")
    done = torchrun(tmp_path, killer, *words)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("lomar: ")]
    assert said in (
        [],
        ["lomar: failed: another process of this run has ended, so this one ends; its own words say why"],
    )
    assert lomar("pretrain --resume --out", run).status == 0
    np.testing.assert_allclose(np.array(course(run)), np.array(course(tmp_path / "one")), rtol=1e-4)


def test_what_all_processes_find_wrong_one_of_them_says(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    done = torchrun(tmp_path, "", "pretrain --data", photos, "--out", tmp_path / "run", SHARED, "--max-steps 1")
    said = [line for line in done.stderr.splitlines() if line.startswith("lomar: ")]
    assert len(said) == 1 and "already holds a run" in said[0]


def test_two_processes_fine_tune_as_one(
    lomar: Callable[..., Any], tmp_path: Path, photos: Path, finished_run: Path, course: Course, miniature: None
) -> None:
    """Mixing, drop path and the moving average among it."""
    settings = (
        "--batch-size 8 --micro-batch 2 --workers 0 --precision fp32 --device cpu --base-lr 0.05 --max-steps 3 "
        "--mixup 0.8 --cutmix 1 --drop-path 0.2 --erase 0.5 --ema 0.5"
    )
    words = ("finetune --model", finished_run, "--data", photos, settings, "--out")
    assert lomar(*words, tmp_path / "one").status == 0
    out = in_two_processes(tmp_path, *words, tmp_path / "two")
    assert out.count("step 3/3") == 1 and out.count("the best classifier is in") == 1
    np.testing.assert_allclose(np.array(course(tmp_path / "two")), np.array(course(tmp_path / "one")), rtol=1e-4)


def test_two_processes_train_the_detector_of_one(
    lomar: Callable[..., Any], tmp_path: Path, miniature: None, course: Course, rows: Callable[[Path], list[Any]]
) -> None:
    """An image each at a time, as one process takes them: the same losses, and judged together."""
    root = coco_layout(tmp_path / "shapes")
    words = ("detect --model scratch:16x2x2 --data", root, DETECTING, "--max-steps 2 --drop-path 0.2 --eval-every 1")
    assert lomar(*words, "--out", tmp_path / "one").status == 0
    in_two_processes(tmp_path, *words, "--out", tmp_path / "two")
    np.testing.assert_allclose(np.array(course(tmp_path / "two")), np.array(course(tmp_path / "one")), rtol=1e-4)
    assert [row["step"] for row in rows(tmp_path / "two")] == [1, 2] and "box_ap" in rows(tmp_path / "two")[-1]
    assert json.loads((tmp_path / "two" / "evaluation.json").read_text())["images"] == 2
