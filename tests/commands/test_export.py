"""Claims about `lomar export`, and about docs/export.md."""

import json
import re
import shlex
import shutil
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
from lomar.data.decode import PixelFormat
from lomar.data.loader import centre_crops
from lomar.data.opening import open_source
from lomar.interop.card import INSTALL
from lomar.interop.weights import save_classifier, save_encoder
from lomar.methods.recipes import IMAGENET_MEAN, IMAGENET_STD, RECIPES

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
        f'  timm.create_model("local-dir:{out}", pretrained=True) computes what lomar does; '
        "largest difference 0.0e+00 of the largest output",
        "  its card states no licence; --license ID does, for example --license apache-2.0",
    ]
    card = (out / "README.md").read_text()
    for row in ("method | lomar", "mask_ratio | 0.8", "patch_size | 8", "epochs | 2.0", "steps | 4", "base_lr | 0.05"):
        assert f"\n| {row} |\n" in card
    assert str(finished_run.parent) not in card and "photos" not in card  # where things are is the user's own
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
        "  images (any number, 3, height, width): height and width multiples of 8 from 16 px, which nothing checks: "
        "rows and columns over a multiple are dropped",
        "  output features; normalisation is in the metadata",
    ]
    assert re.fullmatch(
        r"  checked against PyTorch with batches of 1 and 3: largest difference \S+ of the largest output", last
    )


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


def test_what_was_exported_is_exported_again(lomar: Command, tmp_path: Path) -> None:
    """The folder is a model like any other, here under BEiT's names."""
    run = saved(tmp_path / "run", "beit")
    outcome = lomar("export --to hub-folder --model", run, "--out", tmp_path / "hub")
    assert "architecture beit_base_patch16_224" in outcome.out
    outcome = lomar("export --to torch-export --model", tmp_path / "hub", "--out", tmp_path / "m.pt2")
    assert outcome.status == 0, outcome.err
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        program = torch.export.load(tmp_path / "m.pt2").module()
        assert torch.allclose(program(images), package.load(run)(images), atol=1e-5)


def classifier_in(run: Path) -> Path:
    """A classifier's run with a configuration and an evaluation."""
    classifier = package.load(saved(run.with_name("pretrained")))
    classifier.reset_classifier(2)
    save_classifier(run / "classifier.safetensors", classifier, ["cat", "dog"])
    (run / "config.yaml").write_text("model: /home/me/pretrained\nepochs: 7.0\nlayer_decay: 0.65\nmax_steps: null\n")
    told = {"model": f"{run.name}/classifier.safetensors", "image_size": [40, 48], "images": 97, "top1": 0.876543}
    (run / "evaluation.json").write_text(json.dumps(told))
    return run


@pytest.mark.parametrize("where", ["", "classifier.safetensors"])
def test_a_classifiers_card_tells_how_it_was_judged(where: str, lomar: Command, tmp_path: Path) -> None:
    run = classifier_in(tmp_path / "run")
    outcome = lomar("export --to hub-folder --license mit --model", run / where, "--out", tmp_path / "hub")
    assert outcome.status == 0 and "licence" not in outcome.out
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "\nTop-1 accuracy 87.7% of 97 images at 40 x 48 px.\n" in card and "\nlicense: mit\n" in card
    assert "| epochs | 7.0 |\n| layer_decay | 0.65 |\n" in card and "/home/me" not in card


def test_another_models_accuracy_is_not_told(lomar: Command, tmp_path: Path) -> None:
    run = classifier_in(tmp_path / "run")
    told = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(told | {"model": "run/classifier-last.safetensors"}))
    assert lomar("export --to hub-folder --model", run, "--out", tmp_path / "hub").status == 0
    assert "accuracy" not in (tmp_path / "hub" / "README.md").read_text()


def test_files_that_only_the_card_needs_may_be_damaged(lomar: Command, tmp_path: Path) -> None:
    run = classifier_in(tmp_path / "run")
    names = ("config.yaml", "reconstructor.safetensors", "evaluation.json")
    for name in names:
        (run / name).write_text("[}")
    outcome = lomar("export --to hub-folder --license mit --model", run, "--out", tmp_path / "hub")
    assert outcome.status == 0, outcome.err
    notes = [f"  {run / name} cannot be read: the card says nothing of what it holds" for name in names]
    assert outcome.out.splitlines()[-3:] == notes
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "Pretraining" not in card and "Fine-tuning" not in card and "accuracy" not in card


def test_weights_that_are_no_numbers_are_refused(lomar: Command, tmp_path: Path) -> None:
    """Comparing would show nothing."""
    classifier = package.load(saved(tmp_path / "run"))
    classifier.reset_classifier(2)
    with torch.no_grad():
        classifier.head.weight[1, 0] = torch.nan
    save_classifier(tmp_path / "nan.safetensors", classifier, ["cat", "dog"])
    for to, name in (("hub-folder", "hub"), ("onnx", "m.onnx"), ("torch-export", "m.pt2")):
        outcome = lomar("export --to", to, "--model", tmp_path / "nan.safetensors", "--out", tmp_path / name)
        told = f"--model {tmp_path / 'nan.safetensors'}: the weights hold NaN or infinity, in head.weight"
        assert (outcome.status, outcome.err) == (2, f"lomar: error: {told}\n")
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["encoder.safetensors", "classifier.safetensors"])
def test_a_runs_own_folder_is_refused(name: str, lomar: Command, tmp_path: Path) -> None:
    """What reads it later would find two models."""
    run = saved(tmp_path / "run")
    (run / "encoder.safetensors").rename(run / name)
    outcome = lomar("export --to hub-folder --overwrite --image-size 48 --model", run, "--out", run)
    told = f"--out {run} holds {name}; give what is exported a folder of its own"
    assert (outcome.status, outcome.err) == (2, f"lomar: error: {told}\n")
    assert [file.name for file in run.iterdir()] == [name]


def test_weights_beside_an_onnx_file_are_not_lost_unasked(
    lomar: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are a part of what is there; and of the size that is told."""
    from torch.onnx._internal.exporter import _onnx_program

    run, out, data = saved(tmp_path / "run", position="none"), tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    data.write_text("another's")
    words = ("export --to onnx --model", run, "--out", out)
    assert lomar(*words).err == (
        f"lomar: error: --out: {data} exists already; --overwrite replaces it, or give another --out\n"
    )
    assert data.read_text() == "another's" and not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
        first, *_ = lomar(*words, "--overwrite").out.splitlines()
    size = out.stat().st_size + data.stat().st_size
    assert data.stat().st_size > 50_000
    assert first == f"{out} and {data} written: ONNX, operator set 18; {size / 1e6:.1f} MB"


def test_of_one_row_of_patches_it_is_said_that_it_is_one_row(lomar: Command, tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    outcome = lomar("export --to torch-export --image-size 8 40 --model", run, "--out", tmp_path / "m.pt2")
    why = "one row or column of patches alone; --image-size gives another"
    assert f"  images (any number, 3, 8, 40): {why}\n" in outcome.out, outcome.err


def test_a_program_checks_sizes_and_is_not_said_not_to(lomar: Command, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", position="none")
    outcome = lomar("export --to torch-export --model", run, "--out", tmp_path / "m.pt2")
    assert "height and width multiples of 8 from 16 px\n" in outcome.out


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
        ("--model run --to hub-folder --out=", "--out is empty; it must be a folder"),
        ("--model run --to onnx --out=", "--out is empty; it must be a file"),
        (
            "--model run --to onnx --out m.onnx --license mit",
            "--license is for --to hub-folder, not for --to onnx",
        ),
        (
            "--model run --to hub-folder --out m --license mit:x",
            "--license is 'mit:x'; it must be one word, such as apache-2.0",
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


def write_photo(path: Path) -> None:
    """A smooth photograph that is no square and lies on its side, as a camera that was turned writes it."""
    path.parent.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels).resize((230, 147), Image.Resampling.BICUBIC)
    photo.save(path, exif=turned, quality=100, subsampling=0)


def sideways(photo: Image.Image) -> Image.Image:
    """As its pixels are stored."""
    return Image.fromarray(np.asarray(photo))


def away_from_lomars_crop(images: torch.Tensor, folder: Path, size: int) -> float:
    """Mean distance, of 255, from what lomar's evaluation looks at in the one image of a folder."""
    ((pixels, _),) = centre_crops(open_source(str(folder)), PixelFormat(3, "uint8"), size, workers=0, share=0.875)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return float((images * std + mean - pixels[0] / 255).abs().mean() * 255)


def test_the_guide_is_true(lomar: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands, then its Python, in order."""
    monkeypatch.chdir(tmp_path)
    saved(Path("run"))
    write_photo(Path("photos") / "photo.jpg")
    shutil.copy("photos/photo.jpg", "photo.jpg")
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

    def away(images: Any) -> float:
        return away_from_lomars_crop(torch.as_tensor(images), Path("photos"), 40)

    photo = Image.open("photo.jpg")
    assert away(names["prepare"](photo)[0]) < 3  # lomar decodes JPEG at a smaller scale
    assert away(names["images"][0]) < 7  # timm cuts whole pixels, after it resized
    names["told"]["crop_pct"] = 1.0
    wrong = [names["prepare"](photo)[0], *map(names["transform"], (photo.resize((147, 147)), sideways(photo)))]
    assert all(away(images) > 14 for images in wrong), [*map(away, wrong)]
    assert INSTALL in text.replace("\n", " ")
    assert names["config"]["input_size"] == (3, 384, 384) and names["config"]["crop_pct"] == 1.0
    assert names["classifier"](names["images"]).shape == (1, 10) and len(names["backbone"](names["images"])) == 2
    moved = names["moved_features"].cpu()
    for features in (torch.from_numpy(names["onnx_features"]), names["program_features"], moved):
        assert torch.allclose(features, prepared, atol=1e-5)
