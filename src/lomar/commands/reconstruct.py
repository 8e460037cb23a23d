"""`lomar reconstruct`: pictures of what a run fills in, as the paper's Figures 7 and 8."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lomar.commands.panels import caption, images_named, panels, pixel_format, readable_crops, tokenised_crops
from lomar.commands.runs import options_of
from lomar.commands.settling import TOKENIZER_FILE
from lomar.errors import UserError
from lomar.figures.png import save_png
from lomar.figures.reconstruction import figure7, figure8
from lomar.interop.tokenizers import load_tokenizer
from lomar.interop.weights import load_reconstructor
from lomar.methods.targets import VisualTokens
from lomar.options import PretrainOptions, ReconstructOptions


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar reconstruct` with the options that were given; returns the exit status."""
    for name in ("model", "images", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar reconstruct --help")
    options = ReconstructOptions(**given)
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out is {options.out}; it must end in .png")
    try:
        method, composition = load_reconstructor(options.model)
    except UserError:
        run = options_of(options.model, PretrainOptions)
        if run.get("head_outputs") is None:
            raise
        raise UserError(
            f"--model {options.model} is of {run['method']}, which compares views of an image and predicts no pixels "
            "that could be drawn; `lomar attention` draws where its cls token looks"
        ) from None
    if isinstance(method.target, VisualTokens):
        tokenizer = _folder(options.model) / TOKENIZER_FILE
        if not tokenizer.exists():
            raise UserError(
                f"--model {options.model} predicts tokens; to draw them, put its run's {tokenizer.name} beside it"
            )
        method.target.attach(load_tokenizer(tokenizer))
    try:
        methods = [composition.with_mask_ratio(method, ratio) for ratio in options.mask_ratios]
    except ValueError as error:
        raise UserError(f"--mask-ratios: {error}") from None
    fmt = pixel_format(len(composition.mean), composition.scale)
    images = images_named(options.images)
    pixels, skipped = readable_crops(images, fmt, composition.image_size)
    tokenised = tokenised_crops(method, images, fmt)
    drawn = [panels(each, pixels, options.seed, tokenised) for each in methods]
    if not drawn[0]:
        raise UserError(f"--model {options.model} predicts what cannot be shown as pixels")
    side = composition.window_size
    where = f"{side}x{side} windows" if side else "whole images"
    about = f"{options.model}: {composition.method}, {where} of {composition.patch_size}-pixel patches. "
    about += caption(method)
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


def _folder(model: str) -> Path:
    return Path(model) if Path(model).is_dir() else Path(model).parent
