"""The optimiser of a detector: rates that fall towards the encoder's first layers, and what is decayed."""

import re
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import nn

from lomar.detection.detector import Detector
from lomar.detection.frameworks import FRAMEWORKS

_TABLES = re.compile(r"\.(rel_pos_h|rel_pos_w|rpe\.table|rel_pos_bias\.table)$")


def layer_of(name: str, depth: int) -> int:
    """The layer that a detector's parameter is of: 0 of the stem, i + 1 of block i, depth + 1 of the rest."""
    if name.startswith(("backbone.patch_embed.", "backbone.pos_embed")):
        return 0
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def detector_adamw(
    detector: Detector, weight_decay: float, betas: tuple[float, float], layer_decay: float
) -> torch.optim.AdamW:
    """AdamW over a detector; a group's `lr_scale` is layer_decay^(depth + 1 - layer).

    ViTDet spares norms, but for those of maps, and the table of positions; the ViTAE repository spares
    all that has one dimension and all tables of positions. LoMaR's contextual tables count as relative positions.

    Args:
        detector: its parameters that are trained.
        weight_decay: of those that are decayed.
        betas: AdamW's momenta.
        layer_decay: factor from each layer to the one before.
    """
    depth = len(detector.backbone.blocks)
    everything = FRAMEWORKS[detector.plan.framework].decays_vectors
    norms = {
        id(parameter)
        for module in detector.modules()
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d) and not isinstance(module, LayerNorm2d)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in detector.named_parameters():
        if not parameter.requires_grad:
            continue
        if everything:
            spared = id(parameter) in norms or name == "backbone.pos_embed"
        else:
            spared = parameter.ndim <= 1 or name == "backbone.pos_embed" or _TABLES.search(name) is not None
        layer = layer_of(name, depth)
        group = {"params": [], "lr_scale": layer_decay ** (depth + 1 - layer), "weight_decay": weight_decay}
        groups.setdefault((layer, spared), group | {"weight_decay": 0.0} if spared else group)["params"].append(
            parameter
        )
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=betas, fused=True)
