"""Costs by arithmetic are those of the methods built: products counted by torch, weights, kept tensors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lomar.data.loader import SampleKey
from lomar.methods.composition import Composition
from lomar.methods.cost import (
    Passage,
    forward_flops,
    kept_bytes,
    passages,
    tokenizer_flops,
    trained_parameters,
    weight_bytes,
)
from lomar.methods.recipes import RECIPES
from lomar.methods.tokenizer import DVAEEncoder
from lomar.training.memory import saved_bytes

# Sides of 11 patches and widths that share no factor, so that no part can stand in for another.
SMALL = {"image_size": 55, "patch_size": 5, "embed_dim": 60, "depth": 5, "num_heads": 3}
SMALL |= {"decoder_width": 28, "decoder_depth": 2, "decoder_heads": 7}


def small(name: str, **changes: Any) -> Composition:
    """A recipe at small size."""
    composition = RECIPES[name].composition(name)
    vocab = 31 if composition.target == "tokens" else 0
    return replace(composition, **SMALL | {"vocab": vocab, "mask_layer": min(composition.mask_layer, 3)} | changes)


def counted_flops(composition: Composition) -> int:
    """Of one image's forward pass, by torch's counter; its attention must be one whose products the counter sees."""
    method = composition.build()
    drawn = method.draw(0)(SampleKey(0, 0, 0, 0))
    sides = [patches * composition.patch_size for patches in method.views.size]
    windows = torch.zeros(method.views.count, len(composition.mean), *sides)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        method.predict(windows, **drawn)
    return counter.get_total_flops()


CASES = [
    small("lomar"),
    small("lomar", window_size=5, views=3, mask_ratio=0.5, position="none"),
    small("lomar", mean=(0.5,), std=(0.2,), mlp_ratio=3.0),
    small("lomar-late"),
    small("lomar-late", position="sincos", mask_layer=4, predict_share=0.3),
    small("mae"),
    small("mae", position="contextual", decoder_width=36, decoder_heads=2, decoder_depth=1, predict_share=0.5),
    small("mae", position="learned"),
    small("lomar", position="learned"),
    small("fig5-decoder-5"),
    small("beit"),
    small("beit-lomar"),
    small("beit-lomar", position="block-bias", layer_scale=0.0),
]


@pytest.mark.parametrize("composition", CASES, ids=lambda c: c.method)
def test_flops_are_those_that_torch_counts(composition: Composition) -> None:
    assert forward_flops(composition).total == counted_flops(composition)


@pytest.mark.parametrize("composition", CASES, ids=lambda c: c.method)
def test_weights_are_those_of_the_method_built(composition: Composition) -> None:
    with torch.device("meta"):
        trained = sum(p.numel() for p in composition.build().parameters() if p.requires_grad)
    assert trained_parameters(composition) == trained
    assert weight_bytes(composition) == 16 * trained


@pytest.mark.parametrize("composition", CASES, ids=lambda c: c.method)
def test_tokens_are_those_of_the_method_built(composition: Composition) -> None:
    with torch.device("meta"):
        built = [stage for stage in composition.stages() for _ in range(stage.blocks)]
    found = [passage for passage in passages(composition) for _ in range(passage.blocks)]
    assert [(p.tokens * composition.view_count, p.width) for p in found] == [(s.tokens, s.width) for s in built]


def test_a_forward_pass_of_the_papers_methods() -> None:
    """Worked out by hand: 12 D^2 multiply-adds a token and block of ViT-B/16, and 2 D for each pair of tokens.

    In the last block the tokens that are not predicted are keys and values alone: 2 D^2.
    """
    mae, beit, lomar = (RECIPES[name].composition(name) for name in ("mae", "beit", "lomar"))
    flops = forward_flops(beit)
    assert flops.linear == 2 * 768**2 * (12 * 11 * 197 + 12 * 75 + 2 * 122)
    assert flops.attention == 2 * 768 * 2 * (11 * 197**2 + 75 * 197) and flops.position == 0
    assert flops.embedding == 2 * 196 * 768 * 768 and flops.head == 2 * 75 * 768 * 8192
    assert passages(mae) == [
        Passage(50, 50, 12, 768, 4.0),
        Passage(197, 197, 7, 512, 4.0),
        Passage(197, 147, 1, 512, 4.0),
    ]
    flops = forward_flops(lomar)
    assert flops.linear == 2 * 4 * 768**2 * (12 * 11 * 50 + 12 * 39 + 2 * 11)
    assert flops.attention == 2 * 4 * 768 * 2 * (11 * 50**2 + 39 * 50)
    assert flops.position == 2 * 4 * 768 * 50 * (11 * 50 + 39)
    assert flops.embedding == 2 * 4 * 10 * 768 * 768 and flops.head == 2 * 4 * 39 * 768 * 768


def test_the_parts_add_up_and_grow_with_the_views_alone() -> None:
    two, six = (forward_flops(small("lomar", views=views)) for views in (2, 6))
    assert two.total == two.embedding + two.linear + two.attention + two.position + two.head
    assert six.total == 3 * two.total
    assert forward_flops(small("lomar", image_size=110)) == forward_flops(small("lomar"))
    assert forward_flops(small("mae", image_size=110)).total > 4 * forward_flops(small("mae")).total


def test_late_masks_and_a_share_of_them_cost_less() -> None:
    settings = [{}, {"mask_layer": 2}, {"mask_layer": 4}, {"mask_layer": 4, "predict_share": 0.5}]
    compositions = [small("lomar", **changes) for changes in settings]
    for costs in ([forward_flops(c).total for c in compositions], [kept_bytes(c, 2) for c in compositions]):
        assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4


@pytest.mark.parametrize("sizes", [(3, 8, 31, 1), (1, 12, 17, 2)], ids=str)
def test_a_tokenizer_costs_what_torch_counts(sizes: tuple[int, int, int, int]) -> None:
    channels, width, vocab, blocks = sizes
    with torch.device("meta"):
        encoder, pixels = DVAEEncoder(*sizes), torch.zeros(1, channels, 8 * 3, 8 * 5)
        with FlopCounterMode(display=False) as counter:
            encoder(pixels)
    assert tokenizer_flops((3, 5), channels, width, vocab, blocks) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["lomar", "lomar-late", "mae", "beit"])
def test_the_floor_of_bytes_is_below_what_autograd_keeps_and_not_far(name: str) -> None:
    """In bfloat16; the difference of two images and one, as pretraining chooses its micro batch by."""
    composition = small(name, depth=8, embed_dim=96, num_heads=3, mask_layer=5 if name == "lomar-late" else 0)
    method = composition.build()
    drawn = method.draw(0)(SampleKey(0, 0, 0, 0))
    sides = [patches * composition.patch_size for patches in method.views.size]

    def kept(images: int) -> int:
        inputs = {key: torch.cat([tensor] * images) for key, tensor in drawn.items()}
        windows = torch.zeros(len(inputs["hidden"]), 3, *sides)
        with torch.autocast("cpu", torch.bfloat16):
            return saved_bytes(lambda: method.predict(windows, **inputs)[0])

    floor = kept_bytes(composition, item_bytes=2)
    assert floor < kept(2) - kept(1) < 3 * floor
