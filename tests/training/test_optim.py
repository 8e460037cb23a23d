"""Claims about the optimiser's groups and the learning rate."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from lomar.methods.recipes import RECIPES
from lomar.model import Encoder
from lomar.training.optim import Schedule, adamw, decay_groups, layerwise_adamw


def test_base_16_has_the_groups_of_the_released_code() -> None:
    """SPEC A.8: 100 tensors of 122,880 parameters without decay, 64 of 86,154,240 with."""
    with torch.device("meta"):
        method = RECIPES["lomar"].composition("lomar").build()
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


def test_mae_has_the_groups_of_the_released_code() -> None:
    """B.3: sines and cosines are frozen, and so in no group; cls and mask token are decayed."""
    with torch.device("meta"):
        method = RECIPES["mae"].composition("mae").build()
    plain, decayed = decay_groups(method, 0.05)
    listed = [id(p) for group in (plain, decayed) for p in group["params"]]  # type: ignore[attr-defined]
    fixed = [p for name, p in method.named_parameters() if name.endswith("pos_embed")]
    assert len(fixed) == 2 and not {id(p) for p in fixed} & set(listed)
    assert count(plain["params"])[1] + count(decayed["params"])[1] == 111_655_680


def test_beit_spares_its_cls_token_alone() -> None:
    """C.5: not decayed are biases, norms, layer scale and cls token; mask token and bias table are."""
    with torch.device("meta"):
        method = RECIPES["beit"].composition("beit").build()
    plain, _ = decay_groups(method, 0.05, spared=("cls_token",))
    names = {name for name, p in method.named_parameters() if any(p is q for q in plain["params"])}  # type: ignore[attr-defined]
    big = {name for name, p in method.named_parameters() if name in names and p.ndim > 1}
    assert big == {"architecture.encoder.cls_token"}
    assert {"architecture.encoder.blocks.0.ls1.gamma", "architecture.encoder.blocks.0.attn.q_bias"} <= names


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_adamw_has_the_momenta_and_the_decay_it_is_given(betas: tuple[float, float]) -> None:
    optimizer = adamw(torch.nn.Linear(3, 2), 0.05, betas)
    for group in optimizer.param_groups:
        assert group["betas"] == betas and group["eps"] == 1e-8
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.05]
    assert RECIPES["lomar"].options["betas"] == (0.9, 0.95) and RECIPES["beit"].options["betas"] == (0.9, 0.999)


def test_the_rate_rises_to_its_peak_and_falls_to_zero_by_a_cosine() -> None:
    schedule = Schedule(peak_lr=0.8, warmup_steps=4, total_steps=12)
    assert [schedule.lr(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert schedule.lr(4) == 0.8
    assert schedule.lr(6) == pytest.approx(0.8 * (1 + math.sqrt(0.5)) / 2)  # a quarter of the way
    assert schedule.lr(8) == pytest.approx(0.4)  # half-way
    assert schedule.lr(12) == pytest.approx(0, abs=1e-12)


def test_the_rate_falls_to_the_lowest_rate_where_there_is_one() -> None:
    """BEiT's 1e-5: half-way is the mean of peak and lowest rate."""
    schedule = Schedule(peak_lr=0.8, warmup_steps=4, total_steps=12, min_lr=0.2)
    assert [schedule.lr(step) for step in (0, 4, 8, 12)] == pytest.approx([0.2, 0.8, 0.5, 0.2])


def test_a_warm_up_may_end_between_two_steps_or_not_be() -> None:
    assert [Schedule(1.0, 1.5, 10).lr(step) for step in range(2)] == pytest.approx([2 / 3, 1.0])
    assert Schedule(1.0, 0.0, 10).lr(0) == 1.0
    rates = [Schedule(1.0, 2.5, 10).lr(step) for step in range(10)]
    assert max(rates) <= 1.0 and min(rates) > 0


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    assert [Schedule(1.0, 8.0, 4).lr(step) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]


def test_the_rates_of_fine_tuning_fall_from_layer_to_layer_as_in_the_released_code() -> None:
    """SPEC A.10: B/16 with 0.65: 28 groups; stem 0.003697, block 0 0.005688, block 11 0.65, head 1; tables decay."""
    with torch.device("meta"):
        encoder = Encoder(num_classes=1000)
    optimizer = layerwise_adamw(encoder, 0.05, (0.9, 0.999), 0.65)
    scale_of = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    named = {name: scale_of[id(p)] for name, p in encoder.named_parameters()}
    assert len(optimizer.param_groups) == 28 and len(named) == 163
    for name, scale, decay in (
        ("cls_token", 0.65**13, 0.0),
        ("patch_embed.proj.weight", 0.65**13, 0.05),
        ("blocks.0.attn.qkv.weight", 0.65**12, 0.05),
        ("blocks.0.attn.rpe.table", 0.65**12, 0.05),
        ("blocks.11.norm1.weight", 0.65, 0.0),
        ("fc_norm.weight", 1.0, 0.0),
        ("head.weight", 1.0, 0.05),
    ):
        assert named[name] == (pytest.approx(scale), decay), name
    assert round(named["cls_token"][0], 6) == 0.003697 and round(named["blocks.0.norm1.weight"][0], 6) == 0.005688


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_whatever_follows_the_blocks_has_the_full_rate(pool: str) -> None:
    """SPEC A.10: stem, blocks, everything else; the last norm is none of the last block's."""
    encoder = Encoder(32, 8, num_classes=3, embed_dim=16, depth=3, num_heads=2, global_pool=pool)
    optimizer = layerwise_adamw(encoder, 0.05, (0.9, 0.999), 0.5)
    scale_of = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    after = [n for n, _ in encoder.named_parameters() if not n.startswith(("blocks", "patch_embed", "cls_token"))]
    assert len(after) == 4 and all(scale_of[id(encoder.get_parameter(name))] == 1.0 for name in after)


def test_what_is_frozen_is_in_no_group() -> None:
    encoder = Encoder(32, 8, num_classes=3, embed_dim=16, depth=3, num_heads=2)
    for parameter in encoder.blocks[0].parameters():
        parameter.requires_grad_(False)
    listed = [p for g in layerwise_adamw(encoder, 0.05, (0.9, 0.999), 0.5).param_groups for p in g["params"]]
    assert len(listed) == len(list(encoder.parameters())) - len(list(encoder.blocks[0].parameters()))
