"""Images that are named for a picture, and their reconstructions as panels of a figure."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lomar.data.decode import PixelFormat
from lomar.data.loader import SampleKey, centre_crops
from lomar.data.opening import is_there, open_source
from lomar.data.sources import ImageSource, joined
from lomar.errors import UserError
from lomar.figures.reconstruction import Panel
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.targets import NormalisedPixels, VisualTokens
from lomar.methods.tokenizer import STRIDE

IMAGES_OF_A_FOLDER = 8  # the first ones


def images_named(paths: Sequence[str], of_a_folder: int | None = IMAGES_OF_A_FOLDER) -> ImageSource:
    """The images that `--images` names, and the first of each folder it names.

    Args:
        paths: images, folders of images, or 'sample'.
        of_a_folder: so many; None for all.

    Raises:
        UserError: there is no such file or folder, or no image in it.
    """
    found: list[ImageSource] = []
    for path in paths:
        absolute = os.path.abspath(path)  # noqa: PTH100 (links stay as they are)
        if Path(path).is_file():
            found.append(ImageSource("", [os.fsencode(absolute)]))
        elif path == "sample" or is_there(path):
            source = open_source("sample" if path == "sample" else absolute, flag="--images")
            found.append(source if of_a_folder is None else source.subset(range(min(len(source), of_a_folder))))
        else:
            raise UserError(f"--images: there is no file or folder {path}")
    return joined(found)


def pixel_format(channels: int, scale: float) -> PixelFormat:
    """What a model reads its pixels as, which are divided by `scale`."""
    return PixelFormat(channels, {255.0: "uint8", 65535.0: "uint16"}.get(scale, "float32"))


def readable_crops(source: ImageSource, fmt: PixelFormat, size_px: int) -> tuple[Tensor, list[str]]:
    """Pixels (n, C, size_px, size_px) of the images that can be read, and the names of the others.

    Raises:
        UserError: none can be read.
    """
    pixels, good = central_crops(source, fmt, size_px)
    skipped = [source.name(i) for i in (~good).nonzero().flatten().tolist()]
    if not len(pixels):
        raise UserError(f"--images: none of {len(source)} can be read, for example {skipped[0]}")
    return pixels, skipped


def caption(method: MaskedReconstruction) -> str:
    """How to read its reconstructions."""
    said = []
    if isinstance(method.target, NormalisedPixels):
        said.append(
            "The model predicts patches less their mean and over their deviation; each shown prediction is given the "
            "true mean and deviation of its patch."
        )
    if isinstance(method.target, VisualTokens):
        said.append(
            "The model predicts visual tokens; shown is what the tokenizer decodes from them and the visible ones."
        )
    if method.share:
        said.append(f"It was trained to predict {method.share.count} of {method.mask.count} hidden patches at a time.")
    return " ".join(said)


def tokenised_crops(method: MaskedReconstruction, source: ImageSource, fmt: PixelFormat) -> Tensor | None:
    """The crops of `central_crops` at the size a tokenizer sees them; None if the method has no tokenizer."""
    if not isinstance(method.target, VisualTokens) or method.target.tokenizer is None:
        return None
    return central_crops(source, fmt, STRIDE * method.views.grid[0])[0]


def central_crops(source: ImageSource, fmt: PixelFormat, size_px: int) -> tuple[Tensor, Tensor]:
    """Pixels (n, C, size_px, size_px) of the images that can be read, and bool (N,): which of all they are."""
    pixels, good = (torch.cat(parts) for parts in zip(*centre_crops(source, fmt, size_px, workers=0), strict=True))
    return pixels[good], good


def panels(method: MaskedReconstruction, pixels: Tensor, seed: int, tokenised: Tensor | None = None) -> list[Panel]:
    """One window of each image, masked and reconstructed.

    The window depends on the seed and the image's place alone, so that other mask ratios show the same windows; the
    patches hidden at a lower ratio are hidden at a higher one too.

    Args:
        method: with weights; its mask decides the ratio.
        pixels: integer (n, C, S, S).
        seed: of windows and masks.
        tokenised: what `tokenised_crops` gave.

    Returns:
        One panel for each image; none if the method predicts nothing that can be seen.
    """
    draw = method.draw(seed)
    patch = method.patch_size
    rows, columns = (side * patch for side in method.views.size)
    corners, hidden, windows = [], [], []
    for place, image in enumerate(pixels):
        # Slot and batch matter to the released layout alone, whose windows then all come from one call.
        drawn = draw(SampleKey(epoch=0, index=place, batch=0, slot=0))
        corner, hide = drawn["corners"][0], drawn["hidden"][0]
        top, left = (corner * patch).tolist()
        corners.append(corner)
        hidden.append(hide)
        windows.append(image[:, top : top + rows, left : left + columns])
    device = method.mean.device
    training = method.training
    method.eval()
    with torch.inference_mode():
        restored = method.reconstruct(
            torch.stack(windows).to(device),
            torch.stack(corners).to(device),
            torch.stack(hidden).to(device),
            None if tokenised is None else tokenised.to(device),
        )
    method.train(training)
    if restored is None:
        return []
    predictions = (restored.float() * method.scale).cpu().numpy()
    return [
        Panel(image.numpy(), (int(corner[0]), int(corner[1])), patch, hide.numpy(), prediction)
        for image, corner, hide, prediction in zip(pixels, corners, hidden, predictions, strict=True)
    ]
