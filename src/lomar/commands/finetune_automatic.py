"""The choices that fine-tuning makes when an option is not given, each with its reason.

Two recipes for 1.28 million images are scaled to the images at hand. The paper's is MAE's (SPEC A.10, B.6): 100 epochs
of 1024 images, or 50 of a large encoder. DeiT's (SPEC D.2) is what DINO and MoCo v3 fine-tune with.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lomar.commands.automatic import Choice, Hardware, compiling, loading_workers
from lomar.data.supervised import NO_POLICY
from lomar.model import SIZES

PAPER_BATCH = 1024
LONG_EPOCHS = 50  # from which the augmentation of the recipes pays
# Of an optimiser step, with a rate for each layer and with one for all; docs/results.md has what was tried.
SHORT_RUN_LR, SHORT_SHARED_LR = 1e-3, 5e-4
SHORT_LAYER_DECAY = 0.8
SHORT_WEIGHT_DECAY = 0.05
EMA_SPANS = 3  # of 1 / (1 - ema) steps, in a run from which an average pays: e^-3 of the first weights is left in it
POLICY = "rand-m9-mstd0.5-inc1"


@dataclass(frozen=True)
class Start:
    """What fine-tuning begins with.

    Args:
        width, depth: of the encoder.
        scratch: whether its weights are random.
        beit: whether it is BEiT's transformer.
        eight_bit: whether the images are 8-bit gray or colour, which timm's policies are for.
        by_token: whether it pools by its cls token, as encoders of DINO and MoCo v3 do.
    """

    width: int
    depth: int
    scratch: bool
    beit: bool
    eight_bit: bool
    by_token: bool = False

    @property
    def large(self) -> bool:
        """Whether it is as wide as ViT-L."""
        return self.width >= SIZES["large"][0]


@dataclass(frozen=True)
class _Recipe:
    """What a recipe is on a million images.

    Args:
        whose: it is, for the reasons.
        pool: what the classifier sees.
        epochs: passes over the images.
        base_lr: the learning rate for 256 images, in batches of `batch_size`.
        min_lr: the rate at the end, of a step.
        warmup: share of the run with a rising rate.
        ema: share that the averaged weights keep at each step; 0 for none.
        repeats: times that an image comes before others do.
    """

    whose: str
    pool: str
    epochs: int
    base_lr: float
    batch_size: int
    min_lr: float
    warmup: float
    layer_decay: float
    weight_decay: float
    betas: tuple[float, float]
    drop_path: float
    ema: float
    repeats: int


def _mae(start: Start) -> _Recipe:
    """MAE's and the paper's, by size; BEiT's where its encoder needs another; MAE's from scratch."""
    huge = start.width >= SIZES["huge"][0]
    drop_path = 0.3 if huge else 0.2 if start.large else 0.1
    if start.scratch:
        return _Recipe(
            whose="MAE's from scratch",
            pool="avg",
            epochs=300,
            base_lr=1e-4,
            batch_size=4096,
            min_lr=1e-6,
            warmup=20 / 300,
            layer_decay=1.0,
            weight_decay=0.3,
            betas=(0.9, 0.95),
            drop_path=drop_path,
            ema=0.9999,
            repeats=1,
        )
    return _Recipe(
        whose="BEiT's" if start.beit else "MAE's" if start.large else "the paper's",
        pool="avg",
        epochs=50 if start.large else 100,
        base_lr=1e-3 if start.beit or start.large else 5e-4,
        batch_size=PAPER_BATCH,
        min_lr=1e-6,
        warmup=0.2 if start.beit else 0.05,
        layer_decay=0.75 if start.large else 0.65,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        drop_path=drop_path,
        ema=0.0,
        repeats=1,
    )


def _deit(start: Start) -> _Recipe:
    """DeiT's defaults: 300 epochs from random weights; 150 for MoCo v3's encoder, with the same 5 of warm-up."""
    epochs = 300 if start.scratch else 150
    return _Recipe(
        whose="DeiT's",
        pool="token",
        epochs=epochs,
        base_lr=2.5e-4,  # 5e-4 for 512 images
        batch_size=PAPER_BATCH,
        min_lr=1e-5,
        warmup=5 / epochs,
        layer_decay=1.0,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        drop_path=0.1,
        ema=0.99996,
        repeats=3,
    )


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
    choices: dict[str, Choice] = {}

    def settle(name: str, value: Any, reason: str) -> Any:
        if name in given:
            return given[name]
        choices[name] = Choice(value, reason)
        return value

    settle("device", hw.device, hw.name)
    settle("precision", "bf16" if hw.bf16 else "fp32", "fast here" if hw.bf16 else "this hardware is slow in bfloat16")
    by_token = start.by_token and given.get("pool") != "avg"
    name = settle("recipe", "deit" if by_token else "mae", "the encoder pools by its cls token" if by_token else "")
    recipe = _deit(start) if name == "deit" else _mae(start)
    whose = recipe.whose
    settle("pool", recipe.pool, whose if name == "deit" else "")
    batch = settle("batch_size", *_batch_size(count, gpu, processes))
    if "max_steps" in given:
        choices["epochs"] = Choice(None, "--max-steps is given")
        epochs = given["max_steps"] * batch / count
    else:
        epochs = settle("epochs", *_epochs(count, gpu, start.scratch, recipe))
    long = epochs >= LONG_EPOCHS
    short = f"{epochs:.3g} epochs: under {LONG_EPOCHS}, more noise only slows learning"
    settle("warmup_epochs", round(recipe.warmup * epochs, 3), f"{recipe.warmup:.3g} of the run, {whose}")
    settle("base_lr", *_base_lr(batch, recipe, long))
    settle("min_lr", recipe.min_lr, whose if name == "deit" else "")
    settle("layer_decay", *_layer_decay(recipe, start.scratch, long))
    decay = recipe.weight_decay if long else SHORT_WEIGHT_DECAY
    settle("weight_decay", decay, whose if decay == recipe.weight_decay else "the paper's")
    settle("betas", recipe.betas, whose)
    settle("drop_path", recipe.drop_path if long else 0.0, whose if long else short)
    if not start.eight_bit:
        settle("auto_augment", NO_POLICY, "timm's policies are for 8-bit gray or colour")
    else:
        settle("auto_augment", POLICY if long else NO_POLICY, whose if long else short)
    for option, value in (("mixup", 0.8), ("cutmix", 1.0), ("erase", 0.25)):
        settle(option, value if long else 0.0, whose if long else short)
    repeated = recipe.repeats > 1 and long
    settle("repeats", recipe.repeats if repeated else 1, whose if repeated else "")
    averaged = recipe.ema > 0 and epochs * count / batch >= round(EMA_SPANS / (1 - recipe.ema))
    settle("ema", recipe.ema if averaged else 0.0, whose if averaged else "")
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


def _epochs(count: int, gpu: bool, scratch: bool, recipe: _Recipe) -> tuple[float, str]:
    """The recipe's for a million images, more for fewer; a processor gets what it can do in an hour or two."""
    if not gpu:
        seen = min(max(20 * count, 2_000), 60_000)
        epochs = round(seen / count) if seen >= 3 * count else round(seen / count, 3)
        return epochs, f"no GPU: {round(epochs * count):,} crops in all"
    if scratch or count >= 200_000:
        return recipe.epochs, recipe.whose
    more = 2 if count < 20_000 else 1.5
    reason = f"{more:g} times {recipe.whose}: {count} images recur more often than a million"
    return round(recipe.epochs * more), reason


def _base_lr(batch: int, recipe: _Recipe, long: bool) -> tuple[float, str]:
    """The recipe's rate is for large batches; Adam's grows with the root of the batch, not with the batch."""
    if not long:
        a_step = SHORT_SHARED_LR if recipe.layer_decay == 1 else SHORT_RUN_LR
        return float(f"{a_step * 256 / batch:.3g}"), f"{a_step:.1e} a step: {recipe.whose} is for long runs"
    paper, of_batch = recipe.base_lr, recipe.batch_size
    rate = paper * math.sqrt(of_batch / batch)
    if rate == paper:
        return paper, recipe.whose
    return float(f"{rate:.3g}"), f"{rate * batch / 256:.1e} a step: {paper:g} is for batches of {of_batch}"


def _layer_decay(recipe: _Recipe, scratch: bool, long: bool) -> tuple[float, str]:
    if recipe.layer_decay == 1:
        return 1.0, "all layers are new" if scratch else recipe.whose
    if not long:
        return SHORT_LAYER_DECAY, f"{recipe.layer_decay:g} leaves the first layers little to learn in a short run"
    return recipe.layer_decay, recipe.whose
