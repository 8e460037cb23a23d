"""A frozen encoder on its hardware: the features of labelled images, and which of them cannot be used."""

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lomar.commands.automatic import Hardware, find_hardware
from lomar.data.augment import centre_share
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

    def features(self, source: ImageSource, wanted: Sequence[Wanted], batch_size: int) -> Batches:
        """Features of central crops, a batch at a time, and which can be used: see `features_in_batches`.

        To be asked for within `autocast`, and closed: the loading processes end then.
        """
        crops = centre_crops(
            source, self.fmt, self.input.size, self.workers, batch_size, share=centre_share(self.input.size)
        )
        return features_in_batches(self.model, wanted, crops, self.input.normalise, self.device)

    def widths(self, wanted: Sequence[Wanted]) -> list[int]:
        """How many numbers an image has of each kind.

        Raises:
            UserError: the model does not give them.
        """
        try:
            read = feature_reader(self.model, wanted)
            with undisturbed(self.model, self.device), torch.inference_mode(), self.autocast():
                blank = torch.zeros(1, self.input.channels, *self.input.size, device=self.device)
                return [each.shape[-1] for each in read(blank)]
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


def watched(batches: Batches, what: str, total: int) -> Batches:
    """The same batches, their progress shown on standard error: as a bar in a terminal, else now and then as a line."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = told = time.monotonic()
    done = 0
    with closing(batches), Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        for found, good in batches:
            yield found, good
            done += len(good)
            bar.update(task, completed=done)
            now = time.monotonic()
            if bar.disable and now - told > _PLAIN_LINE_S and done < total:
                sys.stderr.write(f"lomar: {what}: {done}/{total} images, {done / (now - began):.0f} a second\n")
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
