"""`lomar pretrain`: a folder of images -> an encoder."""

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from lomar.commands.evaluation import Evaluation, evaluation_data
from lomar.commands.runs import CONFIG_FILE, begun, goes_on, holds_run, raise_unless_done
from lomar.commands.settling import TOKENIZER_FILE, Settled, asked_for_pretraining, settle, settle_again
from lomar.data.labels import LabelledData
from lomar.data.loader import CropPlan, MicroBatch, pretraining_batches
from lomar.data.sources import ImageSource
from lomar.errors import UserError
from lomar.figures.curves import learning_curves
from lomar.interop.initial import initialise
from lomar.interop.tokenizers import save_tokenizer
from lomar.interop.weights import ENCODER_FILE, RECONSTRUCTOR_FILE, save_encoder, save_reconstructor
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.options import PretrainOptions, converted
from lomar.training.checkpoint import FOLDER, Checkpoints
from lomar.training.loop import Course, Trainer
from lomar.training.optim import Schedule, adamw
from lomar.training.processes import make_fabric
from lomar.training.records import Display, Metrics
from lomar.training.signals import StopRequest

# Everything a run may hold; --overwrite deletes these and nothing else.
RUN_FILES = (
    CONFIG_FILE,
    TOKENIZER_FILE,
    "metrics.jsonl",
    FOLDER,
    ENCODER_FILE,
    RECONSTRUCTOR_FILE,
    "figures",
    "train.log",
    "tensorboard",
    "bad_files.txt",
)
EVALUATIONS = 20  # at most, when their interval is not given


def pretrain(**options: Any) -> Path:
    """Pretrain an encoder; the same keys as the options of `lomar pretrain`, with underscores.

    Returns:
        The run's folder, for `lomar.load`.

    Raises:
        KeyboardInterrupt: SIGINT came; the run is saved and can be resumed.
        SystemExit: SIGTERM came; likewise.
        UserError: an option is unknown, wrong or does not fit the others, or the images cannot be used.
        TrainingError: the loss is not finite, twice.
    """
    given = converted(PretrainOptions, options)
    raise_unless_done(command(given))
    return Path(asked_for_pretraining(given)["out"])


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar pretrain` with the options that were given; returns the exit status."""
    asked = asked_for_pretraining(given)
    if "out" not in asked:
        raise UserError("--out is missing: the folder in which to make the run")
    run = Path(asked["out"])
    resume = goes_on(holds_run(run), asked)
    settled = settle_again(asked, run) if resume else settle(asked, run, typed=given)
    options, notes = settled.options, settled.notes
    labelled = None
    if options.eval_data:
        labelled = evaluation_data(options, settled.fmt, settled.hardware.device)
        if labelled is None:
            notes.append(f"--eval-data {options.eval_data} has no two classes: effective rank instead of k-NN")
    fabric = make_fabric(settled.hardware.device, options.precision, options.strategy)
    torch.manual_seed(options.seed)
    method = settled.build()
    if (
        options.init and not Checkpoints(run / FOLDER).steps()
    ):  # a run killed before its first one begins with them again
        notes += initialise(method, options.init)
    with (
        begun(fabric, run, options, RUN_FILES, resume, lambda: _keep_tokenizer(run, settled)),
        Display(options.log_every, enabled=fabric.is_global_zero) as display,
        StopRequest() as stop,
    ):
        for note in notes:
            display.say(note)
        return _train(fabric, run, settled, method, labelled, display, stop)


def _train(
    fabric: Fabric,
    run: Path,
    settled: Settled,
    method: MaskedReconstruction,
    labelled: LabelledData | None,
    display: Display,
    stop: StopRequest,
) -> int:
    options, composition = settled.options, settled.composition
    micro_batch = fabric.broadcast(options.micro_batch)  # alike in all processes, whatever memory each has found
    course = _course(options, settled.source)

    def batches(first_step: int) -> Generator[MicroBatch, None, None]:
        return pretraining_batches(
            settled.source,
            settled.fmt,
            method.draw(options.seed),
            plan=CropPlan(options.image_size, options.crop_scale, options.color_jitter, settled.tokenised_px),
            patch_size_px=options.patch_size,
            view_size=method.views.size,
            seed=options.seed,
            batch_size=options.batch_size,
            micro_batch=micro_batch,
            first_batch=first_step,
            total_batches=course.total_steps,
            workers=options.workers,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            pin_memory=fabric.device.type == "cuda",
            shuffle_gb=options.shuffle_gb,
        )

    def export() -> None:
        save_encoder(run / ENCODER_FILE, method.architecture.encoder, composition)
        save_reconstructor(run / RECONSTRUCTOR_FILE, method, composition)

    spared = ("cls_token",) if options.transformer == "beit" else ()  # as BEiT does, and MAE and LoMaR do not
    optimizer = adamw(method, options.weight_decay, options.betas, spared)
    evaluation = Evaluation(fabric, method, settled.source, labelled, settled.fmt, options, run)
    trainer = Trainer(
        fabric,
        method,
        optimizer,
        course,
        batches,
        run,
        display,
        export,
        evaluation,
        compiled=options.compile == "yes",
    )
    trainer.restore()
    if trainer.finished:
        display.say(f"the run in {run} is finished: {trainer.progress.step} steps")
        display.say(_how_to_load(run))
        return 0
    if trainer.progress.step == 0:
        trainer.save()  # from here on the run can be loaded, reconstructed from and resumed
    try:
        finished = trainer.run(stop)
    finally:
        trainer.close()
    if fabric.is_global_zero:
        learning_curves(Metrics.read(run / "metrics.jsonl"), run / "figures" / "curves.png")
    if not finished:
        display.say(f"stopped after step {trainer.progress.step}; go on with: lomar pretrain --out {run} --resume")
        return 128 + stop.signal_number
    display.say(_how_to_load(run))
    return 0


def _keep_tokenizer(run: Path, settled: Settled) -> None:
    if settled.tokenizer:
        save_tokenizer(run / TOKENIZER_FILE, settled.tokenizer)


def _how_to_load(run: Path) -> str:
    return (
        f"the encoder is in {run / ENCODER_FILE}; to use it:\n"
        f'    import lomar\n    encoder = lomar.load("{run}")      # a timm model; encoder(images) is (B, D)'
    )


def _course(options: PretrainOptions, source: ImageSource) -> Course:
    count = len(source)
    steps_per_epoch = count / options.batch_size
    total = options.max_steps or max(1, round((options.epochs or 1) * steps_per_epoch))
    every = options.eval_every * steps_per_epoch if options.eval_every else max(steps_per_epoch, total / EVALUATIONS)
    return Course(
        total_steps=total,
        images=count,
        batch_size=options.batch_size,
        fingerprint=source.fingerprint(),
        schedule=Schedule(
            peak_lr=options.base_lr * options.batch_size / 256,
            warmup_steps=options.warmup_epochs * steps_per_epoch,
            total_steps=total,
            min_lr=options.min_lr,
        ),
        clip_grad=options.clip_grad,
        checkpoint_steps=options.checkpoint_steps,
        checkpoint_minutes=options.checkpoint_minutes,
        evaluation_steps=max(1, round(every)),
        evaluation_forced=options.eval_every is not None,
        max_bad_share=options.max_bad_share,
    )
