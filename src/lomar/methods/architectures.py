"""HOW a view is encoded: where the tokens of hidden patches enter."""

import torch
from torch import Tensor, nn

from lomar.model import Encoder


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

    Source: LoMaR section 3.2 "Architecture"; later layers are suggested in section 5.
    """

    def __init__(self, encoder: Encoder, mask_layer: int = 0) -> None:
        super().__init__()
        if not 0 <= mask_layer < len(encoder.blocks):
            raise ValueError(f"mask layer {mask_layer} is outside the encoder's blocks 0 to {len(encoder.blocks) - 1}")
        self.encoder = encoder
        self.mask_layer = mask_layer
        self.width = encoder.embed_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.width))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, visible: Tensor, visible_at: Tensor, hidden_at: Tensor) -> Tensor:
        """Latents of the hidden patches.

        Args:
            visible: (R, N - M, P * P * C) normalised pixels of the visible patches.
            visible_at: int64 (R, N - M, 2), their coordinates.
            hidden_at: int64 (R, M, 2), coordinates of the hidden patches.

        Returns:
            (R, M, D), after the encoder's final norm, in the order of `hidden_at`.
        """
        x = self.encode(visible, visible_at, hidden_at)
        return x[:, 1 + visible.shape[1] :]

    def encode(self, visible: Tensor, visible_at: Tensor, hidden_at: Tensor) -> Tensor:
        """(R, 1 + N, D): cls, visible and hidden tokens after the final norm; arguments as for `forward`."""
        x = self.encoder.prepend_cls(self.encoder.embed_patches(visible))
        x = self.encoder.run_blocks(x, visible_at, last=self.mask_layer)
        masks = self.mask_token.to(x.dtype).expand(*hidden_at.shape[:2], -1)
        x = torch.cat([x, masks], dim=1)  # (R, 1 + N, D)
        x = self.encoder.run_blocks(x, torch.cat([visible_at, hidden_at], dim=1), first=self.mask_layer)
        return self.encoder.norm(x)
