"""Tokenizers out and in: ours as safetensors, OpenAI's as the files they were released in."""

import re
from pathlib import Path

from torch import Tensor

from lomar.errors import UserError
from lomar.interop.pickles import read_module
from lomar.interop.weights import _first_line, _read, _save
from lomar.methods.tokenizer import GROUPS, DiscreteVAE

_OFFICIAL_CLASSES = ("dall_e.",)
_WHITE = 255.0  # the released tokenizer is for 8-bit images


def save_tokenizer(path: Path, dvae: DiscreteVAE) -> None:
    """Write a tokenizer with all that `load_tokenizer` needs to rebuild it."""
    _save(path, dvae.state_dict(), "tokenizer", {"architecture": dvae.architecture})


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
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _ours(path: Path) -> DiscreteVAE:
    metadata, tensors = _read(path, "tokenizer")
    try:
        dvae = DiscreteVAE.build(**metadata["architecture"])
        dvae.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not hold a whole tokenizer ({_first_line(error)})") from error
    return dvae


def _official(path: Path) -> DiscreteVAE:
    encoder = read_module(path, _OFFICIAL_CLASSES)
    beside = path.with_name("decoder.pkl")
    decoder = read_module(beside, _OFFICIAL_CLASSES) if beside.exists() else {}
    channels = _shape(path, encoder, "blocks.input.w")[1]
    try:
        dvae = DiscreteVAE.build(
            channels=channels,
            width=_shape(path, encoder, "blocks.input.w")[0],
            vocab=_shape(path, encoder, "blocks.output.conv.w")[0],
            blocks_per_group=_blocks_per_group(encoder),
            low=[0.0] * channels,
            high=[_WHITE] * channels,
            has_decoder=bool(decoder),
        )
        dvae.encoder.load_state_dict(encoder)
        if dvae.decoder is not None:
            dvae.decoder.load_state_dict(decoder)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not hold a DALL-E encoder that fits ({_first_line(error)})") from error
    return dvae


def _shape(path: Path, state: dict[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state or state[name].ndim != 4:
        raise UserError(f"{path} holds no DALL-E encoder: there is no convolution {name} in it")
    return tuple(state[name].shape)


def _blocks_per_group(state: dict[str, Tensor]) -> int:
    numbers = [re.match(rf"blocks\.group_{GROUPS}\.block_(\d+)\.", name) for name in state]
    return max((int(number[1]) for number in numbers if number), default=1)
