"""Costs by arithmetic are those of the methods built: products counted by torch, weights, kept tensors."""

from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lomar.data.loader import SampleKey
from lomar.methods.composition import Composition, TwoViewComposition
from lomar.methods.cost import (
    Passage,
    forward_flops,
    image_tokens,
    kept_bytes,
    passages,
    step_flops,
    tokenizer_flops,
    trained_parameters,
    weight_bytes,
)
from lomar.methods.recipes import RECIPES
from lomar.methods.tokenizer import DVAEEncoder
from lomar.methods.two_view import TwoView
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


# Small crops of 3x3 patches; heads of widths that no other part has.
SMALL_VIEWS = {"image_size": 55, "patch_size": 5, "embed_dim": 60, "depth": 5, "num_heads": 3}
SMALL_VIEWS |= {"local_size": 15, "head_width": 52, "head_outputs": 68, "blur": (0.0, 0.0, 0.0)}


def small_views(name: str, **changes: Any) -> TwoViewComposition:
    """A recipe that compares views, at small size; nothing is blurred, which is a convolution."""
    own = {} if name == "dino" else {"local_size": 0}
    return replace(RECIPES[name].composition(name), **SMALL_VIEWS | own | changes)


VIEW_CASES = [
    small_views("dino"),
    small_views("dino", local_crops=0, norm_last_layer="no"),
    small_views("dino", local_crops=3, position="contextual", mean=(0.5,), std=(0.2,), mlp_ratio=3.0),
    small_views("dino", patch_embed="frozen", position="block-bias", layer_scale=0.1),
    small_views("mocov3"),
    small_views("mocov3", patch_embed="learned", position="learned"),
]


def crops_of(c: TwoViewComposition, method: TwoView, images: int) -> dict[str, torch.Tensor]:
    drawn = [method.draw(0)(SampleKey(0, number, 0, number)) for number in range(images)]
    inputs = {name: torch.stack([each[name] for each in drawn]) for name in drawn[0]}
    inputs["crops"] = torch.randint(0, 256, (images, 2, len(c.mean), c.image_size, c.image_size))
    if c.local_crops:
        inputs["local_crops"] = torch.randint(0, 256, (images, c.local_crops, len(c.mean), c.local_size, c.local_size))
    return inputs


def counted_of_views(c: TwoViewComposition, images: int, backward: bool) -> int:
    """Of one image, by torch's counter, without the comparison of outputs."""
    method = c.build()
    inputs = crops_of(c, method, images)

    def summed(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = first.flatten(1).sum(dim=1) + second.flatten(1).sum(dim=1)
        return both, both

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "loss", summed)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            losses, _ = method(**inputs)
            if backward:
                losses.backward()
    return counter.get_total_flops() // images


@pytest.mark.parametrize("composition", CASES, ids=lambda c: c.method)
def test_flops_are_those_that_torch_counts(composition: Composition) -> None:
    assert forward_flops(composition).total == counted_flops(composition)
    assert step_flops(composition) == 3 * forward_flops(composition).total


@pytest.mark.parametrize("composition", VIEW_CASES, ids=lambda c: c.method)
def test_flops_of_crops_are_those_that_torch_counts(composition: TwoViewComposition) -> None:
    assert forward_flops(composition).total == counted_of_views(composition, images=2, backward=False)


@pytest.mark.parametrize("composition", VIEW_CASES, ids=lambda c: c.method)
def test_a_step_goes_back_through_the_student_alone(composition: TwoViewComposition) -> None:
    """But for the patch embedding: the image has no gradient, and a frozen embedding none at all."""
    counted = counted_of_views(composition, images=2, backward=True)
    spared = {"learned": 1, "frozen": 2}[composition.patch_embed] * forward_flops(composition).embedding
    assert step_flops(composition) - spared == counted


@pytest.mark.parametrize("composition", CASES + VIEW_CASES, ids=lambda c: c.method)
def test_weights_are_those_of_the_method_built(composition: Composition | TwoViewComposition) -> None:
    with torch.device("meta"):
        trained = sum(p.numel() for p in composition.build().parameters() if p.requires_grad)
    assert trained_parameters(composition) == trained
    assert weight_bytes(composition) == 16 * trained


@pytest.mark.parametrize("composition", CASES, ids=lambda c: c.method)
def test_tokens_are_those_of_the_method_built(composition: Composition) -> None:
    with torch.device("meta"):
        built = [stage for stage in composition.stages() for _ in range(stage.blocks)]
    found = [passage for passage in passages(composition) for _ in range(passage.blocks)]
    assert [(p.tokens * p.views, p.width) for p in found] == [(s.tokens, s.width) for s in built]
    assert image_tokens(composition) == list(dict.fromkeys(stage.tokens for stage in built))


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
        Passage(50, 50, 12, 768, 4.0, 1),
        Passage(197, 197, 7, 512, 4.0, 1),
        Passage(197, 147, 1, 512, 4.0, 1),
    ]
    flops = forward_flops(lomar)
    assert flops.linear == 2 * 4 * 768**2 * (12 * 11 * 50 + 12 * 39 + 2 * 11)
    assert flops.attention == 2 * 4 * 768 * 2 * (11 * 50**2 + 39 * 50)
    assert flops.position == 2 * 4 * 768 * 50 * (11 * 50 + 39)
    assert flops.embedding == 2 * 4 * 10 * 768 * 768 and flops.head == 2 * 4 * 39 * 768 * 768


def test_a_forward_pass_of_dino_and_moco_v3() -> None:
    """Worked out by hand as above: ten small crops of 6x6 patches, which the teacher does not see.

    In the last block the cls token alone is worked on.
    """
    dino, moco = (RECIPES[name].composition(name) for name in ("dino", "mocov3"))
    on_large = [Passage(197, 197, 11, 768, 4.0, 2), Passage(197, 1, 1, 768, 4.0, 2)]
    assert passages(dino) == [*on_large, Passage(37, 37, 11, 768, 4.0, 10), Passage(37, 1, 1, 768, 4.0, 10)]
    assert passages(moco) == on_large
    assert (image_tokens(dino), image_tokens(moco)) == ([2 * 197 + 10 * 37], [2 * 197])
    head = 768 * 2048 + 2048**2 + 2048 * 256 + 256 * 65536

    def crop(tokens: int) -> int:
        linear = 768**2 * (11 * 12 * tokens + 2 * tokens + 10)
        return 2 * (linear + 2 * 768 * (11 * tokens**2 + tokens) + (tokens - 1) * 768**2 + head)

    large, small = 2 * crop(197), 10 * crop(37)
    flops = forward_flops(dino)
    assert flops.teacher == large and flops.total == 2 * large + small and flops.head == 2 * 12 * head
    assert step_flops(dino) == 3 * (large + small) + large
    flops = forward_flops(moco)
    projector, predictor = 768 * 4096 + 4096**2 + 4096 * 256, 2 * 4096 * 256
    assert flops.head == 2 * 2 * (projector + predictor)
    assert flops.total - 2 * flops.teacher == 2 * 2 * predictor


def test_the_parts_add_up_and_grow_with_the_views_alone() -> None:
    two, six = (forward_flops(small("lomar", views=views)) for views in (2, 6))
    assert two.total == two.embedding + two.linear + two.attention + two.position + two.head
    assert forward_flops(small_views("dino")).total == sum(astuple(forward_flops(small_views("dino"))))
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


@pytest.mark.parametrize("name", ["dino", "mocov3"])
def test_the_floor_of_bytes_is_of_the_student_alone(name: str) -> None:
    composition = small_views(name, depth=8, embed_dim=96, head_width=8, head_outputs=8)
    method = composition.build()

    def kept(images: int) -> int:
        inputs = crops_of(composition, method, images)
        with torch.autocast("cpu", torch.bfloat16):
            return saved_bytes(lambda: method(**inputs)[0])

    floor = kept_bytes(composition, item_bytes=2)
    assert floor < kept(4) - kept(3) < 3 * floor
