"""Claims about checkpoint files."""

from pathlib import Path

import pytest
import torch

from lomar.errors import UserError
from lomar.training.checkpoint import load_checkpoint, save_checkpoint


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(3, 5)}, "progress": {"step": 7, "elapsed_s": 0.1 + 0.2}}
    save_checkpoint(tmp_path / "deep" / "last.pt", state)
    found = load_checkpoint(tmp_path / "deep" / "last.pt")
    assert torch.equal(found["model"]["w"], state["model"]["w"]) and found["progress"] == state["progress"]


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises((TypeError, AttributeError)):
        save_checkpoint(path, {"step": (item for item in [2])})  # a generator cannot be written
    assert load_checkpoint(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


class Surprise:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code ran')",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"model": Surprise()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"the checkpoint .*last\.pt cannot be read"):
        load_checkpoint(tmp_path / "last.pt")
