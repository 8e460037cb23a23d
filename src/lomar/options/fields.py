"""What an option is, and how text, YAML or Python becomes its value."""

import dataclasses
import reprlib
import shlex
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lomar.errors import UserError

AUTO = "chosen from the data and the hardware"
ANY_IMAGES = (
    "folder of images, .txt file of paths, tar files here or at an address (docs/shards.md), hf:NAME, "
    "torchvision:NAME, or 'sample'"
)
_ABSURD = 10_000  # an upper bound from here on is told to those alone who are above it
LARGEST_SEED = 2**32 - 1  # every generator takes it
MOST_WORKERS = 256  # more is a slip of the finger, which would take all memory before anything is read


def option(
    text: str,
    *,
    default: Any = MISSING,
    auto: str = "",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    results: bool = True,
    positional: bool = False,
) -> Any:
    """A field of an options class.

    Args:
        text: its help.
        default: used when nothing else gives a value.
        auto: who gives the value where there is no default (`AUTO`, or the recipe and its value).
        low, above, high, below: bounds, `above` and `below` excluded.
        choices: the only values allowed.
        metavar: what stands for the value in the help.
        results: whether another value leads to other results; the rest may change when a run is resumed.
        positional: whether it is typed without its name.
    """
    metadata = {
        "help": text,
        "auto": auto,
        "low": low,
        "above": above,
        "high": high,
        "below": below,
        "choices": choices,
        "metavar": metavar,
        "results": results,
        "positional": positional,
    }
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """Field name -> option as typed."""
    return "--" + name.replace("_", "-")


def fields_of(options: type) -> dict[str, dataclasses.Field[Any]]:
    """Name -> field of an options class, in order."""
    return {f.name: f for f in dataclasses.fields(options)}


def suggestion(word: str, known: list[str]) -> str:
    """' (did you mean ...?)' for a word that begins a known one or is close to it, else ''."""
    close = [name for name in known if word.strip("-") and name.startswith(word)]
    close = close or get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def convert(options: type, name: str, raw: Any) -> Any:
    """The value of one option from text, YAML or Python.

    Args:
        options: an options class.
        name: one of its fields.
        raw: a string or list of strings from the command line, or a value of the right type.

    Raises:
        UserError: it has the wrong type, is out of range or is none of the choices.
    """
    kind, optional = kind_of(typing.get_type_hints(options)[name])
    if raw is None and optional:
        return None
    metadata = fields_of(options)[name].metadata
    if typing.get_origin(kind) is tuple:
        items = raw if isinstance(raw, list | tuple) else [raw]
        item_kind, *others = typing.get_args(kind)
        if others != [...] and len(items) != 1 + len(others):
            raise UserError(f"{flag(name)} takes {1 + len(others)} values, not {len(items)}")
        if not items:
            raise UserError(f"{flag(name)} needs at least one value")
        return tuple(_scalar(item_kind, name, item, metadata) for item in items)
    return _scalar(kind, name, raw, metadata)


def kind_of(hint: Any) -> tuple[Any, bool]:
    """The type of an annotation without None, and whether None was there."""
    if isinstance(hint, types.UnionType):
        kinds = [k for k in typing.get_args(hint) if k is not type(None)]
        return kinds[0], True
    return hint, False


def _scalar(kind: type, name: str, raw: Any, metadata: Mapping[str, Any]) -> Any:
    described = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
    wrong = UserError(f"{flag(name)} is {_shown(raw)}; it must be {described}{_range_text(metadata)}")
    if kind is bool or isinstance(raw, bool):
        if kind is not bool or not isinstance(raw, bool):
            raise wrong
        return raw
    if kind is str:
        if not isinstance(raw, str | Path):
            raise wrong
        value: Any = str(raw)
        if metadata["choices"] and value not in metadata["choices"]:
            known = list(metadata["choices"])
            raise UserError(f"{flag(name)} is {_shown(value)}; it can be {', '.join(known)}{suggestion(value, known)}")
        return value
    try:
        value = kind(raw)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if kind is int and isinstance(raw, float) and raw != value:
        raise wrong
    low, above, high, below = (metadata[k] for k in ("low", "above", "high", "below"))
    inside = (
        value == value
        and abs(value) != float("inf")
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )
    if not inside:
        if high is not None and _ABSURD <= high < value < float("inf"):
            raise UserError(f"{flag(name)} is {_shown(raw)}; it must be {described}, at most {high:,.0f}")
        raise wrong
    return value


def _shown(value: Any) -> str:
    """A value in a message, cut where it is very long: YAML's references can nest a few lines without end."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = cut.maxlong = 200
    cut.maxlevel = 2
    try:
        return cut.repr(value)
    except ValueError:  # of whole numbers with thousands of digits
        return "a very large number"


def _range_text(metadata: Mapping[str, Any]) -> str:
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    known = {key: metadata[key] for key in words if metadata[key] is not None}
    if known.get("high", 0) >= _ABSURD:
        del known["high"]
    parts = [f"{words[key]} {bound}" for key, bound in known.items()]
    return f", {' and '.join(parts)}" if parts else ""


def converted(options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of a call from Python, as the command's options.

    Raises:
        UserError: a name is unknown, or a value wrong.
    """
    known = fields_of(options)
    for name in given:
        if name not in known:
            raise UserError(f"there is no option {name!r}{suggestion(name, list(known))}")
    return {name: convert(options, name, value) for name, value in given.items()}


def command_line(command: str, options: type, given: Mapping[str, Any]) -> str:
    """A command as it could be typed again.

    Args:
        command: its name.
        options: its class of options.
        given: the options that were given, with their values.
    """
    words = ["lomar", command]
    for name, known in fields_of(options).items():
        if name not in given or given[name] is False or given[name] is None:
            continue
        value = given[name]
        values = [str(each) for each in (value if isinstance(value, tuple) else (value,))]
        words += values if known.metadata["positional"] else [flag(name), *(values if value is not True else ())]
    return shlex.join(words)


def read_config(path: str, options: type) -> dict[str, Any]:
    """Option name -> value, from a YAML file.

    Raises:
        UserError: the file is missing, is no mapping of options, or holds an unknown name or a wrong value.
    """
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except Exception as error:  # PyYAML raises more than YAMLError: of dates ValueError, of deep lists RecursionError
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"--config {path} is not valid YAML: {reason}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path} must hold 'option: value' lines, not a {type(loaded).__name__}")
    known = fields_of(options)
    values = {}
    for key, raw in loaded.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"--config {path}: there is no option {_shown(key)}{suggestion(name, list(known))}")
        try:
            values[name] = convert(options, name, raw)
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from None
    return values
