"""Claims about the SLURM script of docs/cluster.md: warned, a run is saved and requeued until it is finished."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"

# Two machines with a process each, which are warned when the run has done three steps, as by `--signal=TERM@180`.
SRUN = """
import os, signal, subprocess, sys, time
from pathlib import Path
assert sys.argv[1] == "--kill-on-bad-exit=1"
step = {"SLURM_JOB_ID": os.environ["SLURM_JOB_ID"], "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0"}
tasks = [
    subprocess.Popen(sys.argv[2:], env=os.environ | step | {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i)})
    for i in range(2)
]
metrics = Path(sys.argv[sys.argv.index("--out") + 1]) / "metrics.jsonl"
first = not metrics.exists()
while first and all(task.poll() is None for task in tasks):
    if metrics.exists() and '"step": 3,' in metrics.read_text():
        for task in tasks:
            task.send_signal(signal.SIGTERM)
        break
    time.sleep(0.01)
sys.exit(max(task.wait() for task in tasks))
"""


def test_the_script_requeues_a_run_that_was_warned_and_ends_when_it_is_finished(
    pretrain: Callable[..., Any], tmp_path: Path, photos: Path, course: Callable[[Path], Any]
) -> None:
    """The second start, of the same script, goes on; the losses are those of one process that nothing stopped."""
    settings = (
        "--model 16x3x2 --image-size 32 --patch-size 8 --window-size 3 --views 2 --micro-batch 2 --workers 0 "
        "--precision fp32 --device cpu --base-lr 0.05 --warmup-epochs 1 --eval-every 1000 --max-steps 30"
    )
    assert pretrain(tmp_path / "one", "--max-steps 30").status == 0
    script = re.search(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(), flags=re.S)
    assert script is not None
    run = tmp_path / "run"
    text = script[1].replace("/storage/photos", str(photos)).replace("/storage/run", str(run))
    assert "--batch-size 4096" in text
    (tmp_path / "lomar.sbatch").write_text(text.replace("--batch-size 4096", f"--batch-size 4 {settings}"))
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / "srun.py").write_text(SRUN)
    for name, line in {
        "srun": f'exec {sys.executable} {tmp_path / "srun.py"} "$@"',
        "scontrol": f'echo "$@" >> {tmp_path / "requeued"}',
        "lomar": f'exec {sys.executable} -m lomar "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(40_000 + os.getpid() % 10_000),  # the port comes from it
        "OMP_NUM_THREADS": "1",
    }

    def job() -> int:
        command = ["bash", str(tmp_path / "lomar.sbatch")]
        return subprocess.run(command, env=environment, capture_output=True, timeout=240).returncode

    assert job() == 143
    assert (tmp_path / "requeued").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    stopped_at = len(course(run))
    assert 3 <= stopped_at < 30
    assert job() == 0
    assert (tmp_path / "requeued").read_text().count("\n") == 1
    np.testing.assert_allclose(np.array(course(run)), np.array(course(tmp_path / "one")), rtol=1e-4)
