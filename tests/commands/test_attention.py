"""Claims about `lomar attention`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lomar.commands import attention
from lomar.figures.attention import AttentionPanel
from lomar.interop.weights import save_encoder, save_reconstructor
from lomar.methods.composition import Composition
from lomar.methods.recipes import RECIPES, compose
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.model.positions import contextual_buckets

Command = Callable[..., Any]

SIDE, WINDOW = 7, 5  # in patches of 4 pixels


def composition(name: str) -> Composition:
    """`decoder` is an encoder-decoder with BEiT's kind of positions; `late` has mask tokens from layer 4 of 5 on."""
    changes = {
        "late": {"mask_layer": 3},
        "decoder": {"position": "shared-bias"},
    }.get(name, {})
    recipe = RECIPES[{"late": "lomar", "decoder": "mae"}.get(name, name)]
    shape = {"model": "16x5x2", "image_size": 4 * SIDE, "patch_size": 4, "batch_size": 4}
    shape |= {"decoder_width": 12, "decoder_depth": 8, "decoder_heads": 3, "mask_min_block": 2}
    if recipe.options["window_size"]:
        shape["window_size"] = WINDOW
    pixels = {"method": name, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    return compose(dict(recipe.options) | shape | pixels | changes, vocab=11, scale=255.0)


def look_right(method: MaskedReconstruction) -> None:
    """Every token looks at its right neighbour alone where there is one, else everywhere: only positions count."""
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if "attn.qkv" in name:
                parameter.zero_()
                if name.endswith("bias"):
                    parameter[: len(parameter) // 3] = 1  # queries
            elif name.endswith("rpe.table"):
                bucket = contextual_buckets(torch.tensor([[[0, 0], [0, 1]]]))[0, 0, 1]
                parameter[:, bucket] = 100
            elif name.endswith("rel_pos_bias.table"):
                relative = method.get_submodule(name.removesuffix(".table"))
                index, _ = relative.relate(torch.tensor([[[0, 0], [0, 1]]]))
                parameter[index[0, 1, 2]] = 100


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each method, as of a run; but for MAE's their tokens look to the right."""
    root = tmp_path_factory.mktemp("models")
    for name in ("lomar", "late", "mae", "beit", "decoder"):
        torch.manual_seed(0)
        made = composition(name)
        method = made.build()
        if name != "mae":
            look_right(method)
        (root / name).mkdir()
        save_reconstructor(root / name / "reconstructor.safetensors", method, made)
        save_encoder(root / name / "encoder.safetensors", method.architecture.encoder, made)
    return root


@dataclass
class Drawn:
    """What was given to be drawn, and what the command said."""

    panels: list[AttentionPanel]
    layers: tuple[int, ...]
    distances: list[float]
    caption: str
    out: str = ""


Draw = Callable[..., Drawn]


@pytest.fixture
def draw(lomar: Command, models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Draw four images for the model of a name (or path), with more options."""
    seen: list[Drawn] = []
    figure1 = attention.figure1

    def listen(*given: Any) -> Image.Image:
        seen.append(Drawn(*given))
        return figure1(*given)

    monkeypatch.setattr(attention, "figure1", listen)

    def run(name: str | Path, *more: str) -> Drawn:
        words = ("--model", models / name, "--images", photos / "red", "--out", tmp_path / "picture.png")
        outcome = lomar("attention", *words, *more)
        assert (outcome.status, outcome.err) == (0, "")
        seen[-1].out = outcome.out
        return seen[-1]

    return run


def query_of(panel: AttentionPanel) -> tuple[int, int]:
    """Row and column of the patch that looks, in the image."""
    row, column = divmod(panel.query, panel.side)
    return panel.corner[0] + row, panel.corner[1] + column


def distance_to_the_right(panel: AttentionPanel) -> float:
    """What hidden patches' distance must be if they look to the right: by hand, pair by pair."""
    at = [divmod(index, panel.side) for index in range(panel.hidden.size)]
    looking = [at[index] for index in np.flatnonzero(panel.hidden)]
    to_all = {place: sum(math.dist(place, other) for other in at) / len(at) for place in looking}
    return sum(1.0 if place[1] < panel.side - 1 else to_all[place] for place in looking) / len(looking)


@pytest.mark.parametrize("name", ["lomar", "late", "beit", "decoder"])
def test_a_map_shows_where_the_query_looks_and_the_number_says_how_far(name: str, draw: Draw) -> None:
    drawn = draw(name, "--patch 3 2")
    for panel in drawn.panels:
        patches, at_border = panel.hidden.size, panel.query % panel.side == panel.side - 1
        expected = np.full(patches, 1 / patches) if at_border else np.eye(patches)[panel.query + 1]
        assert np.allclose(panel.shares, expected, atol=1e-4)
    mean = sum(map(distance_to_the_right, drawn.panels)) / 4
    assert drawn.distances == pytest.approx([mean] * len(drawn.layers), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mae", (2, 4, 6, 8)),
        ("lomar", (2, 3, 4, 5)),
        ("late", (4, 5)),
        ("mae/encoder.safetensors", (2, 3, 4, 5)),
    ],
)
def test_four_layers_with_hidden_patches_are_drawn_if_none_is_named(
    name: str, layers: tuple[int, ...], draw: Draw, tmp_path: Path
) -> None:
    drawn = draw(name)
    assert drawn.layers == layers and drawn.panels[0].shares.shape[0] == len(layers)
    out = tmp_path / "picture.png"
    assert drawn.out.splitlines()[-1] == f"{out}: 4 images at layers {' '.join(map(str, layers))}"
    with Image.open(out) as picture:
        assert picture.format == "PNG" and np.asarray(picture).std() > 5


def test_the_layers_named_are_drawn(draw: Draw) -> None:
    both, seventh = draw("mae", "--layers 1 7"), draw("mae", "--layers 7")
    assert both.layers == (1, 7) and both.panels[3].shares.shape == (2, SIDE**2)
    assert np.array_equal(seventh.panels[3].shares[0], both.panels[3].shares[1])
    assert not np.allclose(seventh.panels[3].shares[0], both.panels[3].shares[0])


@pytest.mark.parametrize("name", ["lomar", "late", "mae", "beit"])
@pytest.mark.parametrize("patch", [(6, 3), (0, 5)])
def test_a_patch_that_is_named_is_hidden_and_looks(name: str, patch: tuple[int, int], draw: Draw) -> None:
    """Whatever the masks of the images; and as many patches are hidden as without it."""
    plain, named = draw(name), draw(name, f"--patch {patch[0]} {patch[1]}")
    for panel, before in zip(named.panels, plain.panels, strict=True):
        assert query_of(panel) == patch and panel.hidden[panel.query]
        assert panel.hidden.sum() == before.hidden.sum() and (panel.hidden != before.hidden).sum() in (0, 2)


@pytest.mark.parametrize("name", ["lomar", "mae", "beit"])
def test_without_a_name_the_hidden_patch_nearest_to_the_middle_looks(name: str, draw: Draw) -> None:
    for panel in draw(name).panels:
        middle = ((panel.side - 1) / 2,) * 2
        away = [math.dist(divmod(index, panel.side), middle) for index in np.flatnonzero(panel.hidden)]
        assert panel.hidden[panel.query]
        assert math.dist(divmod(panel.query, panel.side), middle) == pytest.approx(min(away))


@pytest.mark.parametrize(("name", "side", "hidden"), [("mae", SIDE, 49 - 12), ("lomar", WINDOW, 20)])
def test_mae_sees_whole_images_and_lomar_windows(name: str, side: int, hidden: int, draw: Draw) -> None:
    drawn = draw(name)
    assert [(panel.side, panel.hidden.sum()) for panel in drawn.panels] == [(side, hidden)] * 4
    assert (len({panel.corner for panel in drawn.panels}) > 1) == (name == "lomar")
    assert ("one 5x5 window of each image" in drawn.caption) == (name == "lomar")


def test_an_encoder_alone_sees_all_and_the_caption_says_so(draw: Draw) -> None:
    drawn = draw("lomar/encoder.safetensors")
    assert "visible patches only" in drawn.caption and "hidden" not in drawn.caption + drawn.out
    for panel in drawn.panels:
        assert not panel.hidden.any() and query_of(panel) == (3, 3)
        assert np.allclose(panel.shares, np.eye(49)[panel.query + 1], atol=1e-4)
    assert query_of(draw("lomar/encoder.safetensors", "--patch 0 5").panels[3]) == (0, 5)


def test_a_released_checkpoint_is_drawn_as_a_run_is(draw: Draw, lomar: Command, models: Path, tmp_path: Path) -> None:
    released = tmp_path / "lomar.pth"
    assert lomar("convert --to official --model", models / "lomar", "--out", released).status == 0
    drawn = draw(released, "--layers 5")
    assert all(panel.hidden[panel.query] for panel in drawn.panels)
    assert drawn.distances == pytest.approx([sum(map(distance_to_the_right, drawn.panels)) / 4], abs=1e-3)


def test_every_layer_has_its_line_and_those_without_hidden_patches_say_so(draw: Draw) -> None:
    drawn = draw("late")
    heading, columns, *lines = drawn.out.splitlines()[:-1]
    assert heading == "how far hidden patches look in the encoder, in patches"
    assert columns.split() == ["layer", "distance", "spread", "evenly"]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5"]
    assert ["visible patches" in line for line in lines] == [True] * 3 + [False] * 2
    assert [float(line.split()[1]) for line in lines[3:]] == pytest.approx(drawn.distances, abs=0.006)
    at = [divmod(index, WINDOW) for index in range(WINDOW**2)]
    even = [
        sum(math.dist(at[i], other) for i in np.flatnonzero(panel.hidden) for other in at) / panel.hidden.sum() / 25
        for panel in drawn.panels
    ]
    assert [float(line.split()[2]) for line in lines[3:]] == pytest.approx([sum(even) / 4] * 2, abs=0.006)


def test_the_ratio_and_the_seed_decide_what_is_hidden(draw: Draw) -> None:
    drawn = [draw("mae", more) for more in ("", "", "--seed 1", "--mask-ratio 0.5")]
    masks = [[panel.hidden.tolist() for panel in each.panels] for each in drawn]
    assert masks[0] == masks[1] != masks[2]
    assert [sum(mask) for mask in masks[3]] == [49 - 24] * 4 and "51% of each image hidden" in drawn[3].caption


def test_an_unreadable_image_among_good_ones_is_passed_over(
    lomar: Command, models: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_text("no")
    images = (tmp_path / "bad.png", photos / "red" / "0.png")
    outcome = lomar("attention --model", models / "mae", "--out", tmp_path / "a.png", "--images", *images)
    assert outcome.status == 0 and f"{tmp_path / 'a.png'}: 1 images" in outcome.out
    assert outcome.err == f"lomar: skipped an unreadable image: {tmp_path / 'bad.png'}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images {photos} --out {out}", "--model is missing"),
        ("--model {m}/mae --out {out}", "--images is missing"),
        ("--model {m}/mae --images {photos}", "--out is missing"),
        ("--model {m}/mae --images {photos} --out a.jpg", "--out is a.jpg; it must end in .png"),
        ("--model {m}/mae --images {photos} --out {photos}/red/0.png/x.png", "cannot be written"),
        ("--model nowhere --images {photos} --out {out}", "there is no run or file nowhere"),
        ("--model {photos} --images {photos} --out {out}", "holds neither reconstructor.safetensors nor"),
        ("--model {photos}/red/0.png --images {photos} --out {out}", "is not a safetensors file"),
        ("--model {m}/mae --images nowhere --out {out}", "--images: there is no file or folder nowhere"),
        ("--model {m}/mae --images {m}/mae/encoder.safetensors --out {out}", "--images: none of 1 can be read"),
        (
            "--model {m}/mae --images {photos} --out {out} --layers 2 9",
            "--layers 9: the last layer of the decoder is 8",
        ),
        ("--model {m}/lomar --images {photos} --out {out} --layers 6", "the last layer of the encoder is 5"),
        ("--model {m}/late --images {photos} --out {out} --layers 3", "hidden patches are there from layer 4 to 5"),
        (
            "--model {m}/mae --images {photos} --out {out} --layers 0",
            "--layers is '0'; it must be a whole number, at least",
        ),
        (
            "--model {m}/mae --images {photos} --out {out} --patch 0 7",
            "--patch 0 7 is outside of the image, whose last",
        ),
        (
            "--model {m}/lomar --images {photos} --out {out} --patch 7 0",
            "--patch 7 0 is outside of the image, whose last",
        ),
        ("--model {m}/mae --images {photos} --out {out} --patch 3", "--patch: expected 2 arguments"),
        ("--model {m}/mae --images {photos} --out {out} --patch -1 3", "--patch is '-1'; it must be a whole number"),
        ("--model {m}/mae --images {photos} --out {out} --mask-ratio 0.99", "--mask-ratio: a ratio of 0.99 hides"),
        ("--model {m}/mae/encoder.safetensors --images {photos} --out {out} --mask-ratio 0.5", "has no mask token"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    words: str, message: str, lomar: Command, models: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.png"
    outcome = lomar("attention", words.format(m=models, photos=photos, out=out))
    assert (outcome.status, outcome.err.count("\n"), outcome.out) == (2, 1, "") and message in outcome.err, outcome.err
    assert not out.exists()
