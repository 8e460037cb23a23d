"""A run from where it is to its end: its length, how often it looks up, what is said of it; for commands that train."""

from collections.abc import Callable
from pathlib import Path

from lightning_fabric import Fabric

from lomar.data.loader import Batching
from lomar.data.order import POOLED_GB
from lomar.figures.curves import learning_curves
from lomar.options import DetectOptions, FinetuneOptions, PretrainOptions
from lomar.training.loop import Course, Trainer
from lomar.training.optim import Schedule, StepSchedule
from lomar.training.records import Metrics
from lomar.training.signals import StopRequest

TrainingOptions = PretrainOptions | FinetuneOptions | DetectOptions


def total_steps(options: TrainingOptions, images: int) -> int:
    """Optimiser steps of a run on so many images."""
    return options.max_steps or max(1, round((options.epochs or 1) * (images / options.batch_size)))


def cosine_schedule(options: PretrainOptions | FinetuneOptions, images: int) -> Schedule:
    """The learning rates of pretraining and fine-tuning on so many images."""
    return Schedule(
        peak_lr=options.base_lr * options.batch_size / 256,
        warmup_steps=options.warmup_epochs * (images / options.batch_size),
        total_steps=total_steps(options, images),
        min_lr=options.min_lr,
    )


def course_of(
    options: TrainingOptions, images: int, fingerprint: str, schedule: Schedule | StepSchedule, evaluations: int
) -> Course:
    """What a run does and how often it looks up.

    Args:
        options: all settled.
        images: in an epoch.
        fingerprint: of what trains.
        schedule: learning rates.
        evaluations: at most, where no interval is given.
    """
    total, steps_per_epoch = total_steps(options, images), images / options.batch_size
    every = options.eval_every * steps_per_epoch if options.eval_every else max(steps_per_epoch, total / evaluations)
    return Course(
        total_steps=total,
        images=images,
        batch_size=options.batch_size,
        fingerprint=fingerprint,
        schedule=schedule,
        clip_grad=options.clip_grad,
        checkpoint_steps=options.checkpoint_steps,
        checkpoint_minutes=options.checkpoint_minutes,
        evaluation_steps=max(1, round(every)),
        evaluation_forced=options.eval_every is not None,
        max_bad_share=options.max_bad_share,
        clip_each=isinstance(options, PretrainOptions) and options.clip_by == "tensor",
        weight_decay=weight_decay_schedule(options, total) if isinstance(options, PretrainOptions) else None,
    )


def batching_of(
    fabric: Fabric, options: TrainingOptions, course: Course, first_step: int, micro_batch: int
) -> Batching:
    """What this process gets of a run's stream from a step on.

    Args:
        fabric: the processes.
        options: all settled.
        course: of the run.
        first_step: the optimiser step that the first batch is for.
        micro_batch: most samples that come at a time.
    """
    return Batching(
        seed=options.seed,
        batch_size=options.batch_size,
        micro_batch=micro_batch,
        total_batches=course.total_steps,
        first_batch=first_step,
        workers=options.workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        pin_memory=fabric.device.type == "cuda",
        shuffle_gb=POOLED_GB if isinstance(options, DetectOptions) else options.shuffle_gb,
        repeats=options.repeats if isinstance(options, FinetuneOptions) else 1,
    )


def weight_decay_schedule(options: PretrainOptions, total_steps: int) -> Schedule | None:
    """The weight decay of each step, along half a cosine; None where it stays."""
    if options.weight_decay_end is None:
        return None
    return Schedule(options.weight_decay, 0, total_steps, options.weight_decay_end)


def carry_out(
    trainer: Trainer, command: str, stop: StopRequest, conclude: Callable[[], object], concluded: Path | None = None
) -> int:
    """Train from the last checkpoint to the end, draw the curves and conclude; returns the exit status.

    Args:
        trainer: of the run.
        command: its name, for the line that says how to go on.
        stop: a wish to stop.
        conclude: called when all is learnt, in all processes.
        concluded: what `conclude` writes last. A finished run that lacks it was killed before, and does it now; None
            does it each time.
    """
    fabric, run, display = trainer.fabric, trainer.run_folder, trainer.display
    trainer.restore()
    if trainer.finished:
        display.say(f"the run in {run} is finished: {trainer.progress.step} steps")
        if fabric.broadcast(concluded is None or not concluded.exists()):
            _draw(trainer)
            conclude()
        return 0
    if trainer.progress.step == 0:
        trainer.save()  # from here on the run can be loaded and resumed
    try:
        finished = trainer.run(stop)
    finally:
        trainer.close()
    _draw(trainer)
    if not finished:
        display.say(f"stopped after step {trainer.progress.step}; go on with: lomar {command} --out {run} --resume")
        return 128 + stop.signal_number
    conclude()
    return 0


def _draw(trainer: Trainer) -> None:
    """The curves of all that was learnt so far."""
    if trainer.fabric.is_global_zero:
        learning_curves(Metrics.read(trainer.metrics.path), trainer.run_folder / "figures" / "curves.png")
