"""Claims about the detector's halves and the whole: torchvision and hand computation judge."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, roi_align
from torchvision.ops.poolers import LevelMapper

from lomar.detection.cells import NormalCell
from lomar.detection.detector import Detector, DetectorPlan
from lomar.detection.frameworks import FRAMEWORKS
from lomar.detection.optim import detector_adamw, layer_of
from lomar.detection.proposals import Anchors, Proposals, Sampler
from lomar.detection.regions import CASCADE, BoxStage, Regions, Target, _chosen, cut_masks, pooled
from lomar.errors import UserError
from lomar.interop.detectors import load_detector, save_detector
from lomar.model import Encoder

STRIDES = (4.0, 8.0, 16.0, 32.0, 64.0)


def plan(**changes: Any) -> DetectorPlan:
    small = Encoder(32, 4, 3, 0, embed_dim=16, depth=2, num_heads=2).architecture
    values = {"architecture": small, "classes": ("a", "b"), "category_ids": (3, 7), "mean": (0.5,) * 3}
    values |= {"std": (0.25,) * 3, "scale": 255.0, "image_size": 32, "window": 4, "channels": 8, "sampled": 16}
    return DetectorPlan(**values | changes)


def inputs(objects: tuple[int, ...] = (2, 0), masks: bool = True) -> dict[str, Tensor]:
    """Two images of 32 x 32 pixels, of which the second is padded."""
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(sum(objects), 2, 2, generator=generator) * 12
    boxes = torch.cat([corners[:, 0], corners[:, 0] + corners[:, 1] + 2], dim=1)
    given = {
        "pixels": torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "sizes": torch.tensor([[32, 32], [20, 28]]),
        "boxes": boxes,
        "labels": torch.arange(sum(objects)) % 2,
        "counts": torch.tensor(objects),
        "seeds": torch.tensor([5, 6]),
    }
    return given | ({"masks": torch.ones(sum(objects), 32, 32, dtype=torch.uint8)} if masks else {})


def test_anchors_are_torchvisions_but_for_its_rounding() -> None:
    """Of one size a map and three shapes, around the corner of each cell."""
    maps = [torch.zeros(1, 8, 64 // 2**i, 64 // 2**i) for i in range(5)]
    images = ImageList(torch.zeros(1, 3, 256, 256), [(256, 256)])
    theirs = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)(images, maps)[0]
    ours = Anchors(STRIDES)(images, maps)[0]
    assert (ours - theirs).abs().max() <= 0.5
    torch.testing.assert_close(ours[1], torch.tensor([-16.0, -16.0, 16.0, 16.0]))
    wide = torch.tensor([-16 * math.sqrt(2), -8 * math.sqrt(2), 16 * math.sqrt(2), 8 * math.sqrt(2)])
    torch.testing.assert_close(ours[0], wide)


def test_strides_follow_the_patch_where_maps_do_not_fit() -> None:
    """Of 13 patches the coarser map has 6 cells: torchvision would make its stride 34."""
    maps = [torch.zeros(1, 8, side, side) for side in (52, 26, 13, 6, 3)]
    anchors = Anchors(STRIDES)(ImageList(torch.zeros(1, 3, 208, 208), [(208, 208)]), maps)[0]
    of_p5 = anchors[3 * (52**2 + 26**2 + 13**2) :][: 3 * 36]
    assert (of_p5[3] - of_p5[0]).tolist() == [32, 0, 32, 0]


def test_draws_belong_to_the_image() -> None:
    """Whatever images go with it and whatever was drawn before."""
    labels = [torch.tensor([1] * 9 + [0] * 30 + [-1] * 5), torch.tensor([0] * 40)]
    sampler = Sampler(16, 0.25, purpose=1)
    sampler.seeds = (7, 8)
    good, bad = sampler(labels)
    assert [int(g.sum()) for g in good] == [4, 0] and [int(b.sum()) for b in bad] == [12, 16]
    assert not (good[0] & (labels[0] != 1)).any() and not (bad[0] & (labels[0] != 0)).any()
    torch.rand(100)
    sampler.seeds = (8, 7)
    again = sampler(labels[::-1])
    assert torch.equal(again[0][1], good[0]) and torch.equal(again[1][0], bad[1])
    other = Sampler(16, 0.25, purpose=0)
    other.seeds = (7, 8)
    assert not torch.equal(other(labels)[1][1], bad[1])


def test_losses_of_proposals_are_sums_over_the_intended_number() -> None:
    """256 an image, however few were drawn; the distance of deltas is not smoothed."""
    proposals = Proposals(8, STRIDES, FRAMEWORKS["vitdet"])
    proposals.fg_bg_sampler.seeds = (1,)
    rated, moved = proposals.compute_loss(
        torch.tensor([[2.0], [-1.0], [9.0]]),
        torch.tensor([[0.5, 0.0, 0.0, 0.0], [9.0] * 4, [9.0] * 4]),
        [torch.tensor([1.0, 0.0, -1.0])],
        [torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4])],
    )
    assert moved.item() == pytest.approx(1.5 / 256)
    assert rated.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 256)


def test_losses_of_a_box_are_worked_out_by_hand() -> None:
    """One region of class 1, one of nothing: cross-entropy is their mean, and so is the distance."""
    stage = BoxStage(8, 2, agnostic=False, overlap=0.5, weights=(10.0, 10.0, 5.0, 5.0), low_quality=False)
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    deltas = torch.zeros(2, 2, 4)
    deltas[0, 1] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    wanted = torch.tensor(
        [[1.0, 0.0, 11.0, 20.0], [0.0] * 4]
    )  # a tenth to the right, half its height down, twice as high
    loss = stage.loss(logits, deltas, boxes, torch.tensor([1, 2]), wanted)
    entropy = (math.log(2 + math.e) - 1 + math.log(2 + math.exp(2)) - 2) / 2
    distance = (abs(1 - 10 * 0.1) + 10 * 0.5 + 5 * math.log(2)) / 2
    assert loss.item() == pytest.approx(entropy + distance, rel=1e-5)


def test_regions_come_from_the_map_of_their_size() -> None:
    """torchvision's rule of levels judges: every map holds its own number."""
    maps = {f"p{level}": torch.full((1, 1, 1024 // 2**level, 1024 // 2**level), float(level)) for level in range(2, 6)}
    sides = torch.tensor([3.0, 30.0, 111.9, 112.0, 223.9, 224.0, 300.0, 448.0, 500.0, 900.0])
    boxes = torch.stack([torch.full_like(sides, 50.0), torch.full_like(sides, 50.0), 50 + sides, 50 + sides], dim=1)
    found = pooled(maps, STRIDES[:4], [boxes], 7)
    levels = LevelMapper(2, 5)([boxes]) + 2
    assert torch.equal(found[:, 0, 3, 3].round().long(), levels)


def test_a_region_is_pooled_without_half_a_pixel_of_offset() -> None:
    """A ramp's mean in a box is the ramp at its middle, where a cell's middle is half a cell from its edge."""
    ramp = torch.arange(32.0).expand(1, 1, 32, 32).contiguous()
    found = pooled({"p2": ramp}, (4.0,), [torch.tensor([[16.0, 16.0, 48.0, 48.0]])], 1)
    assert found.item() == pytest.approx((16 + 48) / 2 / 4 - 0.5, abs=1e-4)


def test_masks_are_cut_out_by_their_box() -> None:
    mask = torch.zeros(2, 64, 64, dtype=torch.uint8)
    mask[1, 10:30, 20:50] = 1
    boxes = torch.tensor([[20.0, 10.0, 50.0, 30.0], [5.0, 10.0, 35.0, 30.0]])
    whole, half = cut_masks(mask, boxes, torch.tensor([1, 1]))
    assert whole.min() == 1
    assert torch.equal(half, (torch.arange(28) >= 14).float().expand(28, 28))


def test_masks_are_cut_out_alike_however_many_there_are() -> None:
    """A few at a time: each box holds its own mask."""
    masks = torch.zeros(40, 32, 32, dtype=torch.uint8)
    for number in range(40):
        masks[number, :, : number % 28 + 4] = 1
    index = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    found = cut_masks(masks, torch.tensor([[0.0, 0.0, 32.0, 32.0]]).expand(40, 4), index)
    wanted = [round((int(number) % 28 + 4) / 32 * 28) for number in index]
    assert all(abs(int(mask[0].sum()) - columns) <= 1 for mask, columns in zip(found, wanted, strict=True))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("cascade", [False, True])
def test_a_step_reaches_every_weight(framework: str, cascade: bool) -> None:
    torch.manual_seed(0)
    detector = Detector(plan(framework=framework, cascade=cascade, cells=framework == "vitae"))
    loss, count = detector(**inputs(), paths=torch.rand(2, 2, 2))
    assert count == 2 and loss.isfinite()
    loss.backward()
    lacking = {name for name, p in detector.named_parameters() if p.grad is None}
    assert lacking == set()


def test_losses_have_names_and_a_step_is_a_function_of_its_inputs() -> None:
    torch.manual_seed(0)
    detector = Detector(plan(cascade=True))
    given = inputs()
    sizes = [(32, 32), (20, 28)]
    targets = [
        Target(given["boxes"], given["labels"], given["masks"]),
        Target(*(given[n][:0] for n in ("boxes", "labels", "masks"))),
    ]
    detector.proposals.fg_bg_sampler.seeds = detector.regions.sampler.seeds = (5, 6)
    losses = detector.losses(given["pixels"], sizes, targets)
    assert set(losses) == {"objectness", "anchors", "mask", "box1", "box2", "box3"}
    torch.rand(7)
    again, _ = detector(**given)
    assert again.item() == pytest.approx(2 * sum(loss.item() for loss in losses.values()))


@pytest.mark.parametrize("objects", [(0, 0), (1, 3)])
@pytest.mark.parametrize("masks", [False, True])
def test_images_without_objects_teach_that_there_is_nothing(objects: tuple[int, int], masks: bool) -> None:
    torch.manual_seed(0)
    detector = Detector(plan(masks=masks))
    loss, _ = detector(**inputs(objects, masks))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in detector.parameters())


def test_what_lies_in_the_padding_is_not_seen() -> None:
    torch.manual_seed(0)
    detector = Detector(plan()).eval()
    given = inputs()
    before = detector.detect(given["pixels"], given["sizes"])
    given["pixels"][1, :, 20:] = 255
    given["pixels"][1, :, :, 28:] = 0
    after = detector.detect(given["pixels"], given["sizes"])
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a.boxes, b.boxes)
        assert bool((a.boxes[:, 2] <= 32).all() and (a.boxes >= 0).all())
    assert bool((after[1].boxes[:, 3] <= 20).all() and (after[1].boxes[:, 2] <= 28).all())


def test_detections_of_a_class_do_not_overlap_much() -> None:
    torch.manual_seed(0)
    detector = Detector(plan()).eval()
    detector.regions.stages[0].classifier.bias.data = torch.tensor([3.0, 2.0, 0.0])  # type: ignore[union-attr]
    given = inputs()
    for found in detector.detect(given["pixels"], given["sizes"]):
        assert 2 <= len(found.boxes) <= 100 and found.masks is not None and found.masks.shape[1:] == (28, 28)
        assert torch.equal(found.scores, found.scores.sort(descending=True).values) and found.scores.min() > 0.05
        for label in (0, 1):
            own = found.boxes[found.labels == label]
            assert bool((box_iou(own, own) - torch.eye(len(own)) <= 0.5).all())


def test_a_cascade_refines_boxes_stage_by_stage() -> None:
    """Each stage starts from what the one before made of the boxes, at overlaps of 0.5, 0.6, 0.7."""
    regions = Regions(8, STRIDES[:4], 2, FRAMEWORKS["vitae"], cascade=True)
    for (overlap, weights), stage in zip(CASCADE, regions._stages(), strict=True):
        assert stage.matcher.high_threshold == overlap and stage.coder.weights == weights
        assert stage.mover.out_features == 4 and not stage.matcher.allow_low_quality_matches
    for stage in regions._stages():
        nn.init.zeros_(stage.mover.weight)
        stage.mover.bias.data = torch.tensor([stage.coder.weights[0] * 0.1, 0.0, 0.0, 0.0])  # a tenth to the right
        stage.classifier.bias.data = torch.tensor([4.0, 0.0, 0.0])
    maps = {f"p{level}": torch.zeros(1, 8, 64 // 2**level, 64 // 2**level) for level in range(2, 6)}
    (found,) = regions.detect(maps, [torch.tensor([[10.0, 10.0, 20.0, 20.0]])], [(64, 64)])
    torch.testing.assert_close(found.boxes[0], torch.tensor([13.0, 10.0, 23.0, 20.0]))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_regions_of_nothing_stay_that_when_not_all_objects_are_drawn(framework: str) -> None:
    """Six objects, of which four are drawn: none of the twelve regions far from all is taken for another's best."""
    regions = Regions(8, STRIDES[:4], 2, FRAMEWORKS[framework], masks=False, sampled=16)
    regions.sampler.seeds = (1,)
    corners = torch.cartesian_prod(torch.arange(3.0), torch.arange(2.0)) * 60
    target = Target(torch.cat([corners, corners + 20], dim=1), torch.arange(6) % 2, None)
    far = 200 + torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) * 15
    seen: list[Tensor] = []

    def note(logits: Tensor, deltas: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
        seen.extend((box_iou(boxes, target.boxes).amax(dim=1), labels))
        return logits.sum()

    regions._stages()[0].loss = note  # type: ignore[method-assign]
    maps = {f"p{level}": torch.zeros(1, 8, 256 // 2**level, 256 // 2**level) for level in range(2, 6)}
    regions.losses(maps, [torch.cat([far, far + 10], dim=1)], [(256, 256)], [target])
    overlaps, labels = seen
    assert overlaps.sort().values.tolist() == [0.0] * 12 + [1.0] * 4
    assert torch.equal(labels < 2, overlaps == 1)


def test_the_masks_of_objects_that_no_region_holds_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image of thousands of objects they would be gigabytes."""
    from lomar.detection import regions as module

    made: list[int] = []

    def counted(masks: Tensor, *rest: Any, **named: Any) -> Tensor:
        made.append(len(masks))
        return roi_align(masks, *rest, **named)

    monkeypatch.setattr(module, "roi_align", counted)
    mask = torch.zeros(50, 16, 16, dtype=torch.uint8)
    mask[7], mask[31, :8] = 1, 1
    boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0]] * 3)
    cut = cut_masks(mask, boxes, torch.tensor([31, 7, 31]))
    assert made == [2] and cut.mean(dim=(1, 2)).tolist() == [0.5, 1.0, 0.5]


def test_anchors_are_not_rounded_to_bfloat16() -> None:
    """In which a CPU's autocast leaves the maps."""
    images = ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)])
    maps = [torch.zeros(1, 8, 16 // 2**i, 16 // 2**i) for i in range(5)]
    assert torch.equal(
        Anchors(STRIDES)(images, [each.bfloat16() for each in maps])[0], Anchors(STRIDES)(images, maps)[0]
    )


def test_checkpointing_does_not_change_what_batch_norms_count() -> None:
    """A cell's second pass is of a batch that was counted."""
    counted = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        detector = Detector(plan(framework="vitae", cells=True))
        detector.backbone.grad_checkpointing = checkpointing
        detector(**inputs())[0].backward()
        counted.append({name: buffer for name, buffer in detector.named_buffers() if "running" in name})
    assert len(counted[0]) == 4 and all(torch.equal(counted[0][name], counted[1][name]) for name in counted[0])


def test_stages_of_a_cascade_learn_from_their_own_overlaps_and_none_from_objects_put_in() -> None:
    """A region of overlap 0.55 is an object for the first alone, one of 0.65 for the second too."""
    regions = Regions(8, STRIDES[:4], 2, FRAMEWORKS["vitdet"], cascade=True, masks=False)
    regions.sampler.seeds = (1,)
    seen: list[Tensor] = []

    def note(logits: Tensor, deltas: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
        seen.append(labels)
        return logits.sum()

    for stage in regions._stages():
        stage.loss = note  # type: ignore[method-assign]
        nn.init.zeros_(stage.mover.weight)
    target = Target(torch.tensor([[0.0, 0.0, 40.0, 40.0]]), torch.tensor([1]), None)
    proposed = torch.tensor([[0.0, 0.0, 40.0, side] for side in (18.0, 22.0, 26.0)])  # overlaps of 0.45, 0.55, 0.65
    maps = {f"p{level}": torch.zeros(1, 8, 64 // 2**level, 64 // 2**level) for level in range(2, 6)}
    regions.losses(maps, [proposed], [(64, 64)], [target])
    assert [labels.tolist() for labels in seen] == [[2, 1, 1, 1], [2, 2, 1, 1], [2, 2, 2, 1]]


def test_each_stage_of_a_cascade_gives_a_third_of_its_gradient() -> None:
    gradients = []
    for cascade in (False, True):
        maps = {f"p{level}": torch.ones(1, 8, 8, 8, requires_grad=True) for level in range(2, 6)}
        regions = Regions(8, STRIDES[:4], 2, FRAMEWORKS["vitdet"], cascade=cascade)
        regions._pooled(maps, [torch.tensor([[0.0, 0.0, 30.0, 30.0]])]).sum().backward()
        gradients.append(maps["p2"].grad)
    assert gradients[0] is not None and gradients[1] is not None and gradients[0].sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0] / 3)


def test_scores_of_a_cascade_are_the_means_of_its_stages() -> None:
    regions = Regions(8, STRIDES[:4], 2, FRAMEWORKS["vitdet"], cascade=True, masks=False)
    odds = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    for stage, bias in zip(regions._stages(), odds, strict=True):
        nn.init.zeros_(stage.mover.weight)
        nn.init.zeros_(stage.classifier.weight)
        stage.classifier.bias.data = bias
    maps = {f"p{level}": torch.zeros(1, 8, 64 // 2**level, 64 // 2**level) for level in range(2, 6)}
    (found,) = regions.detect(maps, [torch.tensor([[10.0, 10.0, 20.0, 20.0]])], [(64, 64)])
    assert found.scores[0].item() == pytest.approx(odds.softmax(dim=1)[:, 0].mean().item())


def test_the_best_hundred_of_an_image_are_kept_and_none_of_little_score() -> None:
    corners = torch.cartesian_prod(torch.arange(15.0), torch.arange(10.0)) * 20
    boxes = torch.cat([corners, corners + 10], dim=1)[:, None]
    scores = torch.linspace(0.9, 0.2, 150)[:, None]
    found, likely, labels = _chosen(boxes, scores, (400, 400))
    assert torch.equal(found, boxes[:100, 0]) and torch.equal(likely, scores[:100, 0]) and not labels.any()
    assert len(_chosen(boxes, torch.linspace(0.0, 0.1, 150)[:, None], (400, 400))[0]) == 75


def test_of_a_mask_the_objects_own_class_is_learnt() -> None:
    regions = Regions(8, STRIDES[:4], 3, FRAMEWORKS["vitdet"])
    logits = torch.tensor([-1.0, 2.0, 5.0]).view(1, 3, 1, 1).expand(1, 3, 28, 28)

    class Fixed(nn.Module):
        def forward(self, regions: Tensor) -> Tensor:
            return logits

    regions.masks = Fixed()  # type: ignore[assignment]
    target = Target(torch.tensor([[0.0, 0.0, 32.0, 32.0]]), torch.tensor([1]), torch.ones(1, 64, 64, dtype=torch.uint8))
    maps = {f"p{level}": torch.zeros(1, 8, 64 // 2**level, 64 // 2**level) for level in range(2, 6)}
    loss = regions._mask_loss(maps, [target.boxes], [torch.tensor([0])], [target])
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)))


def test_the_numbers_of_proposals_are_detectron2s() -> None:
    proposals = Proposals(8, STRIDES, FRAMEWORKS["vitdet"])
    matcher = proposals.proposal_matcher
    assert (matcher.low_threshold, matcher.high_threshold, matcher.allow_low_quality_matches) == (0.3, 0.7, True)
    assert [proposals.train(learns).pre_nms_top_n() for learns in (True, False)] == [2000, 1000]
    assert [proposals.train(learns).post_nms_top_n() for learns in (True, False)] == [1000, 1000]
    assert proposals.nms_thresh == 0.7 and isinstance(proposals.fg_bg_sampler, Sampler)
    assert (proposals.fg_bg_sampler.per_image, proposals.fg_bg_sampler.positives) == (256, 128)


def test_a_detector_comes_back_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = Detector(plan(cells=True, framework="vitae", cascade=True)).eval()
    save_detector(tmp_path / "detector.safetensors", detector)
    loaded = load_detector(tmp_path)
    assert loaded.plan == detector.plan
    given = inputs()
    for a, b in zip(*(each.detect(given["pixels"], given["sizes"]) for each in (detector, loaded)), strict=True):
        assert torch.equal(a.boxes, b.boxes)


def test_what_is_no_detector_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no detector\.safetensors; is it the folder of a run of lomar detect"):
        load_detector(tmp_path)
    with pytest.raises(UserError, match="there is no run or file"):
        load_detector(tmp_path / "nothing")
    detector = Detector(plan())
    save_detector(tmp_path / "detector.safetensors", detector)
    content = (tmp_path / "detector.safetensors").read_bytes().replace(b'channels\\": 8', b'channels\\": 9')
    (tmp_path / "detector.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="does not hold a whole detector"):
        load_detector(tmp_path)


def test_a_cell_begins_as_the_block_whose_weights_it_takes() -> None:
    torch.manual_seed(0)
    encoder = Encoder(32, 4, 3, 0, embed_dim=16, depth=2, num_heads=2)
    small = plan(architecture=encoder.architecture)
    detectors = [Detector(plan(architecture=encoder.architecture, cells=cells)).eval() for cells in (False, True)]
    new = [each.backbone.begin_with(encoder) for each in detectors]
    assert all("convolutions" in name or "rel_pos" in name for name in new[1]) and len(new[1]) > len(new[0])
    assert all(isinstance(block, NormalCell) for block in detectors[1].backbone.blocks)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(*(each.backbone(images) for each in detectors))
    assert small.cells is False


def _scales(detector: Detector, decay: float) -> dict[str, tuple[float, float]]:
    optimizer = detector_adamw(detector, 0.1, (0.9, 0.999), decay)
    names = {id(p): name for name, p in detector.named_parameters()}
    return {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_rates_fall_towards_the_first_layer_and_decay_is_the_frameworks() -> None:
    """SPEC E.1 and E.2."""
    assert [
        layer_of(f"backbone.{n}", 12) for n in ("patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.bias")
    ] == [0, 1, 13]
    assert layer_of("pyramid.p3.weight", 12) == 13
    ours = _scales(Detector(plan()), 0.7)
    assert ours["backbone.patch_embed.proj.weight"] == (pytest.approx(0.7**3), 0.1)
    assert ours["backbone.blocks.1.attn.qkv.bias"] == (pytest.approx(0.7), 0.1)
    assert ours["backbone.blocks.0.norm1.weight"] == (pytest.approx(0.49), 0.0)
    assert ours["backbone.blocks.0.attn.rel_pos.rel_pos_h"][1] == 0.1
    assert ours["backbone.blocks.0.attn.rpe.table"] == (pytest.approx(0.49), 0.1)
    assert ours["pyramid.necks.0.1.weight"] == (1.0, 0.1)
    ports = _scales(Detector(plan(framework="vitae")), 0.7)
    assert ports["backbone.blocks.1.attn.qkv.bias"][1] == ports["backbone.blocks.0.attn.rel_pos.rel_pos_h"][1] == 0.0
    assert ports["backbone.blocks.0.attn.rpe.table"][1] == ports["pyramid.necks.0.1.weight"][1] == 0.0
    assert ports["backbone.blocks.0.attn.qkv.weight"][1] == 0.1
