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
    positional: bool = False,
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
        positional: whether it is typed without its name.
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
        "positional": positional,
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
    method: str = option("a recipe's name; `lomar recipes` lists them", default="lomar", metavar="NAME")
    init: str | None = option(
        "weights to begin with: a run, a file of lomar, or a released LoMaR, MAE or BEiT checkpoint",
        default=None,
        metavar="FILE",
    )
    model: str = option(
        "size of the encoder: tiny, small, base, large, huge, or WIDTHxDEPTHxHEADS", auto=AUTO, metavar="SIZE"
    )
    image_size: int = option("side of the crop, in pixels", auto=AUTO, low=1, metavar="PX")
    patch_size: int = option("side of a patch, in pixels", auto=AUTO, low=1, metavar="PX")
    window_size: int = option(
        "side of a window, in patches; 0 is the whole image", auto="lomar: 7; mae, beit: 0", low=0, metavar="K"
    )
    views: int = option("windows per image", auto="lomar: 4", low=1, metavar="N")
    window_layout: str = option(
        "windows of each image's own, or shared and repeated as in the released code",
        auto="lomar: independent",
        choices=("independent", "released"),
        metavar="NAME",
    )
    mask: str = option(
        "which patches are hidden: any, as many as LoMaR or as MAE counts them, or blocks of them as in BEiT",
        auto="lomar: uniform",
        choices=("uniform", "uniform-kept", "blockwise"),
        metavar="NAME",
    )
    mask_ratio: float = option(
        "share of a view's patches that are hidden", auto="lomar: 0.8; mae: 0.75", above=0, below=1, metavar="R"
    )
    mask_min_block: int = option(
        "smallest block of --mask blockwise, in patches", auto="beit: 16; beit-lomar: 4", low=1, metavar="N"
    )
    architecture: str = option(
        "one encoder for all, or an encoder for visible patches and a decoder",
        auto="lomar, beit: masked-encoder; mae: encoder-decoder",
        choices=("masked-encoder", "encoder-decoder"),
        metavar="NAME",
    )
    mask_layer: int = option(
        "block before which the mask tokens enter a masked encoder", auto="lomar: 0, the paper's", low=0, metavar="L"
    )
    decoder_width: int = option("token width of the decoder", auto="512 for a base encoder", low=4, metavar="D")
    decoder_depth: int = option("blocks of the decoder", auto="8 for a base encoder", low=1, metavar="N")
    decoder_heads: int = option("attention heads of the decoder", auto="16 for a base encoder", low=1, metavar="N")
    position: str = option(
        "how tokens know where they are",
        auto="lomar: contextual; mae: sincos; beit: shared-bias",
        choices=("contextual", "sincos", "shared-bias", "none"),
        metavar="NAME",
    )
    transformer: str = option(
        "the plain transformer, or BEiT's: no bias of keys, and its own initial weights",
        auto="lomar, mae: vit; beit: beit",
        choices=("vit", "beit"),
        metavar="NAME",
    )
    layer_scale: float = option(
        "initial factor of each branch; 0 for no such factors", auto="lomar: 0; beit: 0.1", low=0, metavar="X"
    )
    drop_path: float = option(
        "probability that a view skips a branch of the last block",
        auto="lomar: 0; beit: 0.1",
        low=0,
        below=1,
        metavar="P",
    )
    target: str = option(
        "what is predicted: normalised-pixels, pixels or tokens", auto="lomar, mae: normalised-pixels", metavar="NAME"
    )
    tokenizer: str | None = option(
        "for tokens: a file of `lomar tokenizer train`, or a folder with OpenAI's encoder.pkl and decoder.pkl",
        default=None,
        metavar="FILE",
    )
    crop_scale: tuple[float, float] = option(
        "smallest and largest share of an image's area that a crop covers", auto="lomar: 0.2 1", above=0, high=1
    )
    color_jitter: float = option(
        "strength of random brightness, contrast and saturation", auto="lomar: 0; beit: 0.4", low=0, high=1, metavar="X"
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
    min_lr: float = option("learning rate at the end", auto="lomar: 0; beit: 1e-5", low=0, metavar="LR")
    weight_decay: float = option("AdamW's weight decay", auto="0.05", low=0, metavar="WD")
    betas: tuple[float, float] = option(
        "AdamW's momenta", auto="lomar, mae: 0.9 0.95; beit: 0.9 0.999", low=0, below=1, metavar="BETA1 BETA2"
    )
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
class RecipesOptions:
    """List the paper's methods and runs, or print one as a configuration."""

    name: str | None = option(
        "a recipe, to be printed in full as YAML for `lomar pretrain --config`", default=None, positional=True
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


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Draw where a hidden patch looks, and say how far."""

    model: str = option(
        "a run's folder, its reconstructor.safetensors, or an encoder alone (which has visible patches only)",
        metavar="RUN",
    )
    images: tuple[str, ...] = option("images or folders of images", metavar="PATH")
    out: str = option("picture to write", metavar="FILE.png")
    layers: tuple[int, ...] | None = option(
        "layers to draw, counted from 1: the decoder's where there is one, else the encoder's",
        default=None,
        auto="four, evenly spaced up to the last",
        low=1,
        metavar="L",
    )
    patch: tuple[int, int] | None = option(
        "the patch that looks: its row and column in the image, counted from 0",
        default=None,
        auto="a hidden one near the middle",
        low=0,
        metavar="ROW COL",
    )
    mask_ratio: float | None = option(
        "share of patches that are hidden", default=None, auto="the run's", above=0, below=1, metavar="R"
    )
    seed: int = option("fixes windows and masks", default=0, low=0, high=LARGEST_SEED, metavar="N")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Turn a checkpoint that LoMaR, MAE or BEiT released into lomar's files, or lomar's files into such a one."""

    model: str = option(
        "released checkpoint (.pth), pretrained or fine-tuned; with --to official: a run's folder, or one of its "
        ".safetensors",
        metavar="FILE",
    )
    out: str = option(
        "FILE.safetensors: the encoder; a folder: encoder.safetensors, and reconstructor.safetensors where all of "
        "pretraining is there; with --to official: FILE.pth",
        metavar="OUT",
    )
    to: str = option("whose files to write", default="lomar", choices=("lomar", "official"), metavar="NAME")
    image_size: int | None = option(
        "resize tables of positions for images of this side, in pixels", default=None, low=1, metavar="PX"
    )
    heads: int | None = option(
        "attention heads of MAE's encoder, if not as released: width / 64, or 16 of ViT-H",
        default=None,
        low=1,
        metavar="N",
    )
    decoder_heads: int | None = option(
        "attention heads of MAE's decoder, if not as released: width / 32", default=None, low=1, metavar="N"
    )
    target: str | None = option(
        "what LoMaR or MAE predicted, if the checkpoint does not say",
        default=None,
        choices=("normalised-pixels", "pixels"),
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Train a tokenizer on a folder of images, for methods that predict tokens."""

    # What and where
    data: str = option("folder of images, .txt file of paths, or 'sample'", metavar="DIR", results=False)
    out: str = option(
        "tokenizer to write; metrics and a picture of what it keeps go beside it",
        metavar="FILE.safetensors",
        results=False,
    )
    resume: bool = option("go on with what was begun in --out; needs no other option", default=False, results=False)
    overwrite: bool = option("delete what is in --out and start anew", default=False, results=False)
    # The tokenizer
    vocab: int = option("number of tokens", auto=AUTO, low=2, metavar="N")
    width: int = option("channels of its first blocks, a multiple of 4", auto=AUTO, low=4, metavar="W")
    blocks_per_group: int = option("blocks at each of four resolutions", auto=AUTO, low=1, metavar="N")
    # What it sees
    image_size: int = option("side of the crop, in pixels; a token stands for 8x8", auto=AUTO, low=16, metavar="PX")
    window_size: int = option(
        "side of the part of the crop that a step trains on, in tokens", auto=AUTO, low=1, metavar="K"
    )
    channels: int = option("channels the images are converted to", auto=AUTO, low=1, metavar="C")
    pixel_type: str = option(
        "what pixels are read as", auto=AUTO, choices=("uint8", "uint16", "float32"), metavar="NAME"
    )
    black: tuple[float, ...] = option(
        "pixel value of each channel that counts as black", auto="0 of 8-bit images, else estimated", metavar="V"
    )
    white: tuple[float, ...] = option("and as white", auto="255 of 8-bit images, else estimated", metavar="V")
    # The course of training
    max_steps: int = option("optimiser steps", auto=AUTO, low=1, metavar="S")
    batch_size: int = option("images per step", auto=AUTO, low=1, metavar="N")
    lr: float = option("highest learning rate", auto=AUTO, above=0, metavar="LR")
    usage_weight: float = option("how much unused tokens weigh in the loss", default=0.2, low=0, metavar="W")
    seed: int = option("fixes crops, noise and initial weights", default=0, low=0, high=LARGEST_SEED, metavar="N")
    # How fast, how watched: another value leads to the same tokenizer
    workers: int = option("processes that read images", auto=AUTO, low=0, metavar="W", results=False)
    device: str = option("where to compute", auto=AUTO, choices=("auto", "cpu", "cuda"), metavar="NAME", results=False)
    log_every: int = option("steps between two plain progress lines", default=10, low=1, metavar="N", results=False)
    max_bad_share: float = option(
        "share of unreadable images from which to refuse", default=0.25, low=0, high=1, metavar="S", results=False
    )


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
    kind, optional = kind_of(typing.get_type_hints(options)[name])
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


def kind_of(hint: Any) -> tuple[Any, bool]:
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
