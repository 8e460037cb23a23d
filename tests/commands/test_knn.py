"""Claims about `lomar knn`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from lomar import load
from lomar.commands.frozen import FrozenEncoder
from lomar.data.decode import PixelFormat
from lomar.data.loader import centre_crops
from lomar.data.opening import open_source
from lomar.data.sources import ImageSource

QUICK = "--workers 0 --device cpu --precision fp32"
LABELS = [0] * 4 + [1] * 4  # blue, red


@pytest.fixture
def train_and_val(photos: Path, tmp_path: Path) -> Path:
    for part in ("train", "val"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / part).symlink_to(photos)
    return tmp_path / "data"


def rows_of(out: str) -> list[list[str]]:
    lines = out.splitlines()
    return [line.split() for line in lines[lines.index(next(line for line in lines if "top-1" in line)) + 1 :]]


def test_accuracies_are_those_of_scikit_learn_on_the_encoders_features(
    lomar, finished_run: Path, photos: Path, train_and_val: Path, tmp_path: Path
) -> None:
    out = tmp_path / "knn.json"
    done = lomar(f"knn {QUICK} --features mean --layers 1 3 --k 1 5 --temperature 0.1 --out", out, "--model",
                 finished_run, "--data", train_and_val)  # fmt: skip
    assert (done.status, done.err) == (0, "")
    encoder = load(finished_run)
    source = open_source(str(photos))
    pixels, _ = next(centre_crops(source, PixelFormat(3, "uint8"), 32, 0))
    mean, std = (torch.tensor(encoder.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        maps = encoder.forward_intermediates((pixels / 255 - mean) / std, norm=True, intermediates_only=True)
    told = json.loads(out.read_text())
    expected = []
    for layer in (1, 3):
        features = torch.nn.functional.normalize(maps[layer - 1].mean(dim=(2, 3)), dim=1)
        for k in (1, 5):
            judge = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1))
            expected.append({"layer": layer, "k": k, "top1": judge.fit(features, LABELS).score(features, LABELS)})
    assert [{name: row[name] for name in ("layer", "k", "top1")} for row in told["results"]] == expected
    assert rows_of(done.out) == [[str(r["layer"]), str(r["k"]), f"{100 * r['top1']:.2f}"] for r in expected]
    assert told["train"] == told["val"] == {"images": 8, "unusable": []} and told["classes"] == ["blue", "red"]
    assert "8 val images asked about, 8 train images vote, 2 classes\n" in done.out
    assert (told["crop"], told["interpolation"]) == (0.875, "bicubic")


def test_unreadable_images_are_counted_named_and_left_out(lomar, photos: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in ("red", "blue"):
            (tmp_path / part / label).mkdir(parents=True)
            for image in (photos / label).iterdir():
                (tmp_path / part / label / image.name).symlink_to(image)
    (tmp_path / "train" / "red" / "bad.jpg").write_bytes(b"no image")
    for number in range(4):
        (tmp_path / "val" / "blue" / f"bad{number}.png").write_bytes(b"")
    done = lomar(f"knn {QUICK} --model scratch:16x2x2 --image-size 32 --data", tmp_path, "--k 3")
    bad = ", ".join(f"{tmp_path / 'val' / 'blue' / f'bad{n}.png'} (empty file)" for n in range(3))
    assert done.err == (
        f"lomar: 4 of 12 val images cannot be used and are left out: {bad} and more\n"
        f"lomar: 1 of 9 train images cannot be used and are left out: {tmp_path / 'train' / 'red' / 'bad.jpg'} "
        "(the content is not an image, despite .jpg)\n"
    )
    assert "8 val images asked about, 8 train images vote" in done.out


def test_more_neighbours_than_images_are_refused_before_the_work(
    lomar, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*arguments: Any) -> None:
        raise AssertionError("features are made")

    monkeypatch.setattr(FrozenEncoder, "features", unexpected)
    done = lomar(f"knn {QUICK} --model scratch:16x2x2 --image-size 32 --k 7 --data", photos)
    assert done.err == "lomar: error: --k 7: there are 6 train images to be neighbours\n"


def test_where_fewer_images_can_be_used_all_of_them_vote(lomar, train_and_val: Path, tmp_path: Path) -> None:
    """Nothing that was computed is thrown away."""
    labels = [f"{train_and_val}/train/{label}/{number}.png,{label}" for label in ("red", "blue") for number in range(4)]
    (tmp_path / "bad.png").write_bytes(b"")
    table = tmp_path / "all.csv"
    rows = [*(f"{line},train" for line in labels), f"{tmp_path}/bad.png,red,train"]
    rows += [f"{line.replace('/train/', '/val/')},val" for line in labels]
    table.write_text("path,label,split\n" + "\n".join(rows) + "\n")
    done = lomar(f"knn {QUICK} --model scratch:16x2x2 --image-size 32 --k 2 9 8 --data", table)
    assert done.status == 0 and [row[1] for row in rows_of(done.out)] == ["2", "8"]
    assert done.err.endswith("lomar: --k 9: 8 train images can be used, and all of them vote\n")


def test_val_judges_in_the_place_of_what_data_has(lomar, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "red").symlink_to(photos / "red")
    words = (f"knn {QUICK} --model scratch:16x2x2 --image-size 32 --k 3 --data", photos)
    out = lomar(*words, "--val", tmp_path).out
    assert "4 val images asked about, 8 train images vote" in out


def test_no_seed_changes_which_images_judge(lomar, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    features = FrozenEncoder.features

    def kept(self: FrozenEncoder, source: ImageSource, wanted: Any, batch_size: int) -> Any:
        asked.append([source.name(index) for index in range(len(source))])
        return features(self, source, wanted, batch_size)

    monkeypatch.setattr(FrozenEncoder, "features", kept)
    for seed in range(4):
        words = f"knn {QUICK} --model scratch:16x2x2 --image-size 32 --k 3 --seed {seed} --data"
        assert lomar(words, photos).status == 0
    assert len(asked) == 8 and all(asked[place] == asked[place % 2] for place in range(8))


@pytest.mark.parametrize("name", ["test_vit2", "test_resnet"])
def test_any_model_of_timm_is_judged_at_any_shape(lomar, photos: Path, name: str) -> None:
    done = lomar(f"knn {QUICK} --model scratch:{name} --image-size 32 64 --layers 2 5 --k 2 --data", photos)
    assert done.status == 0 and [row[:2] for row in rows_of(done.out)] == [["2", "2"], ["5", "2"]]
    assert "32 x 64 px" in done.out and "(a fifth, drawn from all)" in done.out


def test_many_channels_and_16_bits_go_through_the_encoders_input(lomar, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label, high in (("low", 9_000), ("high", 60_000)):
        (tmp_path / label).mkdir()
        for number in range(5):
            np.save(tmp_path / label / f"{number}.npy", rng.integers(0, high, (5, 40, 36), dtype=np.uint16))
    run = tmp_path / "run"
    settings = "--model 16x2x2 --image-size 16 --patch-size 8 --window-size 2 --batch-size 4 --max-steps 1 --workers 0"
    assert lomar("pretrain --data", tmp_path, "--out", run, settings, "--precision fp32 --device cpu").status == 0
    done = lomar(f"knn {QUICK} --k 1 --model", run, "--data", tmp_path)
    assert done.status == 0 and rows_of(done.out)[0][-1] == "100.00"


def test_top_5_is_told_where_there_are_classes_enough(lomar, tmp_path: Path) -> None:
    for label in range(10):
        for number in range(3):
            (tmp_path / f"c{label}").mkdir(exist_ok=True)
            Image.new("RGB", (16, 16), (25 * label, 0, number)).save(tmp_path / f"c{label}" / f"{number}.png")
    done = lomar(f"knn {QUICK} --model scratch:16x2x2 --image-size 16 --k 5 --data", tmp_path)
    (row,) = rows_of(done.out)
    assert "top-5 %" in done.out and len(row) == 4 and float(row[2]) <= float(row[3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layers 3", "--layers 3: the model has layers 1 to 2"),
        ("--k 50", "--k 50: there are 6 train images to be neighbours"),
        ("--image-size 30", "--image-size 30 is not a multiple of the model's patches of 16 px; 32 would be"),
        ("--features best", "--features is 'best'; it can be pooled, cls, mean"),
        ("--out {here}", "--out {here} already exists; give another file, or remove it"),
        ("--seed -1", "--seed is '-1'; it must be a whole number, at least 0"),
        ("--data {here}/only", "--data {here}/only: there is one class alone, 'a'; at least two are needed"),
        (
            "--model scratch:test_vit2 --image-size 32 --features cls",
            "--features cls: the model has no cls token; features can be pooled or mean",
        ),
        (
            "--data {here}/bad --k 1",
            "--data {here}/bad: none of 2 val images can be read, for example {here}/bad/val/b/1.jpg: the content is "
            "not an image, despite .jpg",
        ),
        (
            "--val {here}/bad/val --k 1",
            "--val {here}/bad/val: class 'a' is to be judged, but no image of it is there to train on",
        ),
    ],
)
def test_bad_input_is_one_line(lomar, photos: Path, tmp_path: Path, words: str, message: str) -> None:
    for name in ("only/a/1.jpg", "bad/train/a/1.jpg", "bad/train/b/1.jpg", "bad/val/a/1.jpg", "bad/val/b/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"no image")
    given = words.replace("{here}", str(tmp_path))
    rest = "" if "--image-size" in words else "--image-size 32"
    model = "" if "--model" in words else "--model scratch:16x2x2"
    data = "" if "--data" in words else f"--data {photos}"
    done = lomar(f"knn {QUICK}", *(each for each in (model, data, rest, given) if each))
    assert (done.status, done.out) == (2, "")
    assert done.err == f"lomar: error: {message.replace('{here}', str(tmp_path))}\n"


def test_missing_options_are_named(lomar) -> None:
    assert lomar("knn --data x").err == "lomar: error: --model is missing; see lomar knn --help\n"
    assert lomar("knn --model tiny").err == "lomar: error: --data is missing; see lomar knn --help\n"
