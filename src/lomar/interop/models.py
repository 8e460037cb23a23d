"""Any encoder by name: ours, released ones, and those of timm, with what their input is."""

import json
import logging
import socket
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from lomar.errors import UserError
from lomar.interop.weights import CLASSIFIER_FILE, ENCODER_FILE, describe, first_line, load
from lomar.model.encoder import Encoder, size_of

SCRATCH = "scratch:"
LOCAL_DIR = "local-dir:"
_HUB_SCHEMES = ("hf-hub:", "hf_hub:")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CENTRE_CROP = 0.875  # of models that do not tell
SCRATCH_IMAGE, SCRATCH_PATCH = 224, 16
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as repositories of timm's models call them
_PATIENCE_S = 5.0  # for the hub to answer; left alone, its client asks for a minute before it gives up


@dataclass(frozen=True)
class Input:
    """What a model takes.

    Args:
        channels: of its images.
        scale: what pixels are divided by first: 255, 65535 for 16-bit images, 1 for floats.
        mean: of each channel, after that.
        std: standard deviation of each channel.
        size: (height, width) in pixels.
        crop_pct: share of an image's shorter side that evaluation looks at.
    """

    channels: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    crop_pct: float

    @property
    def pixel_type(self) -> str:
        """What pixels are read as: "uint8", "uint16" or "float32"."""
        return pixel_type_of(self.scale)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (..., C, H, W) -> the model's input, float32."""
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (self.mean, self.std))
        return (pixels.float() / self.scale - mean) / std


def pixel_type_of(scale: float) -> str:
    """What pixels are read as, if they are divided by `scale` first."""
    return {255.0: "uint8", 65535.0: "uint16"}.get(scale, "float32")


@dataclass(frozen=True)
class Opened:
    """A model that follows timm's contract, without classifier unless it was fine-tuned by us; and its input."""

    model: nn.Module
    input: Input


def open_model(
    name: str, image_size: tuple[int, ...] | None = None, flag: str = "--model", patch_size: int | None = None
) -> Opened:
    """An encoder in evaluation mode, on the CPU, ready for images of a size.

    Args:
        name: a run's folder, a file of its weights, a released checkpoint; what timm.create_model takes (a name,
            hf-hub:REPO, local-dir:FOLDER); or scratch: before a size of ours or a name of timm, for weights from
            torch's global generator.
        image_size: side, or (height, width), in pixels; None is the model's own.
        flag: the option the name came from, for messages.
        patch_size: side of a patch of scratch: and a size of ours; None is 16 px.

    Raises:
        UserError: there is no such thing, its weights cannot be had, or it does not take the size.
    """
    size = size_given(image_size) if image_size is not None else None
    if patch_size is not None:
        fresh = name.startswith(SCRATCH) and not timm.is_model(name.removeprefix(SCRATCH).split(".")[0])
        if not fresh:
            raise UserError(f"--patch-size is for {flag} scratch:SIZE; {name} has patches of its own")
        model = scratch(name.removeprefix(SCRATCH), flag, patch_size * max(1, SCRATCH_IMAGE // patch_size), patch_size)
    else:
        model = _model(name, flag)
    found = input_of(model)
    if size is not None and size != found.size:
        check_size(model, size)
        model = _resized(model, name, flag, size)
        found = replace(input_of(model), size=size)
    return Opened(model.eval(), found)


def input_of(model: nn.Module) -> Input:
    """What a model of timm's contract says of its input."""
    config: Any = model.pretrained_cfg or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    crop = config.get("crop_pct") or CENTRE_CROP
    return Input(channels, float(config.get("scale", 255.0)), tuple(mean), tuple(std), (height, width), crop)


def size_given(image_size: tuple[int, ...], flag: str = "--image-size") -> tuple[int, int]:
    """(height, width) of one number or two.

    Raises:
        UserError: there are more.
    """
    if len(image_size) > 2:
        raise UserError(f"{flag} has {len(image_size)} numbers; it takes the side, or height and width")
    return image_size[0], image_size[-1]


def patch_size_of(model: nn.Module) -> tuple[int, int]:
    """(rows, columns) in pixels whose multiples an image's sides must be; (1, 1) of a model without patches."""
    size = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return (size, size) if isinstance(size, int) else tuple(size)


def check_size(model: nn.Module, size: tuple[int, int], flag: str = "--image-size") -> None:
    """Refuse an image size that is not made of whole patches.

    Raises:
        UserError: naming the nearest size that is.
    """
    patch = patch_size_of(model)
    if any(side % unit for side, unit in zip(size, patch, strict=True)):
        near = (max(unit, round(side / unit) * unit) for side, unit in zip(size, patch, strict=True))
        numbers = 1 if size[0] == size[1] and patch[0] == patch[1] else 2
        given, better = (" ".join(map(str, tuple(each)[:numbers])) for each in (size, near))
        raise UserError(f"{flag} {given} is not a multiple of the model's patches of {patch[0]} px; {better} would be")


def scratch(
    name: str, flag: str, image_size: int = SCRATCH_IMAGE, patch_size: int = SCRATCH_PATCH, channels: int = 3
) -> nn.Module:
    """An encoder of ours by size, or a model of timm by name, with random weights.

    Raises:
        UserError: it is neither.
    """
    if timm.is_model(name.split(".")[0]):
        return _from_timm(SCRATCH + name, flag)
    try:
        width, depth, heads = size_of(name)
    except ValueError as error:
        raise UserError(f"{flag} scratch:{name}: {error}, or the name of a model of timm") from None
    encoder = Encoder(image_size, patch_size, channels, 0, embed_dim=width, depth=depth, num_heads=heads)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    return describe(encoder, mean, std, 255.0)


def _model(name: str, flag: str, size: tuple[int, int] | None = None) -> nn.Module:
    """The model, of timm's ones made for a size if one is given."""
    if name.startswith(SCRATCH):
        bare = name.removeprefix(SCRATCH)
        return _from_timm(name, flag, size) if timm.is_model(bare.split(".")[0]) else scratch(bare, flag)
    path = Path(name)
    if name.startswith((LOCAL_DIR, *_HUB_SCHEMES)) or _is_timms(path):
        return _from_timm(name, flag, size)
    if path.exists():
        try:
            return load(path)
        except UserError as error:
            raise UserError(f"{flag}: {error}") from error
    if timm.is_model(name.split(".")[0]):
        return _from_timm(name, flag, size)
    raise UserError(f"{flag} {name}: there is no such run or file, and timm knows no such model{_close_to(name)}")


def _is_timms(path: Path) -> bool:
    """Whether a folder is one that timm writes, and no run: a run into which somebody exported stays a run."""
    ours = (ENCODER_FILE, CLASSIFIER_FILE)
    return path.is_dir() and (path / "config.json").exists() and not any((path / file).exists() for file in ours)


def _close_to(name: str) -> str:
    """'; timm has ...' of models whose name begins with a name, contains it or is nearly it."""
    bare = name.split(".")[0]
    if not bare.isidentifier():
        return ""
    near = timm.list_models(f"{bare}*") or timm.list_models(f"*{bare}*") or get_close_matches(bare, timm.list_models())
    return f"; timm has {', '.join(near[:3])}" if near else ""


def _from_timm(name: str, flag: str, size: tuple[int, int] | None = None) -> nn.Module:
    """What timm makes of a name, local-dir:FOLDER (or the bare folder), hf-hub:REPO, or scratch:NAME.

    Raises:
        UserError: timm has no weights of that name, or they cannot be fetched or read.
    """
    pretrained = not name.startswith(SCRATCH)
    source, overlay, folder = name.removeprefix(SCRATCH), None, None
    if name.startswith(_HUB_SCHEMES):
        folder = _hub_folder(name, flag)
        source = f"{LOCAL_DIR}{folder}" if folder else name
    elif name.startswith(LOCAL_DIR) or Path(name).is_dir():
        folder = Path(name.removeprefix(LOCAL_DIR))
        source = f"{LOCAL_DIR}{folder}"
        if not (folder / "config.json").exists():
            raise UserError(f"{flag} {name}: there is no config.json in that folder; `lomar export` or timm writes one")
    elif pretrained:
        overlay = _cached_weights(name, flag)
    made_for: dict[str, Any] = {} if size is None else {"img_size": size}
    try:
        with _quiet():
            model = timm.create_model(
                source, pretrained=pretrained, num_classes=0, pretrained_cfg_overlay=overlay, **made_for
            )
    # A config.json of another library, a gated repository, a broken download, a damaged file: each of the libraries
    # below has its own exceptions, so that no list of types would be complete.
    except Exception as error:
        raise UserError(f"{flag} {name} cannot be loaded ({_in_short(error)})") from error
    _take_scale(model, folder or _hub_folder_of_cache(name))
    return model


def _take_scale(model: nn.Module, folder: Path | None) -> None:
    """Put into the model's configuration what pixels are divided by, which `lomar export` writes and timm has not."""
    if folder is None:
        return
    told = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("lomar", {})
    if "scale" in told:
        config: Any = model.pretrained_cfg
        config["scale"] = told["scale"]


def _hub_folder(name: str, flag: str) -> Path | None:
    """The folder of a repository in the hub's cache where the hub cannot be asked; None where it can.

    Raises:
        UserError: it can neither be asked nor is it cached.
    """
    if _hub_answers():
        return None
    folder = _hub_folder_of_cache(name)
    if folder is None or not any((folder / file).exists() for file in _WEIGHTS):
        raise _not_to_be_had(name, flag)
    return folder


def _hub_folder_of_cache(name: str) -> Path | None:
    """Where the hub's cache keeps a repository that has a config.json; None if it does not, or no such one is meant."""
    if not name.startswith(_HUB_SCHEMES):
        return None
    repository, _, revision = name.split(":", 1)[1].partition("@")
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):  # the latter of a name that can be no repository's
        return None
    return folder if (folder / "config.json").exists() else None


def _cached_weights(name: str, flag: str) -> dict[str, Any] | None:
    """What sends timm to the hub's cache where the hub cannot be asked; None where it can.

    Raises:
        UserError: timm has no weights of that name; or they can neither be fetched nor are they cached.
    """
    bare = name.split(".")[0]
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # there is no such variant of the model's weights
        config = None
    if config is None or not config.has_weights:
        others = [each for each in timm.list_pretrained(f"{bare}.*") if each != name][:3]
        hint = f"it has {', '.join(others)}, and " if others else ""
        raise UserError(
            f"{flag} {name}: timm has no pretrained weights of that name; {hint}{SCRATCH}{bare} has random ones"
        )
    if not config.hf_hub_id or _hub_answers():
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    names = (config.hf_hub_filename,) if config.hf_hub_filename else _WEIGHTS
    for file in names:
        cached = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(cached, str):
            return {"file": cached}
    raise _not_to_be_had(name, flag)


def _not_to_be_had(name: str, flag: str) -> UserError:
    host = urlsplit(constants.ENDPOINT).hostname
    return UserError(
        f"{flag} {name}: its weights are not in the cache, and {host} cannot be reached to fetch them; "
        f"without a network give a folder with {LOCAL_DIR}FOLDER"
    )


def _hub_answers() -> bool:
    """Whether the hub can be reached, or might be through a proxy."""
    if constants.HF_HUB_OFFLINE:
        return False
    if set(urllib.request.getproxies()) & {"http", "https", "all"}:
        return True
    hub = urlsplit(constants.ENDPOINT)
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        socket.create_connection((hub.hostname or "", port), timeout=_PATIENCE_S).close()
    except OSError:
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the libraries that make and fetch models; what matters of them is raised."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def _resized(model: nn.Module, name: str, flag: str, size: tuple[int, int]) -> nn.Module:
    """The model for images of a size: told of it where it can be, else made anew where it must be; and tried.

    Raises:
        UserError: it does not take them.
    """
    config: Any = model.pretrained_cfg or {}
    try:
        if hasattr(model, "set_input_size"):
            with _quiet():
                model.set_input_size(size)  # type: ignore[operator]
        elif config.get("fixed_input_size"):
            model = _model(name, flag, size)
        contract: Any = model.eval()
        with torch.inference_mode():
            blank = torch.zeros(1, input_of(model).channels, *size)
            contract.forward_head(contract.forward_features(blank), pre_logits=True)
    except Exception as error:  # every architecture refuses a size in its own way, if only in the middle of its work
        given = " ".join(map(str, dict.fromkeys(size)))
        raise UserError(f"--image-size {given}: the model does not take it ({_in_short(error)})") from error
    return model


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
