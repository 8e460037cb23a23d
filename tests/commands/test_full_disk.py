"""Claims about a run whose disk is full: it goes on, loses nothing, and says so in lines."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kept import last_state
from safetensors.torch import load_file

from lomar.commands.probe import _Probe
from lomar.commands.tokenizer import _Training
from lomar.training import keeping
from lomar.training.loop import Trainer
from lomar.training.records import Metrics

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
def full_between(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fill the disk before a step, and give the room back before a later one."""
    filler = small_disk / "filler"
    filled: list[bool] = []

    def between(first: int, last: int, kind: type = Trainer, method: str = "_step") -> None:
        """
        Args:
            first, last: steps done.
            kind: what learns.
            method: its method that does one step.
        """
        step_of = getattr(kind, method)

        def step(self: Any, *given: Any) -> Any:
            done = self.progress.step if kind is Trainer else self.step
            if done == first and not filled:
                filled.append(True)
                with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            if done == last:
                filler.unlink()
            return step_of(self, *given)

        monkeypatch.setattr(kind, method, step)

    return between


def test_a_run_outlives_a_disk_that_is_full_for_a_while(
    pretrain: Command, small_disk: Path, full_between: Callable[..., None], tmp_path: Path, course: Course
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
    full_between: Callable[..., None],
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


TOKENIZER = (
    "tokenizer train --image-size 32 --window-size 2 --width 4 --blocks-per-group 1 --vocab 11 --batch-size 4 "
    "--workers 0 --device cpu --max-steps 9 --checkpoint-minutes 1e-9"
)
PROBE = (
    "probe --workers 0 --device cpu --precision fp32 --model scratch:16x2x2 --image-size 32 --base-lrs 1 "
    "--batch-size 4 --epochs 9 --checkpoint-minutes 1e-9"
)
LEARNERS = [(TOKENIZER, "t.safetensors", _Training, "_learn"), (PROBE, "p", _Probe, "_one_step")]


@pytest.fixture
def tried_again_at_once(monkeypatch: pytest.MonkeyPatch, miniature: None) -> None:
    monkeypatch.setattr(keeping, "RETRY_SECONDS", -1)


def kept(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows without clocks, and weights, of a tokenizer or of a probe."""
    metrics, weights = (
        (out / "metrics.jsonl", out / "probe.safetensors") if out.is_dir() else (out.with_suffix(".jsonl"), out)
    )
    clocks = ("images_per_s", "data_wait", "elapsed_s")
    rows = [{name: value for name, value in row.items() if name not in clocks} for row in Metrics.read(metrics)]
    return rows, {name: tensor.tolist() for name, tensor in load_file(weights).items()}


@pytest.mark.parametrize(("words", "name", "kind", "method"), LEARNERS)
def test_tokenizer_and_probe_outlive_a_disk_that_is_full_for_a_while(
    words: str,
    name: str,
    kind: type,
    method: str,
    lomar: Command,
    photos: Path,
    small_disk: Path,
    full_between: Callable[..., None],
    tmp_path: Path,
    tried_again_at_once: None,
) -> None:
    """No checkpoint can be written from step 4 to 6; in the end nothing is missing."""
    assert lomar(words, "--data", photos, "--out", tmp_path / name).status == 0
    full_between(3, 6, kind, method)
    done = lomar(words, "--data", photos, "--out", small_disk / name)
    assert done.status == 0 and done.err == ""
    for step in (4, 5, 6):
        assert f"warning: the checkpoint of step {step} cannot be written to {small_disk / name}: No space" in done.out
    assert kept(small_disk / name) == kept(tmp_path / name)


@pytest.mark.parametrize(("words", "name", "kind", "method"), LEARNERS)
def test_tokenizer_and_probe_that_end_on_a_full_disk_say_so_and_go_on_when_there_is_room(
    words: str,
    name: str,
    kind: type,
    method: str,
    lomar: Command,
    photos: Path,
    small_disk: Path,
    full_between: Callable[..., None],
    tmp_path: Path,
    tried_again_at_once: None,
) -> None:
    command = (words, "--data", photos, "--resume --out")
    assert lomar(*command, tmp_path / name).status == 0
    full_between(5, 99, kind, method)
    done = lomar(*command, small_disk / name)
    assert done.status == 2 and done.err.count("\n") == 1
    assert "cannot be written: No space left on device" in done.err and "--resume goes on when it can" in done.err
    (small_disk / "filler").unlink()
    assert lomar(*command, small_disk / name).status == 0
    assert kept(small_disk / name) == kept(tmp_path / name)
    assert not list(small_disk.rglob("*.tmp")), "nothing half-written is left"
