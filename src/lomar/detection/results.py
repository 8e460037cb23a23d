"""What a detector finds in an image, and the file format in which COCO's tools pass that on.

A mask is a run-length code (RLE) as pycocotools makes it: {"size": [height, width], "counts": text}.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from lomar.files import write_atomically

Rle = dict[str, Any]
Result = dict[str, Any]  # one object found, as it stands in a file
ImageId = int | str

_BOX_DECIMALS = 3  # of a pixel
_SCORE_DECIMALS = 7  # about what float32 holds near 1; fewer would tie scores that differ


@dataclass(frozen=True)
class Found:
    """What was found in one image, on the CPU, best first or in any order.

    Args:
        boxes: float32 (n, 4): x0, y0, x1, y1 in pixels of the original image.
        scores: float32 (n,), 0 to 1.
        labels: int64 (n,), places in the list of categories.
        masks: n codes of the original image's size; None of a detector of boxes alone.

    Raises:
        ValueError: the parts are of unlike length.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: list[Rle] | None = None

    def __post_init__(self) -> None:
        n = len(self.scores)
        fits = self.boxes.shape == (n, 4) and self.scores.shape == self.labels.shape == (n,)
        if not fits or (self.masks is not None and len(self.masks) != n):
            masks = "" if self.masks is None else f" and {len(self.masks)} masks"
            shapes = (tuple(part.shape) for part in (self.boxes, self.scores, self.labels))
            raise ValueError("boxes {}, scores {}, labels {}".format(*shapes) + masks + " do not fit together")

    def __len__(self) -> int:
        return len(self.scores)


def mask_to_rle(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> list[Rle]:
    """Masks that were predicted inside boxes, pasted into the image and encoded.

    A pixel is of the mask where the probability at its centre, bilinear between the centres of the mask's cells and
    falling to 0 outside them, reaches the threshold. One mask is worked out at a time, and only inside its box: memory
    is a few bytes a pixel of the largest box, however many there are.

    Args:
        probabilities: (n, M, M), 0 to 1, spread over the whole of each box.
        boxes: (n, 4) x0, y0, x1, y1 in pixels; they may leave the image, and a box of no area has an empty mask.
        size: (height, width) of the image.
        threshold: from 0.5 to 1; below 0.5 a mask could leave its box.

    Source: Mask R-CNN's inference, as detectron2 and mmdetection paste (pixel centres, no rounded boxes).
    """
    height, width = size
    codes = []
    # By numpy: these products are too small for torch's threads, which on a busy machine only wait for each other.
    for mask, (x0, y0, x1, y1) in zip(probabilities.float().cpu().numpy(), boxes.tolist(), strict=True):
        rows, of_rows = _spread(y0, y1, height, mask.shape[0])
        columns, of_columns = _spread(x0, x1, width, mask.shape[1])
        inside = of_columns @ mask.T @ of_rows.T >= threshold  # (columns, rows), as codes run
        codes.append(_encoded(inside, columns.start, rows.start, size))
    return codes


def _encoded(inside: NDArray[np.bool_], left: int, top: int, size: tuple[int, int]) -> Rle:
    """The code of a mask (columns, rows) that stands somewhere in an image of (height, width)."""
    height, width = size
    padded = np.zeros((inside.shape[0], inside.shape[1] + 2), np.int8)
    padded[:, 1:-1] = inside
    columns, rows = np.nonzero(np.diff(padded, axis=1))
    turns = (left + columns) * height + top + rows  # where a run of ones begins, ends, begins, ...
    # One that ends with its column goes on where the next column begins with one.
    same = np.flatnonzero(turns[1:] == turns[:-1])
    turns = np.delete(turns, np.concatenate([same, same + 1]))
    ends = turns if len(turns) and turns[-1] == height * width else np.append(turns, height * width)
    counts = np.diff(ends, prepend=0).tolist()
    return _as_text(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))


def _spread(start: float, stop: float, length: int, cells: int) -> tuple[slice, NDArray[np.float32]]:
    """The pixels of one axis between two places, and what each cell there adds to each of them: (pixels, cells)."""
    if not (isfinite(start) and isfinite(stop) and stop > start):
        return slice(0, 0), np.zeros((0, cells), np.float32)
    first = min(max(ceil(start - 0.5), 0), length)
    last = max(min(floor(stop - 0.5) + 1, length), first)
    places = (np.arange(first, last) + 0.5 - start) / (stop - start) * cells - 0.5
    weights = (1 - np.abs(places[:, None] - np.arange(cells))).clip(0)
    return slice(first, last), weights.astype(np.float32)


def rle_of(segmentation: object, size: tuple[int, int]) -> Rle:
    """The code of a segmentation in any of COCO's three forms.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], of which those of fewer than three points are left out; or a
            code whose counts are numbers or text.
        size: (height, width) of the image.

    Raises:
        ValueError: it is none of these, has no polygon, or is of another size.
    """
    height, width = size
    if isinstance(segmentation, list):
        polygons = [p for p in segmentation if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
        if not polygons:
            raise ValueError("has no polygon of three points or more")
        try:
            return _as_text(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
        except (TypeError, ValueError):
            raise ValueError("has a polygon that is not of numbers") from None
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), str | bytes | list):
        raise ValueError("is neither polygons nor a run-length code")
    if segmentation.get("size") != [height, width] and segmentation.get("size") != (height, width):
        raise ValueError(f"is of size {segmentation.get('size')}, but the image is of {[height, width]}")
    if not isinstance(segmentation["counts"], list):
        return _as_text(segmentation)
    counts = segmentation["counts"]
    if not all(isinstance(run, int) and run >= 0 for run in counts) or sum(counts) != height * width:
        raise ValueError("has runs that do not fill the image")
    return _as_text(coco_mask.frPyObjects(segmentation, height, width))


def _as_text(code: Rle) -> Rle:
    """A code that JSON can hold."""
    counts = code["counts"]
    return {
        "size": [int(side) for side in code["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def coco_results(image_id: ImageId, found: Found, category_ids: Sequence[ImageId]) -> list[Result]:
    """What was found in an image as COCO's results: a dict for each object.

    Args:
        image_id: the image's in the annotations.
        found: n objects.
        category_ids: of each category in the order of the detector's labels.
    """
    sizes = torch.cat([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], dim=1)  # x, y, width, height
    results = [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(value, _BOX_DECIMALS) for value in box],
            "score": round(score, _SCORE_DECIMALS),
        }
        for box, score, label in zip(sizes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ]
    if found.masks is not None:
        for result, mask in zip(results, found.masks, strict=True):
            result["segmentation"] = _as_text(mask)
    return results


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write results as COCO's tools read them, a line for each; the file appears whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write("[")
            for number, result in enumerate(results):
                file.write((",\n" if number else "\n") + json.dumps(result, allow_nan=False))
            file.write("\n]\n")

    write_atomically(path, write)
