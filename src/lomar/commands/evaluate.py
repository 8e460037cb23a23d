"""`lomar evaluate`: how good a fine-tuned classifier is on labelled images."""

import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from lomar.commands.judging import Session, summary, write_judgement
from lomar.commands.runs import CONFIG_FILE
from lomar.data.labels import judging_images
from lomar.downstream.classify import judge
from lomar.errors import UserError
from lomar.options import EvaluateOptions, FinetuneOptions, read_config


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar evaluate` with the options that were given; returns the exit status."""
    for name in ("model", "data"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar evaluate --help")
    options = EvaluateOptions(**given)
    if options.out:
        _make_folder(Path(options.out))
    session = Session(options.model, options.image_size, options.device, options.precision)
    learnt_from = _learnt_from(options.model, options.data)
    labelled, kept_apart = judging_images(options.data, session.classes, learnt_from=learnt_from)
    with closing(session.answers(labelled.source, options.batch_size, options.workers)) as answers:
        found = judge(answers, labelled.labels, len(session.classes))
    if found is None:
        raise UserError(f"--data {options.data}: none of {len(labelled)} images can be read")
    lines = summary(found, session.classes)
    if kept_apart:
        lines.append("judged by the fifth of each class that fine-tuning had kept apart: it learnt from the others")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    if options.out:
        about = {"model": options.model, "data": options.data, "image_size": list(session.input.size)}
        try:
            written = write_judgement(Path(options.out), Path(options.out), found, session.classes, about)
        except OSError as error:
            raise UserError(f"--out {options.out} cannot be written: {error.strerror or error}") from error
        sys.stdout.write(f"{' and '.join(map(str, written))} written\n")
    return 0


def _make_folder(folder: Path) -> None:
    """Before the work, so that nothing is judged in vain."""
    if folder.is_file():
        raise UserError(f"--out {folder} is a file; it must be a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from error


def _learnt_from(model: str, data: str) -> bool:
    """Whether a run was fine-tuned on just these images, and no others judged it."""
    path = Path(model)
    config = (path if path.is_dir() else path.parent) / CONFIG_FILE
    try:
        run = read_config(str(config), FinetuneOptions) if config.exists() else {}
    except UserError:  # a run of another command, or of another version
        return False
    return bool(run.get("data")) and not run.get("val") and Path(run["data"]).resolve() == Path(data).resolve()
