"""Masked reconstruction: WHERE (views, mask) x HOW (architecture) x WHAT (target)."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lomar.data.loader import SampleKey
from lomar.methods.architectures import MaskedEncoder
from lomar.methods.masks import UniformMask
from lomar.methods.targets import NormalisedPixels, patchify, unpatchify
from lomar.methods.views import LocalWindows
from lomar.model.encoder import init_linear
from lomar.model.positions import grid_coordinates
from lomar.seeding import seeded


@dataclass(frozen=True)
class ViewsAndMask:
    """The windows of a sample and their hidden patches, fixed by (seed, epoch, index). Goes to the loader's workers."""

    views: LocalWindows
    mask: UniformMask
    seed: int

    def __call__(self, key: SampleKey) -> tuple[Tensor, Tensor]:
        """Corners int64 (V, 2), row and column in patches, and hidden bool (V, N)."""
        corners = self.views.corners(key, self.seed)
        return corners, self.mask.draw(len(corners), seeded(self.seed, key.epoch, key.index, "mask"))


class MaskedReconstruction(nn.Module):
    """Predicts the hidden patches of each view.

    Args:
        views: where to look.
        mask: what is hidden there.
        architecture: visible patches and coordinates -> latents of hidden patches.
        target: what the head's output is compared with.
        patch_size: patch side P, in pixels.
        mean, std: per channel, in units of 0 to 1.
        scale: pixel value that stands for 1: 255 for uint8, 65535 for uint16, 1 for floats.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        views: LocalWindows,
        mask: UniformMask,
        architecture: MaskedEncoder,
        target: NormalisedPixels,
        patch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        scale: float,
    ) -> None:
        super().__init__()
        self.views = views
        self.mask = mask
        self.architecture = architecture
        self.target = target
        self.patch_size = patch_size
        self.scale = scale
        self.head = nn.Linear(architecture.width, target.width(patch_size**2 * len(mean)))
        init_linear(self.head)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def with_mask(self, mask: UniformMask) -> "MaskedReconstruction":
        """The same weights under another mask."""
        other = copy.copy(self)
        other.mask = mask
        return other

    def normalise(self, pixels: Tensor) -> Tensor:
        """Integer (..., C, h, w) pixels -> the network's input, in the dtype of `mean`."""
        return (pixels.to(self.mean.dtype) / self.scale - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """The network's input (..., C, h, w) -> values of 0 to 1."""
        return images * self.std + self.mean

    def forward(self, pixels: Tensor, corners: Tensor, hidden: Tensor) -> tuple[Tensor, int]:
        """Sum of the hidden patches' losses, and how many they are.

        Args:
            pixels: integer (B, V, C, h, w), the windows.
            corners: int64 (B, V, 2), their top-left patches.
            hidden: bool (B, V, N).
        """
        windows = self.normalise(pixels.flatten(0, 1))
        predicted, true, _ = self.predict(windows, corners.flatten(0, 1), hidden.flatten(0, 1))
        losses = self.target.loss(predicted, true)  # (R, M)
        return losses.sum(), losses.numel()

    def predict(self, windows: Tensor, corners: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The head's output for the hidden patches.

        Args:
            windows: normalised (R, C, h, w).
            corners: int64 (R, 2).
            hidden: bool (R, N), equally many in each row.

        Returns:
            Prediction (R, M, head width), true pixels (R, M, P * P * C), and raster indices int64 (R, M).
        """
        patches = patchify(windows, self.patch_size)  # (R, N, P * P * C)
        coordinates = corners[:, None] + grid_coordinates(*self.views.size, device=corners.device)  # (R, N, 2)
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)  # visible first, both parts in raster order
        visible, masked = order.split([self.mask.patches - self.mask.count, self.mask.count], dim=1)
        latents = self.architecture(take(patches, visible), take(coordinates, visible), take(coordinates, masked))
        return self.head(latents), take(patches, masked), masked

    def reconstruct(self, pixels: Tensor, corners: Tensor, hidden: Tensor) -> Tensor:
        """Windows with their hidden patches predicted and their visible ones as they are.

        Args:
            pixels: integer (R, C, h, w).
            corners: int64 (R, 2).
            hidden: bool (R, N).

        Returns:
            float (R, C, h, w), values of about 0 to 1.
        """
        windows = self.normalise(pixels)
        predicted, true, at = self.predict(windows, corners, hidden)
        patches = patchify(windows, self.patch_size)
        restored = patches.scatter(1, at[..., None].expand_as(true), self.target.to_pixels(predicted, true))
        return self.denormalise(unpatchify(restored, self.views.size, windows.shape[1]))


def take(items: Tensor, at: Tensor) -> Tensor:
    """(R, N, d) items and int64 (R, M) indices -> (R, M, d)."""
    return items.gather(1, at[..., None].expand(-1, -1, items.shape[-1]))
