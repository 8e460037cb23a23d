"""Crop boxes, (top, left, height, width) in pixels of the upright image, and changes of colour."""

import math
from dataclasses import dataclass

import numpy as np
import torch

Box = tuple[int, int, int, int]

# ImageNet evaluation resizes the shorter side to 256 and keeps the central 224.
CENTRE_SHARE = 224 / 256


def random_resized_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    generator: torch.Generator,
) -> Box:
    """A random box: area uniform in a share of the image, aspect ratio log-uniform.

    Ten boxes are tried; if none fits, the largest central box of an allowed ratio is taken.

    Args:
        height: image height in pixels.
        width: image width in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height.
        generator: the only source of randomness.

    Returns:
        (top, left, height, width) in pixels, inside the image, at least 1 x 1.

    Source: torchvision's RandomResizedCrop, draw for draw: equal seeds give equal boxes.
    """
    area = height * width
    low, high = torch.log(torch.tensor(ratio)).tolist()  # float32, as torchvision has it
    for _ in range(10):
        target_area = area * torch.empty(1).uniform_(*scale, generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
        box_width = round(math.sqrt(target_area * aspect))
        box_height = round(math.sqrt(target_area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = torch.randint(0, height - box_height + 1, (1,), generator=generator).item()
            left = torch.randint(0, width - box_width + 1, (1,), generator=generator).item()
            return int(top), int(left), box_height, box_width

    box_height, box_width = height, width
    if width < height * ratio[0]:
        box_height = round(width / ratio[0])
    elif width > height * ratio[1]:
        box_width = round(height * ratio[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def clamped_crop(
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    generator: torch.Generator,
) -> Box:
    """A random box as MAE's linear probe draws it: one that sticks out of the image is clamped, not drawn again.

    So large boxes are more frequent than with `random_resized_crop`, and may have any aspect ratio.

    Args:
        height: image height in pixels.
        width: image width in pixels.
        scale: smallest and largest share of the image's area, before it is clamped.
        ratio: smallest and largest width / height, likewise; log-uniform.
        generator: the only source of randomness.

    Returns:
        (top, left, height, width) in pixels, inside the image, at least 1 x 1.

    Source: the released code of MAE.
    """
    area = height * width * torch.empty(1).uniform_(*scale, generator=generator).item()
    low, high = (math.log(end) for end in ratio)
    aspect = math.exp(torch.empty(1).uniform_(low, high, generator=generator).item())
    box_width = min(width, max(1, round(math.sqrt(area * aspect))))
    box_height = min(height, max(1, round(math.sqrt(area / aspect))))
    top = torch.randint(0, height - box_height + 1, (1,), generator=generator).item()
    left = torch.randint(0, width - box_width + 1, (1,), generator=generator).item()
    return int(top), int(left), box_height, box_width


def centre_crop(height: int, width: int, shape: tuple[int, int] = (1, 1), share: float = CENTRE_SHARE) -> Box:
    """The central box of a shape: the largest that fits, shrunk to a share of its sides.

    Args:
        height: image height in pixels.
        width: image width in pixels.
        shape: (rows, columns) in whose proportion the box is.
        share: 0.875 is how ImageNet evaluation sees 224 pixels, after a resize to 256.

    Returns:
        (top, left, height, width) in pixels.
    """
    rows, columns = shape
    unit = min(height / rows, width / columns) * share
    box_height, box_width = max(1, round(unit * rows)), max(1, round(unit * columns))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision has it


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and, of three channels, saturation changed by factors, in some order.

    Works on any number of channels and any pixel type, which torchvision's ColorJitter does not; equal to it within
    rounding on 8-bit colour.

    Args:
        changes: (name, factor) in order; a factor of 1 changes nothing.
    """

    changes: tuple[tuple[str, float], ...]

    @classmethod
    def draw(cls, strength: float, generator: torch.Generator) -> "ColorJitter":
        """Factors uniform in 1 - strength to 1 + strength, in random order."""
        names = ("brightness", "contrast", "saturation")
        factors = torch.empty(3).uniform_(1 - strength, 1 + strength, generator=generator).tolist()
        order = torch.randperm(3, generator=generator).tolist()
        return cls(tuple((names[i], factors[i]) for i in order))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """(C, H, W) -> the same shape and type; integers stay within their range."""
        changed = pixels.astype(np.float32)
        top = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else None
        for name, factor in self.changes:
            other: np.ndarray | np.float32 = np.float32(0)
            if name == "contrast":
                other = _gray(changed).mean(dtype=np.float32)
            elif name == "saturation":
                if len(changed) != 3:
                    continue
                other = _gray(changed)
            changed = factor * changed + (1 - factor) * other
            if top is not None:
                changed = changed.clip(0, top)
        return changed.astype(pixels.dtype)


def _gray(pixels: np.ndarray) -> np.ndarray:
    """(C, H, W) -> (H, W)."""
    if len(pixels) == 3:
        return np.tensordot(np.array(LUMA, dtype=np.float32), pixels, axes=1)
    return pixels.mean(axis=0, dtype=np.float32)
