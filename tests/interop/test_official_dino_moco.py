"""Claims about the encoders that DINO and MoCo v3 released; timm's vision transformer judges them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import released
import timm.data
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import lomar as package
from lomar.errors import UserError
from lomar.interop.initial import initialise
from lomar.interop.official import official_state, read_official
from lomar.interop.weights import load_reconstructor
from lomar.methods.recipes import RECIPES, compose
from lomar.methods.reconstruction import MaskedReconstruction

Command = Callable[..., Any]
SIZES = {"width": 128, "depth": 3, "patch": 8, "image": 40}  # two heads, as every released one of 64
TRAINING = {"optimizer": {"state": {}}, "epoch": 300}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def timms(state: released.State, classes: int = 0) -> VisionTransformer:
    """The same transformer of timm's, with these weights, all of them and no others."""
    model = VisionTransformer(40, 8, embed_dim=128, depth=3, num_heads=2, num_classes=classes, global_pool="token")
    model.load_state_dict(state)
    return model.eval()


def images(side_px: int = 40) -> Tensor:
    return torch.randn(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


def of_table(table: Tensor, **others: Tensor) -> released.State:
    return released.plain(**SIZES) | {"pos_embed": table} | others


def lomar_with(position: str) -> MaskedReconstruction:
    """LoMaR at the fixtures' size, with another kind of position."""
    recipe = RECIPES["lomar"]
    sizes = {"method": "lomar", "model": "128x3x2", "image_size": 40, "patch_size": 8, "window_size": 3}
    pixels = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    values = {**recipe.full, **recipe.options, **sizes, **pixels, "position": position}
    return compose(values, 0, 255.0).build()


LAYOUTS = {
    "DINO, teacher and student": lambda: {**released.dino_whole(**SIZES), **TRAINING, "dino_loss": {}},
    "DINO, a teacher that processes wrapped": lambda: {
        "teacher": released.prefixed("module.", released.dino_whole(**SIZES)["teacher"])
    },
    "DINO, its encoder": lambda: released.plain(**SIZES),
    "MoCo v3, all of pretraining": lambda: {"state_dict": released.moco_whole(**SIZES), "arch": "vit_base", **TRAINING},
    "MoCo v3, converted for DeiT": lambda: {"model": released.moco(**SIZES)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_features_are_those_of_timms_transformer(layout: str, tmp_path: Path) -> None:
    """Of the cls token, from the teacher or the encoder that is trained, wherever they are in the file."""
    encoder = package.load(saved(tmp_path / "file.pth", LAYOUTS[layout]()))
    state = released.plain(**SIZES) if "DINO" in layout else released.moco(**SIZES)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images()), timms(state)(images()), atol=2e-5, rtol=1e-5)
    assert encoder.pos_embed.requires_grad == ("DINO" in layout)
    made = encoder.architecture
    expected = ("learned", "dino") if "DINO" in layout else ("sincos", "mocov3")
    assert (made["position"], made["weight_init"]) == expected and not encoder.training
    config = timm.data.resolve_model_data_config(encoder)
    assert (config["mean"], config["input_size"]) == ((0.485, 0.456, 0.406), (3, 40, 40))


def test_of_teacher_and_student_the_teacher_is_read_and_the_rest_is_left_out(tmp_path: Path) -> None:
    whole = released.dino_whole(**SIZES)
    found = read_official(saved(tmp_path / "file.pth", whole | TRAINING))
    assert found.kind == "DINO, an encoder alone" and found.method is None and found.composition is None
    assert torch.equal(found.encoder.cls_token, whole["teacher"]["backbone.cls_token"])
    assert not torch.equal(found.encoder.cls_token, whole["student"]["module.backbone.cls_token"])
    assert sorted(found.dropped) == ["epoch", "head", "optimizer", "student"]
    assert found.notes == ["2 heads of width 64 are assumed, as released; --heads says otherwise"]


def test_of_moco_v3_the_trained_encoder_is_read_without_its_projector(tmp_path: Path) -> None:
    state = released.moco_whole(**SIZES)
    found = read_official(saved(tmp_path / "file.pth.tar", {"state_dict": state, **TRAINING}))
    assert found.kind == "MoCo v3, an encoder alone" and found.method is None
    assert torch.equal(found.encoder.cls_token, state["module.base_encoder.cls_token"])
    assert sorted(found.dropped) == ["base_encoder.head", "epoch", "momentum_encoder", "optimizer", "predictor"]


BY_COLUMN, BY_ROW = released.sincos(5, 128), released.moco(**SIZES)["pos_embed"]
MOVED = 0.1 * torch.randn(1, 26, 128, generator=torch.Generator().manual_seed(1))
CLASSIFIER = {"head.weight": torch.ones(10, 128), "head.bias": torch.zeros(10)}
FC_NORM = {"fc_norm.weight": torch.ones(128), "fc_norm.bias": torch.zeros(128)}
POOLED = released.without(of_table(MOVED, **CLASSIFIER, **FC_NORM), ["norm.weight", "norm.bias"])


@pytest.mark.parametrize(
    ("state", "kind", "pool"),
    [
        (of_table(BY_COLUMN), "MAE, an encoder alone", "avg"),
        (of_table(BY_COLUMN.half()), "MAE, an encoder alone", "avg"),
        (of_table(BY_ROW), "MoCo v3, an encoder alone", "token"),
        (of_table(BY_ROW.half()), "MoCo v3, an encoder alone", "token"),
        (of_table(MOVED), "DINO, an encoder alone", "token"),
        (of_table(50 * MOVED), "DINO, an encoder alone", "token"),
        (of_table(BY_COLUMN + MOVED, **CLASSIFIER), "MAE, fine-tuned", "token"),
        (of_table(BY_ROW + MOVED, **CLASSIFIER), "MoCo v3, fine-tuned", "token"),
        (of_table(MOVED, **CLASSIFIER), "DINO, fine-tuned", "token"),
        (POOLED, "MAE, fine-tuned", "avg"),
    ],
)
def test_whose_plain_encoder_it_is_its_positions_tell(
    state: released.State, kind: str, pool: str, tmp_path: Path
) -> None:
    """SPEC B.3, D.1 and D.2. Fine-tuning moves them a little; a norm of pooled patches is MAE's, whatever they are."""
    found = read_official(saved(tmp_path / "file.pth", state))
    assert (found.kind, found.encoder.global_pool) == (kind, pool)
    torch.testing.assert_close(found.encoder.pos_embed.detach(), state["pos_embed"].float(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("family", "width", "heads"),
    [
        ("DINO", 192, 3),
        ("DINO", 384, 6),
        ("DINO", 768, 12),
        ("MoCo v3", 384, 12),
        ("MoCo v3", 768, 12),
        ("MoCo v3", 1024, 16),
        ("MoCo v3", 1280, 16),
    ],
)
def test_heads_are_the_released_ones_unless_they_are_given(family: str, width: int, heads: int, tmp_path: Path) -> None:
    """MoCo v3's small model has twelve."""
    state = {"DINO": released.plain, "MoCo v3": released.moco}[family](width=width, depth=1, image=4, patch=2, mlp=1)
    path = saved(tmp_path / "file.pth", state)
    found = read_official(path)
    assert found.kind.startswith(family) and found.encoder.architecture["num_heads"] == heads
    assert f"{heads} heads of width {width // heads} are assumed" in found.notes[0]
    assert read_official(path, heads=1).encoder.architecture["num_heads"] == 1


@pytest.mark.parametrize("family", ["DINO", "MoCo v3"])
def test_a_classifier_comes_along_and_on_learned_positions_says_whose_it_may_be(family: str, tmp_path: Path) -> None:
    """MoCo v3's linear evaluation keeps its encoder and head under state_dict, as processes wrapped them."""
    state = {"DINO": released.plain, "MoCo v3": released.moco}[family](**SIZES, classes=10)
    content = {"state_dict": released.prefixed("module.", state)} if family == "MoCo v3" else {"model": state}
    found = read_official(saved(tmp_path / "file.pth", content))
    assert found.kind == f"{family}, fine-tuned"
    with torch.inference_mode():
        expected = timms(state, classes=10)(images())
        torch.testing.assert_close(found.encoder(images()), expected, atol=2e-5, rtol=1e-5)
    noted = "a classifier on learned positions is read as DINO's encoder fine-tuned; DeiT's are no different"
    assert (noted in found.notes) == (family == "DINO")


def test_learned_positions_are_resized_to_the_size_and_not_by_dinos_factor(tmp_path: Path) -> None:
    """By torch's bicubic interpolation; D.1 has the other, which differs a little."""
    state = released.plain(**SIZES)
    encoder = package.load(saved(tmp_path / "file.pth", state))
    encoder.set_input_size(56)
    places = state["pos_embed"][:, 1:].reshape(1, 5, 5, 128).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(places, (7, 7), mode="bicubic", align_corners=False)
    expected = torch.cat([state["pos_embed"][:, :1], expected.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(encoder.pos_embed.detach(), expected)


WHOLE = released.moco_whole(**SIZES)
STEM = {f"patch_embed.proj.{i}.weight": torch.ones(8, 3, 3, 3) for i in range(3)}
REFUSED = {
    "a student alone": ({"student": released.dino_whole(**SIZES)["student"]}, "holds no weights: tensors by name, at"),
    "DINO's head alone": ({"teacher": {"head.mlp.0.weight": torch.ones(3, 3)}}, "is no checkpoint of LoMaR, MAE, BEiT"),
    "a projector alone": (
        {"state_dict": {k: v for k, v in WHOLE.items() if "predictor" in k}},
        "is no checkpoint of LoMaR, MAE, BEiT, DINO or MoCo v3: of its",
    ),
    "no block": (
        {"state_dict": {k: v for k, v in WHOLE.items() if "base_encoder.blocks.1." not in k}},
        "looks like MoCo v3, an encoder alone, but it has no blocks.1",
    ),
    "convolutions before the blocks": (
        {"model": released.without(released.moco(**SIZES), ["patch_embed.proj.weight"]) | STEM},
        "looks like MoCo v3, an encoder alone, but it has no patch_embed.proj.weight",
    ),
    "another model's token": (
        released.plain(**SIZES) | {"dist_token": torch.ones(1, 1, 128)},
        "looks like DINO, an encoder alone, but dist_token does not belong to it",
    ),
    "a decoder": (
        released.plain(**SIZES) | {"decoder_pred.weight": torch.ones(192, 64)},
        "looks like MAE, pretrained, but it has no",
    ),
    "LoMaR's last layer": (
        released.plain(**SIZES) | {"encoder_pred.weight": torch.ones(192, 128)},
        "mixes the weights of two models: pos_embed is DINO's, encoder_pred.weight is not",
    ),
    "no square": (
        of_table(torch.ones(1, 28, 128)),
        "looks like DINO, an encoder alone, but its pos_embed has 27 places",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_encoder_is_one_line(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    path = saved(tmp_path / "file.pth", content)
    with pytest.raises(UserError) as caught:
        read_official(path)
    told = str(caught.value)
    assert message in told and str(path) in told and "\n" not in told


def test_what_needs_all_of_masked_pretraining_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pth", released.dino_whole(**SIZES))
    with pytest.raises(UserError, match="holds DINO, an encoder alone: without mask token and head nothing can be"):
        load_reconstructor(path)
    with pytest.raises(UserError, match="it does not predict pixels, so --target means nothing"):
        read_official(path, target="pixels")
    with pytest.raises(UserError, match="it has no decoder, so --decoder-heads means nothing"):
        read_official(path, decoder_heads=2)


@pytest.mark.parametrize("layout", ["DINO, teacher and student", "MoCo v3, all of pretraining"])
def test_convert_writes_what_loads_as_the_file_does_and_goes_back(layout: str, lomar: Command, tmp_path: Path) -> None:
    """The way back has the names of the encoder alone; those of MoCo v3 are MAE's."""
    file, out = saved(tmp_path / "file.pth", LAYOUTS[layout]()), tmp_path / "mine"
    outcome = lomar("convert --model", file, "--out", out)
    assert outcome.status == 0, outcome.err
    family = layout.split(",")[0]
    assert outcome.out.splitlines()[0].startswith(f"{file}: {family}, an encoder alone; 42 tensors")
    assert [path.name for path in out.iterdir()] == ["encoder.safetensors"]
    made, source = package.load(out), package.load(file)
    with torch.inference_mode():
        assert torch.equal(made(images()), source(images()))
    assert made.pretrained_cfg == source.pretrained_cfg and made.architecture == source.architecture
    back = tmp_path / "back.pth"
    outcome = lomar("convert --to official --model", out, "--out", back)
    name = {"DINO": "DINO", "MoCo v3": "MAE"}[family]
    assert outcome.out == f"{back} written: the encoder, 42 tensors under {name}'s names\n"
    state = released.plain(**SIZES) if family == "DINO" else released.moco(**SIZES)
    found = torch.load(back, weights_only=True)["model"]
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    assert read_official(back).kind == f"{family}, an encoder alone"


def test_convert_resizes_learned_positions(lomar: Command, tmp_path: Path) -> None:
    file, out = saved(tmp_path / "file.pth", released.plain(**SIZES)), tmp_path / "mine.safetensors"
    outcome = lomar("convert --model", file, "--out", out, "--image-size 64")
    assert "  resized to 64 px: pos_embed" in outcome.out.splitlines()
    made, source = package.load(out), package.load(file)
    source.set_input_size(64)
    assert made.pretrained_cfg["input_size"] == (3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(made(images(64)), source(images(64)))


@pytest.mark.parametrize(("position", "unused"), [("learned", 0), ("contextual", 1)])
def test_init_takes_all_of_the_encoder_where_positions_are_learned(position: str, unused: int, tmp_path: Path) -> None:
    """LoMaR's own positions begin fresh, and the file's are not used."""
    file, method = saved(tmp_path / "file.pth", released.dino_whole(**SIZES)), lomar_with(position)
    lines = initialise(method, file)
    assert lines[0].endswith(f"{42 - unused} of 42 tensors taken")
    assert ("  not used: pos_embed" in lines) == bool(unused)
    own, state = method.architecture.encoder.state_dict(), released.plain(**SIZES)
    assert all(torch.equal(own[name], state[name]) for name in state.keys() & own.keys())


@pytest.mark.parametrize(
    ("state", "position", "line"),
    [
        (released.dino_whole, "sincos", "positions were learned and are to be sincos: the file's are taken, and stay"),
        (released.moco, "learned", "positions were sincos and are to be learned: the file's are taken, and learn"),
    ],
)
def test_positions_of_another_kind_are_taken_and_told(
    state: Callable[..., Any], position: str, line: str, tmp_path: Path
) -> None:
    file, method = saved(tmp_path / "file.pth", state(**SIZES)), lomar_with(position)
    assert any(line in told for told in initialise(method, file))
    own, theirs = method.architecture.encoder.state_dict()["pos_embed"], package.load(file).state_dict()["pos_embed"]
    assert torch.equal(own, theirs)


def test_a_method_with_learned_positions_goes_out_as_its_encoder() -> None:
    """No masked pretraining was released whose names it could have."""
    assert official_state(lomar_with("learned")).keys() == released.plain(**SIZES).keys()
