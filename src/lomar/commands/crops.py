"""The crops of a run whose method compares views: how they are cut, and as a picture what the encoder gets."""

from collections.abc import Sequence

import torch
from PIL.Image import Image

from lomar.data.augment import centre_crop
from lomar.data.decode import PixelFormat, read_image
from lomar.data.loader import SampleKey
from lomar.data.multicrop import MultiCropPlan
from lomar.data.sources import ImageSource
from lomar.errors import BadImageError
from lomar.figures.crops import Crops, crops_figure
from lomar.methods.two_view import TwoView
from lomar.options import PretrainOptions
from lomar.seeding import seeded


def crops_of(method: TwoView, options: PretrainOptions) -> MultiCropPlan:
    """How a run crops images."""
    if not (options.local_crops and options.local_size and options.local_scale):
        return MultiCropPlan(options.image_size, options.crop_scale, bilinear=method.bilinear)
    small = options.local_crops, options.local_size, options.local_scale
    return MultiCropPlan(options.image_size, options.crop_scale, *small, method.bilinear)


def picture_of_crops(
    method: TwoView, options: PretrainOptions, source: ImageSource, fmt: PixelFormat, indices: Sequence[int]
) -> Image | None:
    """What the encoder gets of some images in epoch 0; None if none of them can be read.

    Args:
        method: distorts the crops.
        options: of the run.
        source: the training images.
        fmt: what their pixels become.
        indices: numbers of the images in the source, which their chance is seeded by.
    """
    found = []
    for index in indices:
        try:
            found.append(
                seen_crops(method, crops_of(method, options), source, fmt, SampleKey(0, index, 0, 0), options.seed)
            )
        except (BadImageError, OSError):
            continue
    return crops_figure(found, _caption(options)) if found else None


def seen_crops(
    method: TwoView, plan: MultiCropPlan, source: ImageSource, fmt: PixelFormat, key: SampleKey, seed: int
) -> Crops:
    """A sample's image and its crops, distorted as in its step of training.

    Args:
        method: distorts the crops.
        plan: how the image is cropped.
        source: the training images.
        fmt: what their pixels become.
        key: of the sample; its epoch and index decide.
        seed: of the run.

    Raises:
        BadImageError, OSError: it cannot be read.
    """
    image = read_image(source.read(key.index), source.name(key.index))
    side = plan.size_px
    original = image.crop(centre_crop(image.height, image.width, (side, side)), (side, side), fmt)
    cut = plan(image, fmt, seeded(seed, key.epoch, key.index, "crop"))  # as `readable_sample` seeds it
    numbers = method.draw(seed)(key)["distortions"]
    device = method.mean.device
    large, small = (
        (method.seen(torch.from_numpy(crops)[None].to(device), drawn[None].to(device)) * method.std + method.mean)
        if len(crops)
        else torch.zeros(crops.shape)
        for crops, drawn in zip(cut, numbers.split([len(crops) for crops in cut]), strict=True)
    )
    return Crops(original, *((crops.float() * method.scale).cpu().numpy() for crops in (large, small)))


def _caption(options: PretrainOptions) -> str:
    """How to read the picture."""
    low, high = options.crop_scale
    side = options.image_size
    said = f"What {options.method} sees of images in the first epoch: large crops of {side} x {side} px, {low:.0%} to "
    said += f"{high:.0%} of the image's area"
    if options.local_crops and options.local_scale:
        low, high = options.local_scale
        small = options.local_size
        said += f", and {options.local_crops} small ones of {small} x {small} px, {low:.0%} to {high:.0%}"
    return f"{said}; mirrored or not, and distorted. The first column is the middle of the image as it is."
