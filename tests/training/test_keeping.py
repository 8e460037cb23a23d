"""Claims about what keeps a run: rows wait for room, and no checkpoint passes them by."""

import errno
from pathlib import Path

import pytest

from lomar.training import keeping
from lomar.training.checkpoint import Checkpoints
from lomar.training.keeping import Keeper
from lomar.training.records import Metrics, Row


class Disk:
    """Full or not."""

    full = False


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Makes metrics unwritable while it is full."""
    disk, write = Disk(), Metrics.write

    def written(self: Metrics, rows: list[Row]) -> None:
        if disk.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, rows)

    monkeypatch.setattr(Metrics, "write", written)
    return disk


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def keeper(tmp_path: Path, said: list[str]) -> Keeper:
    return Keeper(Metrics(tmp_path / "metrics.jsonl"), Checkpoints(tmp_path / "states"), 10, said.append, tmp_path)


def steps(keeper: Keeper) -> list[int]:
    return [row["step"] for row in Metrics.read(keeper.metrics.path)]


def test_rows_wait_for_room_and_it_is_said_once(keeper: Keeper, disk: Disk, said: list[str], tmp_path: Path) -> None:
    keeper.record([{"step": 1}])
    disk.full = True
    keeper.record([{"step": 2}, {"step": 3}])
    keeper.record([{"step": 4}])
    assert steps(keeper) == [1]
    assert said == [f"warning: the metrics of {tmp_path} cannot be written: No space left on device; training goes on"]
    disk.full = False
    keeper.record([{"step": 5}])
    assert steps(keeper) == [1, 2, 3, 4, 5]


def test_no_checkpoint_is_written_before_the_rows_before_it(keeper: Keeper, disk: Disk, said: list[str]) -> None:
    keeper.record([{"step": 1}])
    keeper.save(1, {})
    disk.full = True
    keeper.record([{"step": 2}])
    with pytest.raises(OSError, match="No space left"):
        keeper.save(2, {})
    keeper.save(2, {}, needed=False)
    assert keeper.checkpoints.steps() == [1] and "tries to write it again in 60 s" in said[-1]
    disk.full = False
    keeper.save(2, {}, needed=False)
    assert keeper.checkpoints.steps() == [2, 1] and steps(keeper) == [1, 2]


def test_what_could_not_be_written_is_soon_due_again(
    keeper: Keeper, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "RETRY_SECONDS", -1)
    keeper.save(1, {})
    assert not keeper.due
    disk.full = True
    keeper.record([{"step": 2}])
    keeper.save(2, {}, needed=False)
    assert keeper.due
