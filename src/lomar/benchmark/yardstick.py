"""MAE put together from timm's blocks: what ours must not be slower than. A yardstick, not to train with."""

from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lomar.methods.composition import Composition
from lomar.methods.targets import PIXEL_EPS, patchify, take
from lomar.model.positions import sincos_table

NORM_EPS = 1e-6


class TimmMAE(nn.Module):
    """The whole image: a quarter of its patches through timm's blocks, a decoder of timm's blocks for all.

    The patch embedding sees the image as a convolution, then the visible patches are taken; mask tokens are put into
    raster order; every patch is predicted, and the loss is taken on the hidden ones.

    Args:
        composition: of a recipe of MAE.

    Source: MAE's architecture and flow, as SPEC.md B.1 to B.3 tell them.
    """

    mean: Tensor
    std: Tensor
    places: Tensor
    decoder_places: Tensor

    def __init__(self, composition: Composition) -> None:
        super().__init__()
        c = composition
        width, decoder_width = c.embed_dim, c.decoder_width
        norm: Any = partial(nn.LayerNorm, eps=NORM_EPS)
        self.patch_size = c.patch_size
        self.scale = c.scale
        self.hidden = c.hidden
        self.patch_embed = PatchEmbed(c.image_size, c.patch_size, len(c.mean), width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(
            *(Block(width, c.num_heads, c.mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(c.depth))
        )
        self.norm = norm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_width, c.decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(c.decoder_depth))
        )
        self.decoder_norm = norm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, c.outputs)
        self.register_buffer("places", sincos_table(c.grid, width), persistent=False)
        self.register_buffer("decoder_places", sincos_table(c.grid, decoder_width), persistent=False)
        self.register_buffer("mean", torch.tensor(c.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(c.std).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor, hidden: Tensor, corners: Tensor) -> tuple[Tensor, int]:
        """Sum of the hidden patches' losses, and how many they are: as of `MaskedReconstruction`.

        Args:
            pixels: uint8 (B, 1, C, h, w).
            hidden: bool (B, 1, N), equally many True in each row.
            corners: not used; the batch of a method has them.
        """
        images = (pixels[:, 0] / self.scale - self.mean) / self.std
        order = hidden[:, 0].to(torch.uint8).argsort(dim=1, stable=True)  # (B, N), visible ones first
        visible, at = order.split([order.shape[1] - self.hidden, self.hidden], dim=1)
        x = take(self.patch_embed(images) + self.places[:, 1:], visible)
        x = torch.cat([(self.cls_token + self.places[:, :1]).expand(len(x), -1, -1), x], dim=1)
        x = self.decoder_embed(self.norm(self.blocks(x)))
        masks = self.mask_token.to(x.dtype).expand(len(x), self.hidden, -1)
        patches = take(torch.cat([x[:, 1:], masks], dim=1), order.argsort(dim=1))  # raster order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_places
        predicted = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]  # (B, N, P * P * C)
        truth = take(patchify(images, self.patch_size), at)
        variance, mean = torch.var_mean(truth, dim=-1, keepdim=True)
        truth = (truth - mean) / (variance + PIXEL_EPS).sqrt()
        losses = (take(predicted, at).float() - truth).square().mean(dim=-1)
        return losses.sum(), losses.numel()
