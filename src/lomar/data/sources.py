"""Where images come from: a folder, a list of paths, a folder that `lomar prepare` wrote, the embedded sample."""

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lomar.data.shards import Members, is_finished, is_unfinished, joined_members, nowhere, read_index
from lomar.errors import UserError

# In a folder only files with these endings are taken, in either case; a list may name any file.
EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"),
    *("pbm", "pgm", "ppm", "pnm", "jp2", "avif", "npy"),
)
_ENDINGS = tuple(f".{extension}".encode() for extension in EXTENSIONS)

# Real photographs that the wheels of lomar's own dependencies carry: (package, folder, files).
_SAMPLE = (
    (
        "skimage",
        "data",
        "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg",
    ),
    ("sklearn", "datasets/images", "china.jpg flower.jpg"),
)

_RUN_MARKS = {b"config.yaml", b"train.log"}  # every folder of a run holds them


class ImageSource:
    """Image files by number. A million paths cost little memory: one string of bytes and the offsets into it.

    It holds no open file and no cache, so it is cheap to hand to worker processes.

    Args:
        root: the folder that relative paths start from; empty if there is none.
        paths: one path a file, relative to the root or absolute, as the file system spells it (os.fsencode).
        members: where in tar files they lie, if they do not lie at these paths: those of a prepared folder are named
            as if they did.
    """

    def __init__(self, root: str, paths: Iterable[bytes], members: Members | None = None) -> None:
        self.root = root
        self.members = members
        self._root = os.fsencode(root)
        blob = bytearray()
        ends = [0]
        for path in paths:
            blob += path
            ends.append(len(blob))
        self._blob = bytes(blob)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def relative_path(self, index: int) -> bytes:
        """The path of file `index` as it was given, relative to the root."""
        return self._blob[self._ends[index] : self._ends[index + 1]]

    def path(self, index: int) -> bytes:
        """Where file `index` lies, or would if it were in no tar file; `open_source` knows either."""
        return os.path.join(self._root, self.relative_path(index))  # noqa: PTH118

    def name(self, index: int) -> str:
        """The path of file `index` for messages; what is not valid text in it is replaced."""
        return self.path(index).decode(errors="replace")

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or renamed, or one in a tar file changes; the root may move."""
        within = self.members.digest() if self.members else b""
        return hashlib.blake2b(self._blob + self._ends.tobytes() + within, digest_size=8).hexdigest()

    def read(self, index: int) -> bytes | memoryview:
        """The content of file `index`, mapped where it is large and lies in a tar file.

        Raises:
            OSError: the file cannot be read.
        """
        if self.members and self.members.hold(index):
            return self.members.read(index)
        # Path() would cost as much as opening the file, and bytes are what the file system speaks.
        try:
            with open(self.path(index), "rb") as file:  # noqa: PTH123
                return file.read()
        except ValueError as error:  # a zero byte in it
            raise OSError(f"no path of a file: {error}") from error

    def subset(self, indices: Iterable[int]) -> "ImageSource":
        """A source of the given files in the given order."""
        chosen = [int(index) for index in indices]
        members = self.members.subset(chosen) if self.members else None
        return ImageSource(self.root, (self.relative_path(index) for index in chosen), members)


def joined(sources: Sequence[ImageSource]) -> ImageSource:
    """All images of several sources, one source after another."""
    paths = (source.path(index) for source in sources for index in range(len(source)))
    members = None
    if any(source.members for source in sources):
        members = joined_members([source.members or nowhere(len(source)) for source in sources])
    return ImageSource("", paths, members)


def open_source(data: str, flag: str = "--data") -> ImageSource:
    """The images that a command-line value names.

    Args:
        data: a folder (searched recursively, in sorted order, without hidden files), a `.txt` list of paths
            (one a line, relative to the list's folder; blank lines and lines that begin with # are skipped),
            one image file, a folder that `lomar prepare` wrote or a path of the originals in it (`prepared/train`),
            or the word `sample` (a folder of that name is reached as `./sample`).
        flag: the option the value came from, for messages.

    Raises:
        UserError: nothing there, no image in it, or a prepared folder that is not finished or damaged.
    """
    if data == "sample":
        return _embedded_sample(flag)
    path = Path(data)
    prepared = _prepared(path, flag)
    if prepared is not None:
        return _open_prepared(*prepared, data, flag)
    try:
        if path.is_dir():
            source = ImageSource(data, _files_below(os.fsencode(data)))
            missing = f"no image in this folder; looked for {', '.join(EXTENSIONS)}"
        elif path.is_file() and path.suffix.lower() == ".txt":
            source = images_at(str(path.parent), list(_listed(path)), flag)
            missing = "the list names no file"
        elif path.is_file() and os.fsencode(data).lower().endswith(_ENDINGS):
            source = ImageSource(str(path.parent), [os.fsencode(path.name)])
        elif path.exists():
            raise UserError(f"{flag} {data}: neither a folder, an image, a .txt list of paths nor 'sample'")
        else:
            raise UserError(f"{flag} {data}: no such folder or file")
    except OSError as error:
        raise UserError(f"{flag} {data}: cannot read {error.filename!r}: {error.strerror}") from error
    if len(source) == 0:
        raise UserError(f"{flag} {data}: {missing}")
    return source


def images_at(root: str, paths: Sequence[bytes], flag: str) -> ImageSource:
    """The files of these paths; where the root is a prepared folder, or lies in one, those that it holds.

    Args:
        root: what relative paths start from.
        paths: relative or absolute; that there is nothing at a path is found out when it is read.
        flag: the option they came from, for messages.

    Raises:
        UserError: the prepared folder is not finished, or damaged.
    """
    prepared = _prepared(Path(root), flag) if root else None
    if prepared is None:
        return ImageSource(root, paths)
    held = _open_prepared(*prepared, root, flag)
    asked = {os.path.normpath(path): -1 for path in paths}
    for index in range(len(held)):
        path = held.relative_path(index)
        if path in asked:
            asked[path] = index
    assert held.members is not None
    return ImageSource(root, paths, held.members.subset([asked[os.path.normpath(path)] for path in paths]))


def is_there(path: str) -> bool:
    """Whether there is a file or folder of this name, or one among the originals of a prepared folder."""
    try:
        if Path(path).exists():
            return True
        prepared = _prepared(Path(path), "")
        return prepared is not None and len(_open_prepared(*prepared, path, "")) > 0
    except (UserError, OSError, ValueError):  # also a name that is too long, or no name
        return False


def folders_in(path: str, flag: str) -> list[str]:
    """Names of the folders right below a folder, prepared or not; none where it cannot be read.

    Raises:
        UserError: the prepared folder is not finished, or damaged.
    """
    prepared = _prepared(Path(path), flag)
    if prepared is not None:
        source = _open_prepared(*prepared, path, flag)
        parts = (source.relative_path(index).split(b"/", 1) for index in range(len(source)))
        return sorted({os.fsdecode(part[0]) for part in parts if len(part) > 1})
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []


def _prepared(path: Path, flag: str) -> tuple[Path, bytes] | None:
    """The prepared folder that a path names or leads into, and the path of the originals below; None if none does.

    Raises:
        UserError: preparing it was not finished.
    """
    try:
        folder = next(place for place in (path, *path.parents) if place.exists())
    except (StopIteration, OSError, ValueError):
        return None
    if is_unfinished(folder):
        raise UserError(f"{flag} {folder}: not finished; lomar prepare --out {folder} --resume goes on with it")
    if not is_finished(folder):
        return None
    inside = path.relative_to(folder).as_posix()
    return folder, b"" if inside == "." else os.fsencode(inside)


def _open_prepared(folder: Path, inside: bytes, data: str, flag: str) -> ImageSource:
    """The images of a prepared folder, of a folder among its originals, or one image of it.

    Raises:
        UserError: there is no such image or folder, or the prepared folder is damaged.
    """
    index = read_index(folder, f"{flag} {folder}")
    everything = range(len(index.ends))
    if not inside:
        return ImageSource(data, map(index.path, everything), index.members)
    below = inside + b"/"
    found = [number for number in everything if index.path(number).startswith(below)]
    if found:
        paths = (index.path(number).removeprefix(below) for number in found)
        return ImageSource(data, paths, index.members.subset(found))
    found = [number for number in everything if index.path(number) == inside]
    if not found:
        raise UserError(f"{flag} {data}: no such folder or file among the images prepared in {folder}")
    return ImageSource(str(Path(data).parent), [inside.rsplit(b"/", 1)[-1]], index.members.subset(found))


def _files_below(root: bytes) -> Iterator[bytes]:
    """Paths of the images below a folder, relative to it, sorted folder by folder; runs of lomar are left out."""
    seen: set[tuple[int, int]] = set()  # a symbolic link may lead back up: enter each real folder once

    def walk(folder: bytes, prefix: bytes) -> Iterator[bytes]:
        status = os.stat(folder)  # noqa: PTH116
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            return
        seen.add(identity)
        with os.scandir(folder) as entries:
            # Only the names are kept: the entries of a flat folder of a million files would be large.
            children = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name[:1] != b".")
        if {name for name, _ in children} >= _RUN_MARKS:
            return  # a run's own pictures are no data
        for name, is_folder in children:
            if is_folder:
                yield from walk(os.path.join(folder, name), prefix + name + b"/")  # noqa: PTH118
            elif name.lower().endswith(_ENDINGS):
                yield prefix + name

    return walk(root, b"")


def _listed(path: Path) -> Iterator[bytes]:
    for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines():  # some editors write a BOM
        entry = line.strip()
        if entry and not entry.startswith(b"#"):
            yield entry


def _embedded_sample(flag: str) -> ImageSource:
    files: list[bytes] = []
    for package, folder, names in _SAMPLE:
        spec = importlib.util.find_spec(package)  # finds the package without importing it
        for location in (spec.submodule_search_locations or []) if spec else []:
            candidates = (Path(location, folder, name) for name in names.split())
            files += [os.fsencode(path) for path in candidates if path.is_file()]
    if not files:
        raise UserError(f"{flag} sample: the installed scikit-image and scikit-learn carry no photographs")
    return ImageSource("", files)
