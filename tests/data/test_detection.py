"""Claims about the batches that a detector learns from, and about the images that judge it."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.ndimage import binary_erosion

from lomar.data.coco import CocoImages, judging_images
from lomar.data.decode import PixelFormat
from lomar.data.detection import (
    Jitter,
    Placing,
    WholeImages,
    _objects,
    bounds,
    detection_batches,
    fitted,
    whole_images,
)
from lomar.data.loader import Batching, MicroBatch
from lomar.data.opening import open_source
from lomar.data.sources import ImageSource
from lomar.errors import UserError

RGB8 = PixelFormat(3, "uint8")
DETECTRON = Jitter(61)
PORT = Jitter(61, flip_first=False, shared_offset=False, filter_below_px=0.01)
CENTRED = Jitter(61, scale=(1.0, 1.0), flip=0.0)  # no chance in it
COLOUR = (230, 40, 60)
SQUARE = np.ones((3, 3))


def ellipse(x: float, y: float, across: float, down: float, points: int = 24) -> np.ndarray:
    """(points, 2) on it, around (x, y)."""
    angles = np.arange(points) * 2 * np.pi / points
    return np.stack([x + across * np.cos(angles), y + down * np.sin(angles)], axis=1)


def rectangle(x: float, y: float, across: float, down: float) -> np.ndarray:
    """(4, 2): its corners, around (x, y)."""
    return np.array([[x - across, y - down], [x + across, y - down], [x + across, y + down], [x - across, y + down]])


def drawn(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """bool (height, width), as pycocotools draws it."""
    told = coco_mask.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width)
    return coco_mask.decode(coco_mask.merge(told)).astype(bool)


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.T.ravel().astype(int)
    counts = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


class Scene:
    """Images with objects, written as COCO data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.told: dict[str, Any] = {"images": [], "annotations": [], "categories": []}

    def add(self, pixels: np.ndarray, *masks: Any, ending: str = "png", **words: Any) -> None:
        """An image, and an object of a class of its own for each list of polygons or mask; None for one without."""
        number = len(self.told["images"]) + 1
        name = f"{number:02}.{ending}"
        height, width = pixels.shape[:2]
        Image.fromarray(pixels).save(self.folder / name, **words)
        self.told["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        for mask in masks:
            self.object(number, mask, height, width)

    def object(self, image: int, mask: Any, height: int, width: int, **changes: Any) -> None:
        number = len(self.told["annotations"]) + 1
        self.told["categories"].append({"id": number, "name": f"class {number}"})
        if isinstance(mask, list):
            low, high = (pick([pick(part, axis=0) for part in mask], axis=0) for pick in (np.min, np.max))
            segmentation: Any = [part.ravel().tolist() for part in mask]
        else:
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            low, high = np.array([columns[0], rows[0]]), np.array([columns[-1] + 1, rows[-1] + 1])
            segmentation = uncompressed(mask)
        told = {"id": number, "image_id": image, "category_id": number, "iscrowd": 0, "segmentation": segmentation}
        self.told["annotations"].append(told | {"bbox": [*low.tolist(), *(high - low).tolist()]} | changes)

    def images(self, **words: Any) -> CocoImages:
        file = self.folder / "told.json"
        file.write_text(json.dumps(self.told))
        return judging_images(str(file), **words)[0]


def painted(height: int, width: int, masks: list[np.ndarray], colour: tuple[int, ...] = COLOUR) -> np.ndarray:
    """(height, width, 3): gray, and the colour where a mask is."""
    pixels = np.full((height, width, 3), 90, dtype=np.uint8)
    for mask in masks:
        pixels[mask] = colour
    return pixels


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> CocoImages:
    """Seven images of 31 x 43 and 47 x 37 pixels, of 0 to 6 objects, by polygons and RLE; image i is of gray 20 i."""
    scene = Scene(tmp_path_factory.mktemp("scene"))
    rng = np.random.default_rng(0)
    for i in range(7):
        height, width = ((31, 43), (47, 37))[i % 2]
        shapes = [[ellipse(*rng.uniform(6, 30, 2), *rng.uniform(3, 9, 2))] for _ in range(i)]
        masks = [shape if k % 3 else drawn(shape, height, width) for k, shape in enumerate(shapes)]
        scene.add(np.full((height, width, 3), 20 * i, dtype=np.uint8), *masks)
    return scene.images()


def batches(images: CocoImages, jitter: Jitter = DETECTRON, fmt: PixelFormat = RGB8, **words: Any) -> list[MicroBatch]:
    told = {name: words.pop(name) for name in ("depth", "with_masks") if name in words}
    batching = Batching(**({"seed": 5, "batch_size": 6, "micro_batch": 6, "total_batches": 4} | words))
    return list(detection_batches(images, fmt, jitter, **({"depth": 0} | told), batching=batching))


def samples(found: list[MicroBatch]) -> list[dict[str, torch.Tensor]]:
    """What each image of some batches has, by name."""
    parts = []
    for micro in found:
        counts = micro.inputs["counts"].tolist()
        assert all(sum(counts) == len(micro.inputs[name]) for name in ("boxes", "labels", "masks"))
        of_objects = {name: micro.inputs[name].split(counts) for name in ("boxes", "labels", "masks")}
        of_images = {name: values for name, values in micro.inputs.items() if name not in of_objects}
        for place in range(len(counts)):
            parts.append({name: values[place] for name, values in (of_objects | of_images).items()})
    return parts


# Boxes, masks and pixels

shape = st.tuples(*[st.floats(0, 80)] * 2, *[st.floats(3, 30)] * 2)
jitters = st.sampled_from([DETECTRON, PORT])


def box_around(mask: torch.Tensor) -> list[float]:
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return [float(end) for end in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


@given(
    shapes=st.lists(shape, min_size=1, max_size=3),
    kind=st.sampled_from(["rectangles", "ellipses", "runs"]),
    jitter=jitters,
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_boxes_are_those_around_their_masks(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[float, ...]], kind: str, jitter: Jitter, seed: int
) -> None:
    """At any scale, crop and flip: within a pixel, but for what is too thin to have a pixel; those of RLE exactly."""
    scene = Scene(tmp_path_factory.mktemp("boxes"))
    polygons = [[rectangle(*each) if kind == "rectangles" else ellipse(*each)] for each in shapes]
    polygons = [polygon for polygon in polygons if drawn(polygon, 79, 83).any()]
    assume(polygons)
    masks: list[Any] = [drawn(polygon, 79, 83) for polygon in polygons] if kind == "runs" else polygons
    scene.add(painted(79, 83, []), *masks)
    for sample in samples(batches(scene.images(), jitter, seed=seed, total_batches=1)):
        rows, columns = sample["sizes"].tolist()
        assert not sample["masks"][:, rows:].any() and not sample["masks"][:, :, columns:].any()
        for box, mask in zip(sample["boxes"].numpy(), sample["masks"], strict=True):
            around = np.array(box_around(mask))
            assert (box[2:] > box[:2]).all() and (box >= 0).all() and (box <= [columns, rows] * 2).all()
            if kind == "runs":
                np.testing.assert_array_equal(box, around)
            elif kind == "rectangles":
                np.testing.assert_allclose(box, around, atol=1.001)
            else:
                assert (around[:2] >= box[:2] - 1.001).all() and (around[2:] <= box[2:] + 1.001).all()


def of_colour(pixels: torch.Tensor) -> np.ndarray:
    """bool (H, W): nearer to the colour than to gray."""
    near = [((pixels.float() - torch.tensor(value)[:, None, None]) ** 2).sum(dim=0) for value in (COLOUR, (90, 90, 90))]
    return (near[0] < near[1]).numpy()


@given(
    shapes=st.lists(shape, min_size=1, max_size=2),
    kind=st.sampled_from(["polygons", "runs"]),
    file=st.sampled_from([("png", {}), ("jpg", {"quality": 95, "subsampling": 0})]),
    magnified=st.sampled_from([1, 5]),
    jitter=jitters,
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_masks_are_where_the_pixels_are(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[float, ...]],
    kind: str,
    file: tuple[str, dict[str, Any]],
    magnified: int,
    jitter: Jitter,
    seed: int,
) -> None:
    """An object of several parts, in a colour of its own; magnified, so that JPEG's decoder shrinks it."""
    assume(magnified > 1 or len(shapes) == 1)  # where parts nearly touch, large pixels would join them
    height, width = 79 * magnified, 83 * magnified
    polygons = [magnified * ellipse(*each) for each in shapes]
    whole = drawn(polygons, height, width)
    assume(whole.any())
    rim = 1 if magnified > 1 else 2
    scene = Scene(tmp_path_factory.mktemp("pixels"))
    scene.add(painted(height, width, [whole]), polygons if kind == "polygons" else whole, ending=file[0], **file[1])
    for sample in samples(batches(scene.images(), replace(jitter, size_px=101), seed=seed, total_batches=1)):
        seen = of_colour(sample["pixels"])
        rows, columns = sample["sizes"].tolist()
        seen[rows:] = seen[:, columns:] = False
        for mask in sample["masks"]:
            found = mask.numpy().astype(bool)
            # They differ by their rims alone, which are as wide as the pixels that were painted; and where two parts
            # nearly touch.
            assert not (binary_erosion(found, SQUARE, rim) & ~seen).any()
            assert (binary_erosion(seen, SQUARE, rim) & ~found).sum() <= (0 if len(shapes) == 1 else 20)
            if magnified > 1 and len(shapes) == 1 and found.sum() > 40:
                # A shift by a pixel would change two thirds of the rim.
                assert (found ^ seen).sum() < 0.45 * (found & ~binary_erosion(found)).sum()
                assert (found & seen).sum() > (0.9 if found.sum() > 300 else 0.75) * (found | seen).sum()
        if seen.sum() > 40:
            assert len(sample["boxes"])


def test_a_rectangle_by_hand(tmp_path: Path) -> None:
    """30 x 20 pixels at twice the size, cropped to 40 x 40; the object at left 8, top 4, 6 wide and 10 high."""
    rectangle = np.array([[8, 4], [14, 4], [14, 14], [8, 14]], dtype=np.float64)
    scene = Scene(tmp_path)
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:14, 8:14] = True
    scene.add(painted(20, 30, [mask]), [rectangle])
    images = scene.images()
    for flip, box in ((0.0, [16 - 10, 8, 28 - 10, 28]), (1.0, [40 - 18, 8, 40 - 6, 28])):
        placing = Placing((20, 30), (40, 60), (0, 10), (40, 40), bool(flip))
        assert placing.boxes(images.instances(0).boxes).tolist() == [box]
        assert bounds([placing.points(rectangle)], placing.size).tolist() == box
        left, top, right, bottom = box
        expected = np.zeros((40, 40), dtype=bool)
        expected[top:bottom, left:right] = True
        np.testing.assert_array_equal(placing.mask(mask), expected)


def test_a_mask_of_runs_is_made_smaller_by_the_pixels_in_the_middle() -> None:
    mask = np.zeros((6, 9), dtype=np.uint8)
    mask[1, 4] = mask[4, 7] = 1
    assert Placing((6, 9), (2, 3), (0, 0), (2, 3), False).mask(mask).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert Placing((6, 9), (2, 3), (1, 1), (1, 2), True).mask(mask).tolist() == [[1, 0]]


def test_at_its_own_size_a_mask_is_the_one_that_coco_draws(tmp_path: Path) -> None:
    """Also where a corner lies at half of the fifth of a pixel at which COCO draws."""
    rng = np.random.default_rng(1)
    scene = Scene(tmp_path)
    polygons = [[(rng.integers(0, 610, (6, 2)) / 10).clip(0, 61) for _ in range(k % 3 + 1)] for k in range(40)]
    scene.add(painted(61, 61, []), *polygons)
    for sample in samples(batches(scene.images(), CENTRED, batch_size=1, micro_batch=1, total_batches=1)):
        for label, mask in zip(sample["labels"].tolist(), sample["masks"], strict=True):
            np.testing.assert_array_equal(mask.numpy().astype(bool), drawn(polygons[label], 61, 61))
        assert len(sample["labels"]) == len(polygons)


@given(
    points=st.lists(st.tuples(st.integers(-12, 24), st.integers(-12, 24)), min_size=3, max_size=8),
    rows=st.integers(1, 13),
    columns=st.integers(1, 11),
)
@settings(max_examples=200, deadline=None)
def test_bounds_are_those_of_all_points_that_are_inside(points: list[Any], rows: int, columns: int) -> None:
    """Judged by matplotlib, at a grid of points; it may miss what is thin."""
    polygon = np.array(points) + np.array([0.2718, 0.1414])  # touches nothing
    left, top, right, bottom = bounds([polygon], (rows, columns))
    step = 1 / 16
    x, y = np.meshgrid(np.arange(step / 2, columns, step), np.arange(step / 2, rows, step))
    grid = np.stack([x.ravel(), y.ravel()], axis=1)
    inside = grid[_inside_by_parity(polygon, grid)]
    if len(inside):
        assert (inside >= (left - 1e-9, top - 1e-9)).all() and (inside <= (right + 1e-9, bottom + 1e-9)).all()
    edges = np.concatenate([a + np.linspace(0, 1, 400)[:, None] * (b - a) for a, b in _edges(polygon)])
    kept = edges[((edges >= 0) & (edges <= (columns, rows))).all(axis=1)]
    corners = np.array([[x, y] for x in (1e-7, columns - 1e-7) for y in (1e-7, rows - 1e-7)])
    kept = np.concatenate([kept, corners[_inside_by_parity(polygon, corners)], inside])
    if (right - left) * (bottom - top) > 0:
        np.testing.assert_allclose([*kept.min(axis=0), *kept.max(axis=0)], [left, top, right, bottom], atol=0.12)


def _edges(polygon: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(polygon, np.roll(polygon, -1, axis=0), strict=True))


def _inside_by_parity(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """bool (n,): by the sum of the triangles that a polygon's edges make with a far point."""
    far = np.array([-1000.1234, -777.77])
    inside = np.zeros(len(points), dtype=bool)
    for a, b in _edges(polygon):
        inside ^= Outline([far, a, b]).contains_points(points)
    return inside


def test_bounds_do_not_reach_to_where_a_polygon_only_passes_outside() -> None:
    """It leaves at the left side, passes over the top of the crop, and comes back the same way."""
    polygon = np.array(
        [[4, 5], [4, 9], [-2, 9], [-2, 8], [2, 8], [2, 7], [-3, 7], [-3, -2], [5, -2], [5, -1], [-2, -1]]
    )
    polygon = np.concatenate([polygon, [[-2, 5]]]).astype(np.float64)
    assert bounds([polygon], (20, 20)).tolist() == [0, 5, 4, 9]


def test_bounds_of_a_polygon_around_the_crop_are_the_crops() -> None:
    around = np.array([[-5, -5], [30, -5], [30, 30], [-5, 30]], dtype=np.float64)
    assert bounds([around], (11, 13)).tolist() == [0, 0, 13, 11]
    assert bounds([around + 40], (11, 13)).tolist() == [0, 0, 0, 0]


def test_boxes_are_cropped_themselves_where_that_is_wanted_or_there_are_no_masks(tmp_path: Path) -> None:
    """The box that is told is wider than the polygon."""
    scene = Scene(tmp_path)
    scene.add(painted(61, 61, []), [ellipse(30, 30, 5, 5)])
    scene.told["annotations"][0]["bbox"] = [10, 20, 100, 20]
    told = {"batch_size": 1, "micro_batch": 1, "total_batches": 1}
    cropped = [[10, 20, 61, 40]]
    assert (
        batches(scene.images(), replace(CENTRED, boxes_from_masks=False), **told)[0].inputs["boxes"].tolist() == cropped
    )
    found = batches(scene.images(box_only=True), CENTRED, with_masks=False, **told)[0].inputs
    assert found["boxes"].tolist() == cropped and "masks" not in found
    around = batches(scene.images(), CENTRED, **told)[0].inputs["boxes"]
    torch.testing.assert_close(around, torch.tensor([[25.0, 25, 35, 35]]))


# The order of things


@given(height=st.integers(2, 97), width=st.integers(2, 97), seed=st.integers(0, 10**6), jitter=jitters)
@settings(max_examples=100, deadline=None)
def test_an_image_is_placed_as_the_framework_does_it(height: int, width: int, seed: int, jitter: Jitter) -> None:
    """Word for word: mirror, resize, crop at one share of what is too much; or resize, crop at two, mirror."""
    placing = jitter.placed(height, width, torch.Generator().manual_seed(seed))
    chance = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    mirrored = chance[3] < 0.5
    side = 61 * (0.1 + 1.9 * chance[0])
    picture = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 3, height, width), dtype=np.uint8))
    share = side / max(height, width)
    size = (max(1, round(height * share)), max(1, round(width * share)))

    def resized(whole: torch.Tensor) -> torch.Tensor:
        return F.interpolate(whole, size, mode="bilinear", antialias=True) if whole.shape[2:] != size else whole

    spare = [max(0, length - 61) for length in size]
    if jitter is DETECTRON:
        whole = resized(picture.flip(3) if mirrored else picture)
        top, left = (round(length * chance[1]) for length in spare)
        expected = whole[0, :, top : top + 61, left : left + 61]
    else:
        top, left = int(chance[1] * (spare[0] + 1)), int(chance[2] * (spare[1] + 1))
        expected = resized(picture)[0, :, top : top + 61, left : left + 61]
        expected = expected.flip(2) if mirrored else expected
    assert placing.size == tuple(expected.shape[1:])
    crop = placing.pixels(_Array(picture[0].numpy()).image(), RGB8)
    assert np.abs(crop.astype(int) - expected.numpy().astype(int)).max() <= 1
    # A point of the image, in the same steps.
    points = np.array([[0.25 * width, 0.75 * height]])
    x = points[0, 0]
    if jitter is DETECTRON:
        x = (width - x if mirrored else x) * size[1] / width - left
    else:
        x = x * size[1] / width - left
        x = placing.size[1] - x if mirrored else x
    np.testing.assert_allclose(placing.points(points), [[x, 0.75 * size[0] - top]], atol=1e-9)


class _Array:
    """An image in memory."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def image(self) -> Any:
        import io

        from lomar.data.decode import read_image

        file = io.BytesIO()
        Image.fromarray(self.pixels.transpose(1, 2, 0)).save(file, "png")
        return read_image(file.getvalue(), "x.png")


def test_scales_and_flips_are_those_of_the_jitter() -> None:
    placings = [DETECTRON.placed(50, 100, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    widths = np.array([placing.resized[1] for placing in placings])
    assert widths.min() < 9 and widths.max() > 119 and abs(widths.mean() - 61 * 1.05) < 2
    assert 0.45 < np.mean([placing.flipped for placing in placings]) < 0.55
    assert not any(
        replace(DETECTRON, flip=0.0).placed(50, 100, torch.Generator().manual_seed(s)).flipped for s in range(50)
    )
    shares = np.array([p.corner[1] / (p.resized[1] - 61) for p in placings if p.resized[1] > 71])
    assert shares.min() == 0 and shares.max() == 1 and abs(shares.mean() - 0.5) < 0.05


# The stream


def test_inputs_have_their_types_and_shapes(images: CocoImages) -> None:
    micro = batches(images, depth=3, total_batches=1)[0]
    told = {name: (values.dtype, tuple(values.shape)) for name, values in micro.inputs.items()}
    count = int(micro.inputs["counts"].sum())
    assert told == {
        "pixels": (torch.uint8, (6, 3, 61, 61)),
        "sizes": (torch.int64, (6, 2)),
        "boxes": (torch.float32, (count, 4)),
        "labels": (torch.int64, (count,)),
        "counts": (torch.int64, (6,)),
        "masks": (torch.uint8, (count, 61, 61)),
        "seeds": (torch.int64, (6,)),
        "paths": (torch.float32, (6, 3, 2)),
    }
    assert micro.inputs["masks"].max() == 1
    for place, name in enumerate(micro.names):
        rows, columns = micro.inputs["sizes"][place].tolist()
        pixels = micro.inputs["pixels"][place]
        assert (pixels[:, :rows, :columns] == 20 * (int(Path(name).stem) - 1)).all()
        assert not pixels[:, rows:].any() and not pixels[:, :, columns:].any()


def test_images_of_a_batch_and_of_another_epoch_are_placed_each_by_its_own_chance(images: CocoImages) -> None:
    sizes = torch.cat([micro.inputs["sizes"] for micro in batches(images, replace(DETECTRON, scale=(0.1, 1.0)))])
    assert len(set(map(tuple, sizes.tolist()))) > 20  # of 24, of four epochs


def test_an_object_has_the_label_of_its_class(images: CocoImages) -> None:
    """Each object is of a class of its own, in the file's order."""
    first = np.concatenate([[0], np.cumsum(images.instance_counts())])
    for micro in batches(images):
        for name, labels in zip(
            micro.names, micro.inputs["labels"].split(micro.inputs["counts"].tolist()), strict=True
        ):
            index = int(Path(name).stem) - 1
            assert set(labels.tolist()) <= set(range(first[index], first[index + 1]))
            assert labels.tolist() == sorted(labels.tolist())


def test_seeds_are_of_the_sample_alone_and_fit_a_random_number_of_62_bits(images: CocoImages) -> None:
    found = torch.cat([micro.inputs["seeds"] for micro in batches(images, total_batches=14)])
    assert len(set(found.tolist())) == len(found) == 84  # twelve epochs
    assert (found >= 0).all() and (found < 2**62).all() and found.max() > 2**61
    other = torch.cat([micro.inputs["seeds"] for micro in batches(images, total_batches=14, seed=6)])
    assert not set(found.tolist()) & set(other.tolist())


@given(
    seed=st.integers(0, 50),
    micro_batch=st.sampled_from([1, 2, 5, 12]),
    world=st.sampled_from([1, 2, 5]),
    jitter=jitters,
)
@settings(max_examples=15, deadline=None)
def test_neither_micro_batches_nor_processes_change_a_batch(
    images: CocoImages, seed: int, micro_batch: int, world: int, jitter: Jitter
) -> None:
    told = {"seed": seed, "batch_size": 12, "depth": 2, "total_batches": 2}
    whole = batches(images, jitter, **told, micro_batch=12)
    ranks = [batches(images, jitter, **told, micro_batch=micro_batch, rank=r, world_size=world) for r in range(world)]
    for number in range(2):
        parts = []
        for found in ranks:
            ends = [i for i, micro in enumerate(found) if micro.last]
            parts += found[(ends[number - 1] + 1 if number else 0) : ends[number] + 1]
        for name, expected in whole[number].inputs.items():
            assert torch.equal(torch.cat([micro.inputs[name] for micro in parts]), expected), name


def test_workers_and_a_later_start_change_nothing(images: CocoImages) -> None:
    alone = batches(images)
    for other in (batches(images, workers=2), *(batches(images, first_batch=first) for first in (1, 2, 3))):
        for ours, theirs in zip(alone[-len(other) :], other, strict=True):
            assert ours.names == theirs.names
            assert all(torch.equal(ours.inputs[name], theirs.inputs[name]) for name in ours.inputs)


def test_boxes_do_not_depend_on_whether_masks_are_drawn(images: CocoImages) -> None:
    jitter = replace(DETECTRON, scale=(1.0, 2.0))  # no object is smaller than a pixel
    for with_them, without in zip(batches(images, jitter), batches(images, jitter, with_masks=False), strict=True):
        assert "masks" not in without.inputs
        assert all(torch.equal(without.inputs[name], with_them.inputs[name]) for name in without.inputs)


def test_an_image_may_lose_all_its_objects(tmp_path: Path) -> None:
    """One has a small object in a corner, the other none at all."""
    scene = Scene(tmp_path)
    scene.add(painted(97, 97, []), [ellipse(2, 2, 2, 2)])
    scene.add(painted(97, 97, []))
    found = batches(scene.images(), replace(DETECTRON, scale=(1.9, 2.0)), batch_size=2, micro_batch=1, total_batches=20)
    counts = torch.cat([micro.inputs["counts"] for micro in found])
    assert set(counts.tolist()) == {0, 1}
    empty = next(micro.inputs for micro in found if not micro.inputs["counts"].any())
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,) and empty["masks"].shape == (0, 61, 61)
    assert empty["boxes"].dtype == torch.float32 and empty["labels"].dtype == torch.int64


def test_crowds_are_left_out(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.add(painted(61, 61, []), [ellipse(30, 30, 9, 9)])
    scene.object(1, drawn([ellipse(20, 20, 9, 9)], 61, 61), 61, 61, iscrowd=1)
    micro = batches(scene.images(), CENTRED, batch_size=1, micro_batch=1, total_batches=1)[0]
    assert micro.inputs["labels"].tolist() == [0]


def test_objects_below_a_size_are_left_out(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.add(painted(61, 61, []), [ellipse(30, 30, 4, 9)], [ellipse(30, 30, 6, 9)])
    told = {"batch_size": 1, "micro_batch": 1, "total_batches": 1}
    assert batches(scene.images(), replace(CENTRED, filter_below_px=10), **told)[0].inputs["labels"].tolist() == [1]
    assert batches(scene.images(), CENTRED, **told)[0].inputs["labels"].tolist() == [0, 1]


def test_a_box_without_width_in_float32_is_left_out(tmp_path: Path) -> None:
    """It would meet no anchor, and so be the best match of all; the logarithm of its width is infinite."""
    scene = Scene(tmp_path)
    scene.add(np.zeros((500, 500, 3), np.uint8))
    for left in (497.5124206542969, 400.0):
        scene.object(1, [rectangle(5, 5, 1, 1)], 500, 500, bbox=[left, 100, 2, 50])
    placing = Placing((500, 500), (603, 603), (0, 0), (600, 600), flipped=False)
    cropped = placing.boxes(scene.images(box_only=True).instances(0).boxes)
    assert 1e-5 < 600 - cropped[0, 0] < 3e-5 and np.float32(cropped[0, 0]) == 600
    found = _objects(scene.images(box_only=True), 0, DETECTRON, placing, with_masks=False)
    assert found.labels.tolist() == [1]


def test_masks_of_data_without_them_are_refused(images: CocoImages, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"masks are asked for, but .* has none"):
        batches(replace(images, has_masks=False))


def test_sixteen_bits_and_gray_stay_what_they_are(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.add(np.full((31, 43), 40_000, dtype=np.uint16), [ellipse(20, 15, 9, 9)])
    micro = batches(scene.images(), fmt=PixelFormat(1, "uint16"), batch_size=1, micro_batch=1, total_batches=1)[0]
    rows, columns = micro.inputs["sizes"][0].tolist()
    assert micro.inputs["pixels"].dtype == torch.uint16
    assert (micro.inputs["pixels"].to(torch.int64)[:, :, :rows, :columns] == 40_000).all()


# Bad images


def test_another_image_with_its_own_objects_comes_in_the_place_of_a_bad_one(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for width in (37, 41, 43):
        scene.add(painted(31, width, []), [ellipse(15, 15, 9, 9)])
    images = scene.images()
    (tmp_path / "02.png").write_bytes(b"")
    Image.fromarray(painted(31, 44, [])).save(tmp_path / "03.png")
    found = batches(images, CENTRED, batch_size=3, micro_batch=3)
    bad = dict(pair for micro in found for pair in micro.bad)
    assert bad == {
        str(tmp_path / "02.png"): "empty file",
        str(tmp_path / "03.png"): "31 x 44 pixels, but its annotations are for 31 x 43",
    }
    for micro in found:
        assert {Path(name).name for name in micro.names} == {"01.png"}
        assert micro.inputs["labels"].tolist() == [0, 0, 0]


def test_data_of_bad_images_alone_is_refused(tmp_path: Path) -> None:
    """A photograph that its EXIF turns, with annotations for the picture as it is stored."""
    scene = Scene(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    scene.add(painted(31, 43, []), [ellipse(15, 15, 9, 9)], ending="jpg", exif=exif)
    words = "43 x 31 pixels, but its annotations are for 31 x 43, as it is when it is not turned upright$"
    with pytest.raises(UserError, match=words):
        batches(scene.images())
    scene.told["images"][0] |= {"height": 43, "width": 31}
    assert len(batches(scene.images())) == 4


# Whole images


def whole(source: ImageSource, *words: Any, **named: Any) -> list[WholeImages]:
    return list(whole_images(source, RGB8, *words, **named))


def test_whole_images_come_in_order_with_their_sizes(images: CocoImages) -> None:
    found = whole(images.source, 61, 0, batch_size=3)
    assert [len(part.good) for part in found] == [3, 3, 1]
    number = 0
    for part in found:
        assert part.good.all() and part.pixels.shape[1:] == (3, 61, 61)
        for pixels, (rows, columns), original in zip(part.pixels, part.sizes.tolist(), part.originals, strict=True):
            assert original.tolist() == images.sizes[number].tolist()
            assert (rows, columns) == ((44, 61) if number % 2 == 0 else (61, 48))  # 31 * 61 / 43, 37 * 61 / 47
            assert (pixels[:, :rows, :columns] == 20 * number).all()
            assert not pixels[:, rows:].any() and not pixels[:, :, columns:].any()
            number += 1


def test_whole_images_may_be_some_and_are_the_same_with_workers(images: CocoImages) -> None:
    alone = whole(images.source, 61, 0, indices=[5, 0, 3])
    assert [int(part.pixels[0, 0, 0, 0]) for part in alone] == [100, 0, 60]
    for ours, theirs in zip(alone, whole(images.source, 61, 2, indices=[5, 0, 3]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_whole_images_of_a_folder_without_annotations(photos: Path) -> None:
    found = whole(open_source(str(photos)), 24, 0, batch_size=8)
    assert found[0].sizes.tolist() == [[20, 24]] * 8 and found[0].originals.tolist() == [[40, 48]] * 8


def test_a_whole_image_that_cannot_be_read_or_is_of_another_size_is_not_good(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(painted(31, 43, [])).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    told = np.array([[31, 43], [31, 43], [31, 42]])
    part = whole(open_source(str(tmp_path)), 61, 0, batch_size=3, told_sizes=told)[0]
    assert part.good.tolist() == [True, False, False]
    assert not part.pixels[1:].any() and not part.sizes[1:].any() and not part.originals[1:].any()


def test_a_very_long_image_keeps_a_pixel() -> None:
    assert fitted(2, 5000, 61) == (1, 61)
    assert fitted(5000, 2, 6.1) == (6, 1)
    placed = [DETECTRON.placed(2, 5000, torch.Generator().manual_seed(seed)) for seed in islice(range(99), 20)]
    assert all(min(placing.size) >= 1 for placing in placed)
