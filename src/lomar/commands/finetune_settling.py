"""What a fine-tuning is to do, settled before it begins: flags over --config over what data and hardware suggest."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from lomar.commands.automatic import Choice, Hardware, check_compile, find_hardware, image_and_patch
from lomar.commands.finetune_automatic import Start, choose_finetuning
from lomar.commands.runs import (
    check_kind,
    check_new,
    check_processes,
    fitting_micro_batch,
    kept_by_a_block,
    notes_on,
    stored,
)
from lomar.commands.settling import check_per_channel
from lomar.data.decode import PixelFormat
from lomar.data.labels import SPLIT_SEED, LabelledData, labelled_data
from lomar.data.supervised import NO_POLICY, Augmentation, policy_transform
from lomar.data.survey import Survey, channel_statistics, survey
from lomar.downstream.classify import Classification, classifier_of, freeze
from lomar.errors import UserError
from lomar.interop.models import SCRATCH, Input, check_size, input_of, scratch, size_given
from lomar.interop.weights import describe, load
from lomar.launch import launched
from lomar.model import Encoder
from lomar.model.encoder import crop_pct
from lomar.options import FinetuneOptions, fields_of, flag
from lomar.training.memory import saved_bytes

LAST_FILE = "classifier-last.safetensors"  # beside the best one
EMA_LEFT = 0.05  # share of the first weights in the average, worth a warning
IMBALANCE = 10  # times more images in the largest class than in the smallest, worth a warning


@dataclass
class SettledFinetuning:
    """All that a fine-tuning needs to begin or to go on.

    Args:
        options: every one with a value.
        data: what trains and what judges.
        hardware: where to compute.
        encoder: what it begins with.
        notes: what the user should know.
    """

    options: FinetuneOptions
    data: LabelledData
    hardware: Hardware
    encoder: Encoder
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images, in pixels."""
        return size_given(self.options.image_size)

    @property
    def fmt(self) -> PixelFormat:
        """What all pixels become."""
        return PixelFormat(self.options.channels, self.options.pixel_type)

    @property
    def input(self) -> Input:
        """What the classifier takes."""
        o, size = self.options, self.size
        return Input(o.channels, self.fmt.scale, o.mean, o.std, size, crop_pct(size))

    @property
    def augmentation(self) -> Augmentation:
        """What becomes of an image before it is learnt from."""
        o = self.options
        return Augmentation(
            size_px=self.size,
            crop_scale=o.crop_scale,
            policy=o.auto_augment,
            mean=o.mean,
            color_jitter=o.color_jitter,
            erase=o.erase,
            mixup=o.mixup,
            cutmix=o.cutmix,
            smoothing=o.smoothing,
            classes=len(self.data.classes),
        )

    def build(self) -> tuple[Encoder, list[str]]:
        """The classifier, its new parts drawn from torch's generator, and what was done to the encoder."""
        o, classes = self.options, self.data.classes
        classifier, notes = classifier_of(
            self.encoder,
            classes,
            size=self.size,
            pool=o.pool,
            drop_path=0.0 if o.head_only else o.drop_path,
            pretrained=not o.model.startswith(SCRATCH),
        )
        freeze(classifier, o.freeze_layers, o.head_only)
        classifier.set_grad_checkpointing(o.grad_checkpointing)
        return describe(classifier, o.mean, o.std, self.fmt.scale, classes), notes


def settle(asked: Mapping[str, Any], run: Path) -> SettledFinetuning:
    """A new fine-tuning.

    Args:
        asked: from flags and --config.
        run: its folder.

    Raises:
        UserError: something is missing, wrong, or does not fit the rest.
    """
    for name, what in (
        ("model", "a run, a file of its weights, or scratch:SIZE"),
        ("data", "a folder with train/ and val/ of class folders, class folders alone, or a .csv of path,label"),
    ):
        if name not in asked:
            raise UserError(f"{flag(name)} is missing: {what}")
    check_new(run, asked)
    check_kind(run, FinetuneOptions)
    model = Path(asked["model"]).resolve()
    if run.resolve() in (model, model.parent):
        raise UserError(f"--out {run} is the folder of --model; give another folder")
    hardware = find_hardware(asked.get("device", "auto"))
    check_compile(asked, hardware)
    data = labelled_data(asked["data"], SPLIT_SEED, asked.get("val"))
    from_scratch = asked["model"].startswith(SCRATCH)
    loaded = None if from_scratch else _loaded(asked["model"])
    for name, is_there in (("channels", "in_chans"), ("patch_size", "patch_size")):
        if loaded and asked.get(name, loaded.architecture[is_there]) != loaded.architecture[is_there]:
            has = f"it has {flag(name)} {loaded.architecture[is_there]}"
            raise UserError(f"{flag(name)} is {asked[name]}, which {asked['model']} cannot have: {has}")
    channels = input_of(loaded).channels if loaded else asked.get("channels")
    share = asked.get("max_bad_share", fields_of(FinetuneOptions)["max_bad_share"].default)
    found = survey(data.train.source, max_bad_share=share, channels=channels)
    survey(data.val.source, max_bad_share=share, flag="--val" if asked.get("val") else "--data", channels=channels)
    takes = _takes(asked, found, data, loaded, hardware)
    values = {name: choice.value for name, choice in takes.items()} | dict(asked)
    torch.manual_seed(values.get("seed", 0))
    encoder = loaded or _fresh(values)
    start = Start(
        width=encoder.embed_dim,
        depth=len(encoder.blocks),
        scratch=from_scratch,
        beit=not encoder.architecture["key_bias"],
        eight_bit=values["pixel_type"] == "uint8" and values["channels"] in (1, 3),
        by_token=encoder.global_pool == "token",
    )
    choices = takes | choose_finetuning(values, len(data.train), start, hardware, launched().count)
    values = {name: choice.value for name, choice in choices.items()} | values
    settled = SettledFinetuning(FinetuneOptions(**values | {"micro_batch": 1}), data, hardware, encoder)
    _check(settled, found)
    if "micro_batch" not in asked:
        choices["micro_batch"] = _micro_batch(settled)
        values["micro_batch"] = choices["micro_batch"].value
    settled.options = FinetuneOptions(**values)
    _check_mixing(settled)
    notes = notes_on(found, {n: c for n, c in choices.items() if n not in asked}, min(settled.size))
    course = [*_on_average(settled.options, len(data.train)), *_on_repeats(settled.options, len(data.train))]
    settled.notes = [notes[0], *_on_classes(data), *notes[1:], *course]
    return settled


def settle_again(asked: Mapping[str, Any], run: Path) -> SettledFinetuning:
    """The fine-tuning in --out; options that do not change results may be given anew.

    Raises:
        UserError: there is no run, its files are not whole, its images or classes are others, or another result is
            asked for.
    """
    values = stored(run, asked, FinetuneOptions)
    options = FinetuneOptions(**values)
    hardware = find_hardware(options.device)
    check_compile(values, hardware)
    data = labelled_data(options.data, SPLIT_SEED, options.val)
    if (run / LAST_FILE).exists():
        encoder = load(run / LAST_FILE)
        began_with = list((encoder.pretrained_cfg or {}).get("label_names", ()))
        if began_with != data.classes:
            raise UserError(
                f"the classes are not those that the run in {run} began with: it has {len(began_with)}, --data "
                f"{options.data} has {len(data.classes)}; bring the folders back, or start a new run"
            )
    else:  # killed before it had written anything
        torch.manual_seed(options.seed)
        from_scratch = options.model.startswith(SCRATCH)
        encoder = _fresh(values) if from_scratch else _loaded(options.model)
    settled = SettledFinetuning(options, data, hardware, encoder)
    check_per_channel(values, "mean", "std")
    _check_sizes(settled)
    _check_mixing(settled)
    return settled


def _loaded(model: str) -> Encoder:
    if not Path(model).exists() and timm.is_model(model.split(".")[0]):
        raise UserError(
            f"--model {model} is a model of timm; fine-tuning is for encoders of lomar (`lomar probe` and `lomar knn` "
            "judge timm's as well)"
        )
    return load(model)


def _fresh(values: Mapping[str, Any]) -> Encoder:
    """An encoder of ours with random weights, for the images at hand."""
    height, width = size_given(values["image_size"])
    model = scratch(values["model"].removeprefix(SCRATCH), "--model", height, values["patch_size"], values["channels"])
    if not isinstance(model, Encoder):
        raise UserError(f"--model {values['model']} is a model of timm; scratch: takes a size of lomar here")
    check_size(model, (height, width))
    return model


def _takes(
    asked: Mapping[str, Any], found: Survey, data: LabelledData, loaded: Encoder | None, hardware: Hardware
) -> dict[str, Choice]:
    """What the classifier takes, but for what is asked for: the encoder's, or what the images suggest for a new one."""
    if loaded:
        has = input_of(loaded)
        square = has.size[:1] if has.size[0] == has.size[1] else has.size
        choices = {
            "image_size": Choice(square, "the encoder's"),
            "patch_size": Choice(loaded.architecture["patch_size"], ""),
            "channels": Choice(has.channels, ""),
            "pixel_type": Choice(has.pixel_type, ""),
            "mean": Choice(has.mean, ""),
            "std": Choice(has.std, ""),
        }
        return {name: choice for name, choice in choices.items() if name not in asked}
    sides = {"image_size": min(asked["image_size"])} if "image_size" in asked else {}
    sides |= {"patch_size": asked["patch_size"]} if "patch_size" in asked else {}
    gpu = hardware.device == "cuda"
    (image, why_image), (patch, why_patch) = image_and_patch(sides, found.median_short_side_px, gpu)
    choices = {
        "image_size": Choice((image,), why_image),
        "patch_size": Choice(patch, why_patch),
        "channels": Choice(found.format.channels, f"the images have {found.format.channels}"),
        "pixel_type": Choice(found.format.dtype, "the images'"),
    }
    choices = {name: choice for name, choice in choices.items() if name not in asked}
    values = {name: choice.value for name, choice in choices.items()} | dict(asked)
    if "mean" not in values or "std" not in values:
        mean, std, why = _statistics(values, data)
        choices |= {n: Choice(v, why) for n, v in (("mean", mean), ("std", std)) if n not in asked}
    return choices


def _statistics(values: Mapping[str, Any], data: LabelledData) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    fmt = PixelFormat(values["channels"], values["pixel_type"])
    if fmt == PixelFormat(3, "uint8"):
        default = input_of(scratch("tiny", "--model"))
        return default.mean, default.std, "ImageNet's: 8-bit colour"
    mean, std = channel_statistics(data.train.source, fmt, size_px=min(values["image_size"]))
    return tuple(round(m, 6) for m in mean), tuple(round(s, 6) for s in std), "estimated from the images"


def _check(settled: SettledFinetuning, found: Survey) -> None:
    """Refuse options that do not fit the data, the encoder or each other."""
    options = settled.options
    if found.format.dtype == "float32" and options.pixel_type != "float32":
        raise UserError(f"the images are float32, but the encoder reads {options.pixel_type}: they cannot be turned")
    check_per_channel({n: getattr(options, n) for n in ("channels", "mean", "std")}, "mean", "std")
    _check_sizes(settled)
    if options.auto_augment != NO_POLICY:
        if options.pixel_type != "uint8" or options.channels not in (1, 3):
            raise UserError(
                f"--auto-augment {options.auto_augment} is for 8-bit gray or colour; these images are "
                f"{options.channels} channels of {options.pixel_type}: give none"
            )
        try:
            policy_transform(options.auto_augment, settled.size, (0.5, 0.5, 0.5))
        except ValueError as error:
            raise UserError(f"--auto-augment: {error}; it can be rand-m9-mstd0.5-inc1, augmix-m3, v0, none") from None


def _check_sizes(settled: SettledFinetuning) -> None:
    options, depth = settled.options, len(settled.encoder.blocks)
    check_size(settled.encoder, settled.size)
    low, high = options.crop_scale
    if low > high:
        raise UserError(f"--crop-scale is {low} {high}; the smaller share comes first")
    if options.freeze_layers > depth:
        raise UserError(f"--freeze-layers is {options.freeze_layers}; the encoder has {depth}")
    check_processes(options.batch_size, options.strategy)


def _check_mixing(settled: SettledFinetuning) -> None:
    """Images are mixed two and two, within a process's share and a micro-batch."""
    options = settled.options
    if not settled.augmentation.mixes:
        return
    unit = 2 * launched().count
    if options.batch_size % unit:
        better = max(unit, round(options.batch_size / unit) * unit)
        raise UserError(
            f"--batch-size {options.batch_size} cannot be mixed two and two in {launched().count} process"
            f"{'es' * (launched().count > 1)}; {better} can, or give --mixup 0 --cutmix 0"
        )
    if options.micro_batch % 2:
        raise UserError(f"--micro-batch {options.micro_batch} is odd; images are mixed two and two")


def _micro_batch(settled: SettledFinetuning) -> Choice:
    """Measured; even, so that images can be mixed two and two."""
    options = settled.options
    classifier, _ = settled.build()
    method = Classification(classifier)
    image = torch.zeros(options.channels, *settled.size)
    target = torch.zeros(len(settled.data.classes))

    def kept(images: int) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            return saved_bytes(partial(method, image.expand(images, -1, -1, -1), target.expand(images, -1)))

    weights = sum(p.numel() for p in method.parameters() if p.requires_grad)
    a_block = kept_by_a_block(kept, classifier.set_grad_checkpointing, len(classifier.blocks))
    again = a_block if options.grad_checkpointing else None
    choice = fitting_micro_batch(kept, weights, options.batch_size, settled.hardware, again)
    return replace(choice, value=min(options.batch_size, choice.value + choice.value % 2))


def _on_average(options: FinetuneOptions, count: int) -> list[str]:
    """A warning where the moving average is still at the beginning when the run ends."""
    steps = options.max_steps or (options.epochs or 0) * count / options.batch_size
    left = options.ema**steps if options.ema else 0.0
    if left < EMA_LEFT:
        return []
    return [
        f"warning: --ema {options.ema:g} leaves {left:.0%} of the first weights in the average after {steps:.0f} "
        f"steps; {1 - 3 / max(steps, 4):.3g} or none would fit"
    ]


def _on_repeats(options: FinetuneOptions, count: int) -> list[str]:
    """A warning where images come so often that others never do."""
    epochs = options.epochs or (options.max_steps or 0) * options.batch_size / count
    if options.repeats == 1 or epochs >= options.repeats:
        return []
    aside = 1 - epochs / options.repeats
    return [f"warning: --repeats {options.repeats} in {epochs:.3g} epochs leaves {aside:.0%} of the images aside"]


def _on_classes(data: LabelledData) -> list[str]:
    """How the images are spread over the classes."""
    counts = np.bincount(data.train.labels, minlength=len(data.classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    judging = f"{len(data.val)} to judge by" + (", a fifth of each class, drawn" if data.drawn else "")
    each = f"{counts[least]} to {counts[most]}" if counts[least] < counts[most] else f"{counts[most]}"
    lines = [f"{len(data.classes)} classes, {each} images each; {judging}"]
    if counts[most] >= IMBALANCE * counts[least]:
        lines.append(
            f"warning: {data.classes[most]!r} has {counts[most] / counts[least]:.0f} times the images of "
            f"{data.classes[least]!r} ({counts[most]} and {counts[least]}): look at the accuracy of each class"
        )
    absent = [data.classes[i] for i in np.flatnonzero(np.bincount(data.val.labels, minlength=len(data.classes)) == 0)]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        lines.append(f"warning: no image judges {', '.join(map(repr, absent[:3]))}{more}")
    return lines
