"""A frozen encoder on its hardware: the features of labelled images, and which of them cannot be used."""

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lomar.commands.automatic import Hardware, find_hardware
from lomar.data.augment import centre_crop
from lomar.data.decode import PixelFormat, read_image
from lomar.data.labels import Labelled
from lomar.data.loader import centre_crops
from lomar.data.sources import ImageSource
from lomar.data.survey import reason_for, spread
from lomar.downstream.features import (
    Wanted,
    feature_reader,
    features_in_batches,
    has_cls,
    has_cls_of_layers,
    layer_count,
    undisturbed,
)
from lomar.downstream.knn import FEW
from lomar.errors import BadImageError, UserError
from lomar.interop.models import Input, open_model

INTERPOLATION = "bicubic"  # of every crop, whatever a model of timm names as its own
FEW_FROM = 2 * FEW  # classes from which top-5 says something
_LOOKED_AT = 64  # images that are read before the work; if none of them can be, there is no sense in going on
_NAMED_FILES = 3  # of those that cannot be used

Batches = Generator[tuple[list[Tensor], Tensor], None, None]


@dataclass(frozen=True)
class Part:
    """Some of the labelled images, as messages name them.

    Args:
        labelled: the images.
        name: such as "val images".
        where: the option they came from, and its value.
    """

    labelled: Labelled
    name: str
    where: str

    def __len__(self) -> int:
        return len(self.labelled)


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder that is not trained, and how it is run.

    Args:
        model: in evaluation mode, on the device.
        input: what it takes.
        hardware: where it is.
        precision: "fp32" or "bf16" of its matrix products.
        workers: processes that read images.
    """

    model: nn.Module
    input: Input
    hardware: Hardware
    precision: str
    workers: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.hardware.device)

    @property
    def fmt(self) -> PixelFormat:
        return PixelFormat(self.input.channels, self.input.pixel_type)

    def autocast(self) -> torch.autocast:
        """The context in which it runs."""
        return torch.autocast(self.hardware.device, torch.bfloat16, enabled=self.precision == "bf16")

    def features(self, source: ImageSource, wanted: Sequence[Wanted], batch_size: int, first: int = 0) -> Batches:
        """Features of central crops from image `first` on, a batch at a time, and which can be used.

        See `features_in_batches`. To be asked for within `autocast`, and closed: the loading processes end then.
        """
        size = self.input.size
        crops = centre_crops(source, self.fmt, size, self.workers, batch_size, self.input.crop_pct, first)
        return features_in_batches(self.model, wanted, crops, self.input.normalise, self.device)

    def shapes(self, wanted: Sequence[Wanted]) -> list[tuple[int, ...]]:
        """The shape that each kind of feature of an image has: (D,), or (patches, D).

        Raises:
            UserError: the model does not give them.
        """
        try:
            read = feature_reader(self.model, wanted)
            with undisturbed(self.model, self.device), torch.inference_mode(), self.autocast():
                blank = torch.zeros(1, self.input.channels, *self.input.size, device=self.device)
                return [tuple(each.shape[1:]) for each in read(blank)]
        except ValueError as error:
            raise UserError(f"--features: {error}") from error


def open_frozen(
    model: str,
    image_size: tuple[int, ...] | None,
    *,
    seed: int,
    device: str,
    precision: str,
    workers: int | None,
    patch_size: int | None = None,
) -> FrozenEncoder:
    """The encoder of `--model`, on `--device`.

    Args:
        model, image_size, device, precision, workers, patch_size: as the options of these names; None and "auto" are
            chosen here.
        seed: fixes the weights of scratch: models.

    Raises:
        UserError: there is no such model, or no such device.
    """
    hardware = find_hardware(device)
    torch.manual_seed(seed)
    opened = open_model(model, image_size, patch_size=patch_size)
    if workers is None:
        gpu = hardware.device == "cuda"
        workers = min(16, max(1, hardware.cores - 1)) if gpu else min(2, hardware.cores // 2)
    chosen = ("bf16" if hardware.bf16 else "fp32") if precision == "auto" else precision
    return FrozenEncoder(opened.model.to(hardware.device), opened.input, hardware, chosen, workers)


def check_features(model: nn.Module, features: Sequence[str], layers: Sequence[int] | None) -> None:
    """Refuse what the model cannot give.

    Raises:
        UserError: naming the option, and what would be right.
    """
    count = layer_count(model)
    for layer in layers or ():
        if layer > count:
            raise UserError(f"--layers {layer}: the model has layers 1 to {count}")
    for each in features:
        if "cls" not in each:
            continue
        if not has_cls(model):
            raise UserError(f"--features {each}: the model has no cls token; features can be pooled or mean")
        if any(layer < count for layer in layers or ()) and not has_cls_of_layers(model):
            raise UserError(f"--features {each}: the model has a cls token after layer {count} alone, its last")


def weights_digest(model: nn.Module) -> str:
    """Changes with any weight or buffer."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_readable(source: ImageSource, encoder: FrozenEncoder, where: str, name: str) -> None:
    """Refuse images of which none can be read, before hours are spent on finding that out.

    Args:
        source: the images; up to 64 of them are read, and none after the first that can be.
        encoder: what they are for.
        where: the option they came from, for the message.
        name: what they are, likewise.

    Raises:
        UserError: naming one and the reason.
    """
    looked_at = spread(len(source), _LOOKED_AT)
    reason = ""
    for index in looked_at:
        reason = unreadable(source, index, encoder)
        if not reason:
            return
    raise UserError(
        f"{where}: none of {len(looked_at)} {name} can be read, for example {source.name(looked_at[-1])}: {reason}"
    )


def unreadable(source: ImageSource, index: int, encoder: FrozenEncoder) -> str:
    """Why an image cannot be read; empty if it can."""
    size = encoder.input.size
    try:
        image = read_image(source.read(index), source.name(index))
        image.crop(centre_crop(image.height, image.width, size, encoder.input.crop_pct), size, encoder.fmt)
    except (BadImageError, OSError) as error:
        return reason_for(error)
    return ""


def why(source: ImageSource, bad: Sequence[int], encoder: FrozenEncoder) -> str:
    """The first few images that cannot be used, each with the reason."""
    named = [
        f"{source.name(index)} ({unreadable(source, index, encoder) or 'its features are not finite'})"
        for index in bad[:_NAMED_FILES]
    ]
    return ", ".join(named) + (" and more" if len(bad) > _NAMED_FILES else "")


def left_out(part: Part, good: Tensor, encoder: FrozenEncoder, say: Callable[[str], object]) -> list[str]:
    """Names of the images that cannot be read, or whose features are not finite; the first few are told with reasons.

    Args:
        part: the images.
        good: bool (N,), which can be used.
        encoder: what they are for.
        say: tells a line.

    Raises:
        UserError: none can be used.
    """
    source = part.labelled.source
    bad = (~good).nonzero().flatten().tolist()
    if len(bad) == len(part):
        raise UserError(f"{part.where}: none of {len(part)} {part.name} can be used: {why(source, bad, encoder)}")
    if bad:
        say(f"{len(bad)} of {len(part)} {part.name} cannot be used and are left out: {why(source, bad, encoder)}")
    return [source.name(index) for index in bad]
