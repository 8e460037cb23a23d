"""The pictures that a run has drawn of itself, made small for a report; without asking the model anything."""

import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lomar.errors import UserError, is_out_of_memory
from lomar.figures.crops import CROPS_FILE
from lomar.figures.reconstruction import columns_of
from lomar.reporting.page import Picture, Shown
from lomar.reporting.reading import RunRecord

TILE_PX = 168  # side of a tile of a strip: shown at up to 150
MOST_STEPS = 8  # of reconstructions over time
MOST_PX = 1600  # width of a picture
QUALITY = 85  # of JPEG: where the eye sees no loss in a photograph
PAPER = (255, 255, 255)

# Pictures that runs draw of their results: file in figures/ -> title and what it shows.
_OF_RESULTS = {
    "confusion.png": ("Confusion matrix", "Confusion matrix: which share of each true class was taken for each class"),
    "detections.png": ("What it finds", "Images with their true objects, beside the objects that were found"),
}


def kept_pictures(run: RunRecord) -> Shown:
    """Those in a run's folder; what fails is a note in its section."""
    shown = Shown()
    attempt(shown, "results", lambda: _results(run, shown))
    if run.compares_views:
        attempt(shown, "crops", lambda: _crops(run, shown))
    elif run.kind == "pretrain":
        attempt(shown, "over-time", lambda: _over_time(run, shown))
    return shown


def attempt(shown: Shown, section: str, draw: Callable[[], object]) -> None:
    """Whatever goes wrong in one section costs that section alone."""
    try:
        draw()
    except Exception as error:
        if is_out_of_memory(error):
            reason = "no memory is left for it"
        elif isinstance(error, UserError | OSError | ValueError):
            reason = (error.strerror if isinstance(error, OSError) else None) or _first_line(error)
        else:
            logging.getLogger("lomar").debug("a section of a report failed", exc_info=True)
            reason = f"{type(error).__name__}: {_first_line(error)}"
        shown.notes[section] = f"This could not be drawn: {reason}."


def _results(run: RunRecord, shown: Shown) -> None:
    """Pictures of the result that the run has left."""
    found = []
    for name, (title, alt) in _OF_RESULTS.items():
        path = run.folder / "figures" / name
        if run.kind != "tokenizer train" and path.is_file():
            found.append(Picture(title, *encoded(_read(path), photograph=name != "confusion.png"), alt))
    if run.kind == "tokenizer train" and run.path.with_suffix(".png").is_file():
        picture = _read(run.path.with_suffix(".png"))
        alt = "Images, and below each what the tokenizer decodes from its tokens"
        found.append(Picture("What is kept", *encoded(picture), alt))
    shown.results = found


def _crops(run: RunRecord, shown: Shown) -> None:
    """What the run has drawn of its crops."""
    path = run.folder / "figures" / CROPS_FILE
    if not path.is_file():
        shown.notes["crops"] = "The run has not drawn its crops."
        return
    alt = "A few images, and beside each the large and small crops of it that the encoder gets"
    shown.crops = Picture("", *encoded(_read(path)), alt)


def _over_time(run: RunRecord, shown: Shown) -> None:
    """Strips cut from the pictures that the run left at its evaluations."""
    steps = list(run.drawn)
    if not steps:
        shown.notes["over-time"] = "The run has not drawn any yet."
        return
    places = np.linspace(0, len(steps) - 1, min(len(steps), MOST_STEPS)).round().astype(int)
    chosen = [steps[place] for place in places]
    whole = run.config.get("window_size") == 0
    strips: list[Picture] = []
    for step in chosen:
        try:
            columns = columns_of(_read(run.drawn[step]), whole)
        except OSError:  # replaced or removed meanwhile, or cut by a kill
            continue
        if not columns:
            continue
        if not strips:
            for title in ("original", "masked"):
                strips.append(strip(title, [columns[title]], f"{title} images"))
        title = f"step {step:,}"
        alt = f"the same images filled in at {title}"
        strips.append(strip(title, [columns["reconstruction"]], alt))
    shown.over_time = strips
    shown.notes["over-time"] = (
        "The same images and masks at each evaluation, of which step 0 is before training; visible patches are true."
        if strips
        else "The pictures in figures/ cannot be read."
    )


def strip(title: str, columns: Sequence[Sequence[Image.Image]], alt: str, wide: bool = False) -> Picture:
    """Tiles below each other, in one column or two."""
    gap = 5
    rows, pitch = len(columns[0]), TILE_PX + gap
    strip = Image.new("RGB", (len(columns) * pitch - gap, rows * pitch - gap), PAPER)
    for across, column in enumerate(columns):
        for down, each in enumerate(column):
            small = each.convert("RGB").resize((TILE_PX, TILE_PX), _resampling(each))
            strip.paste(small, (across * pitch, down * pitch))
    return Picture(title, *encoded(strip), alt, wide)


def _resampling(tile: Image.Image) -> Image.Resampling:
    """Small tiles stay squares of pixels."""
    return Image.Resampling.NEAREST if tile.width < TILE_PX else Image.Resampling.LANCZOS


def _read(path: Path) -> Image.Image:
    """A picture of the run's.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's word for a broken PNG is SyntaxError
        raise OSError(f"{path} cannot be read: {_first_line(error)}") from error


def encoded(picture: Image.Image, photograph: bool = True) -> tuple[bytes, str]:
    """A picture's file, no wider than `MOST_PX`, and its type."""
    if picture.width > MOST_PX:
        size = MOST_PX, max(1, round(picture.height * MOST_PX / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    held = io.BytesIO()
    if photograph:
        picture.save(held, "JPEG", quality=QUALITY, optimize=True)
        return held.getvalue(), "image/jpeg"
    picture.quantize(128).save(held, "PNG", optimize=True)
    return held.getvalue(), "image/png"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
