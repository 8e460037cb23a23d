"""Optimisers of pretraining and fine-tuning, and their schedule."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import nn


def decay_groups(
    model: nn.Module, weight_decay: float, spared: Collection[str] = (), all_of_it: bool = False
) -> list[dict[str, object]]:
    """Parameter groups: what is decayed and what is not, which stands as "decayed" beside them.

    Biases and parameters of one dimension are not decayed; cls token, mask token and position tables are.

    Args:
        model: its parameters that are trained.
        weight_decay: of those that are decayed.
        spared: last parts of names that are not decayed either; BEiT spares "cls_token".
        all_of_it: whether biases and parameters of one dimension are decayed as well, as in MoCo v3.

    Source: the released LoMaR code, after MAE.
    """

    def plain(name: str, parameter: nn.Parameter) -> bool:
        spares = parameter.ndim <= 1 or name.endswith(".bias") or name.rsplit(".", 1)[-1] in spared
        return spares and not all_of_it

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if plain(name, p)], "weight_decay": 0.0, "decayed": False},
        {"params": [p for name, p in named if not plain(name, p)], "weight_decay": weight_decay, "decayed": True},
    ]


def adamw(
    model: nn.Module,
    weight_decay: float,
    betas: tuple[float, float],
    spared: Collection[str] = (),
    all_of_it: bool = False,
) -> torch.optim.AdamW:
    """AdamW over `decay_groups`; the learning rate is set at each step."""
    return torch.optim.AdamW(decay_groups(model, weight_decay, spared, all_of_it), lr=0.0, betas=betas, fused=True)


def layerwise_adamw(
    model: nn.Module, weight_decay: float, betas: tuple[float, float], layer_decay: float
) -> torch.optim.AdamW:
    """AdamW whose rate falls from each layer to the one before, for fine-tuning.

    A group's `lr_scale` is layer_decay^(depth + 1 - id), where id is 0 of the stem, i + 1 of block i, depth + 1 of the
    rest. What the model names in `no_weight_decay`, and parameters of one dimension, are not decayed.

    Args:
        model: of timm's contract; parameters that are not trained are left out.
        weight_decay: of the rest.
        betas: AdamW's momenta.
        layer_decay: 1 for one rate.

    Source: BEiT, as MAE and LoMaR fine-tune; timm's implementation.
    """
    contract: Any = model
    groups = param_groups_layer_decay(model, weight_decay, contract.no_weight_decay(), layer_decay=layer_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then half a cosine, counted in optimiser steps.

    The first step already moves (the released code spends it at rate 0, which a short run cannot afford).

    Args:
        peak_lr: highest learning rate: base rate times global batch size / 256.
        warmup_steps: steps to reach it; may be fractional.
        total_steps: steps of the run.
        min_lr: learning rate at the end.
    """

    peak_lr: float
    warmup_steps: float
    total_steps: int
    min_lr: float = 0.0

    def lr(self, step: int) -> float:
        """Learning rate of the update that follows `step` updates."""
        if step + 1 < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1.0, self.total_steps - self.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return self.min_lr + (self.peak_lr - self.min_lr) * share


@dataclass(frozen=True)
class StepSchedule:
    """A short linear warm-up, then one rate that falls to a tenth at each milestone, counted in optimiser steps.

    Args:
        peak_lr: highest learning rate.
        warmup_steps: steps to reach it.
        warmup_factor: of the first rate over the highest.
        milestones: steps after which the rate is a tenth of what it was.

    Source: detectron2 and mmdetection.
    """

    peak_lr: float
    warmup_steps: int
    warmup_factor: float
    milestones: tuple[int, ...]

    def lr(self, step: int) -> float:
        """Learning rate of the update that follows `step` updates."""
        rate = self.peak_lr * 0.1 ** sum(step >= milestone for milestone in self.milestones)
        if step < self.warmup_steps:
            rate *= self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        return rate
