"""What training a detector is to do, settled before it begins: flags over --config over what data and hardware say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from lomar.commands.automatic import Hardware, find_hardware
from lomar.commands.course import total_steps
from lomar.commands.detect_automatic import choose_detection
from lomar.commands.runs import check_kind, check_new, check_processes, notes_on, stored
from lomar.data.coco import CocoImages, detection_data
from lomar.data.decode import PixelFormat
from lomar.data.detection import Jitter
from lomar.data.survey import survey
from lomar.detection.detector import Detector, DetectorPlan
from lomar.detection.frameworks import FRAMEWORKS, Framework
from lomar.errors import UserError
from lomar.interop.detectors import load_detector
from lomar.interop.models import SCRATCH, SCRATCH_IMAGE, SCRATCH_PATCH, input_of, pixel_type_of, scratch
from lomar.interop.weights import load
from lomar.model import Encoder
from lomar.options import DetectOptions, fields_of, flag

LAST_FILE = "detector-last.safetensors"  # beside the best one
LEAST_PATCHES = 2  # along a side: the coarser maps have half as many


@dataclass
class SettledDetection:
    """All that training a detector needs to begin or to go on.

    Args:
        options: every one with a value.
        train: images with objects.
        val: images that judge, or None.
        hardware: where to compute.
        plan: what the detector is made of.
        encoder: what it begins with; None of a detector that has begun.
        notes: what the user should know.
    """

    options: DetectOptions
    train: CocoImages
    val: CocoImages | None
    hardware: Hardware
    plan: DetectorPlan
    encoder: Encoder | None
    notes: list[str] = field(default_factory=list)

    @property
    def framework(self) -> Framework:
        """Whose ViTDet it is."""
        return FRAMEWORKS[self.options.framework]

    @property
    def fmt(self) -> PixelFormat:
        """What all pixels become."""
        return pixel_format(self.plan)

    @property
    def jitter(self) -> Jitter:
        """What becomes of an image before it is learnt from."""
        framework = self.framework
        return Jitter(
            self.options.image_size,
            self.options.jitter,
            flip_first=framework.flip_first,
            shared_offset=framework.shared_offset,
            filter_below_px=framework.least_box_px,
        )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return total_steps(self.options, len(self.train))

    def build(self) -> tuple[Detector, list[str]]:
        """The detector, its new parts drawn from torch's generator, and what was loaded into it."""
        detector = Detector(self.plan)
        detector.backbone.grad_checkpointing = self.options.grad_checkpointing
        if self.encoder is None or self.options.model.startswith(SCRATCH):
            return detector, ["all weights are new"]
        try:
            new = detector.backbone.begin_with(self.encoder)
        except ValueError as error:
            raise UserError(f"--model {self.options.model} does not fit the backbone: {error}") from None
        return detector, _told(detector, new)


def _told(detector: Detector, new: list[str]) -> list[str]:
    """Which tensors came from the encoder and which are new."""
    count = len(detector.backbone.state_dict())
    parts = sorted({name.split("attn.")[-1].split(".")[0] for name in new})
    names = f": {', '.join(parts)} of {sum('blocks.' in name for name in new)} tensors in the blocks" if new else ""
    heads = ", ".join(name for name, _ in detector.named_children() if name != "backbone")
    return [
        f"{count - len(new)} of {count} tensors of the backbone are the encoder's, {len(new)} new{names}",
        f"{heads} are new; the encoder's cls token, head and what is fitted to them are left out",
    ]


def pixel_format(plan: DetectorPlan) -> PixelFormat:
    """What a detector's pixels are read as."""
    return PixelFormat(plan.architecture["in_chans"], pixel_type_of(plan.scale))


def settle(asked: Mapping[str, Any], run: Path) -> SettledDetection:
    """A new detector.

    Args:
        asked: from flags and --config.
        run: its folder.

    Raises:
        UserError: something is missing, wrong, or does not fit the rest.
    """
    for name, what in (
        ("model", "a run, a file of its weights, or scratch:SIZE"),
        ("data", "a folder in COCO's format, or a .json beside its images"),
    ):
        if name not in asked:
            raise UserError(f"{flag(name)} is missing: {what}")
    check_new(run, asked)
    check_kind(run, DetectOptions)
    hardware = find_hardware(asked.get("device", "auto"))
    data = _data(asked)
    train, without = data[0].trainable()
    share = asked.get("max_bad_share", fields_of(DetectOptions)["max_bad_share"].default)
    from_scratch = asked["model"].startswith(SCRATCH)
    loaded = None if from_scratch else _loaded(asked["model"])
    channels = input_of(loaded).channels if loaded else None
    found = survey(train.source, max_bad_share=share, channels=channels)
    torch.manual_seed(asked.get("seed", 0))
    encoder = loaded or _fresh(asked["model"], found.format)
    takes = input_of(encoder)
    if found.format.dtype == "float32" and takes.pixel_type != "float32":
        raise UserError(f"the images are float32, but the encoder reads {takes.pixel_type}: they cannot be turned")
    long_side = int(np.median(train.sizes.max(axis=1)))
    patch = encoder.architecture["patch_size"]
    choices = choose_detection(asked, len(train), long_side, patch, encoder.embed_dim, hardware)
    values = {name: choice.value for name, choice in choices.items()} | dict(asked)
    options = DetectOptions(**values)
    _check(options, patch)
    plan = DetectorPlan(
        architecture=encoder.architecture,
        classes=train.categories,
        category_ids=train.category_ids,
        mean=takes.mean,
        std=takes.std,
        scale=takes.scale,
        framework=options.framework,
        image_size=options.image_size,
        window=options.window,
        decomposed=options.decomposed == "yes",
        cells=options.cells,
        cascade=options.cascade,
        masks=train.has_masks and not options.boxes_only,
        drop_path=options.drop_path,
        channels=options.head_channels,
        sampled=options.regions,
    )
    notes = notes_on(found, {n: c for n, c in choices.items() if n not in asked}, 1)
    notes[1:1] = _on_objects(train, without, data[1], data[2], plan.masks)
    return SettledDetection(options, train, data[1], hardware, plan, encoder, notes)


def settle_again(asked: Mapping[str, Any], run: Path) -> SettledDetection:
    """The detector in --out; options that do not change results may be given anew.

    Raises:
        UserError: there is no run, its files are not whole, its classes are others, or another result is asked for.
    """
    values = stored(run, asked, DetectOptions)
    options = DetectOptions(**values)
    if not (run / LAST_FILE).exists():  # killed before it had written anything
        return settle({name: value for name, value in values.items() if value is not None} | {"overwrite": True}, run)
    hardware = find_hardware(options.device)
    train, val, _ = _data(values)
    train, _ = train.trainable()
    plan = load_detector(run / LAST_FILE).plan
    if (plan.classes, plan.category_ids) != (train.categories, train.category_ids):
        raise UserError(
            f"the classes are not those that the run in {run} began with: it has {len(plan.classes)}, --data "
            f"{options.data} has {len(train.categories)}; bring the annotations back, or start a new run"
        )
    if plan.masks and not train.has_masks:
        raise UserError(f"the run in {run} learns masks, which --data {options.data} has not any more")
    check_processes(options.batch_size, "ddp")
    return SettledDetection(options, train, val, hardware, plan, None)


def _data(values: Mapping[str, Any]) -> tuple[CocoImages, CocoImages | None, bool]:
    data = detection_data(
        values["data"],
        values.get("annotations"),
        values.get("val"),
        values.get("val_annotations"),
        box_only=bool(values.get("boxes_only")),
    )
    return data.train, data.val, data.drawn


def _loaded(model: str) -> Encoder:
    if not Path(model).exists() and timm.is_model(model.split(".")[0]):
        raise UserError(f"--model {model} is a model of timm; detectors are made of encoders of lomar")
    return load(model)


def _fresh(model: str, fmt: PixelFormat) -> Encoder:
    """An encoder of ours with random weights."""
    made = scratch(model.removeprefix(SCRATCH), "--model", SCRATCH_IMAGE, SCRATCH_PATCH, fmt.channels)
    if not isinstance(made, Encoder):
        raise UserError(f"--model {model} is a model of timm; scratch: takes a size of lomar here")
    assert made.pretrained_cfg is not None
    made.pretrained_cfg["scale"] = fmt.scale
    return made


def _check(options: DetectOptions, patch: int) -> None:
    """Refuse options that do not fit the encoder or each other."""
    check_size(options.image_size, patch)
    low, high = options.jitter
    if low > high:
        raise UserError(f"--jitter is {low} {high}; the smaller size comes first")
    check_processes(options.batch_size, "ddp")


def check_size(image_size: int, patch: int) -> None:
    """Raises UserError: images of this side are no whole patches, or too few."""
    if image_size % patch:
        near = max(LEAST_PATCHES, round(image_size / patch)) * patch
        raise UserError(
            f"--image-size {image_size} is no multiple of the encoder's patches of {patch} px; {near} would be"
        )
    if image_size < LEAST_PATCHES * patch:
        raise UserError(
            f"--image-size {image_size} is less than {LEAST_PATCHES} patches of {patch} px, "
            f"which the pyramid needs; {LEAST_PATCHES * patch} would do"
        )


def _on_objects(train: CocoImages, without: int, val: CocoImages | None, drawn: bool, masks: bool) -> list[str]:
    """How many objects there are, and what was left out."""
    counts = train.instance_counts()
    judging = "nothing to judge by" if val is None else f"{len(val)} images to judge by" + ", a fifth, drawn" * drawn
    lines = [
        f"{counts.sum()} objects of {len(train.categories)} classes in {len(train)} images, "
        f"{'boxes and masks' if masks else 'boxes'}; {judging}"
    ]
    if without:
        lines.append(f"{without} images without an object are left out of training")
    for what, count in train.left_out.items():
        lines.append(f"warning: {count} {what}")
    return lines
