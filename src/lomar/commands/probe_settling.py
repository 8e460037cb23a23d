"""What a probe is to do: its options, encoder and images, checks that they fit each other."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lomar.commands.automatic import Choice
from lomar.commands.frozen import FrozenEncoder, Part, check_features, check_readable, open_frozen, weights_digest
from lomar.commands.runs import asked_for, check_kind, check_new, stored
from lomar.data.labels import SPLIT_SEED, Labelled, LabelledData, held_out, labelled_data
from lomar.downstream.features import has_cls, has_cls_of_layers, layer_count
from lomar.downstream.probe import SWEEP_LRS
from lomar.errors import UserError
from lomar.launch import launched
from lomar.options import ProbeOptions, flag

HELD_SHARE = 0.1  # of the images to train on, by which the sweep's head is chosen
LAYERS = 4  # that the sweep probes, the last ones
SWEEP_STEPS = 12_500  # DINOv2's
SWEEP_EPOCHS = (10, 50)  # DINOv2's, and as many as few images need
MAE_BATCH, MAE_EPOCHS, MAE_WARMUP_SHARE = 16_384, 90, 1 / 9
MAE_BASE_LR = 0.1
MAE_STEPS_PER_EPOCH = 1_281_167 / MAE_BATCH


@dataclass
class SettledProbe:
    """All that is needed to begin or to go on.

    Args:
        options: every one with a value.
        encoder: what is probed.
        data: what trains and what judges.
        fit: the images that heads learn from.
        held: of the images to train on, those by which a head is chosen; none of MAE's probe.
        notes: what the user should know.
    """

    options: ProbeOptions
    encoder: FrozenEncoder
    data: LabelledData
    fit: Labelled
    held: Labelled | None
    notes: list[str] = field(default_factory=list)

    def parts(self) -> dict[str, Part]:
        """The images by what they are for, as messages name them: "val", "fit" and, of the sweep, "held"."""
        options, where = self.options, f"--data {self.options.data}"
        found = {"val": Part(self.data.val, "val images", f"--val {options.val}" if options.val else where)}
        if self.held is not None:
            found["held"] = Part(self.held, "images held out of train", where)
        return found | {"fit": Part(self.fit, "train images", where)}

    def fingerprint(self) -> str:
        """Changes with the encoder's weights, the lists of images and their labels."""
        digest = hashlib.blake2b(weights_digest(self.encoder.model).encode(), digest_size=8)
        for part in (self.data.train, self.data.val):
            digest.update(part.source.fingerprint().encode())
            digest.update(part.labels.tobytes())
        return digest.hexdigest()


def asked_for_probe(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for; paths are made absolute, since the probe may be resumed from another folder.

    Raises:
        UserError: --out is missing, or torchrun started several processes.
    """
    if "out" not in given:
        raise UserError("--out is missing: the folder in which to make the probe")
    if launched().count > 1:
        raise UserError("a probe trains in one process; start it without torchrun")
    asked = asked_for(given, ProbeOptions, ("data", "val", "model"))
    return {name: value for name, value in asked.items() if value != "auto"}


def settle(asked: Mapping[str, Any], folder: Path) -> SettledProbe:
    """A new probe: what was asked for, then what the protocol, the encoder and the images suggest.

    Raises:
        UserError: something is missing, wrong, in the way, or does not fit the rest.
    """
    for name in ("model", "data"):
        if name not in asked:
            raise UserError(f"--{name} is missing; see lomar probe --help")
    check_new(folder, asked)
    check_kind(folder, ProbeOptions)
    if asked.get("protocol") == "mae":
        _check_single(asked)
    data = labelled_data(asked["data"], SPLIT_SEED, asked.get("val"))
    encoder = _encoder(asked)
    check_features(encoder.model, asked.get("features", ()), asked.get("layers"))
    fit, held = _split(asked.get("protocol", "fast"), data, asked.get("seed", 0), f"--data {asked['data']}")
    choices = choose(asked, encoder.model, len(fit))
    values = {name: choice.value for name, choice in choices.items()} | dict(asked)
    settled_here = {"image_size": encoder.input.size, "precision": encoder.precision}
    options = ProbeOptions(**values | settled_here)
    if options.protocol == "mae" and options.batch_size < 2:
        raise UserError("--batch-size 1: the batch norm of --protocol mae needs two images at least")
    if options.warmup_epochs > options.epochs:
        raise UserError(f"--warmup-epochs {options.warmup_epochs:g} is more than --epochs {options.epochs:g}")
    check_features(encoder.model, options.features, options.layers)
    settled = SettledProbe(options, encoder, data, fit, held, _notes(options, encoder, data, fit, held, choices))
    _check_readable(settled)
    return settled


def settle_again(asked: Mapping[str, Any], folder: Path) -> SettledProbe:
    """What was begun in --out; options that do not change results may be given anew.

    Raises:
        UserError: nothing was begun, or another result is asked for.
    """
    if "image_size" in asked:
        asked = dict(asked) | {"image_size": _both(asked["image_size"])}
    options = ProbeOptions(**stored(folder, asked, ProbeOptions))
    data = labelled_data(options.data, SPLIT_SEED, options.val)
    encoder = _encoder({name: getattr(options, name) for name in _ENCODER_OPTIONS})
    fit, held = _split(options.protocol, data, options.seed, f"--data {options.data}")
    settled = SettledProbe(options, encoder, data, fit, held)
    _check_readable(settled)
    return settled


def _check_readable(settled: SettledProbe) -> None:
    for part in settled.parts().values():
        check_readable(part.labelled.source, settled.encoder, part.where, part.name)


_ENCODER_OPTIONS = ("model", "image_size", "patch_size", "seed", "device", "precision", "workers")


def _encoder(asked: Mapping[str, Any]) -> FrozenEncoder:
    return open_frozen(
        asked["model"],
        asked.get("image_size"),
        patch_size=asked.get("patch_size"),
        seed=asked.get("seed", 0),
        device=asked.get("device", "auto"),
        precision=asked.get("precision", "auto"),
        workers=asked.get("workers"),
    )


def _both(image_size: tuple[int, ...]) -> tuple[int, ...]:
    return image_size * 2 if len(image_size) == 1 else image_size


def _check_single(asked: Mapping[str, Any]) -> None:
    for name in ("features", "layers", "base_lrs"):
        if len(asked.get(name) or ()) > 1:
            raise UserError(f"{flag(name)}: --protocol mae trains one classifier and takes one value; fast takes more")


def _split(protocol: str, data: LabelledData, seed: int, where: str) -> tuple[Labelled, Labelled | None]:
    """What heads learn from, and what chooses among them."""
    if protocol == "mae":
        return data.train, None
    fit, held = held_out(data.train, HELD_SHARE, seed, "probe")
    if not len(held):
        raise UserError(f"{where}: no class has two images to train on, so that none can be held out to choose a head")
    return fit, held


def choose(asked: Mapping[str, Any], model: nn.Module, count: int) -> dict[str, Choice]:
    """Name -> choice for each automatic option that is not in `asked`.

    Args:
        asked: what was asked for.
        model: the encoder.
        count: images that heads learn from.
    """
    layers = layer_count(model)
    if asked.get("protocol") == "mae":
        batch = Choice(*_mae_batch(count))
        size = asked.get("batch_size", batch.value)
        epochs = asked.get("epochs", MAE_EPOCHS)
        choices = {
            "features": Choice(*((("cls",), "MAE's") if has_cls(model) else (("pooled",), "it has no cls token"))),
            "layers": Choice((layers,), "the last"),
            "batch_size": batch,
            "base_lrs": Choice(*_mae_base_lr(size)),
            "epochs": Choice(MAE_EPOCHS, "MAE's"),
            "warmup_epochs": Choice(round(epochs * MAE_WARMUP_SHARE, 6), "a ninth, as MAE's 10 of 90"),
        }
    else:
        every = has_cls_of_layers(model)
        features = ("pooled", "cls+mean") if every else ("pooled",)
        size = asked.get("batch_size", _sweep_batch(count))
        epochs = round(min(max(SWEEP_STEPS * size / count, SWEEP_EPOCHS[0]), SWEEP_EPOCHS[1]), 3)
        choices = {
            "features": Choice(features, "" if every else "its layers have no cls token"),
            "layers": Choice(tuple(range(max(1, layers - LAYERS + 1), layers + 1)), f"the last of {layers}"),
            "batch_size": Choice(_sweep_batch(count), f"{count} images"),
            "base_lrs": Choice(SWEEP_LRS, "DINOv2's"),
            "epochs": Choice(epochs, f"{round(epochs * count / size)} steps"),
            "warmup_epochs": Choice(0.0, ""),
        }
    return {name: choice for name, choice in choices.items() if asked.get(name) is None}


def _sweep_batch(count: int) -> int:
    """A power of two, about 64 steps an epoch, up to DINOv2's 1024."""
    return min(1024, max(32, 2 ** round(math.log2(max(1, count / 64)))))


def _mae_batch(count: int) -> tuple[int, str]:
    """A power of two that leaves an epoch about as many steps as ImageNet has with MAE's batch."""
    size = min(MAE_BATCH, max(32, 2 ** round(math.log2(max(1, count / MAE_STEPS_PER_EPOCH)))))
    return size, "MAE's" if size == MAE_BATCH else f"{count / size:.0f} steps an epoch; ImageNet has 78 with 16384"


def _mae_base_lr(batch_size: int) -> tuple[tuple[float], str]:
    """The base rate that makes a step's rate MAE's, which its batch of 16384 makes of 0.1."""
    if batch_size == MAE_BATCH:
        return (MAE_BASE_LR,), "MAE's"
    reason = "6.4 a step, as MAE's: LARS moves weights by a share of their norm, whatever the batch"
    return (float(f"{MAE_BASE_LR * MAE_BATCH / batch_size:.4g}"),), reason


def _notes(
    options: ProbeOptions,
    encoder: FrozenEncoder,
    data: LabelledData,
    fit: Labelled,
    held: Labelled | None,
    choices: Mapping[str, Choice],
) -> list[str]:
    """What the user should know before it starts."""
    height, width = encoder.input.size
    chosen_by = f", {len(held)} of the same choose a head" if held else ""
    judged = f", {len(data.val)} judge it" + (" (a fifth, drawn from all)" if data.drawn else "")
    smallest = int(np.bincount(fit.labels).min())
    notes = [
        f"{options.model}: {type(encoder.model).__name__} on images of {height} x {width} px, "
        f"{encoder.precision} on {encoder.hardware.name}",
        f"{len(data.classes)} classes; {len(fit)} images to learn from, {smallest} of the rarest{chosen_by}{judged}",
        "chosen for you (give the option to decide yourself):",
    ]
    for name, choice in choices.items():
        value = " ".join(map(str, choice.value)) if isinstance(choice.value, tuple) else str(choice.value)
        value = "thirteen" if choice.value == SWEEP_LRS else value
        notes += [f"  {flag(name):<16} {value:<16} {choice.reason}"] if choice.reason else []
    return notes
