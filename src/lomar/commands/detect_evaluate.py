"""`lomar detect-evaluate`: how good a detector is on images with known objects."""

import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from lomar.commands.detecting import (
    CATEGORIES_FILE,
    RESULTS_FILE,
    DetectingSession,
    draw_judged,
    judged,
    results_of,
    write_judgement,
)
from lomar.commands.judging import EVALUATION_FILE, make_folder
from lomar.commands.runs import options_of
from lomar.data.coco import judging_images
from lomar.detection.judging import Judgement, rows_of, summary
from lomar.detection.results import write_results
from lomar.errors import UserError
from lomar.options import DetectEvaluateOptions, DetectOptions, converted

PICTURE = "detections.png"


def detect_evaluate(**options: Any) -> dict[str, float]:
    """Judge a detector; the same keys as the options of `lomar detect-evaluate`, with underscores.

    Returns:
        Average precisions as shares from 0 to 1: `box_ap`, `box_ap50`, `mask_ap` and so on.

    Raises:
        UserError: an option is unknown or wrong, the model is no detector, or the images do not fit it.
    """
    return rows_of(_judged(converted(DetectEvaluateOptions, options), lambda line: None))


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar detect-evaluate` with the options that were given; returns the exit status."""
    _judged(given, lambda line: sys.stdout.write(f"{line}\n"))
    return 0


def _judged(given: Mapping[str, Any], say: Callable[[str], object]) -> Judgement:
    for name in ("model", "data"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar detect-evaluate --help")
    options = DetectEvaluateOptions(**given)
    out = Path(options.out) if options.out else None
    if out:
        files = (EVALUATION_FILE, CATEGORIES_FILE, RESULTS_FILE, PICTURE)
        make_folder(out, {name: name for name in files}, options.overwrite)
    session = DetectingSession(options.model, options.image_size, options.device, options.precision)
    plan = session.detector.plan
    images, kept_apart = judging_images(
        options.data,
        options.annotations,
        learnt_from=_learnt_from(options),
        box_only=not plan.masks,
    )
    own = images.for_classes(plan.classes, plan.category_ids, "--data")
    masks = plan.masks and own.has_masks
    with closing(session.found(own.source, options.batch_size, options.workers, own.sizes)) as answers:
        found = list(answers)
    unreadable = sum(each is None for each in found)
    if unreadable == len(found):
        raise UserError(f"--data {options.data}: none of {len(found)} images can be read")
    judgement = judged(own, results_of(own, found, range(1, len(plan.classes) + 1)), masks)
    for line in summary(judgement):
        say(line)
    if unreadable:
        say(f"{unreadable} images could not be read: their objects count as not found")
    if kept_apart:
        say("judged by the fifth that training had kept apart: it learnt from the others")
    if out:
        about = {"model": options.model, "data": options.data, "image_size": session.size_px}
        try:
            written = write_judgement(out, judgement, about)
            written.append(out / RESULTS_FILE)
            results = results_of(own, found, own.category_ids)
            write_results(written[-1], (each for each in results if each["category_id"] != -1))  # no class of --data
            if options.pictures:
                shown = own.subset(range(min(options.pictures, len(own))))
                if draw_judged(out / PICTURE, shown, found[: len(shown)], masks):
                    written.append(out / PICTURE)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
        say(f"{', '.join(map(str, written))} written")
    return judgement


def _learnt_from(options: DetectEvaluateOptions) -> bool:
    """Whether a run was trained on just these images, and no others judged it."""
    run = options_of(options.model, DetectOptions)
    if not run.get("data") or run.get("val") or run.get("val_annotations"):
        return False
    learnt, asked = ((run["data"], run.get("annotations")), (options.data, options.annotations))
    return [_resolved(each) for each in learnt] == [_resolved(each) for each in asked]


def _resolved(path: str | None) -> Path | None:
    return Path(path).resolve() if path else None
