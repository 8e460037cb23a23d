"""Claims about COCO-format data: what is read, and what is refused in which words."""

import contextlib
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from lomar.data.coco import CocoImages, detection_data, judging_images
from lomar.data.coco_json import NO_AREA
from lomar.errors import UserError

HEIGHT, WIDTH = 31, 37
SQUARE = [[2, 3, 12, 3, 12, 13, 2, 13]]


def annotation(number: int, image: Any = 1, category: int = 3, **changes: Any) -> dict[str, Any]:
    told = {"id": number, "image_id": image, "category_id": category, "bbox": [2, 3, 10, 10], "area": 100}
    return told | {"iscrowd": 0, "segmentation": SQUARE} | changes


def coco(images: int = 3, annotations: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """As many images, with an object in each where none are given; categories 3 and 7."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)],
        "annotations": [annotation(10 + i, i) for i in range(1, images + 1)] if annotations is None else annotations,
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def write(file: Path, told: Any, folder: Path | None = None) -> str:
    """The JSON file, with its images in a folder, or beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told))
    folder = folder or file.parent
    folder.mkdir(parents=True, exist_ok=True)
    for image in told["images"] if isinstance(told, dict) and isinstance(told.get("images"), list) else []:
        with contextlib.suppress(Exception):  # of data that is wrong on purpose
            Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(folder / image["file_name"])
    return str(file)


def read(tmp_path: Path, told: Any, **words: Any) -> CocoImages:
    """All images of a file."""
    return judging_images(write(tmp_path / "told.json", told), **words)[0]


# Layouts


def test_cocos_layout(tmp_path: Path) -> None:
    for split, count in (("train2017", 4), ("val2017", 2)):
        write(tmp_path / "annotations" / f"instances_{split}.json", coco(count), tmp_path / split)
        for other in ("captions", "person_keypoints"):
            (tmp_path / "annotations" / f"{other}_{split}.json").write_text("{}")
    data = detection_data(str(tmp_path))
    assert (len(data.train), len(data.val), data.drawn) == (4, 2, False)
    assert data.train.source.name(0) == str(tmp_path / "train2017" / "1.png")
    assert (data.train.categories, data.train.category_ids) == (("cat", "dog"), (3, 7))


def test_cocos_layout_with_a_folder_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / "annotations" / f"instances_{split}.json", coco(), tmp_path / "images" / split)
    data = detection_data(str(tmp_path))
    assert data.val.source.name(0) == str(tmp_path / "images" / "val" / "1.png")


@pytest.mark.parametrize("val", ["valid", "val", "test"])
def test_roboflows_layout(tmp_path: Path, val: str) -> None:
    write(tmp_path / "train" / "_annotations.coco.json", coco(4))
    write(tmp_path / val / "_annotations.coco.json", coco(2))
    data = detection_data(str(tmp_path))
    assert (len(data.train), len(data.val), data.drawn) == (4, 2, False)
    assert data.val.source.name(1) == str(tmp_path / val / "2.png")


def test_cvats_layout(tmp_path: Path) -> None:
    write(tmp_path / "annotations" / "instances_default.json", coco(5), tmp_path / "images" / "default")
    data = detection_data(str(tmp_path))
    assert (len(data.train), len(data.val), data.drawn) == (4, 1, True)


def test_a_file_with_its_images_beside_it_or_in_a_folder_that_is_given(tmp_path: Path) -> None:
    beside = write(tmp_path / "a" / "told.json", coco(2))
    elsewhere = write(tmp_path / "b" / "told.json", coco(3), tmp_path / "pictures")
    data = detection_data(beside, val=str(tmp_path / "pictures"), val_annotations=elsewhere)
    assert (len(data.train), len(data.val), data.drawn) == (2, 3, False)
    data = detection_data(str(tmp_path / "pictures"), annotations=elsewhere, val=beside)
    assert (len(data.train), len(data.val)) == (3, 2)
    assert data.train.path == elsewhere


def test_a_fifth_is_drawn_where_nothing_judges_and_always_the_same(tmp_path: Path) -> None:
    told = coco(20, [annotation(i, i) for i in range(1, 11)])  # of ten images; the other ten have none
    file = write(tmp_path / "told.json", told)
    data = detection_data(file)
    assert data.drawn and (len(data.train), len(data.val)) == (16, 4)
    assert (data.val.instance_counts() > 0).sum() == 2
    assert sorted([*data.train.image_ids, *data.val.image_ids]) == list(range(1, 21))
    assert detection_data(file).val.image_ids == data.val.image_ids
    again, drawn = judging_images(file, learnt_from=True)
    assert drawn and again.image_ids == data.val.image_ids
    assert len(judging_images(file)[0]) == 20


def test_of_a_single_image_none_judges(tmp_path: Path) -> None:
    data = detection_data(write(tmp_path / "told.json", coco(1)))
    assert data.val is None and not data.drawn


def test_several_files_that_could_be_meant_are_named(tmp_path: Path) -> None:
    for name in ("instances_train2014", "instances_train2017"):
        write(tmp_path / "annotations" / f"{name}.json", coco())
    with pytest.raises(UserError) as refused:
        detection_data(str(tmp_path))
    assert str(refused.value) == (
        f"--data {tmp_path}: instances_train2014.json and instances_train2017.json could be meant; "
        "--annotations says which"
    )


def test_nothing_to_read_is_told_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no annotations of images to learn from; looked for annotations/instances_tr"):
        detection_data(str(tmp_path))
    with pytest.raises(UserError, match=r"--data .*/nowhere: no such folder or file$"):
        detection_data(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"--data .*/no\.json: No such file or directory$"):
        detection_data(str(tmp_path / "no.json"))
    file = write(tmp_path / "told.json", coco())
    with pytest.raises(UserError, match=r"is a \.json file already$"):
        detection_data(file, annotations=file)


def test_classes_of_what_judges_are_those_of_training(tmp_path: Path) -> None:
    train, val = coco(), coco()
    val["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}]
    val["annotations"] = [annotation(1, category=1)]
    write(tmp_path / "train" / "_annotations.coco.json", train)
    file = write(tmp_path / "valid" / "_annotations.coco.json", val)
    data = detection_data(str(tmp_path))
    assert data.val.categories == ("cat", "dog") and data.val.category_ids == (-1, 1)
    assert data.val.instances(0).labels.tolist() == [1]
    val["annotations"] = [annotation(1, category=2)]
    write(Path(file), val)
    with pytest.raises(UserError, match=rf"^--data {file}: its class 'cow' is not among those of training$"):
        detection_data(str(tmp_path))


# Content


def rle(mask: np.ndarray) -> dict[str, Any]:
    told = coco_mask.encode(np.asfortranarray(mask))
    return {"size": told["size"], "counts": told["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": counts if not flat[0] else [0, *counts]}


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """As pycocotools draws it."""
    if isinstance(segmentation, dict):
        told = segmentation | {"counts": segmentation["counts"].tolist()}
        return coco_mask.decode(coco_mask.frPyObjects(told, height, width))
    flat = [polygon.astype(np.float64).ravel().tolist() for polygon in segmentation]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, height, width)))


def test_masks_are_those_of_cocos_own_reader(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blobs = [(rng.random((HEIGHT, WIDTH)) < share).astype(np.uint8) for share in (0.1, 0.5, 0.9)]
    blobs[1][0, 0] = 1
    polygons = [(rng.integers(0, 4 * WIDTH, (5, 2)) / 4).ravel().tolist() for _ in range(4)]
    masks = [polygons[:1], polygons[1:], *(form(blob) for blob in blobs for form in (rle, uncompressed))]
    told = coco(2, [annotation(i + 1, 1 + i % 2, segmentation=mask) for i, mask in enumerate(masks)])
    images = read(tmp_path, told)
    with contextlib.redirect_stdout(None):
        judge = COCO(images.path)
    for index, image in enumerate(images.image_ids):
        found = images.instances(index)
        expected = [judge.annToMask(each) for each in judge.imgToAnns[image]]
        assert len(found) == len(expected) == 4
        for segmentation, mask in zip(found.segmentations, expected, strict=True):
            np.testing.assert_array_equal(mask_of(segmentation, HEIGHT, WIDTH), mask)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=40),
    st.integers(1, 3_000_000),
)
@settings(max_examples=100, deadline=None)
def test_compressed_runs_are_read_as_pycocotools_writes_them(lengths: list[int], long: int) -> None:
    from lomar.data.coco_json import _decompressed

    lengths = [*lengths, long]
    packed = coco_mask.frPyObjects({"size": [1, sum(lengths)], "counts": lengths}, 1, sum(lengths))
    assert _decompressed(packed["counts"].decode()).tolist() == lengths


def test_boxes_labels_areas_and_crowds(tmp_path: Path) -> None:
    told = coco(
        2,
        [
            annotation(5, 2, 7, bbox=[1.5, 2, 3, 4], area=9.5),
            annotation(6, 2, 3, bbox=[30, 20, 100, 100]),  # beyond the image
            annotation(7, 2, 3, bbox=[1, 1, 5, 5], iscrowd=1, segmentation=rle(np.ones((HEIGHT, WIDTH), np.uint8))),
        ],
    )
    del told["annotations"][1]["area"], told["annotations"][1]["iscrowd"]
    images = read(tmp_path, told)
    assert len(images.instances(0)) == 0
    found = images.instances(1)
    assert found.boxes.tolist() == [[1.5, 2, 4.5, 6], [30, 20, WIDTH, HEIGHT], [1, 1, 6, 6]]
    assert found.boxes.dtype == np.float32
    assert found.labels.tolist() == [1, 0, 0] and found.labels.dtype == np.int64
    assert found.areas.tolist() == [9.5, NO_AREA, 100]
    assert found.crowd.tolist() == [False, False, True]
    assert images.sizes.tolist() == [[HEIGHT, WIDTH]] * 2
    assert images.instance_counts().tolist() == [0, 2]


def test_images_to_train_on_have_an_object_that_is_no_crowd(tmp_path: Path) -> None:
    told = coco(4, [annotation(1, 3), annotation(2, 2, iscrowd=1), annotation(3, 4, bbox=[1, 1, 0, 5])])
    images = read(tmp_path, told)
    chosen, left_out = images.trainable()
    assert chosen.image_ids == [3] and left_out == 3
    assert chosen.source.name(0).endswith("/3.png")
    assert len(images) == 4 and len(chosen.instances(0)) == 1


def test_a_subset_has_its_own_images_in_the_given_order(tmp_path: Path) -> None:
    told = coco(3, [annotation(i, i, bbox=[i, 0, 5, 5]) for i in (3, 1, 2)])
    chosen = read(tmp_path, told).subset([2, 0])
    assert chosen.image_ids == [3, 1]
    assert [chosen.instances(i).boxes[0, 0] for i in (0, 1)] == [3, 1]
    assert pickle.loads(pickle.dumps(chosen)).instances(1).boxes.tolist() == chosen.instances(1).boxes.tolist()


def test_ids_may_be_texts(tmp_path: Path) -> None:
    told = coco(2, [annotation("x", "b")])
    for image, number in zip(told["images"], "ab", strict=True):
        image["id"] = number
    images = read(tmp_path, told)
    assert images.image_ids == ["a", "b"] and len(images.instances(1)) == 1


def test_the_fingerprint_changes_with_any_annotation(tmp_path: Path) -> None:
    prints = [read(tmp_path, coco()).fingerprint()]
    for change in (
        {"bbox": [2, 3, 10, 11]},
        {"category_id": 7},
        {"iscrowd": 1},
        {"segmentation": [[2, 3, 9, 9, 5, 8]]},
    ):
        told = coco()
        told["annotations"][1] |= change
        prints.append(read(tmp_path, told).fingerprint())
    told = coco()
    told["categories"][0]["name"] = "cow"
    prints.append(read(tmp_path, told).fingerprint())
    assert len(set(prints)) == len(prints)
    assert read(tmp_path / "moved", coco()).fingerprint() == prints[0]


# What is dropped


def test_boxes_without_area_are_dropped_and_counted(tmp_path: Path) -> None:
    boxes = [[1, 1, 5, 5], [1, 1, 0, 5], [1, 1, 5, 0], [WIDTH, 3, 5, 5], [-9, 3, 9, 5], [1e9, 1e9, 5, 5]]
    images = read(tmp_path, coco(1, [annotation(i + 1, bbox=box) for i, box in enumerate(boxes)]))
    assert len(images.instances(0)) == 1
    assert images.left_out == {"boxes without area in the image": 5}


def test_polygons_of_too_few_points_are_dropped_and_objects_without_others(tmp_path: Path) -> None:
    bad = [[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]
    told = coco(1, [annotation(1), annotation(2, segmentation=bad), annotation(3, segmentation=bad + SQUARE)])
    images = read(tmp_path, told)
    found = images.instances(0)
    assert [len(polygons) for polygons in found.segmentations] == [1, 1]
    assert found.segmentations[1][0].tolist() == [[2, 3], [12, 3], [12, 13], [2, 13]]
    assert images.left_out == {"polygons of fewer than 3 points": 6, "objects without a whole polygon": 1}
    assert len(read(tmp_path, told, box_only=True).instances(0)) == 3


def test_data_without_masks_is_for_boxes(tmp_path: Path) -> None:
    for absent in (None, [], {}):
        images = read(tmp_path, coco(1, [annotation(1, segmentation=absent)]))
        assert not images.has_masks and images.instances(0).segmentations == [None]
    told = coco(1, [annotation(1)])
    del told["annotations"][0]["segmentation"]
    assert not read(tmp_path, told).has_masks


def test_masks_are_not_read_where_boxes_are_wanted(tmp_path: Path) -> None:
    images = read(tmp_path, coco(1, [annotation(1), annotation(2, segmentation=None)]), box_only=True)
    assert not images.has_masks and images.instances(0).segmentations == [None, None]


# What is refused


def changed(**changes: Any) -> dict[str, Any]:
    """Three images, of which the second annotation, id 12, is changed."""
    told = coco()
    told["annotations"][1] |= changes
    return told


def without(key: str) -> dict[str, Any]:
    told = coco()
    del told["annotations"][1][key]
    return told


def image_changed(**changes: Any) -> dict[str, Any]:
    told = coco()
    told["images"][1] |= changes
    return told


ONES = np.ones((HEIGHT, WIDTH), np.uint8)
REFUSED: dict[str, tuple[Any, str]] = {
    "no object": ([1, 2], "not COCO's format, an object of the lists images, annotations and categories"),
    "no annotations": ({"images": []}, "not COCO's format, in which there is a list 'annotations'"),
    "annotations of a wrong type": (coco() | {"annotations": {}}, "in which there is a list 'annotations'"),
    "no images": (coco() | {"images": []}, "the list 'images' is empty"),
    "no categories": (coco() | {"categories": []}, "the list 'categories' is empty"),
    "empty annotations": (coco(3, []), "the list 'annotations' is empty"),
    "captions": (coco(1, [{"id": 4, "image_id": 1, "caption": "a"}]), "annotation id 4 has no bbox"),
    "numbers for annotations": (coco() | {"annotations": [3]}, "annotation id None has no id"),
    "numbers for images": (coco() | {"images": [3]}, "an image has an id, a whole number or a text; one is 3"),
    "numbers for categories": (coco() | {"categories": [3]}, "a category has an id, a whole number, and a name; one "),
    "a category twice": (coco() | {"categories": coco()["categories"] * 2}, "category id 7 occurs twice"),
    "an image twice": (image_changed(id=1), "image id 1 occurs twice"),
    "an annotation twice": (changed(id=11), "annotation id 11 occurs twice"),
    "no id": (changed(id=None), "an annotation of image id 2 has no id"),
    "an unknown image": (changed(image_id=9), "annotation id 12: there is no image of its image_id 9"),
    "a text for a number": (changed(image_id="2"), "annotation id 12: there is no image of its image_id '2'"),
    "a list for an image": (changed(image_id=[2]), "annotation id 12: its image_id is [2]"),
    "an unknown category": (changed(category_id=4), "annotation id 12: there is no category of its category_id 4"),
    "no category": (without("category_id"), "annotation id 12: its category_id is None"),
    "no box": (without("bbox"), "annotation id 12 has no bbox; these are no annotations of objects"),
    "a box of three": (changed(bbox=[1, 2, 3]), "annotation id 12: its bbox is [1, 2, 3], not four finite numbers"),
    "a box of texts": (changed(bbox=list("1234")), "annotation id 12: its bbox is ['1', '2', '3', '4'], not four"),
    "a box not a number": (changed(bbox=[1, float("nan"), 3, 4]), "annotation id 12: its bbox is [1, nan, 3, 4], not"),
    "an endless box": (changed(bbox=[1, 2, float("inf"), 4]), "annotation id 12: its bbox is [1, 2, inf, 4], not four"),
    "a huge number": (changed(bbox=[1, 2, 10**400, 4]), "annotation id 12: its bbox is [1, 2, 1000"),
    "a negative size": (changed(bbox=[1, 2, -3, 4]), "annotation id 12: its bbox is [1, 2, -3, 4], of a negative size"),
    "a negative area": (changed(area=-1), "annotation id 12: its area is -1"),
    "an area not a number": (changed(area=float("nan")), "annotation id 12: its area is nan"),
    "crowd of text": (changed(iscrowd="no"), "annotation id 12: its iscrowd is 'no'"),
    "a mask for some": (
        changed(segmentation=[]),
        "12: it has no mask, but others have; --boxes-only needs none",
    ),
    "a flat polygon": (changed(segmentation=[1, 2, 3, 4, 5, 6]), "12: its segmentation is neither a list of polygons"),
    "a text for a mask": (changed(segmentation="abc"), "annotation id 12: its segmentation is neither a list of polyg"),
    "a polygon of texts": (changed(segmentation=[list("123456")]), "annotation id 12: a polygon of it is no list of n"),
    "an endless polygon": (changed(segmentation=[[1, 2, 3, 4, float("inf"), 6]]), "12: a polygon of it is far outside"),
    "a polygon not numbers": (changed(segmentation=[[1, 2, 3, 4, float("nan"), 6]]), "12: a polygon of it is far outs"),
    "a far polygon": (changed(segmentation=[[1, 2, 3, 4, 1e9, 6]]), "annotation id 12: a polygon of it is far outside"),
    "an RLE of another size": (
        changed(segmentation=rle(ONES.T)),
        f"annotation id 12: its RLE is of {WIDTH} x {HEIGHT} pixels, its image of {HEIGHT} x {WIDTH}",
    ),
    "an RLE without size": (changed(segmentation={"counts": "a"}), "annotation id 12: its RLE has the size None"),
    "an RLE without counts": (changed(segmentation={"size": [HEIGHT, WIDTH]}), "12: its RLE has counts that are neith"),
    "an RLE too short": (
        changed(segmentation={"size": [HEIGHT, WIDTH], "counts": [3, 4]}),
        f"annotation id 12: the counts of its RLE do not add up to its size, {HEIGHT} x {WIDTH}",
    ),
    "an RLE of negative counts": (changed(segmentation={"size": [2, 2], "counts": [5, -1]}), "12: its RLE has counts "),
    "a damaged RLE": (
        changed(segmentation={"size": [2, 2], "counts": "~~"}),
        "12: its RLE has counts that are damaged",
    ),
    "an RLE cut short": (changed(segmentation={"size": [2, 2], "counts": "PP"}), "12: its RLE has counts that are dam"),
    "an absolute path": (image_changed(file_name="/etc/2.png"), "id 2: its file_name '/etc/2.png' leads out of the fo"),
    "a path that leads up": (image_changed(file_name="a/../../2.png"), "image id 2: its file_name 'a/../../2.png' lea"),
    "no path": (image_changed(file_name=None), "image id 2: its file_name is None, no name of a file"),
    "a path of no text": (image_changed(file_name="\ud800.png"), r"image id 2: its file_name is '\ud800.png', no name"),
    "no height": (image_changed(height=None), f"image id 2: its height and width are None and {WIDTH}, no sizes in p"),
    "a height of zero": (image_changed(height=0), f"image id 2: its height and width are 0 and {WIDTH}, no sizes in"),
    "a boolean id": (image_changed(id=True), "an image has an id, a whole number or a text; one is {'id': True"),
}


@pytest.mark.parametrize(("told", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_of_the_format_is_refused_in_one_line(tmp_path: Path, told: Any, words: str) -> None:
    file = write(tmp_path / "told.json", told)
    with pytest.raises(UserError) as refused:
        detection_data(file)
    text = str(refused.value)
    assert text.startswith(f"--data {file}: ") and words in text and "\n" not in text


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    file = Path(write(tmp_path / "told.json", coco()))
    whole = file.read_bytes()
    for content, words in (
        (whole[:-9], r"no whole JSON file: .* at line 1 column \d+"),
        (b"", "no whole JSON file: expecting value at line 1 column 1"),
        (b"\xff\xfe{}", "no JSON file in UTF-8"),
        (b"[" * 100_000, "no JSON file in UTF-8|no whole JSON"),
        (b'{"images": [{"id": ' + b"1" * 5000 + b"}]}", "no JSON file that can be read"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"^--data {file}: ({words})"):
            detection_data(str(file))
    file.write_bytes(b"\xef\xbb\xbf" + whole)
    assert len(judging_images(str(file))[0]) == 3


def test_nothing_to_train_on_is_refused_with_what_there_is(tmp_path: Path) -> None:
    told = coco(1, [annotation(1, bbox=[1, 1, 0, 0]), annotation(2, iscrowd=1)])
    words = "no annotation is there to learn from, but for 1 boxes without area in the image, 1 of crowds"
    with pytest.raises(UserError, match=words):
        detection_data(write(tmp_path / "told.json", told))


def test_images_that_are_not_there_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "told.json", coco(4))
    (tmp_path / "3.png").unlink()
    with pytest.raises(
        UserError, match=rf"json: 1 of its 4 images is not there, the first {tmp_path}/3\.png \(image id 3"
    ):
        detection_data(file)
    (tmp_path / "4.png").unlink()
    with pytest.raises(
        UserError, match=rf"2 of its 4 images are not there, the first {tmp_path}/3\.png \(image id 3\)$"
    ):
        detection_data(file)
    for number in (1, 2):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(
        UserError, match=rf"none of its 4 images is in {tmp_path}, such as .*; is it the folder of these"
    ):
        detection_data(file)


def test_images_may_lie_in_folders_below(tmp_path: Path) -> None:
    told = coco(2)
    for image in told["images"]:
        image["file_name"] = f"sub/{image['id']}.png"
    (tmp_path / "sub").mkdir()
    assert read(tmp_path, told).source.name(1) == str(tmp_path / "sub" / "2.png")


def test_a_validation_part_without_masks_is_refused_where_training_has_them(tmp_path: Path) -> None:
    write(tmp_path / "train" / "_annotations.coco.json", coco())
    file = write(tmp_path / "valid" / "_annotations.coco.json", coco(1, [annotation(1, segmentation=[])]))
    with pytest.raises(UserError, match=rf"^--data {re.escape(file)}: its objects have no masks, but those of "):
        detection_data(str(tmp_path))
    assert detection_data(str(tmp_path), box_only=True).val is not None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_a_file_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    file = Path(write(tmp_path / "told.json", coco()))
    file.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        detection_data(str(file))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_file_with_anything_in_any_place_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever stands where, the outcome is images or one line."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "size", "counts"]), inner),
        max_leaves=6,
    )
    folder = tmp_path_factory.mktemp("any")
    told = coco()
    part = data.draw(st.sampled_from(["images", "annotations", "categories"]))
    row = data.draw(st.sampled_from(told[part]))
    key = data.draw(st.sampled_from(sorted(row)))
    row[key] = data.draw(anything)
    file = write(folder / "told.json", told)
    try:
        found = detection_data(file)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for images in (found.train, found.val):
        for index in range(len(images)):
            boxes = images.instances(index).boxes
            assert np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()
