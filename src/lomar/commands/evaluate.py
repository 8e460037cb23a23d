"""`lomar evaluate`: how good a fine-tuned classifier is on labelled images."""

import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from lomar.commands.judging import EVALUATION_FILE, Session, make_folder, numbers_of, summary, write_judgement
from lomar.commands.runs import options_of
from lomar.data.labels import judging_images
from lomar.downstream.classify import Judgement, judge
from lomar.errors import UserError
from lomar.options import EvaluateOptions, FinetuneOptions, converted


def evaluate(**options: Any) -> dict[str, float]:
    """Judge a classifier on labelled images; the same keys as the options of `lomar evaluate`, with underscores.

    Returns:
        `top1`, `top5` where there are more than five classes, `mean_class_top1`, shares from 0 to 1, and `val_loss`.

    Raises:
        UserError: an option is unknown or wrong, the model is no classifier, or the images do not fit it.
    """
    return numbers_of(_judged(converted(EvaluateOptions, options), lambda line: None))


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar evaluate` with the options that were given; returns the exit status."""
    _judged(given, lambda line: sys.stdout.write(f"{line}\n"))
    return 0


def _judged(given: Mapping[str, Any], say: Callable[[str], object]) -> Judgement:
    for name in ("model", "data"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar evaluate --help")
    options = EvaluateOptions(**given)
    if options.out:
        make_folder(Path(options.out), {EVALUATION_FILE: "an evaluation"}, options.overwrite)
    session = Session(options.model, options.image_size, options.device, options.precision)
    learnt_from = _learnt_from(options.model, options.data)
    labelled, kept_apart = judging_images(options.data, session.classes, learnt_from=learnt_from)
    with closing(session.answers(labelled.source, options.batch_size, options.workers)) as answers:
        found = judge(answers, labelled.labels, len(session.classes))
    if found is None:
        raise UserError(f"--data {options.data}: none of {len(labelled)} images can be read")
    for line in summary(found, session.classes):
        say(line)
    if kept_apart:
        say("judged by the fifth of each class that fine-tuning had kept apart: it learnt from the others")
    if options.out:
        about = {"model": options.model, "data": options.data, "image_size": list(session.input.size)}
        try:
            written = write_judgement(Path(options.out), Path(options.out), found, session.classes, about)
        except OSError as error:
            raise UserError(f"--out {options.out} cannot be written: {error.strerror or error}") from error
        say(f"{' and '.join(map(str, written))} written")
    return found


def _learnt_from(model: str, data: str) -> bool:
    """Whether a run was fine-tuned on just these images, and no others judged it."""
    run = options_of(model, FinetuneOptions)
    return bool(run.get("data")) and not run.get("val") and Path(run["data"]).resolve() == Path(data).resolve()
