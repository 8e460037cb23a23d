"""Claims about average precision: worked out by hand, and as pycocotools has it."""

import copy
import io
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lomar.detection.judging import Judgement, judge, rows_of, summary, write_categories
from lomar.detection.results import rle_of
from lomar.errors import UserError

HEIGHT, WIDTH = 307, 401
FAST = [False, pytest.param(True, marks=pytest.mark.skipif(not find_spec("faster_coco_eval"), reason="not installed"))]
both = pytest.mark.parametrize("fast", FAST)


def polygon(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(number: int, box: list[float], image: Any = 1, category: Any = 1, **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": polygon(box),
    } | more


def result(score: float, box: list[float], image: Any = 1, category: Any = 1) -> dict[str, Any]:
    code = rle_of(polygon(box), (HEIGHT, WIDTH))
    return {"image_id": image, "category_id": category, "bbox": box, "score": score, "segmentation": code}


def truth(*annotations: dict[str, Any], images: tuple[Any, ...] = (1,), categories: tuple[Any, ...] = (1,)) -> Any:
    return {
        "images": [{"id": one, "height": HEIGHT, "width": WIDTH} for one in images],
        "annotations": list(annotations),
        "categories": [{"id": one, "name": f"kind {one}"} for one in categories],
    }


LARGE, SMALL = [0, 0, 100, 100], [200, 200, 20, 20]
BESIDE = [0, 0, 62, 100]  # overlaps LARGE by 0.62, enough for the thresholds 0.50, 0.55 and 0.60
FAR = [300, 100, 50, 50]


@both
def test_two_objects_of_which_one_is_found_roughly(fast: bool) -> None:
    judged = judge(
        truth(annotation(1, LARGE), annotation(2, SMALL)), [result(0.9, SMALL), result(0.8, BESIDE)], fast=fast
    )
    # At 3 of 10 thresholds both are found. At 7, one: 51 of the 101 points of recall (0 to 0.5) have a precision of 1.
    for kind in ("box", "mask"):
        precision = judged.kinds[kind]
        assert precision.ap == pytest.approx((3 + 7 * 51 / 101) / 10)
        assert precision.ap50 == pytest.approx(1) and precision.ap75 == pytest.approx(51 / 101)
        assert precision.ap_small == pytest.approx(1) and precision.ap_medium is None
        assert precision.ap_large == pytest.approx(0.3)
        assert precision.ar100 == pytest.approx((3 * 1 + 7 * 0.5) / 10)
        assert precision.per_category == (precision.ap,)
    assert judged.objects == (2,) and (judged.images, judged.found) == (1, 2)


@both
def test_a_better_scored_mistake_halves_precision(fast: bool) -> None:
    judged = judge(truth(annotation(1, LARGE)), [result(0.9, FAR), result(0.8, LARGE)], fast=fast)
    assert judged.kinds["box"].ap == pytest.approx(0.5) and judged.kinds["mask"].ar100 == pytest.approx(1)
    later = judge(truth(annotation(1, LARGE)), [result(0.7, FAR), result(0.8, LARGE)], fast=fast)
    assert later.kinds["box"].ap == pytest.approx(1)


def random_case() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Images with objects of three sizes, crowds, empty images, and results that are near, doubled and wrong."""
    rng = np.random.default_rng(0)
    annotations, results = [], []
    for image in range(1, 12):
        for _ in range(rng.integers(0, 9)):
            w, h = rng.choice([10, 50, 150], 2) + rng.integers(0, 20, 2)
            x, y = rng.integers(0, WIDTH - w), rng.integers(0, HEIGHT - h)
            box, category = [float(v) for v in (x, y, w, h)], int(rng.integers(1, 4))
            crowd = rng.random() < 0.15
            more = {"iscrowd": 1, "segmentation": rle_of(polygon(box), (HEIGHT, WIDTH))} if crowd else {}
            annotations.append(annotation(len(annotations) + 1, box, image, category, **more))
            for _ in range(rng.integers(0, 3)):
                near = [max(0.0, v + s) for v, s in zip(box, rng.normal(0, 0.07, 4) * [w, h, w, h], strict=True)]
                kind = category if rng.random() < 0.8 else int(rng.integers(1, 5))
                results.append(result(round(float(rng.random()), 1), near, image, kind))  # some scores are equal
    return truth(*annotations, images=tuple(range(1, 13)), categories=(1, 2, 3, 4)), results


@both
def test_all_is_as_pycocotools_has_it(fast: bool) -> None:
    told, results = random_case()
    given = copy.deepcopy((told, results))
    judged = judge(told, results, fast=fast)
    assert (told, results) == given
    for kind, ours in (("bbox", "box"), ("segm", "mask")):
        with redirect_stdout(io.StringIO()):
            whole = COCO()
            whole.dataset = copy.deepcopy(told)
            whole.createIndex()
            # With its box, pycocotools would take the box's area for the mask's.
            kept = [{k: v for k, v in r.items() if k != "bbox" or kind == "bbox"} for r in copy.deepcopy(results)]
            evaluation = COCOeval(whole, whole.loadRes(kept), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        precision = judged.kinds[ours]
        names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
        assert [getattr(precision, name) for name in names] == pytest.approx(evaluation.stats[:6].tolist())
        assert precision.ar100 == pytest.approx(evaluation.stats[8])
        assert 0.05 < evaluation.stats[0] < 0.9 and precision.per_category[3] is None
        known = [ap for ap in precision.per_category if ap is not None]
        assert np.mean(known) == pytest.approx(precision.ap) and len(known) == 3


@both
def test_nothing_found_is_0_and_nothing_to_find_is_none(fast: bool) -> None:
    judged = judge(truth(annotation(1, LARGE), categories=(1, 2)), [], fast=fast)
    assert judged.kinds["box"].ap == judged.kinds["mask"].ar100 == 0
    assert judged.kinds["box"].per_category == (0, None) and judged.objects == (1, 0)
    empty = judge(truth(), [result(0.9, LARGE)], fast=fast)
    assert empty.kinds["box"].ap is None and empty.kinds["mask"].ar100 is None
    assert rows_of(empty) == {} and "-" in summary(empty)[2]
    none_at_all = judge(truth(), [], fast=fast)
    assert none_at_all.kinds["mask"].ap is None


@both
def test_what_is_found_inside_a_crowd_is_no_mistake(fast: bool) -> None:
    crowd = annotation(
        2, [150, 50, 200, 200], iscrowd=1, segmentation=rle_of(polygon([150, 50, 200, 200]), (HEIGHT, WIDTH))
    )
    results = [result(0.9, FAR), result(0.8, LARGE)]
    assert judge(truth(annotation(1, LARGE), crowd), results, fast=fast).kinds["box"].ap == pytest.approx(1)
    judged = judge(truth(annotation(1, LARGE), crowd), results, fast=fast)
    assert judged.kinds["mask"].ap == pytest.approx(1) and judged.objects == (1,)


@both
def test_ids_may_be_text_or_have_gaps(fast: bool) -> None:
    told, results = random_case()
    expected = judge(told, results, fast=fast)
    renamed: Any = copy.deepcopy((told, results))
    for one in renamed[0]["images"]:
        one["id"] = f"image {one['id']:02}.jpg"
    for one in renamed[0]["categories"]:
        one["id"] = one["id"] * 17
    for one in (*renamed[0]["annotations"], *renamed[1]):
        one["image_id"] = f"image {one['image_id']:02}.jpg"
        one["category_id"] *= 17
    assert judge(*renamed, fast=fast) == expected
    for one in (*renamed[0]["categories"],):
        one["id"] = f"c{one['id']}"
    for one in (*renamed[0]["annotations"], *renamed[1]):
        one["category_id"] = f"c{one['category_id']}"
    assert judge(*renamed, fast=fast) == expected


@both
def test_annotations_need_no_ids_of_their_own(fast: bool) -> None:
    for first, second in ((0, 1), (5, 5)):
        told = truth(annotation(first, LARGE), annotation(second, SMALL))
        assert judge(told, [result(0.9, LARGE), result(0.8, SMALL)], fast=fast).kinds["box"].ap == pytest.approx(1)


@both
def test_missing_fields_are_filled_in(fast: bool) -> None:
    results = [result(0.9, SMALL), result(0.8, BESIDE)]
    expected = judge(truth(annotation(1, LARGE), annotation(2, SMALL)), results, fast=fast)
    for lacking in (["area"], ["iscrowd"], ["area", "iscrowd", "bbox"]):
        told = truth(annotation(1, LARGE), annotation(2, SMALL))
        for one in told["annotations"]:
            for key in lacking:
                del one[key]
        assert judge(told, results, fast=fast) == expected, lacking
    told = truth(annotation(1, LARGE), annotation(2, SMALL))
    for one in told["annotations"]:
        del one["area"], one["segmentation"]
    del told["images"][0]["height"]
    assert judge(told, results, ("bbox",), fast).kinds == {"box": expected.kinds["box"]}
    masks = [{k: v for k, v in one.items() if k != "bbox"} for one in results]
    assert judge(truth(annotation(1, LARGE), annotation(2, SMALL)), masks, fast=fast) == expected


@both
def test_the_size_of_a_mask_is_its_own_and_not_its_boxes(fast: bool) -> None:
    sliver = result(0.9, [150, 100, 60, 20]) | {"bbox": [150, 100, 200, 200]}  # found in vain: medium by its mask
    judged = judge(truth(annotation(1, LARGE)), [sliver, result(0.8, LARGE)], fast=fast)
    assert judged.kinds["mask"].ap_large == pytest.approx(1) and judged.kinds["box"].ap_large == pytest.approx(0.5)


def test_annotations_of_what_is_not_listed_are_left_out() -> None:
    told = truth(annotation(1, LARGE), annotation(2, SMALL, image=9), annotation(3, SMALL, category=9))
    judged = judge(told, [result(0.9, LARGE)])
    assert judged.kinds["box"].ap == pytest.approx(1) and judged.objects == (1,)


def without(whole: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in whole.items() if k != key}


@pytest.mark.parametrize(
    ("told", "results", "message"),
    [
        (truth(), [result(1, LARGE, image=7)], "results have image_id 7, but the annotations have no such image"),
        (truth(), [result(1, LARGE, image="1")], "results have image_id '1', but"),
        (
            truth(),
            [result(1, LARGE, category=7)],
            "results have category_id 7, but the annotations have no such category",
        ),
        (
            truth(),
            [without(result(1, LARGE), "segmentation")],
            "result 1 of image 1 has no segmentation; without masks",
        ),
        (truth(without(annotation(8, LARGE), "segmentation")), [], "annotation 8 of image 1 has no segmentation"),
        (
            truth(annotation(8, LARGE, segmentation=[[0, 0]])),
            [],
            "the segmentation of annotation 8 of image 1 has no polygon of three points or more",
        ),
        (
            truth(),
            [result(1, LARGE) | {"segmentation": {"size": [5, 5], "counts": "0"}}],
            "the segmentation of result 1 of image 1 is of size [5, 5], but the image is of [307, 401]",
        ),
        (
            {**truth(annotation(8, LARGE)), "images": [{"id": 1}]},
            [],
            "annotation 8 of image 1: the image has no height and width",
        ),
    ],
)
def test_what_cannot_be_judged_is_told_in_one_line(told: Any, results: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        judge(told, results)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_annotation_of_nothing_is_told() -> None:
    with pytest.raises(UserError, match="annotation 8 of image 1 has neither bbox nor segmentation"):
        judge(truth(without(without(annotation(8, LARGE), "segmentation"), "bbox")), [], ("bbox",))
    with pytest.raises(ValueError, match=r"kinds are \('boxes',\); they can be bbox and segm"):
        judge(truth(), [], ("boxes",))


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for fast in (False, None):
        judge(*random_case(), fast=fast)
    assert capfd.readouterr() == ("", "")


def judged_case() -> Judgement:
    told = truth(annotation(1, LARGE), annotation(2, SMALL, category=2), categories=(1, 2, 3))
    told["categories"][1]["name"] = "a|b, c"
    return judge(told, [result(0.9, LARGE), result(0.8, BESIDE, category=2)])


def test_numbers_have_names_for_a_line_of_metrics() -> None:
    rows = rows_of(judged_case())
    assert list(rows)[:4] == ["box_ap", "box_ap50", "box_ap75", "box_ap_small"] and "mask_ar100" in rows
    assert rows["box_ap"] == pytest.approx(0.5) and "box_ap_medium" not in rows
    assert all(type(value) is float for value in rows.values())


def test_the_summary_is_a_table_that_names_the_worst() -> None:
    lines = summary(judged_case(), worst=1)
    assert lines[0] == "found 2, to find 2, images 1; in percent"
    assert lines[1].split() == ["AP", "AP50", "AP75", "small", "medium", "large", "AR100"]
    assert lines[2].split() == ["box", "50.0", "50.0", "50.0", "0.0", "-", "100.0", "50.0"]
    assert len({len(line) for line in lines[1:4]}) == 1
    assert lines[4:] == ["lowest AP:", "  a|b, c  box   0.0  mask   0.0  of 1"]
    assert summary(judged_case())[4] == "AP of each category:"


def test_categories_are_written_as_a_table(tmp_path: Path) -> None:
    write_categories(tmp_path / "c.csv", judged_case())
    assert (tmp_path / "c.csv").read_text().splitlines() == [
        "category,objects,box_ap,mask_ap",
        "kind 1,1,1.0,1.0",
        '"a|b, c",1,0.0,0.0',
        "kind 3,0,,",
    ]
    write_categories(tmp_path / "c.md", judged_case())
    assert (tmp_path / "c.md").read_text().splitlines() == [
        "| category | objects | box AP | mask AP |",
        "|---|---:|---:|---:|",
        "| kind 1 | 1 | 100.0 | 100.0 |",
        "| a\\|b, c | 1 | 0.0 | 0.0 |",
        "| kind 3 | 0 | - | - |",
    ]
