"""What a tokenizer's training is to do: where it writes, its options, checks that they fit the data and each other."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lomar.commands.automatic import Choice, Hardware, find_hardware
from lomar.commands.panels import central_crops
from lomar.commands.settling import check_per_channel
from lomar.data.decode import PixelFormat
from lomar.data.opening import open_source
from lomar.data.sources import ImageSource
from lomar.data.survey import Survey, spread, survey
from lomar.errors import UserError
from lomar.methods.tokenizer import STRIDE
from lomar.options import TokenizerOptions, fields_of, flag
from lomar.training.checkpoint import Checkpoints

SUFFIX = ".safetensors"
RANGE_IMAGES = 256  # from which black and white are estimated
DARKEST, BRIGHTEST = 0.1, 99.9  # percentiles; what lies beyond is clamped


@dataclass(frozen=True)
class Files:
    """What is written: the tokenizer, and beside it its metrics, its picture and, until it is done, checkpoints."""

    tokenizer: Path

    @property
    def metrics(self) -> Path:
        return self.tokenizer.with_suffix(".jsonl")

    @property
    def picture(self) -> Path:
        return self.tokenizer.with_suffix(".png")

    @property
    def partial(self) -> Path:
        return self.tokenizer.with_name(f"{self.tokenizer.name}.partial")

    @property
    def lock(self) -> Path:
        return self.tokenizer.with_name(f".{self.tokenizer.name}.lock")

    def all(self) -> tuple[Path, ...]:
        return self.tokenizer, self.partial, self.metrics, self.picture

    @property
    def begun(self) -> bool:
        """Whether something is in the folder of checkpoints; not where a kill came before the first was whole."""
        if not self.partial.is_dir():
            return self.partial.exists()
        return any(path.suffix != ".tmp" for path in self.partial.iterdir())

    def in_the_way(self) -> list[Path]:
        """What a new tokenizer would replace."""
        return [path for path in self.all() if path.exists() and (path != self.partial or self.begun)]


@dataclass
class SettledTokenizer:
    """All that is needed to begin or to go on.

    Args:
        options: every one with a value.
        source: the images.
        notes: what the user should know.
        checkpoint: what to go on from; None for a new tokenizer.
    """

    options: TokenizerOptions
    source: ImageSource
    notes: list[str] = field(default_factory=list)
    checkpoint: dict[str, Any] | None = None


def files_of(asked: Mapping[str, Any]) -> Files:
    """The files of --out.

    Raises:
        UserError: --out is missing or has another ending.
    """
    if "out" not in asked:
        raise UserError(f"--out is missing: the file to write the tokenizer to, ending in {SUFFIX}")
    out = Path(asked["out"])
    if out.suffix != SUFFIX:
        raise UserError(f"--out is {out}; it must end in {SUFFIX}")
    return Files(out)


def settle(asked: Mapping[str, Any], files: Files) -> SettledTokenizer:
    """A new tokenizer: what was asked for, then what data and hardware suggest.

    Raises:
        UserError: something is missing, wrong, in the way, or does not fit the rest.
    """
    if "data" not in asked:
        raise UserError("--data is missing: a folder of images, a .txt file of paths, or 'sample'")
    there = files.in_the_way()
    if there and not asked.get("overwrite"):
        begun = "--resume goes on with it, " if files.partial in there else ""
        raise UserError(f"--out: {there[0]} already exists; {begun}--overwrite deletes it")
    asked = dict(asked)
    if asked["data"] != "sample":  # the run may be resumed from another folder
        asked["data"] = os.path.abspath(asked["data"])  # noqa: PTH100 (links stay as they are)
    hardware = find_hardware(asked.get("device", "auto"))
    source = open_source(asked["data"])
    share = asked.get("max_bad_share", fields_of(TokenizerOptions)["max_bad_share"].default)
    found = survey(source, max_bad_share=share, channels=asked.get("channels"))
    choices = choose(asked, found, hardware)
    values = {name: choice.value for name, choice in choices.items()} | asked
    if found.format.dtype == "float32" and values["pixel_type"] != "float32":
        raise UserError(f"--pixel-type is {values['pixel_type']}; images of float32 can be read as float32 alone")
    _check_sizes(values)
    estimated = {name: choice for name, choice in _range(values, source).items() if name not in asked}
    values = {name: choice.value for name, choice in estimated.items()} | values
    _check_range(values)
    notes = _notes(found, choices | estimated)
    return SettledTokenizer(TokenizerOptions(**values), source, notes)


def settle_again(asked: Mapping[str, Any], files: Files) -> SettledTokenizer:
    """What was begun in --out; options that do not change results may be given anew.

    Raises:
        UserError: nothing was begun, its checkpoint is not whole, other images are there, or another result is asked
            for.
    """
    notes: list[str] = []
    found = Checkpoints(files.partial).load(notes.append)
    if found is None:
        raise UserError(f"--out: there is nothing to resume in {files.partial}")
    _, checkpoint = found
    stored = checkpoint.get("options", {})
    fields = fields_of(TokenizerOptions)
    for name, value in asked.items():
        if fields[name].metadata["results"] and stored.get(name) != value:
            raise UserError(
                f"{flag(name)} is {value!r}, but what was begun in {files.partial} has {stored.get(name)!r}; "
                "what is resumed keeps what changes its results"
            )
    values = {name: value for name, value in stored.items() if name in fields} | dict(asked)
    if any(field.default is MISSING and name not in values for name, field in fields.items()):
        raise UserError(f"{files.partial} is not what lomar tokenizer train leaves behind")
    options = TokenizerOptions(**values)
    find_hardware(options.device)
    source = open_source(options.data)
    if checkpoint.get("fingerprint") != source.fingerprint():
        raise UserError(
            f"the images are not those that {files.partial} began with: files were added, removed or renamed; "
            "bring them back, or start anew"
        )
    return SettledTokenizer(options, source, notes, checkpoint)


def choose(given: Mapping[str, Any], found: Survey, hw: Hardware) -> dict[str, Choice]:
    """Name -> choice for each automatic option that is not in `given`, but for black and white.

    Sizes and steps for a processor are such that a usable codebook takes minutes (docs/tokenizer.md); those for a GPU
    go up to DALL-E's sizes, and have not been tried.
    """
    gpu = hw.device == "cuda"
    small, medium = found.count < 5_000, found.count < 200_000
    by_count, no_gpu = f"{found.count} images", "no GPU"
    side = min(112, max(2 * STRIDE, found.median_short_side_px // STRIDE * STRIDE))
    why_side = (
        "what BEiT gives its tokenizer" if side == 112 else f"their shorter side is {found.median_short_side_px} px"
    )
    width = (64 if small else 128 if medium else 256) if gpu else 32
    grid = given.get("image_size", side) // STRIDE
    choices = {
        "device": Choice(hw.device, hw.name),
        "channels": Choice(found.format.channels, f"the images have {found.format.channels}"),
        "pixel_type": Choice(found.format.dtype, "the images'"),
        "vocab": Choice((1024 if small else 4096 if medium else 8192) if gpu else 512, by_count if gpu else no_gpu),
        "width": Choice(width, by_count if gpu else no_gpu),
        "blocks_per_group": Choice(2 if gpu else 1, "DALL-E's" if gpu else "no GPU: half of DALL-E's"),
        "image_size": Choice(side, why_side),
        "window_size": Choice(grid if gpu else min(8, grid), "the whole crop" if gpu else "no GPU: a part of the crop"),
        "max_steps": Choice(20_000 if gpu else 800, "not tried" if gpu else "some minutes"),
        "batch_size": Choice(64 if gpu else 16, "fits most GPUs" if gpu else no_gpu),
        "lr": Choice(round(4e-3 * min(1.0, 32 / given.get("width", width)), 6), "4e-3, less for more than 32 channels"),
        "workers": Choice(min(16, max(1, hw.cores - 1)) if gpu else min(2, hw.cores // 2), f"{hw.cores} cores"),
    }
    return {name: choice for name, choice in choices.items() if name not in given}


def _range(values: Mapping[str, Any], source: ImageSource) -> dict[str, Choice]:
    """Black and white of each channel: of 8-bit images their range, of others nearly all of what occurs.

    Sensors fill 16 bits in part, and floats have no range.
    """
    channels = values["channels"]
    if values["pixel_type"] == "uint8":
        return {"black": Choice((0.0,) * channels, ""), "white": Choice((255.0,) * channels, "")}
    if "black" in values and "white" in values:
        return {}
    some = source.subset(spread(len(source), RANGE_IMAGES))
    pixels, _ = central_crops(some, PixelFormat(channels, values["pixel_type"]), values["image_size"])
    if not len(pixels):
        raise UserError(f"--data: none of {len(some)} images can be read")
    numbers = pixels.to(torch.float32).transpose(0, 1).flatten(1).numpy()  # (C, everything)
    low, high = np.percentile(numbers, (DARKEST, BRIGHTEST), axis=1).astype(np.float32)
    constant = low + 1e-3 * np.maximum(1, abs(low))  # a channel that never changes
    high = np.where(high > low, high, constant)
    reason = f"estimated from {len(pixels)} images"
    return {"black": Choice(tuple(low.tolist()), reason), "white": Choice(tuple(high.tolist()), reason)}


def _check_sizes(values: Mapping[str, Any]) -> None:
    """Refuse sizes that do not go together, naming both."""
    for name, unit in (("width", 4), ("image_size", STRIDE)):
        if values[name] % unit:
            near = max(unit, round(values[name] / unit) * unit)
            raise UserError(f"{flag(name)} {values[name]} is not a multiple of {unit}; {near} would be")
    grid = values["image_size"] // STRIDE
    if values["window_size"] > grid:
        raise UserError(
            f"--window-size {values['window_size']} is larger than the {grid}x{grid} tokens of "
            f"--image-size {values['image_size']}"
        )


def _check_range(values: Mapping[str, Any]) -> None:
    check_per_channel(values, "black", "white")
    for low, high in zip(values["black"], values["white"], strict=True):
        if low >= high:
            raise UserError(f"--black is {low:g} where --white is {high:g}; it must be less")


def _notes(found: Survey, choices: Mapping[str, Choice]) -> list[str]:
    """What the user should know before it starts."""
    notes = [f"{found.count} images, shorter side {found.median_short_side_px} px (median of {found.probed} read)"]
    if found.unreadable:
        name, reason = found.unreadable[0]
        notes.append(f"{len(found.unreadable)} of them cannot be read and will be skipped, such as {name}: {reason}")
    notes.append("chosen for you (give the option to decide yourself):")
    for name, choice in choices.items():
        value = " ".join(f"{v:g}" for v in choice.value) if isinstance(choice.value, tuple) else str(choice.value)
        notes += [f"  {flag(name):<18} {value:<10} {choice.reason}"] if choice.reason else []
    return notes
