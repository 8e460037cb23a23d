"""The choices that fine-tuning makes when an option is not given, each with its reason.

The paper's own are MAE's for 1.28 million images (SPEC A.10, B.6): 100 epochs of 1024 images, or 50 of a large encoder.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lomar.commands.automatic import Choice, Hardware, compiling, loading_workers
from lomar.data.supervised import NO_POLICY
from lomar.model import SIZES

PAPER_BATCH = 1024
LONG_EPOCHS = 50  # from which the paper's augmentation pays
# Of an optimiser step, from a pretrained encoder and from random weights; docs/results.md has what was tried.
SHORT_RUN_LR, SHORT_SCRATCH_LR = 1e-3, 5e-4
SHORT_LAYER_DECAY = 0.8
EMA_STEPS = 30_000  # from which 0.9999 averages less than a third of the run
POLICY = "rand-m9-mstd0.5-inc1"


@dataclass(frozen=True)
class Start:
    """What fine-tuning begins with.

    Args:
        width, depth: of the encoder.
        scratch: whether its weights are random.
        beit: whether it is BEiT's transformer.
        eight_bit: whether the images are 8-bit gray or colour, which timm's policies are for.
    """

    width: int
    depth: int
    scratch: bool
    beit: bool
    eight_bit: bool


def choose_finetuning(
    given: Mapping[str, Any], count: int, start: Start, hw: Hardware, processes: int = 1
) -> dict[str, Choice]:
    """Name -> choice for each automatic option that is not in `given`.

    Args:
        given: options that flags and --config set.
        count: images to train on.
        start: what it begins with.
        hw: where it computes.
        processes: that share a batch.
    """
    gpu = hw.device == "cuda"
    large = start.width >= SIZES["large"][0]
    huge = start.width >= SIZES["huge"][0]
    choices: dict[str, Choice] = {}

    def settle(name: str, value: Any, reason: str) -> Any:
        if name in given:
            return given[name]
        choices[name] = Choice(value, reason)
        return value

    settle("device", hw.device, hw.name)
    settle("precision", "bf16" if hw.bf16 else "fp32", "fast here" if hw.bf16 else "this hardware is slow in bfloat16")
    batch = settle("batch_size", *_batch_size(count, gpu, processes))
    if "max_steps" in given:
        choices["epochs"] = Choice(None, "--max-steps is given")
        epochs = given["max_steps"] * batch / count
    else:
        epochs = settle("epochs", *_epochs(count, gpu, large, start.scratch))
    long = epochs >= LONG_EPOCHS
    short = f"{epochs:.3g} epochs: under {LONG_EPOCHS}, more noise only slows learning"
    share, whose = (20 / 300, "MAE's from scratch") if start.scratch else (0.05, "the paper's")
    if start.beit and not start.scratch:
        share, whose = 0.2, "BEiT's"
    settle("warmup_epochs", round(share * epochs, 3), f"{share:.3g} of the run, {whose}")
    settle("base_lr", *_base_lr(batch, large, start, long))
    settle("layer_decay", *_layer_decay(large, start.scratch, long))
    decays = start.scratch and long
    settle("weight_decay", 0.3 if decays else 0.05, "MAE's from scratch" if decays else "the paper's")
    settle("betas", (0.9, 0.95) if start.scratch else (0.9, 0.999), whose)
    drop = 0.3 if huge else 0.2 if large else 0.1
    settle("drop_path", drop if long else 0.0, "MAE's for this size" if long else short)
    if not start.eight_bit:
        settle("auto_augment", NO_POLICY, "timm's policies are for 8-bit gray or colour")
    else:
        settle("auto_augment", POLICY if long else NO_POLICY, "the paper's" if long else short)
    for name, value in (("mixup", 0.8), ("cutmix", 1.0), ("erase", 0.25)):
        settle(name, value if long else 0.0, "the paper's" if long else short)
    steps = epochs * count / batch
    averages = start.scratch and steps >= EMA_STEPS
    settle("ema", 0.9999 if averages else 0.0, "MAE's from scratch" if averages else "")
    reason = f"{hw.cores} cores" + ("" if gpu else ", which the model needs too")
    settle("workers", loading_workers(hw.cores, gpu), reason)
    settle("compile", *compiling(gpu, given.get("strategy", "ddp")))
    return choices


def _batch_size(count: int, gpu: bool, processes: int) -> tuple[int, str]:
    """A power of two, about 40 steps an epoch on a GPU, within bounds; each process mixes its images two and two."""
    least, most, steps = (32, PAPER_BATCH, 40) if gpu else (16, 32, 150)
    size = min(most, max(least, 2 ** round(math.log2(max(1, count / steps)))))
    paper = "the paper's" if gpu else "small batches learn more in a short run"
    why = paper if size == most else f"{count} images"
    unit = 2 * processes
    return (size, why) if size % unit == 0 else (max(unit, size // unit * unit), f"{why}, {processes} processes")


def _epochs(count: int, gpu: bool, large: bool, scratch: bool) -> tuple[float, str]:
    """The paper's for a million images, more for fewer; a processor gets what it can do in an hour or two."""
    if not gpu:
        seen = min(max(20 * count, 2_000), 60_000)
        epochs = round(seen / count) if seen >= 3 * count else round(seen / count, 3)
        return epochs, f"no GPU: {round(epochs * count):,} crops in all"
    if scratch:
        return 300, "MAE's from scratch"
    epochs = 50 if large else 100
    if count >= 200_000:
        return epochs, "MAE's for this size"
    more = 2 if count < 20_000 else 1.5
    return round(epochs * more), f"{more:g} times the paper's: {count} images recur more often than a million"


def _base_lr(batch: int, large: bool, start: Start, long: bool) -> tuple[float, str]:
    """The paper's rate is for batches of 1024; Adam's grows with the root of the batch, not with the batch."""
    if not long:
        a_step = SHORT_SCRATCH_LR if start.scratch else SHORT_RUN_LR
        whose = "MAE's from scratch" if start.scratch else "the paper's"
        return float(f"{a_step * 256 / batch:.3g}"), f"{a_step:.1e} a step: {whose} is for long runs"
    if start.scratch:
        paper, of_batch = 1e-4, 4096
    elif start.beit or large:
        paper, of_batch = 1e-3, PAPER_BATCH
    else:
        paper, of_batch = 5e-4, PAPER_BATCH
    rate = paper * math.sqrt(of_batch / batch)
    if rate == paper:
        return paper, "the paper's"
    return float(f"{rate:.3g}"), f"{rate * batch / 256:.1e} a step: {paper:g} is for batches of {of_batch}"


def _layer_decay(large: bool, scratch: bool, long: bool) -> tuple[float, str]:
    if scratch:
        return 1.0, "all layers are new"
    if not long:
        return SHORT_LAYER_DECAY, "the paper's 0.65 leaves the first layers little to learn in a short run"
    return (0.75, "MAE's for this size") if large else (0.65, "the paper's")
