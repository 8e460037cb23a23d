"""Claims about how text, YAML and Python values become options."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lomar.cli import COMMANDS
from lomar.errors import UserError
from lomar.methods.recipes import RECIPES
from lomar.options import PretrainOptions, convert, fields_of, flag, read_config, suggestion


@pytest.mark.parametrize("options", [options for options, _ in COMMANDS.values()])
def test_every_option_has_a_help_text_and_its_default_is_allowed(options: type) -> None:
    for name, field in fields_of(options).items():
        assert field.metadata["help"], name
        if isinstance(field.default, int | float | str | tuple):
            assert convert(options, name, field.default) == field.default


def told(name: str) -> dict[str, str]:
    """Recipe -> value, where the help of an option tells it: "lomar: 7; mae, beit: 0, the whole image"."""
    parts = [part.split(": ") for part in fields_of(PretrainOptions)[name].metadata["auto"].split(";") if ": " in part]
    return {recipe.strip(): value.split(",")[0] for recipes, value in parts for recipe in recipes.split(",")}


def test_the_help_tells_the_values_of_the_recipes() -> None:
    """All of LoMaR's that matter to it, and of others what differs; the same decay for all that hide patches."""
    for name in fields_of(PretrainOptions):
        for recipe, text in told(name).items():
            words = text.split()
            assert convert(PretrainOptions, name, words if len(words) > 1 else text) == RECIPES[recipe].options[name]
    assert {name for name in RECIPES["lomar"].options if "lomar" not in told(name)} == {"mask_min_block"}
    decays = {recipe.options["weight_decay"] for recipe in RECIPES.values() if not recipe.objective}
    assert decays == {float(told("weight_decay")["lomar"])}


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("batch_size", "32", 32),
        ("batch_size", 32.0, 32),
        ("base_lr", "1e-3", 1e-3),  # what YAML 1.1 makes of 1e-3 is text
        ("epochs", 3, 3.0),
        ("max_steps", None, None),
        ("crop_scale", [0.1, 1], (0.1, 1.0)),
        ("mean", 0.5, (0.5,)),
        ("out", Path("run"), "run"),
        ("resume", True, True),
    ],
)
def test_a_value_is_converted_to_the_type_of_its_option(name: str, raw: Any, value: Any) -> None:
    converted = convert(PretrainOptions, name, raw)
    assert converted == value and type(converted) is type(value)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("batch_size", True),
        ("batch_size", 2.5),
        ("batch_size", float("nan")),
        ("batch_size", float("inf")),
        ("batch_size", None),
        ("batch_size", [3]),
        ("resume", "yes"),
        ("resume", 1),
        ("data", 3),
        ("crop_scale", [0.1]),
        ("crop_scale", 0.5),
        ("mean", []),
        ("std", [0.0]),
        ("mask", "Uniform"),
        ("betas", [0.9, 1.0]),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_option(name: str, raw: Any) -> None:
    with pytest.raises(UserError, match=f"^{flag(name)} "):
        convert(PretrainOptions, name, raw)


def test_the_beginning_of_a_name_suggests_it_before_what_merely_looks_alike() -> None:
    known = ["--data", "--batch-size", "--base-lr"]
    assert suggestion("--bat", known) == " (did you mean --batch-size?)"
    assert suggestion("--batchsize", known) == " (did you mean --batch-size?)"
    assert suggestion("--", known) == suggestion("--qqqq", known) == ""


def config(folder: Path, text: str) -> str:
    path = folder / "some.yaml"
    path.write_text(text)
    return str(path)


def test_a_config_gives_options_by_flag_or_field_name(tmp_path: Path) -> None:
    read = read_config(config(tmp_path, "batch-size: 8\nbase_lr: 1e-3\nmax_steps: null\n"), PretrainOptions)
    assert read == {"batch_size": 8, "base_lr": 1e-3, "max_steps": None}
    assert read_config(config(tmp_path, "# nothing\n"), PretrainOptions) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size: 8", "there is no option 'bach_size' (did you mean batch_size?)"),
        ("3: 8", "there is no option 3"),
        ("batch_size: many", "--batch-size is 'many'; it must be a whole number, at least 1"),
        ("batch_size: [1, 2]", "--batch-size is [1, 2]; it must be a whole number, at least 1"),
        ("- batch_size", "must hold 'option: value' lines, not a list"),
        ("just text", "must hold 'option: value' lines, not a str"),
        ("batch_size: [", "is not valid YAML: "),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML: "),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_file(text: str, message: str, tmp_path: Path) -> None:
    path = config(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_config(path, PretrainOptions)
    told = str(caught.value)
    assert told.startswith(f"--config {path}") and message in told and "\n" not in told


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"\x00\x01"])
def test_a_config_that_cannot_be_read_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"--config {path}"):
        read_config(str(path), PretrainOptions)


def test_a_run_writes_its_options_as_yaml_that_reads_back_the_same(finished_run: Path) -> None:
    path = finished_run / "config.yaml"
    read = read_config(str(path), PretrainOptions)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in read.items()}
    assert plain == yaml.safe_load(path.read_text())
    assert set(fields_of(PretrainOptions)) - set(read) == {"out", "config", "resume", "overwrite"}
