"""Images inside tar files, in the layout of WebDataset, found by an index: what `lomar prepare` leaves.

A folder of them holds `shard-000000.tar` and so on, and `index.safetensors`, which says of each image its path among
the images it was made from, the shard it is in, and where. So any image can be read by number, in any order, without a
stream: a sample stays a function of (seed, epoch, index). While the folder is being written it holds
`unfinished.jsonl`.

The index is a file of safetensors with `paths` (uint8, all paths in a row), `ends` (int64, of each path in it), `shard`
(int32), `offset` and `size` (int64, bytes), and as metadata a JSON of `format`, `lomar` (its version), `settings` and
`shards`: [name, bytes, SHA-256] of each.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors
from safetensors.numpy import save

from lomar.data.addresses import shown
from lomar.errors import UserError
from lomar.files import write_atomically

INDEX_FILE = "index.safetensors"
JOURNAL_FILE = "unfinished.jsonl"
SIZES_FILE = "sizes.json"  # WebDataset's: images of each shard, {"shard-000000.tar": 2840, ...}
SHARD_NAME = "shard-{:06d}.tar"
FORMAT = 1
_METADATA = "lomar_shards"
# From this size on a crop of mapped memory is made faster than one of bytes read: measured 0.85 times as fast at
# 0.26 MB, 1.05 at 1.05 MB, 1.32 at 4.2 MB. What is decoded is read whole either way.
_MAPPED_FROM = 2**20


@dataclass(frozen=True)
class Shard:
    """A tar file.

    Args:
        path: where it is; in an index, its name in the folder.
        size: in bytes.
        sha256: of its content, as sha256sum shows it; "" where it is not known.
    """

    path: str
    size: int
    sha256: str
    remote: ClassVar[bool] = False  # whether it is fetched before it is read

    def open(self) -> int:
        """A descriptor of the file.

        Raises:
            OSError: it cannot be opened.
        """
        return os.open(self.path, os.O_RDONLY)

    def fetch(self, wait: bool = True) -> None:
        """Have it on this machine, as it is; see `lomar.data.fetching.RemoteShard`."""


@dataclass(frozen=True)
class Members:
    """Where the content of images lies in tar files; it holds no open file, so it is cheap to hand to workers.

    Args:
        shards: the tar files.
        shard: int32 (N,), the place in `shards` of each image; -1 where it is in none.
        offset: int64 (N,), of its first byte.
        size: int64 (N,), its bytes.
    """

    shards: tuple[Shard, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def hold(self, index: int) -> bool:
        """Whether image `index` is in a tar file."""
        return bool(self.shard[index] >= 0)

    def read(self, index: int) -> bytes | memoryview:
        """The content of image `index`; a large one is mapped.

        Raises:
            OSError: the tar file cannot be read, or is shorter than it was.
        """
        return read_part(self.shards[self.shard[index]], int(self.offset[index]), int(self.size[index]))

    def subset(self, indices: Sequence[int]) -> "Members":
        """The same of the given images in the given order; -1 stands for one that is in no tar file."""
        chosen = np.asarray(indices, dtype=np.int64)
        shard = np.where(chosen < 0, np.int32(-1), self.shard[chosen])
        return Members(self.shards, shard, self.offset[chosen], self.size[chosen])

    def digest(self) -> bytes:
        """Changes with the content of a tar file, and not with its place; where no check sum is known, with its images'
        sizes and places in it."""
        digest = hashlib.blake2b(digest_size=8)
        for shard in self.shards:
            digest.update(shard.sha256.encode())
        if not all(shard.sha256 for shard in self.shards):
            digest.update(self.offset.tobytes() + self.size.tobytes())
        return digest.digest()


def read_part(shard: Shard, offset: int, size: int) -> bytes | memoryview:
    """A part of a tar file; a large one is mapped.

    Raises:
        OSError: the file cannot be read, or is shorter than it was.
    """
    # Opened anew each time, for a fifty-thousandth of a second: no descriptors to share, to count or to close.
    file = shard.open()
    try:
        if size >= _MAPPED_FROM:
            before = offset % mmap.ALLOCATIONGRANULARITY
            try:
                mapped = mmap.mmap(file, before + size, access=mmap.ACCESS_READ, offset=offset - before)
            except ValueError as error:
                raise OSError(f"{shown(shard.path)} is cut short") from error
            return memoryview(mapped)[before:]
        content = os.pread(file, size, offset)
    finally:
        os.close(file)
    if len(content) < size:
        raise OSError(f"{shown(shard.path)} is cut short")
    return content


@dataclass(frozen=True)
class ShardGroups:
    """The images of a source shard by shard.

    Args:
        shards: those that have any.
        ends: int64 (S,), where the images of each one end in `indices`.
        indices: (N,), numbers of the images.
    """

    shards: tuple[Shard, ...]
    ends: np.ndarray
    indices: Sequence[int] | np.ndarray

    def of(self, shard: int) -> range:
        """Places in `indices` of the images of a shard."""
        return range(int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard]))


def grouped(shards: Sequence[Shard], numbers: np.ndarray) -> ShardGroups:
    """The images of a source by the number of each one's shard, int (N,); for those of none, -1, nothing is fetched."""
    indices = np.argsort(numbers, kind="stable")
    used, counts = np.unique(numbers, return_counts=True)
    none = Shard("", 0, "")
    return ShardGroups(tuple(shards[number] if number >= 0 else none for number in used), np.cumsum(counts), indices)


def nowhere(count: int) -> Members:
    """Of so many images none is in a tar file."""
    zeros = np.zeros(count, dtype=np.int64)
    return Members((), np.full(count, -1, dtype=np.int32), zeros, zeros)


def joined_members(parts: Sequence[Members]) -> Members:
    """One after the other."""
    shards: list[Shard] = []
    numbers = []
    for part in parts:
        numbers.append(np.where(part.shard < 0, part.shard, part.shard + np.int32(len(shards))))
        shards += part.shards
    offset, size = (np.concatenate([getattr(part, name) for part in parts]) for name in ("offset", "size"))
    return Members(tuple(shards), np.concatenate(numbers), offset, size)


@dataclass(frozen=True)
class Index:
    """What a finished folder holds.

    Args:
        settings: how the images were prepared: `short_side`, `encoding` and more.
        paths: of all images, one after another.
        ends: int64 (N,), the end of each path in `paths`.
        members: where they are; the shards by their names in the folder.
        version: of lomar that began to write it.
    """

    settings: dict[str, Any]
    paths: bytes
    ends: np.ndarray
    members: Members
    version: str

    def path(self, index: int) -> bytes:
        """The path of image `index`, relative, as the file system spells it."""
        return self.paths[self.ends[index - 1] if index else 0 : self.ends[index]]


def is_unfinished(folder: Path) -> bool:
    """Whether preparing images into a folder was begun and not finished."""
    return os.path.isfile(folder / JOURNAL_FILE)  # noqa: PTH113 (Path's fails where a name is too long)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds prepared images; another file of the index' name is none."""
    if is_unfinished(folder) or not os.path.isfile(folder / INDEX_FILE):  # noqa: PTH113 (as above)
        return False
    try:
        with (folder / INDEX_FILE).open("rb") as file:
            head = file.read(8)
            # Not only what can be read: a damaged index is still one.
            return len(head) < 8 or _METADATA.encode() in file.read(min(2**20, int.from_bytes(head, "little")))
    except OSError:
        return True  # whoever reads it says why not


def write_index(folder: Path, index: Index) -> None:
    """Write the index of a folder, which is finished then.

    Raises:
        OSError: it cannot be written.
    """
    members = index.members
    about = {
        "format": FORMAT,
        "lomar": index.version,
        "settings": index.settings,
        "shards": [[shard.path, shard.size, shard.sha256] for shard in members.shards],
    }
    arrays = {
        "paths": np.frombuffer(index.paths, dtype=np.uint8),
        "ends": index.ends,
        "shard": members.shard,
        "offset": members.offset,
        "size": members.size,
    }
    content = save(arrays, {_METADATA: json.dumps(about)})  # save_file would write it for the owner's eyes alone
    write_atomically(folder / INDEX_FILE, lambda path: path.write_bytes(content))


def read_index(folder: Path, where: str) -> Index:
    """The index of a finished folder, with the shards' full paths; all shards are there and as long as they should be.

    Args:
        folder: whose `is_finished` is true.
        where: the option the folder came from, and its value, for messages.

    Raises:
        UserError: the index is damaged or of a newer lomar, or a shard is missing or cut short.
    """
    index = parsed_index(folder / INDEX_FILE, where)
    shards = index.members.shards
    here = tuple(Shard(str(folder / shard.path), shard.size, shard.sha256) for shard in shards)
    for shard in here:
        _check_size(shard, where)
    return replace(index, members=replace(index.members, shards=here))


def parsed_index(file: Path, where: str) -> Index:
    """What a file of an index says, with the shards' names.

    Raises:
        UserError: it is damaged or of a newer lomar.
    """
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            about = json.loads(opened.metadata()[_METADATA])
            if about["format"] > FORMAT:
                raise UserError(f"{where}: prepared by lomar {about['lomar']}, in a newer format than this one reads")
            arrays = {name: opened.get_tensor(name) for name in ("paths", "ends", "shard", "offset", "size")}
        shards = tuple(Shard(_plain(name), int(size), str(sha256)) for name, size, sha256 in about["shards"])
        members = Members(shards, arrays["shard"], arrays["offset"], arrays["size"])
        index = Index(dict(about["settings"]), arrays["paths"].tobytes(), arrays["ends"], members, str(about["lomar"]))
        _check(index, arrays["paths"])
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{where}: cannot read {file}: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes lead safetensors, JSON and NumPy to errors of any type
        raise UserError(f"{where}: {file} is damaged ({_short(error)}); prepare the images anew") from error
    return index


def _plain(name: str) -> str:
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"{name!r} is no name of a shard")
    return name


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


def _check(index: Index, paths: np.ndarray) -> None:
    """Raises ValueError where numbers lead outside of what they are about, or a path outside of the folder."""
    members = index.members
    kinds = {"paths": (paths, "uint8"), "ends": (index.ends, "int64"), "shard": (members.shard, "int32")}
    kinds |= {"offset": (members.offset, "int64"), "size": (members.size, "int64")}
    count = len(index.ends)
    for name, (array, dtype) in kinds.items():
        if array.dtype != dtype or array.ndim != 1 or (name != "paths" and len(array) != count):
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
    if count == 0 or (np.diff(index.ends, prepend=0) <= 0).any() or index.ends[-1] != len(paths):
        raise ValueError("the paths do not end where they should")
    if members.shard.min() < 0 or members.shard.max() >= len(members.shards):
        raise ValueError("a shard that is not listed")
    room = np.array([shard.size for shard in members.shards], dtype=np.int64)[members.shard]
    if members.offset.min() < 0 or members.size.min() <= 0 or (members.offset > room - members.size).any():
        raise ValueError("an image outside of its shard")
    for number in range(count):
        check_inside(index.path(number))


def check_inside(path: bytes) -> None:
    """Raises ValueError: the path is absolute, or leads out of the folder it is relative to."""
    if path[:1] == b"/" or b"\0" in path or (b".." in path and b".." in path.split(b"/")):
        raise ValueError(f"{path!r} leads out of the folder")


def _check_size(shard: Shard, where: str) -> None:
    """Raises UserError: the shard is not there, or not as long as it was."""
    again = "copy it again, or prepare the images anew"
    try:
        size = os.stat(shard.path).st_size  # noqa: PTH116 (there may be thousands)
    except OSError as error:
        raise UserError(f"{where}: cannot read {shard.path}: {error.strerror}; {again}") from None
    if size != shard.size:
        raise UserError(f"{where}: {shard.path} is {size} bytes long and should be {shard.size}; {again}")


def sha256_of(path: str | Path, seen: Callable[[int], object] = lambda count: None) -> str:
    """The SHA-256 of a file's content.

    Args:
        path: the file.
        seen: told of the bytes read, some at a time.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
            seen(len(piece))
    return digest.hexdigest()


def damaged(shards: Iterable[Shard], seen: Callable[[int], object] = lambda count: None) -> list[str]:
    """The paths of those shards whose content is not what was written; `seen` is told of the bytes read."""
    found = []
    for shard in shards:
        try:
            whole = sha256_of(shard.path, seen) == shard.sha256
        except OSError:
            whole = False
        if not whole:
            found.append(shard.path)
    return found
