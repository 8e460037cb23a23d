"""The encoder as a timm model. timm itself is the judge where it can be."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay

import lomar.model
from lomar.model import SIZES, Encoder
from lomar.model.transformer import POSITIONS


def tiny(**changes: object) -> Encoder:
    """A small encoder with prime sides, so that swapped axes cannot pass."""
    shape: dict = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3, "num_classes": 0}
    return Encoder(**shape | changes).eval()


def positioned(**changes: Any) -> Encoder:
    """`tiny` with tables that say something: zeros would hide errors."""
    model = tiny(**changes)
    for name, parameter in model.named_parameters():
        if name.endswith(".table"):
            torch.nn.init.normal_(parameter)
    return model


def test_registers_every_size_and_patch_with_timm() -> None:
    sizes = {f"lomar_vit_{size}_patch{p}" for size in ("tiny", "small", "base", "large") for p in (8, 14, 16)}
    assert set(timm.list_models("lomar_vit_*")) == sizes | {"lomar_vit_huge_patch14"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Released fine-tuning model of B/16 with 1000 classes; the others by arithmetic from timm's plain ViT below.
    [("lomar_vit_base_patch16", 86_454_760)],
)
def test_size_equals_the_released_classifier(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_differs_from_timms_vit_in_the_position_alone(size: str) -> None:
    """A plain ViT has (1 + 196) x D positions; ours has 50 vectors a block and no position embedding."""
    with torch.device("meta"):
        ours = timm.create_model(f"lomar_vit_{size}_patch16", num_classes=7)
        plain = timm.create_model(f"vit_{size}_patch16_224", num_classes=7)
    width, depth, heads = SIZES[size]
    count = [sum(p.numel() for p in model.parameters()) for model in (ours, plain)]
    assert count[0] - count[1] == depth * 50 * width // heads - 197 * width


def test_without_position_it_equals_timms_vit() -> None:
    """The same weights, a zero table and a zero position embedding give the same logits."""
    ours = timm.create_model("lomar_vit_tiny_patch16", num_classes=5, img_size=48).eval()
    plain = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, img_size=48, global_pool="avg", fc_norm=True, class_token=True
    ).eval()
    weights = {k: v for k, v in ours.state_dict().items() if "rpe" not in k}
    missing = plain.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["pos_embed"]
    assert not missing.unexpected_keys
    torch.nn.init.zeros_(plain.pos_embed)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images), plain(images))


def test_with_sines_and_cosines_it_equals_timms_vit() -> None:
    """The same weights and the same table of positions, on a rectangle, token by token and as a classifier."""
    sizes: dict[str, Any] = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3}
    images = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    for own in ({"num_classes": 7, "global_pool": "avg"}, {"num_classes": 0, "global_pool": "token"}):
        ours = Encoder(**sizes, **own, position="sincos").eval()
        timms = VisionTransformer(**sizes, **own, fc_norm=own["global_pool"] == "avg").eval()
        timms.load_state_dict(ours.state_dict())  # every name and shape, none missing
        assert timms.pos_embed.abs().max() > 0.5
        torch.testing.assert_close(ours.forward_features(images), timms.forward_features(images))
        torch.testing.assert_close(ours(images), timms(images))


def timms_name(name: str) -> str:
    """Our name of a parameter -> timm's in its BEiT."""
    ours_to_timms = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2", "attn.rel_pos_bias.table": TABLE, "table": TABLE}
    for ours, timms in ours_to_timms.items():
        if name.endswith(f".{ours}"):
            prefix = name.removesuffix(ours) + ("attn." if ours.startswith("attn.") else "")
            return prefix + timms
    return name


TABLE = "relative_position_bias_table"
BEIT = {"position": "block-bias", "key_bias": False, "init_values": 0.1, "weight_init": "beit"}


@pytest.mark.parametrize("side", [(12, 20), (20, 20)])
@pytest.mark.parametrize("position", ["block-bias", "shared-bias"])
def test_with_relative_biases_it_equals_timms_beit(side: tuple[int, int], position: str) -> None:
    """The same weights and tables that are not zero."""
    sizes: dict[str, Any] = {"img_size": side, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3}
    sizes["num_classes"] = 7
    ours = Encoder(**sizes, **BEIT | {"position": position}).eval()
    for name, parameter in ours.named_parameters():
        if not name.endswith("norm1.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    shared = position == "shared-bias"
    timms = Beit(
        **sizes,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=not shared,
        use_shared_rel_pos_bias=shared,
        norm_layer=lambda width, **given: torch.nn.LayerNorm(width, eps=1e-6, **given),
    ).eval()
    timms.load_state_dict({timms_name(name): tensor for name, tensor in ours.state_dict().items()})
    images = torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images), timms(images))


def test_a_classifier_trains_on_rectangles_of_four_channels() -> None:
    """Every parameter gets a finite gradient, and a step lowers the loss of its batch."""
    model = timm.create_model("lomar_vit_tiny_patch16", num_classes=10, img_size=(96, 160), in_chans=4)
    images = torch.randn(2, 4, 96, 160, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 7])
    before = torch.nn.functional.cross_entropy(model(images), labels)
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert torch.nn.functional.cross_entropy(model(images), labels) < before


def test_features_are_normalised_tokens_cls_first() -> None:
    model = tiny()
    features = model.forward_features(torch.randn(2, 3, 12, 20))
    assert features.shape == (2, 1 + 3 * 5, 12)
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    # The cls token's path: zero every block's contribution and the first token is the cls token alone.
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
    first = model.forward_features(torch.randn(2, 3, 12, 20))[:, 0]
    torch.testing.assert_close(first, model.norm(model.cls_token[:, 0]).expand(2, -1))


@pytest.mark.parametrize("position", POSITIONS)
def test_the_last_block_works_for_what_is_pooled_alone(position: str) -> None:
    model = positioned(position=position, global_pool="token", depth=2, drop_path_rate=0.5).train()
    images, paths, came = torch.randn(2, 3, 12, 20), torch.rand(2, 2, 2), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, out: came.append(out.shape[1]))
    pooled = model(images, paths)
    assert came == [16, 1]
    torch.testing.assert_close(pooled, model.forward_head(model.forward_features(images, paths)))
    assert came[2:] == [16, 16]


def test_pooling_takes_patch_tokens_or_the_cls_token() -> None:
    images = torch.randn(2, 3, 12, 20)
    for pool, pick in {"avg": lambda t: t[:, 1:].mean(1), "token": lambda t: t[:, 0], "": lambda t: t}.items():
        model = tiny(global_pool=pool)
        torch.testing.assert_close(model(images), pick(model.forward_features(images)))


def test_any_size_goes_in_and_a_wrong_one_is_refused() -> None:
    model = tiny()
    assert model.forward_features(torch.randn(1, 3, 28, 44)).shape == (1, 1 + 7 * 11, 12)
    with pytest.raises(AssertionError, match="divisible"):
        model(torch.randn(1, 3, 13, 20))
    model.set_input_size((28, 44))
    assert model.patch_embed.grid_size == (7, 11)


POSITIONED: list[dict[str, Any]] = [{"position": p} for p in POSITIONS] + [
    {"position": "shared-bias", "bias_grid": (2, 2)}
]


@pytest.mark.parametrize("made", POSITIONED, ids=str)
@pytest.mark.parametrize("size", [(28, 44), (20, 8), (8, 44)])
def test_another_size_is_the_same_on_the_way_and_for_good(made: dict[str, Any], size: tuple[int, int]) -> None:
    """Tables are resized for the one image or for all; `architecture` then rebuilds what they have become."""
    model, images = positioned(**made), torch.randn(2, 3, *size)
    on_the_way = model.forward_features(images)
    assert on_the_way.shape == (2, 1 + size[0] * size[1] // 16, 12)
    model.set_input_size(size)
    assert (model.grid, model.architecture["img_size"]) == ((size[0] // 4, size[1] // 4), size)
    torch.testing.assert_close(model.forward_features(images), on_the_way, atol=1e-5, rtol=1e-4)
    rebuilt = Encoder(**model.architecture, num_classes=0).eval()
    rebuilt.load_state_dict(model.state_dict())
    torch.testing.assert_close(rebuilt.forward_features(images), on_the_way, atol=1e-5, rtol=1e-4)
    trainable = {name: p.requires_grad for name, p in positioned(**made).named_parameters()}
    assert trainable == {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("position", ["sincos", "learned"])
def test_absolute_positions_of_another_size_are_resized_as_timm_does(position: str) -> None:
    """Sines and cosines are not computed anew: fine-tuning may have changed them."""
    model, images = positioned(position=position), torch.randn(2, 3, 28, 44)
    torch.nn.init.normal_(model.pos_embed)
    timms = VisionTransformer((28, 44), 4, embed_dim=12, depth=3, num_heads=3, num_classes=0, global_pool="").eval()
    table = resample_abs_pos_embed(model.pos_embed, [7, 11], [3, 5], num_prefix_tokens=1, antialias=False)
    timms.load_state_dict(model.state_dict() | {"pos_embed": table})
    torch.testing.assert_close(model.forward_features(images), timms.forward_features(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
def test_only_a_position_tells_where_a_patch_is(position: str) -> None:
    """Patches in another order give their tokens in that order, if there is no position; else they do not."""
    model, images = positioned(position=position), torch.randn(2, 3, 12, 20)
    tokens = model.forward_features(images)[:, 1:].unflatten(1, (3, 5))
    mirrored = images.unflatten(3, (5, 4)).flip(3).flatten(3)  # columns of patches, each as it was
    found = model.forward_features(mirrored)[:, 1:].unflatten(1, (3, 5)).flip(2)
    assert torch.allclose(tokens, found, atol=1e-4) == (position == "none")


def test_embedding_cut_patches_equals_the_convolution() -> None:
    from lomar.methods.targets import patchify

    model = tiny(in_chans=5)
    images = torch.randn(2, 5, 12, 20)
    torch.testing.assert_close(model.embed_patches(patchify(images, 4)), model.patch_embed(images))


def test_intermediates_are_the_outputs_of_the_blocks() -> None:
    model, images = tiny(), torch.randn(2, 3, 12, 20)
    final, maps = model.forward_intermediates(images, indices=[0, 2], norm=True)
    assert [m.shape for m in maps] == [(2, 12, 3, 5)] * 2
    torch.testing.assert_close(final, model.forward_features(images))
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), final[:, 1:])
    pairs = model.forward_intermediates(
        images, indices=1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True, norm=True
    )
    torch.testing.assert_close(torch.cat([pairs[0][1], pairs[0][0]], dim=1), final)
    early = model.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
    late = model.forward_intermediates(images, indices=[0], intermediates_only=True)
    torch.testing.assert_close(early[0], late[0])
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_timm_makes_a_feature_pyramid_of_it() -> None:
    model = timm.create_model("lomar_vit_tiny_patch16", features_only=True, out_indices=(2, 11))
    assert model.feature_info.channels() == [192, 192]
    assert model.feature_info.reduction() == [16, 16]
    assert [m.shape for m in model(torch.randn(1, 3, 48, 80))] == [(1, 192, 3, 5)] * 2


def test_pruning_keeps_what_comes_before() -> None:
    model, images = tiny(), torch.randn(2, 3, 12, 20)
    expected = model.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == 2
    torch.testing.assert_close(model.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, (3, 5)), expected)


def test_an_encoder_becomes_a_classifier_as_in_fine_tuning() -> None:
    """`norm` gives way to a fresh `fc_norm` after pooling; without classes the head is gone."""
    model = tiny()
    model.reset_classifier(7)
    names = set(model.state_dict())
    assert {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} <= names
    assert "norm.weight" not in names
    assert model.get_classifier() is model.head
    assert model(torch.randn(1, 3, 12, 20)).shape == (1, 7)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 12, 20)).shape == (1, 12)
    by_cls = tiny()
    by_cls.reset_classifier(7, "token")
    assert "norm.weight" in by_cls.state_dict()


def test_layer_groups_follow_the_depth() -> None:
    """timm's layer decay gives the stem the smallest rate, each block more, the head all (SPEC A.10)."""
    model = tiny(num_classes=7)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    by_name = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert by_name["cls_token"] == by_name["patch_embed.proj.weight"] == 0.5**4
    assert [by_name[f"blocks.{i}.attn.rpe.table"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert by_name["fc_norm.weight"] == by_name["head.weight"] == 1
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(model.cls_token)] == 0


def test_checkpointing_changes_memory_and_not_gradients() -> None:
    model, images = tiny(num_classes=7).train(), torch.randn(2, 3, 12, 20)
    model(images).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images).sum().backward()
    for parameter, grad in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_initial_weights_have_the_released_spread() -> None:
    """SPEC A.7: qkv as one Xavier matrix, the patch embedding as a linear layer, tables zero, cls N(0, 0.02)."""
    model = lomar.model.Encoder(32, 16, embed_dim=192, depth=1, num_heads=3, num_classes=0)
    block = model.blocks[0]
    for weight, fans in {
        block.attn.qkv.weight: 192 + 576,
        block.mlp.fc1.weight: 192 + 768,
        model.patch_embed.proj.weight: 192 + 768,
    }.items():
        bound = (6 / fans) ** 0.5
        assert bound * 0.99 < weight.abs().max() <= bound
    assert not block.attn.qkv.bias.any()
    assert 0 < model.patch_embed.proj.bias.abs().max() <= 768**-0.5
    assert not block.attn.rpe.table.any()
    assert 0.015 < model.cls_token.std() < 0.025


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="embed_dim 13 is not a multiple of num_heads 3"):
        tiny(embed_dim=13)
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        tiny(global_pool="max")
    with pytest.raises(
        ValueError, match="position is 'absolute'; it can be contextual, sincos, learned, shared-bias, block-bias"
    ):
        tiny(position="absolute")


def test_learned_positions_begin_small_and_learn_and_sines_and_cosines_stay() -> None:
    """SPEC D.1: of deviation 0.02, cls too."""
    torch.manual_seed(0)
    learned, fixed = Encoder(position="learned", num_classes=0, depth=1), tiny(position="sincos")
    table = learned.pos_embed
    assert table is not None and table.shape == (1, 197, 768)
    assert 0.0195 < table.std() < 0.0205 and 0.06 < table.abs().max() < 0.12  # not cut at few deviations
    assert 0.015 < table[0, 0].std() < 0.025
    learned(torch.randn(1, 3, 224, 224)).square().sum().backward()
    assert table.grad is not None and table.grad.abs().amax(dim=-1).gt(0).all()  # of every place
    assert fixed.pos_embed is not None and not fixed.pos_embed.requires_grad
    assert "pos_embed" in learned.no_weight_decay()


def test_torch_compile_and_export_take_it() -> None:
    model, images = tiny(), torch.randn(2, 3, 12, 20)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))
