"""Claims about any combination of options: a run trains a step, or is refused by one line and leaves nothing."""

import contextlib
import io
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from fuzz.mutation import examples
from hypothesis import given
from hypothesis import strategies as st

import lomar as package
from lomar import files
from lomar.cli import main
from lomar.commands import course, evaluation
from lomar.interop.tokenizers import save_tokenizer
from lomar.methods.recipes import RECIPES
from lomar.methods.tokenizer import DiscreteVAE

KINDS = [(1, "uint8"), (3, "uint8"), (4, "uint8"), (1, "uint16"), (2, "uint16"), (3, "float32"), (5, "float32")]


@pytest.fixture(scope="module", autouse=True)
def swift() -> Iterator[None]:
    """One thread, no pictures, and nothing waits for the disk: most of the time of such a run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "flush_to_disk", lambda path: None)
        patch.setattr(evaluation.Evaluation, "_pictures", lambda self, step: None)
        for module in (evaluation, course):
            patch.setattr(module, "learning_curves", lambda rows, path: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of five images of each kind, and tokenizers for 8-bit gray and colour."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for channels, dtype in KINDS:
        folder = root / f"{channels}-{dtype}"
        folder.mkdir()
        for number in range(5):
            share = rng.random((24 + number, 31, channels), dtype=np.float32)
            pixels = (share * {"uint8": 255, "uint16": 65_535, "float32": 1}[dtype]).astype(dtype)
            if dtype == "uint8" and channels != 4:
                PIL.Image.fromarray(pixels.squeeze()).save(folder / f"{number}.png")
            else:
                np.save(folder / f"{number}.npy", pixels)
    for channels in (1, 3):
        torch.manual_seed(0)
        bounds = {"low": [0] * channels, "high": [255] * channels}
        dvae = DiscreteVAE.build(channels=channels, width=4, vocab=11, blocks_per_group=1, **bounds)
        save_tokenizer(root / f"{channels}.safetensors", dvae)
    return root


def numbers(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


RARELY = numbers(*[0] * 19, 1)


@st.composite
def sides(draw: st.DrawFn) -> dict[str, Any]:
    """Crop and patch that mostly fit each other, in a grid that trains in no time."""
    patch, grid = draw(st.integers(1, 9)), draw(st.integers(3, 9) | st.integers(1, 9))
    return {"image_size": patch * grid + draw(RARELY), "patch_size": patch}


@st.composite
def sizes(draw: st.DrawFn) -> str:
    """An encoder, mostly one whose width its heads divide, by 4 or by 2 or neither."""
    heads = draw(st.integers(1, 3))
    width = heads * draw(numbers(1, 2, 3, 4, 4, 8)) + draw(RARELY)
    return f"{width}x{draw(st.integers(1, 3))}x{heads}"


SHARE = st.floats(0.001, 0.999, allow_nan=False).map(lambda share: round(share, 3))
METHOD = {
    "window_size": st.integers(0, 6),
    "views": st.integers(1, 5),
    "window_layout": numbers("independent", "released"),
    "mask": numbers("uniform", "uniform-kept", "blockwise"),
    "mask_ratio": SHARE,
    "mask_min_block": st.integers(1, 9),
    "predict_share": SHARE | st.just(1.0),
    "predict_choice": numbers("uniform", "furthest"),
    "architecture": numbers("masked-encoder", "encoder-decoder"),
    "mask_layer": st.integers(0, 3),
    "decoder_width": st.integers(4, 13),
    "decoder_depth": st.integers(1, 2),
    "decoder_heads": st.integers(1, 3),
    "position": numbers("contextual", "sincos", "learned", "shared-bias", "none"),
    "transformer": numbers("vit", "beit"),
    "layer_scale": numbers(0.0, 0.1, 1e-5),
    "drop_path": numbers(0.0, 0.1, 0.999),
    "target": numbers("normalised-pixels", "pixels", "tokens"),
    "channels": st.integers(1, 5),
    "pixel_type": numbers("uint8", "uint16", "float32"),
}
COURSE = {
    "crop_scale": st.tuples(SHARE, SHARE | st.just(1.0)),
    "color_jitter": SHARE | numbers(0.0, 1.0),
    "statistics": numbers("imagenet", "data"),
    "mean": st.lists(numbers(-1.0, 0.0, 0.5), min_size=1, max_size=5),
    "std": st.lists(numbers(1e-6, 0.3), min_size=1, max_size=5),
    "warmup_epochs": numbers(0.0, 1.0, 1e9),
    "batch_size": st.integers(1, 9),
    "micro_batch": st.integers(1, 11),
    "base_lr": numbers(1e-30, 1e-3, 1e3),
    "min_lr": numbers(0.0, 1.0),
    "weight_decay": numbers(0.0, 0.5, 1e9),
    "betas": st.tuples(numbers(0.0, 0.9), numbers(0.0, 0.999)),
    "clip_grad": numbers(0.0, 1e-9, 3.0),
    "seed": numbers(1, 2**32 - 1),
    "precision": numbers("fp32", "fp32", "bf16"),
    "grad_checkpointing": st.just(True),
    "strategy": numbers("ddp", "fsdp"),
    "checkpoint_steps": st.integers(1, 3),
    "eval_every": numbers(1e-9, 0.5, 1e9),
    "log_every": st.integers(1, 3),
}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Options of any method on any images: some of its parts changed, and some of the course of training."""
    options = draw(sides()) | {"model": draw(sizes()), "method": draw(st.sampled_from(sorted(RECIPES)))}
    options |= {name: draw(METHOD[name]) for name in draw(st.sets(st.sampled_from(sorted(METHOD)), max_size=5))}
    options |= {name: draw(COURSE[name]) for name in draw(st.sets(st.sampled_from(sorted(COURSE)), max_size=5))}
    if draw(numbers(True, True, True, False)) and "window_size" not in options:  # so that it fits the grid
        options["window_size"] = draw(
            st.integers(2, max(2, options["image_size"] // options["patch_size"])) | st.just(0)
        )
    return options


def words_of(options: dict[str, Any]) -> list[str]:
    """As they would be typed."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def typed(words: list[str]) -> tuple[int, str]:
    """Exit status and standard error of a command line; whatever else it raises is raised."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        status = main(words)
    return status, errors.getvalue()


def trains_or_is_refused(words: list[str], out: Path) -> bool:
    """Whether a step was trained."""
    status, errors = typed(words)
    if status == 0:
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == 1 and math.isfinite(losses[0])
        assert package.load(out).embed_dim > 0
        return True
    assert status == 2, errors
    assert errors.startswith("lomar: error: ") and errors.count("\n") == 1 and len(errors) < 600, errors
    assert not out.exists()
    return False


def test_any_configuration_trains_a_step_or_is_refused_by_one_line(world: Path) -> None:
    trained = []

    @examples(50)
    @given(options=configurations(), kind=st.sampled_from(KINDS), by_file=st.booleans())
    def holds(options: dict[str, Any], kind: tuple[int, str], by_file: bool) -> None:
        channels, dtype = kind
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "run")
            given = {"data": world / f"{channels}-{dtype}", "out": out, "max_steps": 1, "workers": 0, "device": "cpu"}
            if RECIPES[options["method"]].options.get("target") == "tokens" or options.get("target") == "tokens":
                given["tokenizer"] = world / f"{min(3, channels)}.safetensors"
            if by_file:  # which may hold more than the method has a use for
                config = Path(folder, "some.yaml")
                config.write_text(yaml.safe_dump(json.loads(json.dumps(options))))
                options = {"config": config}
            trained.append(trains_or_is_refused(["pretrain", *words_of(given | options)], out))
            shutil.rmtree(out, ignore_errors=True)

    holds()
    assert sum(trained) > len(trained) / 10  # it must not be refusals alone; a fifth trains, more or less by the draw


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model 65536x1000x1", "GB of memory are free: take a smaller --model"),
        ("--model 99999999999x12x1", "it can be at most 65536 wide and 1000 blocks deep"),
        ("--model 768x1000000x12", "it can be at most 65536 wide and 1000 blocks deep"),
        ("--image-size 16384 --patch-size 1 --model 16x1x1 --method mae", "or a smaller grid of patches"),
        (
            "--image-size 99999999 --patch-size 9",
            "--image-size is '99999999'; it must be a whole number, at most 16,384",
        ),
        ("--epochs 1e300", "--epochs is '1e300'; it must be a number, at most 1,000,000,000"),
    ],
)
def test_what_no_memory_could_hold_is_refused_before_it_is_made(
    words: str, message: str, world: Path, tmp_path: Path
) -> None:
    asked = ["--data", str(world / "3-uint8"), "--out", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"]
    status, errors = typed(["pretrain", *asked, *words.split()])
    assert status == 2 and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()
