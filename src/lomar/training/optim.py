"""The optimiser of pretraining and its schedule."""

import math
from dataclasses import dataclass

import torch
from torch import nn

BETAS = (0.9, 0.95)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups: what is decayed and what is not.

    Biases and parameters of one dimension are not decayed; cls token, mask token and position tables are.

    Source: the released LoMaR code, after MAE.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.ndim <= 1 or name.endswith(".bias"))]
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with the paper's momenta (0.9, 0.95); the learning rate is set at each step."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=0.0, betas=BETAS, fused=True)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then half a cosine to zero, counted in optimiser steps.

    The first step already moves (the released code spends it at rate 0, which a short run cannot afford).

    Args:
        peak_lr: highest learning rate: base rate times global batch size / 256.
        warmup_steps: steps to reach it; may be fractional.
        total_steps: steps of the run.
    """

    peak_lr: float
    warmup_steps: float
    total_steps: int

    def lr(self, step: int) -> float:
        """Learning rate of the update that follows `step` updates."""
        if step + 1 < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1.0, self.total_steps - self.warmup_steps)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
