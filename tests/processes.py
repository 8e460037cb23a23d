"""Command lines in two processes that torchrun starts."""

import os
import subprocess
import sys
from pathlib import Path

# Without pictures, as the fixture `pretrain`, in processes that share nothing with this one.
SCRIPT = """
import sys
import lomar.commands.course as course, lomar.commands.evaluation as evaluation
from lomar.cli import main
evaluation.Evaluation._pictures = lambda self, step: None
evaluation.learning_curves = course.learning_curves = lambda rows, path: None
sys.exit(main(sys.argv[1:]))
"""


def in_two_processes(folder: Path, *words: str | Path) -> str:
    """What a command line under torchrun says."""
    done = torchrun(folder, "", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchrun(folder: Path, before: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command line in two processes, each of which runs some code before it."""
    script = folder / "lomar_small.py"
    script.write_text(before + SCRIPT)
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    arguments = [part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])]
    return subprocess.run(
        [sys.executable, *launcher.split(), str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
