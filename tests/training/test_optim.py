"""Claims about the optimiser's groups and the learning rate."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from lomar.methods.recipes import Composition
from lomar.training.optim import Schedule, adamw, decay_groups


def test_base_16_has_the_groups_of_the_released_code() -> None:
    """SPEC A.8: 100 tensors of 122,880 parameters without decay, 64 of 86,154,240 with."""
    with torch.device("meta"):
        method = Composition(
            "lomar", "base", 224, 16, 7, 4, 0.8, 0, "independent", 4096, (0.5,) * 3, (0.5,) * 3, 255.0
        ).build()
    plain, decayed = decay_groups(method, 0.05)
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert count(plain["params"]) == (100, 122_880)
    assert count(decayed["params"]) == (64, 86_154_240)
    named = dict(method.named_parameters())
    tokens = [named["architecture.mask_token"], named["architecture.encoder.cls_token"]]
    assert all(any(token is p for p in decayed["params"]) for token in tokens)  # type: ignore[attr-defined]


def count(parameters: Any) -> tuple[int, int]:
    listed: list[torch.Tensor] = list(parameters) if isinstance(parameters, Iterable) else []
    return len(listed), sum(p.numel() for p in listed)


def test_adamw_has_the_papers_momenta() -> None:
    optimizer = adamw(torch.nn.Linear(3, 2), 0.05)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.05]


def test_the_rate_rises_to_its_peak_and_falls_to_zero_by_a_cosine() -> None:
    schedule = Schedule(peak_lr=0.8, warmup_steps=4, total_steps=12)
    assert [schedule.lr(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert schedule.lr(4) == 0.8
    assert schedule.lr(6) == pytest.approx(0.8 * (1 + math.sqrt(0.5)) / 2)  # a quarter of the way
    assert schedule.lr(8) == pytest.approx(0.4)  # half-way
    assert schedule.lr(12) == pytest.approx(0, abs=1e-12)


def test_a_warm_up_may_end_between_two_steps_or_not_be() -> None:
    assert [Schedule(1.0, 1.5, 10).lr(step) for step in range(2)] == pytest.approx([2 / 3, 1.0])
    assert Schedule(1.0, 0.0, 10).lr(0) == 1.0
    rates = [Schedule(1.0, 2.5, 10).lr(step) for step in range(10)]
    assert max(rates) <= 1.0 and min(rates) > 0


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    assert [Schedule(1.0, 8.0, 4).lr(step) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]
