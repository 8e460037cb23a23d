"""Claims about exported folders. The judge is timm, which loads them as it loads any."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import _hub
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

import lomar
from lomar.data.decode import PixelFormat
from lomar.data.loader import centre_crops
from lomar.data.opening import open_source
from lomar.errors import UserError
from lomar.interop import hub
from lomar.interop.card import INSTALL, Accuracy, Background
from lomar.interop.hub import FILES, write_hub_folder
from lomar.interop.weights import describe
from lomar.model import Encoder

SMALL: dict[str, Any] = {
    "img_size": (28, 20),
    "patch_size": 4,
    "in_chans": 5,
    "num_classes": 0,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
}
BEIT: dict[str, Any] = {"img_size": 20, "key_bias": False, "init_values": 0.1}


def encoder(scale: float = 65535.0, **changes: Any) -> Encoder:
    """A small encoder whose every tensor matters."""
    torch.manual_seed(0)
    made = Encoder(**SMALL | changes).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn_like(parameter) / 8
    channels = made.architecture["in_chans"]
    classes = [f"class {n}" for n in range(made.num_classes)]
    return describe(made, (0.4,) * channels, (0.2,) * channels, scale, classes)


def images_for(model: Encoder, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, model.architecture["in_chans"], *model.patch_embed.img_size)


def opened(folder: Path, **arguments: Any) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 7},
        {"num_classes": 7, "global_pool": "token"},
        {"key_bias": False, "init_values": 0.1, "mlp_ratio": 3.0},
        {"in_chans": 3, "img_size": 20, "weight_init": "beit"},
        {"in_chans": 1, "num_classes": 7},
        {"position": "sincos", "key_bias": False},
        {"position": "learned", "key_bias": False, "weight_init": "mocov3"},
        {"position": "none", "key_bias": False, "num_classes": 7},
        {"position": "shared-bias"},
        {"position": "block-bias", "num_classes": 7, "bias_grid": (3, 2)},
        {"position": "block-bias", "key_bias": False, "init_values": 0.1},
    ],
    ids=str,
)
def test_timm_computes_the_same_to_the_last_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    """Of what no architecture of timm's holds; at its own size and another."""
    ours = encoder(**changes)
    written = write_hub_folder(tmp_path / "hub", ours, Background())
    theirs = opened(tmp_path / "hub")
    assert written.needs_lomar and written.difference == 0 and type(theirs) is Encoder
    other = torch.randn(1, ours.architecture["in_chans"], 12, 32)
    with torch.inference_mode():
        for images in (images_for(ours), other):
            assert torch.equal(theirs(images), ours(images))
            assert torch.equal(theirs.forward_features(images), ours.forward_features(images))


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "sincos"},
        {"position": "sincos", "num_classes": 7, "init_values": 0.3},
        {"position": "sincos", "num_classes": 7, "global_pool": "token", "in_chans": 3},
        {"position": "learned", "global_pool": "token", "weight_init": "dino"},
        {"position": "none"},
        {"position": "shared-bias", **BEIT},
        {"position": "shared-bias", **BEIT, "bias_grid": (3, 3)},
        {"position": "block-bias", **BEIT, "num_classes": 7},
        {"position": "block-bias", **BEIT, "init_values": None, "num_classes": 7, "global_pool": "token"},
    ],
    ids=str,
)
def test_what_timm_can_hold_needs_no_lomar(changes: dict[str, Any], tmp_path: Path) -> None:
    ours = encoder(**changes)
    written = write_hub_folder(tmp_path / "hub", ours, Background())
    theirs = opened(tmp_path / "hub")
    assert not written.needs_lomar and type(theirs) is (Beit if "bias" in changes["position"] else VisionTransformer)
    images = images_for(ours)
    with torch.inference_mode():
        assert torch.allclose(theirs(images), ours(images), atol=1e-5)
        assert torch.allclose(theirs.forward_features(images), ours.forward_features(images), atol=1e-5)


@pytest.mark.parametrize("position", ["contextual", "sincos", "learned", "shared-bias", "block-bias"])
def test_timm_makes_it_for_another_size_as_lomar_does(position: str, tmp_path: Path) -> None:
    ours = encoder(position=position, key_bias=position == "block-bias")
    assert write_hub_folder(tmp_path / "hub", ours, Background()).needs_lomar
    theirs = opened(tmp_path / "hub", img_size=(16, 36))
    ours.set_input_size((16, 36))
    images = images_for(ours)
    with torch.inference_mode():
        assert torch.allclose(theirs(images), ours(images), atol=1e-6)
    assert theirs.pretrained_cfg["input_size"] == (5, 16, 36)


@pytest.mark.parametrize("size", [(40, 20), (56, 40)])
def test_of_maes_vit_other_sizes_go_in(size: tuple[int, int], tmp_path: Path) -> None:
    """Nearly with the same result, as the tables of positions are resized otherwise; but far from wrong positions."""
    ours = encoder(position="sincos")
    write_hub_folder(tmp_path / "hub", ours, Background())
    theirs, images = opened(tmp_path / "hub"), torch.randn(2, 5, *size)
    with torch.inference_mode():
        wanted = ours.forward_features(images)

        def difference() -> float:
            return float((theirs.forward_features(images) - wanted).abs().max() / wanted.abs().max())

        assert 0 < difference() < 0.04
        theirs.pos_embed[:, 1:] = theirs.pos_embed[:, 1:].unflatten(1, (7, 5)).flip(2).flatten(1, 2)
        assert difference() > 0.15  # columns in the wrong order


def test_a_size_that_timm_names_is_called_so(tmp_path: Path) -> None:
    shape = {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16, "img_size": 32, "in_chans": 3}
    assert (
        write_hub_folder(tmp_path, encoder(position="sincos", **shape), Background()).architecture
        == "vit_tiny_patch16_224"
    )


@pytest.mark.parametrize("changes", [{}, {"position": "sincos"}, {"position": "block-bias", **BEIT}], ids=str)
def test_the_hub_serves_it(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = encoder(num_classes=7, **changes)
    write_hub_folder(tmp_path, ours, Background())
    asked = []

    def download(repo_id: str, filename: str, **others: Any) -> str:
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr(_hub, "hf_hub_download", download)
    theirs = timm.create_model("hf-hub:someone/lomar", pretrained=True).eval()
    assert set(asked) == {("someone/lomar", "config.json"), ("someone/lomar", "model.safetensors")}
    images = images_for(ours)
    with torch.inference_mode():
        assert torch.allclose(theirs(images), ours(images), atol=1e-5)
    assert theirs.pretrained_cfg["label_names"] == [f"class {n}" for n in range(7)]


def test_the_weights_load_as_a_checkpoint(tmp_path: Path) -> None:
    ours = encoder(num_classes=7)
    write_hub_folder(tmp_path, ours, Background())
    config = json.loads((tmp_path / "config.json").read_text())
    theirs = timm.create_model(
        config["architecture"], checkpoint_path=tmp_path / "model.safetensors", num_classes=7, **config["model_args"]
    ).eval()
    images = images_for(ours)
    with torch.inference_mode():
        assert torch.equal(theirs(images), ours(images))


@pytest.mark.parametrize("where", ["", "model.safetensors"])
@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "lomar_vit"),
        ({"num_classes": 7, "global_pool": "token"}, "lomar_vit"),
        ({"position": "sincos"}, "vit_base_patch16_224"),
        ({"position": "sincos", "num_classes": 7, "init_values": 0.3}, "vit_base_patch16_224"),
        ({"position": "none", "num_classes": 7}, "vit_base_patch16_224"),
        ({"position": "shared-bias", **BEIT}, "beit_base_patch16_224"),
        ({"position": "shared-bias", **BEIT, "bias_grid": (3, 3)}, "beit_base_patch16_224"),
        ({"position": "block-bias", **BEIT, "num_classes": 7}, "beit_base_patch16_224"),
        (
            {"position": "block-bias", **BEIT, "init_values": None, "num_classes": 7, "global_pool": "token"},
            "beit_base_patch16_224",
        ),
    ],
    ids=str,
)
def test_what_was_exported_is_read_by_lomar_as_well(
    changes: dict[str, Any], architecture: str, where: str, tmp_path: Path
) -> None:
    """Whatever names its tensors have: the folder, and the file."""
    ours = encoder(**changes)
    assert write_hub_folder(tmp_path, ours, Background()).architecture == architecture
    again = lomar.load(tmp_path / where)
    images = images_for(ours)
    with torch.inference_mode():
        assert torch.equal(again(images), ours(images))
        assert torch.equal(again.forward_features(images), ours.forward_features(images))
    assert again.pretrained_cfg == ours.pretrained_cfg


def test_a_classifier_that_lost_its_head_is_read_with_its_norm(tmp_path: Path) -> None:
    ours = encoder(num_classes=7)
    ours.reset_classifier(0)
    write_hub_folder(tmp_path, ours, Background())
    again, images = lomar.load(tmp_path), images_for(ours)
    with torch.inference_mode():
        assert torch.equal(again(images), ours(images))


@pytest.mark.parametrize("global_pool", ["avg", "token"])
@pytest.mark.parametrize("position", ["contextual", "sincos"])
def test_a_classifier_gives_its_features_where_none_of_its_classes_are_wanted(
    position: str, global_pool: str, tmp_path: Path
) -> None:
    """`num_classes=0`, which transformers asks for too, keeps the norm that the classifier has."""
    ours = encoder(num_classes=7, position=position, global_pool=global_pool)
    write_hub_folder(tmp_path, ours, Background())
    theirs = opened(tmp_path, num_classes=0)
    ours.reset_classifier(0)
    images = images_for(ours)
    with torch.inference_mode():  # timm's own model, where there is one, works its attention out otherwise
        torch.testing.assert_close(theirs(images), ours(images))


@pytest.mark.parametrize("classes", [0, 7])
def test_another_number_of_classes_has_a_new_head_on_the_same_tokens(classes: int, tmp_path: Path) -> None:
    ours = encoder(num_classes=classes)
    write_hub_folder(tmp_path, ours, Background())
    theirs = opened(tmp_path, num_classes=4)
    images = images_for(ours)
    with torch.inference_mode():
        assert theirs(images).shape == (2, 4)
        mine, others = (m.forward_intermediates(images, intermediates_only=True)[-1] for m in (ours, theirs))
        assert torch.equal(mine, others)


@pytest.mark.parametrize("changes", [{}, {"num_classes": 7}, {"position": "block-bias", **BEIT}], ids=str)
def test_it_is_a_backbone_of_features(changes: dict[str, Any], tmp_path: Path) -> None:
    ours = encoder(**changes)
    write_hub_folder(tmp_path, ours, Background())
    backbone = opened(tmp_path, features_only=True, out_indices=(0, 2))
    images = images_for(ours)
    with torch.inference_mode():
        maps = ours.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(backbone(images), maps, strict=True))


@pytest.mark.parametrize("changes", [{}, {"num_classes": 60, "in_chans": 3, "scale": 255.0}, {"position": "sincos"}])
def test_the_code_of_the_card_runs(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = encoder(**changes)
    write_hub_folder(tmp_path / "mine", ours, Background({"method": "lomar", "mask_ratio": 0.8}))
    monkeypatch.chdir(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter
    pixels = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((60, 44)).save("photo.jpg", exif=turned)
    card = (tmp_path / "mine" / "README.md").read_text()
    names: dict[str, Any] = {}
    for block in card.split("```python\n")[1:]:
        exec(block.split("```")[0], names)
    assert names["tokens"].shape == (1, 36, 24)
    assert ("logits" in names) == bool(ours.num_classes) != ("features" in names)
    assert card.startswith("---\nlibrary_name: timm\npipeline_tag: image-")
    assert "| mask_ratio | 0.8 |" in card and (INSTALL in card) == ("position" not in changes)
    if "scale" in changes:
        wanted = torch.stack([names["transform"](Image.open("photo.jpg").transpose(Image.Transpose.ROTATE_270))])
        assert torch.equal(names["images"], wanted)  # upright


def test_the_card_tells_what_a_user_must_know(tmp_path: Path) -> None:
    write_hub_folder(tmp_path, encoder(num_classes=60), Background())
    card = (tmp_path / "README.md").read_text()
    for text in (
        "A plain ViT cannot hold its contextual relative position encoding (RPE)",
        "It needs lomar: `pip install .` in a clone of lomar's source (it is not on PyPI).\n",
        "\n```python\nimport lomar.model\n```",
        "- 5 channels, 28 x 20 px; other sizes, multiples of 4, go in as they are",
        "(pixels / 65535 - mean) / deviation, with mean 0.4, 0.4, 0.4, 0.4, 0.4 and deviation",
        "- timm's transforms know nothing of the 65535: divide before they normalise",
        "\n49. class 49\n\nThe other 10 are under `label_names` in config.json.",
    ):
        assert text in card
    assert "## Pretraining" not in card and "## Fine-tuning" not in card and "accuracy" not in card
    assert "\n- arxiv:2206.00790\n" in card and "license" not in card
    write_hub_folder(tmp_path, encoder(position="block-bias", **BEIT), Background())
    card = (tmp_path / "README.md").read_text()
    assert "timm alone loads it, as its `beit_base_patch16_224`" in card and "import lomar" not in card
    assert "`img_size=` of `timm.create_model` resizes its tables for other sizes, multiples of 4" in card


def test_the_card_tells_what_is_known_of_the_weights(tmp_path: Path) -> None:
    judged = Accuracy(0.8125, 96, (28, 20))
    known = Background({"method": "mae", "epochs": 20.0}, {"layer_decay": 0.65}, judged, "cc-by-4.0")
    write_hub_folder(tmp_path, encoder(num_classes=7), known)
    card = (tmp_path / "README.md").read_text()
    front = card.split("---\n")[1].splitlines()
    assert front[2:] == ["license: cc-by-4.0", "tags:", "- timm", "- lomar", "- arxiv:2111.06377"]
    for text in (
        "\nTop-1 accuracy 81.2% of 96 images at 28 x 20 px.\n",
        "\n## Pretraining\n\n| option | value |\n|---|---|\n| method | mae |\n| epochs | 20.0 |\n",
        "\n## Fine-tuning\n\n| option | value |\n|---|---|\n| layer_decay | 0.65 |\n",
    ):
        assert text in card


@pytest.mark.parametrize("size", [224, 256])
def test_timm_makes_of_a_photograph_what_lomar_evaluates(size: int, tmp_path: Path) -> None:
    """At 224 pixels the middle, at 256 the whole of the shorter side; their boxes are up to a pixel apart."""
    ours = encoder(position="none", img_size=size, patch_size=32, in_chans=3, scale=255.0)
    write_hub_folder(tmp_path / "hub", ours, Background())
    (tmp_path / "photos").mkdir()
    small = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    Image.fromarray(small).resize((541, 367), Image.Resampling.BICUBIC).save(tmp_path / "photos" / "a.png")
    config = timm.data.resolve_model_data_config(opened(tmp_path / "hub"))
    theirs = timm.data.create_transform(**config, is_training=False)(Image.open(tmp_path / "photos" / "a.png"))
    source = open_source(str(tmp_path / "photos"))

    def away(share: float) -> float:
        """Mean distance of pixels, of 255, from lomar's central crop."""
        ((pixels, _),) = centre_crops(source, PixelFormat(3, "uint8"), size, workers=0, share=share)
        return float((theirs * 0.2 + 0.4 - pixels[0] / 255).abs().mean() * 255)

    right, wrong = (0.875, 1.0) if size == 224 else (1.0, 0.875)
    assert away(right) < 2 and away(wrong) > 10


def test_timm_is_told_how_images_are_normalised(tmp_path: Path) -> None:
    write_hub_folder(tmp_path, encoder(num_classes=7), Background())
    config = timm.data.resolve_model_data_config(opened(tmp_path))
    assert config["mean"] == [0.4] * 5 and config["std"] == [0.2] * 5 and config["input_size"] == (5, 28, 20)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["lomar"]["scale"] == 65535.0
    assert "num_classes" not in told["model_args"]  # transformers would give it twice


def test_what_timm_computes_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub"
    monkeypatch.setattr(hub, "_difference", lambda folder, encoder: 0.5)
    with pytest.raises(
        UserError, match=r"^timm .* otherwise from what was exported, by 5\.0e-01 of the largest output$"
    ):
        write_hub_folder(folder, encoder(), Background())
    assert not folder.exists()


def test_differences_are_over_the_largest_output_however_small(tmp_path: Path) -> None:
    ours = encoder(num_classes=7)
    with torch.no_grad():
        for parameter in ours.head.parameters():
            parameter *= 1e-7
    write_hub_folder(tmp_path, ours, Background())
    with torch.no_grad():
        ours.head.weight[0] = 0
    assert hub._difference(tmp_path, ours) > 0.1


def test_a_comparison_with_nan_is_none(tmp_path: Path) -> None:
    ours = encoder(num_classes=7)
    with torch.no_grad():
        ours.head.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="computes otherwise from what was exported, by nan"):
        write_hub_folder(tmp_path / "hub", ours, Background())


def test_for_a_timm_that_lacks_an_argument_it_is_lomars_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def older(name: str, **arguments: Any) -> torch.nn.Module:
        config = (Path(name.removeprefix("local-dir:")) / "config.json").read_text()
        if "dynamic_img_size" in config:
            raise TypeError("unexpected keyword argument 'dynamic_img_size'")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", older)
    assert write_hub_folder(tmp_path, encoder(position="sincos"), Background()).architecture == "lomar_vit"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(FILES)
