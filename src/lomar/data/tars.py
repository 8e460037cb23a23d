"""What is in a tar file of anyone's: where its images are, found by reading headers alone.

Nothing is ever unpacked, so a path in an archive leads nowhere. What breaks the chain of headers (a wrong check sum, a
number that is none, a member beyond the end, a header of headers that is too long) ends it there: the images before
are used, and the archive is said to be damaged. A member that is no ordinary file of an ordinary name is left out and
counted: a link, a device, a sparse or too large file, an absolute path, one with `..`, or a name that is not one line.
Members whose ending is no image's, and hidden ones, are passed over, as in a folder.

The layout is WebDataset's: members that share their path up to the first dot of the name are one sample. Where one of
them is a plain `0001.jpg`, others such as `0001.mask.png` are not taken for images.
"""

import array
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save

from lomar.errors import UserError
from lomar.files import write_atomically

MAX_MEMBER_BYTES = 2**31  # of an image's file; the largest float32 image that is decoded has 0.7 GB a channel
FORMAT = 1
_METADATA = "lomar_tar"
_BLOCK = 512
_EMPTY = bytes(_BLOCK)
_MAX_HEADER_BYTES = 2**20  # of a pax header or a long name, which is read whole
_MAX_HEADERS = 16  # of one member; writers have three at most
_MAX_PATH_BYTES = 4096  # PATH_MAX of Linux
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_RECORD = re.compile(rb"(\d{1,7}) ")
_UNPRINTABLE = re.compile(rb"[\x00-\x1f\x7f]")
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = {b"1": "links", b"2": "links", b"3": "devices", b"4": "devices", b"5": "", b"6": "devices"}
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstandard"}


@dataclass(frozen=True)
class TarIndex:
    """The images of a tar file.

    Args:
        paths: of all, one after another, as the archive has them, without `.` and doubled slashes.
        ends: int64 (N,), the end of each path in `paths`.
        offset: int64 (N,), of the first byte of each image in the file.
        size: int64 (N,), its bytes.
        left_out: why members were refused, and how many.
        damage: what is wrong with the file from some place on; "" if nothing is.
    """

    paths: bytes
    ends: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    left_out: Mapping[str, int] = field(default_factory=dict)
    damage: str = ""

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, number: int) -> bytes:
        """The path of an image in the archive."""
        return self.paths[self.ends[number - 1] if number else 0 : self.ends[number]]

    @property
    def remark(self) -> str:
        """What its user should know, as the rest of a sentence about the file; "" for nothing."""
        refused = ", ".join(f"{count} {what}" for what, count in self.left_out.items())
        parts = [self.damage and f"{self.damage}; the {len(self)} images before are used"]
        return "; ".join(filter(None, [*parts, refused and f"left out: {refused}"]))


class _DamageError(Exception):
    """The headers cannot be followed any further; the text says why."""


class _Found:
    """Images, one sample after another."""

    def __init__(self) -> None:
        self.paths, self.ends = bytearray(), array.array("q")
        self.offset, self.size = array.array("q"), array.array("q")
        self.left_out: Counter[str] = Counter()
        self._key = b""
        self._sample: list[tuple[bytes, int, int, bool]] = []

    def add(self, path: bytes, offset: int, size: int) -> None:
        """One more image."""
        folder, _, name = path.rpartition(b"/")
        stem, _, endings = name.partition(b".")
        key = folder + b"/" + stem
        if key != self._key:
            self.end_sample()
            self._key = key
        self._sample.append((path, offset, size, b"." not in endings))

    def end_sample(self) -> None:
        """What comes next is of another sample."""
        plain_there = any(plain for *_, plain in self._sample)
        for path, offset, size, plain in self._sample:
            if plain or not plain_there:
                self.paths += path
                self.ends.append(len(self.paths))
                self.offset.append(offset)
                self.size.append(size)
        self._sample.clear()

    def index(self, damage: str) -> TarIndex:
        """All of it."""
        self.end_sample()
        ends, offset, size = (np.array(each, dtype=np.int64) for each in (self.ends, self.offset, self.size))
        return TarIndex(bytes(self.paths), ends, offset, size, dict(self.left_out), damage)


def scan(file: int, name: str, endings: tuple[bytes, ...]) -> TarIndex:
    """The images of an open tar file. It takes about 36 bytes an image and the paths, whatever else is in the file.

    Args:
        file: descriptor; where it stands does not matter and does not change.
        name: of the file, for messages.
        endings: of images, in lower case, with the dot.

    Raises:
        OSError: it cannot be read.
        UserError: it is compressed, empty or no tar file.
    """
    length = os.fstat(file).st_size
    found, damage, position = _Found(), "", 0
    try:
        while position < length:
            end = _member(file, length, position, found, endings)
            if end is None:
                break
            position = end
    except _DamageError as error:
        if position == 0:
            raise UserError(f"{name} {_no_tar(os.pread(file, 8, 0))}") from None
        damage = f"{error} at byte {position:,}"
    if length == 0:
        raise UserError(f"{name} is empty")
    return found.index(damage)


def _no_tar(head: bytes) -> str:
    for magic, program in _MAGIC.items():
        if head.startswith(magic):
            return (
                f"is compressed by {program}; lomar reads plain tar files, and images do not get smaller so: unpack it"
            )
    return "is no tar file"


def _member(file: int, length: int, position: int, found: _Found, endings: tuple[bytes, ...]) -> int | None:
    """Note the image that begins with a header, if it is one; returns where it ends, None at the archive's end.

    Raises:
        _DamageError: it is not whole.
    """
    told: dict[bytes, bytes] = {}  # by the headers before the member's own
    header = _header(file, position)
    if header == _EMPTY:
        return None
    for _ in range(_MAX_HEADERS):
        kind, size, content = header[156:157], _number(header[124:136]), position + _BLOCK
        if kind not in (b"x", b"X", b"g", b"L", b"K"):
            break
        if content + size > length:
            raise _DamageError("it is cut short")
        if kind in (b"x", b"X"):
            told |= _records(_whole(file, content, size))
        elif kind == b"L":
            told[b"path"] = _whole(file, content, size).split(b"\0")[0]
        position = content + _padded(size)
        header = _header(file, position)
    else:
        raise _DamageError("a member has too many headers")
    if b"size" in told:
        if not re.fullmatch(rb"\d{1,20}", told[b"size"]):
            raise _DamageError("a size is no number")
        size = int(told[b"size"])
    if kind == b"S":
        goes_on = header[482]
        while goes_on:  # the map of where its bytes belong
            goes_on = _read(file, content, _BLOCK)[504]
            content += _BLOCK
    elif kind in _WITHOUT_CONTENT:
        size = 0
    if content + size > length:
        raise _DamageError("it is cut short")
    path = told.get(b"path") or _name(header)
    what = _refused(kind, path, size, sparse=kind == b"S" or any(key.startswith(b"GNU.sparse") for key in told))
    if what:
        found.left_out[what] += 1
    elif kind in _REGULAR:  # and no folder
        plain = b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
        if plain.lower().endswith(endings) and not plain.startswith(b".") and b"/." not in plain:
            found.add(plain, content, size)
    return content + _padded(size)


def _header(file: int, position: int) -> bytes:
    """A header, or an empty block.

    Raises:
        _DamageError: it is neither.
    """
    header = _read(file, position, _BLOCK)
    if header != _EMPTY and not _sums_up(header):
        raise _DamageError("a header is damaged")
    return header


def _read(file: int, offset: int, size: int) -> bytes:
    content = os.pread(file, size, offset)
    if len(content) < size:
        raise _DamageError("it is cut short")
    return content


def _refused(kind: bytes, path: bytes, size: int, sparse: bool) -> str:
    """What members like this one are called, where they are left out; "" for one that is not."""
    if kind in _WITHOUT_CONTENT:
        return _WITHOUT_CONTENT[kind]
    if sparse:
        return "sparse files"
    if kind not in _REGULAR:
        return "other kinds of files"
    if path.startswith(b"/") or b".." in path.split(b"/"):
        return "paths that lead out of the archive"
    if not path or _UNPRINTABLE.search(path) or len(path) > _MAX_PATH_BYTES:
        return "names that are not one line"
    return f"files of more than {MAX_MEMBER_BYTES / 2**30:g} GiB" if size > MAX_MEMBER_BYTES else ""


def _sums_up(header: bytes) -> bool:
    """Whether the check sum is right; some writers took bytes as signed."""
    try:
        told = _number(header[148:156])
    except _DamageError:
        return False
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    return told == unsigned or told == unsigned - 256 * sum(byte > 127 for byte in header)


def _number(text: bytes) -> int:
    """A number of a header: octal digits, or bytes where the first one is 128.

    Raises:
        _DamageError: it is negative or none.
    """
    if text[0] & 0x80:
        if text[0] != 0x80:
            raise _DamageError("a number is negative or too large")
        return int.from_bytes(text[1:], "big")
    digits = _OCTAL.fullmatch(text)
    if digits is None:
        raise _DamageError("a number is none")
    return int(digits[1] or b"0", 8)


def _records(text: bytes) -> dict[bytes, bytes]:
    """The values of a pax header: lines of their own length, a key, = and a value.

    Raises:
        _DamageError: a length is wrong.
    """
    values, place = {}, 0
    while place < len(text) and text[place]:
        length = _RECORD.match(text, place)
        end = place + int(length[1]) if length else 0
        if length is None or not length.end() < end <= len(text) or text[end - 1 : end] != b"\n":
            raise _DamageError("a pax header is damaged")
        key, _, value = text[length.end() : end - 1].partition(b"=")
        values[key] = value
        place = end
    return values


def _whole(file: int, offset: int, size: int) -> bytes:
    if size > _MAX_HEADER_BYTES:
        raise _DamageError("a header is too long")
    return _read(file, offset, size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _name(header: bytes) -> bytes:
    """The path in a header. GNU's own format has other things where POSIX' has the front part of a long one."""
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def write_tar_index(file: Path, index: TarIndex) -> None:
    """Keep what was found.

    Raises:
        OSError: it cannot be written.
    """
    arrays = {name: getattr(index, name) for name in ("ends", "offset", "size")}
    arrays["paths"] = np.frombuffer(index.paths, dtype=np.uint8)
    about = {"format": FORMAT, "left_out": index.left_out, "damage": index.damage}
    content = save(arrays, {_METADATA: json.dumps(about)})
    write_atomically(file, lambda path: path.write_bytes(content))


def read_tar_index(file: Path, length: int) -> TarIndex | None:
    """What `write_tar_index` kept of a tar file so many bytes long; None where there is nothing, or nothing whole."""
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            about = json.loads(opened.metadata()[_METADATA])
            paths, ends, offset, size = (opened.get_tensor(name) for name in ("paths", "ends", "offset", "size"))
        index = TarIndex(paths.tobytes(), ends, offset, size, dict(about["left_out"]), str(about["damage"]))
        whole = (
            about["format"] == FORMAT
            and all(
                each.dtype == np.int64 and each.shape == ends.shape == (len(ends),) for each in (ends, offset, size)
            )
            and bool((np.diff(ends, prepend=0) > 0).all())
            and (ends[-1] if len(ends) else 0) == len(index.paths)
            and bool(((offset >= _BLOCK) & (size >= 0) & (size <= MAX_MEMBER_BYTES) & (offset <= length - size)).all())
        )
    except Exception:  # damaged bytes lead safetensors, JSON and NumPy to errors of any type
        return None
    return index if whole else None
