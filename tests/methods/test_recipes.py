"""The recipes are the paper's: sizes and counts by SPEC.md, and what `lomar recipes` tells of them."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lomar.commands.recipes import HEADER, configuration, table
from lomar.commands.settling import asked_for_pretraining, settle
from lomar.methods.composition import Composition, TwoViewComposition
from lomar.methods.cost import forward_flops
from lomar.methods.masks import BlockwiseMask, KeptMask, UniformMask
from lomar.methods.recipes import IMAGENET_MEAN, IMAGENET_STD, OPENAI_VOCAB, RECIPES
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.two_view import TwoView
from lomar.methods.views import LocalWindows, WholeImage
from lomar.options import PretrainOptions, fields_of, read_config


def built(name: str, **changes: Any) -> Any:
    """A recipe at full size, without its memory."""
    with torch.device("meta"):
        return replace(RECIPES[name].composition(name), **changes).build()


def trainable(method: MaskedReconstruction | TwoView) -> int:
    return sum(p.numel() for p in method.parameters() if p.requires_grad)


LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}


@pytest.mark.parametrize(
    ("name", "changes", "parameters"),
    [
        ("lomar", {}, 86_277_120),
        ("lomar", LARGE, 303_964_928),
        ("lomar-b8", {}, 85_391_808),
        ("mae", {}, 111_655_680),
        ("beit", {}, 91_965_776),
    ],
)
def test_as_many_parameters_are_trained_as_in_the_released_code(name: str, changes: Any, parameters: int) -> None:
    """A.1, B.1 and C.1."""
    assert trainable(built(name, **changes)) == parameters


def test_mae_and_beit_have_the_tensors_of_the_released_code() -> None:
    """B.1, with the sines and cosines of both halves; C.1, without the buffer of indices, which is no parameter."""
    mae, beit = built("mae"), built("beit")
    assert sum(p.numel() for p in mae.parameters()) == 111_907_840 and len(mae.state_dict()) == 254
    assert sum(p.numel() for p in beit.parameters()) == 91_965_776 and len(beit.state_dict()) == 189


TOKENS = {
    "lomar": [200],
    "lomar-b8": [200],
    "lomar-384": [300],
    "lomar-384-9": [450],
    "lomar-448": [450],
    "lomar-late": [44, 124],
    "mae": [50, 197],
    "mae-384": [145, 577],
    "mae-448": [197, 785],
    "beit": [197],
    "beit-384": [577],
    "beit-448": [785],
    "beit-lomar": [200],
}


@pytest.mark.parametrize("name", TOKENS)
def test_an_image_is_as_many_tokens_as_in_the_paper(name: str) -> None:
    """SPEC F, cls tokens counted; before and after the mask tokens enter."""
    method = built(name)
    assert [stage.tokens * method.views.count for stage in method.stages()] == TOKENS[name]


def test_a_composition_counts_the_tokens_of_all_views() -> None:
    with torch.device("meta"):
        assert [stage.tokens for stage in RECIPES["lomar-384"].composition("lomar-384").stages()] == [300]


HIDDEN = {"30": 14, "40": 19, "50": 24, "60": 29, "70": 34, "80": 39, "90": 44}  # A.4, of 49


@pytest.mark.parametrize("ratio", HIDDEN)
def test_fig_6_hides_as_many_as_the_released_code(ratio: str) -> None:
    name = f"fig6-{ratio}"
    assert built(name).mask == UniformMask(49, int(ratio) / 100)
    assert built(name).mask.count == HIDDEN[ratio]


@pytest.mark.parametrize("kind", ["rpe", "ape", "decoder"])
@pytest.mark.parametrize(
    ("side", "views", "hidden", "visible"),
    [(5, 8, 18, 56), (7, 4, 36, 52), (9, 3, 60, 63), (11, 2, 90, 62), (14, 1, 147, 49)],
)
def test_fig_5_shows_about_equally_many_patches_at_every_window(
    kind: str, side: int, views: int, hidden: int, visible: int
) -> None:
    """A.4, with Table 4's views."""
    method = built(f"fig5-{kind}-{side}")
    assert method.views == LocalWindows((14, 14), side, views)
    assert method.mask.count == hidden
    assert (method.mask.patches - hidden) * views == visible
    composition = RECIPES[f"fig5-{kind}-{side}"].composition(f"fig5-{kind}-{side}")
    position, architecture = {
        "rpe": ("contextual", "masked-encoder"),
        "ape": ("sincos", "masked-encoder"),
        "decoder": ("sincos", "encoder-decoder"),
    }[kind]
    assert (composition.position, composition.architecture) == (position, architecture)


def test_lomar_mae_beit_and_their_mixture_are_what_the_paper_says() -> None:
    lomar, mae, beit, mixed = (built(name) for name in ("lomar", "mae", "beit", "beit-lomar"))
    assert lomar.views == mixed.views == LocalWindows((14, 14), 7, 4)
    assert mae.views == beit.views == WholeImage((14, 14))
    assert lomar.mask == UniformMask(49, 0.8) and lomar.mask.count == 39
    assert mae.mask == KeptMask(196, 0.75) and mae.mask.count == 147
    assert beit.mask == BlockwiseMask((14, 14), 0.383, 16) and beit.mask.count == 75
    assert mixed.mask == BlockwiseMask((7, 7), 0.39, 4) and mixed.mask.count == 19
    assert mixed.architecture.encoder.rel_pos_bias.table.shape == (13 * 13 + 3, 12)  # C.8
    for method in (beit, mixed):
        assert method.head.out_features == OPENAI_VOCAB
        assert method.architecture.encoder.drop_path_rate == 0.1
    assert built("lomar-late").architecture.mask_layer == 10


# SPEC F, Table 1 and Table 3: epochs, hours, top-1.
REPORTED = {
    "beit": (800, 285, "83.2"),
    "beit-300e": (300, 107, "82.8"),
    "beit-lomar": (300, 102, "83.4"),
    "mae-400e": (400, 58, "83.1"),
    "mae-800e": (800, 116, "83.3"),
    "mae": (1600, 232, "83.6"),
    "lomar-300e": (300, 49, "83.3"),
    "lomar-400e": (400, 66, "83.6"),
    "lomar-800e": (800, 132, "83.8"),
    "lomar": (1600, 264, "84.1"),
    "lomar-b8": (400, 66, "84.3"),
    "dino": (300, "-", "82.8"),
    "mocov3": (300, "-", "83.2"),  # 600 in the paper, which counts both crops: D.2
}


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """Name -> the cells of its row in `lomar recipes`."""
    lines = (re.split(r" {2,}", line) for line in table().splitlines())
    return {cells[0]: cells for cells in lines if len(cells) == len(HEADER) and cells[0] != HEADER[0]}


@pytest.mark.parametrize("name", REPORTED)
def test_the_table_tells_what_the_paper_reports(name: str, printed: dict[str, list[str]]) -> None:
    epochs, hours, result = REPORTED[name]
    assert printed[name][1:3] == [str(epochs), str(hours)]
    assert printed[name][3].split()[0] == result  # and what it is at 384 px, where that is known


def test_the_table_names_every_recipe_with_its_costs(printed: dict[str, list[str]]) -> None:
    assert printed.keys() == RECIPES.keys()
    for name, cells in printed.items():
        method = built(name)
        assert cells[4] == f"{trainable(method) / 1e6:.1f}"
        assert cells[6] == f"{forward_flops(RECIPES[name].composition(name)).total / 1e9:.1f}"
        assert cells[7] == RECIPES[name].about
    assert {name: printed[name][5] for name in TOKENS} == {k: "/".join(map(str, v)) for k, v in TOKENS.items()}
    assert (printed["dino"][5], printed["mocov3"][5]) == ("764", "394")  # 2 x 197 and 10 x 37


def test_recipes_without_a_name_prints_the_table(lomar, printed: dict[str, list[str]]) -> None:
    done = lomar("recipes")
    assert (done.status, done.err) == (0, "")
    assert all(f"\n{name}  " in done.out for name in printed)


@pytest.mark.parametrize(
    ("name", "hint"), [("lomer", " (did you mean lomar?)"), ("beit-lo", " (did you mean beit-lomar?)"), ("zzz", "")]
)
def test_an_unknown_recipe_is_one_line(name: str, hint: str, lomar) -> None:
    done = lomar(f"recipes {name}")
    assert (done.status, done.out) == (2, "")
    assert done.err == f"lomar: error: there is no recipe '{name}'{hint}; `lomar recipes` lists them\n"


def left_out(composition: Composition | TwoViewComposition) -> set[str]:
    """What means nothing to a composition, so that its configuration does not tell it."""
    if isinstance(composition, TwoViewComposition):
        return set()
    decoder = {"decoder_width", "decoder_depth", "decoder_heads"}
    return (decoder if composition.architecture == "masked-encoder" else set()) | (
        {"mask_min_block"} if composition.mask != "blockwise" else set()
    )


@pytest.mark.parametrize("name", RECIPES)
def test_the_printed_configuration_is_accepted_and_composes_the_same_method(name: str, lomar, tmp_path: Path) -> None:
    """The paper's run in full: the method and the course of its training."""
    path = tmp_path / "paper.yaml"
    done = lomar(f"recipes {name}")
    assert (done.status, done.out) == (0, configuration(name))
    path.write_text(done.out)
    values = read_config(str(path), PretrainOptions)
    recipe = RECIPES[name]
    expected = recipe.composition(name)
    unsaid = {option: getattr(expected, option) for option in left_out(expected)}
    assert not values.keys() & unsaid.keys()
    values |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | unsaid
    assert recipe.compose(values, OPENAI_VOCAB, scale=255.0) == expected
    course = dict(recipe.options) | dict(recipe.full)
    assert course.keys() <= values.keys() and {k: values[k] for k in course} == course
    # Every option that changes results is told, but for what the data and the user bring.
    results = {option for option, field in fields_of(PretrainOptions).items() if field.metadata["results"]}
    brought = {"init", "max_steps", "precision", "shuffle_gb"} | ({"tokenizer"} - recipe.lacks)
    unchanging = {"weight_decay_end"} - course.keys()
    assert results - values.keys() == brought | unchanging | recipe.lacks


def test_what_is_told_of_runs_from_elsewhere_is_said_to_be_so() -> None:
    assert "\n# Arguments of DINO's released ViT-B/16, told from memory;" in configuration("dino")
    assert "\n# The paper's 600 epochs count both crops: they are MoCo v3's 300.\n" in configuration("mocov3")


@pytest.mark.parametrize(
    "name", ["lomar", "lomar-b8", "lomar-448", "mae", "mae-384", "fig5-ape-14", "fig5-decoder-5", "dino", "mocov3"]
)
def test_the_printed_configuration_settles_into_the_papers_run(name: str, tmp_path: Path) -> None:
    """By the way of `lomar pretrain --config`, but for the images, and the micro batch, which would be measured."""
    (tmp_path / "paper.yaml").write_text(configuration(name))
    given = {"config": str(tmp_path / "paper.yaml"), "data": "sample", "micro_batch": 1, "device": "cpu"}
    given["out"] = str(tmp_path / "run")
    settled = settle(asked_for_pretraining(given), tmp_path / "run")
    expected = RECIPES[name].composition(name)
    unsaid = {option: getattr(settled.composition, option) for option in left_out(expected)}
    assert settled.composition == replace(expected, **unsaid)
