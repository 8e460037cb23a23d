"""Weights out and in: encoder and reconstructor as safetensors, with the metadata that rebuilds them.

Whatever reads weights here reads the checkpoints that LoMaR, MAE, BEiT, DINO and MoCo v3 released as well.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save
from torch import nn

from lomar import __version__
from lomar.errors import UserError
from lomar.files import write_atomically
from lomar.interop.official import Official, from_beits_names, is_torch_file, read_official
from lomar.methods.composition import Composition, EncoderComposition
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.model import Encoder
from lomar.model.encoder import crop_pct

ENCODER_FILE = "encoder.safetensors"
RECONSTRUCTOR_FILE = "reconstructor.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
EXPORTED_FILE = "model.safetensors"  # of a folder of `lomar export`, under timm's name


def save_encoder(path: Path, encoder: Encoder, source: EncoderComposition | Official) -> None:
    """Write an encoder with all that `load` needs to rebuild it, and how its input is normalised.

    Args:
        path: the file.
        encoder: what to write.
        source: where it comes from, with mean, std and scale of its pixels.
    """
    metadata = {
        "architecture": encoder.architecture,
        "num_classes": encoder.num_classes,
        "global_pool": encoder.global_pool,
        "mean": source.mean,
        "std": source.std,
        "scale": source.scale,
    }
    save_file(path, encoder.state_dict(), "encoder", metadata)


def save_classifier(path: Path, encoder: Encoder, classes: Sequence[str]) -> None:
    """Write a fine-tuned encoder with its classifier and the names of the classes.

    Args:
        path: the file.
        encoder: with a head, and a `pretrained_cfg` that says how its input is normalised.
        classes: one name for each output.
    """
    save_file(path, encoder.state_dict(), "classifier", metadata_of(encoder) | {"classes": list(classes)})


def metadata_of(encoder: Encoder, names: str = "") -> dict[str, Any]:
    """What `load` needs beside the tensors to rebuild an encoder or a classifier.

    Args:
        encoder: with its `pretrained_cfg`.
        names: "beit" where the tensors have BEiT's names, "" where they have ours.
    """
    told = encoder.pretrained_cfg or {}
    return {
        "architecture": encoder.architecture,
        "num_classes": encoder.num_classes,
        "global_pool": encoder.global_pool,
        "fc_norm": isinstance(encoder.fc_norm, nn.LayerNorm),
        **{name: told[name] for name in ("mean", "std", "scale")},
        "classes": list(told.get("label_names", ())),
        **({"names": names} if names else {}),
    }


def save_reconstructor(path: Path, method: MaskedReconstruction, composition: Composition) -> None:
    """Write encoder, mask token, decoder and head with all that `load_reconstructor` needs."""
    save_file(path, method.state_dict(), "reconstructor", {"composition": composition.to_dict()})


def load(path: str | Path) -> Encoder:
    """The encoder of a run, of `lomar export` or of a released checkpoint, ready for timm-style use.

    `num_classes` is 0 and `reset_classifier` gives it a head; a fine-tuned one keeps its classifier. Its
    `pretrained_cfg` holds mean, std and input size, as `timm.data.resolve_model_data_config` reads them, and `scale`:
    what pixels are divided by first (255, 65535 for 16-bit images, 1 for floats). `label_names` in it are the
    classes of what `lomar finetune` made.

    Args:
        path: a run's folder, finished or not, its `encoder.safetensors` or `classifier.safetensors`; a folder that
            `lomar export --to hub-folder` wrote, or its `model.safetensors`; or a file that LoMaR, MAE, BEiT, DINO or
            MoCo v3 released (.pth), pretrained or fine-tuned.

    Raises:
        UserError: there is no such file, or it does not hold an encoder.
    """
    file = _resolve(Path(path), ENCODER_FILE, CLASSIFIER_FILE, EXPORTED_FILE)
    if is_torch_file(file):
        official = read_official(file)
        return describe(official.encoder, official.mean, official.std, official.scale)
    return _encoder(file, *read_file(file, "encoder", "classifier"))


def load_reconstructor(path: str | Path) -> tuple[MaskedReconstruction, Composition]:
    """The method of a run or of a released checkpoint with its weights, and its composition.

    Args:
        path: a run's folder, finished or not, a `reconstructor.safetensors`, or a released file (.pth) that holds all
            of pretraining.

    Raises:
        UserError: there is no such file, or it does not hold a reconstructor.
    """
    file = _resolve(Path(path), RECONSTRUCTOR_FILE)
    if is_torch_file(file):
        official = read_official(file)
        if official.method is None or official.composition is None:
            raise UserError(f"{file} holds {official.kind}: without mask token and head nothing can be reconstructed")
        return official.method, official.composition
    return _reconstructor(file, *read_file(file, "reconstructor"))


def load_most(path: str | Path) -> tuple[Encoder | MaskedReconstruction, tuple[float, ...], tuple[float, ...]]:
    """The whole method where there is one, else encoder or classifier; and mean and deviation of its pixels.

    Args:
        path: whatever `load` or `load_reconstructor` takes.

    Raises:
        UserError: there is no such file, or it holds neither.
    """
    file = _resolve(Path(path), RECONSTRUCTOR_FILE, ENCODER_FILE, CLASSIFIER_FILE, EXPORTED_FILE)
    if is_torch_file(file):
        official = read_official(file)
        return official.method or official.encoder, official.mean, official.std
    metadata, tensors = read_file(file, "encoder", "classifier", "reconstructor")
    if metadata["kind"] != "reconstructor":
        encoder = _encoder(file, metadata, tensors)
        return encoder, tuple(metadata["mean"]), tuple(metadata["std"])
    method, composition = _reconstructor(file, metadata, tensors)
    return method, composition.mean, composition.std


def _encoder(file: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> Encoder:
    try:
        classifier = {name: metadata[name] for name in ("num_classes", "global_pool", "fc_norm") if name in metadata}
        encoder = Encoder(**{"num_classes": 0} | classifier | metadata["architecture"])
        encoder.load_state_dict(from_beits_names(tensors, encoder) if metadata.get("names") == "beit" else tensors)
        told = (metadata["mean"], metadata["std"], metadata["scale"], metadata.get("classes", ()))
        return describe(encoder, *told).eval()
    except Exception as error:  # damaged numbers lead anywhere: no heads to a division by zero
        raise UserError(f"{file} does not hold a whole encoder ({first_line(error)})") from error


def _reconstructor(
    file: Path, metadata: dict[str, Any], tensors: dict[str, Any]
) -> tuple[MaskedReconstruction, Composition]:
    try:
        composition = Composition.from_dict(metadata["composition"])
        method = composition.build()
        method.load_state_dict(tensors)
    except Exception as error:  # as above
        raise UserError(f"{file} does not hold a whole reconstructor ({first_line(error)})") from error
    return method.eval(), composition


def describe(
    encoder: Encoder, mean: Sequence[float], std: Sequence[float], scale: float, classes: Sequence[str] = ()
) -> Encoder:
    """The encoder, with what timm asks a model about its input and classifier.

    Args:
        encoder: changed in place.
        mean, std: of each channel.
        scale: what pixels are divided by first.
        classes: the names of a classifier's outputs.
    """
    encoder.pretrained_cfg = {
        "architecture": "lomar_vit",
        "input_size": (encoder.architecture["in_chans"], *encoder.patch_embed.img_size),
        "fixed_input_size": False,
        "mean": tuple(mean),
        "std": tuple(std),
        "scale": scale,
        "interpolation": "bicubic",
        "crop_pct": crop_pct(encoder.patch_embed.img_size),
        "num_classes": encoder.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    } | ({"label_names": list(classes)} if classes else {})
    return encoder


def save_file(path: Path, tensors: dict[str, Any], kind: str, metadata: dict[str, Any]) -> None:
    """Write tensors, what kind of thing they are, and what rebuilds it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = {"format": "pt", "lomar": json.dumps({"kind": kind, "version": __version__, **metadata})}
    write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata=text)))


def _resolve(path: Path, *names: str) -> Path:
    """The file itself, or the first of these names in the folder of a run."""
    if path.is_dir():
        there = next((path / name for name in names if (path / name).exists()), None)
        if there is None:
            lacks = f"no {names[0]}" if len(names) == 1 else f"neither {' nor '.join(names)}"
            raise UserError(f"{path} holds {lacks}; is it the folder of a run that has begun?")
        return there
    if not path.exists():
        raise UserError(f"there is no run or file {path}")
    return path


def read_file(path: Path, *kinds: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a file that holds one of `kinds`.

    Raises:
        UserError: it is no safetensors file, or holds something else.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("lomar")
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a safetensors file ({first_line(error)})") from error
    try:
        metadata = json.loads(text or "{}")
        found = metadata.get("kind", "weights of something else")
    except (ValueError, AttributeError):
        found = "weights of something else"
    if found not in kinds:
        raise UserError(f"{path} holds {found}, not the {' or '.join(kinds)} of a run")
    return metadata, tensors


def first_line(error: BaseException) -> str:
    """The beginning of an error's text, for a message of one line."""
    return str(error).strip().split("\n")[0][:200]
