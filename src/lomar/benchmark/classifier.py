"""Fine-tuning and features: lomar's encoder, the same without positions, and timm's plain vision transformer."""

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lomar.benchmark.place import Place
from lomar.benchmark.pretraining import updating
from lomar.model import Encoder
from lomar.training.optim import layerwise_adamw

CLASSES = 1000
CLASSIFIERS = ("timm", "lomar", "lomar, no positions")


def classifier(name: str, shape: Mapping[str, Any]) -> nn.Module:
    """A fresh classifier of 1000 classes that pools patch tokens; all of `CLASSIFIERS` are alike but for positions.

    Args:
        name: one of `CLASSIFIERS`.
        shape: img_size, patch_size, embed_dim, depth and num_heads.
    """
    if name == "timm":
        model: nn.Module = timm.models.VisionTransformer(
            **shape, num_classes=CLASSES, global_pool="avg", fc_norm=True, class_token=True
        )
        return model
    return Encoder(**shape, num_classes=CLASSES, position="contextual" if name == "lomar" else "none")


class _WithLoss(nn.Module):
    """A classifier with its loss on soft labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """Sum of the images' losses, and how many they are."""
        return F.cross_entropy(self.model(pixels), labels, reduction="sum"), len(pixels)


def training_step(place: Place, images: int, *, name: str, shape: Mapping[str, Any]) -> Callable[[], object]:
    """Forward, backward, clipping and update by AdamW with a rate for each layer, for a batch of noise."""
    model = classifier(name, shape)
    optimizer = layerwise_adamw(model, 0.05, (0.9, 0.999), 0.65)
    update = updating(place, _WithLoss(model), optimizer, images, clip_grad=3.0)
    inputs = {"pixels": _noise(place, images, shape), "labels": torch.full((images, CLASSES), 1 / CLASSES)}
    inputs = {name: each.to(place.device) for name, each in inputs.items()}
    return lambda: update(inputs)


def feature_step(place: Place, images: int, *, name: str, shape: Mapping[str, Any]) -> Callable[[], object]:
    """All tokens of a batch of noise, without gradients."""
    model: Any = classifier(name, shape).to(place.device).eval()
    features = torch.compile(model.forward_features) if place.compiled else model.forward_features
    pixels = _noise(place, images, shape)

    def step() -> None:
        with torch.inference_mode(), torch.autocast(place.device.type, torch.bfloat16, place.precision == "bf16"):
            features(pixels)

    return step


def _noise(place: Place, images: int, shape: Mapping[str, Any]) -> Tensor:
    return torch.randn(images, 3, shape["img_size"], shape["img_size"], device=place.device)
