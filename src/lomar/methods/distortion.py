"""Random changes of crops that two views of an image are told apart by: colour, gray, blur, solarisation.

What is random of a crop is drawn on the processor as a row of numbers; all crops are then changed at once, on whatever
device they are. So a sample's crops are a function of its key alone, and a GPU does what would keep many cores busy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

APPLIED = 0.8  # share of crops whose colours are changed
BLURRED_224 = (0.1, 2.0)  # deviations in pixels of a crop of 224; of others in proportion
SOLARISED_FROM = 128 / 255
LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision has it
# A row of numbers: four places of an order, four factors, and whether gray, how blurred, whether solarised.
ORDER, FACTORS, GRAY, SIGMA, SOLARISED = slice(0, 4), slice(4, 8), 8, 9, 10
WIDTH = 11
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class Distortion:
    """How a kind of crop is changed.

    Args:
        jitter: strength: brightness and contrast change by a factor of 1 +- jitter, saturation by 1 +- jitter / 2, hue
            by +- jitter / 4 of the circle, in random order, of `APPLIED` of the crops.
        gray: share of crops without colour.
        blur: share of blurred ones.
        solarize: share of solarised ones: what is brighter than half is inverted.
        size_px: side of a large crop, which the blur is in proportion to.

    Source: BYOL's augmentations, as DINO and MoCo v3 take them with jitter 0.4.
    """

    jitter: float
    gray: float
    blur: float
    solarize: float
    size_px: int

    def draw(self, generator: torch.Generator) -> Tensor:
        """The numbers of one crop, float32 (WIDTH,)."""
        row = torch.zeros(WIDTH)
        chance = torch.rand(4, generator=generator)
        row[ORDER] = torch.randperm(4, generator=generator).float()
        strength = self.jitter * torch.tensor([1.0, 1.0, 0.5, 0.25])
        change = strength * (2 * torch.rand(4, generator=generator) - 1)
        low, high = (sigma * self.size_px / 224 for sigma in BLURRED_224)
        sigma = low + (high - low) * torch.rand(1, generator=generator)
        row[FACTORS] = torch.tensor([1.0, 1.0, 1.0, 0.0])
        if chance[0] < APPLIED:
            row[FACTORS] += change
        row[GRAY] = (chance[1] < self.gray).float()
        row[SIGMA] = sigma if chance[2] < self.blur else 0.0
        row[SOLARISED] = (chance[3] < self.solarize).float()
        return row


def distort(crops: Tensor, drawn: Tensor, bounded: bool = True) -> Tensor:
    """Crops (N, C, h, w), changed as their rows of numbers say.

    Saturation, hue and gray are of three channels; other crops keep theirs.

    Args:
        crops: float, black 0 and white 1.
        drawn: (N, WIDTH), of `Distortion.draw`.
        bounded: whether no value is below 0 or above 1, which is kept so; what has no white is not solarised.
    """
    colour = crops.shape[1] == 3
    changes = {BRIGHTNESS: _brightness, CONTRAST: _contrast} | ({SATURATION: _saturation, HUE: _hue} if colour else {})
    top = 1.0 if bounded else torch.inf
    order, factors = drawn[:, ORDER], drawn[:, FACTORS]
    crops = crops.clone()
    for place in range(4):
        for name, change in changes.items():
            rows = ((order[:, place] == name) & (factors[:, name] != (name != HUE))).nonzero()[:, 0]
            if len(rows):
                changed = change(crops[rows], factors[rows, name].view(-1, 1, 1, 1))
                crops[rows] = changed.clamp(0, top) if bounded else changed
    if colour:
        crops = torch.where(_chosen(drawn, GRAY), _gray(crops), crops)
    rows = drawn[:, SIGMA].nonzero()[:, 0]
    if len(rows):
        crops[rows] = blurred(crops[rows], drawn[rows, SIGMA])
    if bounded:
        crops = torch.where(_chosen(drawn, SOLARISED) & (crops >= SOLARISED_FROM), 1 - crops, crops)
    return crops


def _chosen(drawn: Tensor, which: int) -> Tensor:
    return drawn[:, which].view(-1, 1, 1, 1) > 0


def _gray(crops: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, 1, h, w): luma of three channels, else the mean."""
    if crops.shape[1] != 3:
        return crops.mean(dim=1, keepdim=True)
    return (crops * torch.tensor(LUMA, device=crops.device, dtype=crops.dtype).view(3, 1, 1)).sum(dim=1, keepdim=True)


def _brightness(crops: Tensor, factor: Tensor) -> Tensor:
    return factor * crops


def _contrast(crops: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_gray(crops).mean(dim=(1, 2, 3), keepdim=True).expand_as(crops), crops, factor.expand_as(crops))


def _saturation(crops: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_gray(crops).expand_as(crops), crops, factor.expand_as(crops))


def _hue(crops: Tensor, turn: Tensor) -> Tensor:
    """Hue turned by a share of the circle; saturation and value, as of HSV, stay.

    Each channel is V - C max(0, min(k, 4 - k, 1)) with k = (n + 6 H) mod 6, n being 5, 3, 1 for red, green and blue.
    """
    value, brightest = crops.max(dim=1, keepdim=True)
    chroma = value - crops.amin(dim=1, keepdim=True)
    red, green, blue = crops.split(1, dim=1)
    safe = chroma.clamp(min=torch.finfo(crops.dtype).tiny)
    sixth = torch.where(
        brightest == 0,
        (green - blue) / safe,
        torch.where(brightest == 1, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    k = (torch.tensor([5.0, 3.0, 1.0], device=crops.device).view(3, 1, 1) + sixth + 6 * turn) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blurred(crops: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each crop by its own deviation; what lies outside is mirrored.

    Args:
        crops: (N, C, h, w).
        sigma: (N,), in pixels, above 0.
    """
    count, channels, height, width = crops.shape
    # Three deviations of its own: of what is further away less than a hundredth of the weight. Pixels of other crops
    # must not decide for this one, so that what one kernel's side has room for beyond that is zero.
    reaches = (3 * sigma + 0.5).int().clamp(1, max(1, min(height, width) - 1))
    reach = int(reaches.max())
    if min(height, width) < 2:
        return crops
    at = torch.arange(-reach, reach + 1, device=crops.device, dtype=crops.dtype)
    weights = (-0.5 * (at / sigma[:, None].to(crops.dtype)).square()).exp() * (at.abs() <= reaches[:, None])
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)  # (N * C, side)
    planes = nn.functional.pad(crops.reshape(1, count * channels, height, width), (reach,) * 4, mode="reflect")
    planes = nn.functional.conv2d(planes, weights[:, None, :, None], groups=count * channels)
    return nn.functional.conv2d(planes, weights[:, None, None], groups=count * channels).view_as(crops)
