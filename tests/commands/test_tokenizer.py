"""Claims about `lomar tokenizer train`: what it leaves behind, that it can be resumed exactly, and what it refuses."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file

from lomar.commands import tokenizer
from lomar.commands.automatic import Hardware
from lomar.commands.tokenizer_settling import choose
from lomar.data.decode import PixelFormat
from lomar.data.survey import Survey
from lomar.interop.tokenizers import load_tokenizer
from lomar.options import TokenizerOptions, fields_of
from lomar.training.checkpoint import Checkpoints
from lomar.training.records import Metrics

Command = Callable[..., Any]

# 2x2 tokens of a 4x4 grid a step; 8 images, so that an epoch is 2 steps; evaluated at every step.
SMALL = (
    "--image-size 32 --window-size 2 --width 4 --blocks-per-group 1 --vocab 11 --batch-size 4 --workers 0 "
    "--device cpu --max-steps 5"
)


@pytest.fixture
def train(lomar: Command, photos: Path, miniature: None) -> Command:
    """Train a small tokenizer; the words given win over `SMALL`."""

    def run(out: Path, *words: str | Path) -> Any:
        return lomar("tokenizer train --data", photos, SMALL, "--out", out, *words)

    return run


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Do something once, before the next run's step after `done` steps."""
    learn = tokenizer._Training._learn

    def arrange(done: int, act: Callable[[], None]) -> None:
        def acting(self: Any, batches: Any) -> Any:
            if self.step == done:
                monkeypatch.setattr(tokenizer._Training, "_learn", learn)
                act()
            return learn(self, batches)

        monkeypatch.setattr(tokenizer._Training, "_learn", acting)

    return arrange


def interrupt() -> None:
    raise KeyboardInterrupt


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def course(out: Path) -> list[dict[str, Any]]:
    """All that metrics say but for the clock."""
    clock = ("images_per_s", "data_wait", "elapsed_s")
    return [{k: v for k, v in row.items() if k not in clock} for row in Metrics.read(out.with_suffix(".jsonl"))]


def same(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def refused(outcome: Any) -> str:
    assert outcome.status == 2, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("lomar: error: ") and outcome.err.count("\n") == 1
    return outcome.err.removeprefix("lomar: error: ").rstrip("\n")


@pytest.fixture
def whole(train: Command, tmp_path: Path) -> Path:
    """An uninterrupted run's tokenizer."""
    (tmp_path / "whole").mkdir()
    out = tmp_path / "whole" / "t.safetensors"
    assert train(out).status == 0
    return out


# What it leaves behind


def test_it_leaves_a_tokenizer_its_metrics_and_a_picture(whole: Path, photos: Path) -> None:
    assert files(whole.parent) == {"t.safetensors", "t.jsonl", "t.png"}
    dvae = load_tokenizer(whole)
    assert dvae.architecture == {
        "channels": 3,
        "width": 4,
        "vocab": 11,
        "blocks_per_group": 1,
        "low": [0.0] * 3,
        "high": [255.0] * 3,
        "pixel_type": "uint8",
        "has_decoder": True,
    }
    rows = course(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for name in ("loss", "reconstruction", "usage_divergence", "temperature", "vocab_used", "perplexity", "psnr_db"):
        assert all(np.isfinite(row[name]) for row in rows), name
    assert rows[0]["temperature"] == 1 and rows[-1]["temperature"] < 0.2


def test_usage_and_quality_are_those_of_the_tokenizer_that_was_written(whole: Path, photos: Path) -> None:
    """Told from the file and the images alone."""
    dvae, last = load_tokenizer(whole), course(whole)[-1]
    images = [Image.open(path) for path in sorted(photos.rglob("*.png"))]
    crops = [image.crop((4, 0, 44, 40)).resize((32, 32), Image.Resampling.BICUBIC) for image in images]
    pixels = torch.from_numpy(np.stack([np.array(crop).transpose(2, 0, 1) for crop in crops]))
    ids = dvae.tokens(pixels)
    assert last["vocab_used"] == pytest.approx(len(ids.unique()) / 11, abs=1.01 / 11)
    error = (dvae.decode(ids) - pixels / 255).square().mean().item()
    assert last["psnr_db"] == pytest.approx(-10 * np.log10(error), abs=0.2)


def test_usage_is_reported_and_so_is_what_was_chosen(train: Command, tmp_path: Path) -> None:
    done = train(tmp_path / "t.safetensors")
    assert done.out.count(" of 11 tokens used, perplexity ") == 5
    assert "decoded at " in done.out and " dB (8 images)" in done.out
    assert "--lr               0.004" in done.out and "--channels         3          the images have 3" in done.out
    assert f"lomar pretrain --method beit --tokenizer {tmp_path / 't.safetensors'} --data " in done.out


def test_beit_trains_with_it(whole: Path, lomar: Command, photos: Path, tmp_path: Path, no_pictures: None) -> None:
    done = lomar(
        "pretrain --method beit --tokenizer", whole, "--data", photos, "--out", tmp_path / "run",
        "--model 16x3x2 --image-size 32 --patch-size 8 --mask-min-block 2 --batch-size 4 --workers 0 --max-steps 1",
    )  # fmt: skip
    assert done.status == 0, done.err


def test_a_tokenizer_learns_what_images_look_like(train: Command, tmp_path: Path) -> None:
    """Red and blue noise: in a few steps the two colours become different tokens."""
    train(tmp_path / "t.safetensors", "--width 16 --max-steps 100")
    dvae = load_tokenizer(tmp_path / "t.safetensors")
    colours = torch.zeros(2, 3, 16, 16, dtype=torch.uint8) + 60
    colours[0, 0] = colours[1, 2] = 180
    red, blue = dvae.decode(dvae.tokens(colours)).mean(dim=(2, 3))
    assert red[0] > 0.5 > red[2] and blue[2] > 0.5 > blue[0]


@pytest.mark.parametrize("kind", ["npy", "tif"])
def test_two_channels_of_16_bits_work(
    kind: str, train: Command, lomar: Command, no_pictures: None, tmp_path: Path
) -> None:
    """Black and white are estimated, since a sensor does not fill 16 bits."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(6):
        pixels = rng.integers((100, 2000), (500, 9000), (40, 40, 2)).astype(np.uint16)
        if kind == "npy":
            np.save(tmp_path / "data" / f"{number}.npy", pixels)
        else:
            tifffile.imwrite(
                tmp_path / "data" / f"{number}.tif", pixels, photometric="minisblack", planarconfig="contig"
            )
    done = train(tmp_path / "t.safetensors", "--data", tmp_path / "data")
    assert done.status == 0, done.err
    assert "estimated from 6 images" in done.out
    dvae = load_tokenizer(tmp_path / "t.safetensors")
    low, high = np.array(dvae.architecture["low"]), np.array(dvae.architecture["high"])
    assert dvae.pixel_type == "uint16"
    assert ((low > (90, 1800)) & (low < (200, 4000))).all() and ((high > (400, 7000)) & (high < (510, 9200))).all()
    assert (tmp_path / "t.png").exists()
    beit = (
        "pretrain --method beit --tokenizer", tmp_path / "t.safetensors", "--data", tmp_path / "data",
        "--model 16x3x2 --image-size 32 --patch-size 8 --mask-min-block 2 --batch-size 4 --workers 0 --max-steps 1",
    )  # fmt: skip
    assert lomar(*beit, "--out", tmp_path / "run").status == 0
    message = refused(lomar(*beit, "--pixel-type float32 --out", tmp_path / "float"))
    assert message.startswith("--tokenizer was made for pixels of uint16; these are read as float32")


def test_floats_without_contrast_work(train: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(4):
        np.save(tmp_path / "data" / f"{number}.npy", np.full((32, 32), 1e-7, dtype=np.float32))
    done = train(tmp_path / "t.safetensors", "--data", tmp_path / "data", "--max-steps 2")
    assert done.status == 0, done.err
    assert all(np.isfinite(row["loss"]) for row in course(tmp_path / "t.safetensors"))


def test_black_and_white_can_be_given(train: Command, tmp_path: Path) -> None:
    train(tmp_path / "t.safetensors", "--black 5 6 7 --max-steps 1")
    assert load_tokenizer(tmp_path / "t.safetensors").architecture["low"] == [5, 6, 7]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("count", [16, 10_000, 1_300_000])
@pytest.mark.parametrize("short_side_px", [5, 30, 224])
def test_choices_fit_each_other_and_leave_what_is_given(device: str, count: int, short_side_px: int) -> None:
    found = Survey(count, min(count, 256), [], short_side_px, short_side_px, PixelFormat(2, "uint16"))
    hardware = Hardware(device, "some", 8 * 10**9, 2, False)
    given = {"vocab": 77, "max_steps": 3}
    values = {name: choice.value for name, choice in choose(given, found, hardware).items()}
    assert not set(values) & set(given)
    automatic = {name for name, field in fields_of(TokenizerOptions).items() if field.metadata["auto"]}
    assert set(values) | set(given) | {"black", "white"} == automatic
    assert values["image_size"] == {5: 16, 30: 24, 224: 112}[short_side_px]
    assert values["width"] % 4 == 0 and values["window_size"] <= values["image_size"] // 8
    assert (values["channels"], values["pixel_type"], values["device"]) == (2, "uint16", device)


# Going on


@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(
    done: int, whole: Path, train: Command, lomar: Command, at_step, tmp_path: Path
) -> None:
    """However it ended: stopped by SIGTERM, or at once."""
    (tmp_path / "parts").mkdir()
    out = tmp_path / "parts" / "t.safetensors"
    at_step(done, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = train(out)
    assert stopped.status == 128 + signal.SIGTERM or done == 4
    if done < 4:
        assert f"stopped after step {done + 1}; go on with: lomar tokenizer train --out {out} --resume" in stopped.out
        assert files(out.parent) == {"t.safetensors.partial", "t.jsonl"}
        at_step(3, interrupt)
        assert lomar("tokenizer train --resume --out", out).status == 130
        assert not out.exists()
        assert lomar("tokenizer train --resume --workers 1 --out", out).status == 0
    assert course(out) == course(whole)
    assert same(out, whole)
    assert files(out.parent) == files(whole.parent)


def test_resume_begins_where_nothing_was_begun(whole: Path, train: Command, tmp_path: Path) -> None:
    """One command line serves a job that is started again and again, even after a kill before the first checkpoint."""
    (tmp_path / "parts").mkdir()
    out = tmp_path / "parts" / "t.safetensors"
    (tmp_path / "parts" / "t.safetensors.partial").mkdir()
    (tmp_path / "parts" / "t.safetensors.partial" / ".step-000000000.pt.tmp").write_bytes(b"some")
    assert train(out, "--resume").status == 0
    assert course(out) == course(whole) and same(out, whole) and files(out.parent) == files(whole.parent)
    assert train(out, "--resume").out == f"{out} is finished\n"


def test_without_data_there_must_be_something_to_resume(lomar: Command, tmp_path: Path) -> None:
    message = refused(lomar("tokenizer train --resume --out", tmp_path / "t.safetensors"))
    assert message == f"--out: there is nothing to resume in {tmp_path / 't.safetensors.partial'}"


def test_what_a_kill_left_beside_a_finished_tokenizer_goes(whole: Path, train: Command) -> None:
    """It came after the tokenizer was written and before its checkpoints were deleted, the last of them at least."""
    before = whole.read_bytes()
    Checkpoints(whole.with_name("t.safetensors.partial")).save(3, {})
    whole.with_name(".t.safetensors.lock").touch()
    assert train(whole, "--resume").out == f"{whole} is finished\n"
    assert whole.read_bytes() == before and files(whole.parent) == {"t.safetensors", "t.jsonl", "t.png"}


def test_a_folder_that_holds_something_else_is_kept(train: Command, tmp_path: Path) -> None:
    """`lomar embed` makes one of that name."""
    other = tmp_path / "t.safetensors.partial" / "rows"
    other.parent.mkdir()
    other.touch()
    assert "already exists" in refused(train(tmp_path / "t.safetensors"))
    assert "there is nothing to resume" in refused(train(tmp_path / "t.safetensors", "--resume"))
    assert other.exists()


def test_a_run_that_ends_while_it_writes_its_files_writes_them_again(
    whole: Path, train: Command, lomar: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "parts").mkdir()
    out = tmp_path / "parts" / "t.safetensors"
    with monkeypatch.context() as context:
        context.setattr(tokenizer, "save_tokenizer", lambda *_: interrupt())
        assert train(out).status == 130
    assert lomar("tokenizer train --resume --out", out).status == 0
    assert course(out) == course(whole) and same(out, whole) and files(out.parent) == files(whole.parent)


def test_resuming_what_is_finished_changes_nothing(whole: Path, lomar: Command) -> None:
    before = {path: path.read_bytes() for path in whole.parent.iterdir()}
    done = lomar("tokenizer train --resume --out", whole)
    assert (done.status, done.out) == (0, f"{whole} is finished\n")
    assert {path: path.read_bytes() for path in whole.parent.iterdir()} == before


def test_the_seed_decides_the_tokenizer(whole: Path, train: Command, tmp_path: Path) -> None:
    train(tmp_path / "other.safetensors", "--seed 1")
    train(tmp_path / "again.safetensors", "--seed 0")
    assert same(tmp_path / "again.safetensors", whole)
    assert not same(tmp_path / "other.safetensors", whole)


def test_overwrite_starts_anew_and_leaves_other_files(whole: Path, train: Command) -> None:
    (whole.parent / "other.safetensors").touch()
    assert train(whole, "--overwrite --max-steps 2").status == 0
    assert [row["step"] for row in course(whole)] == [1, 2]
    assert files(whole.parent) == {"t.safetensors", "t.jsonl", "t.png", "other.safetensors"}


def test_unreadable_images_are_named_once_and_skipped(train: Command, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for path in photos.rglob("*.png"):
        os.link(path, tmp_path / "data" / f"{path.parent.name}-{path.name}")
    (tmp_path / "data" / "bad.png").write_text("no")
    done = train(tmp_path / "t.safetensors", "--data", tmp_path / "data")
    assert done.status == 0, done.err
    bad = tmp_path / "data" / "bad.png"
    assert f"1 of them cannot be read and will be skipped, such as {bad}" in done.out
    assert done.out.count(f"skipped an unreadable image: {bad}") == 1


# Refusals: one line, status 2, nothing written


REFUSED = {
    "--data nowhere": "/nowhere: no such folder or file",
    "--width 6": "--width 6 is not a multiple of 4; 8 would be",
    "--width 0": "--width is '0'; it must be a whole number, at least 4",
    "--image-size 36": "--image-size 36 is not a multiple of 8; 32 would be",
    "--window-size 5": "--window-size 5 is larger than the 4x4 tokens of --image-size 32",
    "--vocab 1": "--vocab is '1'; it must be a whole number, at least 2",
    "--lr 0": "--lr is '0'; it must be a number, above 0",
    "--black 0": "--black has 1 numbers; the images have 3 channels",
    "--white 255 255": "--white has 2 numbers; the images have 3 channels",
    "--black 0 0 9 --white 255 255 9": "--black is 9 where --white is 9; it must be less",
    "--channels 5": "has 3 channels, but --channels is 5",
    "--pixel-type int8": "--pixel-type is 'int8'; it can be uint8, uint16, float32 (did you mean uint8?)",
    "--vocabulary 8": "there is no option --vocabulary (did you mean --vocab?)",
    "--resume --overwrite": "--resume and --overwrite are both given; give one",
    "--out tokenizer.pkl": "--out is tokenizer.pkl; it must end in .safetensors",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_made(words: str, train: Command, tmp_path: Path) -> None:
    assert REFUSED[words] in refused(train(tmp_path / "t.safetensors", words))
    assert files(tmp_path) == set()


def test_data_and_out_are_needed(lomar: Command, tmp_path: Path) -> None:
    assert refused(lomar("tokenizer train --data sample")).startswith("--out is missing: the file to write")
    assert refused(lomar("tokenizer train --out", tmp_path / "t.safetensors")).startswith("--data is missing")


def test_data_without_a_readable_image_is_refused(train: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    out = tmp_path / "t.safetensors"
    assert "no image in this folder" in refused(train(out, "--data", tmp_path / "data"))
    (tmp_path / "data" / "a.jpg").write_text("hello")
    assert "none of 1 files can be read, for example" in refused(train(out, "--data", tmp_path / "data"))
    np.save(tmp_path / "data" / "a.npy", np.full((32, 32, 3), 0.5, np.float32))
    (tmp_path / "data" / "a.jpg").unlink()
    message = refused(train(out, "--pixel-type uint8 --data", tmp_path / "data"))
    assert message == "--pixel-type is uint8; images of float32 can be read as float32 alone"
    assert files(tmp_path) == {"data"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(train: Command, tmp_path: Path) -> None:
    assert "torch finds no usable GPU here" in refused(train(tmp_path / "t.safetensors", "--device cuda"))
    assert files(tmp_path) == set()


def test_what_is_there_is_not_written_over(whole: Path, train: Command, at_step, tmp_path: Path) -> None:
    before = whole.read_bytes()
    assert refused(train(whole)) == f"--out: {whole} already exists; --overwrite deletes it"
    assert whole.read_bytes() == before
    (tmp_path / "mine.png").touch()
    message = refused(train(tmp_path / "mine.safetensors"))
    assert message == f"--out: {tmp_path / 'mine.png'} already exists; --overwrite deletes it"
    out = tmp_path / "begun.safetensors"
    at_step(1, interrupt)
    train(out)
    message = refused(train(out))
    assert message == f"--out: {out}.partial already exists; --resume goes on with it, --overwrite deletes it"


def test_an_out_that_cannot_be_written_is_refused(train: Command, tmp_path: Path) -> None:
    def message(out: Path, *words: str) -> str:
        done = train(out, *words)
        assert done.status == 2 and done.err.count("\n") == 1
        return done.err

    (tmp_path / "file").touch()
    assert "cannot be written: " in message(tmp_path / "file" / "t.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "already exists" in message(tmp_path / "folder.safetensors")
    assert "cannot be written: Is a directory" in message(tmp_path / "folder.safetensors", "--overwrite")


def test_what_is_resumed_keeps_its_options_and_images(
    train: Command, lomar: Command, at_step, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "t.safetensors"
    at_step(1, interrupt)
    train(out)
    resume = ("tokenizer train --resume --out", out)
    assert "--vocab is 12, but what was begun in" in refused(lomar(*resume, "--vocab 12"))
    assert "the images are not those that" in refused(lomar(*resume, "--data", photos / "red"))
    checkpoints = Checkpoints(tmp_path / "t.safetensors.partial")
    for step in checkpoints.steps():
        whole = checkpoints.path(step).read_bytes()
        checkpoints.path(step).write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in refused(lomar(*resume))
    checkpoints.save(9, {"options": {}})
    assert "is not what lomar tokenizer train leaves behind" in refused(lomar(*resume))


def test_several_processes_are_refused(train: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert refused(train(tmp_path / "t.safetensors")) == "a tokenizer trains in one process; start it without torchrun"


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_before(
    train: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tokenizer.losses

    def losses(dvae: Any, pixels: torch.Tensor, warmth: float, *rest: Any) -> Any:
        return broken(dvae, pixels * (float("nan") if warmth < 0.5 else 1), warmth, *rest)

    monkeypatch.setattr(tokenizer, "losses", losses)
    done = train(tmp_path / "t.safetensors")
    assert done.status == 1
    assert "the loss is not finite at step 4; its batch holds " in done.err and done.err.count("\n") == 1
    assert files(tmp_path) == {"t.safetensors.partial", "t.jsonl"}


# Its name has two words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tokenizer", "'tokenizer' needs a second word: lomar tokenizer train; try lomar --help"),
        ("tokenizer --data x", "'tokenizer' needs a second word: lomar tokenizer train; try lomar --help"),
        ("tokenizer bake", "there is no command 'tokenizer bake'; try lomar --help"),
        ("tokenizer trian", "there is no command 'tokenizer trian' (did you mean train?); try lomar --help"),
    ],
)
def test_the_second_word_is_asked_for(words: str, message: str, lomar: Command) -> None:
    assert refused(lomar(words)) == message


def test_help_explains_it(lomar: Command) -> None:
    done = lomar("tokenizer train --help")
    assert done.status == 0
    assert "usage: lomar tokenizer train" in done.out
    assert "number of tokens [chosen from the data and the hardware]" in " ".join(done.out.split())
