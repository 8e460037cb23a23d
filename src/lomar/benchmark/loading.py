"""Images that one core loads: lomar's sample path, and Pillow with torchvision in float32, as MAE and LoMaR did."""

import io
from collections.abc import Callable
from itertools import count

import PIL.Image
import torch

from lomar.benchmark.place import Place
from lomar.data.decode import PixelFormat
from lomar.data.loader import Batching, CropPlan, pretraining_batches
from lomar.data.opening import open_source
from lomar.data.sources import ImageSource
from lomar.data.survey import spread
from lomar.methods.masks import UniformMask
from lomar.methods.recipes import IMAGENET_MEAN, IMAGENET_STD
from lomar.methods.reconstruction import ViewsAndMask
from lomar.methods.views import LocalWindows

# What is measured: the first reference resizes Pillow's image, as MAE and the released LoMaR do; the second a uint8
# tensor, which is faster. Both end in normalised float32.
PILLOW = "Pillow, torchvision v2"
TENSOR = "the same, resizing tensors"
LOMAR = "lomar, windows"
WINDOW, PATCH_PX, MICRO_BATCH = 7, 16, 32
CROP_SCALE = (0.2, 1.0)


def loading_step(place: Place, images: int, *, path: str, data: str, image_px: int, views: int) -> Callable[[], object]:
    """One pass over the same images, each with a new crop: read, decoded, cropped, mirrored or not, made batches of 32.

    lomar also draws windows with masks and cuts them out.

    Args:
        place: gives one core.
        images: of a pass, spread evenly over the files.
        path: `LOMAR`, `PILLOW` or `TENSOR`.
        data: what `open_source` takes.
        image_px: side of the crop.
        views: windows of an image, for lomar.
    """
    torch.set_num_threads(1)
    source = open_source(data)
    source = source.subset(spread(len(source), images))
    passes = count()
    if path == LOMAR:
        return lambda: _lomar_pass(source, image_px, views, next(passes))
    return _torchvision(source, image_px, resize_tensor=path == TENSOR)


def _lomar_pass(source: ImageSource, image_px: int, views: int, number: int) -> None:
    grid = image_px // PATCH_PX
    windows = LocalWindows((grid, grid), WINDOW, views)
    batches = pretraining_batches(
        source,
        PixelFormat(3, "uint8"),
        ViewsAndMask(windows, UniformMask(WINDOW**2, 0.8), seed=0),
        plan=CropPlan(image_px, CROP_SCALE),
        patch_size_px=PATCH_PX,
        view_size=windows.size,
        batching=Batching(0, len(source), MICRO_BATCH, total_batches=number + 1, first_batch=number),
    )
    for _ in batches:
        pass


def _torchvision(source: ImageSource, image_px: int, resize_tensor: bool) -> Callable[[], object]:
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(image_px, scale=CROP_SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    transform = v2.Compose(
        [
            *([v2.ToImage(), crop] if resize_tensor else [crop, v2.ToImage()]),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def one_pass() -> None:
        for start in range(0, len(source), MICRO_BATCH):
            indices = range(start, min(start + MICRO_BATCH, len(source)))
            pictures = (PIL.Image.open(io.BytesIO(source.read(index))).convert("RGB") for index in indices)
            torch.stack([transform(picture) for picture in pictures])

    return one_pass
