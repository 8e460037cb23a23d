"""Batches for a detector: images and their objects, jittered in scale, deterministic and resumable as in pretraining.

Each draw depends on (seed, epoch, image) alone. An image is resized, cropped and mirrored once, as a whole, and its
polygons go the same way as coordinates, so that boxes and masks stay where the pixels are.

Images are upright, as everywhere in lomar; one whose upright size is not the one that its annotations are for is
treated as a file that cannot be read, since nothing says where its objects are.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset

from lomar.data.coco import CocoImages
from lomar.data.decode import Image, PixelFormat, Size, read_image
from lomar.data.loader import Batching, MicroBatch, SampleKey, batches_of, first_readable
from lomar.data.order import Order
from lomar.data.sources import ImageSource
from lomar.data.workers import loaded
from lomar.errors import BadImageError
from lomar.seeding import seeded

_LITTLE_PX = 1e-6


@dataclass(frozen=True)
class Jitter:
    """Large-scale jitter: an image is brought to a random share of a square, and cropped to it where it is larger.

    Args:
        size_px: side of the square.
        scale: smallest and largest share; the longer side of the image becomes so much of `size_px`.
        flip: probability that an image is mirrored.
        flip_first: whether it is mirrored before it is cropped, as in detectron2, or after, as in the ViTAE port.
        shared_offset: whether one number places the crop on both axes, as in detectron2, or one each.
        boxes_from_masks: whether boxes are drawn anew around what the crop leaves of the masks, or are cropped
            themselves; they are wherever there are no masks.
        filter_below_px: objects whose box is not wider and higher are left out.

    Source: SPEC E.1 and E.2. Resized sizes are rounded to the nearest; the port rounds halves up, and the side that is
    drawn down.
    """

    size_px: int
    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    flip_first: bool = True
    shared_offset: bool = True
    boxes_from_masks: bool = True
    filter_below_px: float = 1e-5

    def placed(self, height: int, width: int, generator: torch.Generator) -> "Placing":
        """Where an image of a size goes, at random."""
        scale, down, right, mirrored = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        side = self.size_px * (self.scale[0] + (self.scale[1] - self.scale[0]) * scale)
        resized = fitted(height, width, side)
        rows, columns = (min(length, self.size_px) for length in resized)
        spare = (resized[0] - rows, resized[1] - columns)
        if self.shared_offset:
            top, left = (round(length * down) for length in spare)
        else:
            top, left = (math.floor((length + 1) * u) for length, u in zip(spare, (down, right), strict=True))
        flipped = mirrored < self.flip
        if flipped and self.flip_first:
            left = spare[1] - left  # counted from the other side
        return Placing((height, width), resized, (top, left), (rows, columns), flipped)


def fitted(height: int, width: int, side: float) -> Size:
    """(rows, columns) in pixels of an image whose longer side becomes `side`; at least one each."""
    longer = max(height, width)
    return max(1, round(height * side / longer)), max(1, round(width * side / longer))


def resized_whole(image: Image, size: Size, fmt: PixelFormat) -> np.ndarray:
    """The pixels (C, rows, columns) of an image brought to a size, bilinear with antialiasing as detectron2 does it.

    Twice that size is what a JPEG's decoder may shrink to: less would be softer, and half a pixel off at the end.

    Raises:
        BadImageError: the image is damaged, or cannot be brought to this format.
    """
    return image.crop((0, 0, image.height, image.width), size, fmt, finer=2, bilinear=True)


@dataclass(frozen=True)
class Placing:
    """An image resized, then cropped, then mirrored or not.

    Args:
        original: (height, width) of the image in pixels.
        resized: (rows, columns) it is resized to.
        corner: (top, left) of the crop.
        size: (rows, columns) of the crop.
        flipped: whether the crop is mirrored.
    """

    original: Size
    resized: Size
    corner: Size
    size: Size
    flipped: bool

    def pixels(self, image: Image, fmt: PixelFormat) -> np.ndarray:
        """The crop (C, rows, columns) of an image.

        Raises:
            BadImageError: the image is damaged, or cannot be brought to this format.
        """
        (top, left), (rows, columns) = self.corner, self.size
        crop = resized_whole(image, self.resized, fmt)[:, top : top + rows, left : left + columns]
        return crop[:, :, ::-1] if self.flipped else crop

    def points(self, points: np.ndarray) -> np.ndarray:
        """(n, 2) of x and y in the image -> float64 (n, 2) in the crop, or outside of it."""
        scale = (self.resized[1] / self.original[1], self.resized[0] / self.original[0])
        moved = points.astype(np.float64) * scale - (self.corner[1], self.corner[0])
        if self.flipped:
            moved[:, 0] = self.size[1] - moved[:, 0]
        return moved

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """(n, 4) in the image -> float64 (n, 4) in the crop, clipped to it."""
        corners = self.points(boxes.reshape(-1, 2)).reshape(-1, 2, 2)
        limits = (self.size[1], self.size[0])
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).clip(0, limits * 2)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """(height, width) of the image -> (rows, columns) of the crop: of each pixel the one below its middle."""
        rows, columns = (
            ((np.arange(length) + start + 0.5) * (old / new)).astype(np.int64).clip(0, old - 1)
            for length, start, old, new in zip(self.size, self.corner, self.original, self.resized, strict=True)
        )
        return mask[rows][:, columns[::-1] if self.flipped else columns]


class _Window(NamedTuple):
    """The part of a mask in which there is something: uint8 (h, w), and where its first pixel lies."""

    top: int
    left: int
    mask: np.ndarray


class _Objects(NamedTuple):
    """What a crop shows.

    Args:
        boxes: float64 (n, 4) in pixels of the crop.
        labels: int64 (n,).
        masks: one a box, if they are asked for.
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: list[_Window]


def _objects(images: CocoImages, index: int, jitter: Jitter, placing: Placing, with_masks: bool) -> _Objects:
    """The objects of an image that can be seen in a crop; no crowds.

    Where masks are asked for, an object without a pixel of its own is not seen.
    """
    told = images.instances(index)
    cropped = placing.boxes(told.boxes)
    boxes, labels, masks = [], [], []
    for place in np.flatnonzero(~told.crowd).tolist():
        segmentation, box = told.segmentations[place], cropped[place]
        window: _Window | None = None
        if isinstance(segmentation, dict) and (with_masks or jitter.boxes_from_masks):
            window = _filled(placing.mask(_of_runs(segmentation)), 0, 0)
            around = np.zeros(4) if window is None else _around(window)
        elif isinstance(segmentation, list) and (with_masks or jitter.boxes_from_masks):
            polygons = [placing.points(points) for points in segmentation]
            around = bounds(polygons, placing.size)
            window = _drawn(polygons, around) if with_masks else None
        else:
            around = box
        box = around if jitter.boxes_from_masks else box
        # As float32, in which it will be used: a sliver at the far side may have no width left there.
        sides = box[2:].astype(np.float32) - box[:2].astype(np.float32)
        if sides.min() <= jitter.filter_below_px or (with_masks and window is None):
            continue
        boxes.append(box)
        labels.append(told.labels[place])
        masks += [window] if window and with_masks else []
    return _Objects(np.array(boxes).reshape(-1, 4), np.array(labels, dtype=np.int64), masks)


def bounds(polygons: Sequence[np.ndarray], size: Size) -> np.ndarray:
    """The box around what a crop leaves of polygons.

    It is around what is inside of the crop of their edges, and the crop's corners that are inside of them.

    Args:
        polygons: (n, 2) each, of x and y in pixels of the crop.
        size: (rows, columns) of the crop.

    Returns:
        float64 (4,): left, top, right, bottom; zeros where nothing is left.
    """
    found = []
    for points in polygons:
        low, high = points.min(axis=0), points.max(axis=0)
        if (low >= 0).all() and high[0] <= size[1] and high[1] <= size[0]:
            found += [low, high]
        elif (high > 0).all() and low[0] < size[1] and low[1] < size[0]:
            inside = _inside(points, size)
            found += [inside.min(axis=0), inside.max(axis=0)] if len(inside) else []
    return np.concatenate([np.min(found, axis=0), np.max(found, axis=0)]) if found else np.zeros(4)


def _inside(points: np.ndarray, size: Size) -> np.ndarray:
    """(k, 2): the ends of a polygon's edges within a crop, and the crop's corners within the polygon."""
    limits = np.array([size[1], size[0]], dtype=np.float64)
    begin, end = points, np.roll(points, -1, axis=0)
    way = end - begin
    # The share of the way at which an edge crosses the crop's sides, on each axis: it enters at the lower one.
    level = way == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        crossed = np.sort(np.stack([-begin / way, (limits - begin) / way]), axis=0)  # (2, n, 2)
    between = (begin >= 0) & (begin <= limits)
    enters = np.where(level, np.where(between, 0, 2), crossed[0]).max(axis=1).clip(min=0)  # (n,)
    leaves = np.where(level, np.where(between, 1, -1), crossed[1]).min(axis=1).clip(max=1)
    kept = enters < leaves  # to touch a corner is not to be inside
    parts = [begin[kept] + share[kept, None] * way[kept] for share in (enters, leaves)]

    corners = np.array([[x, y] for x in (0.0, limits[0]) for y in (0.0, limits[1])])
    # A little inside, since one that lies on an edge is on no side of it.
    x, y = np.split(corners + np.where(corners > 0, -_LITTLE_PX, _LITTLE_PX), 2, axis=1)  # (4, 1) each
    passes = (begin[:, 1] > y) != (end[:, 1] > y)  # (4, n): edges that a ray to the right may meet
    with np.errstate(divide="ignore", invalid="ignore"):
        meets = passes & (x < way[:, 0] * (y - begin[:, 1]) / way[:, 1] + begin[:, 0])
    return np.concatenate([*parts, corners[meets.sum(axis=1) % 2 == 1]]).clip(0, limits)


def _drawn(polygons: Sequence[np.ndarray], around: np.ndarray) -> _Window | None:
    """Polygons as COCO draws them, within the box around them; None where no pixel is theirs."""
    left, top = (math.floor(side) for side in around[:2])
    right, bottom = (math.ceil(side) for side in around[2:])
    if right <= left or bottom <= top:
        return None
    flat = []
    for points in polygons:
        # Rounded since COCO draws at fifths of a pixel: at a half of these float32 must not decide.
        moved = np.round(points - (left, top), 3)
        if (moved.max(axis=0) > 0).all() and (moved.min(axis=0) < (right - left, bottom - top)).all():
            flat.append(moved.ravel())
    if not flat:
        return None
    height, width = bottom - top, right - left
    mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, height, width)))
    return _Window(top, left, mask) if mask.any() else None


def _of_runs(told: dict[str, Any]) -> np.ndarray:
    """uint8 (height, width) of an uncompressed RLE, whose runs go down the columns."""
    height, width = told["size"]
    counts = told["counts"]
    return np.repeat((np.arange(len(counts)) % 2).astype(np.uint8), counts).reshape(width, height).T


def _filled(mask: np.ndarray, top: int, left: int) -> _Window | None:
    """The part of a mask in which there is something; None where there is nothing."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _Window(top + int(rows[0]), left + int(columns[0]), part)


def _around(window: _Window) -> np.ndarray:
    """float64 (4,): the box around a window's pixels."""
    height, width = window.mask.shape
    return np.array([window.left, window.top, window.left + width, window.top + height], dtype=np.float64)


class _Sample(NamedTuple):
    pixels: np.ndarray  # (C, rows, columns)
    objects: _Objects


@dataclass(frozen=True)
class _Jittered(Dataset[MicroBatch]):
    """Samples of the stream: images in squares with their objects."""

    images: CocoImages
    order: Order
    fmt: PixelFormat
    jitter: Jitter
    depth: int
    seed: int
    with_masks: bool
    last_slot: int

    def __getitems__(self, keys: list[SampleKey]) -> MicroBatch:
        """A whole micro-batch, so that pixels and masks are copied once, into their places."""
        bad: list[tuple[str, str]] = []
        source, side = self.images.source, self.jitter.size_px
        pixels = np.zeros((len(keys), self.fmt.channels, side, side), dtype=self.fmt.dtype)
        sizes = np.zeros((len(keys), 2), dtype=np.int64)
        names, found = [], []
        for place, key in enumerate(keys):
            sample, index = first_readable(source, self.order, key, bad, partial(self._sample, key))
            rows, columns = sizes[place] = sample.pixels.shape[1:]
            pixels[place, :, :rows, :columns] = sample.pixels
            names.append(source.name(index))
            found.append(sample.objects)
        inputs = {
            "pixels": torch.from_numpy(pixels),
            "sizes": torch.from_numpy(sizes),
            "boxes": torch.from_numpy(np.concatenate([objects.boxes for objects in found]).astype(np.float32)),
            "labels": torch.from_numpy(np.concatenate([objects.labels for objects in found])),
            "counts": torch.tensor([len(objects.labels) for objects in found]),
            "seeds": torch.tensor([self._chance(key, "proposals").initial_seed() % 2**62 for key in keys]),
        }
        if self.with_masks:
            inputs["masks"] = _pasted([window for objects in found for window in objects.masks], side)
        if self.depth:
            inputs["paths"] = torch.stack([torch.rand(self.depth, 2, generator=self._chance(k, "paths")) for k in keys])
        return MicroBatch(inputs, names, bad, keys[-1].slot == self.last_slot)

    def _chance(self, key: SampleKey, purpose: str) -> torch.Generator:
        return seeded(self.seed, key.epoch, key.index, purpose)

    def _sample(self, key: SampleKey, index: int) -> _Sample:
        """Raises BadImageError: the image is damaged, or not of the size that its annotations are for."""
        image = read_image(self.images.source.read(index), self.images.source.name(index))
        require_size(image, self.images.sizes[index])
        placing = self.jitter.placed(image.height, image.width, self._chance(key, "crop"))
        pixels = placing.pixels(image, self.fmt)
        return _Sample(pixels, _objects(self.images, index, self.jitter, placing, self.with_masks))


def require_size(image: Image, size: np.ndarray) -> None:
    """Raises BadImageError: the image is not of the (height, width) that its annotations are for."""
    height, width = size.tolist()
    if (image.height, image.width) != (height, width):
        turned = ", as it is when it is not turned upright" if (image.width, image.height) == (height, width) else ""
        raise BadImageError(
            f"{image.height} x {image.width} pixels, but its annotations are for {height} x {width}{turned}"
        )


def _pasted(windows: Sequence[_Window], side: int) -> Tensor:
    """uint8 (M, side, side)."""
    masks = np.zeros((len(windows), side, side), dtype=np.uint8)
    for mask, window in zip(masks, windows, strict=True):
        height, width = window.mask.shape
        mask[window.top : window.top + height, window.left : window.left + width] = window.mask
    return torch.from_numpy(masks)


def detection_batches(
    images: CocoImages,
    fmt: PixelFormat,
    jitter: Jitter,
    *,
    depth: int,
    batching: Batching,
    with_masks: bool = True,
) -> Generator[MicroBatch, None, None]:
    """One process's micro-batches of global batches first_batch up to total_batches, in order.

    Inputs are, of B images with M objects in all, S the jitter's side:

    - "pixels" (B, C, S, S) of fmt.dtype, zero right of and below the image,
    - "sizes" int64 (B, 2), rows and columns that are the image's,
    - "boxes" float32 (M, 4), left, top, right, bottom in pixels, those of the first image first,
    - "labels" int64 (M,), places in the categories,
    - "counts" int64 (B,), objects of each image, which may be none,
    - "masks" uint8 (M, S, S) of 0 and 1, where they are asked for,
    - "seeds" int64 (B,), below 2 ** 62, for what is drawn later of each image,
    - "paths" (B, depth, 2), uniform numbers for drop path, where `depth` is not 0.

    Args:
        images: the images, best those that `CocoImages.trainable` gives.
        fmt: what their pixels become.
        jitter: what is done to them.
        depth: blocks that need numbers for drop path.
        batching: which samples, in what parts.
        with_masks: whether masks are drawn.

    Raises:
        UserError: one bad file after another.
        ValueError: fewer samples in a batch than processes, or masks of data that has none.
    """
    if with_masks and not images.has_masks:
        raise ValueError(f"masks are asked for, but {images.path} has none")

    def jittered(order: Order, last_slot: int) -> Dataset[MicroBatch]:
        return _Jittered(images, order, fmt, jitter, depth, batching.seed, with_masks, last_slot)

    return batches_of(images.source, jittered, batching)


class WholeImages(NamedTuple):
    """Images as a detector judges them.

    Args:
        pixels: (B, C, S, S), zero right of and below the image, and where a file cannot be read.
        sizes: int64 (B, 2), rows and columns that are the image's.
        originals: int64 (B, 2), height and width of the file's upright image in pixels.
        good: bool (B,), False where a file cannot be read; its sizes are zero.
    """

    pixels: Tensor
    sizes: Tensor
    originals: Tensor
    good: Tensor


@dataclass(frozen=True)
class _Whole(Dataset[WholeImages]):
    source: ImageSource
    fmt: PixelFormat
    size_px: int
    told: np.ndarray | None

    def __getitems__(self, indices: list[int]) -> WholeImages:
        pixels = np.zeros((len(indices), self.fmt.channels, self.size_px, self.size_px), dtype=self.fmt.dtype)
        sizes, originals = (torch.zeros((len(indices), 2), dtype=torch.int64) for _ in range(2))
        good = torch.zeros(len(indices), dtype=torch.bool)
        for place, index in enumerate(indices):
            try:
                image = read_image(self.source.read(index), self.source.name(index))
                if self.told is not None:
                    require_size(image, self.told[index])
                rows, columns = fitted(image.height, image.width, self.size_px)
                resized = resized_whole(image, (rows, columns), self.fmt)
            except (BadImageError, OSError):
                continue
            pixels[place, :, :rows, :columns] = resized
            sizes[place] = torch.tensor((rows, columns))
            originals[place] = torch.tensor((image.height, image.width))
            good[place] = True
        return WholeImages(torch.from_numpy(pixels), sizes, originals, good)


def whole_images(
    source: ImageSource,
    fmt: PixelFormat,
    size_px: int,
    workers: int,
    batch_size: int = 1,
    indices: Sequence[int] | None = None,
    told_sizes: np.ndarray | None = None,
) -> Generator[WholeImages, None, None]:
    """Images in order, the longest side of each brought to a size, for evaluation and prediction.

    Args:
        source: the images.
        fmt: what their pixels become.
        size_px: side of the square that an image is laid in, at its top left.
        workers: loading processes; 0 loads in this one.
        batch_size: images of a batch; the last batch may be smaller.
        indices: which images; all if None.
        told_sizes: int64 (N, 2), the sizes that annotations are for, of all images of the source; an image of another
            size counts as one that cannot be read.
    """
    chosen = range(len(source)) if indices is None else indices
    batches = (list(chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size))
    return loaded(_Whole(source, fmt, size_px, told_sizes), batches, workers, pin_memory=False)
