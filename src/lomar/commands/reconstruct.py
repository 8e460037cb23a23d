"""`lomar reconstruct`: pictures of what a run fills in, as the paper's Figures 7 and 8."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lomar.commands.panels import NORMALISED_CAPTION, central_crops, panels
from lomar.data.decode import PixelFormat
from lomar.data.sources import ImageSource, open_source
from lomar.errors import UserError
from lomar.figures.png import save_png
from lomar.figures.reconstruction import figure7, figure8
from lomar.interop.weights import load_reconstructor
from lomar.methods.masks import UniformMask
from lomar.options import ReconstructOptions

IMAGES_OF_A_FOLDER = 8  # the first ones


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar reconstruct` with the options that were given; returns the exit status."""
    for name in ("model", "images", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar reconstruct --help")
    options = ReconstructOptions(**given)
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out is {options.out}; it must end in .png")
    method, composition = load_reconstructor(options.model)
    try:
        methods = [method.with_mask(UniformMask(method.mask.patches, ratio)) for ratio in options.mask_ratios]
    except ValueError as error:
        raise UserError(f"--mask-ratios: {error}") from None
    dtype = {255.0: "uint8", 65535.0: "uint16"}.get(composition.scale, "float32")
    fmt = PixelFormat(len(composition.mean), dtype)
    images = _images(options.images)
    pixels, good = central_crops(images, fmt, composition.image_size)
    skipped = [images.name(i) for i in (~good).nonzero().flatten().tolist()]
    if not len(pixels):
        raise UserError(f"--images: none of {len(images)} can be read, for example {skipped[0]}")
    drawn = [panels(each, pixels, options.seed) for each in methods]
    about = f"{options.model}: {composition.method}, {composition.model}, {composition.window_size}x"
    about += f"{composition.window_size} windows of {composition.patch_size}-pixel patches. {NORMALISED_CAPTION}"
    if len(drawn) == 1:
        picture = figure7(drawn[0], f"{options.mask_ratios[0]:.0%} hidden. {about}")
    else:
        picture = figure8(list(zip(*drawn, strict=True)), options.mask_ratios, about)
    try:
        save_png(picture, out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    for name in skipped:
        sys.stderr.write(f"lomar: skipped an unreadable image: {name}\n")
    sys.stdout.write(f"{out}: {len(pixels)} images at {len(drawn)} mask ratios\n")
    return 0


def _images(paths: Sequence[str]) -> ImageSource:
    """The images named, and the first of each folder named."""
    found: list[bytes] = []
    for path in paths:
        if path == "sample" or Path(path).is_dir():
            source = open_source(path, flag="--images")
            names = [source.path(i) for i in range(min(len(source), IMAGES_OF_A_FOLDER))]
        elif Path(path).is_file():
            names = [os.fsencode(path)]
        else:
            raise UserError(f"--images: there is no file or folder {path}")
        found += [os.path.abspath(name) for name in names]  # noqa: PTH100 (bytes)
    return ImageSource("/", found)
