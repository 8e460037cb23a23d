"""`lomar prepare`: images made smaller once and written into shards, which every command reads."""

import os
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lomar import __version__
from lomar.commands.automatic import find_hardware
from lomar.commands.progress import watched
from lomar.commands.runs import asked_for, goes_on, raise_unless_done
from lomar.data.opening import open_source
from lomar.data.preparing import Preparation, Prepared, prepared_images
from lomar.data.shard_writer import ShardWriter, discard, member_name, more_than_once, without_ending
from lomar.data.shards import JOURNAL_FILE, Index, damaged, is_finished, is_unfinished, read_index
from lomar.data.sources import ImageSource
from lomar.errors import UserError
from lomar.options import PrepareOptions, converted, fields_of, flag
from lomar.training.bad_files import BadFiles
from lomar.training.signals import StopRequest

_SETTINGS = ("short_side", "encoding", "quality")  # that the index keeps
_PLANNED = ("data", *_SETTINGS, "shard_mb")  # that change what is written


def prepare(**options: Any) -> Path:
    """Write images, made smaller, into shards; the same keys as the options of `lomar prepare`, with underscores.

    Returns:
        The folder, for every `data`.

    Raises:
        KeyboardInterrupt: SIGINT came; `resume=True` goes on.
        SystemExit: SIGTERM came; likewise.
        UserError: an option is unknown or wrong, or the images cannot be used.
    """
    given = converted(PrepareOptions, options)
    raise_unless_done(command(given))
    return Path(given["out"])


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar prepare` with the options that were given; returns the exit status."""
    if "out" not in given:
        raise UserError("--out is missing; see lomar prepare --help")
    asked = asked_for(given, PrepareOptions, ("data",))
    out = Path(given["out"])
    if asked.get("verify"):
        return _verify(out)
    resume = goes_on(_begun(out) or is_finished(out), asked)
    if resume and is_finished(out):
        index = read_index(out, f"--out {out}")
        _check_same(asked, index.settings, out)
        sys.stdout.write(f"{out} is finished: {len(index.ends)} images\n")
        return 0
    try:
        return _resume(out, asked) if resume else _begin(out, asked)
    except OSError as error:
        hint = "; --resume goes on when it can" if is_unfinished(out) else ""
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}{hint}") from error


def _begin(out: Path, asked: Mapping[str, Any]) -> int:
    if "data" not in asked:
        raise UserError("--data is missing: a folder of images, a .txt file of paths, or 'sample'")
    if asked.get("encoding") == "raw" and "quality" in asked:
        raise UserError("--quality is of --encoding jpeg; raw has none")
    _check_out(out, asked)
    options = PrepareOptions(**asked)
    listing = _listing(options.data)
    plan = {name: getattr(options, name) for name in _PLANNED}
    plan |= {"images": listing.source.fingerprint(), "version": __version__}
    with closing(ShardWriter.begin(out, plan)) as writer:
        return _write(writer, options, listing)


def _resume(out: Path, asked: Mapping[str, Any]) -> int:
    if not is_unfinished(out):
        raise UserError(f"--out {out} holds nothing to resume; leave --resume out to begin")
    with closing(ShardWriter.resume(out)) as writer:
        _check_same(asked, writer.plan, out)
        options = PrepareOptions(**{name: writer.plan[name] for name in _PLANNED} | dict(asked))
        listing = _listing(options.data)
        if listing.source.fingerprint() != writer.plan["images"]:
            raise UserError(
                f"--data {options.data}: other files than when {out} was begun; --overwrite starts anew with these"
            )
        return _write(writer, options, listing)


def _begun(out: Path) -> bool:
    """Whether there is anything to go on from: a kill may have come before the journal's first line was whole."""
    if not is_unfinished(out):
        return False
    with (out / JOURNAL_FILE).open("rb") as journal:
        return journal.readline().endswith(b"\n") or any(path.name != JOURNAL_FILE for path in out.iterdir())


def _check_out(out: Path, asked: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something else, or that nobody asked to replace.

    Raises:
        UserError: saying what is in the way.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; it must be a folder")
    if _begun(out) and not asked.get("overwrite"):
        raise UserError(f"--out {out} was begun and is not finished; --resume goes on, --overwrite starts anew")
    if is_finished(out) and not asked.get("overwrite"):
        raise UserError(f"--out {out} already holds prepared images; --overwrite replaces them")
    if out.is_dir() and not is_unfinished(out) and not is_finished(out) and any(out.iterdir()):
        raise UserError(f"--out {out} holds something else; give a new folder")
    data = Path(asked["data"])
    if data.is_dir() and data.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out} lies in --data {data}; give a folder beside it")


def _check_same(asked: Mapping[str, Any], before: Mapping[str, Any], out: Path) -> None:
    """Raises UserError: another result is asked for than was begun."""
    for name, value in asked.items():
        if fields_of(PrepareOptions)[name].metadata["results"] and name in before and before[name] != value:
            raise UserError(f"{flag(name)} is {value!r}, but {out} has {before[name]!r}; --overwrite starts anew")


@dataclass(frozen=True)
class _Listing:
    """What is to be prepared.

    Args:
        source: the images, each once.
        paths: relative to one folder, as the index has them.
        repeated: bool (N,), of the paths without ending.
        left_out: images that were listed before.
    """

    source: ImageSource
    paths: ImageSource
    repeated: np.ndarray
    left_out: int


def _listing(data: str) -> _Listing:
    """The images of `--data`.

    Raises:
        UserError: there are none, or they are prepared.
    """
    source = open_source(data)
    if source.members is not None:
        raise UserError(f"--data {data}: these images are prepared already; give the originals")
    paths = _inside_one_folder(source)
    repeated = more_than_once(map(without_ending, paths))
    # Only a list can name a file twice. The same file has the same path without ending.
    first: dict[bytes, int] = {}
    for number in np.flatnonzero(repeated).tolist():
        first.setdefault(paths[number], number)
    again = {n for n in np.flatnonzero(repeated).tolist() if first[paths[n]] != n}
    if again:
        kept = [number for number in range(len(source)) if number not in again]
        source, paths, repeated = source.subset(kept), [paths[number] for number in kept], repeated[kept]
    return _Listing(source, ImageSource("", paths), repeated, len(again))


def _inside_one_folder(source: ImageSource) -> list[bytes]:
    """The paths of all images, without `.` and `..`: as they are listed, or, where one is absolute or leads upwards,
    relative to the deepest folder that holds all."""
    paths = [os.path.normpath(source.relative_path(number)) for number in range(len(source))]
    if not any(path.startswith((b"/", b"../")) for path in paths):
        return paths
    paths = [os.path.abspath(source.path(number)) for number in range(len(source))]  # noqa: PTH100 (bytes)
    shared = os.path.commonpath([os.path.split(path)[0] for path in paths])
    return [os.path.relpath(path, shared) for path in paths]


def _write(writer: ShardWriter, options: PrepareOptions, listing: _Listing) -> int:
    """All images that are missing, and the index; returns the exit status."""
    source, out, first = listing.source, Path(options.out), writer.done
    cores = find_hardware("cpu").cores
    workers = (cores if cores > 1 else 0) if options.workers is None else options.workers
    goes_on = f", from {first} on" if first else ""
    twice = f" ({listing.left_out} listed twice)" if listing.left_out else ""
    sys.stdout.write(
        f"{len(source)} images{twice}{goes_on}: shorter side at most {options.short_side} px, {options.encoding}; "
        f"{workers or 1} {'processes' if workers > 1 else 'process'}\n"
    )
    preparation = Preparation(options.short_side, options.encoding, options.quality)
    images = prepared_images(source, preparation, first, workers)
    kept = 0
    began = time.monotonic()
    with StopRequest() as stop, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # oddities of files that can be read
        with closing(watched(images, "preparing", len(source), first)) as batches:
            for numbers, found in batches:
                for number, each in zip(numbers, found, strict=True):
                    if isinstance(each, Prepared):
                        name = member_name(listing.paths.relative_path(number), bool(listing.repeated[number]))
                        writer.add(number, f"{name}.{each.ending}", each.content)
                        kept += each.kept
                    else:
                        writer.skip(number, each)
                _check_bad(writer, options, source)
                if stop.signal_number:
                    sys.stdout.write(
                        f"stopped; {writer.done} of {len(source)} images are in finished shards; go on with --resume\n"
                    )
                    return 128 + stop.signal_number
    bad = _list_bad(writer, source)
    settings = {name: getattr(options, name) for name in _SETTINGS if options.encoding == "jpeg" or name != "quality"}
    index = writer.finish(len(source), settings, listing.paths.relative_path, writer.plan["version"])
    rate = (len(source) - first) / max(1e-9, time.monotonic() - began)
    sys.stdout.write(f"{out}: {_told(index)}, {rate:.0f} images/s\n")
    if kept:
        sys.stdout.write(f"{kept} JPEG files were small enough and stayed as they are\n")
    if bad:
        sys.stdout.write(f"{bad} of {len(source)} images cannot be read, listed in {out / 'bad_files.txt'}\n")
    return 0


def _told(index: Index) -> str:
    shards = index.members.shards
    size = sum(shard.size for shard in shards)
    return f"{len(index.ends)} images in {len(shards)} shard{'s' * (len(shards) > 1)}, {size / 1e6:.4g} MB"


def _check_bad(writer: ShardWriter, options: PrepareOptions, source: ImageSource) -> None:
    """Raises UserError: more images cannot be read than are allowed; what has no finished shard is deleted."""
    if len(writer.bad) <= options.max_bad_share * len(source) and len(writer.bad) < len(source):
        return
    number, reason = writer.bad[-1]
    example = f"{source.name(number)}: {reason}"
    begun = bool(writer.shards)
    writer.close()
    if not begun:
        discard(writer.folder)
    if len(writer.bad) == len(source):
        raise UserError(f"--data: none of {len(source)} images can be read, for example {example}")
    raise UserError(
        f"--data: {len(writer.bad)} of {len(source)} images cannot be read, for example {example}; --max-bad-share "
        f"allows {options.max_bad_share:.0%}{', and with more of it --resume goes on' if begun else ''}"
    )


def _list_bad(writer: ShardWriter, source: ImageSource) -> int:
    """Write `bad_files.txt`, if there is anything to write in it; returns how many are in it."""
    bad = [(source.name(number), reason) for number, reason in writer.bad]
    BadFiles(writer.folder / "bad_files.txt").add(bad)
    return len(bad)


def _verify(out: Path) -> int:
    """Read all shards and compare them with their check sums.

    Raises:
        UserError: there is nothing finished, or a shard is damaged.
    """
    if is_unfinished(out):
        raise UserError(f"--out {out} is not finished; --resume goes on with it")
    if not is_finished(out):
        raise UserError(f"--out {out} holds no prepared images")
    index = read_index(out, f"--out {out}")
    found = damaged(index.members.shards)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(f"--out {out}: {found[0]}{more} changed since it was written; copy it again, or prepare anew")
    sys.stdout.write(f"{out} is whole: {_told(index)}\n")
    return 0
