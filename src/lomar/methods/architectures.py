"""HOW a view is encoded: where the tokens of hidden patches enter."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lomar.model import Encoder
from lomar.model.attention import ALL
from lomar.model.positions import Grid
from lomar.model.transformer import Transformer


class View(NamedTuple):
    """The patches of each view, visible ones apart from the hidden.

    Args:
        visible: (R, N - M, P * P * C) normalised pixels.
        visible_at: int64 (R, N - M, 2), coordinates in the image.
        hidden_at: int64 (R, M, 2), coordinates of the hidden patches that are to be predicted.
        spared: where views hide fewer than M: pixels (R, M, P * P * C) of the patches at `hidden_at`, and bool (R, M),
            which of them are visible after all. None where every view hides M.
    """

    visible: Tensor
    visible_at: Tensor
    hidden_at: Tensor
    spared: tuple[Tensor, Tensor] | None = None


class Stage(NamedTuple):
    """Tokens (with cls) that pass through blocks of one width."""

    tokens: int
    blocks: int
    width: int


class MaskedEncoder(nn.Module):
    """One encoder for visible and hidden patches; a hidden patch is a learned mask token with a position.

    Until block `mask_layer` only the cls token and the visible patches exist, which costs (1 + visible) tokens instead
    of (1 + N). Positions come from coordinates alone, so tokens stand visible first, hidden after, and nothing is put
    back into raster order.

    Args:
        encoder: the vision transformer; its classifier is not used.
        mask_layer: block before which the mask tokens enter: 0 is the paper, up to depth - 1.

    Raises:
        ValueError: `mask_layer` is outside the depth.

    Source: LoMaR section 3.2 "Architecture"; later layers are suggested in section 5. BEiT at mask layer 0.
    """

    def __init__(self, encoder: Encoder, mask_layer: int = 0) -> None:
        super().__init__()
        if not 0 <= mask_layer < len(encoder.blocks):
            raise ValueError(f"mask layer {mask_layer} is outside the encoder's blocks 0 to {len(encoder.blocks) - 1}")
        self.encoder = encoder
        self.mask_layer = mask_layer
        self.width = encoder.embed_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.width))
        encoder.initialisation.token(self.mask_token)

    def stages(self, visible: int, hidden: int) -> list[Stage]:
        """The tokens of one view through the blocks."""
        late = len(self.encoder.blocks) - self.mask_layer
        stages = [Stage(1 + visible, self.mask_layer, self.width), Stage(1 + visible + hidden, late, self.width)]
        return [stage for stage in stages if stage.blocks]

    def forward(self, view: View, paths: Tensor | None = None) -> Tensor:
        """Latents of the patches at `view.hidden_at`: (R, M, D), after the encoder's final norm.

        Args:
            view: visible patches, and where the hidden ones are.
            paths: (R, depth, 2) uniform numbers that decide for drop path.
        """
        return self.encode(view, paths, asked=slice(1 + view.visible.shape[1], None))

    def encode(self, view: View, paths: Tensor | None = None, asked: slice = ALL) -> Tensor:
        """(R, M, D): of cls, visible and hidden tokens those that are asked for, after the final norm.

        Args:
            view, paths: as for `forward`.
            asked: which of the tokens are wanted.
        """
        encoder = self.encoder
        x = encoder.embed(view.visible, view.visible_at)
        if self.mask_layer:
            x = encoder.run_blocks(x, encoder.relate(view.visible_at), last=self.mask_layer, paths=paths)
        masks = self.mask_token.expand(*view.hidden_at.shape[:2], -1)
        if view.spared is not None:
            patches, is_visible = view.spared
            masks = torch.where(is_visible[..., None], encoder.embed_patches(patches), masks)
        x = torch.cat([x, encoder.place(masks, view.hidden_at)], dim=1)  # (R, 1 + N, D)
        relation = encoder.relate(torch.cat([view.visible_at, view.hidden_at], dim=1))
        x = encoder.run_blocks(x, relation, first=self.mask_layer, paths=paths, asked=asked)
        return encoder.norm(x)


class EncoderDecoder(nn.Module):
    """An encoder for the visible patches alone; a small decoder takes their latents and mask tokens.

    Args:
        encoder: the vision transformer; its classifier is not used.
        grid: (H, W) of the image, in patches.
        bias_grid: (rows, columns) of a view, which relative biases of the decoder cover.
        width, depth, heads: of the decoder; 512, 8 and 16 in MAE.

    Source: MAE; on windows, the encoder-decoder of LoMaR's Fig. 5. The decoder's kind of position is the encoder's.
    """

    def __init__(self, encoder: Encoder, grid: Grid, bias_grid: Grid, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = width
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        architecture = encoder.architecture
        self.decoder = Transformer(
            architecture["position"],
            grid,
            bias_grid,
            width,
            depth,
            heads,
            key_bias=architecture["key_bias"],
            init_values=architecture["init_values"],
        )
        encoder.initialisation.linear(self.decoder_embed)
        encoder.initialisation.token(self.mask_token)
        encoder.initialisation.blocks(self.decoder.blocks)

    def stages(self, visible: int, hidden: int) -> list[Stage]:
        """The tokens of one view through the blocks."""
        return [
            Stage(1 + visible, len(self.encoder.blocks), self.encoder.embed_dim),
            Stage(1 + visible + hidden, len(self.decoder.blocks), self.width),
        ]

    def forward(self, view: View, paths: Tensor | None = None) -> Tensor:
        """Latents of the patches at `view.hidden_at`: (R, M, width), after the decoder's norm.

        Args:
            view: visible patches, and where the hidden ones are; every view must hide equally many.
            paths: (R, depth, 2) uniform numbers that decide for the encoder's drop path.
        """
        return self.decode(view, paths, asked=slice(1 + view.visible.shape[1], None))

    def decode(self, view: View, paths: Tensor | None = None, asked: slice = ALL) -> Tensor:
        """(R, M, width): of cls, visible and hidden tokens those that are asked for, after the decoder's norm.

        Args:
            view, paths: as for `forward`.
            asked: which of the tokens are wanted.
        """
        encoder, decoder = self.encoder, self.decoder
        x = encoder.embed(view.visible, view.visible_at)
        x = encoder.norm(encoder.run_blocks(x, encoder.relate(view.visible_at), paths=paths))
        x = self.decoder_embed(x).to(self.mask_token.dtype)
        masks = self.mask_token.expand(*view.hidden_at.shape[:2], -1)
        coordinates = torch.cat([view.visible_at, view.hidden_at], dim=1)
        patches = decoder.place(torch.cat([x[:, 1:], masks], dim=1), coordinates)
        x = torch.cat([decoder.place_cls(x[:, :1]), patches], dim=1)  # (R, 1 + N, width)
        return decoder.norm(decoder.run_blocks(x, decoder.relate(coordinates), asked=asked))


Architecture = MaskedEncoder | EncoderDecoder
