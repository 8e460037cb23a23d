"""A detector asked about files, and judged by COCO's measure."""

import json
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lomar.commands.automatic import find_hardware
from lomar.commands.detect_settling import check_size, pixel_format
from lomar.commands.judging import EVALUATION_FILE, default_workers
from lomar.commands.progress import watched
from lomar.data.coco import CocoImages, Instances
from lomar.data.decode import PixelFormat, read_image
from lomar.data.detection import whole_images
from lomar.data.sources import ImageSource
from lomar.detection.detector import Detector
from lomar.detection.judging import Judgement, judge, rows_of, write_categories
from lomar.detection.regions import Detected
from lomar.detection.results import Found, Result, coco_results, mask_to_rle, rle_of
from lomar.errors import BadImageError
from lomar.figures.detections import Objects, detections_sheet
from lomar.files import write_atomically, write_text
from lomar.interop.detectors import load_detector

CATEGORIES_FILE = "categories.csv"
RESULTS_FILE = "results.json"
SHOWN_SCORE = 0.5  # of a detection that is drawn, at least


class DetectingSession:
    """A detector on a device, asked about files.

    Args:
        model: a run of `lomar detect`, or a detector's file.
        image_size: side of the square that images are fitted into, in pixels; None is that of training.
        device, precision: "auto", or what to take.

    Raises:
        UserError: there is no such model, or it does not take the size.
    """

    def __init__(self, model: str, image_size: int | None, device: str, precision: str) -> None:
        self.detector = load_detector(model)
        self.size_px = image_size or self.detector.plan.image_size
        check_size(self.size_px, self.detector.plan.architecture["patch_size"])
        hardware = find_hardware(device)
        self.device = torch.device(hardware.device)
        self.bf16 = precision == "bf16" or (precision == "auto" and hardware.bf16)
        self.workers = default_workers(hardware)
        self.detector.to(self.device)

    def found(
        self, source: ImageSource, batch_size: int, workers: int | None, told: NDArray[np.int64] | None = None
    ) -> Generator[Found | None, None, None]:
        """What is in each image in order; None where a file cannot be read. Arguments as of `found_in`."""
        workers = self.workers if workers is None else workers
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            yield from found_in(
                self.detector, source, self.size_px, self.device, batch_size, workers, told, what="looking for objects"
            )


def found_in(
    detector: Detector,
    source: ImageSource,
    size_px: int,
    device: torch.device,
    batch_size: int,
    workers: int,
    told: NDArray[np.int64] | None = None,
    what: str = "",
) -> Generator[Found | None, None, None]:
    """What a detector finds in each image in order; None where a file cannot be read.

    Args:
        detector: on the device; it is left in evaluation mode.
        source: the images.
        size_px: side of the square that they are fitted into.
        device: where to compute.
        batch_size: images at once.
        workers: processes that read; 0 reads in this one.
        told: (N, 2), heights and widths that annotations are for; an image of another size counts as unreadable.
        what: is going on, for a bar of progress; "" for none.
    """
    detector.eval()
    batches = whole_images(source, pixel_format(detector.plan), size_px, workers, batch_size, told_sizes=told)
    pairs = ((each, each.good) for each in batches)
    with closing(batches):
        for batch, good in watched(pairs, what, len(source)) if what else pairs:
            answers = (
                iter(detector.detect(batch.pixels[good].to(device), batch.sizes[good])) if good.any() else iter(())
            )
            for size, original, readable in zip(batch.sizes, batch.originals, good.tolist(), strict=True):
                yield _found(next(answers), size, original) if readable else None


def _found(answer: Detected, size: torch.Tensor, original: torch.Tensor) -> Found:
    """In the pixels of the file."""
    height, width = (int(side) for side in original)
    grown = (original / size).flip(0).repeat(2).float()  # of x, y, x, y
    boxes = answer.boxes.float().cpu() * grown
    masks = None if answer.masks is None else mask_to_rle(answer.masks.float().cpu(), boxes, (height, width))
    return Found(boxes, answer.scores.float().cpu(), answer.labels.cpu(), masks)


def results_of(images: CocoImages, found: Iterable[Found | None], category_ids: Iterable[Any]) -> list[Result]:
    """COCO's results of images with annotations; nothing of those that could not be read."""
    ids = list(category_ids)
    pairs = zip(images.image_ids, found, strict=True)
    return [result for image_id, each in pairs if each is not None for result in coco_results(image_id, each, ids)]


def judged(images: CocoImages, results: list[Result], masks: bool) -> Judgement:
    """Average precision of results, whose categories are places in the classes, counted from 1."""
    return judge(_ground_truth(images, masks), results, ("bbox", "segm") if masks else ("bbox",))


def _ground_truth(images: CocoImages, masks: bool) -> dict[str, Any]:
    """Annotations as COCO's tools have them, of these images alone."""
    annotations: list[dict[str, Any]] = []
    for index, image_id in enumerate(images.image_ids):
        objects = images.instances(index)
        height, width = (int(side) for side in images.sizes[index])
        for place in range(len(objects)):
            left, top, right, bottom = objects.boxes[place].tolist()
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": int(objects.labels[place]) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": int(objects.crowd[place]),
            }
            if objects.areas[place] >= 0:  # else judging takes the segmentation's, or the box's
                annotation["area"] = float(objects.areas[place])
            if masks:
                annotation["segmentation"] = rle_of(_as_coco(objects, place), (height, width))
            annotations.append(annotation)
    sizes = images.sizes.tolist()
    return {
        "images": [{"id": i, "height": h, "width": w} for i, (h, w) in zip(images.image_ids, sizes, strict=True)],
        "annotations": annotations,
        "categories": [{"id": place, "name": name} for place, name in enumerate(images.categories, start=1)],
    }


def _as_coco(objects: Instances, place: int) -> Any:
    """An object's segmentation as COCO's files have it; of a crowd without one, its box."""
    segmentation = objects.segmentations[place]
    if isinstance(segmentation, dict):
        return segmentation | {"counts": np.asarray(segmentation["counts"]).tolist()}
    if segmentation is None:
        left, top, right, bottom = objects.boxes[place].tolist()
        return [[left, top, right, top, right, bottom, left, bottom]]
    return [polygon.flatten().tolist() for polygon in segmentation]


def drawable(objects: Instances, size: tuple[int, int], masks: bool) -> Objects:
    """Annotations of an image of (height, width), as pictures take them."""
    codes = [rle_of(_as_coco(objects, place), size) for place in range(len(objects))] if masks else None
    return Objects(objects.boxes, objects.labels, None, codes)


def drawn(found: Found, least: float) -> Objects:
    """What was found with at least a score, as pictures take it."""
    kept = (found.scores >= least).numpy()
    masks = None if found.masks is None else [mask for mask, good in zip(found.masks, kept, strict=True) if good]
    return Objects(found.boxes.numpy()[kept], found.labels.numpy()[kept], found.scores.numpy()[kept], masks)


def write_judgement(folder: Path, judgement: Judgement, about: dict[str, Any]) -> list[Path]:
    """Write evaluation.json and the table of categories; returns where they are."""
    numbers = {name: round(value, 6) for name, value in rows_of(judgement).items()}
    text = json.dumps({**about, "images": judgement.images, "found": judgement.found, **numbers}, indent=1)
    written = [folder / EVALUATION_FILE, folder / CATEGORIES_FILE]
    write_text(written[0], text + "\n")
    write_categories(written[1], judgement)
    return written


def draw_judged(path: Path, images: CocoImages, found: Sequence[Found | None], masks: bool) -> bool:
    """A picture of images with their objects beside what was found; whether any can be read and shown as colours."""
    rows = []
    for index, each in enumerate(found):
        if each is None:
            continue
        try:
            pixels = seen(images.source, index)
        except BadImageError:
            continue
        objects = images.instances(index)
        size = int(images.sizes[index][0]), int(images.sizes[index][1])
        rows.append((pixels, drawable(objects, size, masks), drawn(each, SHOWN_SCORE)))
    if not rows:
        return False
    caption = f"{len(rows)} of the images that judge; found with a score of {SHOWN_SCORE} or more."
    sheet = detections_sheet(rows, images.categories, caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))
    return True


def seen(source: ImageSource, index: int) -> NDArray[np.uint8]:
    """An image of one or three channels as uint8 (height, width, 3), for a picture.

    Raises:
        BadImageError: it cannot be read, or has channels that are no colours.
    """
    image = read_image(source.read(index), source.name(index))
    if image.channels not in (1, 3):
        raise BadImageError(f"{image.channels} channels cannot be shown as colours")
    size = image.height, image.width
    pixels = image.crop((0, 0, *size), size, PixelFormat(image.channels, "uint8"))
    return np.ascontiguousarray(pixels.repeat(3 // image.channels, axis=0).transpose(1, 2, 0))
