"""Labelled images: class folders, or a table of paths and labels; what trains and what judges."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lomar.data.addresses import shown, within
from lomar.data.opening import folders_in, images_at, is_there, open_source
from lomar.data.sources import ImageSource
from lomar.errors import UserError
from lomar.seeding import seeded

# Folders, in any case, that train and judge: the first of these that exists. A table's column "split" has them as well.
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")
# What a table's header may call its columns.
_COLUMNS = {
    "path": ("path", "file", "filename", "filepath", "file_name", "image", "image_path"),
    "label": ("label", "class", "target", "category", "label_name", "class_name"),
    "split": ("split", "set", "subset", "fold"),
}
SPLIT_SEED = 0  # of what judges, where nothing says it: all seeds of a run are judged on the same images
VAL_SHARE = 0.2  # of each class, or of the images with objects, where nothing says which judge


@dataclass(frozen=True)
class Labelled:
    """Images and the number of each one's class, int64 (N,)."""

    source: ImageSource
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> "Labelled":
        """The images of the given numbers, in their order."""
        return Labelled(self.source.subset(indices), self.labels[indices])

    def thinned(self, limit: int, seed: int, purpose: str) -> "Labelled":
        """At most `limit` of the images, each class in proportion to its size."""
        return self.subset(_thinned(self.labels, limit, seed, purpose)) if limit < len(self) else self


@dataclass(frozen=True)
class LabelledData:
    """What trains and what judges; labels are places in `classes`.

    Args:
        train: also the bank in which neighbours are looked for.
        val: the images whose class is asked for.
        classes: their names, sorted.
        drawn: whether `val` was drawn from images that were not split.
    """

    train: Labelled
    val: Labelled
    classes: list[str]
    drawn: bool

    def thinned(self, train: int, val: int, seed: int) -> "LabelledData":
        """At most so many images of each part."""
        return replace(self, train=self.train.thinned(train, seed, "bank"), val=self.val.thinned(val, seed, "queries"))


@dataclass(frozen=True)
class _Named:
    """Images with the names of their classes."""

    source: ImageSource
    names: list[str]


def labelled_data(path: str, seed: int, val: str | None = None, flag: str = "--data") -> LabelledData:
    """Images that train and images that judge.

    A folder with train/ and val/ (or valid/, validation/, test/; in any case) holds both; the class of an image is the
    first folder below. A table (.csv) has a line `path,label` for each image, paths relative to the table, and may have
    a third column `split`. Where nothing says what judges, a fifth of each class is drawn.

    Args:
        path: the folder, or the table.
        seed: fixes what is drawn.
        val: another folder or table, all of which judges.
        flag: the option the path came from, for messages.

    Raises:
        UserError: nothing to read, no labels, a single class, or a class that judges and does not train.
    """
    train, judge = _parts(path, flag)
    if val is not None:
        train, judge = train, _whole(val, "--val")
    kinds = sorted(set(train.names))
    if not kinds and _is_table(path):
        raise UserError(f"{flag} {shown(path)}: split leaves no image to train on")
    if not kinds:
        raise UserError(
            f"{flag} {shown(path)}: the images have no labels; put those of each class in a folder of its own, "
            "or give a .csv of path,label"
        )
    if len(kinds) == 1:
        raise UserError(f"{flag} {shown(path)}: there is one class alone, {kinds[0]!r}; at least two are needed")
    if not _is_table(path) and {name.lower() for name in kinds} <= {*TRAIN_NAMES, *VAL_NAMES}:
        raise UserError(f"{flag} {shown(path)}: {' and '.join(kinds)} are no classes; beside them there must be train/")
    numbers = {name: number for number, name in enumerate(kinds)}
    labelled = _numbered(train, numbers)
    if judge is None:
        return _drawn(labelled, kinds, seed, f"{flag} {shown(path)}")
    where = f"--val {shown(val)}" if val is not None else f"{flag} {shown(path)}"
    if not judge.names:
        raise UserError(f"{where}: the images to judge by have no labels, but those to train on have them")
    unknown = sorted(set(judge.names) - set(numbers))
    if unknown:
        raise UserError(f"{where}: class {unknown[0]!r} is to be judged, but no image of it is there to train on")
    return LabelledData(labelled, _numbered(judge, numbers), kinds, drawn=False)


def evaluation_split(path: str, seed: int, train: int, val: int, flag: str = "--eval-data") -> LabelledData | None:
    """`labelled_data` thinned to at most `train` and `val` images; None where there are no two classes.

    Raises:
        UserError: nothing to read, or a class that judges and is not in the bank.
    """
    if path == "sample" or len(set(_parts(path, flag)[0].names)) < 2:
        return None
    return labelled_data(path, seed, flag=flag).thinned(train, val, seed)


def judging_images(
    path: str, classes: list[str], flag: str = "--data", learnt_from: bool = False
) -> tuple[Labelled, bool]:
    """The images that judge a classifier of known classes: val/ where there is one, else all.

    Args:
        path: a folder or a table, as for `labelled_data`.
        classes: names of the classifier's outputs.
        flag: the option the path came from, for messages.
        learnt_from: whether the classifier learnt from these images; where nothing says which judge, the fifth of each
            class that it was not shown does.

    Returns:
        The images, and whether they are that fifth.

    Raises:
        UserError: nothing to read, no labels, or a class that the classifier does not know.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    everything, judge = _parts(path, flag)
    if learnt_from and judge is None and sorted(set(everything.names)) == classes:
        return _drawn(_numbered(everything, numbers), classes, SPLIT_SEED, f"{flag} {shown(path)}").val, True
    named = judge or everything
    if not named.names:
        raise UserError(
            f"{flag} {shown(path)}: the images have no labels; a folder for each class, or a .csv of path,label"
        )
    unknown = sorted(set(named.names) - set(numbers))
    if unknown:
        listed = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
        raise UserError(f"{flag} {shown(path)}: the model does not know the class {unknown[0]!r}; it knows {listed}")
    return _numbered(named, numbers), False


def _parts(path: str, flag: str) -> tuple[_Named, _Named | None]:
    """What trains, and what judges if something says so."""
    if _is_table(path):
        return _table_parts(Path(path), flag)
    # By lower-case name; the first that is there counts.
    there = {name.lower(): within(path, name) for name in folders_in(path, flag)}
    train, judge = (next((there[name] for name in names if name in there), None) for names in (TRAIN_NAMES, VAL_NAMES))
    if train is None:
        return _whole(path, flag), None
    return _whole(train, flag), _whole(judge, flag) if judge else None


def _whole(path: str, flag: str) -> _Named:
    """All images below a folder or in a table."""
    if _is_table(path):
        rows = list(_rows(Path(path), flag))
        return _of_rows(Path(path), flag, rows)
    return _in_folders(open_source(path, flag))


def _is_table(path: str) -> bool:
    return path.lower().endswith(".csv")


def _in_folders(source: ImageSource) -> _Named:
    """Images that lie in a class folder; stray ones are left out."""
    parts = [source.relative_path(index).split(b"/", 1) for index in range(len(source))]
    kept = [index for index, part in enumerate(parts) if len(part) == 2 and part[0]]  # none of absolute paths
    return _Named(source.subset(kept), [parts[index][0].decode(errors="replace") for index in kept])


@dataclass(frozen=True)
class _Row:
    path: bytes
    label: str
    split: str


def _table_parts(path: Path, flag: str) -> tuple[_Named, _Named | None]:
    rows = list(_rows(path, flag))
    judging = [row for row in rows if row.split in VAL_NAMES]
    if not judging:
        return _of_rows(path, flag, rows), None
    return _of_rows(path, flag, [row for row in rows if row.split not in VAL_NAMES]), _of_rows(path, flag, judging)


def _of_rows(path: Path, flag: str, rows: list[_Row]) -> _Named:
    return _Named(images_at(str(path.parent), [row.path for row in rows], flag), [row.label for row in rows])


def _rows(path: Path, flag: str) -> Iterator[_Row]:
    """The lines of a table; a header line may name and order its columns."""
    known: dict[bytes, tuple[str, int]] = {}
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            columns, width = {"path": 0, "label": 1, "split": 2}, 2
            for number, cells in enumerate(csv.reader(file), start=1):
                cells = [cell.strip() for cell in cells]
                lower = [cell.lower() for cell in cells]
                where = f"{flag} {path} line {number}"
                if any("\0" in cell for cell in cells):
                    raise UserError(f"{where}: a zero byte; a table must be UTF-8 text")
                header = _columns(lower) if number == 1 else {}
                if {"path", "label"} <= set(header):
                    columns, width = header, 1 + max(header["path"], header["label"])
                    continue
                if header and not Path(cells[0]).suffix:
                    named = ", ".join(header)
                    raise UserError(f"{where}: a header must name path and label; of what it names, {named} is known")
                if not any(cells):
                    continue
                row = _row(cells, columns, width, where)
                first = path.parent / os.fsdecode(row.path)
                if number == 1 and not first.suffix and not is_there(str(first)):
                    raise UserError(f"{where}: {os.fsdecode(row.path)!r} is no image; a header names path and label")
                label, line = known.setdefault(row.path, (row.label, number))
                if line != number:
                    raise UserError(
                        f"{flag} {path} line {number}: {os.fsdecode(row.path)} stands on line {line} already"
                        + (f", as {label!r} and not {row.label!r}" if label != row.label else "")
                    )
                yield row
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from None
    except csv.Error as error:
        raise UserError(f"{flag} {path} is not a table: {error}") from None
    if not known:
        raise UserError(f"{flag} {path}: the table names no image; it has a line path,label for each")


def _columns(header: list[str]) -> dict[str, int]:
    """Where a header's columns of paths, labels and splits are, those that it has."""
    found = {name: next((each for each in known if each in header), "") for name, known in _COLUMNS.items()}
    return {name: header.index(known) for name, known in found.items() if known}


def _row(cells: list[str], columns: dict[str, int], width: int, where: str) -> _Row:
    if len(cells) < width or not cells[columns["path"]] or not cells[columns["label"]]:
        raise UserError(f"{where}: it must hold a path and a label, not {','.join(cells)!r}")
    at = columns.get("split", len(cells))
    split = cells[at].lower() if at < len(cells) else ""
    if split not in ("", *TRAIN_NAMES, *VAL_NAMES):
        raise UserError(f"{where}: split is {split!r}; it can be {', '.join((*TRAIN_NAMES, *VAL_NAMES))}")
    return _Row(os.path.normpath(os.fsencode(cells[columns["path"]])), cells[columns["label"]], split)


def _numbered(named: _Named, numbers: dict[str, int]) -> Labelled:
    return Labelled(named.source, np.array([numbers[name] for name in named.names], dtype=np.int64))


def _drawn(labelled: Labelled, classes: list[str], seed: int, where: str) -> LabelledData:
    """A fifth of each class judges."""
    train, val = held_out(labelled, VAL_SHARE, seed, "split")
    if not len(val):
        raise UserError(f"{where}: no class has two images, so that none can be held out to judge by")
    return LabelledData(train, val, classes, drawn=True)


def held_out(labelled: Labelled, share: float, seed: int, purpose: str) -> tuple[Labelled, Labelled]:
    """The images without a share of each class, and that share; a class of one image keeps it.

    Args:
        labelled: the images.
        share: of each class, one image at least.
        seed: fixes which.
        purpose: what they are held out for, so that two purposes draw different ones.
    """
    labels = labelled.labels
    ranks = _ranks_in_class(labels, seed, purpose)
    sizes = np.bincount(labels)[labels]  # of each image's own class
    out = (ranks < np.maximum(1, np.round(share * sizes))) & (sizes > 1)
    return labelled.subset(np.flatnonzero(~out)), labelled.subset(np.flatnonzero(out))


def of_each_class(labelled: Labelled, count: int, seed: int, purpose: str) -> Labelled:
    """At most `count` images of each class; more of them for a larger count hold those of a smaller one.

    Args:
        labelled: the images.
        count: of each class.
        seed: fixes which.
        purpose: what they are drawn for, so that two purposes draw different ones.
    """
    return labelled.subset(np.flatnonzero(_ranks_in_class(labelled.labels, seed, purpose) < count))


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
