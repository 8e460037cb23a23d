"""Reconstructions of images as panels for the figures."""

import torch
from torch import Tensor

from lomar.data.decode import PixelFormat
from lomar.data.loader import SampleKey, centre_crops
from lomar.data.sources import ImageSource
from lomar.figures.reconstruction import Panel
from lomar.methods.reconstruction import MaskedReconstruction, ViewsAndMask

NORMALISED_CAPTION = (
    "The model predicts patches less their mean and over their deviation; each shown prediction is given the true "
    "mean and deviation of its patch."
)


def central_crops(source: ImageSource, fmt: PixelFormat, size_px: int) -> tuple[Tensor, Tensor]:
    """Pixels (n, C, size_px, size_px) of the images that can be read, and bool (N,): which of all they are."""
    pixels, good = (torch.cat(parts) for parts in zip(*centre_crops(source, fmt, size_px, workers=0), strict=True))
    return pixels[good], good


def panels(method: MaskedReconstruction, pixels: Tensor, seed: int) -> list[Panel]:
    """One window of each image, masked and reconstructed.

    The window depends on the seed and the image's place alone, so that other mask ratios show the same windows; the
    patches hidden at a lower ratio are hidden at a higher one too.

    Args:
        method: with weights; its mask decides the ratio.
        pixels: integer (n, C, S, S).
        seed: of windows and masks.
    """
    draw = ViewsAndMask(method.views, method.mask, seed)
    patch = method.patch_size
    rows, columns = (side * patch for side in method.views.size)
    corners, hidden, windows = [], [], []
    for place, image in enumerate(pixels):
        # Slot and batch matter to the released layout alone, whose windows then all come from one call.
        corner, hide = (t[0] for t in draw(SampleKey(epoch=0, index=place, batch=0, slot=0)))
        top, left = (corner * patch).tolist()
        corners.append(corner)
        hidden.append(hide)
        windows.append(image[:, top : top + rows, left : left + columns])
    device = method.mean.device
    training = method.training
    method.eval()
    with torch.inference_mode():
        restored = method.reconstruct(
            torch.stack(windows).to(device), torch.stack(corners).to(device), torch.stack(hidden).to(device)
        )
    method.train(training)
    predictions = (restored.float() * method.scale).cpu().numpy()
    return [
        Panel(image.numpy(), (int(corner[0]), int(corner[1])), patch, hide.numpy(), prediction)
        for image, corner, hide, prediction in zip(pixels, corners, hidden, predictions, strict=True)
    ]
