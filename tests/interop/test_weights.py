"""Claims about the files a user takes away, and what they become again."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.data
import torch
from kept import last_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lomar as package
from lomar.errors import UserError
from lomar.interop.weights import load_most, load_reconstructor, save_encoder, save_reconstructor
from lomar.methods.composition import Composition
from lomar.methods.recipes import RECIPES


def composition(**values: Any) -> Composition:
    """A small LoMaR on images of five channels."""
    small: dict[str, Any] = {
        "method": "lomar",
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
        "image_size": 35,
        "patch_size": 5,
        "window_size": 3,
        "views": 2,
        "mask_layer": 1,
        "mean": (0.1, 0.2, 0.3, 0.4, 0.5),
        "std": (0.5, 0.4, 0.3, 0.2, 0.1),
        "scale": 65535.0,
    }
    return dataclasses.replace(RECIPES["lomar"].composition("lomar"), **small | values)


@pytest.mark.parametrize("where", ["", "encoder.safetensors"])
def test_a_loaded_encoder_computes_what_the_trained_one_did(where: str, tmp_path: Path) -> None:
    """From the folder and from the file; five channels, and a grid of another shape than in training."""
    made = composition()
    trained = made.build().architecture.encoder.eval()
    save_encoder(tmp_path / "encoder.safetensors", trained, made)
    loaded = package.load(tmp_path / where)
    images = torch.randn(2, 5, 35, 20)
    with torch.inference_mode():
        assert torch.equal(loaded.forward_features(images), trained.forward_features(images))
        assert torch.equal(loaded(images), trained(images)) and loaded(images).shape == (2, 16)
    assert not loaded.training and loaded.num_classes == 0


def test_a_file_of_the_time_before_other_positions_loads(tmp_path: Path) -> None:
    """Its metadata says nothing of position, key bias, layer scale, initialisation and classifier."""
    trained = composition().encoder()
    save_encoder(tmp_path / "encoder.safetensors", trained, composition())
    with safe_open(tmp_path / "encoder.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["lomar"])
    for name in ("num_classes", "global_pool"):
        del metadata[name]
    for name in ("position", "bias_grid", "key_bias", "init_values", "weight_init"):
        del metadata["architecture"][name]
    save_file(trained.state_dict(), tmp_path / "old.safetensors", metadata={"lomar": json.dumps(metadata)})
    images = torch.randn(1, 5, 35, 35)
    with torch.inference_mode():
        assert torch.equal(package.load(tmp_path / "old.safetensors")(images), trained.eval()(images))


@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_a_classifier_is_kept(global_pool: str, tmp_path: Path) -> None:
    trained = composition().encoder()
    trained.reset_classifier(7, global_pool)
    save_encoder(tmp_path / "encoder.safetensors", trained, composition())
    loaded = package.load(tmp_path)
    images = torch.randn(2, 5, 35, 35)
    with torch.inference_mode():
        assert torch.equal(loaded(images), trained.eval()(images))
    assert loaded.num_classes == loaded.pretrained_cfg["num_classes"] == 7


def test_a_loaded_encoder_tells_timm_how_to_prepare_images(tmp_path: Path) -> None:
    made = composition(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    save_encoder(tmp_path / "encoder.safetensors", made.encoder(), made)
    config = timm.data.resolve_model_data_config(package.load(tmp_path))
    assert config["mean"] == made.mean and config["std"] == made.std
    assert config["input_size"] == (3, 35, 35) and config["interpolation"] == "bicubic"
    transform = timm.data.create_transform(**config)
    assert transform is not None


def test_a_loaded_encoder_takes_a_classifier_and_trains(tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder.safetensors", composition().encoder(), composition())
    encoder = package.load(tmp_path).train()
    encoder.reset_classifier(7)
    logits = encoder(torch.randn(2, 5, 35, 35))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_a_loaded_reconstructor_computes_what_the_trained_one_did(tmp_path: Path) -> None:
    made = composition()
    trained = made.build().eval()
    save_reconstructor(tmp_path / "reconstructor.safetensors", trained, made)
    loaded, found = load_reconstructor(tmp_path)
    assert found == made
    windows = torch.randint(0, 65536, (2, 5, 15, 15)).to(torch.uint16)
    corners = torch.tensor([[0, 4], [2, 1]])
    hidden = torch.arange(9).expand(2, 9) < 7
    with torch.inference_mode():
        ours, theirs = (method.reconstruct(windows, corners, hidden) for method in (loaded, trained))
    assert torch.equal(ours, theirs)


def test_the_files_of_a_run_hold_the_weights_of_its_checkpoint(finished_run: Path) -> None:
    weights = last_state(finished_run)["model"]
    encoder = package.load(finished_run).state_dict()
    reconstructor = load_file(finished_run / "reconstructor.safetensors")
    assert {f"architecture.encoder.{name}" for name in encoder} < set(weights)
    assert all(torch.equal(encoder[name], weights[f"architecture.encoder.{name}"]) for name in encoder)
    assert set(reconstructor) == set(weights) and all(torch.equal(reconstructor[n], weights[n]) for n in weights)
    assert {"architecture.mask_token", "head.weight", "head.bias"} <= set(reconstructor)


def test_the_metadata_is_json_that_says_what_the_file_is(finished_run: Path) -> None:
    with safe_open(finished_run / "encoder.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["lomar"])
    assert metadata["kind"] == "encoder" and metadata["version"] == package.__version__
    assert metadata["architecture"] == {
        "img_size": 32,
        "patch_size": 8,
        "in_chans": 3,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
        "mlp_ratio": 4.0,
        "position": "contextual",
        "bias_grid": [3, 3],
        "key_bias": True,
        "init_values": None,
        "weight_init": "xavier",
    }
    assert (metadata["num_classes"], metadata["global_pool"]) == (0, "avg")
    assert metadata["scale"] == 255.0 and metadata["mean"] == [0.485, 0.456, 0.406]


def test_a_run_that_is_not_finished_can_be_loaded(
    pretrain: Callable[..., Any], interrupted_at: Callable[[int], None], tmp_path: Path
) -> None:
    interrupted_at(1)
    assert pretrain(tmp_path / "run", "--max-steps 4").status == 130
    assert package.load(tmp_path / "run").embed_dim == 16


def test_of_two_models_in_a_folder_the_runs_own_is_read(tmp_path: Path) -> None:
    """And an exported one where it is alone, by all that reads encoders."""
    run, exported = composition().encoder(), composition().encoder()
    save_encoder(tmp_path / "encoder.safetensors", run, composition())
    save_encoder(tmp_path / "model.safetensors", exported, composition())
    images = torch.randn(1, 5, 35, 35)
    with torch.inference_mode():
        assert torch.equal(package.load(tmp_path)(images), run.eval()(images))
        (tmp_path / "encoder.safetensors").unlink()
        found, mean, _ = load_most(tmp_path)
        assert torch.equal(package.load(tmp_path)(images), exported.eval()(images))
        assert torch.equal(found(images), exported(images)) and mean == (0.1, 0.2, 0.3, 0.4, 0.5)


def test_weights_that_timm_saved_are_refused_as_such(tmp_path: Path) -> None:
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"model\.safetensors holds weights of something else, not the encoder or class"
    ):
        package.load(tmp_path)


def test_what_is_no_encoder_is_refused_in_one_line(tmp_path: Path, finished_run: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("hello")
    whole = (finished_run / "encoder.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "odd.safetensors", metadata={"lomar": "{"})
    save_file({"weight": torch.zeros(2)}, tmp_path / "bare.safetensors", metadata={"lomar": '{"kind": "encoder"}'})
    tensors = composition().encoder().state_dict()
    del tensors["cls_token"]
    with safe_open(finished_run / "encoder.safetensors", framework="pt") as file:
        save_file(tensors, tmp_path / "lacks.safetensors", metadata=file.metadata())
    for name, message in {
        "nowhere": "there is no run or file",
        "empty": "holds neither encoder.safetensors nor classifier.safetensors nor model.safetensors; is it the folder",
        "text.safetensors": "is not a safetensors file",
        "half.safetensors": "is not a safetensors file",
        "other.safetensors": "holds weights of something else, not the encoder or classifier of a run",
        "odd.safetensors": "holds weights of something else, not the encoder or classifier of a run",
        "bare.safetensors": "does not hold a whole encoder",
        "lacks.safetensors": "does not hold a whole encoder",
    }.items():
        with pytest.raises(UserError) as caught:
            package.load(tmp_path / name)
        told = str(caught.value)
        assert name in told and message in told and "\n" not in told
    with pytest.raises(UserError, match="holds reconstructor, not the encoder or classifier of a run"):
        package.load(finished_run / "reconstructor.safetensors")
    with pytest.raises(UserError, match="holds encoder, not the reconstructor of a run"):
        load_reconstructor(finished_run / "encoder.safetensors")
