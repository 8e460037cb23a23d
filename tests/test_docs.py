"""What README and guides tell people to type is true: commands parse, Python runs, files exist."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import lomar
from lomar import cli
from lomar.commands.recipes import configuration, table
from lomar.errors import UserError
from lomar.interop.weights import save_encoder
from lomar.methods.recipes import RECIPES
from lomar.methods.targets import TARGETS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Every `lomar ...` of a page's shell blocks: the command, and its options as words."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    found = re.findall(r"(?:^|[ /;&|])lomar +([a-z][^\n;&|>]*)", text, flags=re.M)
    return [cli.command_in(shlex.split(line, comments=True)) for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_docs_is_understood(page: Path) -> None:
    for name, arguments in commands(page):
        cli.parse(name, arguments)


def test_every_command_is_shown_and_the_readme_has_most() -> None:
    shown = {page.name: {name for name, _ in commands(page)} for page in PAGES}
    assert set().union(*shown.values()) == set(cli.COMMANDS)
    assert len(shown["README.md"]) >= 5


def test_an_unknown_command_of_the_docs_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\ncd x && .venv/bin/lomar pretrain --out lomar-base --method lomar --views 2  # lomar\n```\n")
    assert commands(page) == [("pretrain", ["--out", "lomar-base", "--method", "lomar", "--views", "2"])]
    page.write_text("```sh\nlomar tokenizer train --data photos; lomar recipes mae > mae.yaml\n```\n")
    assert commands(page) == [("tokenizer train", ["--data", "photos"]), ("recipes", ["mae"])]
    for wrong in ("lomar tokeniser train", "lomar tokenizer trian", "lomar pretrian --data photos"):
        page.write_text(f"```sh\n{wrong}\n```\n")
        with pytest.raises(UserError, match="there is no command"):
            commands(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    for target in targets:
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "encoder.md"], ids=lambda page: page.name)
def test_the_python_of_the_docs_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"embed_dim": 192, "num_heads": 3, "image_size": 56, "patch_size": 8}
    composition = replace(RECIPES["lomar"].composition("lomar"), **small)
    (tmp_path / "run").mkdir()
    save_encoder(tmp_path / "run" / "encoder.safetensors", composition.encoder(), composition)
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.zeros(2, 3, 56, 56)}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    assert names["features"].shape == (2, 192)
    assert names["tokens"].shape == (2, 50, 192)


def test_the_method_of_ones_own_trains_and_is_a_recipe_like_the_others(
    miniature: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All Python of docs/extending.md, whose new target and recipes are forgotten afterwards."""
    page = ROOT / "docs" / "extending.md"
    monkeypatch.chdir(tmp_path)
    known = set(RECIPES)
    names: dict[str, Any] = {}
    with patch.dict(TARGETS), patch.dict(RECIPES):
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), names)
        new = set(RECIPES) - known
        assert new == {"lomar-hog", "maskfeat"}
        for name in new:
            encoder = lomar.load(tmp_path / name / "encoder.safetensors")
            assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 48)
            assert f"\n{name} " in table() and f"method: {name}\n" in configuration(name)
    assert "hog" not in TARGETS and set(RECIPES) == known


def test_ci_runs_the_readmes_two_set_up_commands() -> None:
    """Each named block holds one line that makes the environment and does its work."""
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for name, end in {
        "run": "lomar pretrain --data sample --out run --method lomar-late",
        "test": "pytest -n 2",
    }.items():
        block = re.search(rf"<!-- setup: {name} -->\n```sh\n(.*?)\n```", readme, flags=re.S)
        assert block is not None
        assert block[1].startswith("python3 -m venv .venv && .venv/bin/pip install")
        assert block[1].endswith(end)
        assert f"readme_command {name}" in ci
