"""`lomar recipes`: the paper's methods, runs and ablations as a table, and any of them as a configuration."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from lomar.errors import UserError
from lomar.methods.cost import forward_flops, image_tokens, trained_parameters
from lomar.methods.recipes import RECIPES, Recipe
from lomar.options import PretrainOptions, RecipesOptions, fields_of, suggestion

DEFAULTS = {"seed", "decayed", "clip_by"}  # told of every run, also where the recipe leaves them as they are
HEADER = ("recipe", "epochs", "hours", "top-1", "params", "tokens", "GFLOP", "what it is")


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar recipes` with the options that were given; returns the exit status."""
    name = RecipesOptions(**given).name
    if name is None:
        sys.stdout.write(table())
        return 0
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}{suggestion(name, list(RECIPES))}; `lomar recipes` lists them")
    sys.stdout.write(configuration(name))
    return 0


def table() -> str:
    """All recipes, in the paper's tables and figures."""
    places = dict.fromkeys(recipe.paper for recipe in RECIPES.values())
    # The runs of a method side by side.
    recipes = sorted(RECIPES.items(), key=lambda item: item[0].split("-")[0])
    rows = {place: [_row(name, recipe) for name, recipe in recipes if recipe.paper == place] for place in places}
    widths = [
        max(map(len, column)) for column in zip(HEADER, *(row for of in rows.values() for row in of), strict=True)
    ]

    def line(cells: Iterable[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    lines = [line(HEADER)]
    for place, of in rows.items():
        lines += ["", place, *map(line, of)]
    lines += [
        "",
        "The paper's runs on ImageNet-1K, ViT-B/16: epochs of pretraining, hours on four A100, top-1 accuracy after",
        "fine-tuning at 224 px (in Fig. 4 at the size of pretraining), where the paper prints them; millions of",
        "parameters that are trained; tokens of an image, before/after the mask tokens enter (dino, mocov3: of all its",
        "crops); 10^9 FLOPs of a forward pass for one image (a training step costs three, of a teacher's part one;",
        "beit's tokenizer is extra). Fig. 5 hides 75%.",
        "",
        "lomar pretrain --method NAME --data DIR --out RUN     the method, with sizes and length that fit your data",
        "lomar recipes NAME > paper.yaml                       the paper's run in full, for --config paper.yaml",
    ]
    return "\n".join(lines) + "\n"


def configuration(name: str) -> str:
    """A recipe at full size as YAML that `lomar pretrain --config` accepts."""
    recipe = RECIPES[name]
    values = {"method": name} | dict(recipe.options) | dict(recipe.full)
    skipped = set()
    if values.get("architecture") != "encoder-decoder":
        skipped |= {"decoder_width", "decoder_depth", "decoder_heads"}
    if values.get("mask") != "blockwise":
        skipped |= {"mask_min_block"}
    shown = {}
    for option, field in fields_of(PretrainOptions).items():
        value = values.get(option, field.default)
        if field.metadata["results"] and option not in skipped and option in values.keys() | DEFAULTS:
            shown[option] = list(value) if isinstance(value, tuple) else value
    _, epochs, hours, result, parameters, tokens, gflop, about = _row(name, recipe)
    comments = [
        f"{name}: {about}",
        "; ".join(
            [recipe.paper]
            + [f"top-1 {result}"] * bool(recipe.result)
            + [f"{hours} hours on four A100"] * bool(recipe.hours)
        ),
        f"{parameters} million parameters, {tokens} tokens and {gflop} GFLOP an image"
        + f", {epochs} epochs of ImageNet-1K" * (epochs != "-"),
    ]
    if recipe.note:
        comments.append(recipe.note)
    if values.get("target") == "tokens":
        comments.append("Needs --tokenizer FILE: a folder with OpenAI's encoder.pkl, or of `lomar tokenizer train`.")
    return "".join(f"# {text}\n" for text in comments) + yaml.safe_dump(shown, sort_keys=False, default_flow_style=None)


def _row(name: str, recipe: Recipe) -> tuple[str, ...]:
    composition = recipe.composition(name)
    tokens = "/".join(map(str, image_tokens(composition)))
    epochs = recipe.full.get("epochs", recipe.options.get("epochs", "-"))
    hours = f"{recipe.hours}" if recipe.hours else "-"
    costs = f"{trained_parameters(composition) / 1e6:.1f}", tokens, f"{forward_flops(composition).total / 1e9:.1f}"
    return name, str(epochs), hours, recipe.result or "-", *costs, recipe.about
