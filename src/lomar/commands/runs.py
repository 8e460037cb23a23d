"""The folder of a run: how it is begun, what is kept of it, what may change when it is resumed."""

import os
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import MISSING, asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric

from lomar import __version__
from lomar.benchmark.machine import processor_name, versions
from lomar.commands.automatic import Choice, Hardware, find_hardware, micro_batch
from lomar.data.opening import is_there
from lomar.data.survey import Survey
from lomar.errors import UserError
from lomar.files import LOCK_FILE, only_writer, write_text
from lomar.launch import launched
from lomar.methods.cost import TRAINED_BYTES
from lomar.model.attention import as_fused
from lomar.options import (
    DetectOptions,
    FinetuneOptions,
    PretrainOptions,
    ProbeOptions,
    TokenizerOptions,
    fields_of,
    flag,
    read_config,
)
from lomar.training.processes import first_alone, said_by_all, together
from lomar.training.records import close_log, open_log

CONFIG_FILE = "config.yaml"
# Commands that make a folder with a configuration.
_RUNS = {
    "pretrain": PretrainOptions,
    "finetune": FinetuneOptions,
    "probe": ProbeOptions,
    "detect": DetectOptions,
    "tokenizer train": TokenizerOptions,
}
# What a resumed run is told anew, and a configuration does not hold.
_ABOUT_THIS_CALL = ("config", "resume", "overwrite", "out")


def asked_for(given: Mapping[str, Any], options: type, paths: tuple[str, ...]) -> dict[str, Any]:
    """What flags and --config ask for; "auto" asks for nothing.

    Args:
        given: the options that were typed.
        options: their class.
        paths: those that may name files, which are made absolute: the run may be resumed from another folder.
    """
    config = read_config(given["config"], options) if given.get("config") else {}
    automatic = {name for name, f in fields_of(options).items() if f.metadata["auto"]}
    asked = {
        name: value
        for name, value in merged(config, given).items()
        if value is not None and not (name in automatic and value == "auto")
    }
    for name in paths:
        if name in asked and asked[name] != "sample" and is_there(asked[name]):
            asked[name] = os.path.abspath(asked[name])  # noqa: PTH100 (links stay as they are)
    return asked


def merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`; what is given higher up also beats its rivals: steps and epochs, statistics and numbers."""
    if "epochs" in upper and "max_steps" in upper and upper["epochs"] is not None and upper["max_steps"] is not None:
        raise UserError("--epochs and --max-steps are both given; give one")
    length = {"epochs", "max_steps", "warmup_epochs"}  # of a run: a warm-up is for the length it was given with
    beaten = {"epochs": length, "max_steps": length, "statistics": {"mean", "std"}}
    rivals = {rival for name, names in beaten.items() if upper.get(name) is not None for rival in names}
    return {key: value for key, value in lower.items() if key not in rivals} | dict(upper)


def check_processes(batch_size: int, strategy: str) -> None:
    """Refuse a batch that the processes cannot share.

    Raises:
        UserError: they are too many, or shares must be alike and are not.
    """
    count = launched().count
    if batch_size < count:
        raise UserError(f"--batch-size {batch_size} is smaller than the {count} processes")
    if strategy == "fsdp" and batch_size % count:
        near = max(count, round(batch_size / count) * count)
        raise UserError(
            f"--batch-size {batch_size} gives {count} processes unlike shares, which --strategy fsdp cannot have; "
            f"{near} would be alike"
        )


def goes_on(there: bool, asked: Mapping[str, Any]) -> bool:
    """Whether --resume goes on with what is there; where nothing is, and --data says of what, it begins.

    So one command line serves a job that is started again and again.

    Raises:
        UserError: it is also asked to delete it.
    """
    if asked.get("resume") and asked.get("overwrite"):
        raise UserError("--resume and --overwrite are both given; give one")
    return bool(asked.get("resume")) and (there or "data" not in asked)


def holds_run(run: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    return any((run / name).exists() for name in (CONFIG_FILE, "metrics.jsonl", "checkpoints"))


def check_kind(run: Path, options: type) -> None:
    """Refuse a folder that holds a run of another command: to delete it is not what --overwrite was given for.

    Args:
        run: the folder.
        options: the class of this command's options, all of which its configuration has.

    Raises:
        UserError: its configuration is another command's.
    """
    file = run / CONFIG_FILE
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return  # what is wrong with it is said where it is read
    foreign = set(map(str, loaded)) - set(fields_of(options)) if isinstance(loaded, dict) else set()
    for command, others in _RUNS.items():
        if foreign & set(fields_of(others)):
            raise UserError(f"--out {run} holds a run of `lomar {command}`; give another folder")


def check_new(run: Path, asked: Mapping[str, Any]) -> None:
    """Refuse to begin a run where something is in the way.

    Raises:
        UserError: a run is there already, or a file.
    """
    if holds_run(run) and not asked.get("overwrite"):
        raise UserError(f"--out {run} already holds a run; --resume goes on with it, --overwrite deletes it")
    if run.exists() and not run.is_dir():
        raise UserError(f"--out {run} is a file; it must be a folder")


def stored(
    run: Path,
    asked: Mapping[str, Any],
    options: type,
    needed: Callable[[Mapping[str, Any]], Collection[str]] = lambda values: (),
) -> dict[str, Any]:
    """The options of the run in a folder, with those that were asked for anew.

    Args:
        run: the folder.
        asked: what was asked for.
        options: the class of the command's options.
        needed: values -> names of those that may have none, but not in this run.

    Raises:
        UserError: there is no run, its configuration is not whole, or another result is asked for.
    """
    file = run / CONFIG_FILE
    if not file.exists():
        raise UserError(f"--out {run} holds no run to resume: there is no {CONFIG_FILE} in it")
    check_kind(run, options)
    kept = read_config(str(file), options)
    fields = fields_of(options)
    for name, value in asked.items():
        if fields[name].metadata["results"] and kept.get(name) != value:
            raise UserError(
                f"{flag(name)} is {value!r}, but the run in {run} has {kept.get(name)!r}; "
                "a resumed run keeps what changes its results"
            )
    values = kept | dict(asked)
    required = needed(values)
    missing = [
        name
        for name, field in fields.items()
        if (field.default is MISSING and name not in values) or (name in required and values.get(name) is None)
    ]
    if missing:
        raise UserError(f"{file} is not complete: it lacks {', '.join(missing)}")
    if (values.get("epochs") is None) == (values.get("max_steps") is None):
        raise UserError(f"{file} is not what a run writes: it must settle one of epochs and max_steps")
    return values


def options_of(model: str, options: type) -> dict[str, Any]:
    """The options of the run that a model is of; none where it is of no run, or one of another command or version.

    Args:
        model: the run's folder, or a file in it.
        options: the class of the command's options.
    """
    path = Path(model)
    config = (path if path.is_dir() else path.parent) / CONFIG_FILE
    try:
        return read_config(str(config), options) if config.exists() else {}
    except UserError:
        return {}


def raise_unless_done(status: int) -> None:
    """What a call from Python gets instead of an exit status.

    Raises:
        KeyboardInterrupt: SIGINT came.
        SystemExit: the status is another one than 0.
    """
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if status:
        raise SystemExit(status)


@contextmanager
def begun(
    fabric: Fabric, run: Path, options: Any, files: tuple[str, ...], resume: bool, prepare: Callable[[], object]
) -> Iterator[None]:
    """The run's folder, made or gone on with, and its log, while no other process writes there.

    Args:
        fabric: the first process does it, the others wait; when all is done their connection ends.
        run: the folder.
        options: all settled.
        files: everything such a run may hold; --overwrite deletes these and nothing else.
        resume: whether the run is there already.
        prepare: writes what belongs to the run from its beginning, into the folder.

    Raises:
        UserError: the folder cannot be written, another process writes it, or the processes have unlike options.
    """
    with ExitStack() as held, together(fabric):
        _check_alike(fabric, options)

        def make() -> None:
            try:
                held.enter_context(only_writer(run / LOCK_FILE, f"--out {run}"))
                if not resume:
                    check_new(run, vars(options))  # again, now that nobody else can begin one
                    # The configuration goes last and comes first: a folder with anything in it is known as a run.
                    for name in reversed(files) if options.overwrite and holds_run(run) else ():
                        _delete(run / name)
                    prepare()
                    _write_config(run, options)
                log = open_log(run)
            except OSError as error:
                raise UserError(f"--out {run} cannot be written: {error.strerror}") from error
            log.info("lomar %s, options in %s", __version__, run / CONFIG_FILE)
            log.info("versions: %s", ", ".join(f"{name} {version}" for name, version in versions().items()))
            log.info("hardware: %s", _hardware(fabric))

        try:
            first_alone(fabric, make)
            yield
        finally:
            close_log()


def _hardware(fabric: Fabric) -> str:
    """What the processes of a run compute on, as far as the first one sees it."""
    found = f"{processor_name()}, {find_hardware('cpu').cores} cores a process"
    if fabric.device.type == "cuda":
        found += f", {fabric.world_size} x {torch.cuda.get_device_name(fabric.device)}"
    elif fabric.world_size > 1:
        found += f", {fabric.world_size} processes"
    return found


def _check_alike(fabric: Fabric, options: Any) -> None:
    """Refuse processes that would not do the same: machines that see other images, or other hardware."""
    names = [name for name, field in fields_of(type(options)).items() if field.metadata["results"]]
    first, *others = said_by_all(fabric, [{name: getattr(options, name) for name in names}])
    for rank, other in enumerate(others, start=1):
        for name in names:
            if first[name] != other[name]:
                raise UserError(
                    f"process {rank} of {fabric.world_size} has {flag(name)} {_shown(other[name])}, "
                    f"the first has {_shown(first[name])}: they see other images or other hardware; give {flag(name)}",
                    shared=True,
                )


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_config(run: Path, options: Any) -> None:
    values = {
        k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items() if k not in _ABOUT_THIS_CALL
    }
    text = yaml.safe_dump(values, sort_keys=False)
    write_text(run / CONFIG_FILE, text)


def fitting_micro_batch(
    kept: Callable[[int], int],
    weights: int,
    batch_size: int,
    hardware: Hardware,
    again: Callable[[int], int] | None = None,
    whole: bool = False,
) -> Choice:
    """Images per forward pass: what one image keeps is measured, as the difference of two images and one.

    Args:
        kept: count of images -> bytes kept for the backward pass.
        weights: numbers that are trained.
        batch_size: images of a step, over all processes.
        hardware: where the run computes.
        again: count of images -> bytes of what the backward pass works out again at a time.
        whole: as for `micro_batch`.
    """
    share = -(-batch_size // launched().count)
    with as_fused() if hardware.device == "cuda" else nullcontext():
        an_image = sum(each(2) - each(1) for each in (kept, again) if each)
    return micro_batch(an_image, TRAINED_BYTES * weights, share, hardware, whole)


def kept_by_a_block(
    kept: Callable[[int], int], set_checkpointing: Callable[[bool], object], blocks: int
) -> Callable[[int], int]:
    """What the backward pass works out again at a time where blocks are checkpointed: count of images -> bytes.

    Args:
        kept: count of images -> bytes kept for the backward pass.
        set_checkpointing: turns the model's checkpointing on and off; it is on.
        blocks: of the model.
    """

    def again(images: int) -> int:
        set_checkpointing(False)
        bytes_kept = kept(images) // blocks
        set_checkpointing(True)
        return bytes_kept

    return again


def notes_on(found: Survey, choices: Mapping[str, Choice], smallest_side: int) -> list[str]:
    """What the user should know before a run starts.

    Args:
        found: the images.
        choices: the automatic ones.
        smallest_side: shorter side of what the model sees, in pixels.
    """
    notes = [f"{found.count} images, shorter side {found.median_short_side_px} px (median of {found.probed} read)"]
    if found.unreadable:
        name, reason = found.unreadable[0]
        notes.append(
            f"{len(found.unreadable)} of them cannot be read and will be skipped, for example {name}: {reason}"
        )
    if found.smallest_short_side_px < smallest_side:
        notes.append(
            f"warning: the smallest image's shorter side is {found.smallest_short_side_px} px; "
            f"it will be enlarged to --image-size {smallest_side}"
        )
    chosen = {name: choice for name, choice in choices.items() if choice.value is not None and choice.reason}
    if chosen:
        notes.append("chosen for you (give the option to decide yourself):")
        notes += [f"  {flag(name):<14} {_shown(choice.value):<10} {choice.reason}" for name, choice in chosen.items()]
    return notes


def _shown(value: Any) -> str:
    return " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)
