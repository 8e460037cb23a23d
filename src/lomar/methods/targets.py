"""WHAT a hidden patch should become, and how far a prediction is from it."""

import torch
from torch import Tensor

PIXEL_EPS = 1e-6


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """Patches of images or windows, in raster order.

    Args:
        pixels: (R, C, h, w), sides multiples of `patch_size`.
        patch_size: patch side P, in pixels.

    Returns:
        (R, N, P * P * C), pixels of a patch in order (row, column, channel).
    """
    r, c, h, w = pixels.shape
    p = patch_size
    patches = pixels.reshape(r, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)  # (R, H, W, P, P, C)
    return patches.reshape(r, (h // p) * (w // p), p * p * c)


def unpatchify(patches: Tensor, grid: tuple[int, int], channels: int) -> Tensor:
    """(R, N, P * P * C) -> (R, C, h, w): the inverse of `patchify` for a view of `grid` patches."""
    r = patches.shape[0]
    rows, columns = grid
    p = round((patches.shape[2] // channels) ** 0.5)
    images = patches.reshape(r, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)  # (R, C, H, P, W, P)
    return images.reshape(r, channels, rows * p, columns * p)


class NormalisedPixels:
    """Pixels of a patch, less their mean and over their standard deviation.

    Source: LoMaR section 3.2 ("normalized ground-truth image"), MAE; unbiased variance, epsilon inside the root.
    """

    @staticmethod
    def width(patch_values: int) -> int:
        """Outputs of the head for a patch of P * P * C values."""
        return patch_values

    def loss(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Mean squared error of each hidden patch.

        Args:
            prediction: (R, M, P * P * C), the head's output.
            patches: (R, M, P * P * C), the true pixels (normalised as the network's input).

        Returns:
            float32 (R, M).
        """
        mean, deviation = self._moments(patches)
        return (prediction.to(patches.dtype) - (patches - mean) / deviation).square().mean(dim=-1)

    def to_pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """A prediction as pixels, with the true mean and deviation of each patch: those are not predicted."""
        mean, deviation = self._moments(patches)
        return prediction.to(patches.dtype) * deviation + mean

    @staticmethod
    def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return mean, (variance + PIXEL_EPS).sqrt()
