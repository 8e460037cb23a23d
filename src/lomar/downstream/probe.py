"""Linear classifiers on frozen features: many trained at once in a sweep, or one as MAE trains it.

Features come from `lomar.downstream.features`; nothing here knows of images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from lomar.downstream.features import Wanted
from lomar.downstream.knn import FEW
from lomar.seeding import seeded

# For 256 images. Source: DINOv2, eval/linear.py.
SWEEP_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
MOMENTUM = 0.9
EPSILON = 1e-6  # added to a variance, as in the batch norm of MAE's probe
JOINED_LAYERS = 4  # whose cls tokens are joined, as in DINOv2


@dataclass(frozen=True)
class HeadInput:
    """What a linear classifier sees of an image: features joined to one vector.

    Args:
        name: for people.
        parts: what is joined, each of one kind and layer.
    """

    name: str
    parts: tuple[Wanted, ...]


def head_inputs(features: Sequence[str], layers: Sequence[int]) -> list[HeadInput]:
    """Every kind of feature after every layer; where cls tokens are among them, those of the last layers joined too.

    The joined ones are the cls tokens of the last four of `layers`, or as many as there are; with "cls+mean", the mean
    of the patch tokens of the last layer is joined to that.

    Args:
        features: of "pooled", "cls", "mean", "cls+mean".
        layers: counted from 1.

    Source: DINOv2's linear evaluation has cls of 1 or 4 blocks, with and without the mean of the patch tokens.
    """

    layers = sorted(set(layers))
    inputs = [
        HeadInput(f"{kind} of layer {layer}", tuple(Wanted(part, layer) for part in kind.split("+")))
        for layer in layers
        for kind in dict.fromkeys(features)
    ]
    last = layers[-JOINED_LAYERS:]
    if len(last) > 1:
        joined = tuple(Wanted("cls", layer) for layer in last)
        named = " ".join(map(str, last))
        if {"cls", "cls+mean"} & set(features):
            inputs.append(HeadInput(f"cls of layers {named}", joined))
        if "cls+mean" in features:
            inputs.append(HeadInput(f"cls of layers {named} + mean of {last[-1]}", (*joined, Wanted("mean", last[-1]))))
    return inputs


def parts_of(inputs: Sequence[HeadInput]) -> list[Wanted]:
    """What has to be read of the encoder for them, each once."""
    return list(dict.fromkeys(part for each in inputs for part in each.parts))


class Columns:
    """Where the numbers of each part stand in a row of cached features.

    Args:
        parts: in the order of the row.
        widths: numbers of each.
    """

    def __init__(self, parts: Sequence[Wanted], widths: Sequence[int]) -> None:
        ends = torch.tensor(widths).cumsum(0).tolist()
        self._slices = {part: slice(end - width, end) for part, width, end in zip(parts, widths, ends, strict=True)}
        self.total = sum(widths)

    def of(self, each: HeadInput) -> list[slice]:
        """Where its parts stand, in their order."""
        return [self._slices[part] for part in each.parts]

    def cut(self, rows: Tensor, each: HeadInput) -> Tensor:
        """(B, all numbers) -> (B, D) that a head sees."""
        return torch.cat([rows[:, place] for place in self.of(each)], dim=1)


@dataclass(frozen=True)
class Standard:
    """Mean and deviation of features, (D,) float32 each."""

    mean: Tensor
    std: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Features (B, D) of any float type -> float32 of mean 0 and deviation 1 over what it was measured on."""
        return (rows.float() - self.mean) / self.std


def standard_of(rows: Tensor, chosen: Tensor, at_once: int = 8192) -> Standard:
    """Mean and deviation of each column of the chosen rows (int64 numbers) of (N, D), a part at a time."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for places in chosen.split(at_once):
        total += rows[places].double().sum(dim=0)
    mean = total / len(chosen)
    spread = torch.zeros_like(total)
    for places in chosen.split(at_once):
        spread += (rows[places].double() - mean).square().sum(dim=0)
    return Standard(mean.float(), (spread / len(chosen) + EPSILON).sqrt().float())


class Sweep(nn.Module):
    """Linear heads for every input and learning rate, trained in one pass over the same batches.

    Without weight decay, momentum SGD is linear in the gradient: weighing a head's loss by its rate trains it at that
    rate. So one optimiser, whose rate is the schedule's share of the peak (1 falling to 0), trains all of them.

    Args:
        widths: numbers that the heads of each input see.
        classes: outputs of each head.
        rates: peak learning rates, those of a step.
        seed: of the initial weights, N(0, 0.01); biases are 0.

    Source: DINOv2's linear evaluation.
    """

    def __init__(self, widths: Sequence[int], classes: int, rates: Sequence[float], seed: int) -> None:
        super().__init__()
        self.classes = classes
        self.rates: Tensor
        self.register_buffer("rates", torch.tensor(rates, dtype=torch.float32), persistent=False)
        count = len(rates)
        self.weights = nn.ParameterList(
            torch.empty(count, classes, width).normal_(0, 0.01, generator=seeded(seed, place, "head"))
            for place, width in enumerate(widths)
        )
        self.biases = nn.ParameterList(torch.zeros(count, classes) for _ in widths)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Features (B, D) of each input -> logits (inputs, rates, B, classes)."""
        found = []
        for rows, weight, bias in zip(inputs, self.weights, self.biases, strict=True):
            logits = F.linear(rows, weight.flatten(0, 1), bias.flatten())  # (B, rates * classes)
            found.append(logits.unflatten(1, (-1, self.classes)).transpose(0, 1))  # (rates, B, classes)
        return torch.stack(found)

    def losses(self, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy (inputs, rates), mean over the batch."""
        logits = self(inputs)
        wanted = labels.expand(logits.shape[:-1]).flatten()
        each = F.cross_entropy(logits.flatten(0, 2), wanted, reduction="none")
        return each.unflatten(0, tuple(logits.shape[:-1])).mean(dim=-1)

    def optimizer(self) -> torch.optim.SGD:
        """What trains them on `(losses * rates).sum()`; its lr is to be the schedule's share of the peak."""
        return torch.optim.SGD(self.parameters(), lr=0.0, momentum=MOMENTUM)

    def head(self, place: int, rate: int) -> tuple[Tensor, Tensor]:
        """Weight (classes, D) and bias (classes,) of one head."""
        return self.weights[place][rate].detach(), self.biases[place][rate].detach()


class MaeHead(nn.Module):
    """The head of MAE's linear probe: batch norm without affine parameters, then a linear layer.

    The batch norm takes its statistics from the whole batch; in the released code, from each GPU's share.

    Args:
        width: numbers that it sees.
        classes: outputs.
        seed: of the initial weights, a normal distribution of deviation 0.01 cut at 2 (as good as not); biases are 0.

    Source: MAE, section A.2, and the released code.
    """

    def __init__(self, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=EPSILON)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01, generator=seeded(seed, "head"))
        nn.init.zeros_(self.linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Features (B, D) -> logits (B, classes)."""
        return self.linear(self.norm(rows))

    def standard(self) -> Standard:
        """What its batch norm does in evaluation."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None and variance is not None
        return Standard(mean, (variance + EPSILON).sqrt())


def lars(head: nn.Module) -> Lars:
    """LARS as MAE's linear probe has it: momentum 0.9, trust 0.001, no decay; biases are not scaled.

    Of weights g <- g * 0.001 * |p| / |g|, where both norms are above 0; u <- 0.9 u + g; p <- p - lr * u.

    Args:
        head: its parameters are trained; the learning rate is set at each step.

    Source: the released code of MAE; You et al. 2017, "Large Batch Training of Convolutional Networks".
    """
    weights = [p for p in head.parameters() if p.ndim > 1]
    rest = [p for p in head.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "always_adapt": True}, {"params": rest, "always_adapt": False}]
    return Lars(groups, lr=0.0, momentum=MOMENTUM, weight_decay=0.0, trust_coeff=0.001, eps=0.0)


def top_hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How often the right class is first, and among the first five: counts of logits (..., B, classes)."""
    order = logits.topk(min(FEW, logits.shape[-1]), dim=-1).indices
    right = order == labels[:, None]
    return right[..., 0].sum(dim=-1), right.any(dim=-1).sum(dim=-1)
