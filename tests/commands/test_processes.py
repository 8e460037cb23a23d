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
import lomar.commands.evaluation as evaluation, lomar.commands.pretrain as pretrain
from lomar.cli import main
evaluation.Evaluation._pictures = lambda self, step: None
evaluation.learning_curves = pretrain.learning_curves = lambda rows, path: None
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_give_the_losses_of_one(
    pretrain: Callable[..., Any], tmp_path: Path, photos: Path, course: Course, rows: Callable[[Path], list[Any]]
) -> None:
    """An odd batch, so that their shares differ: 3 and 2 images. One metrics file, one checkpoint, one voice."""
    assert pretrain(tmp_path / "one", "--max-steps 3 --batch-size 5").status == 0
    script = tmp_path / "lomar_small.py"
    script.write_text(SCRIPT)
    run = tmp_path / "two"
    settings = (
        "--model 16x3x2 --image-size 32 --patch-size 8 --window-size 3 --views 2 --batch-size 5 --micro-batch 2 "
        "--workers 0 --precision fp32 --device cpu --base-lr 0.05 --warmup-epochs 1 --eval-every 1000 --max-steps 3"
    )
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = [sys.executable, *launcher.split(), str(script), "pretrain", "--data", str(photos), "--out", str(run)]
    done = subprocess.run(
        [*command, *settings.split()],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 3/3") == 1
    np.testing.assert_allclose(np.array(course(run)), np.array(course(tmp_path / "one")), rtol=1e-4)
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3]
