"""Claims about what the commands that draw, report and export make of a run of DINO or MoCo v3."""

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lomar.commands import attention, crops
from lomar.commands.crops import crops_of, seen_crops
from lomar.commands.runs import options_of
from lomar.data.decode import PixelFormat
from lomar.data.loader import Batching, SampleKey
from lomar.data.multicrop import multicrop_batches
from lomar.data.opening import open_source
from lomar.methods.recipes import RECIPES
from lomar.methods.two_view import TwoView
from lomar.options import PretrainOptions
from lomar.reporting import hints

Command = Callable[..., Any]
SIZES = (
    "--model 16x2x2 --image-size 32 --patch-size 8 --batch-size 4 --workers 0 --precision fp32 --device cpu "
    "--max-steps 2 --eval-every 1 --head-width 8 --head-outputs 12"
)
OF = {"dino": "--method dino --local-crops 3", "mocov3": "--method mocov3"}

pytestmark = pytest.mark.usefixtures("miniature")


@pytest.fixture(scope="module")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each method, with its pictures."""
    from lomar.cli import main

    root = tmp_path_factory.mktemp("runs")
    for name, words in OF.items():
        status = main(f"pretrain --data {photos} --out {root / name} {SIZES} {words}".split())
        assert status == 0
    return {name: root / name for name in OF}


def section(page: str, name: str) -> str:
    return page.split(f'<h2 id="{name}">')[1].split("<h2 ")[0]


@pytest.mark.parametrize("method", list(OF))
def test_a_run_draws_its_crops_at_its_first_evaluation_alone(runs: dict[str, Path], method: str) -> None:
    drawn = sorted(path.name for path in (runs[method] / "figures").iterdir())
    assert drawn == ["crops.png", "curves.png"]
    with Image.open(runs[method] / "figures" / "crops.png") as picture:
        assert np.asarray(picture).std() > 20
        widths = picture.width
    # 32 px a tile of 224: an image, two large crops, and for DINO three small ones of 16 px on one tile.
    assert (3 * 224 < widths < 4 * 224) == (method == "mocov3") and widths < 5 * 224


def test_crops_drawn_are_what_the_encoder_gets_in_the_first_epoch(runs: dict[str, Path], photos: Path) -> None:
    options = PretrainOptions(**{"out": "x"} | options_of(str(runs["dino"]), PretrainOptions))
    source, fmt = open_source(str(photos)), PixelFormat(3, "uint8")
    method = RECIPES["dino"].compose(asdict(options), vocab=0, scale=255.0).build()
    assert isinstance(method, TwoView)
    draw = method.draw(options.seed)

    def keyed(key: SampleKey) -> dict[str, torch.Tensor]:
        return draw(key) | {"index": torch.tensor(key.index)}

    batching = Batching(options.seed, batch_size=4, micro_batch=4, total_batches=1)
    (batch,) = multicrop_batches(source, fmt, keyed, plan=crops_of(method, options), batching=batching)
    inputs = batch.inputs
    large = method.seen(inputs["crops"], inputs["distortions"][:, :2]).unflatten(0, (4, 2))
    small = method.seen(inputs["local_crops"], inputs["distortions"][:, 2:]).unflatten(0, (4, 3))
    for place, index in enumerate(inputs["index"].tolist()):
        found = seen_crops(method, crops_of(method, options), source, fmt, SampleKey(0, index, 0, 0), options.seed)
        assert found.original.shape == (3, 32, 32)
        for drawn, seen in ((found.large, large), (found.small, small)):
            back = (torch.from_numpy(drawn) / 255 - method.mean) / method.std
            torch.testing.assert_close(back, seen[place], rtol=0, atol=1e-4)


def test_images_that_cannot_be_read_are_left_out_of_the_picture(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    options = PretrainOptions(**{"out": "x"} | options_of(str(runs["mocov3"]), PretrainOptions))
    method = RECIPES["mocov3"].compose(asdict(options), vocab=0, scale=255.0).build()
    source = open_source(str(tmp_path))
    assert crops.picture_of_crops(method, options, source, PixelFormat(3, "uint8"), [0]) is None
    Image.new("RGB", (40, 40), "red").save(tmp_path / "b.png")
    source = open_source(str(tmp_path))
    assert crops.picture_of_crops(method, options, source, PixelFormat(3, "uint8"), [0, 1])


def test_the_report_shows_crops_and_no_reconstructions(
    runs: dict[str, Path], finished_run: Path, lomar: Command, tmp_path: Path
) -> None:
    done = lomar("report", runs["dino"], finished_run, "--samples 8 --out", tmp_path / "page.html")
    assert done.status == 0, done.err
    page = (tmp_path / "page.html").read_text()
    assert "could not be drawn" not in page
    ids = re.findall(r'<h2 id="([\w-]+)">', page)
    assert "summary comparison curves crops over-time ratios attention map" in " ".join(ids)
    assert "losses measure different things" in section(page, "comparison")
    assert section(page, "crops").count("<img") == 1 and section(page, "over-time").count("<h3>") == 1
    assert "two large crops of 32 pixels (40% to 100% of the area), 3 small ones of 16 (5% to 40% of the area)" in page
    assert "cls tokens" in section(page, "map")
    assert "deviation of features (of 1)" in section(page, "curves")
    done = lomar("report", runs["mocov3"], "--samples 0 --out", tmp_path / "page.html")
    assert done.status == 0 and "reconstructions" not in done.err
    page = (tmp_path / "page.html").read_text()
    assert not {"over-time", "ratios"} & set(re.findall(r'<h2 id="([\w-]+)">', page)) and "Reconstructions" not in page
    for text in ("queries and keys 12 wide", "Momentum encoder", "0.2 of the softmax over the keys"):
        assert text in section(page, "summary")


def test_collapse_is_told_from_the_same_numbers_as_a_run_stops_at() -> None:
    from lomar.methods import two_view

    assert hints.LEAST_DEVIATION == two_view.LEAST_DEVIATION and hints.LEAST_ENTROPY == two_view.LEAST_ENTROPY


@pytest.mark.parametrize("model", ["", "encoder.safetensors"])
def test_there_is_nothing_to_reconstruct(
    runs: dict[str, Path], lomar: Command, photos: Path, tmp_path: Path, model: str
) -> None:
    words = ("--images", photos, "--out", tmp_path / "a.png")
    done = lomar("reconstruct --model", runs["mocov3"] / model, *words)
    assert (done.status, done.err.count("\n"), done.out) == (2, 1, "")
    assert "is of mocov3, which compares views" in done.err and "`lomar attention` draws where its cls" in done.err


def test_attention_is_that_of_the_cls_token_unless_a_patch_is_named(
    runs: dict[str, Path], lomar: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    figure1 = attention.figure1

    def listen(*given: Any) -> Image.Image:
        seen.append(given)
        return figure1(*given)

    monkeypatch.setattr(attention, "figure1", listen)
    words = ("attention --model", runs["dino"], "--images", photos / "red", "--out", tmp_path / "a.png")
    assert lomar(*words).status == 0 and lomar(*words, "--patch 1 2").status == 0
    (by_cls, _, distances, caption), (by_patch, _, distances_again, _) = seen
    assert "attention of the cls token to the patches" in caption
    assert [panel.query for panel in by_cls] == [None] * 4 and by_patch[0].query == 6
    assert distances == distances_again  # of all patches, in both
    for panel in by_cls:
        assert np.allclose(panel.shares.sum(axis=1), 1) and panel.shares.shape == (2, 16)
    done = lomar(*words, "--mask-ratio 0.5")
    assert (done.status, done.err.count("\n")) == (2, 1) and "has no mask token" in done.err


@pytest.mark.parametrize(("method", "paper"), [("dino", "2104.14294"), ("mocov3", "2104.02057")])
def test_the_card_tells_of_crops_and_heads(
    runs: dict[str, Path], lomar: Command, tmp_path: Path, method: str, paper: str
) -> None:
    done = lomar("export --to hub-folder --model", runs[method], "--out", tmp_path / "mine")
    assert done.status == 0, done.err
    card = (tmp_path / "mine" / "README.md").read_text()
    assert f"- arxiv:{paper}" in card and f"| method | {method} |" in card and "# cls token" in card
    assert "| head_outputs | 12 |" in card and "| momentum |" in card and "mask" not in card and "window" not in card
    assert ("| local_crops | 3 |" in card) == (method == "dino")
