"""Claims about `lomar export`, and about docs/export.md."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import lomar as package
from lomar.interop.weights import save_classifier, save_encoder
from lomar.methods.recipes import RECIPES

Command = Callable[..., Any]
PAGE = Path(__file__).parents[2] / "docs" / "export.md"
SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "image_size": 40, "patch_size": 8}


def saved(run: Path, recipe: str = "lomar", **changes: Any) -> Path:
    composition = replace(RECIPES[recipe].composition(recipe), **SIZES | {"window_size": 0, "views": 1} | changes)
    torch.manual_seed(0)
    save_encoder(run / "encoder.safetensors", composition.encoder(), composition)
    return run


def test_a_run_becomes_a_folder_for_timm(lomar: Command, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    outcome = lomar("export --to hub-folder --model", finished_run, "--out", out)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines() == [
        f"{out} written: config.json, model.safetensors, README.md",
        "  architecture lomar_vit, which no ViT of timm's can hold: it needs `import lomar.model`",
        f'  timm.create_model("local-dir:{out}", pretrained=True) computes what lomar does; largest difference 0.0e+00',
    ]
    assert "| mask_ratio | 0.8 |" in (out / "README.md").read_text()
    theirs, images = timm.create_model(f"local-dir:{out}", pretrained=True).eval(), torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        assert torch.equal(theirs(images), package.load(finished_run)(images))


def test_maes_encoder_is_said_to_need_timm_alone(lomar: Command, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", "mae")
    outcome = lomar("export --to hub-folder --model", run, "--out", tmp_path / "hub")
    assert "  architecture vit_base_patch8_224 with the arguments in config.json: it needs timm alone\n" in outcome.out


def test_a_run_becomes_onnx(lomar: Command, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "m.onnx"
    outcome = lomar("export --to onnx --model", finished_run, "--out", out)
    assert outcome.status == 0, outcome.err
    first, *others, last = outcome.out.splitlines()
    assert re.fullmatch(rf"{re.escape(str(out))} written: ONNX, operator set 18; \d\.\d MB", first)
    assert others == [
        "  images (any number, 3, height, width): height and width multiples of 8 from 16 px",
        "  output features; normalisation is in the metadata",
    ]
    assert re.fullmatch(r"  checked against PyTorch with batches of 1 and 3: largest difference \d\.\de-0\d", last)


def test_a_fixed_size_is_said_and_chosen(lomar: Command, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", "mae")
    outcome = lomar("export --to torch-export --image-size 24 56 --model", run, "--out", tmp_path / "m.pt2")
    assert outcome.status == 0, outcome.err
    assert (
        "  images (any number, 3, 24, 56): tables of positions are made for this size; --image-size gives another\n"
        in outcome.out
    )
    images = torch.randn(2, 3, 24, 56)
    with torch.no_grad():
        program = torch.export.load(tmp_path / "m.pt2").module()
        assert torch.allclose(program(images), package.load(run)(images), atol=1e-5)


@pytest.mark.parametrize("recipe", ["lomar", "mae", "beit"])
def test_another_size_is_that_of_the_folder(recipe: str, lomar: Command, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", recipe)
    outcome = lomar("export --to hub-folder --image-size 56 --model", run, "--out", tmp_path / "hub")
    assert outcome.status == 0, outcome.err
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert theirs.pretrained_cfg["input_size"] == (3, 56, 56)
    images = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        assert torch.allclose(theirs(images), package.load(run)(images), atol=1e-5)


def test_of_a_classifiers_tokens_it_is_said_what_they_are(lomar: Command, tmp_path: Path) -> None:
    classifier = package.load(saved(tmp_path / "run"))
    classifier.reset_classifier(2)
    save_classifier(tmp_path / "classes" / "classifier.safetensors", classifier, ["cat", "dog"])
    words = ("export --to torch-export --output tokens --model", tmp_path / "classes", "--out", tmp_path / "m.pt2")
    told = "  a classifier of pooled patches has no norm for tokens: they are as the last block leaves them\n"
    assert told in lomar(*words).out
    lomar("export --to hub-folder --model", tmp_path / "classes", "--out", tmp_path / "hub")
    assert "\n0. cat\n1. dog\n" in (tmp_path / "hub" / "README.md").read_text()


def test_what_is_there_is_replaced_only_if_asked(lomar: Command, tmp_path: Path) -> None:
    """Another's files in the folder stay."""
    run, out = saved(tmp_path / "run"), tmp_path / "hub"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    words = ("export --to hub-folder --model", run, "--out", out)
    assert lomar(*words).status == 0
    config = (out / "config.json").read_text()
    assert lomar(*words).err == (
        f"lomar: error: --out: {out / 'config.json'} exists already; --overwrite replaces it, or give another --out\n"
    )
    assert lomar(*words, "--image-size 48").status == 2 and (out / "config.json").read_text() == config
    assert lomar(*words, "--image-size 48 --overwrite").status == 0 and (out / "config.json").read_text() != config
    names = sorted(file.name for file in out.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "notes.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--to onnx --out m.onnx", "--model is missing; see lomar export --help"),
        ("--model run --out m.onnx", "--to is missing; see lomar export --help"),
        ("--model run --to onnx", "--out is missing; see lomar export --help"),
        ("--model nowhere --to onnx --out m.onnx", "there is no run or file nowhere"),
        ("--model run --to onnx --out m.pt2", "--out is m.pt2; with --to onnx it must end in .onnx"),
        ("--model run --to torch-export --out m", "--out is m; with --to torch-export it must end in .pt2"),
        ("--model run --to hub-folder --out m.onnx", "--out is m.onnx; with --to hub-folder it must be a folder"),
        ("--model run --to hub-folder --out file", "--out is file; with --to hub-folder it must be a folder"),
        ("--model run --to onnx --out dir.onnx --overwrite", "--out is dir.onnx, a folder; it must be a file"),
        (
            "--model run --to onnx --out m.onnx --image-size 45",
            "--image-size 45 is not a multiple of the model's patches of 8 px; 48 would be",
        ),
        (
            "--model run --to hub-folder --out m --image-size 40 50",
            "--image-size 40 50 is not a multiple of the model's patches of 8 px; 40 48 would be",
        ),
        (
            "--model run --to onnx --out m.onnx --image-size 8 16 24",
            "--image-size has 3 numbers; it takes the side, or height and width",
        ),
        ("--model run --to hub-folder --out m --opset 20", "--opset is for --to onnx, not for --to hub-folder"),
        (
            "--model run --to hub-folder --out m --output tokens",
            "--output is for --to onnx and torch-export, not for --to hub-folder",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: str, message: str, lomar: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("run"))
    Path("file").write_text("hello")
    Path("dir.onnx").mkdir()
    outcome = lomar("export", words)
    assert (outcome.status, outcome.err, outcome.out) == (2, f"lomar: error: {message}\n", "")
    assert sorted(file.name for file in Path().iterdir()) == ["dir.onnx", "file", "run"]


def test_what_is_no_encoder_is_refused(lomar: Command, finished_run: Path, tmp_path: Path) -> None:
    reconstructor = finished_run / "reconstructor.safetensors"
    outcome = lomar("export --to onnx --model", reconstructor, "--out", tmp_path / "m.onnx")
    assert outcome.status == 2 and f"{reconstructor} holds reconstructor, not the encoder" in outcome.err


def test_a_place_that_cannot_be_written_is_named(lomar: Command, tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    (tmp_path / "file").write_text("hello")
    for to, name in (("hub-folder", "hub"), ("torch-export", "m.pt2")):
        out = tmp_path / "file" / name
        outcome = lomar("export --to", to, "--model", run, "--out", out)
        assert outcome.status == 2 and outcome.err.startswith(f"lomar: error: --out {out} cannot be written: ")


def test_the_guide_is_true(lomar: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands, then its Python, in order."""
    monkeypatch.chdir(tmp_path)
    saved(Path("run"))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    text = PAGE.read_text()
    commands = re.findall(r"^lomar (.*)$", "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.S)), flags=re.M)
    assert len(commands) >= 4
    for command in commands:
        outcome = lomar(*shlex.split(command))
        assert outcome.status == 0, outcome.err
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, str(PAGE), "exec"), names)
    ours = package.load("run")
    with torch.inference_mode():
        wanted, prepared = ours(names["images"]), ours(torch.from_numpy(names["prepare"](Image.open("photo.jpg"))))
        assert torch.equal(names["again"].eval()(names["images"]), wanted)
    assert torch.equal(names["features"], wanted) and torch.equal(names["outputs"].pooler_output, wanted)
    assert torch.equal(names["outputs"].last_hidden_state, names["tokens"])
    assert names["classifier"](names["images"]).shape == (1, 10) and len(names["backbone"](names["images"])) == 2
    for features in (torch.from_numpy(names["onnx_features"]), names["program_features"]):
        assert torch.allclose(features, prepared, atol=1e-5)
