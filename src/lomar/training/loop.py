"""The training loop: a straight line from batches to updates."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lomar.data.loader import MicroBatch
from lomar.errors import TrainingError, UserError
from lomar.training.bad_files import BadFiles
from lomar.training.checkpoint import FOLDER, Checkpoints
from lomar.training.keeping import Keeper, why
from lomar.training.memory import gpu_share, keep_freed_memory, peak_bytes
from lomar.training.optim import Schedule, StepSchedule
from lomar.training.processes import first_alone, said_by_all
from lomar.training.records import Display, Metrics, Row, TensorBoard
from lomar.training.signals import StopRequest
from lomar.training.step import Paced, Step, on_device

# Rows wait this many steps at most: one look at the device for several steps, and little to lose.
BUFFERED_STEPS = 10
# What is said of losses that are not finite; `lomar study` knows runs by it.
HALVED = "with half the learning rate"
AGAIN_NOT_FINITE = "it happened again after the learning rate was halved"
LOOK_SECONDS = 5  # of several GPUs: how late a signal may be answered, if steps are shorter than that
EVALUATION_SHARE = 0.1  # of the run's time, unless an interval is asked for


@dataclass(frozen=True)
class Course:
    """What a run does and how often it looks up.

    Args:
        total_steps: optimiser steps.
        images: images in an epoch.
        batch_size: images per step, over all processes.
        schedule: learning rate of each step.
        clip_grad: largest gradient norm; 0 for none.
        clip_each: whether it is that of each tensor, and not of all together.
        weight_decay: of each step; None where it stays.
        checkpoint_steps: steps between checkpoints, or None.
        checkpoint_minutes: minutes between checkpoints.
        evaluation_steps: steps between evaluations.
        evaluation_forced: evaluate at each of those, whatever share of the time it takes.
        max_bad_share: share of unreadable files from which to stop.
        fingerprint: of the list of images; a run goes on with the same images alone.
    """

    total_steps: int
    images: int
    fingerprint: str
    batch_size: int
    schedule: Schedule | StepSchedule
    clip_grad: float
    checkpoint_steps: int | None
    checkpoint_minutes: float
    evaluation_steps: int
    evaluation_forced: bool
    max_bad_share: float
    clip_each: bool = False
    weight_decay: Schedule | None = None


@dataclass
class Progress:
    """What a checkpoint holds beside weights and optimiser.

    Args:
        step: updates done.
        elapsed_s: seconds spent, over all sittings.
        evaluations_s: those of them that evaluation took.
        lr_factor: 1, or a half after a non-finite loss.
    """

    step: int = 0
    elapsed_s: float = 0.0
    evaluations_s: float = 0.0
    lr_factor: float = 1.0


class NonFiniteError(Exception):
    """The loss or its gradient is not a number."""

    def __init__(self, step: int, files: list[str]) -> None:
        super().__init__(step, files)
        self.step = step
        self.files = files

    def __str__(self) -> str:
        listed = ", ".join(self.files[:8]) + (f" and {len(self.files) - 8} more" if len(self.files) > 8 else "")
        return f"the loss is not finite at step {self.step}; its batch holds {listed}"


class Trainer:
    """One run: what is trained, optimiser, progress, and where they are written.

    Args:
        fabric: devices, precision and processes.
        method: a batch's inputs by name -> sum of losses and how many they are (hidden patches, images).
        optimizer: over the method's parameters; a group's `lr_scale` is a factor of its rate.
        course: what to do.
        batches: first step -> micro-batches from that step on.
        run: the run's folder.
        display: progress.
        export: writes what a user takes away (encoder, reconstructor) into the run; called at every checkpoint.
        evaluate: step -> named numbers; called at step 0, now and then, and at the end.
        average: a moving average of the method's weights, updated at each step.
        compiled: whether the step is compiled.
        paced: the method, if it has more to do in a step.
    """

    def __init__(
        self,
        fabric: Fabric,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        course: Course,
        batches: Callable[[int], Generator[MicroBatch, None, None]],
        run: Path,
        display: Display,
        export: Callable[[], None],
        evaluate: Callable[[int], Row],
        average: ModelEmaV3 | None = None,
        compiled: bool = False,
        paced: Paced | None = None,
    ) -> None:
        if fabric.device.type == "cpu":
            keep_freed_memory()
        self.fabric = fabric
        self.method = method
        self.training_step = Step(
            fabric, method, optimizer, course.batch_size, course.clip_grad, compiled, course.clip_each, paced
        )
        self.optimizer = self.training_step.optimizer
        self.course = course
        self.batches = batches
        self.run_folder = run
        self.checkpoints = Checkpoints(run / FOLDER)
        self.display = display
        self.export = export
        self.evaluate = evaluate
        self.average = average
        self.progress = Progress()
        self.finished = False
        self.metrics = Metrics(run / "metrics.jsonl")
        self.keeper = Keeper(self.metrics, self.checkpoints, course.checkpoint_minutes, display.say, run)
        self.tensorboard: TensorBoard | None = None  # opened by `restore`, which knows from where it counts
        self.bad_files = BadFiles(run / "bad_files.txt")
        self._bad: list[tuple[str, str]] = []  # found here, and not yet told to the other processes
        self._warned: set[str] = set()
        self._buffer: list[tuple[Row, Tensor, Tensor, list[str]]] = []
        self._evaluation_s = 0.0  # the last one
        self._looked, self._last_look, self._next_look = time.monotonic(), 0, 0
        self._last_flush = time.monotonic()  # moved on by what is not training, so that throughput is training's

    def save(self, needed: bool = True) -> bool:
        """Write the checkpoint and the files made from it, after the rows that belong before it; whether that went.

        Args:
            needed: whether the run cannot go on without it. Else it does, and tries again soon.

        Raises:
            TrainingError: it is needed and cannot be written, as when the disk is full. The one before stays.
        """
        self.flush()
        began = time.monotonic()
        state = self.training_step.whole_state() | {
            "progress": vars(self.progress).copy(),
            "fingerprint": self.course.fingerprint,
            "finished": self.finished,
        }
        if self.average:
            state["average"] = self.average.module.state_dict()
        failure = self.fabric.broadcast(self._written(state) if self.fabric.is_global_zero else None)
        self._last_flush += time.monotonic() - began
        if failure and needed:
            raise TrainingError(
                f"{failure}; the checkpoint before it is kept, and --resume goes on from there when there is room",
                shared=True,
            )
        self.keeper.settle(failure)
        return failure is None

    def _written(self, state: dict[str, Any]) -> str | None:
        """Why a checkpoint could not be written; None if it is."""
        try:
            self.keeper.write(self.progress.step, state, self.export)
        except OSError as error:
            return self.keeper.failed(self.progress.step, error)
        return None

    def restore(self) -> None:
        """Go back to the last whole checkpoint, or to the start where there is none; later rows are cut.

        Raises:
            UserError: none is whole, or the last one is of other images or another configuration; or the processes do
                not see the same images.
        """
        if len(set(said_by_all(self.fabric, [self.course.fingerprint]))) > 1:
            raise UserError(
                "the processes of this run do not see the same images; is --data on storage that all machines share?",
                shared=True,
            )
        state = self._last_state()
        if state:
            same_images = state.get("fingerprint", self.course.fingerprint) == self.course.fingerprint
            if not same_images and not state.get("finished"):
                raise UserError(
                    f"the images are not those that the run in {self.run_folder} began with: "
                    "files were added, removed, renamed or prepared otherwise; bring them back, or start a new run",
                    shared=True,
                )
            try:
                self.training_step.load(state)
                if self.average:
                    self.average.module.load_state_dict(state["average"])
                self.progress = Progress(**state["progress"])
                self.finished = state["finished"]
            except (KeyError, TypeError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"the checkpoints in {self.checkpoints.folder} do not fit this run's configuration", shared=True
                ) from error
        self._buffer.clear()
        self.keeper.forget()
        if self.fabric.is_global_zero:
            Metrics.cut(self.metrics.path, after_step=self.progress.step)
            self.close()
            if not self.finished:
                self.tensorboard = TensorBoard(self.run_folder, after_step=self.progress.step)

    def _last_state(self) -> dict[str, Any] | None:
        """The last whole checkpoint, which the first process chooses."""
        found = first_alone(self.fabric, lambda: self.checkpoints.load(self.display.say))
        step = self.fabric.broadcast(found[0] if found else None)
        if step is None:
            return None
        return found[1] if found else self.checkpoints.read(step)

    def close(self) -> None:
        """Let go of the files that stay open while training."""
        if self.tensorboard:
            try:
                self.tensorboard.close()
            except OSError as error:
                self._warn("tensorboard", error)
        self.tensorboard = None

    def _warn(self, what: str, error: OSError) -> None:
        """Tell of something that is not needed and cannot be written, once."""
        if what not in self._warned:
            self._warned.add(what)
            self.display.say(f"warning: {what} of {self.run_folder} cannot be written: {why(error)}; training goes on")

    def run(self, stop: StopRequest) -> bool:
        """Train to the end, or until `stop` asks; True when finished.

        A non-finite loss goes back to the last checkpoint and halves the learning rate, once.

        Raises:
            TrainingError: the loss is not finite again.
        """
        while True:
            try:
                return self._train(stop)
            except NonFiniteError as error:
                if self.progress.lr_factor < 1:
                    raise TrainingError(f"{error}; {AGAIN_NOT_FINITE}") from None
                self.restore()
                self.progress.lr_factor = 0.5
                self.display.say(f"{error}; back to step {self.progress.step} {HALVED}")
                self.save()

    def _train(self, stop: StopRequest) -> bool:
        if self.progress.step == 0:
            self._evaluate_first()
        self.display.start(self.course.total_steps, self.progress.step)
        # Closed here, not by the garbage collector: a loader's workers that outlive it keep the process from ending.
        with closing(on_device(self.batches(self.progress.step), self.fabric.device)) as batches:
            return self._learn(batches, stop)

    def _learn(self, batches: Iterator[MicroBatch], stop: StopRequest) -> bool:
        course, progress = self.course, self.progress
        began = self._last_flush = self._looked = time.monotonic()
        self.keeper.settle(None)
        self._last_look = self._next_look = progress.step
        elapsed_before = progress.elapsed_s
        self.training_step.train()
        while progress.step < course.total_steps:
            row, loss, grad_norm, names = self._step(batches)
            progress.elapsed_s = elapsed_before + time.monotonic() - began
            row["elapsed_s"] = round(progress.elapsed_s, 3)
            self._buffer.append((row, loss, grad_norm, names))
            self.finished = finished = progress.step == course.total_steps
            stopping = by_time = False
            if self._looks_up() or finished:
                wishes = (stop.signal_number > 0, self.keeper.due, bool(self._bad))
                stopping, by_time, bad = self._any(wishes)
                if bad:
                    self._tell_bad()
            if finished:
                row["peak_bytes"] = peak_bytes(self.fabric.device)
            if finished or self._evaluation_due():
                if not loss.isfinite() or not grad_norm.isfinite():
                    self.flush()  # raises; such weights are not to be evaluated
                row |= self._evaluated()
            if len(self._buffer) >= BUFFERED_STEPS or self.fabric.device.type == "cpu" or finished or stopping:
                self.flush()
            by_step = course.checkpoint_steps and progress.step % course.checkpoint_steps == 0
            if by_step or by_time or finished or stopping:
                self.save(needed=finished or stopping)
            if stopping and not finished:
                return False
        return True

    def _step(self, batches: Iterator[MicroBatch]) -> tuple[Row, Tensor, Tensor, list[str]]:
        """One optimiser step; its numbers stay on the device until `flush`."""
        course, progress = self.course, self.progress
        names: list[str] = []
        waited_s = 0.0
        last = False
        self.training_step.begin(progress.step)
        while not last:
            asked = time.monotonic()
            micro = next(batches)
            waited_s += time.monotonic() - asked
            last = micro.last
            names += micro.names
            self._bad += micro.bad
            self.training_step.learn(micro.inputs, last)
        lr = course.schedule.lr(progress.step) * progress.lr_factor
        decay = course.weight_decay.lr(progress.step) if course.weight_decay else None
        loss, grad_norm = self.training_step.update(lr, decay)
        progress.step += 1
        if self.average:
            self.training_step.bring_up_to_date()
            self.average.update(self.method)
        row: Row = {
            "step": progress.step,
            "epoch": round(progress.step * course.batch_size / course.images, 6),
            "lr": lr,
            "data_wait": waited_s,  # becomes a share of the time in `flush`
            **self.training_step.numbers,
        }
        return row, loss, grad_norm, names

    def flush(self) -> None:
        """Write and show the rows that wait.

        Raises:
            NonFiniteError: the loss or gradient of one is not finite; the rows before it are written.
        """
        if not self._buffer:
            return
        rows: list[Row] = []
        failure: NonFiniteError | None = None
        self._buffer[-1][1].item()  # waits for the device: only now the steps' time is known
        took_s = max(1e-9, time.monotonic() - self._last_flush) / len(self._buffer)  # a step
        self._last_flush = time.monotonic()
        # The same share for all of them: of one step's time alone a device does not tell.
        waited_s = sum(row["data_wait"] for row, *_ in self._buffer) / len(self._buffer)
        for row, loss, grad_norm, names in self._buffer:
            row["images_per_s"] = round(self.course.batch_size / took_s, 2)
            row["data_wait"] = round(min(1.0, waited_s / took_s), 4)
            row["loss"], row["grad_norm"] = loss.item(), grad_norm.item()
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                failure = NonFiniteError(row["step"], names)
                break
            row |= {name: round(row[name].item(), 5) for name in self.training_step.numbers}
            rows.append(row)
        if rows and (share := gpu_share(self.fabric.device)) is not None:
            rows[-1]["gpu_memory"] = round(share, 4)
        self._buffer.clear()
        self._record(rows)
        for row in rows:
            self.display.step(row, self._eta_s(row))
            self._look_for_trouble(row)
        if failure:
            raise failure

    def _look_for_trouble(self, row: Row) -> None:
        """Tell what a method finds wrong with its own numbers, once."""
        paced = self.training_step.paced
        trouble = paced.trouble(row) if paced else ""
        if trouble and "trouble" not in self._warned:
            self._warned.add("trouble")
            self.display.say(f"warning: step {row['step']}: {trouble}")

    def _evaluate_first(self) -> None:
        """The random initialisation, as step 0; not again when a run resumes there."""
        if any(row["step"] == 0 for row in Metrics.read(self.metrics.path)):
            return
        numbers = self._evaluated()
        if numbers:
            self._record([{"step": 0, "epoch": 0.0, "elapsed_s": 0.0, **numbers}])

    def _record(self, rows: list[Row]) -> None:
        """Rows into the files."""
        if not (rows and self.fabric.is_global_zero):
            return
        self.keeper.record(rows)
        try:
            if self.tensorboard:
                self.tensorboard.write(rows)
        except OSError as error:
            self._warn("tensorboard", error)
            self.tensorboard = None

    def _evaluated(self) -> Row:
        began = time.monotonic()
        self.training_step.bring_up_to_date()
        numbers: Row = {}
        try:
            numbers = self.evaluate(self.progress.step)
        except OSError as error:
            self._warn("what an evaluation leaves", error)
        self.fabric.barrier()
        self.training_step.train()
        self._evaluation_s = time.monotonic() - began
        self._last_flush += self._evaluation_s
        self.progress.evaluations_s += self._evaluation_s
        return numbers

    def _evaluation_due(self) -> bool:
        if self.progress.step % self.course.evaluation_steps:
            return False
        affordable = self.progress.evaluations_s + self._evaluation_s <= EVALUATION_SHARE * self.progress.elapsed_s
        return self.course.evaluation_forced or self._any((affordable,))[0]

    def _tell_bad(self) -> None:
        """Record the unreadable files that the processes found; all of them know of all."""
        found, self._bad = said_by_all(self.fabric, self._bad), []
        new = self.bad_files.noted(found)
        try:
            if self.fabric.is_global_zero:
                self.bad_files.write(new)
        except OSError as error:
            self._warn("bad_files.txt", error)
        for name, _ in new:
            self.display.say(f"skipped an unreadable image: {name}")
        count = len(self.bad_files.names)
        if new and count > self.course.max_bad_share * self.course.images:
            raise TrainingError(
                f"{count} of {self.course.images} images cannot be read (listed in {self.bad_files.path}); "
                f"--max-bad-share allows {self.course.max_bad_share:.0%}",
                shared=True,
            )

    def _looks_up(self) -> bool:
        """Whether to ask the others now. On GPUs that waits for them, so not at every step, but every few seconds."""
        if self.fabric.world_size == 1 or self.fabric.device.type == "cpu":
            return True
        if self.progress.step < self._next_look:
            return False
        now = time.monotonic()
        took_s = torch.tensor(now - self._looked, device=self.fabric.device)
        since = max(1, self.progress.step - self._last_look)
        mean_s = float(cast(Tensor, self.fabric.all_reduce(took_s, reduce_op="mean"))) / since  # alike in all processes
        self._looked, self._last_look = now, self.progress.step
        self._next_look = self.progress.step + max(1, min(BUFFERED_STEPS, int(LOOK_SECONDS / max(1e-6, mean_s))))
        return True

    def _any(self, wishes: tuple[bool, ...]) -> tuple[bool, ...]:
        """Of each wish, whether any process has it, so that all act alike."""
        if self.fabric.world_size == 1:
            return wishes
        counted = torch.tensor(wishes, dtype=torch.float32, device=self.fabric.device)
        return tuple(count > 0 for count in cast(Tensor, self.fabric.all_reduce(counted, reduce_op="sum")).tolist())

    def _eta_s(self, row: Row) -> float:
        return row["elapsed_s"] / row["step"] * (self.course.total_steps - row["step"])
