"""The choices that training a detector makes when an option is not given, each with its reason.

The paper's own are ViTDet's for the 117,266 images of COCO that have objects: 100 epochs of 64 images (SPEC E).
"""

import math
from collections.abc import Mapping
from typing import Any

from lomar.commands.automatic import Choice, Hardware, loading_workers
from lomar.detection.backbone import WINDOW
from lomar.model import SIZES

PAPER_BATCH = 64
PAPER_SIDE = 1024
PAPER_LR = 1e-4
PAPER_EPOCHS = 100
LONG_STEPS = 50_000  # from which the paper's regularisation pays
ENLARGED = 1.6  # COCO's 640 px to the paper's 1024
UNIT = 4  # patches: so that the coarser maps of the pyramid fit the image


def choose_detection(
    given: Mapping[str, Any], count: int, long_side_px: int, patch: int, width: int, hw: Hardware
) -> dict[str, Choice]:
    """Name -> choice for each automatic option that is not in `given`.

    Args:
        given: options that flags and --config set.
        count: images to train on.
        long_side_px: median longer side of the images.
        patch: side of a patch in pixels.
        width: of the encoder.
        hw: where it computes.
    """
    gpu = hw.device == "cuda"
    large, huge = width >= SIZES["large"][0], width >= SIZES["huge"][0]
    choices: dict[str, Choice] = {}

    def settle(name: str, value: Any, reason: str) -> Any:
        if name in given:
            return given[name]
        choices[name] = Choice(value, reason)
        return value

    settle("device", hw.device, hw.name)
    settle("precision", "bf16" if hw.bf16 else "fp32", "fast here" if hw.bf16 else "this hardware is slow in bfloat16")
    settle("image_size", *_image_size(long_side_px, patch, gpu))
    for name, paper, small in (("head_channels", 256, 64), ("regions", 512, 128)):
        settle(name, paper if gpu else small, "the paper's" if gpu else f"no GPU: the paper's {paper} would take hours")
    batch = settle("batch_size", *_batch_size(count, gpu))
    if "max_steps" in given:
        choices["epochs"] = Choice(None, "--max-steps is given")
        steps = given["max_steps"]
    else:
        epochs = settle("epochs", *_epochs(count, gpu))
        steps = max(1, round(epochs * count / batch))
    long = steps >= LONG_STEPS
    short = f"{steps:,} steps: a short run"
    settle("warmup_steps", min(250, math.ceil(steps / 10)), "the paper's" if steps >= 2500 else short)
    settle("lr", PAPER_LR, "the paper's")
    decay = 0.9 if huge else 0.8 if large else 0.7
    settle("layer_decay", decay, "ViTDet's for this size")
    drop = 0.5 if huge else 0.4 if large else 0.1
    settle("drop_path", drop if long else 0.0, "ViTDet's for this size" if long else short)
    settle("clip_grad", 0.0 if long else 1.0, "the paper's" if long else f"{short}, which a few large ones would upset")
    settle(
        "workers", loading_workers(hw.cores, gpu), f"{hw.cores} cores" + ("" if gpu else ", needed for the model too")
    )
    return choices


def _image_size(long_side_px: int, patch: int, gpu: bool) -> tuple[int, str]:
    """The longer side, enlarged as COCO's is, at most the paper's; a processor gets what it can bear."""
    if not gpu:
        unit = WINDOW * patch  # whole windows: what they lack is worked out too
        return max(1, min(256, long_side_px) // unit) * unit, "no GPU; a whole number of windows"
    unit = UNIT * patch
    side = max(1, min(PAPER_SIDE, round(ENLARGED * long_side_px)) // unit) * unit
    if side == PAPER_SIDE // unit * unit:
        return side, "the paper's"
    return side, f"the images' longer side is {long_side_px} px, enlarged as COCO's are"


def _batch_size(count: int, gpu: bool) -> tuple[int, str]:
    """The paper's for as many images as it has, less for fewer."""
    if not gpu:
        return 4, "no GPU"
    size = PAPER_BATCH if count >= 50_000 else 32 if count >= 10_000 else 16
    return size, "the paper's" if size == PAPER_BATCH else f"{count} images"


def _epochs(count: int, gpu: bool) -> tuple[float, str]:
    """The paper's passes, more over few images; a processor gets what it can do in an hour or two."""
    if not gpu:
        seen = max(4_000, count)
        return round(seen / count, 2), f"no GPU: {seen:,} images in all"
    epochs = max(PAPER_EPOCHS, math.ceil(100_000 / count))
    return epochs, "the paper's" if epochs == PAPER_EPOCHS else f"{count} images recur more often than COCO's"
