"""What is in a proposed region: its class, its box, its mask. One stage, or three that refine each other (cascade)."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes, roi_align

from lomar.detection.frameworks import Framework
from lomar.detection.proposals import Sampler

POSITIVE_SHARE = 0.25
BOX_PX, MASK_PX = 7, 14  # side of what is pooled from the maps
MASK_OUT = 28  # side of a predicted mask
_MASKS_AT_ONCE = 16
SCORE, NMS, MOST = 0.05, 0.5, 100  # of a detection at least; overlap at most; detections of an image
# Overlap with an object from which a region is one, and what its deltas are multiplied by: of one stage, and of three.
PLAIN = ((0.5, (10.0, 10.0, 5.0, 5.0)),)
CASCADE = ((0.5, (10.0, 10.0, 5.0, 5.0)), (0.6, (20.0, 20.0, 10.0, 10.0)), (0.7, (30.0, 30.0, 15.0, 15.0)))


class Target(NamedTuple):
    """The objects of an image.

    Args:
        boxes: float32 (n, 4): x0, y0, x1, y1 in pixels.
        labels: int64 (n,), from 0.
        masks: uint8 (n, height, width), or None.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None


class Detected(NamedTuple):
    """What was found in an image, the likeliest first.

    Args:
        boxes: float32 (n, 4): x0, y0, x1, y1 in pixels.
        scores: (n,), 0 to 1.
        labels: int64 (n,), from 0.
        masks: (n, 28, 28), 0 to 1, within the boxes; None of a detector without masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


def pooled(maps: Mapping[str, Tensor], strides: Sequence[float], boxes: Sequence[Tensor], side: int) -> Tensor:
    """What lies in boxes, each taken from the map whose scale fits it: (all boxes, C, side, side), float32.

    Args:
        maps: (B, C, h, w) each, the finest first.
        strides: of the maps, in pixels.
        boxes: (n, 4) of each image.
        side: of the result.

    Source: RoIAlign without half-pixel offset (`aligned`) and levels as in FPN: 224 px to the map of stride 16.
    """
    joined = torch.cat(list(boxes))
    image = torch.cat([torch.full((len(own), 1), i, device=own.device) for i, own in enumerate(boxes)])
    regions = torch.cat([image.to(joined), joined], dim=1)
    sides = ((joined[:, 2] - joined[:, 0]) * (joined[:, 3] - joined[:, 1])).clamp(min=0).sqrt()
    level = (4 + (sides / 224 + 1e-8).log2() - math.log2(strides[0])).floor().clamp(0, len(strides) - 1).long()
    first = next(iter(maps.values()))
    out = first.new_zeros((len(joined), first.shape[1], side, side), dtype=torch.float32)
    for number, (each, stride) in enumerate(zip(maps.values(), strides, strict=True)):
        (of_level,) = torch.where(level == number)
        found = roi_align(each.float(), regions[of_level], side, 1 / stride, sampling_ratio=0, aligned=True)
        out = out.index_put((of_level,), found)
    return out


class BoxStage(nn.Module):
    """One look at regions: four convolutions and a layer, then classes and moves.

    Args:
        channels: of the maps.
        classes: their number K.
        agnostic: whether a region is moved alike for all classes.
        overlap: with an object, from which a region is one.
        weights: what deltas are multiplied by.
        low_quality: whether an object takes its best region, however badly that meets it.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        agnostic: bool,
        overlap: float,
        weights: tuple[float, float, float, float],
        low_quality: bool,
    ) -> None:
        super().__init__()
        hidden = 4 * channels
        self.classes = classes
        self.coder = BoxCoder(weights)
        self.matcher = Matcher(overlap, overlap, allow_low_quality_matches=low_quality)
        self.head = FastRCNNConvFCHead((channels, BOX_PX, BOX_PX), [channels] * 4, [hidden], norm_layer=LayerNorm2d)
        self.classifier = nn.Linear(hidden, classes + 1)
        self.mover = nn.Linear(hidden, 4 if agnostic else 4 * classes)
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)
        for layer, std in ((self.classifier, 0.01), (self.mover, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C, 7, 7) -> logits (n, K + 1), the last of nothing, and deltas (n, K or 1, 4)."""
        x = self.head(regions)
        return self.classifier(x).float(), self.mover(x).float().unflatten(1, (-1, 4))

    def matched(self, boxes: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Which object each box (n, 4) is of, and its class; K of those of none."""
        if not len(target.labels):
            nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
            return nothing, torch.full_like(nothing, self.classes)
        index = self.matcher(box_iou(target.boxes, boxes))
        object_ = index.clamp(min=0)
        return object_, target.labels[object_].masked_fill(index < 0, self.classes)

    def loss(self, logits: Tensor, deltas: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropy and, of objects, the distance of deltas, both over the number of regions.

        Args:
            logits, deltas: of `forward`.
            boxes: (n, 4), the regions.
            labels: (n,), K of nothing.
            wanted: (n, 4), the boxes of their objects.
        """
        if not len(labels):
            return logits.sum() * 0 + deltas.sum() * 0
        (found,) = torch.where(labels < self.classes)
        aim = self.coder.encode_single(wanted[found], boxes[found])
        own = deltas[found, labels[found] if deltas.shape[1] > 1 else 0]
        return F.cross_entropy(logits, labels) + F.l1_loss(own, aim, reduction="sum") / len(labels)

    def moved(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) after deltas (n, k, 4): (n, k, 4)."""
        moved: Tensor = self.coder.decode_single(deltas.flatten(1), boxes)
        return moved.unflatten(1, (-1, 4)) if moved.ndim == 2 else moved


class MaskBranch(nn.Module):
    """(n, C, 14, 14) -> mask logits (n, K, 28, 28).

    Args:
        channels: of the maps.
        classes: their number K.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.head = MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=LayerNorm2d)
        self.grow = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.classifier = nn.Conv2d(channels, classes, 1)
        nn.init.kaiming_normal_(self.grow.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.001)
        for layer in (self.grow, self.classifier):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> Tensor:
        """Logits, float32."""
        return self.classifier(F.relu(self.grow(self.head(regions)))).float()


class _ScaledGradient(torch.autograd.Function):
    """The same, with a smaller gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None  # type: ignore[attr-defined]


class Regions(nn.Module):
    """The second half of Mask R-CNN, or of Cascade Mask R-CNN.

    Args:
        channels: of the maps.
        strides: of the maps that regions are taken from, in pixels.
        classes: their number K.
        framework: what differs.
        cascade: whether three stages refine the boxes, each at a higher overlap.
        masks: whether there are masks.
        sampled: regions of an image that are learned from.

    Source: He et al. 2017; Cai and Vasconcelos 2018; detectron2.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[float],
        classes: int,
        framework: Framework,
        cascade: bool = False,
        masks: bool = True,
        sampled: int = 512,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.classes = classes
        low_quality = framework.low_quality_matches and not cascade
        self.stages = nn.ModuleList(
            BoxStage(channels, classes, cascade, overlap, weights, low_quality)
            for overlap, weights in (CASCADE if cascade else PLAIN)
        )
        self.masks = MaskBranch(channels, classes) if masks else None
        self.sampler = Sampler(sampled, POSITIVE_SHARE, purpose=1)

    def losses(
        self,
        maps: Mapping[str, Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """Named losses, to be added up.

        Args:
            maps: of the pyramid.
            proposals: (n, 4) of each image.
            sizes: (height, width) of each image without padding.
            targets: the objects.
        """
        boxes, matches = self._sampled(proposals, targets)
        losses: dict[str, Tensor] = {}
        if self.masks is not None:
            objects = [index.masked_fill(labels == self.classes, -1) for index, labels in matches]
            losses["mask"] = self._mask_loss(maps, boxes, objects, targets)
        for number, stage in enumerate(self._stages()):
            if number:  # the first one's are of all regions: an object's best among those drawn may be a bad one
                matches = [stage.matched(own, target) for own, target in zip(boxes, targets, strict=True)]
            logits, deltas = stage(self._pooled(maps, boxes))
            wanted = [
                target.boxes[index] if len(target.boxes) else own
                for own, target, (index, _) in zip(boxes, targets, matches, strict=True)
            ]
            joined = torch.cat(boxes), torch.cat([labels for _, labels in matches]), torch.cat(wanted)
            name = "box" if len(self.stages) == 1 else f"box{number + 1}"
            losses[name] = stage.loss(logits, deltas, *joined)
            if number + 1 < len(self.stages):
                boxes = [each[_has_area(each)] for each in self._refined(stage, deltas.detach(), boxes, sizes)]
        return losses

    def detect(
        self, maps: Mapping[str, Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detected]:
        """What is in each image; arguments as of `losses`."""
        boxes = list(proposals)
        probabilities = []
        deltas = torch.empty(0)
        for number, stage in enumerate(self._stages()):
            logits, deltas = stage(self._pooled(maps, boxes))
            probabilities.append(logits.softmax(dim=-1))
            if number + 1 < len(self.stages):
                boxes = self._refined(stage, deltas, boxes, sizes)
        likely = torch.stack(probabilities).mean(dim=0)[:, :-1]
        moved = self._stages()[-1].moved(deltas, torch.cat(boxes))
        counts = [len(each) for each in boxes]
        chosen = [
            _chosen(own, scores, size)
            for own, scores, size in zip(moved.split(counts), likely.split(counts), sizes, strict=True)
        ]
        if self.masks is None:
            return [Detected(*each, None) for each in chosen]
        logits = self.masks(pooled(maps, self.strides, [each[0] for each in chosen], MASK_PX))
        labels = torch.cat([each[2] for each in chosen])
        masks = logits[torch.arange(len(labels), device=labels.device), labels].sigmoid()
        split = masks.split([len(each[0]) for each in chosen])
        return [Detected(*each, own) for each, own in zip(chosen, split, strict=True)]

    def _stages(self) -> list[BoxStage]:
        return [stage for stage in self.stages if isinstance(stage, BoxStage)]

    def _pooled(self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        regions = pooled(maps, self.strides, boxes, BOX_PX)
        return _ScaledGradient.apply(regions, 1 / len(self.stages)) if len(self.stages) > 1 else regions

    def _sampled(
        self, proposals: Sequence[Tensor], targets: Sequence[Target]
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Boxes to learn from, objects themselves among them, and what each matches, as `BoxStage.matched` says."""
        stage = self._stages()[0]
        boxes = [torch.cat([own, target.boxes]) for own, target in zip(proposals, targets, strict=True)]
        matches = [stage.matched(own, target) for own, target in zip(boxes, targets, strict=True)]
        good, bad = self.sampler([(labels < self.classes).long() for _, labels in matches])
        drawn = [torch.where(a | b)[0] for a, b in zip(good, bad, strict=True)]
        return (
            [own[which] for own, which in zip(boxes, drawn, strict=True)],
            [(index[which], labels[which]) for (index, labels), which in zip(matches, drawn, strict=True)],
        )

    def _refined(
        self, stage: BoxStage, deltas: Tensor, boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        moved = stage.moved(deltas, torch.cat(list(boxes)))[:, 0].split([len(each) for each in boxes])
        return [clip_boxes_to_image(own, size) for own, size in zip(moved, sizes, strict=True)]

    def _mask_loss(
        self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor], objects: Sequence[Tensor], targets: Sequence[Target]
    ) -> Tensor:
        """Binary cross-entropy of the masks of the objects' classes."""
        assert self.masks is not None
        held = [own[index >= 0] for own, index in zip(boxes, objects, strict=True)]
        index = [own[own >= 0] for own in objects]
        logits = self.masks(pooled(maps, self.strides, held, MASK_PX))
        if not len(logits):
            return logits.sum() * 0
        labels = torch.cat([target.labels[own] for target, own in zip(targets, index, strict=True)])
        wanted = torch.cat([cut_masks(t.masks, own, i) for t, own, i in zip(targets, held, index, strict=True)])
        chosen = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(chosen, wanted)


def cut_masks(masks: Tensor | None, boxes: Tensor, index: Tensor) -> Tensor:
    """What a mask branch should predict of boxes: 0 or 1, (n, 28, 28).

    Args:
        masks: uint8 (objects, height, width).
        boxes: (n, 4).
        index: int64 (n,), whose mask each is to hold.
    """
    cut = boxes.new_zeros(len(boxes), MASK_OUT, MASK_OUT)
    if masks is None:
        return cut
    used, place = index.unique(return_inverse=True)
    for start in range(0, len(used), _MASKS_AT_ONCE):  # as float32 all of them may be gigabytes
        some = masks[used[start : start + _MASKS_AT_ONCE]]
        (own,) = torch.where((place >= start) & (place < start + len(some)))
        regions = torch.cat([(place[own] - start)[:, None].to(boxes), boxes[own]], dim=1)
        found = roi_align(some[:, None].to(boxes.dtype), regions, MASK_OUT, 1.0, sampling_ratio=0, aligned=True)
        cut[own] = (found[:, 0] >= 0.5).to(boxes.dtype)
    return cut


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def _chosen(boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest boxes that do not overlap with likelier ones of their class.

    Args:
        boxes: (n, K or 1, 4).
        scores: (n, K).
        size: (height, width) of the image.

    Returns:
        boxes (m, 4), scores (m,), labels (m,).
    """
    region, label = torch.where(scores > SCORE)
    found = clip_boxes_to_image(boxes[region, label if boxes.shape[1] > 1 else 0], size)
    likely = scores[region, label]
    large = remove_small_boxes(found, 1e-2)
    found, likely, label = found[large], likely[large], label[large]
    kept = batched_nms(found, likely, label, NMS)[:MOST]
    return found[kept], likely[kept], label[kept]
