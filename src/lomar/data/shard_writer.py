"""Shards being written: tar files one after another, then their index; what is in finished tar files survives anything.

A tar file grows under a temporary name. When it is full it is made safe on disk, read back, renamed, and one line about
it is added to the journal, `unfinished.jsonl`, whose first line says what is being prepared. So a killed writer loses
the tar file it was at, and the same images lead to the same bytes however often it was killed.
"""

import array
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from lomar.data.shards import (
    INDEX_FILE,
    JOURNAL_FILE,
    SHARD_NAME,
    SIZES_FILE,
    Index,
    Members,
    Shard,
    sha256_of,
    write_index,
)
from lomar.errors import UserError
from lomar.files import locked, write_atomically

_BLOCK = 512  # bytes: of a tar file everything is padded to whole ones
_RECORD = 20 * _BLOCK  # and the file to whole ones of these
_TEMPORARY = "." + SHARD_NAME + ".tmp"
_ALL_SHARDS = (SHARD_NAME.replace("{:06d}", "[0-9]*"), _TEMPORARY.replace("{:06d}", "[0-9]*"))
# What WebDataset would split a name at or pass over, what a line of text cannot hold, and the sign itself.
_ESCAPED = re.compile(r"[%\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def member_name(path: bytes, repeated: bool) -> str:
    """The name, without its ending, of an image in a tar file: WebDataset's key, another one for every path.

    It is the path without the file's ending. Where that is the same for another image, or the file's name has another
    dot, at which WebDataset would cut it, it is the whole path with the name's dots written %2E. A percent sign,
    control characters and what is no text are written as in an address, %0A.

    Args:
        path: of the image, relative.
        repeated: whether another image has the same path but for the ending.
    """
    folder, file = os.path.split(path)
    stem = without_ending(file)
    name = file if repeated or b"." in stem else stem
    # A NUL cannot be in a path, so it can stand for the dots of the file's name, but not of its folders' names.
    text = (folder + b"/" * bool(folder) + name.replace(b".", b"\0")).decode("utf-8", "surrogateescape")
    key = _ESCAPED.sub(lambda sign: _percent(sign[0]), text)
    return re.sub("^__", "%5F_", key)  # WebDataset passes over names that begin and end so


def _percent(sign: str) -> str:
    if sign == "\0":
        return "%2E"
    return "".join(f"%{byte:02X}" for byte in sign.encode("utf-8", "surrogateescape"))


def more_than_once(items: Iterable[bytes]) -> np.ndarray:
    """bool (N,): whether an equal item is there, or, once in 10^19 pairs, one of the same 64-bit digest."""
    digests = np.array(
        [int.from_bytes(hashlib.blake2b(item, digest_size=8).digest(), "little") for item in items], dtype=np.uint64
    )
    _, places, counts = np.unique(digests, return_inverse=True, return_counts=True)
    return counts[places] > 1


def without_ending(path: bytes) -> bytes:
    """A path less the ending of the file."""
    return os.path.splitext(path)[0]  # noqa: PTH122 (bytes)


@dataclass
class _Record:
    """One line of the journal: a finished tar file, or at the end none.

    Args:
        end: the number of the first image that comes after it.
        shard: the file, None where only unreadable images came.
        numbers: of the images in it.
        offsets: of their content in it.
        sizes: of their content.
        bad: (number, reason) of images before `end`, and after those of earlier lines, that cannot be read.
    """

    end: int = 0
    shard: Shard | None = None
    numbers: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def line(self) -> bytes:
        """As the journal has it."""
        shard = [self.shard.path, self.shard.size, self.shard.sha256] if self.shard else None
        values = [self.end, shard, self.numbers, self.offsets, self.sizes, self.bad]
        return json.dumps(values, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> "_Record":
        """What `line` wrote."""
        end, shard, numbers, offsets, sizes, bad = json.loads(line)
        pairs = [(number, reason) for number, reason in bad]
        return cls(end, Shard(*shard) if shard else None, numbers, offsets, sizes, pairs)


class ShardWriter:
    """Images on their way into a folder of shards; opened with `begin` or `resume`, closed by `finish` or `close`."""

    def __init__(self, folder: Path, journal: IO[bytes], plan: dict[str, Any]) -> None:
        """
        Args:
            folder: which is to hold the shards.
            journal: opened, with a line for each finished shard.
            plan: what is being prepared, which JSON can hold; `shard_mb`, the megabytes of a shard, is among it. A
                single image may be more.
        """
        self.folder, self.plan = folder, plan
        self.done = 0  # images dealt with in finished shards
        self.shards: list[Shard] = []
        self._bad: list[tuple[int, str]] = []
        self._limit = int(plan["shard_mb"] * 1e6)
        self._journal = journal
        self._places = {name: array.array("q") for name in ("number", "shard", "offset", "size")}
        self._next = _Record()
        self._tar: _Tar | None = None

    @property
    def bad(self) -> list[tuple[int, str]]:
        """(number, reason) of the images that were skipped."""
        return self._bad + self._next.bad

    @classmethod
    def begin(cls, folder: Path, plan: dict[str, Any]) -> "ShardWriter":
        """One without images; shards and index that are there already are deleted.

        Raises:
            OSError: the folder cannot be written.
            UserError: another process writes to it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # The journal goes first, so that from here on the folder is known to be unfinished.
        journal = os.fdopen(os.open(folder / JOURNAL_FILE, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        _lock(journal, folder)
        journal.truncate(0)
        _append(journal, json.dumps(plan).encode() + b"\n")
        delete_shards(folder)
        _sync_folder(folder)
        return cls(folder, journal, plan)

    @classmethod
    def resume(cls, folder: Path) -> "ShardWriter":
        """One that goes on after the last whole shard of a folder with a journal.

        Raises:
            OSError: the folder cannot be read or written.
            UserError: another process writes to it, or its journal does not say what was begun.
        """
        journal = (folder / JOURNAL_FILE).open("r+b")
        _lock(journal, folder)
        plan, records, end = _journalled(journal, folder)
        journal.truncate(end)  # a line that was cut short, or is about a shard that is not whole, is written anew
        journal.seek(end)
        writer = cls(folder, journal, plan)
        for record in records:
            writer._take(record)
        delete_shards(folder, kept={shard.path for shard in writer.shards})
        return writer

    def add(self, number: int, name: str, content: bytes) -> None:
        """The next image.

        Args:
            number: of the image; larger than those before.
            name: of the member, with its ending.
            content: of the member.

        Raises:
            OSError: it cannot be written, or was not written as it should be.
        """
        if self._tar is not None and self._tar.size_with(name, content) > self._limit:
            self._finish_shard(number)
        if self._tar is None:
            self._tar = _Tar(self.folder / _TEMPORARY.format(len(self.shards)))
        offset = self._tar.add(name, content)
        self._next.numbers.append(number)
        self._next.offsets.append(offset)
        self._next.sizes.append(len(content))

    def skip(self, number: int, reason: str) -> None:
        """The next image cannot be read."""
        self._next.bad.append((number, reason))

    def finish(self, count: int, settings: dict[str, Any], path: Callable[[int], bytes], version: str) -> Index:
        """The last shard, what WebDataset wants to know of them, and the index.

        Args:
            count: images of all.
            settings: for the index.
            path: number of an image -> its path.
            version: of lomar.

        Raises:
            OSError: they cannot be written.
            ValueError: there is no image.
        """
        self._finish_shard(count)
        numbers, shard, offset, size = (np.array(values, dtype=np.int64) for values in self._places.values())
        if not len(numbers):
            raise ValueError("no image was added")
        blob, ends = bytearray(), np.empty(len(numbers), dtype=np.int64)
        for place, number in enumerate(numbers.tolist()):
            blob += path(number)
            ends[place] = len(blob)
        members = Members(tuple(self.shards), shard.astype(np.int32), offset, size)
        index = Index(settings, bytes(blob), ends, members, version)
        counts = np.bincount(members.shard, minlength=len(self.shards)).tolist()
        sizes = json.dumps({SHARD_NAME.format(number): images for number, images in enumerate(counts)}, indent=0)
        write_atomically(self.folder / SIZES_FILE, lambda temporary: temporary.write_text(sizes + "\n"))
        write_index(self.folder, index)
        _sync_folder(self.folder)
        self.close()
        (self.folder / JOURNAL_FILE).unlink()
        _sync_folder(self.folder)
        return index

    def close(self) -> None:
        """Let go of the files; what is not in a finished shard is lost. A second call does nothing."""
        if self._tar is not None:
            self._tar.discard()
            self._tar = None
        self._journal.close()

    def _finish_shard(self, end: int) -> None:
        """Make the open tar file, and what was skipped before image `end`, safe."""
        record, self._next = self._next, _Record()
        record.end = end
        if self._tar is not None:
            name = SHARD_NAME.format(len(self.shards))
            tar, self._tar = self._tar, None
            size, sha256 = tar.finish(self.folder / name, list(zip(record.offsets, record.sizes, strict=True)))
            _sync_folder(self.folder)
            record.shard = Shard(name, size, sha256)
        _append(self._journal, record.line())
        self._take(record)

    def _take(self, record: _Record) -> None:
        """Note a finished shard."""
        self.done = record.end
        self._bad += record.bad
        if record.shard is not None:
            self._places["shard"].extend([len(self.shards)] * len(record.numbers))
            self.shards.append(record.shard)
        for name, values in (("number", record.numbers), ("offset", record.offsets), ("size", record.sizes)):
            self._places[name].extend(values)


class _Tar:
    """A POSIX tar file being written, the same bytes for the same members."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._end = 0

    def size_with(self, name: str, content: bytes) -> int:
        """Bytes of the file if this member were added and no other."""
        return _whole(self._end + len(_header(name, content)) + _whole(len(content), _BLOCK) + 2 * _BLOCK, _RECORD)

    def add(self, name: str, content: bytes) -> int:
        """Add a member; returns where its content begins."""
        self._write(_header(name, content))
        offset = self._end
        self._write(content)
        self._write(bytes(_whole(len(content), _BLOCK) - len(content)))
        return offset

    def finish(self, path: Path, places: list[tuple[int, int]]) -> tuple[int, str]:
        """End the file, read it back from the disk and give it its name; returns its size and SHA-256.

        Args:
            path: its name.
            places: (offset, size) of each member, which must be found there.

        Raises:
            OSError: it cannot be written, or what is read is not what was written.
        """
        try:
            self._write(bytes(_whole(self._end + 2 * _BLOCK, _RECORD) - self._end))
            self._file.flush()
            os.fsync(self._file.fileno())
            # Out of the memory in which files are kept, so that what is read is what the disk holds.
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._file.close()
            sha256 = self._digest.hexdigest()
            with tarfile.open(self._path) as tar:
                found = [(member.offset_data, member.size) for member in tar]
            if found != places or sha256_of(self._path) != sha256:
                raise OSError(f"{path.name} reads back differently from what was written to it")
            self._path.replace(path)
        except (OSError, tarfile.TarError) as error:
            self.discard()
            raise error if isinstance(error, OSError) else OSError(f"{path.name} cannot be read back") from error
        return self._end, sha256

    def discard(self) -> None:
        """Delete the file."""
        try:
            self._file.close()
        except OSError:  # what is still in memory does not fit on the disk
            pass
        finally:
            self._path.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._end += len(data)


def _whole(size: int, unit: int) -> int:
    """A size rounded up to whole units."""
    return -(-size // unit) * unit


def _header(name: str, content: bytes) -> bytes:
    """What stands before a member in a tar file; a pax header where the name needs one."""
    info = tarfile.TarInfo(name)  # of no date, owner or group: equal images are equal files
    info.size = len(content)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _journalled(journal: IO[bytes], folder: Path) -> tuple[dict[str, Any], list[_Record], int]:
    """What a journal says: the plan, its lines up to the first that is not whole, and where that one begins.

    Raises:
        UserError: it does not even say what was begun.
    """
    journal.seek(0)
    lines = journal.readlines()
    try:
        plan = json.loads(lines[0]) if lines and lines[0].endswith(b"\n") else None
        if not isinstance(plan, dict) or not plan["shard_mb"] > 0:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--resume: {folder / JOURNAL_FILE} is damaged; --overwrite starts anew") from None
    records, end = [], len(lines[0])
    for line in lines[1:]:
        try:
            if not line.endswith(b"\n"):
                break
            record = _Record.of_line(line)
            if record.shard and (folder / record.shard.path).stat().st_size != record.shard.size:
                break
        except (ValueError, TypeError, OSError):
            break
        records.append(record)
        end += len(line)
    return plan, records, end


def delete_shards(folder: Path, kept: Iterable[str] = ()) -> None:
    """Delete the index of a folder, its list of bad files and its shards, finished or not, but for those of some names.

    Raises:
        OSError: they cannot be deleted.
    """
    found = [path for pattern in _ALL_SHARDS for path in folder.glob(pattern) if path.name not in kept]
    for path in (folder / INDEX_FILE, folder / SIZES_FILE, folder / "bad_files.txt", *found):
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete what was begun in a folder, and the folder if nothing else is in it."""
    delete_shards(folder)
    (folder / JOURNAL_FILE).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _append(journal: IO[bytes], line: bytes) -> None:
    journal.write(line)
    journal.flush()
    os.fsync(journal.fileno())


def _lock(journal: IO[bytes], folder: Path) -> None:
    """Refuse a folder that another process writes to."""
    if not locked(journal):
        journal.close()
        raise UserError(f"--out {folder}: another lomar prepare is writing to it")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
