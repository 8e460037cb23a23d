"""Tokenizers out and in: ours as safetensors, OpenAI's as the files they were released in."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lomar.errors import UserError
from lomar.interop.pickles import read_module
from lomar.interop.weights import first_line, read_file, save_file
from lomar.methods.tokenizer import GROUPS, DiscreteVAE

_OFFICIAL_CLASSES = ("dall_e.",)
_WHITE = 255.0  # the released tokenizer is for 8-bit images


def save_tokenizer(path: Path, dvae: DiscreteVAE) -> None:
    """Write a tokenizer with all that `load_tokenizer` needs to rebuild it."""
    save_file(path, dvae.state_dict(), "tokenizer", {"architecture": dvae.architecture})


def load_tokenizer(path: str | Path) -> DiscreteVAE:
    """A tokenizer on the CPU, in evaluation mode and without gradients.

    Args:
        path: a file of `lomar tokenizer train`; or OpenAI's `encoder.pkl` or the folder that holds it, with
            `decoder.pkl` beside it if there is one; or a state dict of that encoder.

    Raises:
        UserError: there is no such file, it does not hold a tokenizer, or it names code to be run.
    """
    path = Path(path)
    file = path / "encoder.pkl" if path.is_dir() else path
    if not file.exists():
        missing = f"{path} holds no encoder.pkl" if path.is_dir() else f"there is no tokenizer {path}"
        raise UserError(f"{missing}; it can be a file of lomar tokenizer train, or OpenAI's encoder.pkl")
    dvae = _ours(file) if _is_safetensors(file) else _official(file)
    return dvae.eval().requires_grad_(False)


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins as such: a length in eight bytes, then JSON."""
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error.strerror}") from error


def _ours(path: Path) -> DiscreteVAE:
    metadata, tensors = read_file(path, "tokenizer")
    dvae = _build(path, metadata.get("architecture", {}))
    _load(dvae, tensors, path)
    return dvae


def _official(path: Path) -> DiscreteVAE:
    encoder = read_module(path, _OFFICIAL_CLASSES)
    first, last = (_convolution(path, encoder, name) for name in ("blocks.input.w", "blocks.output.conv.w"))
    if first[-1] == 1:
        raise UserError(f"{path} holds DALL-E's decoder; tokens are made by its encoder.pkl")
    beside = path.with_name("decoder.pkl")
    decoder = read_module(beside, _OFFICIAL_CLASSES) if beside.exists() else None
    width, channels = first[:2]
    architecture = {
        "channels": channels,
        "width": width,
        "vocab": last[0],
        "blocks_per_group": _blocks_per_group(encoder),
        "low": [0.0] * channels,
        "high": [_WHITE] * channels,
        "has_decoder": decoder is not None,
    }
    dvae = _build(path, architecture)
    _load(dvae.encoder, encoder, path)
    if dvae.decoder is not None and decoder is not None:
        _load(dvae.decoder, decoder, beside)
    return dvae


def _build(path: Path, architecture: dict[str, Any]) -> DiscreteVAE:
    try:
        return DiscreteVAE.build(**architecture)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{path} does not hold a whole tokenizer ({first_line(error)})") from error


def _load(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Give a module its weights; what does not fit is named."""
    own = module.state_dict()
    for name in (*own, *state):
        if name not in state:
            raise UserError(f"{path} does not hold a whole tokenizer: {name} is missing")
        if name not in own:
            raise UserError(f"{path} does not hold a tokenizer: there is {name} in it")
        if own[name].shape != state[name].shape:
            raise UserError(
                f"{path} does not hold a tokenizer that fits: {name} is {tuple(state[name].shape)}, "
                f"not {tuple(own[name].shape)}"
            )
    module.load_state_dict(state)


def _convolution(path: Path, state: dict[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of its weights."""
    if name not in state or state[name].ndim != 4:
        raise UserError(f"{path} holds no DALL-E encoder: there is no convolution {name} in it")
    return tuple(state[name].shape)


def _blocks_per_group(state: dict[str, Tensor]) -> int:
    found = (re.match(rf"blocks\.group_{GROUPS}\.block_(\d+)\.", name) for name in state)
    return len({number[1] for number in found if number})
