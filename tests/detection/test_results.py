"""Claims about masks as run-length codes and about COCO's results files."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from lomar.detection.results import Found, coco_results, mask_to_rle, rle_of, write_results

SIZE = (97, 131)  # height, width


def smooth_masks(count: int, side: int = 28) -> Tensor:
    """Blobs of probability, as a detector predicts them."""
    noise = torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(0))
    blurred = F.avg_pool2d(noise, 9, 1, 4, count_include_pad=False)[:, 0]
    return (0.5 + 8 * (blurred - 0.5)).clamp(0, 1)


def decoded(code: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode(code).astype(bool)


def sampled(mask: Tensor, box: list[float]) -> np.ndarray:
    """A mask pasted by sampling it at each pixel's centre, in the whole image."""
    height, width = SIZE
    x0, y0, x1, y1 = box
    y = ((torch.arange(height) + 0.5 - y0) / (y1 - y0) * 2 - 1)[:, None].expand(SIZE)
    x = ((torch.arange(width) + 0.5 - x0) / (x1 - x0) * 2 - 1)[None].expand(SIZE)
    grid = torch.stack([x, y], dim=-1)[None]
    return (F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0] >= 0.5).numpy()


BOXES = [
    [10.0, 20.0, 90.0, 80.0],
    [10.3, 20.7, 93.1, 81.2],
    [3.2, 4.1, 11.7, 9.9],  # smaller than the mask
    [-40.5, -20.2, 60.3, 50.8],
    [100.1, 60.2, 180.0, 150.0],
    [-10.0, -10.0, 200.0, 200.0],
    [64.2, 30.1, 64.9, 70.3],  # narrower than a pixel
]


@pytest.mark.parametrize("box", BOXES)
def test_a_pasted_mask_is_the_mask_sampled_at_the_centres_of_pixels(box: list[float]) -> None:
    mask = smooth_masks(1)
    (code,) = mask_to_rle(mask, torch.tensor([box]), SIZE)
    expected = sampled(mask[0], box)
    assert code["size"] == list(SIZE) and isinstance(code["counts"], str)
    # Where a probability is 0.5 but for rounding, either is right.
    assert (decoded(code) != expected).sum() <= 2
    json.dumps(code)


def test_codes_are_those_of_pycocotools() -> None:
    boxes = torch.tensor(
        [*BOXES, [0.0, 0, 131, 97], [0, 0, 131, 50], [20, 0, 90, 97], [131, 0, 150, 97], [50, -9, 60, 0]]
    )
    for masks in (smooth_masks(len(boxes)), torch.ones(len(boxes), 28, 28)):
        for code in mask_to_rle(masks, boxes, SIZE):
            again = coco_mask.encode(np.asfortranarray(decoded(code).astype(np.uint8)))
            assert code == {"size": list(SIZE), "counts": again["counts"].decode()}


def test_torchvision_pastes_almost_the_same() -> None:
    masks = smooth_masks(3)
    boxes = torch.tensor(BOXES)[[0, 1, 3]]
    theirs = (paste_masks_in_image(masks[:, None], boxes, SIZE)[:, 0] > 0.5).numpy()
    for code, their in zip(mask_to_rle(masks, boxes, SIZE), theirs, strict=True):
        ours = decoded(code)
        assert (ours & their).sum() / (ours | their).sum() > 0.9  # it rounds boxes to whole pixels and adds one


def test_a_full_mask_fills_its_box_and_an_empty_one_nothing() -> None:
    boxes = torch.tensor([[10.0, 20.0, 31.0, 57.0], [10.0, 20.0, 31.0, 57.0], [5.0, 5.0, 5.0, 9.0], [9, 9, 3, 3]])
    full, empty, *flat = mask_to_rle(torch.ones(4, 28, 28) * torch.tensor([1.0, 0, 1, 1])[:, None, None], boxes, SIZE)
    assert decoded(full)[20:57, 10:31].all() and decoded(full).sum() == 37 * 21
    assert not any(decoded(code).any() for code in (empty, *flat))
    assert not decoded(mask_to_rle(torch.ones(1, 28, 28), torch.tensor([[torch.nan] * 4]), SIZE)[0]).any()
    assert mask_to_rle(torch.ones(0, 28, 28), torch.zeros(0, 4), SIZE) == []


def test_masks_do_not_run_into_each_other() -> None:
    masks, boxes = smooth_masks(len(BOXES)), torch.tensor(BOXES)
    together = mask_to_rle(masks, boxes, SIZE)
    assert together == [mask_to_rle(masks[i : i + 1], boxes[i : i + 1], SIZE)[0] for i in range(len(BOXES))]


def test_many_masks_of_a_large_image_need_little_memory() -> None:
    size = (1733, 2311)  # a hundred of them pasted at once would be 400 MB of bytes, 1.6 GB of floats
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codes = mask_to_rle(smooth_masks(1).expand(100, -1, -1), torch.tensor([[0.0, 0, 2311, 1733]]).expand(100, 4), size)
    assert len(codes) == 100
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 150


def test_each_form_of_a_segmentation_becomes_the_same_code() -> None:
    square = np.zeros(SIZE, np.uint8)
    square[20:40, 30:60] = 1
    code = coco_mask.encode(np.asfortranarray(square))
    flat = square.T.reshape(-1)
    runs = np.diff(np.flatnonzero(np.diff(flat, prepend=2, append=2))).tolist()
    polygon = [[30, 20, 60, 20, 60, 40, 30, 40], [1, 1, 2, 2]]  # the second is no area, and left out
    forms = [
        code,
        {"size": list(SIZE), "counts": code["counts"].decode()},
        {"size": list(SIZE), "counts": runs},
        polygon,
    ]
    for form in forms:
        assert (decoded(rle_of(form, SIZE)) == square.astype(bool)).all()
        assert isinstance(rle_of(form, SIZE)["counts"], str)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "has no polygon of three points or more"),
        ([[1, 2, 3, 4]], "has no polygon of three points or more"),
        ([["a"] * 6], "has a polygon that is not of numbers"),
        (None, "is neither polygons nor a run-length code"),
        ({"size": [97, 131]}, "is neither polygons nor a run-length code"),
        ({"size": [131, 97], "counts": "0"}, r"is of size \[131, 97\], but the image is of \[97, 131\]"),
        ({"size": [97, 131], "counts": [5, 6]}, "has runs that do not fill the image"),
    ],
)
def test_what_is_no_segmentation_is_refused(segmentation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rle_of(segmentation, SIZE)


def found(masks: bool = True) -> Found:
    boxes = torch.tensor([[10.0, 20.0, 31.0, 57.0], [0.12345, 1.0, 5.5, 9.25]])
    codes = mask_to_rle(torch.ones(2, 28, 28), boxes, SIZE) if masks else None
    return Found(boxes, torch.tensor([0.9, 0.123456789]), torch.tensor([1, 0]), codes)


def test_results_have_the_ids_of_the_annotations_and_boxes_by_width_and_height() -> None:
    first, second = coco_results("a.jpg", found(), [7, 90])
    assert list(first) == ["image_id", "category_id", "bbox", "score", "segmentation"]
    assert first["image_id"] == "a.jpg" and (first["category_id"], second["category_id"]) == (90, 7)
    assert first["bbox"] == [10.0, 20.0, 21.0, 37.0] and first["score"] == pytest.approx(0.9)
    assert second["bbox"] == [0.123, 1.0, 5.377, 8.25] and second["score"] == 0.1234568
    assert "segmentation" not in coco_results(1, found(masks=False), [7, 90])[0]
    nothing = Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), [])
    assert coco_results(1, nothing, [7]) == [] and len(nothing) == 0


def test_parts_of_unlike_length_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"boxes \(2, 4\), scores \(3,\), labels \(2,\) do not fit together"):
        Found(torch.zeros(2, 4), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="and 1 masks do not fit"):
        Found(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2), [{}])


@pytest.mark.parametrize("masks", [True, False])
def test_pycocotools_reads_what_is_written(masks: bool, tmp_path: Path) -> None:
    results = coco_results(5, found(masks), [7, 90])
    write_results(tmp_path / "r.json", iter(results))
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 5, "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [],
        "categories": [{"id": 7}, {"id": 90}],
    }
    truth.createIndex()
    read = truth.loadRes(str(tmp_path / "r.json"))
    assert [read.anns[i]["bbox"] for i in (1, 2)] == [result["bbox"] for result in results]
    if masks:
        assert read.annToMask(read.anns[1])[20:57, 10:31].all()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    results = coco_results("é", found(), [7, 90])
    for some in (results, []):
        write_results(tmp_path / "r.json", some)
        assert json.loads((tmp_path / "r.json").read_text()) == some
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_failed_writing_leaves_the_old_file(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", [])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path / "r.json", [{"score": float("nan")}])
    assert json.loads((tmp_path / "r.json").read_text()) == []
