"""`lomar evaluate`: how good a fine-tuned classifier is on labelled images."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lomar.commands.judging import Session, summary, write_judgement
from lomar.data.labels import judging_images
from lomar.downstream.classify import judge
from lomar.errors import UserError
from lomar.options import EvaluateOptions


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar evaluate` with the options that were given; returns the exit status."""
    for name in ("model", "data"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar evaluate --help")
    options = EvaluateOptions(**given)
    if options.out and Path(options.out).is_file():
        raise UserError(f"--out {options.out} is a file; it must be a folder")
    session = Session(options.model, options.image_size, options.device, options.precision)
    labelled = judging_images(options.data, session.classes)
    found = judge(
        session.answers(labelled.source, options.batch_size, options.workers), labelled.labels, len(session.classes)
    )
    if found is None:
        raise UserError(f"--data {options.data}: none of {len(labelled)} images can be read")
    lines = summary(found, session.classes)
    if options.out:
        about = {"model": options.model, "data": options.data, "image_size": list(session.input.size)}
        try:
            written = write_judgement(Path(options.out), Path(options.out), found, session.classes, about)
        except OSError as error:
            raise UserError(f"--out {options.out} cannot be written: {error.strerror or error}") from error
        lines.append(f"{' and '.join(map(str, written))} written")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0
