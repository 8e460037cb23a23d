"""What a method that compares views is to be: what follows from the other options, and what does not fit them."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch

from lomar.commands.automatic import Choice
from lomar.data.loader import SampleKey
from lomar.errors import UserError
from lomar.launch import launched
from lomar.methods.two_view import LARGE_CROPS, TwoView
from lomar.model.encoder import SIZES, size_of
from lomar.training.memory import saved_bytes

LOCAL_SHARE = 96 / 224  # a small crop's side over a large one's
# For a base encoder, by objective: width within a head, and what it gives.
HEADS = {"dino": (2048, 65_536), "mocov3": (4096, 256)}
BASE_MOMENTUM = {"dino": 0.996, "mocov3": 0.99}
# A teacher that lags by more than a tenth of the run holds it up: 1 - momentum is at least this many over the steps.
FOLLOWED = 10
SHORT_FOR_DINO = 1000  # steps: between the 450 that showed no rise here and the 1,480 that did (docs/results.md)
# Of the run: learning rate, DINO's 10 of 100 epochs and MoCo v3's 40 of 300; DINO's temperature, 30 of 300; frozen, 1
# of 100.
WARMUP_SHARE = {"dino": (0.1, "DINO's 10 of 100 epochs"), "mocov3": (40 / 300, "MoCo v3's 40 of 300 epochs")}
WARMING_SHARE, FROZEN_SHARE = 0.1, 0.01


def fitted_sizes(objective: str, values: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Choice]:
    """Heads and small crops for an encoder and crops of one size, for options that are not among `wanted`.

    Args:
        objective: one of `lomar.methods.recipes.OBJECTIVES`.
        values: model, image_size and patch_size by name.
        wanted: names of those that were given.
    """
    width, _, _ = size_of(values["model"])
    patch, base_width = values["patch_size"], SIZES["base"][0]
    within, given = HEADS[objective]
    choices = {"head_width": Choice(within, "the paper's"), "head_outputs": Choice(given, "the paper's")}
    if width < SIZES["small"][0]:
        reason = f"for an encoder {width} wide; {within} and {given} are for one of {base_width}"
        outputs = max(64, given * width // base_width // 8) if objective == "dino" else max(64, given // 2)
        choices = {
            "head_width": Choice(max(64, within * width // base_width), reason),
            "head_outputs": Choice(outputs, "likewise"),
        }
    if objective == "dino":
        local_px = max(1, round(values["image_size"] * LOCAL_SHARE / patch)) * patch
        choices["local_size"] = Choice(local_px, f"96 of 224 px, in patches of {patch}")
    return {name: choice for name, choice in choices.items() if name not in wanted}


def fitted_views(objective: str, values: Mapping[str, Any], wanted: Collection[str], count: int) -> dict[str, Choice]:
    """What a recipe says of one size and length, for those that were asked for; `wanted` options stay as they are.

    Args:
        objective: one of `lomar.methods.recipes.OBJECTIVES`.
        values: of the options that are known by now.
        wanted: names of those that were given.
        count: images.
    """
    choices = fitted_sizes(objective, values, wanted)
    epochs, steps = _length(values, count)
    base = BASE_MOMENTUM[objective]
    momentum = round(min(base, max(0.5, 1 - FOLLOWED / steps)), 4)
    reason = (
        "the paper's"
        if momentum == base
        else f"{steps:.0f} step{'s' * (steps >= 1.5)}; the paper's {base} is for long runs"
    )
    choices["momentum"] = Choice(momentum, reason)
    share, whose = WARMUP_SHARE[objective]
    choices["warmup_epochs"] = Choice(round(share * epochs, 6), whose)
    if objective == "dino":
        choices["teacher_temperature_epochs"] = Choice(round(WARMING_SHARE * epochs, 4), "a tenth of the run")
        frozen = min(1.0, FROZEN_SHARE * epochs)
        choices["freeze_last_layer"] = Choice(round(frozen, 4), "DINO's" if frozen == 1 else "a hundredth of the run")
    return {name: choice for name, choice in choices.items() if name not in wanted}


def told_of_length(objective: str, values: Mapping[str, Any], count: int) -> list[str]:
    """Lines for the user where a run is too short for its method.

    Args:
        objective: "" for masked reconstruction, else one of `lomar.methods.recipes.OBJECTIVES`.
        values: of the options.
        count: images.
    """
    _, steps = _length(values, count)
    if objective != "dino" or steps >= SHORT_FOR_DINO:
        return []
    return [
        f"{steps:.0f} steps are few for dino: runs of 450 showed no rise over random weights, one of 1,480 did "
        "(docs/results.md); a longer one shows more"
    ]


def _length(values: Mapping[str, Any], count: int) -> tuple[float, float]:
    """Passes over the images, and steps."""
    epochs = values["epochs"] or values["max_steps"] * values["batch_size"] / count
    return epochs, max(1.0, epochs * count / values["batch_size"])


def check_views(objective: str, values: Mapping[str, Any]) -> None:
    """Refuse options that do not go together, naming both.

    Raises:
        UserError: they do not.
    """
    patch, count = values["patch_size"], launched().count
    if objective == "dino":
        side = values["local_size"]
        if values["local_crops"] and side % patch:
            nearest = max(patch, round(side / patch) * patch)
            raise UserError(f"--local-size {side} is not a multiple of --patch-size {patch}; {nearest} would be")
        low, high = values["local_scale"]
        if low > high:
            raise UserError(f"--local-scale is {low} {high}; the smaller share comes first")
    if values.get("strategy") == "fsdp":
        raise UserError("--strategy is fsdp, which methods with a teacher do not go with; it can be ddp")
    if objective == "mocov3":
        batch = values["batch_size"]
        if batch < 2 * count:
            raise UserError(
                f"--batch-size is {batch}; mocov3 compares images with each other: {2 * count} is the least"
            )
        if batch % count:
            near = max(2, round(batch / count)) * count
            raise UserError(
                f"--batch-size {batch} gives {count} processes unlike shares, which mocov3 cannot have; "
                f"{near} would be alike"
            )


def kept_by_views(method: TwoView, options: Any, images: int) -> int:
    """Bytes that the backward pass keeps for so many images.

    Args:
        method: with fresh weights.
        options: of the run.
        images: that go through the encoder at a time.
    """
    drawn = method.draw(options.seed)(SampleKey(0, 0, 0, 0))
    inputs = {name: each.expand(images, *each.shape) for name, each in drawn.items()}
    side = options.image_size
    crops = torch.zeros((images, LARGE_CROPS, options.channels, side, side), dtype=torch.uint8)
    if method.whole_share:
        rows = method.seen(crops, inputs["distortions"])
        paths = inputs["paths"].flatten(0, 1) if "paths" in inputs else None
        return saved_bytes(partial(method.student.features, rows, paths))
    if options.local_crops:
        shape = (images, options.local_crops, options.channels, options.local_size, options.local_size)
        inputs["local_crops"] = torch.zeros(shape, dtype=torch.uint8)
    return saved_bytes(partial(method, crops, **inputs))
