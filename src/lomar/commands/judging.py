"""A classifier judged on labelled images: what is printed, written and drawn of it."""

import json
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lomar.commands.automatic import Hardware, find_hardware
from lomar.data.decode import PixelFormat
from lomar.data.labels import Labelled
from lomar.data.loader import centre_crops
from lomar.data.sources import ImageSource
from lomar.downstream.classify import TOP, Judgement, judge, probabilities
from lomar.errors import UserError
from lomar.figures.confusion import confusion_matrix
from lomar.files import write_text
from lomar.interop.models import Input, check_size, input_of, size_given
from lomar.interop.weights import load
from lomar.model import Encoder
from lomar.model.encoder import crop_pct

EVALUATION_FILE = "evaluation.json"
CONFUSION_FILE = "confusion.png"
MOST_CONFUSABLE = 2000  # classes whose pairs are counted: 32 MB


Answers = Generator[tuple[Tensor, Tensor], None, None]


class Session:
    """A classifier of ours on a device, asked about files.

    Args:
        model: a fine-tuned run, or its classifier's file.
        image_size: side, or height and width, in pixels; None is the model's.
        device, precision: "auto", or what to take.

    Raises:
        UserError: there is no such model, it is no classifier, or it does not take the size.
    """

    def __init__(self, model: str, image_size: tuple[int, ...] | None, device: str, precision: str) -> None:
        self.classifier = load(model)
        self.classes = class_names(self.classifier, model)
        takes = input_of(self.classifier)
        size = size_given(image_size) if image_size else takes.size
        check_size(self.classifier, size)
        self.input = replace(takes, size=size, crop_pct=takes.crop_pct if size == takes.size else crop_pct(size))
        hardware = find_hardware(device)
        self.device = torch.device(hardware.device)
        self.bf16 = precision == "bf16" or (precision == "auto" and hardware.bf16)
        self.workers = default_workers(hardware)
        self.classifier.to(self.device)

    def answers(self, source: ImageSource, batch_size: int, workers: int | None) -> Answers:
        """Probabilities (B, classes) and which images are good (B,), batch by batch."""
        workers = self.workers if workers is None else workers
        crops = crops_for(source, self.input, batch_size, workers)
        with closing(crops), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            yield from probabilities(self.classifier, crops, self.input.normalise, self.device)


def class_names(classifier: Encoder, model: str) -> list[str]:
    """The names of a classifier's outputs; of a released checkpoint, which has none, their numbers.

    Raises:
        UserError: it is an encoder without classifier.
    """
    if not classifier.num_classes:
        raise UserError(f"--model {model} has no classifier; `lomar finetune` makes one")
    told = (classifier.pretrained_cfg or {}).get("label_names")
    return list(told) if told else [str(number) for number in range(classifier.num_classes)]


def default_workers(hardware: Hardware) -> int:
    """Processes that read images for a model that only looks."""
    return min(16, hardware.cores) if hardware.device == "cuda" else hardware.cores // 2


def crops_for(source: ImageSource, takes: Input, batch_size: int, workers: int) -> Answers:
    """Central crops as evaluation looks at them."""
    fmt = PixelFormat(takes.channels, takes.pixel_type)
    return centre_crops(source, fmt, takes.size, workers, batch_size, share=takes.crop_pct)


def judged(
    classifier: nn.Module,
    labelled: Labelled,
    classes: int,
    takes: Input,
    device: torch.device,
    batch: int,
    workers: int,
) -> Judgement | None:
    """How a classifier does on labelled images; None if none can be read."""
    with closing(crops_for(labelled.source, takes, batch, workers)) as crops:
        return judge(probabilities(classifier, crops, takes.normalise, device), labelled.labels, classes)


def summary(found: Judgement, classes: list[str], worst: int = 5) -> list[str]:
    """Lines for the terminal: accuracies, and the classes that are recognised least."""
    lines = [
        f"top-1 {found.top1:.2%}  "
        + (f"top-{TOP} {found.top5:.2%}  " if len(classes) > TOP else "")
        + f"mean over classes {found.balanced:.2%}  loss {found.loss:.4f}  ({len(found.labels)} images)"
    ]
    if found.unreadable:
        lines.append(f"{found.unreadable} images could not be read and are left out")
    known = np.flatnonzero(found.counts)
    least = known[np.argsort(found.per_class[known], kind="stable")][:worst]
    mistaken = found.mistaken_for()
    lines.append("least recognised:" if len(known) > worst else "each class:")
    width = max(len(classes[i]) for i in least)
    for i in least:
        other = mistaken[i]
        taken = f"  most often taken for {classes[other]}" if other is not None else ""
        lines.append(f"  {classes[i]:<{width}}  {found.per_class[i]:7.2%} of {found.counts[i]:<6}{taken}")
    return lines


def write_judgement(
    folder: Path, pictures: Path, found: Judgement, classes: list[str], about: dict[str, Any]
) -> list[Path]:
    """Write evaluation.json and the confusion matrix's picture; returns where they are.

    Args:
        folder: of the first, made if it is not there.
        pictures: of the second.
        found: how the classifier did.
        classes: their names.
        about: what was judged, first in the file.
    """
    told = zip(classes, found.counts.tolist(), found.per_class.tolist(), found.mistaken_for(), strict=True)
    rows = [
        {
            "class": name,
            "images": images,
            "accuracy": round(share, 6) if images else None,
            "most_often_taken_for": None if other is None else classes[other],
        }
        for name, images, share, other in told
    ]
    numbers = {name: round(value, 6) for name, value in numbers_of(found).items()}
    text = json.dumps(
        {**about, "images": len(found.labels), "unreadable": found.unreadable, **numbers, "classes": rows},
        indent=1,
        ensure_ascii=False,
    )
    written = [folder / EVALUATION_FILE]
    if len(classes) <= MOST_CONFUSABLE:
        written.append(pictures / CONFUSION_FILE)
        caption = f"{len(found.labels)} images, top-1 {found.top1:.1%}. Cells in % of the true class."
        confusion_matrix(found.confusion(), classes, caption, written[1])
    # Last, since a fine-tuning that is resumed takes it as a sign that all is there.
    write_text(written[0], text + "\n")
    return written


def numbers_of(found: Judgement) -> dict[str, float]:
    """Accuracies as shares, and the loss."""
    top5 = {"top5": found.top5} if found.classes > TOP else {}
    return {"top1": found.top1, **top5, "mean_class_top1": found.balanced, "val_loss": found.loss}


def make_folder(folder: Path, held: Mapping[str, str], overwrite: bool) -> None:
    """The folder for what a command finds, before the work, so that nothing is done in vain.

    Args:
        folder: it.
        held: files of an earlier call, and what they are in words.
        overwrite: whether they may be replaced.

    Raises:
        UserError: it holds one of the files already, or cannot be written.
    """
    there = next((what for name, what in held.items() if (folder / name).exists()), None)
    if there and not overwrite:
        raise UserError(f"--out {folder} already holds {there}; --overwrite replaces it")
    if folder.is_file():
        raise UserError(f"--out {folder} is a file; it must be a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from error
