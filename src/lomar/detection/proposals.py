"""Where objects may be: anchors, the network that rates and moves them, and which of them it learns from."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops.misc import Conv2dNormActivation

from lomar.detection.frameworks import Framework

RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors
ANCHOR_STRIDES = 8  # side of a square anchor over the stride of its map: 32 px at a stride of 4
SAMPLED = 256  # anchors of an image that are learned from
BEFORE_NMS, AFTER_NMS = {"training": 2000, "testing": 1000}, {"training": 1000, "testing": 1000}


class Sampler:
    """Some positives and negatives of each image, drawn by numbers that belong to the image.

    It stands in the place of torchvision's, which draws from the global generator, so that a resumed run draws what it
    would have drawn.

    Args:
        per_image: how many are drawn.
        positive_share: most of them that are positive.
        purpose: told from other samplers of the same images by this number.
    """

    def __init__(self, per_image: int, positive_share: float, purpose: int) -> None:
        self.per_image = per_image
        self.positives = int(per_image * positive_share)
        self.purpose = purpose
        self.seeds: Sequence[int] = ()

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Which are drawn.

        Args:
            labels: (N,) of each image: 1 and more positive, 0 negative, below to be passed over.

        Returns:
            uint8 (N,) of each image: the drawn positives, and the drawn negatives.
        """
        positives: list[Tensor] = []
        negatives: list[Tensor] = []
        for own, seed in zip(labels, self.seeds, strict=True):
            generator = torch.Generator(own.device).manual_seed(seed + self.purpose)
            order = torch.rand(len(own), generator=generator, device=own.device).argsort()
            good, bad = order[own[order] >= 1][: self.positives], order[own[order] == 0]
            bad = bad[: self.per_image - len(good)]
            for drawn, list_ in ((good, positives), (bad, negatives)):
                list_.append(torch.zeros_like(own, dtype=torch.uint8).index_fill_(0, drawn, 1))
        return positives, negatives


class Anchors(AnchorGenerator):
    """Boxes around every cell of every map, of one size a map and three shapes.

    Not rounded to pixels, as torchvision does, and of strides that follow from the patch and not from the maps' sizes.

    Args:
        strides: of the maps, in pixels.
    """

    def __init__(self, strides: Sequence[float]) -> None:
        self.strides = tuple(strides)
        super().__init__(tuple((ANCHOR_STRIDES * stride,) for stride in strides), (RATIOS,) * len(strides))

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (as torchvision has it)
    ) -> Tensor:
        """(sizes * shapes, 4): x0, y0, x1, y1 around the origin."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        ratios = torch.as_tensor(aspect_ratios, dtype=dtype, device=device)
        half = ratios.sqrt()[:, None] * sides / 2, sides / ratios.sqrt()[:, None] / 2  # of heights, of widths
        return torch.stack([-half[1], -half[0], half[1], half[0]], dim=-1).flatten(0, 1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """(N, 4) of each image, map by map, cell by cell."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)  # maps may be in bfloat16, which rounds the shapes
        grids = [list(each.shape[-2:]) for each in feature_maps]
        steps = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        joined = torch.cat(self.grid_anchors(grids, steps))
        return [joined] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """Two convolutions, then how likely each anchor is an object's and how it should be moved; the same for all maps.

    Args:
        channels: of the maps.
        normalised: whether the convolutions are normalised.
    """

    def __init__(self, channels: int, normalised: bool) -> None:
        super().__init__(channels, len(RATIOS), conv_depth=2)
        if normalised:
            norm = LayerNorm2d
            self.conv = nn.Sequential(*(Conv2dNormActivation(channels, channels, norm_layer=norm) for _ in range(2)))
            for layer in self.conv.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=0.01)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (B, C, h, w) -> objectness (B, 3, h, w) and deltas (B, 12, h, w) of each, in float32."""
        objectness, deltas = super().forward(x)
        return [each.float() for each in objectness], [each.float() for each in deltas]


class Proposals(RegionProposalNetwork):
    """The region proposal network, with the losses of detectron2: sums over what was drawn, over its intended number.

    Args:
        channels: of the maps.
        strides: of the maps, in pixels.
        framework: what differs.

    Source: Ren et al. 2015; detectron2; torchvision's implementation.
    """

    def __init__(self, channels: int, strides: Sequence[float], framework: Framework) -> None:
        super().__init__(
            Anchors(strides),
            ProposalHead(channels, framework.proposal_norm),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=SAMPLED,
            positive_fraction=0.5,
            pre_nms_top_n=BEFORE_NMS,
            post_nms_top_n=AFTER_NMS,
            nms_thresh=0.7,
        )
        self.fg_bg_sampler = Sampler(SAMPLED, 0.5, purpose=0)

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and of boxes.

        Args:
            objectness: (all anchors, 1).
            pred_bbox_deltas: (all anchors, 4).
            labels: (anchors,) of each image: 1, 0, or -1 for those that are passed over.
            regression_targets: (anchors, 4) of each image.
        """
        good, bad = (torch.cat(drawn).bool() for drawn in self.fg_bg_sampler(labels))
        targets = torch.cat(regression_targets)
        expected = SAMPLED * len(labels)
        boxes = F.l1_loss(pred_bbox_deltas[good], targets[good], reduction="sum") / expected
        drawn = good | bad
        rated = F.binary_cross_entropy_with_logits(objectness.flatten()[drawn], good[drawn].float(), reduction="sum")
        return rated / expected, boxes
