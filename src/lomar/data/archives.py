"""Images in tar files that anyone made, in WebDataset's layout, on this machine or at an address.

Those of this machine are looked through at once, and what is found is kept, so that the next start is quick. Those at
an address are fetched when they are read; of these only the number of images must be known before: it is told by
`sizes.json` beside them (WebDataset's own: {"name.tar": images}) or by img2dataset's `name_stats.json`, or else every
shard is fetched once and looked through.
"""

import glob
import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from lomar.data.addresses import COMPRESSED, has_braces, has_wildcards, shown, tars_and_inside, without_braces
from lomar.data.cache import check_writable, kept_index, key_of, tell
from lomar.data.fetching import RemoteShard, at_once, forgive, listed, shard_at, text_at, texts_at
from lomar.data.shards import INDEX_FILE, SIZES_FILE, Members, Shard, ShardGroups, grouped, parsed_index, read_part
from lomar.data.sources import ENDINGS, ImageSource
from lomar.data.tars import FORMAT, TarIndex, scan
from lomar.errors import UserError

_AT_ONCE = 8  # tar files that are looked through
_TOLD_EVERY_S = 10.0  # of looking through tar files
_REMARKS = 3  # that are told
_LEAST_BYTES = 1024  # of an image in a tar file: its header and one block
_MOST_INDEX_BYTES = 2**27  # of tar files being read, in each process

T = TypeVar("T")


class _Seen(Protocol):
    """What is found in a tar file."""

    @property
    def remark(self) -> str:
        """What its user should know, as the rest of a sentence about the file; "" for nothing."""


S = TypeVar("S", bound=_Seen)


class _Counted(NamedTuple):
    """How many images are in a tar file: the places of 10^8 would take some GB."""

    images: int
    remark: str


class TarSource(ImageSource):
    """Images in tar files, named by their path there; in messages, and to be found again, behind that of the tar file.

    Args:
        root: the tar files as they were named; "" for those at an address.
        paths: in the tar files, from `inside` on.
        members: where they are.
        inside: the folder in the tar files that the paths start from.
    """

    members: Members

    def __init__(self, root: str, paths: Iterable[bytes], members: Members, inside: bytes = b"") -> None:
        super().__init__(root, paths, members)
        self._inside = inside

    def path(self, index: int) -> bytes:
        """The path of the tar file, and in it."""
        parts = [self._inside, self.relative_path(index)]
        if self.members.hold(index):
            parts.insert(0, os.fsencode(self.members.shards[self.members.shard[index]].path))
        return b"/".join(part for part in parts if part)

    def subset(self, indices: Iterable[int]) -> "TarSource":
        chosen = [int(index) for index in indices]
        paths = (self.relative_path(index) for index in chosen)
        return TarSource(self.root, paths, self.members.subset(chosen), self._inside)

    def below(self, inside: str, where: str) -> "TarSource":
        """The images of a folder in the tar files, or one image.

        Raises:
            UserError: there is no such image or folder.
        """
        folder = os.fsencode(inside)
        found = [number for number in range(len(self)) if self.relative_path(number).startswith(folder + b"/")]
        if not found:
            found = [number for number in range(len(self)) if self.relative_path(number) == folder]
            folder = folder.rpartition(b"/")[0]
        if not found:
            raise UserError(f"{where}: no such folder or file in the tar files")
        start = folder + b"/" if folder else b""
        paths = (self.relative_path(number).removeprefix(start) for number in found)
        return TarSource(self.root, paths, self.members.subset(found), folder)


class RemoteTars(ImageSource):
    """Images in tar files at addresses, of which nothing is known but their number until they are read.

    Args:
        shards: the tar files.
        counts: images of each; where one holds fewer, the others cannot be read, and where it holds more, those are
            not seen.
        numbers: which of all images these are; all of them where it is not given.
    """

    def __init__(self, shards: Sequence[RemoteShard], counts: np.ndarray, numbers: np.ndarray | None = None) -> None:
        super().__init__("", ())
        self.shards, self.counts = tuple(shards), counts
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._numbers = numbers
        self._indexes: OrderedDict[int, TarIndex] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indexes": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._numbers is None else len(self._numbers)

    def relative_path(self, index: int) -> bytes:
        """The path in the tar file; the image's number there where that is not known."""
        shard, place = self._place(index)
        try:
            found = self._index(shard)
        except (OSError, UserError):
            return b"%08d" % place
        return found.path(place) if place < len(found) else b"%08d" % place

    def path(self, index: int) -> bytes:
        """The address of the tar file, and the path in it."""
        return os.fsencode(self.shards[self._place(index)[0]].path) + b"/" + self.relative_path(index)

    def fingerprint(self) -> str:
        """Changes when a tar file is added, removed or renamed, or has another size; the folder may move."""
        names = [(shard.path.rpartition("/")[2], shard.size) for shard in self.shards]
        chosen = b"" if self._numbers is None else self._numbers.tobytes()
        told = repr(names).encode() + self.counts.tobytes() + chosen
        return hashlib.blake2b(told, digest_size=8).hexdigest()

    def read(self, index: int) -> bytes | memoryview:
        """The content of image `index`.

        Raises:
            OSError: the tar file cannot be fetched or read, or holds fewer images than it should.
        """
        shard, place = self._place(index)
        try:
            found = self._index(shard)
        except UserError as error:
            raise OSError(str(error)) from None
        if place >= len(found):
            raise OSError(f"the tar file holds {len(found)} images and not {self.counts[shard]}, as is told of it")
        return read_part(self.shards[shard], int(found.offset[place]), int(found.size[place]))

    def listed(self) -> TarSource:
        """The same with all paths and places known, for which every tar file is looked through."""
        numbers = np.arange(len(self)) if self._numbers is None else self._numbers
        of = np.searchsorted(self._starts, numbers, side="right") - 1
        used = np.unique(of)
        looked_through = _looked_through([self.shards[number] for number in used], remote_index, "shards")
        indexes = dict(zip(used.tolist(), looked_through, strict=True))
        paths, shard = [], of.astype(np.int32)
        offset, size = np.zeros(len(of), np.int64), np.zeros(len(of), np.int64)
        for row, (number, place) in enumerate(zip(of.tolist(), (numbers - self._starts[of]).tolist(), strict=True)):
            found = indexes[number]
            if place < len(found):
                paths.append(found.path(place))
                offset[row], size[row] = found.offset[place], found.size[place]
            else:
                paths.append(b"%08d" % place)
                shard[row] = -1
        return TarSource("", paths, Members(self.shards, shard, offset, size))

    def by_shard(self) -> ShardGroups:
        """The images of each tar file."""
        if self._numbers is not None:
            return grouped(self.shards, np.searchsorted(self._starts, self._numbers, side="right") - 1)
        used = [shard for shard, count in zip(self.shards, self.counts, strict=True) if count]
        return ShardGroups(tuple(used), np.cumsum(self.counts[self.counts > 0]), range(len(self)))

    def subset(self, indices: Iterable[int]) -> "RemoteTars":
        chosen = np.fromiter((int(index) for index in indices), dtype=np.int64)
        return RemoteTars(self.shards, self.counts, chosen if self._numbers is None else self._numbers[chosen])

    def _place(self, index: int) -> tuple[int, int]:
        """(shard, place in it) of an image."""
        number = index if self._numbers is None else int(self._numbers[index])
        if not 0 <= number < self._starts[-1]:
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    def _index(self, shard: int) -> TarIndex:
        """What is in a tar file; of those read last it stays in memory."""
        with self._lock:
            found = self._indexes.get(shard)
            if found is not None:
                self._indexes.move_to_end(shard)
                return found
        found = remote_index(self.shards[shard])
        with self._lock:
            self._indexes[shard] = found
            while len(self._indexes) > 1 and sum(map(_bytes_of, self._indexes.values())) > _MOST_INDEX_BYTES:
                self._indexes.popitem(last=False)
        return found


def _bytes_of(index: TarIndex) -> int:
    return len(index.paths) + 24 * len(index)


def local_index(path: str) -> TarIndex:
    """What is in a tar file of this machine, from the cache where it was looked through before.

    Raises:
        OSError: it cannot be read.
        UserError: it is no tar file, or compressed.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(file)
        key = key_of("tar", FORMAT, ENDINGS, os.path.realpath(path), status.st_size, status.st_mtime_ns)
        return kept_index(key, status.st_size, lambda: scan(file, path, ENDINGS))
    finally:
        os.close(file)


def remote_index(shard: RemoteShard) -> TarIndex:
    """What is in a tar file at an address, from the cache where it was looked through before; else it is fetched.

    Raises:
        OSError: it cannot be fetched or read.
        UserError: it is no tar file, or compressed.
    """

    def find() -> TarIndex:
        file = shard.open()
        try:
            return scan(file, shown(shard.path), ENDINGS)
        finally:
            os.close(file)

    length = shard.size if shard.size >= 0 else 2**62
    return kept_index(key_of("tar", FORMAT, ENDINGS, shard.key), length, find)


def local_tars(name: str, flag: str) -> tuple[list[str], str] | None:
    """The tar files that a path stands for, and the path in them; None where it stands for none that is there.

    Args:
        name: with braces and wildcards, unless a file of just this name is there.
        flag: the option it came from, for messages.

    Raises:
        UserError: they are compressed, too many, or some of them are missing.
    """
    try:
        if Path(name).is_dir():
            return None
        _check_plain(name, f"{flag} {name}", Path(name).exists() or has_braces(name) or has_wildcards(name))
        cut = tars_and_inside(name)
        if cut is None or Path(cut[0]).is_dir():
            return None
        if Path(cut[0]).is_file():
            return [cut[0]], cut[1]
        names = without_braces(cut[0])
        tars = [tar for each in names for tar in (sorted(glob.glob(each)) if has_wildcards(each) else [each])]  # noqa: PTH207
        missing = next((tar for tar in tars if not Path(tar).is_file()), None)
    except OSError:
        return None  # such as a name that is too long
    except ValueError as error:
        raise UserError(f"{flag} {name}: {error}") from None
    if missing is not None and len(tars) > 1:
        raise UserError(f"{flag} {name}: there is no file {missing}")
    return (tars, cut[1]) if tars and missing is None else None


def _check_plain(name: str, where: str, there: bool) -> None:
    """Raises UserError: tar files that are there are compressed."""
    ending = next((ending for ending in COMPRESSED if name.lower().partition("?")[0].endswith(ending)), None)
    if ending and there:
        raise UserError(
            f"{where}: lomar reads plain .tar files, not {ending}; unpack it (images do not get smaller so)"
        )


def open_tars(tars: Sequence[str], inside: str, data: str, flag: str) -> TarSource:
    """The images in tar files of this machine.

    Args:
        tars: their paths.
        inside: the folder or image in them that is meant; "" for all.
        data: what was asked for.
        flag: the option it came from, for messages.

    Raises:
        UserError: one cannot be read, there is no image in them, or none such.
    """
    where = f"{flag} {data}"
    indexes = _looked_through(tars, local_index, where)
    shards = [Shard(tar, _length(tar, where), "") for tar in tars]
    root = data.removesuffix(f"/{inside}") if inside else data
    source = _of_indexes(root, shards, indexes, where)
    return source.below(inside, where) if inside else source


def _length(tar: str, where: str) -> int:
    try:
        return os.stat(tar).st_size  # noqa: PTH116 (there may be thousands)
    except OSError as error:
        raise UserError(f"{where}: cannot read {tar}: {error.strerror}") from None


def _of_indexes(root: str, shards: Sequence[Shard], indexes: Sequence[TarIndex], where: str) -> TarSource:
    counts = np.array([len(index) for index in indexes])
    if not counts.sum():
        raise UserError(f"{where}: no image in these tar files{_remarks(shards, indexes)}")
    shard = np.repeat(np.arange(len(indexes), dtype=np.int32), counts)
    offset, size = (np.concatenate([getattr(index, name) for index in indexes]) for name in ("offset", "size"))
    paths = (index.path(number) for index in indexes for number in range(len(index)))
    return TarSource(root, paths, Members(tuple(shards), shard, offset, size))


def _remarks(shards: Sequence[Shard], indexes: Sequence[TarIndex]) -> str:
    """What is to be said of tar files, as the end of a sentence."""
    found = [
        f"{shown(shard.path)}: {index.remark}" for shard, index in zip(shards, indexes, strict=True) if index.remark
    ]
    more = f" and {len(found) - _REMARKS} more such files" if len(found) > _REMARKS else ""
    return "".join(f"; {each}" for each in found[:_REMARKS]) + more


def _looked_through(files: Sequence[T], look: Callable[[T], S], where: str) -> list[S]:
    """What is in each tar file; what is wrong with some is told, and how far it has come where it takes long.

    Raises:
        UserError: one cannot be read or fetched.
    """
    names = [shown(file.path if isinstance(file, Shard) else str(file)) for file in files]
    found: list[S] = []
    told = time.monotonic()
    try:
        for index in at_once(look, files, _AT_ONCE):
            found.append(index)
            if time.monotonic() - told > _TOLD_EVERY_S:
                told = time.monotonic()
                tell(f"looking through tar files: {len(found)} of {len(files)}")
    except OSError as error:
        raise UserError(f"{where}: cannot read {names[len(found)]}: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    remarks = [f"{name}: {index.remark}" for name, index in zip(names, found, strict=True) if index.remark]
    for remark in remarks[:_REMARKS]:
        tell(remark)
    if len(remarks) > _REMARKS:
        tell(f"and {len(remarks) - _REMARKS} more such files")
    return found


def open_address(data: str, flag: str) -> ImageSource:
    """The images of tar files at an address, of a prepared folder there, or of a folder or image in either.

    Args:
        data: such as https://host/x-{000..011}.tar, s3://bucket/x-*.tar or gs://bucket/prepared/train.
        flag: the option it came from, for messages.

    Raises:
        UserError: they are not there, cannot be fetched, or there is no image in them; or the cache cannot be written.
    """
    where = f"{flag} {shown(data)}"
    protocol, _, path = data.partition("://")
    if protocol.lower() == "file":
        raise UserError(f"{where}: give the path alone, /{path.lstrip('/')}")
    if not path.strip("/") or (path.startswith("/") and protocol.lower() in ("http", "https", "s3", "gs")):
        raise UserError(f"{where}: the name of a host or bucket must follow ://")
    _check_plain(data, where, there=True)
    check_writable(where)
    cut = tars_and_inside(data)
    if cut is None:
        prepared = _prepared_at(data.rstrip("/"), where)
        if prepared is not None:
            return prepared
        cut = f"{data.rstrip('/')}/*.tar", ""
    shards = listed(cut[0], where)
    forgive(shards)
    source = RemoteTars(shards, _counts(shards, where))
    if not len(source):
        raise UserError(f"{where}: no image in these tar files")
    return source.listed().below(cut[1], where) if cut[1] else source


def _prepared_at(address: str, where: str) -> ImageSource | None:
    """The images of a prepared folder at an address, or of a folder among its originals; None where there is none."""
    for folder in _folders_above(address):
        try:
            index_file = shard_at(f"{folder}/{INDEX_FILE}")
            forgive([index_file])
            os.close(index_file.open())
        except (FileNotFoundError, PermissionError):
            continue
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except OSError as error:
            raise UserError(f"{where}: {shown(f'{folder}/{INDEX_FILE}')} {error.strerror or error}") from None
        try:
            index = parsed_index(index_file.file, where)
        except UserError:
            index_file.file.unlink(missing_ok=True)  # so that it is fetched anew, if it was damaged here
            raise
        shards = tuple(
            RemoteShard(f"{folder}/{shard.path}", shard.size, shard.sha256, shard.sha256)
            for shard in index.members.shards
        )
        forgive(shards)
        paths = (index.path(number) for number in range(len(index.ends)))
        source = TarSource("", paths, replace(index.members, shards=shards))
        inside = address.removeprefix(folder).strip("/")
        return source.below(inside, where) if inside else source
    return None


def _folders_above(address: str) -> Iterator[str]:
    """An address and those that it is below, down to the host or bucket."""
    protocol, _, path = address.partition("://")
    parts = path.split("/")
    for count in range(len(parts), 0, -1):
        yield f"{protocol}://{'/'.join(parts[:count])}"


def _counts(shards: Sequence[RemoteShard], where: str) -> np.ndarray:
    """Images of each tar file, int64 (S,), as is told beside them, or else counted.

    Raises:
        UserError: what is told cannot be true, or a tar file cannot be fetched to be counted.
    """
    counts = np.full(len(shards), -1, dtype=np.int64)
    try:
        told = _told_counts(shards)
    except OSError as error:
        raise UserError(f"{where}: {error}") from None
    for number, (shard, count) in enumerate(zip(shards, told, strict=True)):
        if count is None:
            continue
        if not 0 <= count <= (shard.size if shard.size >= 0 else 2**40) // _LEAST_BYTES:
            raise UserError(
                f"{where}: {shown(shard.path)} is said to hold {count} images, which {shard.size} bytes cannot"
            )
        counts[number] = count
    unknown = np.flatnonzero(counts < 0).tolist()
    if unknown:
        found = _looked_through([shards[number] for number in unknown], _counted, where)
        counts[unknown] = [each.images for each in found]
    return counts


def _counted(shard: RemoteShard) -> _Counted:
    index = remote_index(shard)
    return _Counted(len(index), index.remark)


def _told_counts(shards: Sequence[RemoteShard]) -> list[int | None]:
    """What files beside the tar files tell of their images.

    Raises:
        OSError: a server fails.
    """
    lists = [_beside(shard, SIZES_FILE) for shard in shards]
    different = sorted(set(lists))
    held = dict(zip(different, map(_json, texts_at(different)), strict=True))
    names = [shard.path.partition("?")[0].rpartition("/")[2] for shard in shards]
    told = [_whole_number(held[each], name) for each, name in zip(lists, names, strict=True)]
    if all(count is None for count in told):
        stats = [
            _beside(shard, f"{os.path.splitext(name)[0]}_stats.json")  # noqa: PTH122 (no path)
            for shard, name in zip(shards, names, strict=True)
        ]
        if _json(text_at(stats[0])):
            told = [_whole_number(_json(text), "successes") for text in texts_at(stats)]
    return told


def _beside(shard: Shard, name: str) -> str:
    """The address of another file beside a tar file; what is asked with it, such as a token, stays."""
    path, mark, query = shard.path.partition("?")
    return f"{path.rpartition('/')[0]}/{name}{mark}{query}"


def _json(text: bytes | None) -> dict[str, Any]:
    """What a file of JSON holds; nothing where there is none, or another page in its place."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _whole_number(values: dict[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
