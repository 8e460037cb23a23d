"""`lomar finetune`: an encoder and labelled images -> a classifier."""

import hashlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from timm.utils import ModelEmaV3
from torch import nn

from lomar.commands.course import batching_of, carry_out, cosine_schedule, course_of
from lomar.commands.finetune_settling import LAST_FILE, SettledFinetuning, settle, settle_again
from lomar.commands.judging import EVALUATION_FILE, judged, numbers_of, summary, write_judgement
from lomar.commands.runs import CONFIG_FILE, asked_for, begun, goes_on, holds_run, raise_unless_done
from lomar.data.labels import Labelled
from lomar.data.loader import MicroBatch, share_of
from lomar.data.supervised import training_batches
from lomar.downstream.classify import Classification, joined_judgement
from lomar.errors import UserError
from lomar.interop.weights import CLASSIFIER_FILE, load, save_classifier
from lomar.model import Encoder
from lomar.options import FinetuneOptions, converted
from lomar.training.checkpoint import FOLDER
from lomar.training.loop import Trainer
from lomar.training.optim import layerwise_adamw
from lomar.training.processes import make_fabric, said_by_all
from lomar.training.records import Display, Metrics, Row
from lomar.training.signals import StopRequest

# Everything a run may hold; --overwrite deletes these and nothing else.
RUN_FILES = (
    CONFIG_FILE,
    "metrics.jsonl",
    FOLDER,
    CLASSIFIER_FILE,
    LAST_FILE,
    EVALUATION_FILE,
    "figures",
    "train.log",
    "tensorboard",
    "bad_files.txt",
    "report.html",
)
JUDGED_AT_ONCE = 32  # images
EVALUATIONS = 20  # at most, when their interval is not given


def finetune(**options: Any) -> Path:
    """Fine-tune a classifier; the same keys as the options of `lomar finetune`, with underscores.

    Returns:
        The run's folder, for `lomar.load`.

    Raises:
        KeyboardInterrupt: SIGINT came; the run is saved and can be resumed.
        SystemExit: SIGTERM came; likewise.
        UserError: an option is unknown, wrong or does not fit the others, or the images cannot be used.
        TrainingError: the loss is not finite, twice.
    """
    given = converted(FinetuneOptions, options)
    raise_unless_done(command(given))
    return Path(_asked_for(given)["out"])


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar finetune` with the options that were given; returns the exit status."""
    asked = _asked_for(given)
    run = Path(asked["out"])
    resume = goes_on(holds_run(run), asked)
    settled = (settle_again if resume else settle)(asked, run)
    options = settled.options
    fabric = make_fabric(settled.hardware.device, options.precision, options.strategy)
    torch.manual_seed(options.seed)
    classifier, done = settled.build()
    with (
        begun(fabric, run, options, RUN_FILES, resume, lambda: None),
        Display(options.log_every, enabled=fabric.is_global_zero) as display,
        StopRequest() as stop,
    ):
        for note in [*settled.notes, *([] if resume else done)]:
            display.say(note)
        return _train(fabric, run, settled, classifier, display, stop)


def _asked_for(given: Mapping[str, Any]) -> dict[str, Any]:
    asked = asked_for(given, FinetuneOptions, ("data", "val", "model"))
    if "out" not in asked:
        raise UserError("--out is missing: the folder in which to make the run")
    return asked


def _train(
    fabric: Fabric, run: Path, settled: SettledFinetuning, classifier: Encoder, display: Display, stop: StopRequest
) -> int:
    options = settled.options
    micro_batch = fabric.broadcast(options.micro_batch)  # alike in all processes, whatever memory each has found
    train = settled.data.train
    course = course_of(options, len(train), _fingerprint(train), cosine_schedule(options, len(train)), EVALUATIONS)

    def batches(first_step: int) -> Generator[MicroBatch, None, None]:
        return training_batches(
            train,
            settled.fmt,
            settled.augmentation,
            settled.input.normalise,
            depth=len(classifier.blocks) if classifier.drop_path_rate else 0,
            batching=batching_of(fabric, options, course, first_step, micro_batch),
        )

    method = Classification(classifier)
    optimizer = layerwise_adamw(classifier, options.weight_decay, options.betas, options.layer_decay)
    average = ModelEmaV3(method.to(fabric.device), decay=options.ema) if options.ema else None
    shown = average.module.encoder if average else classifier
    evaluation = Evaluation(fabric, settled, shown, run, display)

    def export() -> None:
        save_classifier(run / LAST_FILE, shown, settled.data.classes)
        if evaluation.best_top1 is None:
            save_classifier(run / CLASSIFIER_FILE, shown, settled.data.classes)

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
        average,
        compiled=options.compile == "yes",
    )
    return carry_out(
        trainer,
        "finetune",
        stop,
        conclude=lambda: _conclude(run, settled, evaluation, display),
        concluded=run / EVALUATION_FILE,
    )


class Evaluation:
    """Called with a step; returns accuracies, and keeps the best classifier so far.

    Args:
        fabric: device and precision.
        settled: the images that judge, and how they are read.
        classifier: what is judged: the one that is trained, or its moving average.
        run: the run's folder.
        display: where to tell of it.
    """

    def __init__(
        self, fabric: Fabric, settled: SettledFinetuning, classifier: Encoder, run: Path, display: Display
    ) -> None:
        self.fabric = fabric
        self.settled = settled
        self.classifier = classifier
        self.run = run
        self.display = display

    def __call__(self, step: int) -> Row:
        """Accuracies at a step; nothing at the first, when the classifier guesses."""
        if step == 0:
            return {}
        with self.fabric.autocast():
            found = self.judge(self.classifier)
        if not self.fabric.is_global_zero:
            return {}
        if found is None:
            self.display.say("no image that judges can be read")
            return {}
        numbers = {name: round(value, 6) for name, value in numbers_of(found).items()}
        best = self.best_top1
        if best is None or numbers["top1"] > best:
            save_classifier(self.run / CLASSIFIER_FILE, self.classifier, self.settled.data.classes)
        self.display.say(f"step {step}: {summary(found, self.settled.data.classes)[0]}")
        return numbers

    @property
    def best_top1(self) -> float | None:
        """The highest accuracy of the run so far, as its metrics have it; None before the first evaluation."""
        rows = Metrics.read(self.run / "metrics.jsonl")
        return max((row["top1"] for row in rows if row.get("top1") is not None), default=None)

    def judge(self, classifier: nn.Module) -> Any:
        """How a classifier on the device does on the images that judge, of which each process looks at a share."""
        settled = self.settled
        classes, workers = len(settled.data.classes), settled.options.workers
        share = settled.data.val.subset(
            np.array(share_of(len(settled.data.val), self.fabric.global_rank, self.fabric.world_size))
        )
        found = judged(classifier, share, classes, settled.input, self.fabric.device, JUDGED_AT_ONCE, workers)
        return joined_judgement(said_by_all(self.fabric, [found]))


def _conclude(run: Path, settled: SettledFinetuning, evaluation: Evaluation, display: Display) -> None:
    """Judge the best classifier once more, class by class, and say where everything is."""
    best = load(run / CLASSIFIER_FILE).to(evaluation.fabric.device)
    with evaluation.fabric.autocast():
        found = evaluation.judge(best)
    if found is not None and evaluation.fabric.is_global_zero:
        about = {
            "model": str(run / CLASSIFIER_FILE),
            "data": settled.options.val or settled.options.data,
            "image_size": list(settled.size),
        }
        write_judgement(run, run / "figures", found, settled.data.classes, about)
        for line in summary(found, settled.data.classes):
            display.say(line)
    display.say(
        f"the best classifier is in {run / CLASSIFIER_FILE}, the last in {run / LAST_FILE}; to use it:\n"
        f"    lomar predict --model {run} --images DIR --out predictions.csv\n"
        f'    import lomar; classifier = lomar.load("{run}")      # a timm model; classifier(images) is logits'
    )


def _fingerprint(train: Labelled) -> str:
    """Of the images and their labels."""
    labels = hashlib.blake2b(train.labels.tobytes(), digest_size=8).hexdigest()
    return f"{train.source.fingerprint()}-{labels}"
