"""COCO-format data: images with boxes, classes and masks of the objects in them.

What is read, and how:

- Boxes are clipped to their image. Those without area are dropped and counted, as mmdetection does.
- Polygons of fewer than three points, or with half a point, are dropped; an object of which no polygon is left is
  dropped as well and counted, as detectron2 does.
- Objects without a mask are an error where others have one; where none has, the data is for boxes alone.
- Anything else that is not as the format has it is refused, with the annotation's id.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lomar.data.coco_json import Id, Table, read_coco
from lomar.data.labels import SPLIT_SEED, TRAIN_NAMES, VAL_NAMES, VAL_SHARE
from lomar.data.opening import images_at, is_there
from lomar.data.sources import ImageSource
from lomar.errors import UserError
from lomar.seeding import seeded

# Annotations of the same images in which there are no boxes, or not all of them.
_OTHER_KINDS = ("captions", "person_keypoints", "keypoints", "panoptic", "stuff", "image_info", "densepose")
_FIRST_IMAGES = 3  # that are looked for in a folder, to see whether it is the one


@dataclass(frozen=True)
class Instances:
    """The objects of one image.

    Args:
        boxes: float32 (n, 4): left, top, right, bottom in pixels, inside the image.
        labels: int64 (n,), places in the categories.
        segmentations: of each object its polygons, float32 (points, 2) of x and y in pixels; or an uncompressed RLE as
            COCO has it, {"size": [height, width], "counts": uint32 array}; or None without masks.
        crowd: bool (n,), whether it is a group that was not told apart.
        areas: float32 (n,), in pixels, as the file has them; `coco_json.NO_AREA` where it does not say.
    """

    boxes: np.ndarray
    labels: np.ndarray
    segmentations: list[list[np.ndarray] | dict[str, Any] | None]
    crowd: np.ndarray
    areas: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class CocoImages:
    """Images with their objects.

    Args:
        path: the JSON file.
        source: the image files.
        image_ids: of each image, as the file has them.
        sizes: int64 (N, 2), height and width in pixels, as the file has them.
        categories: names of the classes.
        category_ids: the file's number of each class; -1 for one that the file does not have.
        has_masks: whether objects have masks.
        left_out: what was dropped while reading -> how many.
    """

    path: str
    source: ImageSource
    image_ids: Sequence[Id]
    sizes: np.ndarray
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    has_masks: bool
    left_out: dict[str, int]
    _table: Table = field(repr=False)
    _rows: np.ndarray = field(repr=False)  # int64 (N, 2), first and end in the table

    def __len__(self) -> int:
        return len(self.sizes)

    def instances(self, index: int) -> Instances:
        """The objects of image `index`, in the file's order."""
        table, (first, end) = self._table, self._rows[index]
        return Instances(
            table.boxes[first:end],
            table.labels[first:end],
            [self._segmentation(row, index) for row in range(first, end)],
            table.crowd[first:end],
            table.areas[first:end],
        )

    def _segmentation(self, row: int, index: int) -> list[np.ndarray] | dict[str, Any] | None:
        table = self._table
        first, end = table.polygons[row].tolist()
        if first < end:
            ends = table.point_ends[first : end + 1].tolist()
            return [table.points[start:stop] for start, stop in pairwise(ends)]
        first, end = table.runs[row].tolist()
        if first < end:
            return {"size": self.sizes[index].tolist(), "counts": table.run_lengths[first:end]}
        return None

    def subset(self, indices: Iterable[int]) -> "CocoImages":
        """The images of the given numbers, in their order."""
        chosen = np.fromiter(indices, dtype=np.int64)
        return replace(
            self,
            source=self.source.subset(chosen.tolist()),
            image_ids=[self.image_ids[index] for index in chosen.tolist()],
            sizes=self.sizes[chosen],
            _rows=self._rows[chosen],
        )

    def instance_counts(self) -> np.ndarray:
        """int64 (N,): objects of each image that are no crowd."""
        before = np.concatenate([[0], np.cumsum(~self._table.crowd)])
        return before[self._rows[:, 1]] - before[self._rows[:, 0]]

    def trainable(self) -> tuple["CocoImages", int]:
        """The images with an object that is no crowd, and how many others there are."""
        kept = np.flatnonzero(self.instance_counts())
        return self.subset(kept), len(self) - len(kept)

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or renamed, or an annotation or a class changes; the root may move."""
        digest = hashlib.blake2b(self.source.fingerprint().encode(), digest_size=8)
        for part in (self.image_ids, self.categories, self.category_ids, self.has_masks):
            digest.update(repr(part).encode())
        for values in (self.sizes, self._rows):
            digest.update(np.ascontiguousarray(values).data)
        digest.update(self._table.digest())
        return digest.hexdigest()

    def for_classes(self, categories: Sequence[str], category_ids: Sequence[int], flag: str) -> "CocoImages":
        """The same with labels that are places in other classes, such as those that a detector learnt.

        A class is found by its number and name, else by its name.

        Args:
            categories: names of the other classes.
            category_ids: their numbers.
            flag: the option the data came from, for messages.

        Raises:
            UserError: an object's class is not among them.
        """
        by_both = {pair: place for place, pair in enumerate(zip(category_ids, categories, strict=True))}
        by_name = {name: place for place, name in enumerate(categories)}
        own = zip(self.category_ids, self.categories, strict=True)
        places = np.array([by_both.get(pair, by_name.get(pair[1], -1)) for pair in own], dtype=np.int64)
        labels = places[self._table.labels]
        if (labels < 0).any():
            name = self.categories[self._table.labels[np.argmin(labels)]]
            raise UserError(f"{flag} {self.path}: its class {name!r} is not among those of training")
        ids = dict.fromkeys(range(len(categories)), -1)
        ids |= {place: number for place, number in zip(places.tolist(), self.category_ids, strict=True) if place >= 0}
        return replace(
            self,
            categories=tuple(categories),
            category_ids=tuple(ids.values()),
            _table=replace(self._table, labels=labels),
        )


@dataclass(frozen=True)
class DetectionData:
    """What trains and what judges; both have the classes of the first.

    Args:
        train: all images of the training part, also those without objects; `CocoImages.trainable` leaves these out.
        val: the images that judge; None where there is a single image.
        drawn: whether `val` was drawn from the images of one part, a fifth of them.
    """

    train: CocoImages
    val: CocoImages | None
    drawn: bool


def detection_data(
    path: str,
    annotations: str | None = None,
    val: str | None = None,
    val_annotations: str | None = None,
    flag: str = "--data",
    box_only: bool = False,
) -> DetectionData:
    """Images with objects that train, and images that judge.

    Three layouts are known: COCO's (annotations/instances_train2017.json beside train2017/), Roboflow's
    (train/_annotations.coco.json beside valid/), and any .json file with the images beside it or in a folder that is
    given. Where nothing says what judges, a fifth of the images is drawn, always the same; a folder says it, but not
    where `annotations` are given.

    Args:
        path: the folder; or a .json file.
        annotations: a .json file, where `path` is the folder of its images.
        val: another folder or .json file, all of which judges.
        val_annotations: a .json file, where `val` (or `path`) is the folder of its images.
        flag: the option the path came from, for messages.
        box_only: masks are not read.

    Raises:
        UserError: nothing to read, several files that could be meant, a file that is not in COCO's format, images that
            are not there, nothing to train on, or a class that judges and does not train.
    """
    train = _read(_training_file(path, annotations, flag), flag, box_only)
    if not train.instance_counts().any():
        raise UserError(f"{flag} {train.path}: no annotation is there to learn from, but for {_told(train)}")
    judge = _judging_file(path, annotations, val, val_annotations, flag)
    if judge is None:
        return _drawn(train)
    judging = "--val" if val is not None else "--val-annotations" if val_annotations is not None else flag
    return DetectionData(train, _of_classes_of(train, _read(judge, judging, box_only), judging), drawn=False)


def judging_images(
    path: str, annotations: str | None = None, flag: str = "--data", learnt_from: bool = False, box_only: bool = False
) -> tuple[CocoImages, bool]:
    """The images that judge a detector: those of the part that is there to judge, else all.

    Args:
        path: a folder or a .json file, as for `detection_data`.
        annotations: a .json file, where `path` is the folder of its images.
        flag: the option the path came from, for messages.
        learnt_from: whether the detector learnt from these images; where nothing says which judge, the fifth that it
            was not shown does.
        box_only: masks are not read.

    Returns:
        The images, and whether they are that fifth.

    Raises:
        UserError: as of `detection_data`.
    """
    judge = _judging_file(path, annotations, None, None, flag)
    if judge is not None:
        return _read(judge, flag, box_only), False
    everything = _read(_training_file(path, annotations, flag), flag, box_only)
    drawn = _drawn(everything).val if learnt_from else None
    return (everything, False) if drawn is None else (drawn, True)


def _of_classes_of(train: CocoImages, val: CocoImages, flag: str) -> CocoImages:
    if val.has_masks < train.has_masks:
        raise UserError(
            f"{flag} {val.path}: its objects have no masks, but those of {train.path} have; --boxes-only needs none"
        )
    return val.for_classes(train.categories, train.category_ids, flag)


def _drawn(images: CocoImages) -> DetectionData:
    """A fifth of the images judges: of those with objects and of those without, at least one of the former."""
    rng = np.random.default_rng(seeded(SPLIT_SEED, "split").initial_seed())
    objects = images.instance_counts() > 0
    judging = np.zeros(len(images), dtype=bool)
    for group, least in ((np.flatnonzero(objects), 1), (np.flatnonzero(~objects), 0)):
        count = max(least, round(VAL_SHARE * len(group))) if len(group) > 1 else 0
        judging[rng.permutation(group)[:count]] = True
    if not judging.any():
        return DetectionData(images, None, drawn=False)
    return DetectionData(images.subset(np.flatnonzero(~judging)), images.subset(np.flatnonzero(judging)), drawn=True)


def _told(images: CocoImages) -> str:
    parts = [f"{count} {what}" for what, count in images.left_out.items()]
    crowds = int(images._table.crowd.sum())
    return ", ".join([*parts, *([f"{crowds} of crowds"] if crowds else [])]) or "none at all"


@dataclass(frozen=True)
class _File:
    """A JSON file, and the folders in which its images may lie, the likeliest first."""

    path: Path
    folders: list[Path]


def _training_file(path: str, annotations: str | None, flag: str) -> _File:
    if (given := _given(path, annotations, flag, "--annotations")) is not None:
        return given
    if (found := _found(Path(path), TRAIN_NAMES, flag, "--annotations")) is not None:
        return found
    folder = Path(path)
    if not is_there(path):
        raise UserError(f"{flag} {path}: no such folder or file")
    judging = [file for name in VAL_NAMES for file in _split_files(folder) if _split_in(file, name)]
    alone = [file for file in _split_files(folder) if file not in judging]
    if len(alone) != 1:
        raise UserError(
            f"{flag} {path}: no annotations of images to learn from; looked for annotations/instances_train*.json, "
            "train/_annotations.coco.json and a single .json file; --annotations names one elsewhere"
            if not alone
            else f"{flag} {path}: {_named(alone)} could be meant; --annotations says which"
        )
    return _File(alone[0], _folders([folder], alone[0]))


def _judging_file(
    path: str, annotations: str | None, val: str | None, val_annotations: str | None, flag: str
) -> _File | None:
    if val is not None or val_annotations is not None:
        judging = val or (str(Path(path).parent) if _is_json(path) else path)
        if (given := _given(judging, val_annotations, "--val", "--val-annotations")) is not None:
            return given
        found = _found(Path(judging), VAL_NAMES, "--val", "--val-annotations")
        return found or _training_file(judging, None, "--val")
    if annotations is not None or _is_json(path):
        return None
    return _found(Path(path), VAL_NAMES, flag, "--val-annotations")


def _given(path: str, annotations: str | None, flag: str, annotations_flag: str) -> _File | None:
    """The JSON file that is named; None where a folder is to be looked through."""
    if annotations is not None:
        if _is_json(path):
            raise UserError(f"{annotations_flag} {annotations}: {flag} {path} is a .json file already")
        return _File(Path(annotations), _folders([Path(path)], Path(annotations)))
    if _is_json(path):
        file = Path(path)
        return _File(file, _folders([file.parent, file.parent.parent], file))
    return None


def _found(folder: Path, names: Sequence[str], flag: str, annotations_flag: str) -> _File | None:
    """The annotations of a part in a folder of one of the known layouts.

    Raises:
        UserError: several files could be meant.
    """
    for name in names:
        named = [file for file in _split_files(folder) if _split_in(file, name)]
        found = [file for file in named if file.stem.lower().startswith("instances")] or named
        below = sorted(place for place in _folders_in(folder) if place.name.lower() == name)
        found = found or [file for place in below for file in _json_files(place)]
        if len(found) > 1:
            raise UserError(f"{flag} {folder}: {_named(found)} could be meant; {annotations_flag} says which")
        if found:
            return _File(found[0], _folders([*below, folder], found[0]))
    return None


def _named(files: Sequence[Path]) -> str:
    names = [file.name for file in files]
    shown = names if len(set(names)) == len(names) else [str(file) for file in files]
    return ", ".join(shown[:-1]) + f" and {shown[-1]}"


def _split_files(folder: Path) -> list[Path]:
    """The JSON files of a folder's parts."""
    return [file for place in (folder / "annotations", folder) for file in _json_files(place)]


def _json_files(folder: Path) -> list[Path]:
    """The JSON files right in a folder that may be of objects."""
    try:
        files = sorted(file for file in folder.iterdir() if _is_json(file.name) and file.name[0] != ".")
    except OSError:
        return []
    return [file for file in files if not file.name.lower().startswith(_OTHER_KINDS)]


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [place for place in folder.iterdir() if place.is_dir()]
    except OSError:
        return []


def _is_json(path: str) -> bool:
    return path.lower().endswith(".json")


def _split_in(file: Path, name: str) -> str | None:
    """The word of a file's name that begins with a part's name: train2017 of instances_train2017.json."""
    found = re.search(rf"(?<![a-z])({name}\d*)(?![a-z])", file.stem, re.IGNORECASE)
    return found[1] if found else None


def _folders(bases: Sequence[Path], file: Path) -> list[Path]:
    """Folders in which the images of a JSON file may lie, below or right in some folders or beside the file."""
    words = dict.fromkeys(word for name in (*TRAIN_NAMES, *VAL_NAMES) if (word := _split_in(file, name)))
    words |= dict.fromkeys([*(word.rstrip("0123456789") for word in words), file.stem.removeprefix("instances_")])
    places = [base / inside / word for base in bases for word in words for inside in ("", "images")]
    places += [place for base in bases for place in (base, base / "images")]
    return list(dict.fromkeys([*places, file.parent, file.parent / "images"]))


def _read(file: _File, flag: str, box_only: bool) -> CocoImages:
    """The images of a JSON file with their objects.

    Raises:
        UserError: it is not in COCO's format, or its images are not there.
    """
    told = read_coco(file.path, f"{flag} {file.path}", box_only)
    return CocoImages(
        path=str(file.path),
        source=_source(file, told.names, told.image_ids, flag),
        image_ids=told.image_ids,
        sizes=told.sizes,
        categories=told.categories,
        category_ids=told.category_ids,
        has_masks=told.has_masks,
        left_out=told.left_out,
        _table=told.table,
        _rows=told.rows,
    )


def _source(file: _File, names: Sequence[bytes], image_ids: Sequence[Id], flag: str) -> ImageSource:
    """The images, in the first of the folders that has any of the first ones.

    Raises:
        UserError: some are not there.
    """
    first = [os.fsdecode(name) for name in names[:_FIRST_IMAGES]]
    places = [place for place in file.folders if any(is_there(str(place / name)) for name in first)]
    folder = (places or [place for place in file.folders if place.is_dir()] or file.folders)[0]
    source = images_at(str(folder), names, flag)
    missing = _missing(source)
    if not missing:
        return source
    example = f"{source.name(missing[0])} (image id {image_ids[missing[0]]!r})"
    if len(missing) == len(source):
        raise UserError(
            f"{flag} {file.path}: none of its {len(source):,} images is in {folder}, such as {example}; "
            "is it the folder of these images?"
        )
    raise UserError(
        f"{flag} {file.path}: {len(missing):,} of its {len(source):,} images {'is' if len(missing) == 1 else 'are'} "
        f"not there, the first {example}"
    )


def _missing(source: ImageSource) -> list[int]:
    """Which files are not there. Each folder is listed once: to ask for each file takes long on a network's disk."""
    listed: dict[bytes, set[bytes]] = {}
    missing = []
    for index in range(len(source)):
        if source.members and source.members.hold(index):
            continue
        folder, name = os.path.split(source.path(index))
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder))  # noqa: PTH208 (of bytes that may be no text)
            except OSError:
                listed[folder] = set()
        if name not in listed[folder]:
            missing.append(index)
    return missing
