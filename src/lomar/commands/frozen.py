"""A frozen encoder on its hardware: the features of labelled images, and which of them cannot be used."""

import hashlib
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lomar.commands.automatic import Hardware, find_hardware
from lomar.data.decode import PixelFormat
from lomar.data.loader import centre_crops
from lomar.data.sources import ImageSource
from lomar.downstream.features import (
    Wanted,
    feature_reader,
    features_in_batches,
    has_cls,
    has_cls_of_layers,
    layer_count,
    undisturbed,
)
from lomar.errors import UserError
from lomar.interop.models import Input, open_model

_NAMED_FILES = 3  # of those that cannot be used
_PLAIN_LINE_S = 30.0  # between two lines of progress where there is no terminal

Batches = Generator[tuple[list[Tensor], Tensor], None, None]


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
) -> FrozenEncoder:
    """The encoder of `--model`, on `--device`.

    Args:
        model, image_size, device, precision, workers: as the options of these names; None and "auto" are chosen here.
        seed: fixes the weights of scratch: models.

    Raises:
        UserError: there is no such model, or no such device.
    """
    hardware = find_hardware(device, 1)
    torch.manual_seed(seed)
    opened = open_model(model, image_size)
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


def watched(batches: Batches, what: str, total: int, first: int = 0) -> Batches:
    """The same batches, their progress shown on standard error: as a bar in a terminal, else now and then as a line.

    Args:
        batches: of features, and which can be used.
        what: is going on.
        total: images of all.
        first: images done before, in an earlier sitting.
    """
    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]:.0f} images/s")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    began = told = time.monotonic()
    done = first
    with closing(batches), Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=first, rate=0.0)
        for found, good in batches:
            yield found, good
            done += len(good)
            now = time.monotonic()
            images_per_s = (done - first) / max(1e-9, now - began)
            bar.update(task, completed=done, rate=images_per_s)
            if bar.disable and now - told > _PLAIN_LINE_S and done < total:
                left = timedelta(seconds=round((total - done) / images_per_s))
                sys.stderr.write(f"lomar: {what}: {done}/{total} images, {images_per_s:.0f} images/s, eta {left}\n")
                told = now


def unusable(source: ImageSource, good: Tensor) -> list[str]:
    """Names of the images that cannot be read, or whose features are not finite."""
    return [source.name(index) for index in (~good).nonzero().flatten().tolist()]


def report_unusable(names: Sequence[str], total: int, what: str, say: Callable[[str], object]) -> None:
    """One line on images that are left out, if there are any."""
    if names:
        shown = ", ".join(names[:_NAMED_FILES]) + (" and more" if len(names) > _NAMED_FILES else "")
        say(f"{len(names)} of {total} {what} images cannot be used and are left out: {shown}")


def require_some(good: Tensor, source: ImageSource, where: str, purpose: str) -> None:
    """Refuse images none of which can be used.

    Raises:
        UserError: naming one.
    """
    if not good.any():
        raise UserError(
            f"{where}: none of the {len(source)} images {purpose} can be used, for example {source.name(0)}"
        )
