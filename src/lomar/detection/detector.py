"""The whole detector: pixels -> losses in training, boxes and masks after it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from lomar.detection.backbone import WINDOW, Backbone, SimplePyramid
from lomar.detection.frameworks import FRAMEWORKS
from lomar.detection.proposals import Proposals
from lomar.detection.regions import Detected, Regions, Target


@dataclass(frozen=True)
class DetectorPlan:
    """Plain values that rebuild a detector.

    Args:
        architecture: of the encoder, as its `architecture` says.
        classes: names, in the order of the labels.
        category_ids: their numbers in the data.
        mean, std: of each channel, as shares of `scale`.
        scale: pixel value that stands for 1.
        framework: a name in `FRAMEWORKS`.
        image_size: side of the square that images are fitted into, in pixels.
        window: side of the backbone's windows in patches.
        decomposed: whether there are decomposed positions.
        cells: whether the encoder's blocks are ViTAE's normal cells.
        cascade: whether three stages refine the boxes.
        masks: whether there are masks.
        drop_path: probability of skipping the last block's branches, in training.
        channels: of the pyramid's maps and all that works on them.
        sampled: regions of an image that are learned from.
    """

    architecture: Mapping[str, Any]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    framework: str = "vitdet"
    image_size: int = 1024
    window: int = WINDOW
    decomposed: bool = True
    cells: bool = False
    cascade: bool = False
    masks: bool = True
    drop_path: float = 0.1
    channels: int = 256
    sampled: int = 512

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON keeps."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DetectorPlan":
        """From what JSON made of `to_dict`."""
        made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**made)


class Detector(nn.Module):
    """Mask R-CNN, or Cascade Mask R-CNN, on a plain vision transformer.

    Args:
        plan: what it is made of.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, plan: DetectorPlan) -> None:
        super().__init__()
        self.plan = plan
        framework = FRAMEWORKS[plan.framework]
        self.backbone = Backbone(
            plan.architecture,
            framework,
            plan.image_size,
            plan.window,
            decomposed=plan.decomposed,
            drop_path=plan.drop_path,
            cells=plan.cells,
        )
        self.pyramid = SimplePyramid(self.backbone.width, framework, plan.channels)
        patch = plan.architecture["patch_size"]
        strides = [patch / 4, patch / 2, patch, patch * 2, patch * 4]
        self.proposals = Proposals(plan.channels, strides, framework)
        self.regions = Regions(
            plan.channels, strides[:4], len(plan.classes), framework, plan.cascade, plan.masks, plan.sampled
        )
        self.register_buffer("mean", torch.tensor(plan.mean).view(-1, 1, 1) * plan.scale, persistent=False)
        self.register_buffer("std", torch.tensor(plan.std).view(-1, 1, 1) * plan.scale, persistent=False)

    def forward(
        self,
        pixels: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        counts: Tensor,
        seeds: Tensor,
        masks: Tensor | None = None,
        paths: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Sum of the images' losses, and how many they are.

        Losses are those of detectron2, which are over the images that go through together.

        Args:
            pixels: (B, C, height, width), padded at the right and below.
            sizes: int64 (B, 2), height and width without padding.
            boxes: float32 (M, 4), x0, y0, x1, y1 of the objects of all images, joined.
            labels: int64 (M,), from 0.
            counts: int64 (B,), objects of each image.
            seeds: int64 (B,), what the draw of anchors and regions depends on.
            masks: uint8 (M, height, width), of a detector with masks.
            paths: (B, depth, 2) uniform numbers that decide for drop path.
        """
        self.proposals.fg_bg_sampler.seeds = self.regions.sampler.seeds = seeds.tolist()
        split = counts.tolist()
        apart: Sequence[Tensor | None] = [None] * len(split) if masks is None else masks.split(split)
        targets = [Target(*each) for each in zip(boxes.split(split), labels.split(split), apart, strict=True)]
        losses = self.losses(pixels, _pairs(sizes), targets, paths)
        return torch.stack(list(losses.values())).sum() * len(pixels), len(pixels)

    def losses(
        self,
        pixels: Tensor,
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target],
        paths: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses by name: "objectness", "anchors", "box" (or of each stage) and "mask"; means over the images."""
        images = self._normalised(pixels, sizes)
        maps = self.pyramid(self.backbone(images, paths))
        given = [{"boxes": target.boxes} for target in targets]
        found, proposed = self.proposals(ImageList(images, list(sizes)), maps, given)
        of_regions = self.regions.losses(_without_coarsest(maps), found, sizes, targets)
        return {
            "objectness": proposed["loss_objectness"],
            "anchors": proposed["loss_rpn_box_reg"],
        } | of_regions

    @torch.no_grad()
    def detect(self, pixels: Tensor, sizes: Tensor) -> list[Detected]:
        """What is in each image; boxes in the pixels of what goes in. The detector must be in evaluation mode.

        Args:
            pixels, sizes: as of `forward`.
        """
        pairs = _pairs(sizes)
        images = self._normalised(pixels, pairs)
        maps = self.pyramid(self.backbone(images))
        found, _ = self.proposals(ImageList(images, pairs), maps)
        return self.regions.detect(_without_coarsest(maps), found, pairs)

    def _normalised(self, pixels: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Mean 0 and deviation 1; zeros where there is no image."""
        images = (pixels.float() - self.mean) / self.std
        for image, (height, width) in zip(images, sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images


def _pairs(sizes: Tensor) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in sizes.tolist()]


def _without_coarsest(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Regions are taken from all maps but the last, which has anchors alone."""
    return dict(list(maps.items())[:-1])
