"""Claims about taking features from an encoder without disturbing it."""

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lomar.model  # noqa: F401  # names our encoders to timm
from lomar.downstream.features import (
    Wanted,
    feature_reader,
    features_in_batches,
    frozen_features,
    has_cls,
    has_cls_of_layers,
    layer_count,
)

CPU = torch.device("cpu")
MEAN = [Wanted("mean")]


class Tokens(nn.Module):
    """A toy encoder whose tokens can be worked by hand: cls = 1000, then each pixel row as one token."""

    num_prefix_tokens = 1
    cls_token = 1000.0
    feature_info = ({"num_chs": 3},)

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3).eval()

    def forward_features(self, x: Tensor) -> Tensor:
        tokens = x[:, 0]  # (B, S, S): S tokens of width S
        return torch.cat([torch.full_like(tokens[:, :1], self.cls_token), self.drop(tokens)], dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.sum(dim=1)

    def forward_intermediates(self, x: Tensor, return_prefix_tokens: bool = False) -> None:
        raise NotImplementedError


def halved(pixels: Tensor) -> Tensor:
    return pixels.float() / 2


def pixels(count: int) -> Tensor:
    return torch.randint(256, (count, 1, 3, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_the_kinds_of_features_by_hand() -> None:
    images = pixels(5)
    good = torch.tensor([True, True, False, True, True])
    batches = [(images[:3], good[:3]), (images[3:], good[3:])]
    kinds = [Wanted(kind) for kind in ("mean", "cls", "cls+mean", "patches", "pooled")]
    (mean, cls, both, patches, pooled), kept = frozen_features(Tokens(), kinds, batches, halved, CPU)
    rows = images[:, 0].float() / 2
    thousand = torch.full((5, 3), 1000.0)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, rows.mean(dim=1))
    assert torch.equal(cls, thousand) and torch.equal(patches, rows)
    torch.testing.assert_close(both, torch.cat([thousand, rows.mean(dim=1)], dim=1))
    torch.testing.assert_close(pooled, 1000 + rows.sum(dim=1))
    assert torch.equal(kept, good)


def test_an_image_whose_features_are_not_finite_is_not_good() -> None:
    images = torch.zeros(3, 1, 3, 3)
    images[1, 0, 2, 2] = torch.inf
    _, kept = frozen_features(Tokens(), MEAN, [(images, torch.ones(3, dtype=torch.bool))], halved, CPU)
    assert kept.tolist() == [True, False, True]


def test_16_bit_pixels_reach_the_normalisation_unchanged() -> None:
    images = torch.full((2, 1, 3, 3), 40_000, dtype=torch.uint16)
    (features,), _ = frozen_features(Tokens(), MEAN, [(images, torch.ones(2, dtype=torch.bool))], halved, CPU)
    assert torch.equal(features, torch.full((2, 3), 20_000.0))


def test_training_flags_and_the_random_state_are_left_as_they_were() -> None:
    encoder = Tokens().train()
    encoder.frozen.eval()
    loader = DataLoader(TensorDataset(pixels(4), torch.ones(4, dtype=torch.bool)), batch_size=2)
    state = torch.get_rng_state()
    frozen_features(encoder, MEAN, loader, halved, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training and encoder.drop.training and not encoder.frozen.training


def test_training_flags_come_back_when_a_batch_fails() -> None:
    encoder = Tokens().train()
    with pytest.raises(IndexError):
        frozen_features(encoder, MEAN, [(torch.zeros(2), torch.ones(2))], halved, CPU)
    assert encoder.training and encoder.drop.training


def test_between_batches_gradients_flow_and_the_encoder_trains_on() -> None:
    encoder = Tokens().train()
    batches = [(pixels(2), torch.ones(2, dtype=torch.bool))] * 2
    for _ in features_in_batches(encoder, MEAN, batches, halved, CPU):
        assert encoder.training and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_the_features_can_be_trained_on() -> None:
    (features,), _ = frozen_features(Tokens(), MEAN, [(pixels(2), torch.ones(2))], halved, CPU)
    nn.Linear(3, 2)(features).sum().backward()


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batch"):
        frozen_features(Tokens(), MEAN, [], halved, CPU)


def timms(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=0).eval()
    return model


def swin() -> nn.Module:
    torch.manual_seed(0)
    settings = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    return SwinTransformer(num_classes=0, **settings).eval()


def images_for(model: nn.Module) -> Tensor:
    config = getattr(model, "pretrained_cfg", None) or {"input_size": (3, 64, 64)}
    return torch.randn(2, *config["input_size"], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "prefix", "cls", "of_layers"),
    [
        ("lomar_vit_tiny_patch16", 1, True, True),
        ("test_vit", 1, True, True),
        ("test_vit2", 1, False, False),  # a register and no cls token
        ("test_vit3", 1, False, False),  # the same, pooled by attention
        ("vit_small_patch16_dinov3", 5, True, True),  # four registers beside it
        ("deit_tiny_distilled_patch16_224", 2, True, True),
        ("cait_xxs24_224", 1, True, False),  # its cls token comes after the layers
        ("mixer_s32_224", 0, False, False),
    ],
)
def test_tokens_of_timms_models_are_told_apart(name: str, prefix: int, cls: bool, of_layers: bool) -> None:
    model = timms(name)
    images = images_for(model)
    assert (has_cls(model), has_cls_of_layers(model)) == (cls, of_layers)
    with torch.inference_mode():
        tokens = model.forward_features(images)
        kinds = [Wanted("mean"), Wanted("pooled"), *([Wanted("cls")] if cls else [])]
        mean, pooled, *rest = feature_reader(model, kinds)(images)
        torch.testing.assert_close(mean, tokens[:, prefix:].mean(dim=1))
        torch.testing.assert_close(pooled, model.forward_head(tokens, pre_logits=True))
        if cls:
            torch.testing.assert_close(rest[0], tokens[:, 0])


@pytest.mark.parametrize("make", [lambda: timms("test_resnet"), lambda: timms("test_convnext"), swin])
def test_maps_are_averaged_over_their_places(make) -> None:
    model = make()
    images = images_for(model)
    with torch.inference_mode():
        maps = model.forward_features(images)
        channels_last = isinstance(model, SwinTransformer)
        mean, pooled = feature_reader(model, [Wanted("mean"), Wanted("pooled")])(images)
        torch.testing.assert_close(mean, maps.mean(dim=(1, 2) if channels_last else (2, 3)))
        torch.testing.assert_close(pooled, model.forward_head(maps, pre_logits=True))
        first, last = feature_reader(model, [Wanted("mean", 1), Wanted("mean", layer_count(model))])(images)
        assert first.shape[1] < last.shape[1]
        torch.testing.assert_close(last, mean)


@pytest.mark.parametrize("name", ["lomar_vit_tiny_patch16", "test_vit", "vit_small_patch16_dinov3"])
def test_an_earlier_layer_is_its_blocks_output_after_the_final_norm(name: str) -> None:
    model = timms(name)
    images = images_for(model)
    kept: list[Tensor] = []
    handle = model.blocks[2].register_forward_hook(lambda module, inputs, output: kept.append(output))  # type: ignore
    with torch.inference_mode():
        wanted = [Wanted("cls", 3), Wanted("mean"), Wanted("mean", 3), Wanted("pooled"), Wanted("pooled", 3)]
        cls, last, mean, pooled, early = feature_reader(model, wanted)(images)
        handle.remove()
        third = model.norm(kept[0])  # type: ignore[operator]
        whole = model.forward_features(images)  # type: ignore[operator]
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(cls, third[:, 0])
    torch.testing.assert_close(mean, third[:, prefix:].mean(dim=1))  # type: ignore[misc]
    torch.testing.assert_close(last, whole[:, prefix:].mean(dim=1))  # type: ignore[misc]
    torch.testing.assert_close(pooled, model.forward_head(whole, pre_logits=True))  # type: ignore[operator]
    torch.testing.assert_close(early, cls if model.global_pool == "token" else mean)


def test_the_last_layer_is_the_same_by_number_and_without() -> None:
    model = timms("test_vit3")  # pools by attention, which a mean would not be
    images = images_for(model)
    with torch.inference_mode():
        one, two = feature_reader(model, [Wanted("pooled"), Wanted("pooled", layer_count(model))])(images)
        (alone,) = feature_reader(model, [Wanted("pooled")])(images)
    assert torch.equal(one, two)
    torch.testing.assert_close(one, alone)


def test_patches_are_read_where_the_last_features_are_the_cls_token_alone() -> None:
    model = timms("pit_ti_224")
    images = images_for(model)
    with torch.inference_mode():
        assert model.forward_features(images).shape[1] == 1  # type: ignore[operator]
        mean, patches = feature_reader(model, [Wanted("mean"), Wanted("patches")])(images)
    assert patches.shape == (2, 49, 256)
    torch.testing.assert_close(mean, patches.mean(dim=1))


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("test_vit", Wanted("cls", 7), "there is no layer 7; the model has layers 1 to 6"),
        ("test_vit", Wanted("best"), "features are 'best'; they can be pooled, cls, mean, cls+mean, patches"),
        ("test_vit2", Wanted("cls"), "the model has no cls token for 'cls'; it can be pooled, mean or patches"),
        ("test_resnet", Wanted("cls+mean"), "the model has no cls token for 'cls+mean'"),
        ("cait_xxs24_224", Wanted("cls", 3), "the model has no cls token after layer 3, only after the last"),
    ],
)
def test_what_a_model_does_not_have_is_refused(name: str, wanted: Wanted, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        feature_reader(timms(name), [wanted])


def test_features_of_several_scales_can_be_pooled_alone() -> None:
    model = timms("crossvit_tiny_240")
    images = images_for(model)
    with torch.inference_mode():
        assert feature_reader(model, [Wanted("pooled")])(images)[0].shape == (2, 288)
        with pytest.raises(ValueError, match="neither tokens nor maps; they can be pooled"):
            feature_reader(model, [Wanted("mean")])(images)
