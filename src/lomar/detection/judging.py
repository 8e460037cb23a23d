"""How good detections are: COCO's average precision, of boxes and of masks."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from lomar.detection.results import ImageId, Result, Rle, rle_of
from lomar.errors import UserError
from lomar.files import write_text

KINDS = {"bbox": "box", "segm": "mask"}  # COCO's name -> ours
_IOU_50, _IOU_75 = 0, 5  # places of the thresholds 0.50, 0.55, ... 0.95
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # places of the ranges of area: up to 32^2 and 96^2 pixels, and above
_MOST = -1  # place of the greatest number of detections an image, 100
_COLUMNS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "small": "ap_small",
    "medium": "ap_medium",
    "large": "ap_large",
    "AR100": "ar100",
}


@dataclass(frozen=True)
class Precision:
    """COCO's numbers for boxes or for masks, shares of 0 to 1; None where there is no object to find.

    Attributes:
        ap: average precision, the mean over categories and over overlaps (IoU) of 0.50 to 0.95.
        ap50, ap75: at an overlap of 0.50 and of 0.75.
        ap_small, ap_medium, ap_large: of objects below 32 x 32 pixels, up to 96 x 96, and above, by COCO's `area`.
        ar100: average recall with at most 100 detections an image and category.
        per_category: `ap` of each category.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar100: float | None
    per_category: tuple[float | None, ...]


@dataclass(frozen=True)
class Judgement:
    """How a detector did on annotated images.

    Attributes:
        kinds: "box" and "mask", or one of them.
        categories: names, in the order of the annotations' file.
        objects: of each category how many there are to find, crowd regions left out.
        images: how many were judged, those without objects too.
        found: results that were judged.
    """

    kinds: dict[str, Precision]
    categories: tuple[str, ...]
    objects: tuple[int, ...]
    images: int
    found: int


def judge(
    ground_truth: dict[str, Any],
    results: Sequence[Result],
    kinds: Sequence[str] = ("bbox", "segm"),
    fast: bool | None = None,
) -> Judgement:
    """Average precision of results, as COCO defines it.

    What COCO's files leave open is filled in: a missing `iscrowd` is 0, a missing `area` that of the segmentation or
    else of the box, a missing `bbox` the segmentation's. Ids may be text. Annotations of images or categories that the
    file does not list are left out, as pycocotools does. Nothing that is given is changed.

    The size of a found mask is its own area, not its box's.

    Args:
        ground_truth: COCO's annotations: images, annotations, categories.
        results: as `coco_results` makes them; may be empty.
        kinds: "bbox" and "segm", or one of them.
        fast: by faster-coco-eval, else by pycocotools; the values are equal. None takes the first where installed.

    Raises:
        UserError: results of an image or category that the ground truth does not have; a box or mask that is missing,
            or a mask that does not fit its image.
        ImportError: `fast`, and it is not installed.

    Source: pycocotools' COCOeval; the area of masks as detectron2 judges them.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown or not kinds:
        raise ValueError(f"kinds are {tuple(kinds)}; they can be {' and '.join(KINDS)}")
    if fast is None:
        fast = find_spec("faster_coco_eval") is not None
    truth = _Truth(ground_truth)
    truth.check(results)
    found = {KINDS[kind]: _precision(truth, results, kind, fast) for kind in kinds}
    counts = Counter(truth.categories[a["category_id"]] for a in truth.annotations if not a.get("iscrowd"))
    objects = tuple(counts[number] for number in truth.categories.values())
    return Judgement(found, truth.names, objects, len(truth.images), len(results))


class _Truth:
    """Ground truth whose images and categories have numbers from 1, as COCO's tools need them.

    Args:
        told: COCO's annotations.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        ids = list(dict.fromkeys(image["id"] for image in told["images"]))
        if all(isinstance(one, int) for one in ids):
            ids.sort()  # the order in which pycocotools meets images decides between equal scores
        self.images: dict[ImageId, int] = {one: number for number, one in enumerate(ids, start=1)}
        named = {category["id"]: str(category.get("name", category["id"])) for category in told["categories"]}
        self.categories: dict[ImageId, int] = {one: number for number, one in enumerate(named, start=1)}
        self.names = tuple(named.values())
        self.sizes = {image["id"]: (image.get("height"), image.get("width")) for image in told["images"]}
        self.annotations = [
            a for a in told["annotations"] if a["image_id"] in self.images and a["category_id"] in self.categories
        ]

    def check(self, results: Sequence[Result]) -> None:
        """Refuse results of images or categories that are not there."""
        for key, known in (("image_id", self.images), ("category_id", self.categories)):
            foreign = next((result[key] for result in results if result[key] not in known), None)
            if foreign is not None:
                kind = key.removesuffix("_id")
                raise UserError(f"results have {key} {foreign!r}, but the annotations have no such {kind}")

    def dataset(self, objects: list[dict[str, Any]]) -> dict[str, Any]:
        """Objects with images and categories, by number."""
        images = []
        for one, number in self.images.items():
            height, width = self.sizes[one]
            images.append({"id": number, "height": height, "width": width})
        categories = [{"id": number, "name": str(number)} for number in self.categories.values()]
        return {"images": images, "categories": categories, "annotations": objects}

    def expected(self, kind: str) -> list[dict[str, Any]]:
        """The objects to find, with all that COCO's tools read of them."""
        objects = []
        # Numbers from 1: pycocotools takes a match with an annotation of id 0 for none, and equal ids for one.
        for number, annotation in enumerate(self.annotations, start=1):
            of = f"annotation {annotation.get('id', number)!r}"
            box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
            area = annotation.get("area")
            if kind == "bbox" and box is None and not segmentation:
                raise UserError(f"{of} of image {annotation['image_id']!r} has neither bbox nor segmentation")
            code = None
            if kind == "segm" or box is None or area is None:
                code = self._code(annotation, of, needed=kind == "segm" or box is None)
            if box is None:
                box = coco_mask.toBbox(code).tolist()
            if area is None:
                area = float(box[2] * box[3] if code is None else coco_mask.area(code))
            given = {"bbox": box} if kind == "bbox" else {"segmentation": code}
            objects.append(self._numbered(annotation, number) | given | {"area": area})
            objects[-1]["iscrowd"] = int(annotation.get("iscrowd") or 0)
        return objects

    def told(self, results: Sequence[Result], kind: str) -> list[dict[str, Any]]:
        """What was found, likewise."""
        objects = []
        for number, result in enumerate(results, start=1):
            of = f"result {number}"
            if kind == "bbox":
                box = result.get("bbox")
                if box is None:
                    box = coco_mask.toBbox(self._code(result, of, needed=True)).tolist()
                given = {"bbox": box, "area": box[2] * box[3]}
            else:
                code = self._code(result, of, needed=True)
                given = {"segmentation": code, "area": float(coco_mask.area(code))}
            objects.append(self._numbered(result, number) | given | {"score": result["score"], "iscrowd": 0})
        return objects

    def _numbered(self, told: dict[str, Any], number: int) -> dict[str, Any]:
        image, category = self.images[told["image_id"]], self.categories[told["category_id"]]
        return {"id": number, "image_id": image, "category_id": category}

    def _code(self, told: dict[str, Any], of: str, needed: bool) -> Rle | None:
        """The mask's code; None where there is none, or none can be made, and it is not needed."""
        size = self.sizes[told["image_id"]]
        of = f"{of} of image {told['image_id']!r}"
        if None in size:
            if needed:
                raise UserError(f"{of}: the image has no height and width in the annotations, so that no mask fits it")
            return None
        if not needed and not told.get("segmentation"):
            return None
        if told.get("segmentation") is None:
            raise UserError(f"{of} has no segmentation; without masks, only boxes can be judged")
        try:
            return rle_of(told["segmentation"], size)
        except ValueError as error:
            if needed:
                raise UserError(f"the segmentation of {of} {error}") from None
            return None


def _precision(truth: _Truth, results: Sequence[Result], kind: str, fast: bool) -> Precision:
    """The numbers of one kind."""
    if fast:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with redirect_stdout(io.StringIO()):  # both tell their progress there
        indexed = []
        for objects in (truth.expected(kind), truth.told(results, kind)):
            indexed.append(COCO())
            indexed[-1].dataset = truth.dataset(objects)
            indexed[-1].createIndex()
        evaluation = COCOeval(*indexed, kind)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])  # (overlaps, recalls, categories, areas, most)
    recall = np.asarray(evaluation.eval["recall"])  # (overlaps, categories, areas, most)
    whole = precision[:, :, :, _ALL, _MOST]
    return Precision(
        ap=_mean(whole),
        ap50=_mean(whole[_IOU_50]),
        ap75=_mean(whole[_IOU_75]),
        ap_small=_mean(precision[:, :, :, _SMALL, _MOST]),
        ap_medium=_mean(precision[:, :, :, _MEDIUM, _MOST]),
        ap_large=_mean(precision[:, :, :, _LARGE, _MOST]),
        ar100=_mean(recall[:, :, _ALL, _MOST]),
        per_category=tuple(_mean(whole[:, :, place]) for place in range(len(truth.categories))),
    )


def _mean(values: NDArray[np.float64]) -> float | None:
    """Mean of those that are known; -1 stands for a category without objects."""
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def rows_of(judgement: Judgement) -> dict[str, float]:
    """The numbers by name, for a line of metrics: box_ap, box_ap50, ... mask_ar100; without those that are None."""
    return {
        f"{kind}_{name}": value
        for kind, precision in judgement.kinds.items()
        for name in _COLUMNS.values()
        if (value := getattr(precision, name)) is not None
    }


def summary(judgement: Judgement, worst: int = 5) -> list[str]:
    """Lines for the terminal: a table in percent, and the categories that are found least well."""
    objects = sum(judgement.objects)
    lines = [
        f"found {judgement.found}, to find {objects}, images {judgement.images}; in percent",
        " " * 5 + "".join(f"{column:>8}" for column in _COLUMNS),
    ]
    for kind, precision in judgement.kinds.items():
        cells = (_percent(getattr(precision, name)) for name in _COLUMNS.values())
        lines.append(f"{kind:<5}" + "".join(f"{cell:>8}" for cell in cells))
    first = next(iter(judgement.kinds.values())).per_category
    known = [place for place, ap in enumerate(first) if ap is not None]
    least = sorted(known, key=lambda place: first[place] or 0.0)[:worst]
    if least:
        lines.append("lowest AP:" if len(known) > worst else "AP of each category:")
    width = max((len(judgement.categories[place]) for place in least), default=0)
    for place in least:
        aps = "  ".join(f"{kind} {_percent(p.per_category[place]):>5}" for kind, p in judgement.kinds.items())
        lines.append(f"  {judgement.categories[place]:<{width}}  {aps}  of {judgement.objects[place]}")
    return lines


def write_categories(path: Path, judgement: Judgement) -> None:
    """Write a table of the categories: name, objects, AP of each kind; it appears whole or not at all.

    Args:
        path: `.md` is Markdown with percent, as a report shows it; any other is CSV with shares, which is empty where
            there is no object to find.
        judgement: what to tell.
    """
    names = [f"{kind}_ap" for kind in judgement.kinds]
    lists = [precision.per_category for precision in judgement.kinds.values()]
    rows = list(zip(judgement.categories, judgement.objects, *lists, strict=True))
    if path.suffix.lower() == ".md":
        text = _markdown([f"{kind} AP" for kind in judgement.kinds], rows)
    else:
        file = io.StringIO()
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["category", "objects", *names])
        for name, count, *aps in rows:
            table.writerow([name, count, *(None if ap is None else round(ap, 6) for ap in aps)])
        text = file.getvalue()
    write_text(path, text)


def _markdown(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| category | objects | {' | '.join(names)} |", "|---|" + "---:|" * (1 + len(names))]
    for name, count, *aps in rows:
        cell = name.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {cell} | {count} | {' | '.join(map(_percent, aps))} |")
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
