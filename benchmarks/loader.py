"""Images a second that one core loads: lomar's sample path beside Pillow + torchvision v2 in float32.

    python benchmarks/loader.py --data DIR [--image-size 224]

Every path reads the file, takes a RandomResizedCrop(0.2-1, bicubic, antialiased), mirrors it or not and makes batches
of 32. Two references decode with Pillow and end in normalised float32: one resizes the Pillow image, as MAE and the
released LoMaR do (the ratios are to this one); the other resizes a uint8 tensor, which is faster. lomar decodes at the
scale the crop needs, stays in integers, and also draws four 7x7 windows with masks and cuts them out. Passes over the
same files alternate, so that other load on the machine meets all; the table gives medians.
"""

import argparse
import io
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import simplejpeg
import torch
import torchvision
from torchvision.transforms import v2

from lomar.data.decode import PixelFormat
from lomar.data.loader import CropPlan, pretraining_batches
from lomar.data.sources import ImageSource, open_source
from lomar.methods.masks import UniformMask
from lomar.methods.reconstruction import ViewsAndMask
from lomar.methods.views import LocalWindows

PATCH_PX = 16
WINDOW = 7
VIEWS = 4
MICRO_BATCH = 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def lomar_pass(source: ImageSource, image_size_px: int, number: int) -> None:
    grid = image_size_px // PATCH_PX
    draw = ViewsAndMask(LocalWindows((grid, grid), WINDOW, VIEWS), UniformMask(WINDOW**2, 0.8), seed=0)
    batches = pretraining_batches(
        source,
        PixelFormat(3, "uint8"),
        draw,
        plan=CropPlan(image_size_px, (0.2, 1.0)),
        patch_size_px=PATCH_PX,
        view_size=draw.views.size,
        seed=0,
        batch_size=len(source),
        micro_batch=MICRO_BATCH,
        first_batch=number,
        total_batches=number + 1,
        workers=0,
    )
    for _ in batches:
        pass


def torchvision_pass(source: ImageSource, image_size_px: int, number: int, resize_tensor: bool) -> None:
    torch.manual_seed(number)
    crop = v2.RandomResizedCrop(
        image_size_px, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    transform = v2.Compose(
        [
            *([v2.ToImage(), crop] if resize_tensor else [crop, v2.ToImage()]),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    for start in range(0, len(source), MICRO_BATCH):
        indices = range(start, min(start + MICRO_BATCH, len(source)))
        pictures = (PIL.Image.open(io.BytesIO(source.read(index))).convert("RGB") for index in indices)
        torch.stack([transform(picture) for picture in pictures])


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second that one core loads, beside Pillow + torchvision v2.")
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--image-size", type=int, nargs="+", default=[224], metavar="PX", help="sides of the crop")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each crop size")
    options = parser.parse_args()

    torch.set_num_threads(1)
    source = open_source(options.data)
    # The first is what the ratios are to.
    passes: dict[str, Callable[[ImageSource, int, int], None]] = {
        "Pillow + torchvision v2, Pillow image resized": partial(torchvision_pass, resize_tensor=False),
        "Pillow + torchvision v2, uint8 tensor resized": partial(torchvision_pass, resize_tensor=True),
        "lomar, windows": lomar_pass,
    }
    rows = ["| crop, px | path | images/s | ratio (range) |", "|---|---|---|---|"]
    for side_px in options.image_size:
        rates: dict[str, list[float]] = {name: [] for name in passes}
        for run in passes.values():
            run(source, side_px, 0)  # warms the file cache and the libraries
        end = time.perf_counter() + options.seconds
        number = 1
        while time.perf_counter() < end or number < 4:
            for name, run in passes.items():
                began = time.perf_counter()
                run(source, side_px, number)
                rates[name].append(len(source) / (time.perf_counter() - began))
            number += 1
        baseline = next(iter(rates.values()))
        for name, found in rates.items():
            ratios = [rate / base for rate, base in zip(found, baseline, strict=True)]
            rows.append(
                f"| {side_px} | {name} | {statistics.median(found):.0f} "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
    versions = {"torch": torch, "torchvision": torchvision, "Pillow": PIL, "simplejpeg": simplejpeg, "NumPy": np}
    print("\n".join(rows))  # noqa: T201
    print(  # noqa: T201
        f"\n{len(source)} files of {options.data}, one core of {processor_name()}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
    )


if __name__ == "__main__":
    main()
