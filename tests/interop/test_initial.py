"""Claims about going on from weights that are there."""

from pathlib import Path
from typing import Any

import pytest
import released
import torch
from torch import Tensor

from lomar.errors import UserError
from lomar.interop.initial import initial_options, initialise
from lomar.interop.weights import load, save_encoder, save_reconstructor
from lomar.methods.composition import Composition
from lomar.methods.recipes import IMAGENET_MEAN, IMAGENET_STD, RECIPES, compose

DECODER = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 1}
ENCODER = "architecture.encoder."


def composition(recipe: str = "lomar", **values: Any) -> Composition:
    """A recipe at the size of the fixtures."""
    usual = {"method": recipe, "model": "48x2x3", "image_size": 32, "patch_size": 4}
    usual |= DECODER | {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    recipes = RECIPES[recipe]
    return compose(dict(recipes.full) | dict(recipes.options) | usual | values, 20, values.pop("scale", 255.0))


def saved(path: Path, state: released.State) -> Path:
    torch.save({"model": state}, path)
    return path


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are the same in both."""
    return {
        n for n in state.keys() & other.keys() if state[n].shape == other[n].shape and torch.equal(state[n], other[n])
    }


@pytest.mark.parametrize("where", ["", "reconstructor.safetensors"])
def test_a_run_gives_all_its_weights(where: str, tmp_path: Path) -> None:
    trained, fresh = composition().build(), composition().build()
    save_reconstructor(tmp_path / "reconstructor.safetensors", trained, composition())
    save_encoder(tmp_path / "encoder.safetensors", trained.architecture.encoder, composition())
    lines = initialise(fresh, tmp_path / where)
    count = len(trained.state_dict())
    assert lines == [f"--init {tmp_path / where}: {count} of {count} tensors taken"]
    assert equal(fresh.state_dict(), trained.state_dict()) == trained.state_dict().keys()


def test_an_encoder_leaves_mask_token_and_head_fresh(tmp_path: Path) -> None:
    trained, fresh = composition().build(), composition().build()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    save_encoder(tmp_path / "encoder.safetensors", trained.architecture.encoder, composition())
    lines = initialise(fresh, tmp_path / "encoder.safetensors")
    assert lines[1:] == ["  fresh: mask_token, head.weight, head.bias"]
    after = fresh.state_dict()
    assert {n for n in after if not n.startswith(ENCODER)} <= equal(after, before)
    assert equal(after, trained.state_dict()) >= {n for n in after if n.startswith(ENCODER)}


@pytest.mark.parametrize("recipe", ["lomar", "beit"])
def test_a_released_file_gives_all_its_weights(recipe: str, tmp_path: Path) -> None:
    state = {"lomar": released.lomar, "beit": released.beit}[recipe]("pretrain")
    method = composition(recipe).build()
    lines = initialise(method, saved(tmp_path / "file.pth", state))
    assert len(lines) == 1 and f"{len(method.state_dict())} of {len(method.state_dict())} tensors" in lines[0]
    ours = {"lomar": "encoder_pred", "beit": "lm_head"}[recipe]
    assert torch.equal(method.head.weight, state[f"{ours}.weight"])
    assert torch.equal(method.architecture.mask_token, state["mask_token"])


def test_maes_decoder_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    """At the width where the released rule finds the heads."""
    file = saved(tmp_path / "file.pth", released.mae("pretrain", width=64, depth=1))
    same = composition("mae", model="64x1x1").build()
    assert len(initialise(same, file)) == 1
    for other in ({"decoder_heads": 2}, {"decoder_depth": 2}):
        method = composition("mae", model="64x1x1", **other).build()
        lines = initialise(method, file)
        assert "decoder.blocks.*.attn.qkv.weight" in lines[1] and lines[1].startswith("  fresh: decoder_embed.weight")
        assert "decoder.norm.bias" in lines[2] and lines[2].startswith("  not used: ")
        assert "mask_token" not in lines[1]


def test_tables_are_resized_to_the_methods_grid(tmp_path: Path) -> None:
    """As `set_input_size` does, which test_official.py compares with others."""
    mae = saved(tmp_path / "mae.pth", released.mae("pretrain", width=64, depth=1))
    method = composition("mae", model="64x1x1", image_size=48).build()
    lines = initialise(method, mae)
    assert lines[1:] == ["  resized to this grid: pos_embed, decoder.pos_embed"]
    expected = load(mae)
    expected.set_input_size(48)
    assert torch.equal(method.architecture.encoder.pos_embed, expected.pos_embed)
    beit = saved(tmp_path / "beit.pth", released.beit("pretrain"))
    windows = composition("beit-lomar", window_size=3).build()
    assert initialise(windows, beit)[1:] == ["  resized to this grid: rel_pos_bias.table"]
    table = windows.architecture.encoder.rel_pos_bias.table
    whole = load(beit).rel_pos_bias.table
    assert torch.equal(table[:-3].view(5, 5, 3), whole[:-3].view(15, 15, 3)[5:10, 5:10])  # the differences it has


def test_another_kind_of_position_is_said_to_be_fresh(tmp_path: Path) -> None:
    file = saved(tmp_path / "file.pth", released.mae("encoder", width=64))
    lines = initialise(composition(model="64x2x1").build(), file)
    assert lines[1:] == [
        "  fresh: mask_token, blocks.*.attn.rpe.table (2), head.weight, head.bias",
        "  not used: pos_embed",
    ]


def test_another_normalisation_is_said(tmp_path: Path) -> None:
    file = saved(tmp_path / "file.pth", released.lomar("pretrain"))
    lines = initialise(composition(mean=(0.1, 0.2, 0.3)).build(), file)
    assert lines[1:] == [
        "  its pixels were normalised otherwise, as by --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
    ]


@pytest.mark.parametrize(
    ("recipe", "values", "message"),
    [
        ("lomar", {"patch_size": 8}, "its patches are 4 px: give --patch-size 4"),
        ("lomar", {"mean": (0.5,), "std": (0.5,)}, "its images have 3 channels: give --channels 3"),
        ("lomar", {"model": "48x3x3"}, "its size is 48x2x3: give --model 48x2x3"),
        ("lomar", {"model": "48x2x4"}, "its size is 48x2x3: give --model 48x2x3"),
        ("lomar", {"transformer": "beit"}, "its keys have a bias: give --transformer vit"),
        ("lomar", {"layer_scale": 0.1}, "its transformer has no layer scale: give --layer-scale 0"),
        ("lomar", {"mlp_ratio": 2.0}, "its perceptrons have a hidden width of 192, not 96"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_with_the_option_that_would_help(
    recipe: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = saved(tmp_path / "file.pth", released.lomar("pretrain"))
    method = composition(recipe, **values).build()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with pytest.raises(UserError) as caught:
        initialise(method, file)
    assert str(caught.value) == f"--init {file} does not fit: {message}"
    assert equal(method.state_dict(), before) == before.keys()
    beit = saved(tmp_path / "beit.pth", released.beit("pretrain"))
    with pytest.raises(UserError, match="its keys have no bias: give --transformer beit"):
        initialise(composition().build(), beit)


def test_what_a_file_settles_are_options(tmp_path: Path) -> None:
    lomar = saved(tmp_path / "lomar.pth", released.lomar("pretrain", channels=5))
    assert initial_options(lomar) == {"model": "48x2x3", "patch_size": 4, "channels": 5}
    tiny = saved(tmp_path / "tiny.pth", released.lomar("finetune", width=192, heads=3, depth=12, patch=2, mlp=1))
    assert initial_options(tiny) == {"model": "tiny", "patch_size": 2, "channels": 3}
    mae = saved(tmp_path / "mae.pth", released.mae("pretrain", width=64, depth=1))
    assert initial_options(mae) == {"model": "64x1x1", "patch_size": 4, "channels": 3} | DECODER
    with pytest.raises(UserError, match="there is no run or file nowhere"):
        initial_options("nowhere")
