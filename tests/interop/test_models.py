"""Claims about opening any encoder by name."""

import json
import logging
import socket
import time
import warnings
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models import save_for_hf

from lomar.errors import UserError
from lomar.interop import models
from lomar.interop.models import check_size, input_of, open_model, size_given
from lomar.interop.weights import CLASSIFIER_FILE, ENCODER_FILE
from lomar.model import Encoder


def told(name: str, image_size: tuple[int, ...] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_model(name, image_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


def logits(model: torch.nn.Module, size: tuple[int, int]) -> torch.Tensor:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(images)  # type: ignore[no-any-return]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(models.urllib.request, "getproxies", dict)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with the folder of one repository in it: timm/test_vit.r160_in1k, still empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("tiny", (80, 48)),
        ("16x2x2", (32, 32)),
        ("lomar_vit_tiny_patch8", (24, 40)),
        ("test_vit", (96, 64)),
        ("test_vit2", (96, 64)),  # a register and no cls token
        ("test_vit3", (96, 64)),
        ("deit_tiny_distilled_patch16_224", (96, 64)),
        ("swin_tiny_patch4_window7_224", (64, 96)),
        ("test_resnet", (65, 97)),
        ("test_convnext", (64, 96)),
        ("xcit_nano_12_p16_224", (64, 96)),  # cannot be told of a size, and is made for it
        ("mixer_s32_224", (64, 64)),
    ],
)
def test_models_of_every_kind_take_images_of_another_size(name: str, size: tuple[int, int]) -> None:
    opened = open_model(f"scratch:{name}", size)
    assert opened.input.size == size and not opened.model.training
    assert logits(opened.model, size).isfinite().all()


def test_scratch_models_repeat_with_torchs_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return logits(open_model("scratch:test_vit").model, (160, 160))

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_a_run_is_opened_with_its_own_input(finished_run: Path) -> None:
    opened = open_model(str(finished_run))
    assert opened.input.size == (32, 32) and opened.input.pixel_type == "uint8"
    pixels = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (opened.input.mean, opened.input.std))
    torch.testing.assert_close(opened.input.normalise(pixels), (pixels / 255 - mean) / std)


def test_a_folder_that_timm_wrote_is_opened_with_and_without_its_scheme(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = timm.create_model("test_vit", num_classes=7).eval()
    save_for_hf(model, tmp_path, model_config={"num_classes": 7})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"lomar": {"scale": 65535.0}}))
    model.reset_classifier(0)
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        opened = open_model(name)
        assert torch.equal(logits(opened.model, (160, 160)), logits(model, (160, 160)))
        assert opened.input.pixel_type == "uint16"  # as `lomar export` says beside what timm knows


def test_weights_in_the_hubs_cache_need_no_network(no_network: None, hub_cache: Path) -> None:
    torch.manual_seed(4)
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), hub_cache / "model.safetensors")
    model.reset_classifier(0)
    found = open_model("test_vit")
    assert torch.equal(logits(found.model, (160, 160)), logits(model, (160, 160)))
    assert found.input == input_of(model)


def test_a_repository_in_the_hubs_cache_needs_no_network(no_network: None, hub_cache: Path) -> None:
    torch.manual_seed(5)
    model = timm.create_model("test_vit", num_classes=7).eval()
    save_for_hf(model, hub_cache, model_config={"num_classes": 7})
    model.reset_classifier(0)
    found = open_model("hf-hub:timm/test_vit.r160_in1k")
    assert torch.equal(logits(found.model, (160, 160)), logits(model, (160, 160)))


@pytest.mark.parametrize("name", ["test_vit", "hf-hub:timm/test_vit.r160_in1k", "hf-hub:timm/test_vit.r160_in1k@main"])
def test_without_network_and_cache_it_is_said_at_once(
    no_network: None, hub_cache: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        message = told(name)
    assert time.monotonic() - began < 10  # the hub's client alone would ask for most of a minute
    assert message == (
        f"--model {name}: its weights are not in the cache, and huggingface.co cannot be reached to fetch them; "
        "without a network give a folder with local-dir:FOLDER"
    )
    assert capfd.readouterr() == ("", "") and not warned


def test_a_proxy_is_left_to_find_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.urllib.request, "getproxies", lambda: {"https": "http://proxy:1"})
    assert models._hub_answers()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not models._hub_answers()


def test_what_a_library_raises_becomes_one_line_and_its_logs_stay_as_they_were(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        warnings.warn("do not mind", stacklevel=1)
        logging.getLogger("timm").warning("nor this")
        raise ConnectionError("broken\noff")

    monkeypatch.setattr(models, "_hub_answers", lambda: True)
    monkeypatch.setattr(timm, "create_model", fail)
    before = logging.getLogger("timm").level
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert told("test_vit") == "--model test_vit cannot be loaded (ConnectionError: broken)"
    assert capfd.readouterr() == ("", "") and not warned
    assert logging.getLogger("timm").level == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "--model nowhere: there is no such run or file, and timm knows no such model"),
        (
            "deit_tiny_distil",
            "--model deit_tiny_distil: there is no such run or file, and timm knows no such model; "
            "timm has deit_tiny_distilled_patch16_224",
        ),
        (
            "scratch:nowhere",
            "--model scratch:nowhere: 'nowhere' is no size; it can be tiny, small, base, large, huge, or "
            "WIDTHxDEPTHxHEADS such as 768x12x12, or the name of a model of timm",
        ),
        (
            "test_vit4",
            "--model test_vit4: timm has no pretrained weights of that name; scratch:test_vit4 has random ones",
        ),
        (
            "test_vit.best",
            "--model test_vit.best: timm has no pretrained weights of that name; it has test_vit.r160_in1k, and "
            "scratch:test_vit has random ones",
        ),
    ],
)
def test_names_of_nothing(name: str, message: str) -> None:
    assert told(name) == message


@pytest.mark.parametrize("name", ["vit_smal_patch16_224", "vit_smal_patch16_224.augreg_in1k"])
def test_of_a_name_with_a_slip_the_right_one_is_told(name: str) -> None:
    assert told(name).startswith(
        f"--model {name}: there is no such run or file, and timm knows no such model; timm has vit_small_patch16_224, "
    )


@pytest.mark.parametrize("file", [ENCODER_FILE, CLASSIFIER_FILE])
def test_a_run_into_which_somebody_exported_stays_a_run(file: str, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes((finished_run / "encoder.safetensors").read_bytes())
    save_for_hf(timm.create_model("test_vit", num_classes=7), tmp_path, model_config={"num_classes": 7})
    assert isinstance(open_model(str(tmp_path)).model, Encoder)
    assert not isinstance(open_model(f"local-dir:{tmp_path}").model, Encoder)


def test_folders_of_nothing(tmp_path: Path) -> None:
    assert told(str(tmp_path)).startswith(f"--model: {tmp_path} holds ")
    assert told(f"local-dir:{tmp_path}") == (
        f"--model local-dir:{tmp_path}: there is no config.json in that folder; `lomar export` or timm writes one"
    )
    (tmp_path / "config.json").write_text("{}")
    assert told(str(tmp_path)).startswith(f"--model {tmp_path} cannot be loaded (")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("tiny", (100,), "--image-size 100 is not a multiple of the model's patches of 16 px; 96 would be"),
        ("tiny", (96, 100), "--image-size 96 100 is not a multiple of the model's patches of 16 px; 96 96 would be"),
        ("tiny", (96, 96, 3), "--image-size has 3 numbers; it takes the side, or height and width"),
        ("test_convnext", (4,), "--image-size 4: the model does not take it ("),
        ("maxvit_nano_rw_256", (100,), "--image-size 100: the model does not take it ("),
    ],
)
def test_sizes_that_do_not_fit(name: str, size: tuple[int, ...], message: str) -> None:
    assert told(f"scratch:{name}", size).startswith(message)


def test_sizes_of_one_number_and_two() -> None:
    assert size_given((7,)) == (7, 7) and size_given((7, 11)) == (7, 11)
    check_size(open_model("scratch:test_resnet").model, (7, 11))  # has no patches
