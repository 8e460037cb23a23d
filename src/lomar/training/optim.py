"""The optimiser of pretraining and its schedule."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn


def decay_groups(model: nn.Module, weight_decay: float, spared: Collection[str] = ()) -> list[dict[str, object]]:
    """Parameter groups: what is decayed and what is not.

    Biases and parameters of one dimension are not decayed; cls token, mask token and position tables are.

    Args:
        model: its parameters that are trained.
        weight_decay: of those that are decayed.
        spared: last parts of names that are not decayed either; BEiT spares "cls_token".

    Source: the released LoMaR code, after MAE.
    """

    def plain(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim <= 1 or name.endswith(".bias") or name.rsplit(".", 1)[-1] in spared

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if plain(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named if not plain(name, p)], "weight_decay": weight_decay},
    ]


def adamw(
    model: nn.Module, weight_decay: float, betas: tuple[float, float], spared: Collection[str] = ()
) -> torch.optim.AdamW:
    """AdamW over `decay_groups`; the learning rate is set at each step."""
    return torch.optim.AdamW(decay_groups(model, weight_decay, spared), lr=0.0, betas=betas, fused=True)


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
