"""`lomar detect-predict`: objects in images, as COCO results and as pictures."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from lomar.commands.detecting import RESULTS_FILE, DetectingSession, drawn, seen
from lomar.commands.judging import make_folder
from lomar.commands.predict import images_named
from lomar.commands.runs import raise_unless_done
from lomar.data.sources import ImageSource
from lomar.detection.results import Found, Result, coco_results, write_results
from lomar.errors import BadImageError, UserError
from lomar.figures.detections import draw_detections
from lomar.files import write_atomically
from lomar.options import DetectPredictOptions, converted

PICTURES = "pictures"  # the folder of them, in --out


def detect_predict(**options: Any) -> Path:
    """Find objects in images; the same keys as the options of `lomar detect-predict`, with underscores.

    Returns:
        The folder with results.json and the pictures.

    Raises:
        UserError: an option is unknown or wrong, the model is no detector, or no image can be read.
    """
    given = converted(DetectPredictOptions, options)
    raise_unless_done(command(given))
    return Path(given["out"])


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar detect-predict` with the options that were given; returns the exit status."""
    for name in ("model", "images", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar detect-predict --help")
    options = DetectPredictOptions(**given)
    out = Path(options.out)
    make_folder(out, {name: name for name in (RESULTS_FILE, PICTURES)}, options.overwrite)
    shutil.rmtree(out / PICTURES, ignore_errors=True)  # of an earlier call, which --overwrite replaces
    session = DetectingSession(options.model, options.image_size, options.device, options.precision)
    source = images_named(options.images)
    names = _names(source)
    counted = {"objects": 0, "unreadable": 0, "pictures": 0}

    def results() -> Iterator[Result]:
        with closing(session.found(source, options.batch_size, options.workers)) as answers:
            for index, found in enumerate(answers):
                if found is None:
                    counted["unreadable"] += 1
                    continue
                if options.pictures is None or counted["pictures"] < options.pictures:
                    counted["pictures"] += _draw(
                        out / PICTURES / f"{names[index]}.png", source, index, found, session, options.score
                    )
                counted["objects"] += int((found.scores >= options.score).sum())
                # A file has no number of COCO's: its path stands for it.
                yield from coco_results(names[index], found, session.detector.plan.category_ids)
        if counted["unreadable"] == len(source):
            raise UserError(f"--images: none of {len(source)} can be read, for example {source.name(0)}")

    try:
        write_results(out / RESULTS_FILE, results())
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    looked_at = len(source) - counted["unreadable"]
    sys.stdout.write(
        f"{counted['objects']} objects with a score of {options.score:g} or more in {looked_at} images; "
        f"all in {out / RESULTS_FILE}, {counted['pictures']} pictures in {out / PICTURES}\n"
    )
    if counted["unreadable"]:
        sys.stdout.write(f"{counted['unreadable']} images could not be read\n")
    return 0


def _names(source: ImageSource) -> list[str]:
    """Paths of the images below the folder that holds them all: their ids, and the names of their pictures."""
    # Made absolute: else some could not be compared with others, or lead out of the folder of pictures by "..".
    paths = [os.path.abspath(source.path(index).decode("utf-8", "replace")) for index in range(len(source))]  # noqa: PTH100
    above = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120 (links stay as they are)
    return [os.path.relpath(path, above) for path in paths]


def _draw(path: Path, source: ImageSource, index: int, found: Found, session: DetectingSession, score: float) -> int:
    """Write the picture of an image; how many were written."""
    try:
        image = seen(source, index)
    except BadImageError:  # channels that are no colours
        return 0
    picture = Image.fromarray(draw_detections(image, drawn(found, score), session.detector.plan.classes))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
    return 1
