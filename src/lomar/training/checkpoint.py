"""Checkpoints: all that continues a run."""

from pathlib import Path
from typing import Any

import torch

from lomar.errors import UserError
from lomar.files import write_atomically


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, atomically."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU; holds no code that could run.

    Raises:
        UserError: it cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}); is it a file of lomar?"
        ) from error
    return state
