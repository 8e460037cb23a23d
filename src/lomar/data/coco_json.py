"""A file in COCO's format -> flat arrays of what it says.

COCO's training set has 860,000 annotations. Python's objects for them would take gigabytes, so each is packed as soon
as the parser has read it.
"""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lomar.errors import UserError

_ENDLESS = 2.0**60  # and more; such numbers are no pixels
NO_AREA = -1.0  # of an object whose area the file does not say
_NO_MASK, _BAD_POLYGONS, _POLYGONS, _RUNS = range(4)  # what an annotation has for a mask

Id = int | str


@dataclass(frozen=True)
class Table:
    """Annotations, those of an image side by side.

    Args:
        boxes: float32 (M, 4).
        labels: int64 (M,).
        crowd: bool (M,).
        areas: float32 (M,), `NO_AREA` where the file does not say.
        polygons: int64 (M, 2), first and end among the polygons.
        runs: int64 (M, 2), first and end in `run_lengths`.
        points: float32 (points, 2) of all polygons.
        point_ends: int64 (polygons + 1,), where each polygon's points begin, and where the last one's end.
        run_lengths: uint32, of all RLE.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    polygons: np.ndarray
    runs: np.ndarray
    points: np.ndarray
    point_ends: np.ndarray
    run_lengths: np.ndarray

    def digest(self) -> bytes:
        """Changes with any of it."""
        digest = hashlib.blake2b(digest_size=16)
        for values in vars(self).values():
            digest.update(np.ascontiguousarray(values).data)
        return digest.digest()


@dataclass(frozen=True)
class CocoFile:
    """What a file says.

    Args:
        image_ids: of each image.
        sizes: int64 (N, 2), height and width in pixels.
        names: paths of the image files.
        categories: names of the classes, by number.
        category_ids: their numbers.
        table: the annotations.
        rows: int64 (N, 2), the first and the end of each image's in the table.
        has_masks: whether objects have masks.
        left_out: what was dropped -> how many.
    """

    image_ids: list[Id]
    sizes: np.ndarray
    names: list[bytes]
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    table: Table
    rows: np.ndarray
    has_masks: bool
    left_out: dict[str, int]


def read_coco(path: Path, where: str, box_only: bool) -> CocoFile:
    """What a file in COCO's format says of images and the objects in them.

    Args:
        path: the file.
        where: the option it came from, and its name, for messages.
        box_only: masks are not read.

    Raises:
        UserError: it cannot be read, or is not in that format.
    """
    packing = _Packing(where, box_only)
    told = _parsed(path, packing, where)
    for name in ("images", "annotations", "categories"):
        if not isinstance(told.get(name), list):
            raise UserError(f"{where}: not COCO's format, in which there is a list {name!r}")
    categories, category_ids = _categories(told["categories"], where)
    image_ids, sizes, names = _images(told["images"], where)
    if not told["annotations"]:
        raise UserError(f"{where}: the list 'annotations' is empty")
    table, rows, has_masks = packing.table(told["annotations"], image_ids, sizes, category_ids)
    left_out = {what: count for what, count in packing.left_out.items() if count}
    return CocoFile(image_ids, sizes, names, categories, category_ids, table, rows, has_masks, left_out)


def _parsed(path: Path, packing: "_Packing", where: str) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            told = json.load(file, object_hook=packing)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: no whole JSON file: {error.msg.lower()} at line {error.lineno} column {error.colno}"
        ) from None
    except (UnicodeDecodeError, RecursionError):
        raise UserError(f"{where}: no JSON file in UTF-8") from None
    except ValueError as error:  # numbers of thousands of digits
        raise UserError(f"{where}: no JSON file that can be read: {error}") from None
    if not isinstance(told, dict):
        raise UserError(f"{where}: not COCO's format, an object of the lists images, annotations and categories")
    return told


def _categories(listed: list[Any], where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and numbers of the classes, by number."""
    named: dict[int, str] = {}
    for each in listed:
        if not isinstance(each, dict) or type(each.get("id")) is not int or not isinstance(each.get("name"), str):
            raise UserError(f"{where}: a category has an id, a whole number, and a name; one is {_short(each)}")
        if each["id"] in named:
            raise UserError(f"{where}: category id {each['id']} occurs twice")
        named[each["id"]] = each["name"]
    if not named:
        raise UserError(f"{where}: the list 'categories' is empty")
    return tuple(named[number] for number in sorted(named)), tuple(sorted(named))


def _images(listed: list[Any], where: str) -> tuple[list[Id], np.ndarray, list[bytes]]:
    """Ids, int64 (N, 2) heights and widths, and paths of the images."""
    ids: list[Id] = []
    sizes = np.empty((len(listed), 2), dtype=np.int64)
    names: list[bytes] = []
    for place, each in enumerate(listed):
        if not isinstance(each, dict) or not _is_id(each.get("id")):
            raise UserError(f"{where}: an image has an id, a whole number or a text; one is {_short(each)}")
        at = f"{where}: image id {each['id']!r}"
        size: tuple[Any, Any] = (each.get("height"), each.get("width"))
        if not all(type(side) in (int, float) and side == side // 1 and 0 < side < 2**31 for side in size):
            raise UserError(f"{at}: its height and width are {size[0]!r} and {size[1]!r}, no sizes in pixels")
        ids.append(each["id"])
        sizes[place] = size
        names.append(_file_name(each.get("file_name"), at))
    if not ids:
        raise UserError(f"{where}: the list 'images' is empty")
    if len(set(ids)) < len(ids):
        raise UserError(f"{where}: image id {Counter(ids).most_common(1)[0][0]!r} occurs twice")
    return ids, sizes, names


def _file_name(told: Any, at: str) -> bytes:
    if not isinstance(told, str) or not told or "\0" in told:
        raise UserError(f"{at}: its file_name is {_short(told)}, no name of a file")
    if PurePosixPath(told).is_absolute() or ".." in PurePosixPath(told).parts:
        raise UserError(f"{at}: its file_name {_short(told)} leads out of the folder of images")
    try:
        return os.fsencode(told)
    except UnicodeEncodeError:
        raise UserError(f"{at}: its file_name is {_short(told)}, no name of a file") from None


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


class _Row(int):
    """The number of an annotation that was packed."""


class _Packing:
    """Packs each annotation as soon as the parser has read it; what it is called with is any object of the file."""

    def __init__(self, where: str, box_only: bool) -> None:
        self._where, self._box_only = where, box_only
        self.left_out = Counter[str]()
        self._ids: list[Id] = []
        self._image_ids: list[Id] = []
        self._category_ids: list[int] = []
        self._boxes, self._areas, self._crowd = array("d"), array("d"), array("b")
        self._masks = array("b")
        self._polygon_ends, self._run_ends = array("q", [0]), array("q", [0])  # of each annotation
        self._points, self._point_ends = array("f"), array("q", [0])
        self._run_lengths, self._run_sizes = array("I"), array("q")  # height and width

    def __call__(self, told: dict[str, Any]) -> object:
        """The annotation's row; what is no annotation stays what it is."""
        if "image_id" not in told or "bbox" not in told:
            return told
        number: Any = told.get("id")
        if not _is_id(number):
            raise UserError(f"{self._where}: an annotation of image id {_short(told['image_id'])} has no id")
        self._ids.append(number)
        try:
            self._pack(told)
        except (TypeError, ValueError, OverflowError) as error:
            raise self._refusal(len(self._ids) - 1, str(error)) from None
        return _Row(len(self._ids) - 1)

    def _refusal(self, row: int, why: str) -> UserError:
        return UserError(f"{self._where}: annotation id {self._ids[row]!r}: {why}")

    def _pack(self, told: dict[str, Any]) -> None:
        """Raises ValueError: something is not as COCO has it."""
        image, box = told["image_id"], told["bbox"]
        category: Any = told.get("category_id")
        crowd = told.get("iscrowd") or 0
        if type(image) not in (int, str, float):
            raise ValueError(f"its image_id is {_short(image)}")
        if type(category) not in (int, float):
            raise ValueError(f"its category_id is {_short(category)}")
        self._image_ids.append(image)
        self._category_ids.append(category)
        four = isinstance(box, list) and len(box) == 4
        if not four or not all(type(side) in (int, float) and abs(side) < _ENDLESS for side in box):
            raise ValueError(f"its bbox is {_short(box)}, not four finite numbers")
        if min(box[2:]) < 0:
            raise ValueError(f"its bbox is {_short(box)}, of a negative size; it is left, top, width, height")
        area = told.get("area")
        if area is None:
            area = NO_AREA
        elif type(area) not in (int, float) or not 0 <= area < _ENDLESS:
            raise ValueError(f"its area is {_short(area)}")
        if type(crowd) not in (int, float, bool):
            raise ValueError(f"its iscrowd is {_short(crowd)}")
        self._boxes.extend(box)
        self._areas.append(area)
        self._crowd.append(bool(crowd))
        self._masks.append(_NO_MASK if self._box_only else self._mask(told.get("segmentation")))
        self._polygon_ends.append(len(self._point_ends) - 1)
        self._run_ends.append(len(self._run_lengths))

    def _mask(self, told: Any) -> int:
        """Packs a mask; which kind it is of.

        Raises ValueError: it is no mask.
        """
        self._run_sizes.extend((0, 0))
        if not told:
            return _NO_MASK
        if isinstance(told, dict):
            height, width, lengths = _run_lengths(told)
            self._run_sizes[-2:] = array("q", (height, width))
            self._run_lengths.frombytes(lengths.astype(np.uint32).tobytes())
            return _RUNS
        if not isinstance(told, list) or not all(isinstance(polygon, list) for polygon in told):
            raise ValueError("its segmentation is neither a list of polygons nor an RLE")
        kept = [polygon for polygon in told if len(polygon) >= 6 and len(polygon) % 2 == 0]
        self.left_out["polygons of fewer than 3 points"] += len(told) - len(kept)
        for polygon in kept:
            try:
                self._points.extend(array("f", polygon))
            except (TypeError, OverflowError):
                raise ValueError("a polygon of it is no list of numbers") from None
            self._point_ends.append(len(self._points) // 2)
        return _POLYGONS if kept else _BAD_POLYGONS

    def table(
        self, listed: list[Any], image_ids: Sequence[Id], sizes: np.ndarray, category_ids: Sequence[int]
    ) -> tuple[Table, np.ndarray, bool]:
        """The annotations image by image, int64 (N, 2) the first and end of each, and whether they have masks.

        Raises:
            UserError: something is not as COCO has it.
        """
        for each in listed:
            if not isinstance(each, _Row):
                number = each.get("id") if isinstance(each, dict) else None
                lacks = next((key for key in ("image_id", "bbox") if isinstance(each, dict) and key not in each), "id")
                raise UserError(
                    f"{self._where}: annotation id {number!r} has no {lacks}; these are no annotations of objects"
                )
        rows = np.array(listed, dtype=np.int64)
        self._require_single_ids(rows)
        images = self._places(rows, self._image_ids, image_ids, "image")
        labels = self._places(rows, self._category_ids, category_ids, "category")
        boxes, has_area = self._clipped(rows, sizes[images])
        masks = np.frombuffer(self._masks, np.int8)[rows]
        crowd = np.frombuffer(self._crowd, np.int8)[rows] != 0
        kept, has_masks = self._masked(rows, has_area, masks, crowd)
        if has_masks:
            self._require_sane_masks(rows, masks, sizes[images])
        areas = np.frombuffer(self._areas)[rows]

        chosen = np.flatnonzero(kept)
        chosen = chosen[np.argsort(images[chosen], kind="stable")]
        numbers = np.arange(len(sizes))
        sorted_images = images[chosen]
        bounds = np.stack([np.searchsorted(sorted_images, numbers, side) for side in ("left", "right")], axis=1)
        of_row = rows[chosen]
        polygon_ends, run_ends = np.frombuffer(self._polygon_ends, np.int64), np.frombuffer(self._run_ends, np.int64)
        table = Table(
            boxes[chosen].astype(np.float32),
            labels[chosen],
            crowd[chosen],
            areas[chosen].astype(np.float32),
            np.stack([polygon_ends[of_row], polygon_ends[of_row + 1]], axis=1),
            np.stack([run_ends[of_row], run_ends[of_row + 1]], axis=1),
            np.frombuffer(self._points, np.float32).reshape(-1, 2),
            np.frombuffer(self._point_ends, np.int64),
            np.frombuffer(self._run_lengths, np.uint32),
        )
        return table, bounds, has_masks

    def _require(self, rows: np.ndarray, fine: np.ndarray, why: Callable[[int], str]) -> None:
        """Raises UserError: one is not fine; `why` is given its place."""
        if not fine.all():
            place = int(np.argmin(fine))
            raise self._refusal(int(rows[place]), why(place))

    def _require_single_ids(self, rows: np.ndarray) -> None:
        ids = [self._ids[row] for row in rows.tolist()]
        if len(set(ids)) < len(ids):
            raise UserError(f"{self._where}: annotation id {Counter(ids).most_common(1)[0][0]!r} occurs twice")

    def _places(self, rows: np.ndarray, told: Sequence[Id], known: Sequence[Id], what: str) -> np.ndarray:
        """int64 (M,): the place of each annotation's image or category among those there are."""
        places = {number: place for place, number in enumerate(known)}
        found = np.array([places.get(told[row], -1) for row in rows.tolist()], dtype=np.int64)
        self._require(rows, found >= 0, lambda place: f"there is no {what} of its {what}_id {told[rows[place]]!r}")
        return found

    def _clipped(self, rows: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (M, 4) within their images, and which of them have an area."""
        told = np.frombuffer(self._boxes).reshape(-1, 4)[rows]
        ends = np.concatenate([told[:, :2], told[:, :2] + told[:, 2:]], axis=1)
        boxes = ends.clip(0, np.tile(sizes[:, ::-1], 2))
        # As float32, in which it will be used.
        has_area = np.all(boxes[:, 2:].astype(np.float32) > boxes[:, :2].astype(np.float32), axis=1)
        self.left_out["boxes without area in the image"] += int((~has_area).sum())
        return boxes, has_area

    def _masked(
        self, rows: np.ndarray, has_area: np.ndarray, masks: np.ndarray, crowd: np.ndarray
    ) -> tuple[np.ndarray, bool]:
        """bool (M,), which to keep, and whether there are masks."""
        single = has_area & ~crowd
        if self._box_only or not np.isin(masks[single], (_POLYGONS, _RUNS)).any():
            return has_area, False
        self._require(
            rows,
            ~single | (masks != _NO_MASK),
            lambda place: "it has no mask, but others have; --boxes-only needs none",
        )
        bad = has_area & (masks == _BAD_POLYGONS)
        self.left_out["objects without a whole polygon"] += int(bad.sum())
        return has_area & ~bad, True

    def _require_sane_masks(self, rows: np.ndarray, masks: np.ndarray, sizes: np.ndarray) -> None:
        """Raises UserError: an RLE is of another size than its image; a polygon is not of finite numbers, or further
        outside of its image than that is large: to draw such ones would take any amount of memory."""
        run_sizes = np.frombuffer(self._run_sizes, np.int64).reshape(-1, 2)[rows]
        self._require(
            rows,
            (masks != _RUNS) | (run_sizes == sizes).all(axis=1),
            lambda place: (
                f"its RLE is of {run_sizes[place, 0]} x {run_sizes[place, 1]} pixels, "
                f"its image of {sizes[place, 0]} x {sizes[place, 1]}"
            ),
        )
        if not self._points:
            return
        points = np.frombuffer(self._points, np.float32).reshape(-1, 2)
        starts = np.frombuffer(self._point_ends, np.int64)[:-1]
        lowest = np.minimum.reduceat(points, starts)  # (polygons, 2); not a number where any is not
        highest = np.maximum.reduceat(points, starts)
        ends = np.frombuffer(self._polygon_ends, np.int64)
        first, counts = ends[rows], ends[rows + 1] - ends[rows]
        owners = np.repeat(np.arange(len(rows)), counts)
        polygons = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        far = sizes[owners, ::-1]
        fine = np.ones(len(rows), dtype=bool)
        inside = (lowest[polygons] >= -far) & (highest[polygons] <= 2 * far)
        fine[owners[~inside.all(axis=1)]] = False
        self._require(rows, fine, lambda place: "a polygon of it is far outside of its image, or not of finite numbers")


def _run_lengths(told: dict[str, Any]) -> tuple[int, int, np.ndarray]:
    """Height, width and the lengths of runs of an RLE, compressed or not.

    Raises:
        ValueError: it is none, or its runs do not fill its size.
    """
    size, counts = told.get("size"), told.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and 0 < side < 2**31 for side in size):
        raise ValueError(f"its RLE has the size {_short(size)}")
    if isinstance(counts, str):
        lengths = _decompressed(counts)
    elif isinstance(counts, list) and all(type(count) is int and 0 <= count < 2**32 for count in counts):
        lengths = np.array(counts, dtype=np.int64)
    else:
        raise ValueError("its RLE has counts that are neither a text nor whole numbers")
    if (lengths < 0).any() or lengths.sum() != size[0] * size[1]:
        raise ValueError(f"the counts of its RLE do not add up to its size, {size[0]} x {size[1]}")
    return size[0], size[1], lengths


def _decompressed(text: str) -> np.ndarray:
    """int64, the lengths of runs in COCO's compressed form.

    A number is of digits of 5 bits, the lowest first, a sixth bit says that more follow and the last digit's highest
    is the sign; from the fourth on the difference to the number before the last is what stands there.

    Raises:
        ValueError: it is not of this form.
    """
    if not text.isascii():
        raise ValueError("its RLE has counts that are damaged")
    digits = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 32) == 0)
    if not len(ends) or ends[-1] != len(digits) - 1 or digits.min() < 0 or digits.max() > 63:
        raise ValueError("its RLE has counts that are damaged")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:  # 40 bits
        raise ValueError("its RLE has counts that are damaged")
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    values = np.add.reduceat((digits & 31) << shifts, starts)
    values -= np.where(digits[ends] & 16, 1 << (5 * lengths), 0)
    for chain in (values[1::2], values[2::2]):
        np.cumsum(chain, out=chain)
    return values
