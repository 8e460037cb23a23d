"""What `lomar study` is to run: options over what the hardware suggests, checked against what the folder holds."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lomar.commands.automatic import SHORT_RUN_LR, Hardware, decoder_for, find_hardware, loading_workers
from lomar.commands.settling import check_fit
from lomar.commands.two_view_settling import fitted_sizes
from lomar.errors import UserError
from lomar.files import write_text
from lomar.interop.tokenizers import load_tokenizer
from lomar.methods.recipes import RECIPES, mask_layer_for
from lomar.model.encoder import SIZES, size_of
from lomar.options import StudyOptions, fields_of, flag, suggestion
from lomar.study.cells import TOKENIZER, Setup, needs_tokenizer
from lomar.study.grids import STUDIES, Entry, Sizes, Study
from lomar.study.plan import Plan, chosen_entries
from lomar.study.splits import PRETRAIN

SETTINGS_FILE = "study.yaml"
MOST_JOBS = 8  # chosen on a CPU: more seldom pay, and each holds a model and its images
# option -> with a GPU, without
_CHOSEN: dict[str, tuple[Any, Any]] = {
    "seeds": ((0, 1, 2), (0, 1)),
    "model": ("small", "128x6x4"),
    "image_size": (112, 56),
    "patch_size": (8, 4),
    "epochs": (300.0, 6.0),
    "batch_size": (512, 64),
    "finetune_epochs": (100.0, 6.0),
    "finetune_batch_size": (256, 32),
}


@dataclass(frozen=True)
class SettledStudy:
    """A study that can begin or go on.

    Args:
        name: of it.
        study: what is compared.
        options: every one with a value, but for what is chosen by the hardware each time.
        hardware: where.
        plan: its cells.
        whole: the plan of all rows, also of those that are not asked for.
        setup: what they have in common.
        places: the environment of each job at a time.
        tokenizer: the words of the command that trains one; none where it is not needed.
    """

    name: str
    study: Study
    options: StudyOptions
    hardware: Hardware
    plan: Plan
    whole: Plan
    setup: Setup
    places: list[dict[str, str]]
    tokenizer: list[str]


def settle(given: Mapping[str, Any]) -> SettledStudy:
    """The study that the options ask for.

    Raises:
        UserError: something is missing or wrong, or the folder holds a study of other settings.
    """
    for name in ("study", "data", "out"):
        if name not in given:
            shown = f"which study is missing: {', '.join(STUDIES)}" if name == "study" else f"{flag(name)} is missing"
            raise UserError(f"{shown}; see lomar study --help")
    name, out = given["study"], Path(given["out"])
    if name not in STUDIES:
        known = list(STUDIES)
        raise UserError(f"there is no study {name!r}{suggestion(name, known)}; it can be {', '.join(known)}")
    hardware = find_hardware(given.get("device", "auto"))
    gpu = hardware.device == "cuda"
    there = _settings(out)
    chosen = {option: pair[0 if gpu else 1] for option, pair in _CHOSEN.items()} | {"precision": "auto"}
    options = StudyOptions(**chosen | there | _settled_here(given))
    if options.precision == "auto":
        options = replace(options, precision="bf16" if hardware.bf16 else "fp32")
    _check_same(there, options, out)
    sizes = Sizes(options.image_size, options.patch_size, _depth(options.model))
    if options.image_size % options.patch_size:
        raise UserError(
            f"--image-size {options.image_size} is not made of patches of --patch-size {options.patch_size}"
        )
    study = STUDIES[name]
    entries = study.entries(sizes)
    wanted = entries
    if options.rows:
        names = [entry.name for entry in entries]
        for row in options.rows:
            if row not in names:
                raise UserError(f"--rows: {name} has no row {row!r}{suggestion(row, names)}; it has {'; '.join(names)}")
        wanted = chosen_entries(entries, options.rows)
    for entry in wanted:
        _check_row(entry, options, sizes)
    if options.tokenizer and any(needs_tokenizer(entry.method) for entry in wanted):
        try:
            load_tokenizer(Path(options.tokenizer))
        except UserError as error:
            raise UserError(f"--tokenizer: {error}") from None
    seeds = tuple(dict.fromkeys(options.seeds or ()))
    plan = Plan(wanted, sizes, options.epochs, base_lrs(options), seeds)
    places = _places(options, hardware)
    share = max(1, hardware.cores // len(places))
    workers = loading_workers(share, gpu) if options.workers is None else options.workers
    setup = Setup(
        out=out,
        model=options.model,
        image_size=options.image_size,
        patch_size=options.patch_size,
        batch_size=options.batch_size,
        finetune_epochs=options.finetune_epochs,
        finetune_batch_size=options.finetune_batch_size,
        evaluations=options.evaluations,
        hardware={"device": options.device, "precision": options.precision, "workers": workers},
        tokenizer=Path(options.tokenizer) if options.tokenizer else out / TOKENIZER,
    )
    tokenizer = [] if options.tokenizer else _tokenizer_words(setup)
    return SettledStudy(name, study, options, hardware, plan, replace(plan, entries=entries), setup, places, tokenizer)


def base_lrs(options: StudyOptions) -> tuple[float, ...]:
    """The rates of the sweep for 256 images, rising: around what short runs have for a step, if none are given."""
    short = SHORT_RUN_LR * 256 / options.batch_size
    return tuple(sorted(set(options.base_lrs or (short / 2, short, 2 * short))))


def _settled_here(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options as given; the tokenizer's place by its whole path, the same from whatever folder."""
    return dict(given) | ({"tokenizer": str(Path(given["tokenizer"]).absolute())} if given.get("tokenizer") else {})


def _check_row(entry: Entry, options: StudyOptions, sizes: Sizes) -> None:
    """Refuse a row that could not be trained, before hours are spent on the others.

    Raises:
        UserError: its windows, patches or widths do not fit.
    """
    if not entry.method:
        return
    recipe = RECIPES[entry.method]
    values = dict(recipe.full) | dict(recipe.options) | {"method": entry.method, "model": options.model, "channels": 3}
    values |= {name: getattr(options, name) for name in ("image_size", "patch_size", "batch_size")}
    if not recipe.objective:
        values["mask_layer"] = mask_layer_for(values["mask_layer"], sizes.depth)
        values |= {name: value for name, value, _ in decoder_for(size_of(options.model)[0])}
    values |= dict(entry.changes)
    try:
        if values["patch_size"] < 1:
            raise UserError(f"--patch-size {options.patch_size} cannot be halved")
        if recipe.objective:
            fitted = fitted_sizes(recipe.objective, values, entry.changes)
            values |= {name: choice.value for name, choice in fitted.items()}
        check_fit(values, None)
    except UserError as error:
        raise UserError(f"row {entry.name!r} cannot be trained: {error}; --rows names those to run") from None


def keep_settings(settled: SettledStudy) -> None:
    """Write what all runs in the folder have in common, while no other process does.

    Raises:
        UserError: another process has begun a study of other settings there.
    """
    out = settled.setup.out
    path = out / SETTINGS_FILE
    if path.exists():
        _check_same(_settings(out), settled.options, out)
        return
    values = {name: _plain(getattr(settled.options, name)) for name in _settled_options()}
    text = yaml.safe_dump(values, sort_keys=False)
    write_text(path, text)


def _settled_options() -> list[str]:
    """Those that every study in a folder shares."""
    return [name for name, field in fields_of(StudyOptions).items() if field.metadata["results"] and name != "study"]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _settings(out: Path) -> dict[str, Any]:
    """What the folder's studies have in common; {} where there is none.

    Raises:
        UserError: it is a file, holds something else, or its settings are damaged.
    """
    path = out / SETTINGS_FILE
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; it must be a folder")
    if not path.exists():
        # Files that begin with a dot: another process begins just now, or was killed as it did.
        if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise UserError(f"--out {out} is not empty and holds no study; give a new folder")
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict) or set(found) != set(_settled_options()):
        raise UserError(f"{path} is damaged, or of another version of lomar; give another --out")
    return found


def _check_same(there: Mapping[str, Any], options: StudyOptions, out: Path) -> None:
    for name, value in there.items():
        asked = _plain(getattr(options, name))
        if asked != value:
            raise UserError(
                f"{flag(name)} is {asked}, but the runs in {out} have {value}; leave it out, or give another --out"
            )


def _depth(model: str) -> int:
    try:
        return size_of(model)[1]
    except ValueError as error:
        raise UserError(f"--model {error}{suggestion(model, list(SIZES))}") from None


def _places(options: StudyOptions, hardware: Hardware) -> list[dict[str, str]]:
    """The environment of each job at a time: its GPU, or its share of the cores."""
    if hardware.device == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        visible = visible if len(visible) == gpus else [str(number) for number in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": visible[job % gpus]} for job in range(options.jobs or gpus)]
    jobs = options.jobs or min(MOST_JOBS, hardware.cores)
    return [{"OMP_NUM_THREADS": str(max(1, hardware.cores // jobs))} for _ in range(jobs)]


def _tokenizer_words(setup: Setup) -> list[str]:
    words = ["tokenizer", "train", "--data", str(setup.images(PRETRAIN)), "--out", str(setup.tokenizer), "--resume"]
    return [*words, "--device", setup.hardware["device"], "--workers", str(setup.hardware["workers"])]
