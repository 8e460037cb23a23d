"""The encoder as a detector's backbone: windowed attention with a few global blocks, then a pyramid of maps."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomar.detection.attention import GridAttention
from lomar.detection.cells import NormalCell
from lomar.detection.frameworks import Framework
from lomar.model import Encoder
from lomar.model.positions import Grid, grid_coordinates, resize_absolute
from lomar.model.transformer import NORM_EPS, Block

WINDOW = 14  # side of a window in patches: that of an image of 224 px, as in pretraining
LEVELS = ("p2", "p3", "p4", "p5", "p6")  # maps of a 4th, 8th, 16th, 32nd and 64th of the image at patches of 16 px


def global_blocks(depth: int) -> tuple[int, ...]:
    """Blocks that attend to the whole image: the last one of each quarter; of few blocks the last alone."""
    if depth < 4:
        return (depth - 1,)
    return tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))


class Backbone(nn.Module):
    """A vision transformer for large images: attention within windows, but for a few blocks.

    There is no cls token. Positions are those of the encoder that it begins with, and decomposed ones beside them if
    they are asked for.

    Args:
        architecture: of the encoder, as its `architecture` says.
        framework: what differs between ViTDet's implementations.
        img_size: side of the images in pixels, for tables of absolute and decomposed positions.
        window: side of the windows in patches; 0 for global attention everywhere.
        globals_: blocks with global attention; None is the last of each quarter.
        decomposed: whether there are decomposed positions.
        drop_path: probability of skipping the last block's branches.
        cells: whether the blocks are ViTAE's normal cells, with convolutions beside the attention.

    Source: Li et al. 2022 ("Exploring Plain Vision Transformer Backbones for Object Detection"), detectron2; LoMaR
    section 6.2 for the contextual position in it.
    """

    drop_rates: Tensor

    def __init__(
        self,
        architecture: Mapping[str, Any],
        framework: Framework,
        img_size: int = 1024,
        window: int = WINDOW,
        globals_: tuple[int, ...] | None = None,
        decomposed: bool = True,
        drop_path: float = 0.1,
        cells: bool = False,
    ) -> None:
        super().__init__()
        patch, width, depth = (int(architecture[name]) for name in ("patch_size", "embed_dim", "depth"))
        position = architecture["position"]
        self.width = width
        self.framework = framework
        self.grid: Grid = (img_size // patch, img_size // patch)
        self.patch_embed = PatchEmbed(img_size, patch, architecture["in_chans"], width, strict_img_size=False)
        pretrained = _pair(architecture["img_size"])
        self.position_grid: Grid = (
            self.grid if framework.position_resized_once else (pretrained[0] // patch, pretrained[1] // patch)
        )
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, 1 + self.position_grid[0] * self.position_grid[1], width))
            if position in ("sincos", "learned")
            else None
        )
        every = set(global_blocks(depth) if globals_ is None else globals_) if window else set(range(depth))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList()
        for i in range(depth):
            attention = GridAttention(
                width,
                architecture["num_heads"],
                self.grid,
                0 if i in every else window,
                architecture["key_bias"],
                contextual=position == "contextual",
                bias_grid=architecture["bias_grid"] if position in ("shared-bias", "block-bias") else None,
                decomposed=decomposed,
                scaled=framework.scaled_query,
            )
            block = NormalCell if cells else Block
            made = block(attention, width, architecture["mlp_ratio"], rates[i], architecture["init_values"])
            self.blocks.append(made)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS) if framework.final_norm else nn.Identity()
        self.register_buffer("drop_rates", torch.tensor(rates), persistent=False)
        self.grad_checkpointing = False
        self.apply(_initialised)

    def forward(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """Normalised (B, C, height, width), sides multiples of the patch -> (B, D, height / P, width / P).

        Args:
            images: the images.
            paths: (B, depth, 2) uniform numbers that decide for drop path; without them it draws its own in training.
        """
        extent = self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        coordinates = grid_coordinates(*extent, images.device)[None]
        x = self.patch_embed(images).to(self.patch_embed.proj.weight.dtype)
        if self.pos_embed is not None:
            x = x + resize_absolute(self.pos_embed, self.position_grid, extent)[:, 1:]
        keep = None if paths is None else (paths >= self.drop_rates[:, None]) / (1 - self.drop_rates[:, None])
        relations: dict[int, Any] = {}
        for i, block in enumerate(self.blocks):
            attention: Any = block.attn
            if attention.window not in relations:  # blocks that look as far share what they need to know
                relations[attention.window] = attention.relate(coordinates, extent)
            given = x, relations[attention.window], None if keep is None else keep[:, i]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *given, use_reentrant=False, context_fn=partial(_counted_once, block))
            else:
                x = block(*given)
        return self.norm(x).transpose(1, 2).unflatten(2, extent)

    def begin_with(self, encoder: Encoder) -> list[str]:
        """Take over an encoder's weights; the names of tensors that stay new.

        cls token, head and, without a final norm here, its norm are left out. A bias that all blocks share becomes each
        block's own.

        Raises:
            ValueError: the encoder is of another architecture.
        """
        state = dict(encoder.state_dict())
        shared = state.pop("rel_pos_bias.table", None)
        if shared is not None:
            state |= {f"blocks.{i}.attn.rel_pos_bias.table": shared for i in range(len(self.blocks))}
        if self.pos_embed is not None and self.position_grid != encoder.grid:
            state["pos_embed"] = resize_absolute(state["pos_embed"], encoder.grid, self.position_grid)
        own = self.state_dict()
        wrong = [name for name, tensor in state.items() if name in own and tensor.shape != own[name].shape]
        if wrong:
            raise ValueError(f"{wrong[0]} is {tuple(state[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}")
        self.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)
        return [name for name in own if name not in state]


def _pair(size: Any) -> Grid:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _counted_once(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's first pass and of its second, in which no batch norm counts the batch again."""
    return nullcontext(), _uncounted([each for each in block.modules() if isinstance(each, nn.BatchNorm2d)])


@contextmanager
def _uncounted(norms: Sequence[nn.BatchNorm2d]) -> Iterator[None]:
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _initialised(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SimplePyramid(nn.Module):
    """Maps of five scales from the backbone's one: deconvolutions upwards, pooling downwards, none from above to below.

    Args:
        width: channels D of the map.
        framework: what differs.
        out_channels: of every map that comes out.

    Source: ViTDet's simple feature pyramid; the ViTAE repository's keeps D channels in its deconvolutions.
    """

    def __init__(self, width: int, framework: Framework, out_channels: int = 256) -> None:
        super().__init__()
        half, quarter = (width // 2, width // 4) if framework.halving_pyramid else (width, width)
        self.p2 = nn.Sequential(_up(width, half), LayerNorm2d(half), nn.GELU(), _up(half, quarter))
        self.p3 = _up(width, half)
        self.p4 = nn.Identity()
        self.p5 = nn.MaxPool2d(2)
        self.necks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, bias=False),
                LayerNorm2d(out_channels, eps=framework.neck_eps),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels, eps=framework.neck_eps),
            )
            for channels in (quarter, half, width, width)
        )

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """(B, D, h, w) -> maps of `LEVELS`, (B, out_channels, ...): 4h, 2h, h, h / 2 and h / 4 rows."""
        scaled = (self.p2(x), self.p3(x), self.p4(x), self.p5(x))
        maps = [neck(each) for neck, each in zip(self.necks, scaled, strict=True)]
        maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return OrderedDict(zip(LEVELS, maps, strict=True))


def _up(channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, out_channels, 2, stride=2)
