"""Claims about the loop: gradients, clipping, losses that are not numbers, and what it lets go of."""

import io
import math
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept import last_state
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from lomar.data.loader import MicroBatch
from lomar.errors import TrainingError
from lomar.training.bad_files import BadFiles
from lomar.training.loop import Course, NonFiniteError, Trainer
from lomar.training.optim import Schedule
from lomar.training.records import Display, Metrics, Row
from lomar.training.signals import StopRequest

HIDDEN = 3  # hidden patches of an image


class Squares(nn.Module):
    """A stand-in for a method: the sum of squared errors of a linear map, over "hidden patches"."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, HIDDEN)

    def forward(self, pixels: Tensor) -> tuple[Tensor, int]:
        losses = (self.linear(pixels) - 1).square()
        return losses.sum(), losses.numel()


def images(step: int, count: int) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(step))


def make_trainer(
    run: Path,
    *,
    sizes: tuple[int, ...] = (7,),
    steps: int = 3,
    clip_grad: float = 0.0,
    checkpoint_steps: int | None = 1,
    change: Callable[[int, Tensor], Tensor] = lambda step, pixels: pixels,
    bad: Callable[[int], list[tuple[str, str]]] = lambda step: [],
    evaluate: Callable[[int], Row] = lambda step: {},
    console: Console | None = None,
) -> Trainer:
    """A trainer of `Squares` on batches that are handed over in micro-batches of the given sizes."""
    torch.manual_seed(0)
    method = Squares()
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()

    def batches(first_step: int) -> Generator[MicroBatch, None, None]:
        try:
            for step in range(first_step, steps):
                parts = change(step, images(step, sum(sizes))).split(list(sizes))
                for number, part in enumerate(parts):
                    names = [f"file-{step}-{number}"]
                    yield MicroBatch({"pixels": part}, names, bad(step), last=number == len(parts) - 1)
        finally:
            closed.append(True)

    closed: list[bool] = []
    course = Course(
        total_steps=steps,
        images=20,
        fingerprint="these",
        batch_size=sum(sizes),
        schedule=Schedule(0.1, 0.0, steps),
        clip_grad=clip_grad,
        checkpoint_steps=checkpoint_steps,
        checkpoint_minutes=10.0,
        evaluation_steps=100,
        evaluation_forced=True,
        max_bad_share=0.25,
    )
    (run / "checkpoints").mkdir(parents=True)
    display = Display(1, console=console or Console(file=io.StringIO()))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.0)
    trainer = Trainer(fabric, method, optimizer, course, batches, run, display, lambda: None, evaluate)
    trainer.restore()
    trainer.save()
    trainer.closed = closed  # type: ignore[attr-defined]
    return trainer


def gradients_of_a_step(trainer: Trainer) -> list[Tensor]:
    """The gradients that the optimiser is given in the first step."""
    taken: list[Tensor] = []

    def take(optimizer: Any, *unused: Any) -> None:
        taken.extend(p.grad.clone() for p in trainer.method.parameters() if p.grad is not None)

    handle = trainer.method.register_forward_hook(lambda *unused: None)
    trainer.optimizer.optimizer.register_step_pre_hook(take)
    trainer._step(trainer.batches(0))
    handle.remove()
    return taken


def by_hand(pixels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Gradients and loss of the mean over all hidden patches of a whole batch."""
    torch.manual_seed(0)
    method = Squares()
    total, hidden = method(pixels)
    loss = total / hidden
    loss.backward()
    return [p.grad for p in method.parameters() if p.grad is not None], loss.detach()


def test_a_gpu_tells_how_full_its_memory_was_and_a_cpu_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "cpu")
    trainer.run(StopRequest())
    assert not any("gpu_memory" in row for row in Metrics.read(trainer.metrics.path))
    monkeypatch.setattr("lomar.training.loop.gpu_share", lambda device: 0.123456)
    trainer = make_trainer(tmp_path / "gpu")
    trainer.run(StopRequest())
    assert [row["gpu_memory"] for row in Metrics.read(trainer.metrics.path) if "loss" in row] == [0.1235] * 3


@pytest.mark.parametrize("sizes", [(7,), (3, 3, 1), (1,) * 7])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(sizes: tuple[int, ...], tmp_path: Path) -> None:
    expected, loss = by_hand(images(0, 7))
    trainer = make_trainer(tmp_path, sizes=sizes)
    for ours, theirs in zip(gradients_of_a_step(trainer), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    trainer = make_trainer(tmp_path / "loss", sizes=sizes)
    _, found, norm, names = trainer._step(trainer.batches(0))
    assert found.item() == pytest.approx(loss.item())
    assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in expected)))
    assert names == [f"file-0-{number}" for number in range(len(sizes))]


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_clipping_is_that_of_torch(clip: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = Squares()
    total, hidden = method(images(0, 7))
    (total / hidden).backward()
    norm = torch.nn.utils.clip_grad_norm_(method.parameters(), clip)
    trainer = make_trainer(tmp_path, sizes=(4, 3), clip_grad=clip)
    for ours, theirs in zip(gradients_of_a_step(trainer), method.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-8)
    row_norm = make_trainer(tmp_path / "norm", sizes=(4, 3), clip_grad=clip)
    assert row_norm._step(row_norm.batches(0))[2].item() == pytest.approx(norm.item())  # before clipping


# Losses that are not numbers


def spoilt_at(step: int, times: int = 99) -> Callable[[int, Tensor], Tensor]:
    """Makes the pixels of one step's batch infinite, the first few times it comes."""
    left = [times]

    def change(at: int, pixels: Tensor) -> Tensor:
        if at == step and left[0] > 0:
            left[0] -= 1
            return pixels * math.inf
        return pixels

    return change


def test_a_loss_that_is_not_finite_goes_back_and_halves_the_rate(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=500)
    trainer = make_trainer(tmp_path, steps=6, checkpoint_steps=2, change=spoilt_at(3, times=1), console=console)
    assert trainer.run(StopRequest())
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        "the loss is not finite at step 4; its batch holds file-3-0; back to step 2 with half the learning rate"
    ) in said
    rows = Metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    full = [Schedule(0.1, 0.0, 6).lr(step) for step in range(6)]
    assert [row["lr"] for row in rows] == [*full[:2], *(lr / 2 for lr in full[2:])]
    assert np.isfinite([row["loss"] for row in rows]).all()


def test_a_loss_that_stays_so_ends_the_run_and_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=6, checkpoint_steps=2, change=spoilt_at(3))
    with pytest.raises(TrainingError) as caught:
        trainer.run(StopRequest())
    assert str(caught.value) == (
        "the loss is not finite at step 4; its batch holds file-3-0; it happened again after the learning rate was "
        "halved"
    )
    state = last_state(tmp_path)
    assert state["progress"]["step"] == 2 and state["progress"]["lr_factor"] == 0.5
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert [row["step"] for row in Metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_weights_that_are_not_finite_are_neither_evaluated_nor_saved(tmp_path: Path) -> None:
    """At the last step an evaluation and a checkpoint are due at once."""
    evaluated: list[int] = []

    def evaluate(step: int) -> Row:
        evaluated.append(step)
        return {}

    trainer = make_trainer(tmp_path, steps=3, change=spoilt_at(2), evaluate=evaluate)
    with pytest.raises(TrainingError):
        trainer.run(StopRequest())
    assert evaluated == [0]
    assert last_state(tmp_path)["progress"]["step"] == 2


def test_a_terminal_shows_one_bar_after_going_back(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)
    trainer = make_trainer(tmp_path, change=spoilt_at(1, times=1), console=console)
    with trainer.display:
        assert trainer.run(StopRequest())


def test_many_files_of_a_bad_batch_are_counted_not_all_listed() -> None:
    told = str(NonFiniteError(3, [f"f{number}" for number in range(20)]))
    assert "f7 and 12 more" in told and "f8" not in told


def test_a_command_that_meets_infinity_twice_fails_with_status_1(
    pretrain: Callable[..., Any], tmp_path: Path, photos: Path, rows: Callable[[Path], list[Row]]
) -> None:
    """A float image so bright that its square is infinite in float32, among good ones."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for number in range(8):
        pixels = rng.random((40, 40, 3), dtype=np.float32)
        np.save(folder / f"{number}.npy", pixels * (np.float32(1e30) if number == 5 else 1))
    words = "--max-steps 4 --checkpoint-steps 1 --mean 0 0 0 --std 1 1 1 --patch-size 4 --image-size 16"
    outcome = pretrain(tmp_path / "run", words, "--data", folder)
    assert outcome.status == 1 and outcome.err.count("\n") == 1 and "Traceback" not in outcome.err
    assert outcome.err.startswith("lomar: failed: the loss is not finite at step ")
    assert str(folder / "5.npy") in outcome.err
    assert outcome.out.count("with half the learning rate") == 1
    found = rows(tmp_path / "run")  # valid JSON
    state = last_state(tmp_path / "run")
    assert state["progress"]["step"] == found[-1]["step"] < 4
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


# Letting go


@pytest.mark.parametrize("ending", ["finished", "stopped", "failed"])
def test_the_loader_is_closed_however_training_ends(ending: str, tmp_path: Path) -> None:
    """Workers of a loader that is left to the garbage collector can keep the process from ending."""
    stop = StopRequest()
    trainer = make_trainer(tmp_path, change=spoilt_at(1) if ending == "failed" else spoilt_at(99))
    if ending == "stopped":
        stop.signal_number = signal.SIGTERM
    try:
        assert trainer.run(stop) == (ending == "finished")
    except TrainingError:
        assert ending == "failed"
    assert trainer.closed  # type: ignore[attr-defined]


def test_a_stop_saves_after_the_step_it_comes_in(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=9, checkpoint_steps=None)
    stop = StopRequest()
    stop.signal_number = signal.SIGINT
    assert not trainer.run(stop)
    assert last_state(tmp_path)["progress"]["step"] == 1


def test_a_second_interrupt_stops_at_once_and_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# Bad files


def test_a_bad_file_is_listed_once_over_all_sittings(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.txt"
    assert BadFiles(path).add([("a.jpg", "truncated"), ("b\n.jpg", "no\timage")]) == ["a.jpg", "b .jpg"]
    assert BadFiles(path).add([("a.jpg", "truncated"), ("b\n.jpg", "no\timage"), ("c\x85.jpg", "x")]) == ["c\x85.jpg"]
    assert BadFiles(path).add([("c\x85.jpg", "x")]) == []
    assert path.read_text(encoding="utf-8").split("\n") == ["a.jpg\ttruncated", "b .jpg\tno image", "c\x85.jpg\tx", ""]


def test_training_stops_when_too_many_files_turn_out_bad(tmp_path: Path) -> None:
    """Of 20 images 25 % may be bad: the sixth is one too many."""
    trainer = make_trainer(tmp_path, steps=9, bad=lambda step: [(f"{step}.jpg", "truncated")])
    with pytest.raises(TrainingError, match=r"^6 of 20 images cannot be read .*--max-bad-share allows 25%$"):
        trainer.run(StopRequest())
    assert trainer.progress.step == 6


def test_evaluations_take_a_tenth_of_the_time_unless_asked_for(tmp_path: Path) -> None:
    from dataclasses import replace

    trainer = make_trainer(tmp_path)
    trainer.course = replace(trainer.course, evaluation_steps=2, evaluation_forced=False)
    trainer._evaluation_s, trainer.progress.evaluations_s = 1.0, 3.0
    due = {}
    for step, elapsed_s in ((2, 39.0), (2, 41.0), (3, 41.0)):
        trainer.progress.step, trainer.progress.elapsed_s = step, elapsed_s
        due[step, elapsed_s] = trainer._evaluation_due()
    assert due == {(2, 39.0): False, (2, 41.0): True, (3, 41.0): False}
    trainer.course = replace(trainer.course, evaluation_forced=True)
    trainer.progress.step, trainer.progress.elapsed_s = 2, 0.0
    assert trainer._evaluation_due()
