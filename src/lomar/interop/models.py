"""Any encoder by name: ours, released ones, and those of timm, with what their input is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lomar.errors import UserError
from lomar.interop.weights import describe, first_line, load
from lomar.model.encoder import Encoder, size_of

SCRATCH = "scratch:"
_HUB_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCRATCH_IMAGE, SCRATCH_PATCH = 224, 16


@dataclass(frozen=True)
class Input:
    """What a model takes.

    Args:
        channels: of its images.
        scale: what pixels are divided by first: 255, 65535 for 16-bit images, 1 for floats.
        mean: of each channel, after that.
        std: standard deviation of each channel.
        size: (height, width) in pixels.
    """

    channels: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]

    @property
    def pixel_type(self) -> str:
        """What pixels are read as: "uint8", "uint16" or "float32"."""
        return {255.0: "uint8", 65535.0: "uint16"}.get(self.scale, "float32")

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (..., C, H, W) -> the model's input, float32."""
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (self.mean, self.std))
        return (pixels.float() / self.scale - mean) / std


@dataclass(frozen=True)
class Opened:
    """A model that follows timm's contract, without classifier unless it was fine-tuned by us; and its input."""

    model: nn.Module
    input: Input


def open_model(name: str, image_size: tuple[int, ...] | None = None, flag: str = "--model") -> Opened:
    """An encoder in evaluation mode, on the CPU, ready for images of a size.

    Args:
        name: a run's folder, a file of its weights, a released checkpoint; what timm.create_model takes (a name,
            hf-hub:REPO, local-dir:FOLDER); or scratch: before a size of ours or a name of timm, for weights from
            torch's global generator.
        image_size: side, or (height, width), in pixels; None is the model's own.
        flag: the option the name came from, for messages.

    Raises:
        UserError: there is no such thing, its weights cannot be had, or it does not take the size.
    """
    model = _model(name, flag)
    found = input_of(model)
    if image_size is not None:
        found = Input(found.channels, found.scale, found.mean, found.std, size_given(image_size))
        _set_size(model, found.size)
    return Opened(model.eval(), found)


def input_of(model: nn.Module) -> Input:
    """What a model of timm's contract says of its input."""
    config: Any = model.pretrained_cfg or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return Input(channels, float(config.get("scale", 255.0)), tuple(mean), tuple(std), (height, width))


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
        near = [max(unit, round(side / unit) * unit) for side, unit in zip(size, patch, strict=True)]
        given, better = (" ".join(map(str, dict.fromkeys(v) if v[0] == v[1] else v)) for v in (list(size), near))
        raise UserError(f"{flag} {given} is not a multiple of the model's patches of {patch[0]} px; {better} would be")


def _model(name: str, flag: str) -> nn.Module:
    if name.startswith(SCRATCH):
        return scratch(name.removeprefix(SCRATCH), flag)
    path = Path(name)
    if path.exists():
        exported = path.is_dir() and (path / "config.json").exists()
        return _from_timm(f"local-dir:{path}", flag) if exported else load(path)
    if name.startswith(_HUB_SCHEMES) or timm.is_model(name.split(".")[0]):
        return _from_timm(name, flag)
    near = timm.list_models(f"*{name}*")[:3] if name.isidentifier() else []
    hint = f"; timm has {', '.join(near)}" if near else ""
    raise UserError(f"{flag} {name}: there is no such run or file, and timm knows no such model{hint}")


def scratch(
    name: str, flag: str, image_size: int = SCRATCH_IMAGE, patch_size: int = SCRATCH_PATCH, channels: int = 3
) -> nn.Module:
    """An encoder of ours by size, or a model of timm by name, with random weights.

    Raises:
        UserError: it is neither.
    """
    if timm.is_model(name.split(".")[0]):
        return timm.create_model(name, pretrained=False, num_classes=0)
    try:
        width, depth, heads = size_of(name)
    except ValueError as error:
        raise UserError(f"{flag} scratch:{name}: {error}, or the name of a model of timm") from None
    encoder = Encoder(image_size, patch_size, channels, 0, embed_dim=width, depth=depth, num_heads=heads)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    return describe(encoder, mean, std, 255.0)


def _from_timm(name: str, flag: str) -> nn.Module:
    """Raises UserError where timm has no weights of that name, or cannot fetch them."""
    import lomar.model  # noqa: F401  # so that timm knows what `lomar export` wrote

    if not name.startswith(_HUB_SCHEMES):
        config = timm.get_pretrained_cfg(name)
        if config is None or not config.has_weights:
            raise UserError(
                f"{flag} {name}: timm has no pretrained weights of that name; scratch:{name} has random ones"
            )
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{flag} {name}: its weights cannot be had ({type(error).__name__}: {first_line(error)}); "
            "without a network, give a folder with local-dir:FOLDER"
        ) from error


def _set_size(model: nn.Module, size: tuple[int, int]) -> None:
    check_size(model, size)
    if size == input_of(model).size or not hasattr(model, "set_input_size"):
        return
    try:
        model.set_input_size(size)  # type: ignore[operator]
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"--image-size {size[0]} {size[1]}: the model cannot be made for it ({first_line(error)})"
        ) from error
