"""`lomar predict`: the classes that a fine-tuned classifier sees in images, as a table."""

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lomar.commands.judging import Session
from lomar.commands.runs import raise_unless_done
from lomar.data.opening import open_source
from lomar.data.sources import ImageSource, joined
from lomar.errors import UserError
from lomar.files import write_atomically
from lomar.options import PredictOptions, converted


def predict(**options: Any) -> Path:
    """Write a table of the classes seen in images; the same keys as the options of `lomar predict`, with underscores.

    Returns:
        The table, a .csv of path, label and probability.

    Raises:
        UserError: an option is unknown or wrong, the model is no classifier, or no image can be read.
    """
    given = converted(PredictOptions, options)
    raise_unless_done(command(given))
    return Path(given["out"])


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar predict` with the options that were given; returns the exit status."""
    for name in ("model", "images", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar predict --help")
    options = PredictOptions(**given)
    out = Path(options.out)
    if out.suffix.lower() != ".csv":
        raise UserError(f"--out is {out}; it must end in .csv")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; it must be a .csv file")
    if out.exists() and not options.overwrite:
        raise UserError(f"--out {out} exists; --overwrite replaces it")
    session = Session(options.model, options.image_size, options.device, options.precision)
    if options.top > len(session.classes):
        raise UserError(f"--top is {options.top}; the model knows {len(session.classes)} classes")
    source = images_named(options.images)
    unreadable: list[str] = []

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            table = csv.writer(file)
            table.writerow(_header(options.top))
            table.writerows(_rows(session, source, options, unreadable))
        if len(unreadable) == len(source):  # raised here, it leaves an earlier table as it was
            raise UserError(f"--images: none of {len(source)} can be read, for example {unreadable[0]}")

    try:
        write_atomically(out, write)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(f"{len(source) - len(unreadable)} images, their classes in {out}\n")
    if unreadable:
        sys.stdout.write(
            f"{len(unreadable)} could not be read and have empty cells, for example {', '.join(unreadable[:3])}\n"
        )
    return 0


def images_named(paths: Sequence[str]) -> ImageSource:
    """All images that --images names, folders and lists included."""
    return joined([open_source(path, flag="--images") for path in paths])


def _header(top: int) -> list[str]:
    if top == 1:
        return ["path", "label", "probability"]
    return ["path", *(f"{what}_{rank}" for rank in range(1, top + 1) for what in ("label", "probability"))]


def _rows(session: Session, source: ImageSource, options: PredictOptions, unreadable: list[str]) -> Iterator[list[str]]:
    """A line for each image in order; the names of those that cannot be read are added to `unreadable`."""
    index = 0
    with closing(session.answers(source, options.batch_size, options.workers)) as answers:
        for found, good in answers:
            best, classes = found.topk(options.top, dim=1)
            for shares, numbers, readable in zip(best.tolist(), classes.tolist(), good.tolist(), strict=True):
                path = source.path(index).decode("utf-8", "surrogateescape")
                index += 1
                if not readable:
                    unreadable.append(source.name(index - 1))
                    yield [path] + [""] * (2 * options.top)
                    continue
                told = [(session.classes[n], f"{share:.6f}") for share, n in zip(shares, numbers, strict=True)]
                yield [path, *(cell for pair in told for cell in pair)]
