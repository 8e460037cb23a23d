"""ARCHITECTURE.md is true: its map is complete, and imports point one way."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lomar"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# room -> what it may import of lomar, beside itself, `errors`, `files`, `launch`, `seeding` and lomar's version
ALLOWED = {
    "data": set(),
    "model": set(),
    "methods": {"model", "data"},
    "training": {"data"},
    "downstream": {"model"},
    "detection": {"model"},
    "benchmark": {"data", "model", "methods", "training", "downstream"},
    "study": {"data", "methods", "model", "interop", "training", "options"},
    "figures": set(),
    "reporting": {"training", "options"},
    "interop": {"model", "methods", "detection"},
    "commands": {
        "data",
        "model",
        "methods",
        "training",
        "downstream",
        "detection",
        "figures",
        "interop",
        "benchmark",
        "reporting",
        "study",
        "options",
    },
    "options": set(),
    "cli.py": {"options"},
    "errors.py": set(),
    "files.py": set(),
    "launch.py": set(),
    "seeding.py": set(),
    "__init__.py": {"commands", "interop"},  # lazily; test_cli shows that nothing heavy is loaded
    "__main__.py": {"cli"},
}
COMMON = {"__version__", "errors", "files", "launch", "seeding"}


def room_of(file: str) -> str:
    return file.split("/")[0]


def imported(file: str) -> set[str]:
    """Full names of what a file imports from lomar, inside functions too: lomar.data.loader.SampleKey."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "lomar"}


def room_imported(name: str) -> str:
    """lomar.data.loader.SampleKey -> data."""
    return name.split(".")[1]


def test_every_room_has_a_rule() -> None:
    assert {room_of(file) for file in FILES} == set(ALLOWED)


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file: str) -> None:
    room = room_of(file)
    rooms = {room_imported(name) for name in imported(file)}
    assert rooms - COMMON <= ALLOWED[room] | {room.removesuffix(".py")}


def test_nothing_imports_a_command_but_the_package_and_commands() -> None:
    importers = {room_of(file) for file in FILES if {"cli", "commands"} & set(map(room_imported, imported(file)))}
    assert importers <= {"commands", "__init__.py", "__main__.py"}


def test_of_the_loader_methods_know_nothing_but_what_a_sample_is() -> None:
    for file in FILES:
        if room_of(file) == "methods":
            from_data = {name for name in imported(file) if room_imported(name) == "data"}
            assert from_data <= {"lomar.data.loader.SampleKey"}, file


def test_the_rule_can_fail() -> None:
    assert "lomar.data.loader.SampleKey" in imported("methods/views.py")
    assert room_imported("lomar.data.loader.SampleKey") == "data"
    assert "lomar.commands.pretrain.pretrain" in imported("__init__.py")


def test_the_map_shows_every_file_and_no_other() -> None:
    table = [line for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines() if line.startswith("| ")]
    shown = set()
    for line in table:
        room = re.match(r"\| \*\*(\w+)/\*\*", line)  # a row of a room names its files in its second column
        for name in re.findall(r"`([\w/]+\.py)`", line):
            shown.add(f"{room[1]}/{name}" if room else name)
    packages = {f"{room}/__init__.py" for room in ALLOWED if not room.endswith(".py")}
    assert shown == set(FILES) - packages - {"__init__.py", "__main__.py"}
