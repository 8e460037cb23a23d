"""Weights out and in: encoder and reconstructor as safetensors, with the metadata that rebuilds them."""

import json
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save

from lomar import __version__
from lomar.errors import UserError
from lomar.files import write_atomically
from lomar.methods.recipes import Composition
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.model import Encoder

ENCODER_FILE = "encoder.safetensors"
RECONSTRUCTOR_FILE = "reconstructor.safetensors"


def save_encoder(path: Path, encoder: Encoder, composition: Composition) -> None:
    """Write an encoder with all that `load` needs to rebuild it, and how its input is normalised."""
    metadata = {"architecture": encoder.architecture, "mean": composition.mean, "std": composition.std}
    _save(path, encoder.state_dict(), "encoder", metadata | {"scale": composition.scale})


def save_reconstructor(path: Path, method: MaskedReconstruction, composition: Composition) -> None:
    """Write encoder, mask token and head with all that `load_reconstructor` needs."""
    _save(path, method.state_dict(), "reconstructor", {"composition": composition.to_dict()})


def load(path: str | Path) -> Encoder:
    """The encoder of a run, ready for timm-style use; `num_classes` is 0 and `reset_classifier` gives it a head.

    Its `pretrained_cfg` holds mean, std and input size, as `timm.data.resolve_model_data_config` reads them, and
    `scale`: what pixels are divided by first (255, 65535 for 16-bit images, 1 for floats).

    Args:
        path: a run's folder, finished or not, or an `encoder.safetensors`.

    Raises:
        UserError: there is no such file, or it does not hold an encoder of lomar.
    """
    file = _resolve(Path(path), ENCODER_FILE)
    metadata, tensors = _read(file, "encoder")
    try:
        encoder = Encoder(num_classes=0, **metadata["architecture"])
        encoder.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"{file} does not hold a whole encoder ({_first_line(error)})") from error
    size = encoder.patch_embed.img_size
    pretrained_cfg = {
        "architecture": "lomar_vit",
        "input_size": (metadata["architecture"]["in_chans"], *size),
        "fixed_input_size": False,
        "mean": tuple(metadata["mean"]),
        "std": tuple(metadata["std"]),
        "scale": metadata["scale"],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    encoder.pretrained_cfg = pretrained_cfg
    return encoder.eval()


def load_reconstructor(path: str | Path) -> tuple[MaskedReconstruction, Composition]:
    """The method of a run with its weights, and its composition.

    Args:
        path: a run's folder, finished or not, or a `reconstructor.safetensors`.

    Raises:
        UserError: there is no such file, or it does not hold a reconstructor.
    """
    file = _resolve(Path(path), RECONSTRUCTOR_FILE)
    metadata, tensors = _read(file, "reconstructor")
    try:
        composition = Composition.from_dict(metadata["composition"])
        method = composition.build()
        method.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"{file} does not hold a whole reconstructor ({_first_line(error)})") from error
    return method.eval(), composition


def _save(path: Path, tensors: dict[str, Any], kind: str, metadata: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = {"format": "pt", "lomar": json.dumps({"kind": kind, "version": __version__, **metadata})}
    write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata=text)))


def _resolve(path: Path, name: str) -> Path:
    if path.is_dir():
        if not (path / name).exists():
            raise UserError(f"{path} holds no {name}; is it the folder of a run that has begun?")
        return path / name
    if not path.exists():
        raise UserError(f"there is no run or file {path}")
    return path


def _read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("lomar")
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a safetensors file ({_first_line(error)})") from error
    try:
        metadata = json.loads(text or "{}")
        found = metadata.get("kind", "weights of something else")
    except (ValueError, AttributeError):
        found = "weights of something else"
    if found != kind:
        raise UserError(f"{path} holds {found}, not the {kind} of a run")
    return metadata, tensors


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
