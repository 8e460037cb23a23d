"""Claims about a run whose disk is full: it goes on, loses nothing, and says so in lines."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kept import last_state

from lomar.training.loop import Trainer

Command = Callable[..., Any]
Course = Callable[[Path], list[tuple[int, float, float, float]]]

STEPS = "--max-steps 9 --checkpoint-steps 2"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def full_between(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Fill the disk before a step, and give the room back before a later one."""
    step_of, filler = Trainer._step, small_disk / "filler"

    filled: list[bool] = []

    def between(first: int, last: int) -> None:
        def step(self: Trainer, batches: Any) -> Any:
            if self.progress.step == first and not filled:
                filled.append(True)
                with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            if self.progress.step == last:
                filler.unlink()
            return step_of(self, batches)

        monkeypatch.setattr(Trainer, "_step", step)

    return between


def test_a_run_outlives_a_disk_that_is_full_for_a_while(
    pretrain: Command, small_disk: Path, full_between: Callable[[int, int], None], tmp_path: Path, course: Course
) -> None:
    """No checkpoint can be written from step 4 to 7; in the end nothing is missing."""
    assert pretrain(tmp_path / "whole", STEPS).status == 0
    full_between(3, 7)
    done = pretrain(small_disk / "run", STEPS)
    assert done.status == 0 and "Traceback" not in done.out + done.err
    for step in (4, 6):
        assert f"warning: the checkpoint of step {step} cannot be written to" in done.out
    assert "No space left on device; training goes on" in done.out
    assert course(small_disk / "run") == course(tmp_path / "whole")
    assert last_state(small_disk / "run")["progress"]["step"] == 9


def test_a_run_that_ends_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    lomar: Command,
    pretrain: Command,
    small_disk: Path,
    full_between: Callable[[int, int], None],
    tmp_path: Path,
    course: Course,
) -> None:
    assert pretrain(tmp_path / "whole", STEPS).status == 0
    full_between(5, 99)
    run = small_disk / "run"
    done = pretrain(run, STEPS)
    assert (
        done.status == 1 and done.err.count("\n") == 1 and "--resume goes on from there when there is room" in done.err
    )
    assert last_state(run)["progress"]["step"] == 4
    assert not list(run.rglob("*.tmp")), "nothing half-written is left"
    (small_disk / "filler").unlink()
    assert lomar("pretrain --resume --out", run).status == 0
    assert course(run) == course(tmp_path / "whole")
