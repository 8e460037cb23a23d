"""Every command's options: one frozen dataclass each, and how text becomes their values.

No heavy import here: `lomar --help` reads this file alone.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lomar.errors import UserError

AUTO = "chosen from the data and the hardware"
LARGEST_SEED = 2**32 - 1  # every generator takes it


def option(
    text: str,
    *,
    default: Any = MISSING,
    auto: str = "",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    results: bool = True,
) -> Any:
    """A field of an options class.

    Args:
        text: its help.
        default: used when nothing else gives a value.
        auto: who gives the value where there is no default (`AUTO`, or the recipe and its value).
        low, above, high, below: bounds, `above` and `below` excluded.
        choices: the only values allowed.
        metavar: what stands for the value in the help.
        results: whether another value leads to other results; the rest may change when a run is resumed.
    """
    metadata = {
        "help": text,
        "auto": auto,
        "low": low,
        "above": above,
        "high": high,
        "below": below,
        "choices": choices,
        "metavar": metavar,
        "results": results,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Pretrain a vision transformer on a folder of images."""

    # What and where
    data: str = option(
        "folder of images, .txt file of paths, or 'sample' (a few embedded photographs)", metavar="DIR", results=False
    )
    out: str = option("folder of the run, made here", metavar="RUN", results=False)
    config: str | None = option("YAML file of options; flags win over it", default=None, metavar="FILE", results=False)
    resume: bool = option("go on with the run in --out; needs no other option", default=False, results=False)
    overwrite: bool = option("delete the run in --out and start anew", default=False, results=False)
    # The method
    method: str = option("a recipe's name", default="lomar", metavar="NAME")
    model: str = option(
        "size of the encoder", auto=AUTO, choices=("tiny", "small", "base", "large", "huge", "auto"), metavar="SIZE"
    )
    image_size: int = option("side of the crop, in pixels", auto=AUTO, low=1, metavar="PX")
    patch_size: int = option("side of a patch, in pixels", auto=AUTO, low=1, metavar="PX")
    window_size: int = option("side of a window, in patches", auto="lomar: 7", low=1, metavar="K")
    views: int = option("windows per image", auto="lomar: 4", low=1, metavar="N")
    mask_ratio: float = option(
        "share of a window's patches that are hidden", auto="lomar: 0.8", above=0, below=1, metavar="R"
    )
    mask_layer: int = option(
        "block before which the mask tokens enter", auto="lomar: 0, the paper's", low=0, metavar="L"
    )
    window_layout: str = option(
        "windows of each image's own, or shared and repeated as in the released code",
        auto="lomar: independent",
        choices=("independent", "released"),
        metavar="NAME",
    )
    crop_scale: tuple[float, float] = option(
        "smallest and largest share of an image's area that a crop covers", default=(0.2, 1.0), above=0, high=1
    )
    channels: int = option("channels the images are converted to", auto=AUTO, low=1, metavar="C")
    statistics: str = option(
        "mean and deviation of the pixels: ImageNet's, or estimated from the data",
        auto=AUTO,
        choices=("imagenet", "data"),
        metavar="NAME",
    )
    mean: tuple[float, ...] = option("mean of each channel, white being 1", auto="by --statistics", metavar="M")
    std: tuple[float, ...] = option("standard deviation of each channel", auto="by --statistics", above=0, metavar="S")
    pixel_type: str = option(
        "what pixels are read as", auto=AUTO, choices=("uint8", "uint16", "float32"), metavar="NAME"
    )
    # The course of training
    epochs: float | None = option("passes over the images", auto=AUTO, above=0, metavar="E")
    max_steps: int | None = option("optimiser steps, instead of --epochs", default=None, low=1, metavar="S")
    warmup_epochs: float = option("passes with a rising learning rate", auto="2.5 % of the run", low=0, metavar="E")
    batch_size: int = option("images per optimiser step, over all devices", auto=AUTO, low=1, metavar="GLOBAL")
    base_lr: float = option(
        "learning rate for 256 images; scaled by --batch-size / 256", auto=AUTO, above=0, metavar="LR"
    )
    weight_decay: float = option("AdamW's weight decay", default=0.05, low=0, metavar="WD")
    clip_grad: float = option("largest norm of the gradient; 0 leaves it as it is", default=3.0, low=0, metavar="NORM")
    seed: int = option(
        "fixes crops, windows, masks and initial weights", default=0, low=0, high=LARGEST_SEED, metavar="N"
    )
    precision: str = option(
        "precision of the matrix products", auto=AUTO, choices=("auto", "fp32", "bf16"), metavar="NAME"
    )
    # How fast, how watched: another value leads to the same encoder
    micro_batch: int = option("images per forward pass of a device", auto=AUTO, low=1, metavar="N", results=False)
    workers: int = option("processes that read images, per device", auto=AUTO, low=0, metavar="W", results=False)
    device: str = option("where to compute", auto=AUTO, choices=("auto", "cpu", "cuda"), metavar="NAME", results=False)
    checkpoint_steps: int | None = option(
        "steps between checkpoints, beside the timed ones", default=None, low=1, metavar="N", results=False
    )
    checkpoint_minutes: float = option(
        "minutes between checkpoints", default=10.0, above=0, metavar="MIN", results=False
    )
    log_every: int = option("steps between two plain progress lines", default=10, low=1, metavar="N", results=False)
    eval_data: str | None = option(
        "labelled folder for k-NN: train/ and val/ of class folders, or class folders alone",
        default=None,
        metavar="DIR",
        results=False,
    )
    eval_every: float | None = option(
        "epochs between evaluations; without it they take at most a tenth of the time",
        default=None,
        above=0,
        metavar="E",
        results=False,
    )
    max_bad_share: float = option(
        "share of unreadable images from which to refuse", default=0.25, low=0, high=1, metavar="S", results=False
    )


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions:
    """Draw reconstructions of masked windows."""

    model: str = option("a run's folder, finished or not, or its reconstructor.safetensors", metavar="RUN")
    images: tuple[str, ...] = option("images or folders of images", metavar="PATH")
    out: str = option("picture to write", metavar="FILE.png")
    mask_ratios: tuple[float, ...] = option(
        "one column each; one ratio alone draws original, window, masked and reconstruction",
        default=(0.6, 0.7, 0.8, 0.9),
        above=0,
        below=1,
        metavar="R",
    )
    seed: int = option("fixes windows and masks", default=0, low=0, high=LARGEST_SEED, metavar="N")


def flag(name: str) -> str:
    """Field name -> option as typed."""
    return "--" + name.replace("_", "-")


def fields_of(options: type) -> dict[str, dataclasses.Field[Any]]:
    """Name -> field of an options class, in order."""
    return {f.name: f for f in dataclasses.fields(options)}


def suggestion(word: str, known: list[str]) -> str:
    """' (did you mean ...?)' for a word that begins a known one or is close to it, else ''."""
    close = [name for name in known if word.strip("-") and name.startswith(word)]
    close = close or get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def convert(options: type, name: str, raw: Any) -> Any:
    """The value of one option from text, YAML or Python.

    Args:
        options: an options class.
        name: one of its fields.
        raw: a string or list of strings from the command line, or a value of the right type.

    Raises:
        UserError: it has the wrong type, is out of range or is none of the choices.
    """
    kind, optional = _kind(typing.get_type_hints(options)[name])
    if raw is None and optional:
        return None
    metadata = fields_of(options)[name].metadata
    if typing.get_origin(kind) is tuple:
        items = raw if isinstance(raw, list | tuple) else [raw]
        item_kind, *others = typing.get_args(kind)
        if others != [...] and len(items) != 1 + len(others):
            raise UserError(f"{flag(name)} takes {1 + len(others)} values, not {len(items)}")
        if not items:
            raise UserError(f"{flag(name)} needs at least one value")
        return tuple(_scalar(item_kind, name, item, metadata) for item in items)
    return _scalar(kind, name, raw, metadata)


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type of an annotation without None, and whether None was there."""
    if isinstance(hint, types.UnionType):
        kinds = [k for k in typing.get_args(hint) if k is not type(None)]
        return kinds[0], True
    return hint, False


def _scalar(kind: type, name: str, raw: Any, metadata: Mapping[str, Any]) -> Any:
    described = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
    wrong = UserError(f"{flag(name)} is {raw!r}; it must be {described}{_range_text(metadata)}")
    if kind is bool or isinstance(raw, bool):
        if kind is not bool or not isinstance(raw, bool):
            raise wrong
        return raw
    if kind is str:
        if not isinstance(raw, str | Path):
            raise wrong
        value: Any = str(raw)
        if metadata["choices"] and value not in metadata["choices"]:
            known = list(metadata["choices"])
            raise UserError(f"{flag(name)} is {value!r}; it can be {', '.join(known)}{suggestion(value, known)}")
        return value
    try:
        value = kind(raw)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if kind is int and isinstance(raw, float) and raw != value:
        raise wrong
    low, above, high, below = (metadata[k] for k in ("low", "above", "high", "below"))
    inside = (
        value == value
        and abs(value) != float("inf")
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )
    if not inside:
        raise wrong
    return value


def _range_text(metadata: Mapping[str, Any]) -> str:
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    parts = [f"{word} {metadata[key]}" for key, word in words.items() if metadata[key] is not None]
    return f", {' and '.join(parts)}" if parts else ""


def read_config(path: str, options: type) -> dict[str, Any]:
    """Option name -> value, from a YAML file.

    Raises:
        UserError: the file is missing, is no mapping of options, or holds an unknown name or a wrong value.
    """
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path} must hold 'option: value' lines, not a {type(loaded).__name__}")
    known = fields_of(options)
    values = {}
    for key, raw in loaded.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"--config {path}: there is no option {key!r}{suggestion(name, list(known))}")
        try:
            values[name] = convert(options, name, raw)
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from None
    return values
