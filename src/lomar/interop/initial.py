"""Pretraining that goes on from weights there are: `lomar pretrain --init`."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lomar.errors import UserError
from lomar.interop.weights import load_most
from lomar.methods.architectures import Architecture, EncoderDecoder
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.two_view import TwoView
from lomar.model import SIZES, Encoder
from lomar.model.positions import RelativeBias
from lomar.model.transformer import Transformer


def initialise(method: MaskedReconstruction | TwoView, path: str | Path) -> list[str]:
    """Copy into a method what a file has for it; tables of positions are resized to the method's grid.

    The encoder must fit. A decoder is taken whole or not at all, mask token and head where their shape allows it. Where
    a method has a teacher, both of its encoders begin with the file's, and heads stay fresh.

    Args:
        method: changed in place.
        path: a run's folder, an encoder or reconstructor file, or a released checkpoint.

    Returns:
        Lines for the user: what was taken, resized, is fresh, and was not used.

    Raises:
        UserError: the file cannot be read, or its encoder is another; the line names the option that would make it fit.
    """
    source, mean, std = load_most(path)
    theirs, encoder = _parts(source)
    _check_encoder(path, encoder, method.encoder)
    filled: list[nn.Module]
    taken: nn.Module
    if isinstance(method, TwoView):
        filled, taken, beginning = [method.student.encoder, method.teacher.encoder], encoder, ""
        resized = match_grids(encoder, method.encoder)
    else:
        filled, taken, beginning = [method], source, "architecture.encoder." if theirs is encoder else ""
        resized = match_grids(theirs, method.encoder if theirs is encoder else method.architecture)
    given = {beginning + name: tensor for name, tensor in taken.state_dict().items()}
    own = filled[0].state_dict()
    fitting = {name for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    if isinstance(method, MaskedReconstruction) and not _same_decoder(theirs, method.architecture):
        fitting = {name for name in fitting if not name.startswith("architecture.decoder")}
    for module in filled:
        module.load_state_dict({name: given[name] for name in fitting}, strict=False)
    lines = [f"--init {path}: {len(fitting)} of {len(given)} tensors taken"]
    for what, names in {
        "resized to this grid": resized,
        "fresh": [name for name in own if name not in fitting],
        "not used": [name for name in given if name not in fitting],
    }.items():
        lines += [f"  {what}: {listed(names)}"] if names else []
    there, here = (each.architecture["position"] for each in (encoder, method.encoder))
    if there != here and method.encoder.pos_embed is not None and encoder.pos_embed is not None:
        goes_on = "learn from here" if here == "learned" else "stay as they are"
        lines.append(f"  positions were {there} and are to be {here}: the file's are taken, and {goes_on}")
    pixels = f"--mean {_numbers(mean)} --std {_numbers(std)}"
    if pixels != f"--mean {_numbers(method.mean.flatten())} --std {_numbers(method.std.flatten())}":
        lines.append(f"  its pixels were normalised otherwise, as by {pixels}")
    return lines


def initial_options(path: str | Path) -> dict[str, Any]:
    """The options of `lomar pretrain` that a file settles, for use as defaults.

    Args:
        path: as for `initialise`.

    Returns:
        `model` (a size's name, or WIDTHxDEPTHxHEADS), `patch_size`, `channels`, and a decoder's sizes if it has one.

    Raises:
        UserError: the file cannot be read.
    """
    source, _, _ = load_most(path)
    architecture, encoder = _parts(source)
    made = encoder.architecture
    options = {"model": _model(encoder), "patch_size": made["patch_size"], "channels": made["in_chans"]}
    if isinstance(architecture, EncoderDecoder):
        options |= {"decoder_width": architecture.width, "decoder_depth": len(architecture.decoder.blocks)}
        options["decoder_heads"] = _heads(architecture.decoder)
    return options


def _parts(source: Encoder | MaskedReconstruction) -> tuple[Encoder | Architecture, Encoder]:
    """The architecture with its encoder; where there is none, the encoder twice."""
    return (source, source) if isinstance(source, Encoder) else (source.architecture, source.architecture.encoder)


def _model(encoder: Encoder) -> str:
    size = tuple(encoder.architecture[name] for name in ("embed_dim", "depth", "num_heads"))
    return next((name for name, known in SIZES.items() if known == size), "x".join(map(str, size)))


def _check_encoder(path: str | Path, theirs: Encoder, ours: Encoder) -> None:
    """Refuse an encoder that is not the method's, by the first thing that differs."""
    there, here = theirs.architecture, ours.architecture
    model, patch, channels = _model(theirs), there["patch_size"], there["in_chans"]
    hidden, ours_hidden = (int(made["embed_dim"] * made["mlp_ratio"]) for made in (there, here))
    keys = "have a bias: give --transformer vit" if there["key_bias"] else "have no bias: give --transformer beit"
    scale = "layer scale: give --layer-scale 0.1" if there["init_values"] else "no layer scale: give --layer-scale 0"
    for differs, text in (
        (patch != here["patch_size"], f"patches are {patch} px: give --patch-size {patch}"),
        (channels != here["in_chans"], f"images have {channels} channels: give --channels {channels}"),
        (model != _model(ours), f"size is {model}: give --model {model}"),
        (there["key_bias"] != here["key_bias"], f"keys {keys}"),
        (bool(there["init_values"]) != bool(here["init_values"]), f"transformer has {scale}"),
        (hidden != ours_hidden, f"perceptrons have a hidden width of {hidden}, not {ours_hidden}"),
    ):
        if differs:
            raise UserError(f"--init {path} does not fit: its {text}")


def match_grids(source: nn.Module, target: nn.Module) -> list[str]:
    """Resize the source's tables of positions to the grids of a target of the same structure; returns their names."""
    parts = dict(source.named_modules())
    resized = []
    for name, wanted in target.named_modules():
        part = parts.get(name)
        if isinstance(wanted, RelativeBias) and isinstance(part, RelativeBias) and part.grid != wanted.grid:
            part.set_grid(wanted.grid)
            resized.append(f"{name}.table")
        if (
            isinstance(wanted, Transformer)
            and isinstance(part, Transformer)
            and part.grid != wanted.grid
            and part.pos_embed is not None
            and wanted.pos_embed is not None
        ):
            part.set_grid(wanted.grid)
            resized.append(f"{name}.pos_embed".lstrip("."))
    return resized


def _same_decoder(theirs: nn.Module, ours: nn.Module) -> bool:
    if not isinstance(theirs, EncoderDecoder) or not isinstance(ours, EncoderDecoder):
        return False
    shapes = [{name: t.shape for name, t in each.decoder.state_dict().items()} for each in (theirs, ours)]
    return shapes[0] == shapes[1] and _heads(theirs.decoder) == _heads(ours.decoder)


def _heads(transformer: Transformer) -> int:
    heads: int = transformer.blocks[0].attn.heads  # type: ignore[assignment,union-attr]
    return heads


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{float(value):.4g}" for value in values)


def listed(names: Iterable[str]) -> str:
    """Names without their rooms; those of all blocks as one."""
    counts: dict[str, int] = {}
    for name in names:
        short = re.sub(r"\.\d+\.", ".*.", name.removeprefix("architecture.").removeprefix("encoder."))
        counts[short] = counts.get(short, 0) + 1
    return ", ".join(name + (f" ({count})" if "*" in name else "") for name, count in counts.items())
