"""Claims about checkpoints: what is whole, what is kept, what a torn one leads to."""

import errno
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomar.errors import UserError
from lomar.training import checkpoint
from lomar.training.checkpoint import Checkpoints


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((300, 5), float(step))}, "progress": {"step": step, "elapsed_s": 0.1 + 0.2}}


def kept(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder / "deep" / "checkpoints")
    for step in steps:
        checkpoints.save(step, state(step))
    return checkpoints


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    step, found = kept(tmp_path, 7).load() or (0, {})
    assert step == 7 and torch.equal(found["model"]["w"], state(7)["model"]["w"])
    assert found["progress"] == state(7)["progress"]


def test_torch_reads_it_and_its_end_is_the_digest_of_the_rest(tmp_path: Path) -> None:
    path = kept(tmp_path, 7).path(7)
    assert torch.load(path, weights_only=True)["progress"]["step"] == 7
    content = path.read_bytes()
    assert content[-79:] == b"\nlomar sha256 " + hashlib.sha256(content[:-79]).hexdigest().encode() + b"\n"


def test_there_is_none_where_none_was_written(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").load() is None


def test_the_last_two_are_kept_and_none_of_a_later_step(tmp_path: Path) -> None:
    """A run that went back, to half its learning rate, must not find what it left behind."""
    checkpoints = kept(tmp_path, 0, 5, 10)
    assert checkpoints.steps() == [10, 5]
    checkpoints.save(5, state(5))
    assert checkpoints.steps() == [5]
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000000005.pt"]


@settings(max_examples=60, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), change=st.sampled_from(["bit", "cut", "longer", "zeros"]))
def test_any_damage_is_noticed_and_the_one_before_is_taken(
    place: float, change: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoints = kept(tmp_path_factory.mktemp("kept"), 5, 10)
    path = checkpoints.path(10)
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if change == "bit":
        content[at] ^= 4
    elif change == "cut":
        del content[at:]
    elif change == "longer":
        content[at:at] = b"\0"
    else:
        content[at:] = bytes(len(content) - at)
    path.write_bytes(content)
    warnings: list[str] = []
    step, found = checkpoints.load(warnings.append) or (0, {})
    assert step == 5 and found["progress"]["step"] == 5
    assert (
        len(warnings) == 1
        and str(path) in warnings[0]
        and "going on from the checkpoint before it, of step 5" in warnings[0]
    )


def test_what_a_kill_left_half_written_goes_with_the_next(tmp_path: Path) -> None:
    """Each of them takes as much room as a checkpoint."""
    checkpoints = kept(tmp_path, 7)
    (checkpoints.folder / ".step-000000009.pt.tmp").write_bytes(b"some")
    checkpoints.save(11, state(11))
    assert {path.name for path in checkpoints.folder.iterdir()} == {"step-000000007.pt", "step-000000011.pt"}


def test_where_all_are_damaged_one_line_names_them(tmp_path: Path) -> None:
    checkpoints = kept(tmp_path, 5, 10)
    for step in (5, 10):
        checkpoints.path(step).write_bytes(b"hello")
    with pytest.raises(UserError) as refused:
        checkpoints.load()
    text = str(refused.value)
    assert all(str(checkpoints.path(step)) in text for step in (5, 10)) and "\n" not in text and "--overwrite" in text


@pytest.mark.parametrize("failure", ["full", "cannot be pickled", "other bytes"])
def test_a_failed_write_leaves_those_before(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = kept(tmp_path, 5)
    before = checkpoints.path(5).read_bytes()
    written = state(10)
    if failure == "full":

        def write(self: Any, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoint._Digesting, "write", write)
    elif failure == "cannot be pickled":
        written["step"] = (item for item in [2])
    else:
        monkeypatch.setattr(checkpoint, "_is_whole", lambda path: False)
    with pytest.raises((OSError, TypeError, AttributeError)):
        checkpoints.save(10, written)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000000005.pt"]
    assert checkpoints.path(5).read_bytes() == before


class Surprise:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize("last", [1, 2, 5, 9])
def test_an_interrupt_while_one_is_written_stays_an_interrupt(
    last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's writer then fails with an error of its own, which looks like that of a full disk."""
    checkpoints = kept(tmp_path, 7)
    write = checkpoint._Digesting.write
    written: list[int] = []

    def interrupted(self: Any, data: Any) -> int:
        written.append(len(data))
        if len(written) == last:
            raise KeyboardInterrupt
        return write(self, data)

    monkeypatch.setattr(checkpoint._Digesting, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(8, state(8))
    assert len(written) >= last and [path.name for path in checkpoints.folder.iterdir()] == ["step-000000007.pt"]


def test_what_an_interrupted_writer_still_writes_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's does so when it is freed; an error there would abort the process."""
    checkpoints = kept(tmp_path, 7)
    files: list[Any] = []

    def interrupted(state: dict[str, Any], file: Any) -> None:
        files.append(file)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(8, state(8))
    assert files[0].write(b"late") == 4
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000000007.pt"]


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    """Not even one with a right digest, which anybody can work out."""
    checkpoints = kept(tmp_path)
    checkpoints.save(7, {"model": Surprise()})
    with pytest.raises(UserError, match=r"step-000000007\.pt cannot be read"):
        checkpoints.load()
