"""Claims about several processes that torchrun starts."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Course = Callable[[Path], list[tuple[int, float, float, float]]]

# Without pictures, as the fixture `pretrain`, in processes that share nothing with this one.
SCRIPT = """
import sys
import lomar.commands.evaluation as evaluation, lomar.commands.finetune as finetune, lomar.commands.pretrain as pretrain
from lomar.cli import main
evaluation.Evaluation._pictures = lambda self, step: None
evaluation.learning_curves = pretrain.learning_curves = finetune.learning_curves = lambda rows, path: None
sys.exit(main(sys.argv[1:]))
"""


def in_two_processes(folder: Path, *words: str | Path) -> str:
    """What a command line under torchrun says."""
    script = folder / "lomar_small.py"
    script.write_text(SCRIPT)
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    arguments = [part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])]
    done = subprocess.run(
        [sys.executable, *launcher.split(), str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
