"""`lomar detect`: an encoder and objects in COCO's format -> a detector."""

import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from lomar.commands.course import batching_of, carry_out, course_of
from lomar.commands.detect_plan import rehearse
from lomar.commands.detect_settling import LAST_FILE, SettledDetection, settle, settle_again
from lomar.commands.detecting import CATEGORIES_FILE, draw_judged, found_in, judged, results_of, write_judgement
from lomar.commands.judging import EVALUATION_FILE
from lomar.commands.runs import CONFIG_FILE, asked_for, begun, goes_on, holds_run, raise_unless_done
from lomar.data.detection import detection_batches
from lomar.data.loader import MicroBatch, share_of
from lomar.detection.detector import Detector
from lomar.detection.judging import Judgement, rows_of, summary
from lomar.detection.optim import detector_adamw
from lomar.errors import UserError
from lomar.interop.detectors import DETECTOR_FILE, load_detector, save_detector
from lomar.options import DetectOptions, converted
from lomar.training.checkpoint import FOLDER
from lomar.training.loop import Trainer
from lomar.training.optim import StepSchedule
from lomar.training.processes import make_fabric, said_by_all
from lomar.training.records import Display, Metrics, Row
from lomar.training.signals import StopRequest

# Everything a run may hold; --overwrite deletes these and nothing else.
RUN_FILES = (
    CONFIG_FILE,
    "metrics.jsonl",
    FOLDER,
    DETECTOR_FILE,
    LAST_FILE,
    EVALUATION_FILE,
    CATEGORIES_FILE,
    "figures",
    "train.log",
    "tensorboard",
    "bad_files.txt",
    "report.html",
)
EVALUATIONS = 10  # at most, when their interval is not given
SHOWN = 6  # images of the picture


def detect(**options: Any) -> Path:
    """Train a detector; the same keys as the options of `lomar detect`, with underscores.

    Returns:
        The run's folder.

    Raises:
        KeyboardInterrupt: SIGINT came; the run is saved and can be resumed.
        SystemExit: SIGTERM came; likewise.
        UserError: an option is unknown, wrong or does not fit the others, or the data cannot be used.
        TrainingError: the loss is not finite, twice.
    """
    given = converted(DetectOptions, options)
    raise_unless_done(command(given))
    return Path(_asked_for(given)["out"])


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar detect` with the options that were given; returns the exit status."""
    asked = _asked_for(given)
    run = Path(asked["out"])
    resume = goes_on(holds_run(run), asked)
    settled = (settle_again if resume else settle)(asked, run)
    options = settled.options
    if options.dry_run:
        for line in [*settled.notes, *rehearse(settled, schedule_of(settled))]:
            sys.stdout.write(f"{line}\n")
        return 0
    fabric = make_fabric(settled.hardware.device, options.precision)
    torch.manual_seed(options.seed)
    detector, done = settled.build()
    with (
        begun(fabric, run, options, RUN_FILES, resume, lambda: None),
        Display(options.log_every, enabled=fabric.is_global_zero) as display,
        StopRequest() as stop,
    ):
        for note in [*settled.notes, *([] if resume else done)]:
            display.say(note)
        return _train(fabric, run, settled, detector, display, stop)


def _asked_for(given: Mapping[str, Any]) -> dict[str, Any]:
    asked = asked_for(given, DetectOptions, ("data", "annotations", "val", "val_annotations", "model"))
    if "out" not in asked:
        raise UserError("--out is missing: the folder in which to make the run")
    return asked


def _train(
    fabric: Fabric, run: Path, settled: SettledDetection, detector: Detector, display: Display, stop: StopRequest
) -> int:
    options = settled.options
    fingerprint = settled.train.fingerprint()
    course = course_of(options, len(settled.train), fingerprint, schedule_of(settled), EVALUATIONS)

    def batches(first_step: int) -> Generator[MicroBatch, None, None]:
        return detection_batches(
            settled.train,
            settled.fmt,
            settled.jitter,
            depth=len(detector.backbone.blocks) if settled.plan.drop_path else 0,
            batching=batching_of(fabric, options, course, first_step, options.micro_batch),
            with_masks=settled.plan.masks,
        )

    optimizer = detector_adamw(detector, options.weight_decay, options.betas, options.layer_decay)
    evaluation = Evaluation(fabric, settled, detector, run, display)

    def export() -> None:
        save_detector(run / LAST_FILE, detector)
        if evaluation.best is None:
            save_detector(run / DETECTOR_FILE, detector)

    trainer = Trainer(fabric, detector, optimizer, course, batches, run, display, export, evaluation)
    return carry_out(
        trainer,
        "detect",
        stop,
        conclude=lambda: _conclude(run, settled, evaluation, display),
        concluded=run / EVALUATION_FILE,
    )


class Evaluation:
    """Called with a step; returns average precisions, and keeps the best detector so far.

    Args:
        fabric: device and precision.
        settled: the images that judge, and how they are read.
        detector: what is trained.
        run: the run's folder.
        display: where to tell of it.
    """

    def __init__(
        self, fabric: Fabric, settled: SettledDetection, detector: Detector, run: Path, display: Display
    ) -> None:
        self.fabric = fabric
        self.settled = settled
        self.detector = detector
        self.run = run
        self.display = display

    def __call__(self, step: int) -> Row:
        """Average precisions at a step; nothing at the first, when nothing is found."""
        if step == 0 or self.settled.val is None:
            return {}
        judgement = self.judge(self.detector)
        if judgement is None:
            return {}
        numbers = {name: round(value, 6) for name, value in rows_of(judgement).items()}
        best = self.best
        if best is None or numbers.get("box_ap", 0.0) > best:
            save_detector(self.run / DETECTOR_FILE, self.detector)
        told = ", ".join(f"{kind} AP {precision.ap or 0:.1%}" for kind, precision in judgement.kinds.items())
        self.display.say(f"step {step}: {told} of {judgement.images} images")
        return numbers

    @property
    def best(self) -> float | None:
        """The highest box AP of the run so far, as its metrics have it; None before the first evaluation."""
        rows = Metrics.read(self.run / "metrics.jsonl")
        return max((row["box_ap"] for row in rows if row.get("box_ap") is not None), default=None)

    def judge(self, detector: Detector) -> Judgement | None:
        """How a detector on the device does, of which each process looks at a share; None but in the first process."""
        settled, val = self.settled, self.settled.val
        assert val is not None
        if self.fabric.world_size > 1:
            for buffer in detector.buffers():  # batch norm's are each process's own; the first one's are saved
                torch.distributed.broadcast(buffer, 0)
        share = val.subset(share_of(len(val), self.fabric.global_rank, self.fabric.world_size))
        with self.fabric.autocast():
            found = list(
                found_in(
                    detector,
                    share.source,
                    settled.options.image_size,
                    self.fabric.device,
                    settled.options.micro_batch,
                    settled.options.workers,
                    told=share.sizes,
                )
            )
        unreadable = sum(said_by_all(self.fabric, [sum(each is None for each in found)]))
        if unreadable:
            self.display.say(f"{unreadable} of {len(val)} images could not be read: their objects count as not found")
        everything = said_by_all(self.fabric, results_of(share, found, range(1, len(val.categories) + 1)))
        return judged(val, everything, settled.plan.masks) if self.fabric.is_global_zero else None


def _conclude(run: Path, settled: SettledDetection, evaluation: Evaluation, display: Display) -> None:
    """Judge the best detector once more, category by category, draw what it finds, and say where everything is."""
    fabric = evaluation.fabric
    if settled.val is not None:
        best = load_detector(run / DETECTOR_FILE).to(fabric.device)
        judgement = evaluation.judge(best)
        if judgement is not None:
            shown = settled.val.subset(range(min(SHOWN, len(settled.val))))
            with fabric.autocast():
                size, workers = settled.options.image_size, settled.options.workers
                found = list(found_in(best, shown.source, size, fabric.device, 1, workers, told=shown.sizes))
            draw_judged(run / "figures" / "detections.png", shown, found, settled.plan.masks)
            about = {"model": str(run / DETECTOR_FILE), "data": settled.options.val or settled.options.data}
            write_judgement(run, judgement, about)  # last: a run that was killed before it does all this again
            for line in summary(judgement):
                display.say(line)
    where = f"the best detector is in {run / DETECTOR_FILE}, the last in {run / LAST_FILE}"
    if settled.val is None:
        where = f"the detector, which nothing judged, is in {run / DETECTOR_FILE}"
    display.say(f"{where}; to use it:\n    lomar detect-predict --model {run} --images DIR --out pictures")


def schedule_of(settled: SettledDetection) -> StepSchedule:
    """The framework's: a short warm-up, and two steps down near the end."""
    options, total = settled.options, settled.total_steps
    milestones = tuple(round(share * total) for share in settled.framework.milestones)
    return StepSchedule(options.lr, options.warmup_steps, settled.framework.warmup_factor, milestones)
