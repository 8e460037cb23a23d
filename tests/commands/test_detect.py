"""Claims about `lomar detect`, `lomar detect-evaluate` and `lomar detect-predict`, as typed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept import last_state
from PIL import Image
from shapes import SETTINGS, coco, coco_layout

from lomar.commands.automatic import Hardware
from lomar.commands.detect_automatic import choose_detection
from lomar.commands.detecting import _found
from lomar.detection.judging import Judgement, Precision
from lomar.detection.regions import Detected
from lomar.interop.detectors import load_detector

Command = Callable[..., Any]  # its outcome: status, out, err


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `coco_layout`."""
    return coco_layout(tmp_path_factory.mktemp("shapes") / "shapes")


@pytest.fixture
def detect(
    lomar: Command, shapes: Path, finished_run: Path, miniature: None, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Train a small detector in a folder, without curves; the words given win over `SETTINGS`."""
    from lomar.commands import course as module

    monkeypatch.setattr(module, "learning_curves", lambda rows, path: None)

    def run(out: Path, *words: str | Path) -> Any:
        return lomar("detect", "--model", finished_run, "--data", shapes, SETTINGS, "--out", out, *words)

    return run


@pytest.fixture(scope="module")
def detector(shapes: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, as a user gets it, but sure enough to find something; not to be changed."""
    from lomar.cli import main
    from lomar.interop.detectors import save_detector

    run = tmp_path_factory.mktemp("detector") / "run"
    words = ["detect", "--model", str(finished_run), "--data", str(shapes), "--out", str(run), "--max-steps", "2"]
    assert main([*words, *SETTINGS.split()]) == 0
    made: Any = load_detector(run)
    made.regions.stages[0].classifier.bias.data = torch.tensor([2.0, 2.0, 0.0])
    save_detector(run / "detector.safetensors", made)
    return run


def refused(outcome: Any) -> str:
    assert outcome.status == 2, outcome.out + outcome.err
    assert outcome.err.startswith("lomar: error: ") and outcome.err.count("\n") == 1
    return str(outcome.err.removeprefix("lomar: error: ").strip())


def test_a_run_tells_what_it_does_and_leaves_a_detector(detect: Command, tmp_path: Path, rows: Any) -> None:
    done = detect(tmp_path / "run", "--max-steps 2 --eval-every 1")
    assert done.status == 0, done.err
    assert "8 objects of 2 classes in 4 images, boxes and masks; 2 images to judge by" in done.out
    assert "tensors of the backbone are the encoder's, 6 new: rel_pos of 6 tensors in the blocks" in done.out
    assert "step 2: box AP" in done.out and "lomar detect-predict --model" in done.out
    assert "box_ap" in rows(tmp_path / "run")[-1] and "mask_ap" in rows(tmp_path / "run")[-1]
    made = load_detector(tmp_path / "run")
    assert (made.plan.classes, made.plan.category_ids) == (("red", "blue"), (3, 9))
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert told["images"] == 2 and "mask_ap" in told
    assert (tmp_path / "run" / "figures" / "detections.png").exists()


def test_a_run_in_bfloat16_begins_near_one_in_float32(detect: Command, tmp_path: Path, rows: Any) -> None:
    """Rounding decides which of the regions that are nearly alike are looked at."""
    losses = []
    for precision in ("fp32", "bf16"):
        done = detect(tmp_path / precision, "--max-steps 1 --precision", precision)
        assert done.status == 0, done.err
        losses.append(next(row["loss"] for row in rows(tmp_path / precision) if "loss" in row))
    assert losses[0] == pytest.approx(losses[1], rel=0.2) and losses[0] != losses[1]


def test_a_resumed_run_equals_an_uninterrupted_one(
    detect: Command, lomar: Command, tmp_path: Path, interrupted_at: Callable[[int], None], course: Any
) -> None:
    """To the last bit: draws of anchors and regions, drop path and crops belong to the sample."""
    words = "--max-steps 4 --checkpoint-steps 2 --drop-path 0.3 --framework vitae --cascade --cells"
    assert detect(tmp_path / "whole", words).status == 0
    interrupted_at(3)
    assert detect(tmp_path / "run", words).status == 130
    assert lomar("detect --resume --out", tmp_path / "run").status == 0
    assert course(tmp_path / "run") == course(tmp_path / "whole")
    ends = [last_state(tmp_path / name)["model"] for name in ("run", "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    again = lomar("detect --resume --out", tmp_path / "run")
    assert again.status == 0 and "is finished: 4 steps" in again.out


def test_the_detector_of_the_best_evaluation_is_kept(
    detect: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lomar.commands.detect import Evaluation

    seen: list[torch.Tensor] = []

    def judge(self: Evaluation, detector: Any) -> Judgement:
        seen.append(detector.regions.stages[0].classifier.weight.detach().clone())
        ap = (0.1, 0.3, 0.2, 0.3)[len(seen) - 1]
        precision = Precision(ap, ap, ap, ap, ap, ap, ap, (ap, ap))
        return Judgement({"box": precision, "mask": precision}, ("red", "blue"), (2, 2), 2, 0)

    monkeypatch.setattr(Evaluation, "judge", judge)
    done = detect(tmp_path / "run", "--max-steps 3 --eval-every 0.5 --lr 0.01 --warmup-steps 0")
    assert done.status == 0, done.err
    assert len(seen) == 4 and torch.equal(seen[3], seen[1]) and not torch.equal(seen[1], seen[2])
    kept: Any = load_detector(tmp_path / "run")
    last: Any = load_detector(tmp_path / "run" / "detector-last.safetensors")
    assert torch.equal(kept.regions.stages[0].classifier.weight, seen[1])
    assert torch.equal(last.regions.stages[0].classifier.weight, seen[2])


def test_what_is_found_is_told_in_the_pixels_of_the_file() -> None:
    """Both sides have a scale of their own, since a resized image has whole pixels: 3 x 100 became 2 x 64."""
    answer = Detected(torch.tensor([[32.0, 1.0, 64.0, 2.0]]), torch.ones(1), torch.zeros(1, dtype=torch.int64), None)
    found = _found(answer, torch.tensor([2, 64]), torch.tensor([3, 100]))
    assert found.boxes.tolist() == [[50.0, 1.5, 100.0, 3.0]]


def test_images_that_judge_and_cannot_be_read_are_told(detect: Command, shapes: Path, tmp_path: Path) -> None:
    """Their objects would lower the numbers without a word."""
    told = coco(tmp_path / "val", 3, 21)
    (tmp_path / "val" / "told.json").write_text(json.dumps(told))
    (tmp_path / "val" / "22.png").write_bytes(b"none")
    done = detect(tmp_path / "run", "--max-steps 1 --val", tmp_path / "val" / "told.json")
    assert done.status == 0, done.err
    assert "1 of 3 images could not be read: their objects count as not found" in done.out


def test_boxes_alone_make_a_detector_without_masks(lomar: Command, miniature: None, tmp_path: Path) -> None:
    """From random weights, from one .json beside its images: a fifth of them judges."""
    told = coco(tmp_path / "data", 6, 1, masks=False)
    (tmp_path / "data" / "boxes.json").write_text(json.dumps(told))
    words = ("detect --model scratch:16x2x2 --data", tmp_path / "data" / "boxes.json", SETTINGS, "--max-steps 1")
    done = lomar(*words, "--out", tmp_path / "run")
    assert done.status == 0, done.err
    assert "boxes; 1 images to judge by, a fifth, drawn" in done.out and "all weights are new" in done.out
    assert load_detector(tmp_path / "run").regions.masks is None
    assert "mask_ap" not in json.loads((tmp_path / "run" / "evaluation.json").read_text())


def test_a_rehearsal_tells_shapes_schedule_and_memory_and_writes_nothing(detect: Command, tmp_path: Path) -> None:
    done = detect(tmp_path / "run", "--epochs 100 --dry-run")
    assert done.status == 0, done.err
    for text in (
        "backbone: 8x8 patches of 8 px, 16 wide",
        "attention: windows of 4, global in blocks 2 of 3",
        "maps of 8 channels, side in cells: p2 32, p3 16, p4 8, p5 4, p6 2",
        "200 steps of 2 images, 100 epochs of 4",
        "0.0001 at 20, 1e-05 at 178, 1e-06 at 193",
        "a step of 1 images of 64 px in fp32: loss",
    ):
        assert text in done.out, text
    assert not (tmp_path / "run").exists()


def test_it_is_judged_as_pycocotools_judges_its_results(
    lomar: Command, detector: Path, shapes: Path, miniature: None, tmp_path: Path
) -> None:
    """results.json has the file's own numbers of images and categories."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    done = lomar(
        "detect-evaluate --model", detector, "--data", shapes, "--device cpu --precision fp32 --out", tmp_path / "out"
    )
    assert done.status == 0, done.err
    assert "box" in done.out and "mask" in done.out and "written" in done.out
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    truth = COCO(str(shapes / "annotations" / "instances_val2017.json"))
    found = truth.loadRes(str(tmp_path / "out" / "results.json"))
    assert len(found.anns) > 4 and {each["category_id"] for each in found.anns.values()} == {3, 9}
    theirs = COCOeval(truth, found, "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert told["box_ap"] == pytest.approx(theirs.stats[0], abs=1e-6)
    assert told["box_ar100"] == pytest.approx(theirs.stats[8], abs=1e-6)
    with Image.open(tmp_path / "out" / "detections.png") as picture:
        assert picture.width > 200
    assert "already holds evaluation.json" in refused(
        lomar("detect-evaluate --model", detector, "--data", shapes, "--out", tmp_path / "out")
    )


def test_a_crowd_without_a_mask_is_judged_by_its_box(
    lomar: Command, detector: Path, miniature: None, tmp_path: Path
) -> None:
    """What is found there is no mistake."""
    told = coco(tmp_path / "data", 2, 1)
    told["annotations"][0] |= {"iscrowd": 1, "segmentation": []}
    (tmp_path / "data" / "told.json").write_text(json.dumps(told))
    words = ("detect-evaluate --device cpu --workers 0 --model", detector, "--data", tmp_path / "data" / "told.json")
    done = lomar(*words, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert "to find 3, images 2" in done.out and (tmp_path / "out" / "detections.png").exists()


def test_images_whose_channels_are_no_colours_are_judged_and_not_drawn(
    lomar: Command, miniature: None, tmp_path: Path
) -> None:
    """By a run too, which draws before it says what it came to."""
    told = coco(tmp_path / "data", 3, 1)
    for image in told["images"]:
        image["file_name"] = f"{image['id']}.npy"
        pixels = np.random.default_rng(image["id"]).integers(0, 256, (5, 48, 64), dtype=np.uint8)
        np.save(tmp_path / "data" / image["file_name"], pixels)
    (tmp_path / "data" / "told.json").write_text(json.dumps(told))
    words = ("--data", tmp_path / "data" / "told.json", "--device cpu --workers 0")
    done = lomar("detect --model scratch:16x2x2 --out", tmp_path / "run", SETTINGS, "--max-steps 1", *words)
    assert done.status == 0, done.err
    assert (tmp_path / "run" / "evaluation.json").exists() and not (
        tmp_path / "run" / "figures/detections.png"
    ).exists()
    done = lomar("detect-evaluate --model", tmp_path / "run", *words, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert "detections.png" not in done.out


def test_the_fifth_that_was_kept_apart_judges_only_where_a_run_learnt_from_the_rest(
    lomar: Command, miniature: None, tmp_path: Path
) -> None:
    """Other annotations in the same folder are judged whole."""
    for name, first in (("learnt", 1), ("other", 11)):
        told = coco(tmp_path / "data" / name, 5, first)
        for image in told["images"]:
            image["file_name"] = f"{name}/{image['file_name']}"
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    made = ("detect --model scratch:16x2x2 --max-steps 1", SETTINGS, "--data", tmp_path / "data")
    run = tmp_path / "run"
    assert lomar(*made, "--annotations", tmp_path / "learnt.json", "--out", run).status == 0
    asked = ("detect-evaluate --device cpu --workers 0 --model", run, "--data", tmp_path / "data", "--annotations")
    done = lomar(*asked, tmp_path / "learnt.json")
    assert "images 1;" in done.out and "the fifth that training had kept apart" in done.out
    done = lomar(*asked, tmp_path / "other.json")
    assert "images 5;" in done.out and "kept apart" not in done.out


def test_predictions_are_results_and_pictures(
    lomar: Command, detector: Path, shapes: Path, miniature: None, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes((shapes / "val2017" / "11.png").read_bytes())
    (tmp_path / "images" / "broken.png").write_bytes(b"none")
    words = (
        "detect-predict --device cpu --score 0.1 --model",
        detector,
        "--images",
        tmp_path / "images",
        "--out",
        tmp_path / "out",
    )
    done = lomar(*words)
    assert done.status == 0, done.err
    assert "in 1 images" in done.out and "1 images could not be read" in done.out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results and all(each["image_id"] == "a.png" and each["category_id"] in (3, 9) for each in results)
    assert all(0 <= each["bbox"][0] <= 64 and each["segmentation"]["size"] == [48, 64] for each in results)
    with Image.open(tmp_path / "out" / "pictures" / "a.png.png") as picture:
        assert picture.size == (64, 48)
        assert (np.asarray(picture) != np.asarray(Image.open(shapes / "val2017" / "11.png"))).any()
    assert "already holds results.json" in refused(lomar(*words))


def test_pictures_stay_in_their_folder_however_the_images_are_named(
    lomar: Command, detector: Path, shapes: Path, miniature: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative and absolute, and in a folder above."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("here/a.png", "b.png"):
        (tmp_path / name).write_bytes((shapes / "val2017" / "11.png").read_bytes())
    words = ("detect-predict --device cpu --workers 0 --model", detector, "--out", tmp_path / "out")
    done = lomar(*words, "--images a.png ../b.png", tmp_path / "b.png", "--pictures 3")
    assert done.status == 0, done.err
    pictures = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert pictures == {"pictures/here/a.png.png", "pictures/b.png.png"}


def test_what_does_not_fit_is_refused_in_one_line(
    detect: Command, lomar: Command, detector: Path, shapes: Path, finished_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert refused(lomar("detect --data", shapes, "--out", out)).startswith("--model is missing: a run")
    assert refused(lomar("detect --model", finished_run, "--out", out)).startswith(
        "--data is missing: a folder in COCO"
    )
    assert refused(lomar("detect --model", finished_run, "--data", shapes)).startswith("--out is missing")
    assert "--image-size 60 is no multiple of the encoder's patches of 8 px; 64 would be" in refused(
        detect(out, "--image-size 60")
    )
    assert "is less than 2 patches" in refused(detect(out, "--image-size 8"))
    assert "the smaller size comes first" in refused(detect(out, "--jitter 2 1"))
    assert "a model of timm" in refused(lomar("detect --model vit_tiny_patch16_224 --data", shapes, "--out", out))
    assert "holds detector, not the encoder or classifier" in refused(
        lomar("detect --model", detector / "detector.safetensors", "--data", shapes, "--out", out)
    )
    assert "--out" in refused(detect(finished_run)) and not out.exists()
    assert "is it the folder of a run of lomar detect" in refused(
        lomar("detect-evaluate --model", finished_run, "--data", shapes)
    )
    asked = ("--model", detector, "--images", shapes, "--out", out)
    assert "--image-size 60 is no multiple" in refused(lomar("detect-predict --image-size 60", *asked))
    assert "is less than 2 patches" in refused(lomar("detect-predict --image-size 8", *asked))
    other = tmp_path / "other"
    told = coco(other, 2, 1)
    told["categories"][0]["name"] = "green"
    (other / "green.json").write_text(json.dumps(told))
    assert "'green' is not among those of training" in refused(
        lomar("detect-evaluate --model", detector, "--data", other / "green.json")
    )


def test_automatic_choices_are_the_papers_where_the_data_is_its_size() -> None:
    gpu = Hardware("cuda", "a GPU", 80 * 10**9, 16, True)
    chosen = {n: c.value for n, c in choose_detection({}, 117_266, 640, 16, 768, gpu).items()}
    wanted = {"image_size": 1024, "batch_size": 64, "epochs": 100, "lr": 1e-4, "layer_decay": 0.7, "drop_path": 0.1}
    wanted |= {"warmup_steps": 250, "clip_grad": 0.0, "head_channels": 256, "regions": 512}
    assert {name: chosen[name] for name in wanted} == wanted
    few = {n: c.value for n, c in choose_detection({}, 500, 400, 16, 1024, gpu).items()}
    assert (few["image_size"], few["batch_size"], few["epochs"], few["layer_decay"]) == (640, 16, 200, 0.8)
    cpu = Hardware("cpu", "a CPU", 8 * 10**9, 2, False)
    slow = {n: c.value for n, c in choose_detection({}, 80, 640, 8, 192, cpu).items()}
    assert (slow["image_size"], slow["batch_size"], slow["epochs"], slow["head_channels"]) == (224, 4, 50, 64)
