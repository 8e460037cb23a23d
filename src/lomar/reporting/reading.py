"""A run's folder as it is on disk -> one record of all that a report tells; nothing in the folder is touched."""

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lomar.errors import UserError
from lomar.files import LOCK_FILE
from lomar.options import DetectOptions, FinetuneOptions, PretrainOptions, ProbeOptions, TokenizerOptions
from lomar.training.records import LOG_FILE, Metrics, Row

# Command -> the options that its configuration holds.
KINDS: Mapping[str, type] = {
    "pretrain": PretrainOptions,
    "finetune": FinetuneOptions,
    "detect": DetectOptions,
    "probe": ProbeOptions,
    "tokenizer train": TokenizerOptions,
}
UNKNOWN = "unknown"  # a folder whose configuration is not there or not ours
# What a run's last evaluation left, of those commands that leave it.
RESULTS = {"finetune": "evaluation.json", "detect": "evaluation.json", "probe": "probe.json"}
LARGEST = 1e100  # of a number in a file: sums and products of such stay finite
LEAST_WAITED = 10  # steps from which a share of waiting can be told
FRESH_S = 900.0  # a run on another machine counts as going on for so long after its last row
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  ([A-Z]+) +(.*)")
_LOCKED_BY = re.compile(r"process (\d+) on (\S+)")
_DRAWN_AT = re.compile(r"reconstruction-(\d+)\.png")
_LOG_BYTES = 2**23  # of a log, its end; its first lines are read too
_MOST_BAD = 100_000  # lines of bad_files.txt


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run. Whatever could not be read is empty, and `troubles` says so.

    Args:
        path: its folder, or a tokenizer's file.
        kind: the command that made it, one of `KINDS`, or `UNKNOWN`.
        state: "finished", "running" or "interrupted".
        config: its options, settled.
        rows: of metrics.jsonl, by step.
        total_steps: of the whole run; None where that cannot be told.
        images: in an epoch; None likewise.
        lomar: version that the last sitting had.
        versions: (package, version) of the last sitting.
        hardware: where it ran; empty where the log does not say.
        sittings: how often it was begun or gone on with.
        begun, heard: first and last time in its log.
        bad_files: (name, reason).
        non_finite: what the log says of losses that were not finite.
        log: its last lines.
        results: what the last evaluation wrote.
        drawn: step -> picture of reconstructions.
        troubles: a sentence on each thing that is there and cannot be read.
    """

    path: Path
    kind: str
    state: str
    config: Mapping[str, Any]
    rows: Sequence[Row]
    total_steps: int | None
    images: int | None
    lomar: str
    versions: Sequence[tuple[str, str]]
    hardware: str
    sittings: int
    begun: datetime | None
    heard: datetime | None
    bad_files: Sequence[tuple[str, str]]
    non_finite: Sequence[str]
    log: Sequence[str]
    results: Mapping[str, Any]
    drawn: Mapping[int, Path]
    troubles: Sequence[str]

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def name(self) -> str:
        """What a report calls it."""
        return self.path.absolute().name or str(self.path)

    @property
    def last_step(self) -> int:
        """Updates done, as far as its rows tell."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def compares_views(self) -> bool:
        """Whether its method compares crops of an image, as DINO and MoCo v3 do, and predicts no patches."""
        return self.kind == "pretrain" and self.config.get("head_outputs") is not None

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the rows that have a finite number under a key."""
        return [(row["step"], float(row[key])) for row in self.rows if is_number(row.get(key))]

    def values(self, key: str) -> list[float]:
        """The values of `points`."""
        return [value for _, value in self.points(key)]

    def option(self, name: str, kind: type) -> Any:
        """An option's value if it is of that kind, else None: a configuration may have been edited by hand."""
        value = self.config.get(name)
        if kind is float and is_number(value):
            return float(value)  # type: ignore[arg-type]
        return value if isinstance(value, kind) and not isinstance(value, bool) else None


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number that can be reckoned with: finite, and not absurdly large."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _reckonable(row: Row) -> Row:
    """A row whose numbers can be reckoned with; others become None, like those that were not finite."""
    return {
        key: None if isinstance(value, int | float) and not isinstance(value, bool) and not is_number(value) else value
        for key, value in row.items()
    }


def waiting_share(run: RunRecord) -> float | None:
    """The share of the time spent waiting for data, behind the first tenth of the steps; None of a short run."""
    rows = [row for row in run.rows if is_number(row.get("data_wait")) and is_number(row.get("images_per_s"))]
    rows = [row for row in rows[round(len(rows) / 10) :] if row["images_per_s"] > 0]
    if len(rows) < LEAST_WAITED:
        return None
    times = [1 / max(row["images_per_s"], 1e-9) for row in rows]
    return sum(row["data_wait"] * time for row, time in zip(rows, times, strict=True)) / sum(times)


def read_run(path: str | Path) -> RunRecord:
    """All that there is of a run, finished, going on or interrupted, in whatever state its files are.

    Args:
        path: its folder, or the file of a tokenizer that `lomar tokenizer train` has made or is making.

    Raises:
        UserError: there is no run.
    """
    path = Path(path)
    files = _files_of(path)
    troubles: list[str] = []
    config = _config(files.config, troubles)
    kind = files.kind or kind_of_config(config)
    try:
        rows = sorted(
            (_reckonable(row) for row in Metrics.read(files.metrics) if is_number(row["step"])),
            key=lambda row: row["step"],
        )
    except OSError as error:
        rows = []
        troubles.append(f"{files.metrics.name} cannot be read: {_one_line(error)}")
    log = _Log(_log_lines(files.log, troubles))
    images = _images(rows, config)
    total = _total_steps(kind, config, images)
    results = _results(files.folder / RESULTS[kind], troubles) if kind in RESULTS else {}
    return RunRecord(
        path=path,
        kind=kind,
        state=_state(files, rows, total, done=files.done or (kind == "probe" and bool(results))),
        config=config,
        rows=rows,
        total_steps=total,
        images=images,
        lomar=log.lomar,
        versions=log.versions,
        hardware=log.hardware,
        sittings=log.sittings,
        begun=log.begun,
        heard=log.heard,
        bad_files=_bad_files(files.folder / "bad_files.txt", troubles) if not files.kind else (),
        non_finite=log.non_finite,
        log=log.last,
        results=results,
        drawn=_drawn(files.folder / "figures") if not files.kind else {},
        troubles=troubles,
    )


@dataclass(frozen=True)
class _Files:
    """Where the parts of a run are; `kind` and `done` where they can be told from the files alone."""

    folder: Path
    config: Path | None
    metrics: Path
    log: Path | None
    lock: Path
    kind: str = ""
    done: bool = False


def _files_of(path: Path) -> _Files:
    """The files of a run's folder, or those beside a tokenizer.

    Raises:
        UserError: there is neither.
    """
    metrics, partial = path.with_suffix(".jsonl"), path.with_name(f"{path.name}.partial")
    if path.suffix == ".safetensors" and (metrics.is_file() or partial.is_dir()) and not path.is_dir():
        lock = path.with_name(f".{path.name}.lock")
        done = path.is_file() and not partial.is_dir()
        return _Files(path.parent, None, metrics, None, lock, "tokenizer train", done)
    if not path.exists():
        raise UserError(f"there is no run {path}")
    if not path.is_dir():
        raise UserError(f"{path} is a file; a report is of a run's folder")
    names = ("config.yaml", "metrics.jsonl")
    if not any((path / name).is_file() for name in names):
        raise UserError(f"{path} is not the folder of a run: it holds neither {' nor '.join(names)}")
    return _Files(path, path / names[0], path / names[1], path / LOG_FILE, path / LOCK_FILE)


def kind_of_config(config: Mapping[str, Any]) -> str:
    """The command whose options a configuration has most of, and hardly any other; else `UNKNOWN`."""
    known = {command: {each.name for each in fields(options)} for command, options in KINDS.items()}
    fit = {command: len(names & set(config)) - len(set(config) - names) for command, names in known.items()}
    best = max(fit, key=lambda command: fit[command])
    return best if fit[best] > 0 else UNKNOWN


def _config(path: Path | None, troubles: list[str]) -> dict[str, Any]:
    if path is None or not path.exists():
        return {}
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML raises more than YAMLError, see `read_config`
        troubles.append(f"{path.name} cannot be read: {_one_line(error)}")
        return {}
    if not isinstance(loaded, dict):
        troubles.append(f"{path.name} holds no options")
        return {}
    return {str(name).replace("-", "_"): value for name, value in loaded.items()}


def _results(path: Path, troubles: list[str]) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        troubles.append(f"{path.name} cannot be read: {_one_line(error)}")
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _bad_files(path: Path, troubles: list[str]) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        troubles.append(f"{path.name} cannot be read: {_one_line(error)}")
        return []
    lines = text.split("\n")[:-1]  # behind the last newline there is nothing, or a line that is being written
    pairs = [line.partition("\t")[::2] for line in lines[:_MOST_BAD] if line]
    return list(dict(pairs).items())


def _drawn(folder: Path) -> dict[int, Path]:
    """Step -> picture, by step."""
    try:
        named = [(_DRAWN_AT.fullmatch(path.name), path) for path in folder.iterdir()]
    except OSError:  # there is none, or it may not be read
        return {}
    return dict(sorted((int(name[1]), path) for name, path in named if name))


def _images(rows: Sequence[Row], config: Mapping[str, Any]) -> int | None:
    """Images of an epoch: steps, epochs and the batch tell, to the rounding of the epochs."""
    batch = config.get("batch_size")
    for row in reversed(rows):
        if is_number(batch) and is_number(row.get("epoch")) and row["epoch"] > 1e-9 and row["step"] > 0:
            return round(row["step"] * batch / row["epoch"])
    return None


def _total_steps(kind: str, config: Mapping[str, Any], images: int | None) -> int | None:
    """As the commands that train work it out from their options."""
    steps, epochs, batch = (config.get(name) for name in ("max_steps", "epochs", "batch_size"))
    if is_number(steps):
        return int(steps)  # type: ignore[arg-type]
    if images and is_number(epochs) and is_number(batch) and batch > 0:  # type: ignore[operator]
        return max(1, round(epochs * (images / batch)))  # type: ignore[operator]
    return None


def _state(files: _Files, rows: Sequence[Row], total: int | None, done: bool) -> str:
    if _is_written(files):
        return "running"
    last = max((row["step"] for row in rows), default=0)
    if done or (total is not None and last >= total):
        return "finished"
    return "interrupted"


def _is_written(files: _Files) -> bool:
    """Whether a process writes the run, told by its lock file without asking for the lock.

    A process of this machine lives or does not; of another machine's, which left the file or goes on, the age of the
    last row decides.
    """
    try:
        holder = _LOCKED_BY.match(files.lock.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return False
    if holder is None:
        return False
    if holder[2] != socket.gethostname():
        try:
            return datetime.now().timestamp() - files.metrics.stat().st_mtime < FRESH_S
        except OSError:
            return False
    try:
        os.kill(int(holder[1]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _log_lines(path: Path | None, troubles: list[str]) -> list[str]:
    """The lines of a log; of a very long one the first few and the end."""
    if path is None or not path.exists():
        return []
    try:
        with path.open("rb") as file:
            head = file.read(_LOG_BYTES)
            size = os.fstat(file.fileno()).st_size
            tail = b""
            if size > _LOG_BYTES:
                file.seek(max(_LOG_BYTES, size - _LOG_BYTES))
                tail = file.read()
    except OSError as error:
        troubles.append(f"{path.name} cannot be read: {_one_line(error)}")
        return []
    return (head + tail).decode(errors="replace").splitlines()


class _Log:
    """What a run's log tells: of each sitting its versions, and what went wrong."""

    LAST = 60  # lines kept

    def __init__(self, lines: Sequence[str]) -> None:
        self.last = list(lines[-self.LAST :])
        self.lomar = self.hardware = ""
        self.versions: list[tuple[str, str]] = []
        self.sittings = 0
        self.begun: datetime | None = None
        self.heard: datetime | None = None
        self.non_finite: list[str] = []
        for time, text in self._said(lines):
            self.begun = self.begun or time
            self.heard = time
            if begun := re.match(r"lomar (\S+), options in ", text):
                self.sittings += 1
                self.lomar, self.versions, self.hardware = begun[1], [], ""
            elif text.startswith("versions: "):
                self.versions = [(name, version) for name, _, version in map(_parted, text[10:].split(", "))]
            elif text.startswith("hardware: "):
                self.hardware = text[10:]
            elif text.startswith("the loss is not finite"):
                self.non_finite.append(text)

    @staticmethod
    def _said(lines: Sequence[str]) -> Iterator[tuple[datetime, str]]:
        for line in lines:
            if (found := _LOG_LINE.fullmatch(line)) is None:
                continue
            try:
                yield datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S"), found[3]
            except ValueError:  # a month of 13
                continue


def _parted(text: str) -> tuple[str, str, str]:
    return text.partition(" ")


def _one_line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return " ".join((reason or str(error)).split())[:200] or type(error).__name__
