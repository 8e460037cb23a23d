"""Where images come from: a folder, a list of paths, the embedded sample; and labelled folders for evaluation."""

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lomar.errors import UserError
from lomar.seeding import seeded

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

# The folder beside train/ that holds the queries of an evaluation: the first of these that exists.
_QUERY_FOLDERS = ("val", "valid", "validation", "test")
_QUERY_SHARE = 0.2  # of each class, when one folder has to serve as both


class ImageSource:
    """Image files by number. A million paths cost little memory: one string of bytes and the offsets into it.

    It holds no open file and no cache, so it is cheap to hand to worker processes.

    Args:
        root: the folder that relative paths start from.
        paths: one path a file, relative to the root or absolute, as the file system spells it (os.fsencode).
    """

    def __init__(self, root: str, paths: Iterable[bytes]) -> None:
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
        with open(self.path(index), "rb") as file:  # noqa: PTH123
            return file.read()

    def subset(self, indices: Iterable[int]) -> "ImageSource":
        """A source of the given files in the given order."""
        return ImageSource(os.fsdecode(self._root), (self.relative_path(int(index)) for index in indices))


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


@dataclass(frozen=True)
class LabelledSplit:
    """Labelled images for a nearest-neighbour evaluation: a bank to look in, and queries.

    Labels are int64, one an image, and index `classes`.
    """

    bank: ImageSource
    bank_labels: np.ndarray
    queries: ImageSource
    query_labels: np.ndarray
    classes: list[str]


def labelled_split(
    path: str, seed: int, bank_limit: int = 10_000, query_limit: int = 5_000, flag: str = "--eval-data"
) -> LabelledSplit | None:
    """A class-folder data set as bank and queries, thinned to the limits with every class in proportion.

    The class of an image is the first folder below the split's own. With train/ and val/ (or valid/, validation/,
    test/) those are bank and queries; otherwise 20 % of each class of the one folder become queries.

    Args:
        path: the data set's folder.
        seed: fixes which images are taken.
        bank_limit: most images in the bank.
        query_limit: most queries.
        flag: the option the path came from, for messages.

    Returns:
        None if there are fewer than two classes, so no labels.

    Raises:
        UserError: nothing to read, or a class among the queries that the bank does not have.
    """
    if path == "sample":
        return None
    root = Path(path)
    train = root / "train"
    query_folder = next((root / name for name in _QUERY_FOLDERS if (root / name).is_dir()), None)
    if not train.is_dir():
        return _split_one(open_source(path, flag), seed, bank_limit, query_limit)
    bank = open_source(str(train), flag)
    if query_folder is None:
        return _split_one(bank, seed, bank_limit, query_limit)

    queries = open_source(str(query_folder), flag)
    bank_kept, bank_names = _class_names(bank)
    query_kept, query_names = _class_names(queries)
    classes = sorted(set(bank_names))
    if len(classes) < 2:
        return None
    if not query_names:
        raise UserError(f"{flag} {query_folder}: no class folders with images, but {train} has them")
    unknown = sorted(set(query_names) - set(classes))
    if unknown:
        raise UserError(f"{flag} {query_folder}: class {unknown[0]!r} has no images in {train}")
    number = {name: label for label, name in enumerate(classes)}
    bank_labels = np.array([number[name] for name in bank_names], dtype=np.int64)
    query_labels = np.array([number[name] for name in query_names], dtype=np.int64)
    bank_taken = _thinned(bank_labels, bank_limit, seed, "bank")
    query_taken = _thinned(query_labels, query_limit, seed, "queries")
    return LabelledSplit(
        bank.subset(bank_kept[bank_taken]),
        bank_labels[bank_taken],
        queries.subset(query_kept[query_taken]),
        query_labels[query_taken],
        classes,
    )


def _split_one(source: ImageSource, seed: int, bank_limit: int, query_limit: int) -> LabelledSplit | None:
    kept, names = _class_names(source)
    classes, labels = np.unique(np.array(names, dtype=object), return_inverse=True)
    if len(classes) < 2:
        return None
    labels = labels.astype(np.int64)
    ranks = _ranks_in_class(labels, seed, "split")
    sizes = np.bincount(labels)[labels]  # of each image's own class
    # At least one query a class, except from a class of one image: it can only be found, not asked for.
    is_query = (ranks < np.maximum(1, np.round(_QUERY_SHARE * sizes))) & (sizes > 1)
    bank, queries = np.flatnonzero(~is_query), np.flatnonzero(is_query)
    if len(queries) == 0:
        return None
    bank = bank[_thinned(labels[bank], bank_limit, seed, "bank")]
    queries = queries[_thinned(labels[queries], query_limit, seed, "queries")]
    return LabelledSplit(
        source.subset(kept[bank]), labels[bank], source.subset(kept[queries]), labels[queries], list(classes)
    )


def _class_names(source: ImageSource) -> tuple[np.ndarray, list[str]]:
    """Indices of the images that lie in a class folder, and the folder of each; stray images are left out."""
    parts = [source.relative_path(index).split(b"/", 1) for index in range(len(source))]
    kept = [index for index, part in enumerate(parts) if len(part) == 2]
    return np.array(kept, dtype=np.int64), [parts[index][0].decode(errors="replace") for index in kept]


def _ranks_in_class(labels: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Each image's place, from 0, in a random order of its own class."""
    rng = np.random.default_rng(seeded(seed, purpose).initial_seed())
    shuffled = rng.permutation(len(labels))
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[grouped] = np.arange(len(labels)) - np.repeat(starts, sizes)
    return ranks


def _thinned(labels: np.ndarray, limit: int, seed: int, purpose: str) -> np.ndarray:
    """Sorted indices of at most `limit` images, each class in proportion to its size."""
    share = (_ranks_in_class(labels, seed, purpose) + 0.5) / np.bincount(labels)[labels]
    return np.sort(np.argsort(share, kind="stable")[:limit])
