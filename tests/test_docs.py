"""What README and guides tell people to type is true: commands parse, Python runs, files exist."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lomar import cli
from lomar.interop.weights import save_encoder
from lomar.methods.recipes import RECIPES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Every `lomar ...` of a page's shell blocks: the command, and its options as words."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    found = re.findall(rf"(?:^|[ /;])lomar ({'|'.join(cli.COMMANDS)})\b([^\n;&|>]*)", text, flags=re.M)
    return [(name, shlex.split(line, comments=True)) for name, line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_docs_is_understood(page: Path) -> None:
    for name, arguments in commands(page):
        cli.parse(name, arguments)


def test_the_readme_has_commands() -> None:
    assert len(commands(ROOT / "README.md")) >= 5


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


def test_ci_runs_the_readmes_two_set_up_commands() -> None:
    """Each named block holds one line that makes the environment and does its work."""
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for name, end in {"run": "lomar pretrain --data sample --out run --mask-layer 8", "test": "pytest -n 2"}.items():
        block = re.search(rf"<!-- setup: {name} -->\n```sh\n(.*?)\n```", readme, flags=re.S)
        assert block is not None
        assert block[1].startswith("python3 -m venv .venv && .venv/bin/pip install")
        assert block[1].endswith(end)
        assert f"readme_command {name}" in ci
