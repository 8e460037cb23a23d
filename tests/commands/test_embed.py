"""Claims about `lomar embed`; timm, safetensors and NumPy are the judges. The Python of docs/embedding.md runs."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import load_file

import lomar as package
from lomar.commands import embed as subject
from lomar.commands import frozen
from lomar.data.opening import open_source
from lomar.downstream import embedding_writer as writing
from lomar.downstream.embedding import begun, partial_of, read_embedding
from lomar.downstream.embedding_writer import EmbeddingWriter
from lomar.interop.weights import save_encoder
from lomar.methods.recipes import RECIPES

Command = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("miniature")

HERE = "--device cpu --precision fp32 --workers 0"
SMALL = f"embed --model scratch:16x2x2 --image-size 32 {HERE}"
GUIDE = Path(__file__).parents[2] / "docs" / "embedding.md"


@pytest.fixture
def stops_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Let something happen in the next command when it has made a number of batches; every row is made safe at once."""
    real = frozen.features_in_batches

    def stops(batch: int, happens: Callable[[], None]) -> None:
        def features(*given: Any) -> Iterator[Any]:
            monkeypatch.setattr(frozen, "features_in_batches", real)
            for number, found in enumerate(real(*given)):
                if number == batch:
                    happens()
                yield found

        monkeypatch.setattr(frozen, "features_in_batches", features)
        monkeypatch.setattr(writing, "KEEP_EVERY_S", -1.0)

    return stops


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Images of one colour each, which no crop and no change of size alters; one is no image."""
    root = tmp_path / "plain"
    (root / "a").mkdir(parents=True)
    for number, colour in enumerate([(0, 0, 0), (255, 0, 17), (30, 200, 90), (7, 77, 177), (255, 255, 255)]):
        Image.new("RGB", (61, 43), colour).save(root / "a" / f"{number}.png")
    (root / "a" / "2.png").write_text("no image")
    return root


def tensor_of(colours: list[tuple[int, ...]], config: dict[str, Any]) -> torch.Tensor:
    """Normalised images (B, C, H, W) of one colour each, by timm's own numbers."""
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    values = (torch.tensor(colours) / 255 - mean) / std
    return values[:, :, None, None].expand(-1, -1, *config["input_size"][1:])


COLOURS = [(0, 0, 0), (255, 0, 17), (7, 77, 177), (255, 255, 255)]


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
@pytest.mark.parametrize("features", ["pooled", "cls", "mean", "patches"])
def test_the_rows_are_what_timms_model_gives(
    features: str, ending: str, lomar: Command, plain: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    out = tmp_path / f"e.{ending}"
    words = f"--model scratch:test_vit {HERE} --batch-size 2 --features {features}"
    assert lomar("embed", words, "--data", plain, "--out", out).status == 0
    with torch.inference_mode():
        images = tensor_of(COLOURS, model.pretrained_cfg)
        tokens = model.forward_features(images)
        judge = {
            "pooled": model(images),
            "cls": tokens[:, 0],
            "mean": tokens[:, 1:].mean(dim=1),
            "patches": tokens[:, 1:].reshape(4, 10, 10, 64),
        }[features].numpy()
    found = load_file(out) if ending == "safetensors" else np.load(out)
    assert found["good"].tolist() == [True, True, False, True, True]
    np.testing.assert_allclose(found["features"][found["good"]], judge, atol=2e-5)
    assert not found["features"][2].any()
    assert read_embedding(out).paths == [f"a/{i}.png" for i in range(5)]


def test_an_earlier_layer_is_timms(lomar: Command, plain: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    words = f"--model scratch:test_vit {HERE} --layer 3 --features patches --dtype float16"
    assert lomar("embed", words, "--data", plain, "--out", tmp_path / "e.npz").status == 0
    with torch.inference_mode():
        images = tensor_of(COLOURS, model.pretrained_cfg)
        (judge,) = model.forward_intermediates(images, indices=[2], norm=True, intermediates_only=True)
    found = read_embedding(tmp_path / "e.npz")
    assert found.features.dtype == np.float16 and found.about["layer"] == 3
    np.testing.assert_allclose(found.features[found.good], judge.permute(0, 2, 3, 1), atol=4e-3)


def test_maps_of_a_convolutional_model_are_timms(lomar: Command, plain: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0).eval()
    words = f"embed --model scratch:test_resnet {HERE} --features patches"
    assert lomar(words, "--data", plain, "--out", tmp_path / "e.safetensors").status == 0
    with torch.inference_mode():
        judge = model.forward_features(tensor_of(COLOURS, model.pretrained_cfg)).permute(0, 2, 3, 1)
    found = load_file(tmp_path / "e.safetensors")
    np.testing.assert_allclose(found["features"][found["good"]], judge, atol=2e-5)


@pytest.mark.parametrize(
    ("model", "size", "shape"),
    [
        ("scratch:16x1x1", "--image-size 48 80", (3, 5, 16)),
        ("scratch:test_resnet", "", (5, 5, 96)),  # of maps whose sides are rounded up
        ("scratch:test_convnext", "--image-size 96 160", (3, 5, 64)),
    ],
)
def test_patches_keep_their_grid(
    model: str, size: str, shape: tuple[int, ...], lomar: Command, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "e.safetensors"
    words = f"embed --model {model} {size} {HERE} --features patches"
    assert lomar(words, "--data", photos / "red", "--out", out).status == 0
    features = load_file(out)["features"]
    assert features.shape[0] == 4 and features.shape[1:] == shape


def test_16_bit_images_of_five_channels_are_read_as_the_model_takes_them(lomar: Command, tmp_path: Path) -> None:
    told = {"mean": (0.1, 0.2, 0.3, 0.4, 0.5), "std": (0.5, 0.4, 0.3, 0.2, 0.1), "scale": 65535.0}
    shape = {"embed_dim": 12, "num_heads": 3, "depth": 1, "image_size": 24, "patch_size": 8, "window_size": 2}
    composition = replace(RECIPES["lomar"].composition("lomar"), **shape, **told)
    save_encoder(tmp_path / "encoder.safetensors", composition.encoder(), composition)
    (tmp_path / "data").mkdir()
    value = np.array([0, 1000, 30_000, 65_535, 7], np.uint16)
    np.save(tmp_path / "data" / "0.npy", np.broadcast_to(value[:, None, None], (5, 31, 37)))
    words = (f"embed {HERE} --features patches --model", tmp_path / "encoder.safetensors")
    assert lomar(*words, "--data", tmp_path / "data", "--out", tmp_path / "e.npz").status == 0
    mean, std = torch.tensor(told["mean"]), torch.tensor(told["std"])
    image = ((torch.from_numpy(value.astype(np.float32)) / 65535 - mean) / std)[None, :, None, None].expand(
        1, 5, 24, 24
    )
    with torch.inference_mode():
        judge = package.load(tmp_path / "encoder.safetensors").forward_features(image)[0, 1:].reshape(3, 3, 12)
    np.testing.assert_allclose(read_embedding(tmp_path / "e.npz").features[0], judge, atol=1e-5)


def test_what_it_says(lomar: Command, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.npz"
    outcome = lomar(SMALL, "--batch-size 2 --data", plain, "--out", out)
    assert outcome.status == 0 and outcome.err == ""
    first, second, third = outcome.out.splitlines()
    assert first.startswith("5 images: pooled of layer 2, 16 float32 each, 0.00032 MB in all; 2 at once in fp32 on CPU")
    assert re.fullmatch(rf"{re.escape(str(out))}: 5 rows, \d+ images/s", second)
    assert third == (
        "1 of 5 images cannot be used; their rows are zeros and not good: "
        f"{plain}/a/2.png (the content is not an image, despite .png)"
    )


def test_the_metadata_rebuild_the_embedding(lomar: Command, photos: Path, tmp_path: Path) -> None:
    assert lomar(SMALL, "--data", photos, "--out", tmp_path / "e.npz").status == 0
    found = read_embedding(tmp_path / "e.npz")
    told = {key: found.about[key] for key in ("model", "features", "layer", "image_size", "crop", "mean", "scale")}
    assert told == {
        "model": "scratch:16x2x2",
        "features": "pooled",
        "layer": 2,
        "image_size": [32, 32],
        "crop": 0.875,
        "mean": [0.485, 0.456, 0.406],
        "scale": 255.0,
    }
    assert found.about["version"] == package.__version__ and found.root == str(photos)
    source = open_source(str(photos))
    assert [os.fsencode(found.file(i)) for i in range(8)] == [source.path(i) for i in range(8)]


@pytest.mark.parametrize("data", ["list", "image", "sample", "relative"])
def test_paths_lead_back_to_the_images(
    data: str, lomar: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    (tmp_path / "list.txt").write_text(f"{photos}/red/1.png\nnear.png\n")
    (tmp_path / "near.png").write_bytes((photos / "red" / "0.png").read_bytes())
    name = {"list": str(tmp_path / "list.txt"), "image": "red/1.png", "sample": "sample", "relative": "red"}[data]
    assert (
        lomar(f"embed --model scratch:16x1x1 --image-size 16 {HERE} --data", name, "--out", tmp_path / "e.npz").status
        == 0
    )
    monkeypatch.chdir(tmp_path)
    found = read_embedding("e.npz")
    assert len(found.paths) > 0 and all(Path(found.file(i)).is_file() for i in range(len(found.paths)))


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_resumed_it_is_the_uninterrupted_file_byte_for_byte(
    batch: int, ending: str, lomar: Command, photos: Path, tmp_path: Path, stops_in: Callable[..., None]
) -> None:
    """Other processes may read the images then."""
    words = (SMALL, "--batch-size 3 --data", photos, "--out")
    assert lomar(*words, tmp_path / f"whole.{ending}").status == 0
    out = tmp_path / f"e.{ending}"
    stops_in(batch, interrupt)
    assert lomar(*words, out).status == 130
    assert not out.exists() and begun(out) == 3 * batch
    outcome = lomar(*words, out, "--resume --workers 1")
    assert outcome.status == 0 and outcome.out.startswith(f"8 images{f', from {3 * batch} on' if batch else ''}: ")
    assert out.read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    assert not partial_of(out).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_batch(
    number: int, lomar: Command, photos: Path, tmp_path: Path, stops_in: Callable[..., None]
) -> None:
    out = tmp_path / "e.npz"
    stops_in(1, lambda: os.kill(os.getpid(), number))
    outcome = lomar(SMALL, "--batch-size 3 --data", photos, "--out", out)
    assert outcome.status == 128 + number and begun(out) == 6
    assert outcome.out.endswith("stopped after 6 of 8 images; go on with --resume\n")


def test_killed_with_9_it_goes_on(lomar: Command, photos: Path, tmp_path: Path) -> None:
    words = (SMALL, "--batch-size 3 --data", photos, "--out")
    out = tmp_path / "e.safetensors"
    arguments = [*SMALL.split(), "--batch-size", "3", "--data", str(photos), "--out", str(out)]
    code = f"""
import os, signal
from lomar.cli import main
from lomar.commands import frozen
from lomar.downstream import embedding_writer
embedding_writer.KEEP_EVERY_S = -1.0
real = frozen.features_in_batches
def features(*given):
    for number, found in enumerate(real(*given)):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield found
frozen.features_in_batches = features
main({arguments!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and begun(out) == 6, done.stderr
    assert lomar(*words, out, "--resume").status == 0
    assert lomar(*words, tmp_path / "whole.safetensors").status == 0
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_what_is_finished_is_not_made_again(lomar: Command, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.npz"
    words = (SMALL, "--data", photos, "--out", out)
    assert lomar(*words).status == 0
    before = out.stat().st_mtime_ns
    outcome = lomar(*words, "--resume")
    assert (outcome.status, outcome.out) == (0, f"{out} is finished: 8 images\n")
    outcome = lomar(*words, "--resume --features mean")
    assert outcome.status == 2 and f"{out} was begun with features pooled, not mean" in outcome.err
    assert out.stat().st_mtime_ns == before
    assert lomar(*words, "--overwrite --features mean").status == 0
    assert read_embedding(out).about["features"] == "mean"


def test_resume_begins_where_nothing_was_begun(lomar: Command, photos: Path, tmp_path: Path) -> None:
    """One command line serves a job that is started again and again."""
    words = (SMALL, "--data", photos, "--out")
    out = tmp_path / "e.npz"
    assert lomar(*words, tmp_path / "whole.npz").status == 0
    partial_of(out).mkdir()  # as a kill leaves it that comes before the first row
    (partial_of(out) / "rows").write_bytes(b"some")
    assert lomar(*words, out, "--resume").status == 0
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not partial_of(out).exists()


def test_what_a_kill_left_beside_a_finished_file_goes(lomar: Command, photos: Path, tmp_path: Path) -> None:
    """It came after the file had its name and before the folder in which it was made was deleted."""
    out = tmp_path / "e.safetensors"
    words = (SMALL, "--data", photos, "--out", out)
    assert lomar(*words).status == 0
    whole = out.read_bytes()
    partial_of(out).mkdir()
    (partial_of(out) / "state.json").write_text("{}")
    (tmp_path / f".{out.name}.lock").touch()
    assert lomar(*words, "--resume").out == f"{out} is finished: 8 images\n"
    assert out.read_bytes() == whole and [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("words", ["", "--resume", "--overwrite"])
def test_what_another_command_keeps_there_is_not_deleted(
    words: str, lomar: Command, photos: Path, tmp_path: Path
) -> None:
    """`lomar tokenizer train` keeps its checkpoints in a folder of the same name."""
    checkpoint = tmp_path / "t.safetensors.partial" / "step-000000700.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    outcome = lomar(SMALL, "--data", photos, "--out", tmp_path / "t.safetensors", words)
    assert outcome.status == 2 and f"{checkpoint.parent} holds something else; give another file" in outcome.err
    assert checkpoint.exists()


def test_what_was_begun_is_neither_lost_nor_mixed(
    lomar: Command, photos: Path, tmp_path: Path, stops_in: Callable[..., None]
) -> None:
    data, out = tmp_path / "data", tmp_path / "e.npz"
    data.mkdir()
    for number in range(4):
        (data / f"{number}.png").write_bytes((photos / "red" / f"{number}.png").read_bytes())
    words = (SMALL, "--batch-size 2 --data", data, "--out", out)
    stops_in(1, interrupt)
    assert lomar(*words).status == 130
    outcome = lomar(*words)
    assert outcome.status == 2
    assert outcome.err == (
        f"lomar: error: --out {out} was begun and has 2 rows; --resume goes on, --overwrite starts anew\n"
    )
    for other, message in {
        "--layer 1": "was begun with layer 2, not 1",
        "--batch-size 3": "was begun with batch size 2, not 3",
        "--model scratch:16x3x2": "was begun with other weights",
        "--precision bf16": "was begun with precision fp32, not bf16",
    }.items():
        outcome = lomar(*words, "--resume", other)
        assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1
    (data / "4.png").write_bytes((photos / "red" / "0.png").read_bytes())
    outcome = lomar(*words, "--resume")
    assert outcome.err == f"lomar: error: --resume: {out} was begun with other images; --overwrite starts anew\n"
    (data / "4.png").unlink()
    assert begun(out) == 2
    assert lomar(*words, "--resume").status == 0


def test_a_run_and_images_that_moved_go_on(
    lomar: Command,
    finished_run: Path,
    photos: Path,
    tmp_path: Path,
    stops_in: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So do those that are named from another folder; the file says what it was begun with."""
    shutil.copytree(photos, tmp_path / "before" / "photos")
    shutil.copytree(finished_run, tmp_path / "before" / "run")
    out = tmp_path / "e.safetensors"
    words = ("embed", HERE, "--batch-size 3 --out", out)
    monkeypatch.chdir(tmp_path / "before")
    stops_in(1, interrupt)
    assert lomar(*words, "--model run --data photos").status == 130
    monkeypatch.chdir(tmp_path)
    (tmp_path / "before").rename(tmp_path / "after it moved")
    moved = ("--model", tmp_path / "after it moved" / "run", "--data", tmp_path / "after it moved" / "photos")
    outcome = lomar(*words, *moved, "--resume")
    assert outcome.status == 0 and outcome.out.startswith("8 images, from 3 on: ")
    about = read_embedding(out).about
    assert (about["model"], about["root"]) == ("run", f"{tmp_path}/before/photos")
    assert lomar(*words, *moved, "--resume").out == f"{out} is finished: 8 images\n"


def test_a_disk_that_becomes_full_is_one_line_and_what_was_begun_goes_on(
    lomar: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "e.npz"
    words = (SMALL, "--batch-size 3 --resume --data", photos, "--out")
    assert lomar(*words, tmp_path / "whole.npz").status == 0
    write = EmbeddingWriter.write

    def full(self: EmbeddingWriter, *rows: Any) -> None:
        if self.rows == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingWriter, "write", full)
        outcome = lomar(*words, out)
    reason = "No space left on device; --resume goes on when it can"
    assert (outcome.status, outcome.err) == (2, f"lomar: error: --out {out} cannot be written: {reason}\n")
    assert lomar(*words, out).status == 0
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_the_disk_is_looked_at_first(
    lomar: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(subject.shutil, "disk_usage", lambda folder: usage(10, 10, 400))
    out = tmp_path / "deep" / "e.npz"
    outcome = lomar(SMALL, "--data", photos, "--out", out)
    assert outcome.status == 2 and outcome.err == (
        f"lomar: error: --out {out} needs 1.04e-06 GB, but {tmp_path} has 4e-07 GB free; "
        "--dtype float16 halves it and a .safetensors needs half of it\n"
    )
    assert not out.parent.exists()


def test_images_none_of_which_can_be_read_are_refused(lomar: Command, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    np.save(tmp_path / "b.npy", np.zeros((7, 7, 5), np.uint8))
    outcome = lomar(SMALL, "--data", tmp_path, "--out", tmp_path / "e.npz")
    assert outcome.err == (
        f"lomar: error: --data: none of 2 files can be read, for example {tmp_path}/b.npy: "
        "5 channels where 3 are wanted\n"
    )
    assert outcome.status == 2 and not partial_of(tmp_path / "e.npz").exists()


def test_features_that_are_not_finite_are_not_good(
    lomar: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither all of them, which is an error, nor one."""
    real = frozen.features_in_batches
    bad: list[int] = [*range(8)]

    def features(*given: Any) -> Iterator[Any]:
        for (found,), good in real(*given):
            found = found.clone()
            found[bad] = 1e6
            yield [found], good

    monkeypatch.setattr(frozen, "features_in_batches", features)
    out = tmp_path / "e.npz"
    words = (SMALL, "--dtype float16 --data", photos, "--out", out)
    outcome = lomar(*words)
    assert outcome.status == 2 and "none of 8 images can be used: " in outcome.err
    assert outcome.err.endswith("(its features are not finite) and more\n") and not partial_of(out).exists()
    bad[:] = [5]
    outcome = lomar(*words)
    assert outcome.out.endswith(f"not good: {photos}/red/1.png (its features are not finite)\n")
    assert read_embedding(out).good.tolist() == [True] * 5 + [False] + [True] * 2


@pytest.mark.parametrize(
    ("device", "model", "size", "expected"),
    [
        ("cpu", "scratch:16x1x1", "256", 64),
        ("cpu", "scratch:16x1x1", "512", 4),
        ("cpu", "scratch:16x1x1", "512 1024", 1),
        ("cpu", "scratch:test_resnet", "", 64),
        ("cuda", "scratch:16x1x1", "512", 64),
        ("cuda", "scratch:16x1x1", "1024", 4),
    ],
)
def test_fewer_images_at_once_where_each_has_many_patches(device: str, model: str, size: str, expected: int) -> None:
    encoder = subject.open_frozen(
        model,
        tuple(map(int, size.split())) or None,
        seed=0,
        device="cpu",
        precision="fp32",
        workers=0,
    )
    assert subject._batch_size(replace(encoder, hardware=replace(encoder.hardware, device=device))) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data {photos} --out {out}", "--model is missing; see lomar embed --help"),
        ("--model {model} --out {out}", "--data is missing; see lomar embed --help"),
        ("--model {model} --data {photos}", "--out is missing; see lomar embed --help"),
        ("--model {model} --data {photos} --out e.pt", "--out is e.pt; it must end in .safetensors or .npz"),
        ("--model {model} --data {photos} --out {there}", "--out {there} exists; --overwrite replaces it"),
        ("--model {model} --data {photos} --out {folder}", "--out {folder} is a folder"),
        ("--model {model} --data {photos} --out {there} --resume", "{there} is no embedding; lomar embed writes one"),
        (
            "--model {model} --data {photos} --out {out} --resume --overwrite",
            "--resume and --overwrite are both given; give one",
        ),
        (
            "--model {model} --data {photos} --out {there}/e.npz",
            "--out {there}/e.npz cannot be written: Not a directory",
        ),
        ("--model {model} --data nowhere --out {out}", "--data nowhere: no such folder or file"),
        ("--model nowhere --data {photos} --out {out}", "--model nowhere: there is no such run or file"),
        ("--model {model} --data {photos} --out {out} --layer 2", "--layer 2: the model has layers 1 to 1"),
        ("--model scratch:test_resnet --data {photos} --out {out} --features cls", "--features: the model has no cls"),
        ("--model {model} --data {photos} --out {out} --image-size 33", "--image-size 33 is not a multiple"),
        ("--model {model} --data {photos} --out {out} --dtype int8", "--dtype is 'int8'; it can be float32, float16"),
    ],
)
def test_what_cannot_be_embedded_is_one_line(
    words: str, message: str, lomar: Command, photos: Path, tmp_path: Path
) -> None:
    named = {"model": "scratch:16x1x1", "photos": photos, "out": tmp_path / "e.npz", "there": tmp_path / "there.npz"}
    named["folder"] = tmp_path / "folder.npz"
    named["folder"].mkdir()
    named["there"].write_text("here already")
    outcome = lomar("embed", words.format(**named), "--device cpu")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and message.format(**named) in outcome.err
    assert not (tmp_path / "e.npz").exists() and not (tmp_path / "e.npz.partial").exists()
    assert named["there"].read_text() == "here already"


def test_the_python_of_the_guide_runs(
    lomar: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for ending in ("safetensors", "npz"):
        assert lomar(SMALL, "--data", photos, "--out", f"features.{ending}").status == 0
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.S)
    assert len(blocks) == 7
    found = []
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
        found.append(names.get("paths"))
    expected = [f"{folder}/{number}.png" for folder in ("blue", "red") for number in range(4)]
    assert found[1] == found[2] == expected and names["about"]["features"] == "pooled"
    assert names["places"].shape == (2, 3) and len(names["groups"]) == 8 and isinstance(names["duplicates"], list)
    printed = capsys.readouterr().out
    assert printed.count(".png") >= 3 + 8
    assert json.dumps(names["about"])
