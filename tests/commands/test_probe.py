"""Claims about `lomar probe`."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lomar import load
from lomar.commands import probe, probe_cache, probe_learning, probe_results, probe_settling
from lomar.commands.frozen import FrozenEncoder
from lomar.commands.probe_cache import number_type
from lomar.commands.probe_learning import MaeProbe, Scores, SweepProbe, best_head
from lomar.commands.probe_settling import SettledProbe, choose
from lomar.data.augment import clamped_crop
from lomar.data.decode import PixelFormat
from lomar.data.labels import SPLIT_SEED, held_out, labelled_data
from lomar.data.loader import centre_crops
from lomar.downstream.embedding import begun
from lomar.downstream.embedding_writer import EmbeddingWriter
from lomar.downstream.probe import HeadInput
from lomar.errors import TrainingError, UserError
from lomar.interop.weights import read_file, save_file
from lomar.model import Encoder
from lomar.seeding import seeded
from lomar.training.checkpoint import Checkpoints
from lomar.training.records import Metrics

QUICK = "--workers 0 --device cpu --precision fp32"
MODEL = "--model scratch:16x2x2 --image-size 32"
FAST = f"{QUICK} {MODEL} --base-lrs 0.1 1 10 --batch-size 4 --epochs 9"
MAE = f"{QUICK} {MODEL} --protocol mae --batch-size 4 --epochs 5"


@pytest.fixture(autouse=True)
def small(miniature: None) -> None:
    """One thread."""


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "probe.json").read_text())
    return found


def lasting(folder: Path) -> tuple[Any, ...]:
    """What an interruption must not change: the numbers and the head, but not times and places."""
    numbers = result(folder)
    del numbers["training_s"], numbers["options"]["out"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    course = [{k: v for k, v in row.items() if k not in ("images_per_s", "data_wait", "elapsed_s")} for row in rows]
    head = {name: tensor.tolist() for name, tensor in load_file(folder / "probe.safetensors").items()}
    return numbers, course, head


@pytest.fixture
def stopped_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, int, int], None]:
    """Let a signal come in a step of the next probe."""

    def arrange(kind: type, last: int, number: int) -> None:
        learn = kind.learn  # type: ignore[attr-defined]
        done = []

        def watched(self: Any, lr: float) -> Any:
            done.append(lr)
            if len(done) == last:
                monkeypatch.setattr(kind, "learn", learn)
                os.kill(os.getpid(), number)
            return learn(self, lr)

        monkeypatch.setattr(kind, "learn", watched)

    return arrange


# The sweep


def test_the_sweep_leaves_numbers_and_a_head_that_anyone_can_apply(
    lomar, finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "probe"
    words = f"{QUICK} --base-lrs 0.1 10 --batch-size 4 --epochs 9 --layers 1 3 --features cls+mean mean"
    done = lomar("probe --model", finished_run, "--data", photos, "--out", out, words)
    assert done.status == 0 and f"val: top-1 {result(out)['chosen']['val']['top1']:.2%}" in done.out
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "probe.json",
        "probe.safetensors",
        "train.log",
    ]
    found = result(out)
    assert len(found["heads"]) == 6 * 2  # two kinds of two layers, and cls tokens joined with and without the mean
    assert found["images"] == {
        part: {"images": count, "unusable": []} for part, count in (("fit", 4), ("held_out", 2), ("val", 2))
    }
    # The head, on features read by hand.
    with safe_open(out / "probe.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lomar"])
        head = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    val = labelled_data(str(photos), seed=0).val
    encoder = load(finished_run)
    pixels, _ = next(centre_crops(val.source, PixelFormat(3, "uint8"), 32, 0))
    mean, std = (torch.tensor(encoder.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        layers = encoder.forward_intermediates(
            (pixels / 255 - mean) / std, norm=True, intermediates_only=True, return_prefix_tokens=True
        )
    kinds = {"mean": lambda each: each[0].mean(dim=(2, 3)), "cls": lambda each: each[1][:, 0]}
    features = torch.cat([kinds[kind](layers[layer - 1]) for kind, layer in told["features"]], dim=1)
    logits = (features - head["mean"]) / head["std"] @ head["weight"].T + head["bias"]
    labels = torch.from_numpy(val.labels)
    assert told["classes"] == ["blue", "red"]
    assert F.cross_entropy(logits, labels).item() == pytest.approx(found["chosen"]["val"]["loss"], abs=2e-5)
    assert (logits.argmax(dim=1) == labels).float().mean().item() == found["chosen"]["val"]["top1"]


@pytest.mark.parametrize("protocol", ["fast", "mae"])
def test_the_python_of_the_guide_classifies_as_the_probe_did(
    lomar,
    finished_run: Path,
    photos: Path,
    tmp_path: Path,
    protocol: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    words = f"{QUICK} --protocol {protocol} --batch-size 4 --epochs 9 --data photos --out probe"
    assert lomar("probe --model", finished_run, words).status == 0
    page = Path(__file__).parents[2] / "docs" / "probing.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    names: dict[str, Any] = {}
    exec(compile(block, str(page), "exec"), names)
    source = names["photos"]
    rows = {source.name(index): logits for index, logits in enumerate(names["logits"])}
    val = labelled_data("photos", SPLIT_SEED).val
    logits = torch.stack([rows[val.source.name(index)] for index in range(len(val))])
    loss = F.cross_entropy(logits, torch.from_numpy(val.labels)).item()
    assert loss == pytest.approx(result(Path("probe"))["chosen"]["val"]["loss"], abs=2e-5)
    guesses = [names["told"]["classes"][int(each)] for each in names["logits"].argmax(dim=1)]
    shown = "".join(f"{source.name(index)} {guess}\n" for index, guess in enumerate(guesses))
    assert shown in capsys.readouterr().out


def test_the_head_is_chosen_by_what_was_held_out_and_never_by_val(
    lomar, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = SweepProbe.scores

    def told(self: SweepProbe, cached: Any) -> Any:
        """Of what was held out the worst rate does best, by its loss; of val another one."""
        found = scores(self, cached)
        if cached is self.held:
            loss = torch.ones_like(found.loss)
            loss[1, 0] = 0.5
            return found._replace(top1=torch.ones_like(found.top1), loss=loss)
        return found._replace(top1=torch.zeros_like(found.top1).index_fill(1, torch.tensor(2), 1.0))

    monkeypatch.setattr(SweepProbe, "scores", told)
    assert lomar("probe", FAST, "--data", photos, "--out", tmp_path / "p").status == 0
    chosen = result(tmp_path / "p")["chosen"]
    assert (chosen["input"], chosen["base_lr"], chosen["val"]["top1"]) == ("cls+mean of layer 1", 0.1, 0.0)


def test_what_was_held_out_is_neither_learnt_from_nor_part_of_the_statistics(
    lomar, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    init = SweepProbe.__init__

    def kept(self: SweepProbe, options: Any, fit: Any, held: Any, *rest: Any) -> None:
        init(self, options, fit, held, *rest)
        seen.update(fit=fit, held=held, standard=self.standard)

    monkeypatch.setattr(SweepProbe, "__init__", kept)
    assert lomar("probe", FAST, "--data", photos, "--out", tmp_path / "p").status == 0
    assert (len(seen["fit"]), len(seen["held"])) == (4, 2)
    torch.testing.assert_close(seen["standard"].mean, seen["fit"].rows.mean(dim=0))
    assert not any((row == other).all() for row in seen["fit"].rows for other in seen["held"].rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_was_stopped_goes_on_as_if_it_had_not_been(
    lomar, photos: Path, tmp_path: Path, stopped_at, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert lomar("probe", FAST, "--data", photos, "--out", whole).status == 0
    stopped_at(SweepProbe, 4, number)
    done = lomar("probe", FAST, "--data", photos, "--out", parts)
    assert done.status == 128 + number
    assert f"stopped after step 4; go on with: lomar probe --out {parts} --resume" in done.out

    def unexpected(*arguments: Any) -> None:
        raise AssertionError("the features are there already")

    monkeypatch.setattr(FrozenEncoder, "features", unexpected)
    assert lomar("probe --out", parts, "--resume").status == 0
    assert lasting(parts) == lasting(whole)


def test_a_signal_while_features_are_made_leaves_no_half_of_them(
    lomar, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "p"
    assert lomar("probe", FAST, "--data", photos, "--out", whole).status == 0
    features = FrozenEncoder.features
    begun: list[int] = []

    def interrupted(self: FrozenEncoder, source: Any, wanted: Any, batch_size: int, first: int) -> Any:
        begun.append(first)
        for number, found in enumerate(features(self, source, wanted, batch_size, first)):
            if len(source) == 4 and first + number == 0:  # those to learn from come last
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    monkeypatch.setattr(probe_cache, "IMAGES_AT_ONCE", 3)
    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "features", interrupted)
        done = lomar("probe", FAST, "--data", photos, "--out", out)
        assert done.status == 143 and "stopped while features were made" in done.out
        assert sorted(path.name for path in out.glob("features*")) == [
            "features-fit.safetensors.partial",
            "features-held.safetensors",
            "features-val.safetensors",
        ]
        assert lomar("probe --out", out, "--resume").status == 0
    assert begun == [0, 0, 0, 3]  # only what was missing of the last part is made again
    assert lasting(out) == lasting(whole) and not list(out.glob("*features*"))
    done = lomar("probe --out", out, "--resume")
    assert done.status == 0 and f"the probe in {out} is finished" in done.out


def test_killed_while_features_are_made_it_goes_on_and_leaves_nothing(
    lomar, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_cache, "IMAGES_AT_ONCE", 3)
    out, words = tmp_path / "p", FAST.split()
    code = f"""
import os, signal, torch
torch.set_num_threads({torch.get_num_threads()})
from lomar.cli import main
from lomar.commands import frozen, probe_cache
from lomar.downstream import embedding_writer
embedding_writer.KEEP_EVERY_S, probe_cache.IMAGES_AT_ONCE = -1.0, 3
real, done = frozen.features_in_batches, []
def features(*given):
    for found in real(*given):
        done.append(found)
        if len(done) == 4:  # the second batch of the images to learn from
            os.kill(os.getpid(), signal.SIGKILL)
        yield found
frozen.features_in_batches = features
main({["probe", *words, "--data", str(photos), "--out", str(out)]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert begun(out / "features-fit.safetensors") == 3
    assert lomar("probe --out", out, "--resume").status == 0
    assert lomar("probe", FAST, "--data", photos, "--out", tmp_path / "whole").status == 0
    assert lasting(out) == lasting(tmp_path / "whole")
    left = ["config.yaml", "metrics.jsonl", "probe.json", "probe.safetensors", "train.log"]
    assert sorted(path.name for path in out.iterdir()) == left


def test_a_resumed_sweep_keeps_the_type_of_its_features(
    lomar, photos: Path, tmp_path: Path, stopped_at, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other memory may be free then: of features that are made before and after, all are of one type."""
    whole, out = tmp_path / "whole", tmp_path / "p"
    assert lomar("probe", FAST, "--data", photos, "--out", whole).status == 0
    features = FrozenEncoder.features

    def interrupted(self: FrozenEncoder, source: Any, *rest: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from features(self, source, *rest)

    monkeypatch.setattr(probe_cache, "IMAGES_AT_ONCE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "features", interrupted)
        assert lomar("probe", FAST, "--data", photos, "--out", out).status == 143
    monkeypatch.setattr(probe, "_free_bytes", lambda: 2 * 8 * 16 * 8 * 2 - 1)  # for float16 at most
    done = lomar("probe --out", out, "--resume")
    assert done.status == 0 and "are kept as float32" in done.out
    assert lasting(out) == lasting(whole)


# What is not finite, and what cannot be written


@pytest.fixture
def inseparable(photos: Path, tmp_path: Path) -> Path:
    """The same images in both classes, so that a head at too high a rate cannot but diverge."""
    for label in ("a", "b"):
        (tmp_path / "inseparable" / label).mkdir(parents=True)
        for number, image in enumerate(sorted(photos.rglob("*.png"))):
            (tmp_path / "inseparable" / label / f"{number}.png").symlink_to(image)
    return tmp_path / "inseparable"


@pytest.mark.parametrize("rate", ["3e38", "1e40"])
def test_heads_that_diverge_are_left_out_and_the_others_are_as_without_them(
    lomar, inseparable: Path, tmp_path: Path, rate: str
) -> None:
    found = {}
    for name, first in (("with", rate), ("without", "1e-9")):
        words = FAST.replace("0.1 1 10", f"{first} 0.1 1")
        done = lomar("probe", words, "--data", inseparable, "--out", tmp_path / name)
        assert done.status == 0, done.err
        found[name] = result(tmp_path / name)
        if name == "with":
            lost = [head for head in found[name]["heads"] if head["held_out"]["loss"] is None]
            assert f"{len(lost)} of 18 heads diverged and are left out, at --base-lrs {float(rate):g}\n" in done.out
    assert lost and all(head["base_lr"] == float(rate) for head in lost) and not any(head["chosen"] for head in lost)
    assert all(head["held_out"] == {"top1": None, "top5": None, "loss": None} for head in lost)
    others = [
        [{**head, "chosen": ""} for head in each["heads"] if head["base_lr"] in (0.1, 1)] for each in found.values()
    ]
    assert len(others[0]) == 12 and others[0] == others[1]
    rows = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    assert all(isinstance(row["loss"], float) and isinstance(row["grad_norm"], float) for row in rows)
    assert all(row["loss"] < 10 for row in rows) and all(0 <= row.get("held_out_top1", 0) <= 1 for row in rows)


def test_where_all_heads_diverge_it_is_said(lomar, inseparable: Path, tmp_path: Path) -> None:
    words = FAST.replace("0.1 1 10", "1e40 3e40")
    done = lomar("probe", words, "--data", inseparable, "--out", tmp_path / "p")
    assert done.status == 1 and done.err.count("\n") == 1 and "smaller --base-lrs may help" in done.err


def test_of_equal_heads_the_one_with_the_lower_loss_is_best_and_one_without_is_never() -> None:
    top1 = torch.tensor([[0.5, 0.75, math.nan], [0.75, 0.75, 0.25]])
    loss = torch.tensor([[1.0, 3.0, math.inf], [2.0, math.nan, 0.1]])
    assert best_head(Scores(top1, top1, loss)) == (1, 0)
    assert best_head(Scores(top1[0], top1[0], loss[0])) == (1,)
    assert best_head(Scores(*(torch.tensor(0.5),) * 3)) == ()
    with pytest.raises(TrainingError, match="no classifier has a finite loss on the images that judge"):
        best_head(Scores(top1, top1, torch.full((2, 3), math.nan)))


def test_the_table_names_of_equal_rates_the_one_with_the_lower_loss() -> None:
    equal = torch.full((2, 2), 0.5)
    held = Scores(equal, equal, torch.tensor([[2.0, 1.0], [math.nan, math.inf]]))
    inputs = [HeadInput("a", ()), HeadInput("b", ())]
    lines = probe_results._table(inputs, [0.01, 0.2], held, held, 0)
    assert lines[1].split() == ["a", "2e-01", "50.00", "50.00", "chosen"]
    assert lines[2].split(maxsplit=1) == ["b", "diverged at all rates"]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "name", "error", "reason"),
    [
        (Checkpoints, "save", FULL, FULL.strerror),
        (EmbeddingWriter, "write", FULL, FULL.strerror),
        (Metrics, "write", FULL, FULL.strerror),
        (probe_results, "save_file", FULL, FULL.strerror),
        (probe_results, "write_text", FULL, FULL.strerror),
    ],
)  # fmt: skip
def test_a_full_disk_is_one_line_and_what_was_begun_goes_on(
    place: Any,
    name: str,
    error: Exception,
    reason: str,
    lomar,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*given: Any) -> None:
        raise error

    whole, out = tmp_path / "whole", tmp_path / "p"
    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        done = lomar("probe", FAST, "--data", photos, "--out", out)
    goes_on = f"lomar probe --out {out} --resume goes on when it can"
    assert (done.status, done.err) == (2, f"lomar: error: --out {out} cannot be written: {reason}; {goes_on}\n")
    assert lomar("probe --out", out, "--resume").status == 0
    assert lomar("probe", FAST, "--data", photos, "--out", whole).status == 0
    assert lasting(out) == lasting(whole)


def test_unreadable_images_are_left_out_and_named(lomar, photos: Path, tmp_path: Path) -> None:
    for image in photos.rglob("*.png"):
        place = tmp_path / "data" / image.relative_to(photos)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(image)
    for label in ("red", "blue"):
        for number in range(3):
            (tmp_path / "data" / label / f"bad{number}.jpg").write_bytes(b"no image")
    done = lomar("probe", FAST, "--data", tmp_path / "data", "--out", tmp_path / "p")
    assert done.status == 0
    images = result(tmp_path / "p")["images"]
    named = sorted(name for part in images.values() for name in part["unusable"])
    assert named == sorted(str(path) for path in tmp_path.rglob("bad*"))
    assert sum(part["images"] for part in images.values()) == 8


@pytest.mark.parametrize("name", ["test_vit2", "test_resnet"])
def test_models_of_timm_without_cls_token_are_swept(lomar, photos: Path, tmp_path: Path, name: str) -> None:
    words = f"{QUICK} --model scratch:{name} --image-size 32 64 --base-lrs 1 --batch-size 4 --epochs 2"
    assert lomar("probe", words, "--data", photos, "--out", tmp_path / "p").status == 0
    found = result(tmp_path / "p")
    assert found["image_size"] == [32, 64] and len(found["heads"]) == 4
    assert all(head["input"].startswith("pooled") for head in found["heads"])


def test_the_sweep_learns(lomar, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "data" / f"c{label}").mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            pixels[:, :, label] += 30
            np.save(tmp_path / "data" / f"c{label}" / f"{number}.npy", pixels)
    words = f"{QUICK} --model scratch:32x2x2 --image-size 16 --epochs 30"
    assert lomar("probe", words, "--data", tmp_path / "data", "--out", tmp_path / "p").status == 0
    assert result(tmp_path / "p")["chosen"]["val"]["top1"] > 0.7


@pytest.mark.parametrize(("free", "expected"), [(9_600, "float32"), (9_599, "float16"), (4_800, "float16")])
def test_features_take_half_of_the_memory_at_most(free: int, expected: str) -> None:
    assert number_type(100, 12, free).name == expected


def test_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        number_type(1_281_167, 3072, 8 * 10**9)
    assert str(caught.value) == (
        "the features of 1,281,167 images, 3,072 numbers each, take 7.9 GB as float16, more than half of the 8.0 GB "
        "that are free; give fewer --layers or --features"
    )


# MAE's probe


def test_maes_crop_clamps_what_sticks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released code's steps, worked with the same draws: 0.9 of the area, width / height 1.3."""
    numbers = iter([0.9, math.log(1.3)])
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *bounds, generator: self.fill_(next(numbers)))
    height, width = 50, 70
    top, left, rows, columns = clamped_crop(height, width, generator=seeded(0))
    area = 0.9 * height * width
    assert (rows, columns) == (min(50, round((area / 1.3) ** 0.5)), min(70, round((area * 1.3) ** 0.5))) == (49, 64)
    assert 0 <= top <= 1 and 0 <= left <= 6


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000))
def test_maes_crop_lies_within_the_image(height: int, width: int, seed: int) -> None:
    top, left, rows, columns = clamped_crop(height, width, generator=seeded(seed))
    assert 1 <= rows <= height - top and 1 <= columns <= width - left and min(top, left) >= 0


def test_maes_crop_has_no_second_try() -> None:
    """Of a wide image about half of the boxes are too high; all of those are as high as the image."""
    heights = [clamped_crop(20, 80, generator=seeded(seed))[2] for seed in range(300)]
    assert 90 < sum(height == 20 for height in heights) < 250


def test_maes_probe_learns_and_leaves_its_head(lomar, finished_run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    words = f"{QUICK} --protocol mae --batch-size 4 --epochs 30"
    done = lomar("probe --model", finished_run, "--data", photos, "--out", out, words)
    assert done.status == 0
    found = result(out)
    assert found["chosen"]["input"] == "cls of layer 3" and found["chosen"]["base_lr"] == 0.1 * 16384 / 4
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == found["steps"] == 45 and sum("val_top1" in row for row in rows) >= 10
    assert rows[-1]["val_top1"] == found["chosen"]["val"]["top1"]
    assert max(row["lr"] for row in rows) == pytest.approx(6.4, rel=0.01) and rows[-1]["lr"] < 0.05
    assert rows[2]["lr"] == pytest.approx(6.4 * 3 / 5)  # a ninth of the steps has a rising rate
    with safe_open(out / "probe.safetensors", "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == {  # noqa: SIM118
            "weight": [2, 16], "bias": [2], "mean": [16], "std": [16],
        }  # fmt: skip


def test_maes_head_sees_the_frozen_cls_token_and_nothing_of_the_encoder_changes(
    lomar, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    close = MaeProbe.close

    def kept(self: MaeProbe) -> None:
        seen["encoder"] = self.encoder.model
        close(self)

    monkeypatch.setattr(MaeProbe, "close", kept)
    assert lomar("probe", MAE, "--data", photos, "--out", tmp_path / "p").status == 0
    torch.manual_seed(0)
    fresh = Encoder(224, 16, 3, 0, embed_dim=16, depth=2, num_heads=2)
    for (name, p), (_, q) in zip(fresh.named_parameters(), seen["encoder"].named_parameters(), strict=True):
        assert torch.equal(p, q) and q.grad is None, name
    assert not seen["encoder"].training


@pytest.mark.parametrize("micro", [64, 3])
def test_maes_probe_that_was_stopped_goes_on_as_if_it_had_not_been(
    lomar, photos: Path, tmp_path: Path, stopped_at, micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(probe_learning._IMAGES_AT_ONCE, "cpu", micro)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert lomar("probe", MAE, "--data", photos, "--out", whole).status == 0
    for step in (2, 3):
        stopped_at(MaeProbe, step, signal.SIGTERM)
        words = ("--resume",) if parts.exists() else (MAE, "--data", photos)
        assert lomar("probe --out", parts, *words).status == 143
    assert Checkpoints(parts / "checkpoints").steps()
    assert lomar("probe --out", parts, "--resume --log-every 1").status == 0
    numbers = [lasting(each) for each in (whole, parts)]
    for each in numbers:
        del each[0]["options"]["log_every"]
    assert numbers[0] == numbers[1]


def with_a_bad_file(photos: Path, data: Path) -> Path:
    """The photos as train/ and as val/, and a file among the first that is no image."""
    for image in photos.rglob("*.png"):
        for part in ("train", "val"):
            place = data / part / image.relative_to(photos)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(image)
    bad = data / "train" / "red" / "bad.jpg"
    bad.write_bytes(b"no image")
    return bad


def test_a_bad_file_is_replaced_by_another_image_with_that_ones_label(lomar, photos: Path, tmp_path: Path) -> None:
    bad = with_a_bad_file(photos, tmp_path / "data")
    done = lomar("probe", MAE, "--data", tmp_path / "data", "--out", tmp_path / "p")
    assert done.status == 0 and f"skipped an unreadable image: {bad}: " in done.out
    assert result(tmp_path / "p")["images"]["fit"] == {"images": 9, "unusable": [str(bad)]}


def test_a_resumed_probe_of_mae_remembers_the_bad_files(lomar, photos: Path, tmp_path: Path, stopped_at) -> None:
    bad = with_a_bad_file(photos, tmp_path / "data")
    stopped_at(MaeProbe, 9, signal.SIGTERM)  # of eleven steps, four epochs of which are over
    done = lomar("probe", MAE, "--data", tmp_path / "data", "--out", tmp_path / "p")
    assert done.status == 143 and done.out.count("skipped an unreadable image") == 1
    done = lomar("probe --out", tmp_path / "p", "--resume")
    assert done.status == 0 and "skipped" not in done.out
    assert result(tmp_path / "p")["images"]["fit"] == {"images": 9, "unusable": [str(bad)]}


class WithCls(nn.Module):
    num_prefix_tokens, cls_token, feature_info = 1, 0.0, ({},) * 12

    def forward_intermediates(self, return_prefix_tokens: bool) -> None: ...


def test_on_imagenet_maes_probe_is_maes() -> None:
    chosen = {name: each.value for name, each in choose({"protocol": "mae"}, WithCls(), 1_281_167).items()}
    assert chosen == {
        "features": ("cls",),
        "layers": (12,),
        "batch_size": 16384,
        "base_lrs": (0.1,),
        "epochs": 90,
        "warmup_epochs": 10,
    }


@pytest.mark.parametrize(("count", "batch"), [(50, 32), (9469, 128), (100_000, 1024), (10**8, 16384)])
def test_on_fewer_images_a_step_has_maes_rate_and_an_epoch_its_steps(count: int, batch: int) -> None:
    chosen = {name: each.value for name, each in choose({"protocol": "mae"}, WithCls(), count).items()}
    assert chosen["batch_size"] == batch
    assert chosen["base_lrs"][0] * batch / 256 == pytest.approx(6.4)
    assert choose({"protocol": "mae", "batch_size": 512}, WithCls(), count)["base_lrs"].value == (3.2,)


@pytest.mark.parametrize(
    ("count", "batch", "epochs"),
    [(100, 32, 50), (8522, 128, 50), (17_000, 256, 50), (600_000, 1024, 21.333), (1_281_167, 1024, 10)],
)
def test_the_sweep_takes_as_many_steps_as_dinov2_within_limits(count: int, batch: int, epochs: float) -> None:
    chosen = {name: each.value for name, each in choose({}, WithCls(), count).items()}
    assert chosen["batch_size"] == batch and chosen["epochs"] == epochs
    assert chosen["layers"] == (9, 10, 11, 12) and len(chosen["base_lrs"]) == 13


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layers 3", "--layers 3: the model has layers 1 to 2"),
        ("--image-size 30", "--image-size 30 is not a multiple of the model's patches of 16 px; 32 would be"),
        ("--features best", "--features is 'best'; it can be pooled, cls, mean, cls+mean"),
        (
            "--model scratch:test_resnet --image-size 32 --features pooled cls",
            "--features cls: the model has no cls token; features can be pooled or mean",
        ),
        (
            "--model scratch:xcit_nano_12_p16_224 --image-size 32 --features cls",
            "--features cls: the model has a cls token after layer 12 alone, its last",
        ),
        (
            "--protocol mae --base-lrs 0.1 0.2",
            "--base-lrs: --protocol mae trains one classifier and takes one value; fast takes more",
        ),
        (
            "--protocol mae --layers 1 2",
            "--layers: --protocol mae trains one classifier and takes one value; fast takes more",
        ),
        ("--protocol mae --batch-size 1", "--batch-size 1: the batch norm of --protocol mae needs two images at least"),
        ("--data {here}/flat", "--data {here}/flat: the images have no labels; put those of each class in a folder of "
         "its own, or give a .csv of path,label"),
        ("--data {here}/only", "--data {here}/only: there is one class alone, 'a'; at least two are needed"),
        (
            "--data {here}/lone",
            "--data {here}/lone: no class has two images to train on, so that none can be held out to choose a head",
        ),
        (
            "--data {here}/bad",
            "--data {here}/bad: none of 2 val images can be read, for example {here}/bad/val/b/1.jpg: the content is "
            "not an image, despite .jpg",
        ),
        ("--epochs 1 --warmup-epochs 5", "--warmup-epochs 5 is more than --epochs 1"),
        ("--out {here}/flat/1.jpg", "--out {here}/flat/1.jpg is a file; it must be a folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(lomar, photos: Path, tmp_path: Path, words: str, message: str) -> None:
    lone = ("lone/train/a/1.jpg", "lone/train/b/1.jpg", "lone/val/a/1.jpg")
    bad = ("bad/train/a/1.jpg", "bad/train/b/1.jpg", "bad/train/b/2.jpg", "bad/val/a/1.jpg", "bad/val/b/1.jpg")
    for name in ("flat/1.jpg", "flat/2.jpg", "only/a/1.jpg", *lone, *bad):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    given = words.replace("{here}", str(tmp_path))
    rest = {"--model": "scratch:16x2x2", "--image-size": "32", "--data": photos, "--out": tmp_path / "p"}
    parts = [part for flag, value in rest.items() if flag not in words for part in (flag, value)]
    done = lomar("probe", QUICK, *parts, given)
    assert (done.status, done.err) == (2, f"lomar: error: {message.replace('{here}', str(tmp_path))}\n")
    assert not (tmp_path / "p").exists()  # nothing is in the way of the next try


def test_images_held_out_none_of_which_can_be_read_are_named_as_such(lomar, photos: Path, tmp_path: Path) -> None:
    words = f"{FAST} --seed 0"
    fit, held = held_out(labelled_data(str(photos), SPLIT_SEED).train, 0.1, 0, "probe")
    bad = {held.source.name(index) for index in range(len(held))}
    for part, labelled in (("train", fit), ("train", held), ("val", labelled_data(str(photos), SPLIT_SEED).val)):
        for index in range(len(labelled)):
            place = tmp_path / "data" / part / Path(labelled.source.name(index)).relative_to(photos)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(
                b"" if labelled.source.name(index) in bad else Path(labelled.source.name(index)).read_bytes()
            )
    done = lomar("probe", words, "--data", tmp_path / "data", "--out", tmp_path / "p")
    assert done.status == 2 and "none of 2 images held out of train can be read, for example " in done.err
    assert done.err.endswith(": empty file\n") and not (tmp_path / "p").exists()


def test_a_run_of_another_command_is_not_resumed(lomar, finished_run: Path) -> None:
    done = lomar("probe --resume --out", finished_run)
    assert done.err.startswith(f"lomar: error: --out {finished_run} holds a run of ") and "--config" not in done.err


def test_val_judges_in_the_place_of_what_data_has(
    lomar, photos: Path, tmp_path: Path, stopped_at, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / "red").symlink_to(photos / "red")
    monkeypatch.chdir(tmp_path)
    stopped_at(SweepProbe, 2, signal.SIGTERM)
    assert lomar("probe", FAST, "--data", photos, "--val judges --out p").status == 143
    monkeypatch.chdir(photos)
    assert lomar("probe --resume --out", tmp_path / "p").status == 0
    images = result(tmp_path / "p")["images"]
    assert {name: part["images"] for name, part in images.items()} == {"fit": 6, "held_out": 2, "val": 4}


def test_a_seed_changes_what_is_held_out_and_not_what_judges(
    lomar, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, list[str]]] = []

    def kept(settled: SettledProbe) -> None:
        parts = {name: part.labelled.source for name, part in settled.parts().items()}
        seen.append({name: [source.name(i) for i in range(len(source))] for name, source in parts.items()})
        raise UserError("enough")

    monkeypatch.setattr(probe_settling, "_check_readable", kept)
    for seed in range(4):
        lomar("probe", FAST, "--data", photos, "--out", tmp_path / "p", f"--seed {seed}")
    assert len(seen) == 4 and all(each["val"] == seen[0]["val"] for each in seen)
    assert any(each["held"] != seen[0]["held"] for each in seen)


def test_missing_options_are_named(lomar) -> None:
    assert lomar("probe --data x").err == "lomar: error: --out is missing: the folder in which to make the probe\n"
    assert lomar("probe --out x").err == "lomar: error: --model is missing; see lomar probe --help\n"
    assert lomar("probe --out x --model y").err == "lomar: error: --data is missing; see lomar probe --help\n"


def test_what_is_in_out_is_kept_unless_it_is_a_probe_to_be_overwritten(
    lomar, finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    assert lomar("probe", FAST, "--data", photos, "--out", out).status == 0
    (out / "mine.txt").write_text("mine")
    before = (out / "probe.json").read_bytes()
    done = lomar("probe", FAST, "--data", photos, "--out", out, "--seed 1")
    assert done.err == (
        f"lomar: error: --out {out} already holds a run; --resume goes on with it, --overwrite deletes it\n"
    )
    assert (out / "probe.json").read_bytes() == before
    assert lomar("probe", FAST, "--data", photos, "--out", out, "--seed 1 --overwrite").status == 0
    assert (out / "mine.txt").exists() and result(out)["options"]["seed"] == 1
    held = sorted(path.name for path in finished_run.iterdir())
    done = lomar("probe", FAST, "--data", photos, "--out", finished_run, "--overwrite")
    assert done.status == 2 and done.err.startswith(f"lomar: error: --out {finished_run} holds a run of ")
    assert sorted(path.name for path in finished_run.iterdir()) == held


def test_a_resumed_probe_keeps_its_options_images_and_weights(
    lomar, finished_run: Path, photos: Path, tmp_path: Path, stopped_at
) -> None:
    out, run = tmp_path / "p", tmp_path / "run"
    run.mkdir()
    (run / "encoder.safetensors").write_bytes((finished_run / "encoder.safetensors").read_bytes())
    stopped_at(SweepProbe, 2, signal.SIGTERM)
    assert lomar("probe --epochs 9 --batch-size 4", QUICK, "--model", run, "--data", photos, "--out", out).status == 143
    done = lomar("probe --resume --out", out, "--epochs 8")
    assert done.err == (
        f"lomar: error: --epochs is 8.0, but the run in {out} has 9.0; a resumed run keeps what changes its results\n"
    )
    assert lomar("probe --resume --overwrite --out", out).err == (
        "lomar: error: --resume and --overwrite are both given; give one\n"
    )
    metadata, tensors = read_file(run / "encoder.safetensors", "encoder")
    tensors["norm.weight"][0] += 1
    told = {name: value for name, value in metadata.items() if name not in ("kind", "version")}
    save_file(run / "encoder.safetensors", tensors, "encoder", told)
    assert lomar("probe --resume --out", out).err == (
        f"lomar: error: the encoder's weights, the names of the images or their labels are not those that {out} began "
        "with; bring them back, or start anew with --overwrite\n"
    )
