"""Where images come from: a folder, a list of paths, the embedded sample."""

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

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
    """

    def __init__(self, root: str, paths: Iterable[bytes]) -> None:
        self.root = root
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
        """Where file `index` lies."""
        return os.path.join(self._root, self.relative_path(index))  # noqa: PTH118

    def name(self, index: int) -> str:
        """The path of file `index` for messages; what is not valid text in it is replaced."""
        return self.path(index).decode(errors="replace")

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or renamed; the root may move."""
        return hashlib.blake2b(self._blob + self._ends.tobytes(), digest_size=8).hexdigest()

    def read(self, index: int) -> bytes:
        """The content of file `index`.

        Raises:
            OSError: the file cannot be read.
        """
        # Path() would cost as much as opening the file, and bytes are what the file system speaks.
        try:
            with open(self.path(index), "rb") as file:  # noqa: PTH123
                return file.read()
        except ValueError as error:  # a zero byte in it
            raise OSError(f"no path of a file: {error}") from error

    def subset(self, indices: Iterable[int]) -> "ImageSource":
        """A source of the given files in the given order."""
        return ImageSource(self.root, (self.relative_path(int(index)) for index in indices))


def open_source(data: str, flag: str = "--data") -> ImageSource:
    """The images that a command-line value names.

    Args:
        data: a folder (searched recursively, in sorted order, without hidden files), a `.txt` list of paths
            (one a line, relative to the list's folder; blank lines and lines that begin with # are skipped),
            one image file, or the word `sample` (a folder of that name is reached as `./sample`).
        flag: the option the value came from, for messages.

    Raises:
        UserError: nothing there, or no image in it.
    """
    if data == "sample":
        return _embedded_sample(flag)
    path = Path(data)
    try:
        if path.is_dir():
            source = ImageSource(data, _files_below(os.fsencode(data)))
            missing = f"no image in this folder; looked for {', '.join(EXTENSIONS)}"
        elif path.is_file() and path.suffix.lower() == ".txt":
            source = ImageSource(str(path.parent), _listed(path))
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
