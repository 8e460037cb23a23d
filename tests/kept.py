"""Checkpoints as tests look at them."""

from pathlib import Path
from typing import Any

from lomar.training.checkpoint import FOLDER, Checkpoints


def last_state(run: Path) -> dict[str, Any]:
    """All that the last whole checkpoint of a run holds."""
    found = Checkpoints(run / FOLDER).load()
    assert found is not None, f"no checkpoint in {run}"
    return found[1]


def last_file(run: Path) -> Path:
    """The file of the last checkpoint, whole or not."""
    kept = Checkpoints(run / FOLDER)
    return kept.path(kept.steps()[0])
