"""`lomar pretrain`: a folder of images -> an encoder."""

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from lomar.commands.course import batching_of, carry_out, cosine_schedule, course_of
from lomar.commands.crops import crops_of
from lomar.commands.evaluation import Evaluation, evaluation_data
from lomar.commands.runs import CONFIG_FILE, begun, goes_on, holds_run, raise_unless_done
from lomar.commands.settling import TOKENIZER_FILE, Settled, asked_for_pretraining, settle, settle_again
from lomar.data.labels import LabelledData
from lomar.data.loader import CropPlan, MicroBatch, pretraining_batches
from lomar.data.multicrop import multicrop_batches
from lomar.errors import UserError
from lomar.interop.initial import initialise
from lomar.interop.tokenizers import save_tokenizer
from lomar.interop.weights import ENCODER_FILE, RECONSTRUCTOR_FILE, save_encoder, save_reconstructor
from lomar.methods.composition import Composition
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.two_view import TwoView
from lomar.options import PretrainOptions, converted
from lomar.training.checkpoint import FOLDER, Checkpoints
from lomar.training.loop import Trainer
from lomar.training.optim import adamw
from lomar.training.processes import make_fabric
from lomar.training.records import Display
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
    "report.html",
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
    method: MaskedReconstruction | TwoView,
    labelled: LabelledData | None,
    display: Display,
    stop: StopRequest,
) -> int:
    options, composition = settled.options, settled.composition
    micro_batch = fabric.broadcast(options.micro_batch)  # alike in all processes, whatever memory each has found
    count = len(settled.source)
    course = course_of(options, count, settled.source.fingerprint(), cosine_schedule(options, count), EVALUATIONS)
    paced = method if isinstance(method, TwoView) else None
    if paced:
        paced.set_course(course.total_steps, count / options.batch_size)
        paced.at_once = micro_batch

    def batches(first_step: int) -> Generator[MicroBatch, None, None]:
        source, fmt, draw = settled.source, settled.fmt, method.draw(options.seed)
        at_once = options.batch_size if paced and paced.whole_share else micro_batch
        batching = batching_of(fabric, options, course, first_step, at_once)
        if isinstance(method, TwoView):
            return multicrop_batches(source, fmt, draw, plan=crops_of(method, options), batching=batching)
        plan = CropPlan(options.image_size, options.crop_scale, options.color_jitter, settled.tokenised_px)
        view_size = method.views.size
        return pretraining_batches(
            source, fmt, draw, plan=plan, patch_size_px=options.patch_size, view_size=view_size, batching=batching
        )

    def export() -> None:
        save_encoder(run / ENCODER_FILE, method.encoder, composition)
        if isinstance(method, MaskedReconstruction) and isinstance(composition, Composition):
            save_reconstructor(run / RECONSTRUCTOR_FILE, method, composition)

    spared = ("cls_token",) if options.transformer == "beit" else ()  # as BEiT does, and MAE and LoMaR do not
    optimizer = adamw(method, options.weight_decay, options.betas, spared, all_of_it=options.decayed == "all")
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
        paced=paced,
    )
    return carry_out(trainer, "pretrain", stop, conclude=lambda: display.say(_how_to_load(run)))


def _keep_tokenizer(run: Path, settled: Settled) -> None:
    if settled.tokenizer:
        save_tokenizer(run / TOKENIZER_FILE, settled.tokenizer)


def _how_to_load(run: Path) -> str:
    return (
        f"the encoder is in {run / ENCODER_FILE}; to use it:\n"
        f'    import lomar\n    encoder = lomar.load("{run}")      # a timm model; encoder(images) is (B, D)'
    )
