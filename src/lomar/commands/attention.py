"""`lomar attention`: where a hidden patch looks, as the paper's Fig. 1, or the cls token; how far by layer."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lomar.commands.panels import images_named, pixel_format, readable_crops
from lomar.data.loader import SampleKey
from lomar.errors import UserError
from lomar.figures.attention import AttentionPanel, figure1
from lomar.figures.png import save_png
from lomar.interop.weights import load_most, load_reconstructor
from lomar.methods.architectures import Architecture, MaskedEncoder
from lomar.methods.composition import Composition
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.model import Encoder
from lomar.model.positions import Grid, grid_coordinates
from lomar.model.recording import attention_distance, between_patches, recorded_attention
from lomar.options import AttentionOptions

MAPS = 4  # layers drawn if none is named, as in the paper


class Place(NamedTuple):
    """What is looked at in an image, and from where.

    Args:
        corner: int64 (2,), row and column of the view's top-left patch.
        hidden: bool (N,), in raster order of the view.
        query: raster index in the view of the patch that looks; None where the cls token does.
    """

    corner: Tensor
    hidden: Tensor
    query: int | None


@dataclass(frozen=True)
class Subject:
    """What is looked into: a method, which has a mask token, or an encoder alone.

    Args:
        part: the encoder, or the decoder.
        blocks: its layers.
        first: number of the first layer (from 1) that has hidden patches.
        grid: (rows, columns) of the image, in patches.
        size: (rows, columns) of a view.
        patch_px: patch side P.
        channels, scale: of the pixels; the pixel value that stands for 1.
        hides: number of the image -> corner and hidden patches of a view drawn for it.
        run: one forward pass: pixels (1, C, h, w) of a view, corners (1, 2), hidden (1, N).
        looking: "hidden patch", or "patch" where none is hidden.
        about: the caption's beginning.
        by_cls: whether the cls token is what looks where no patch is asked for.
    """

    part: str
    blocks: nn.ModuleList
    first: int
    grid: Grid
    size: Grid
    patch_px: int
    channels: int
    scale: float
    hides: Callable[[int], tuple[Tensor, Tensor]]
    run: Callable[[Tensor, Tensor, Tensor], object]
    looking: str
    about: str
    by_cls: bool = False

    def place(self, image: int, patch: tuple[int, int] | None) -> Place:
        """Where to look in an image: the view that was drawn for it, moved if it does not contain the patch asked for.

        A patch asked for that the mask shows is hidden, and the hidden patch farthest from it is shown instead: that
        changes least of what there is to look at. Without one it is the hidden patch nearest to the view's middle, or
        the cls token.
        """
        corner, hidden = self.hides(image)
        if patch is None and self.by_cls:
            return Place(corner, hidden, None)
        size, at = torch.tensor(self.size), grid_coordinates(*self.size)
        if patch is None:
            distances = (at - (size - 1) / 2).norm(dim=1)
            candidates = distances.masked_fill(~hidden, torch.inf) if hidden.any() else distances
            return Place(corner, hidden, int(candidates.argmin()))
        wanted = torch.tensor(patch)
        corner = corner.clamp(wanted - size + 1, wanted)
        row, column = (wanted - corner).tolist()
        query = row * self.size[1] + column
        if hidden.any() and not hidden[query]:
            distances = (at - at[query]).double().norm(dim=1)
            hidden = hidden.clone()
            hidden[int(distances.masked_fill(~hidden, -1).argmax())] = False
            hidden[query] = True
        return Place(corner, hidden, query)


class Look(NamedTuple):
    """What one layer's attention was.

    Args:
        shares: (N,) of sum 1, the query's attention on the patches of the view in raster order, mean over heads; zeros
            if the query was not there.
        distance: mean over the layer's hidden patches, or over all where none is hidden, in patches.
        even: what `distance` would be if attention were spread evenly.
    """

    shares: Tensor
    distance: float
    even: float


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar attention` with the options that were given; returns the exit status."""
    for name in ("model", "images", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar attention --help")
    options = AttentionOptions(**given)
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out is {options.out}; it must end in .png")
    subject = subject_of(options)
    layers = _layers(options.layers, subject)
    if options.patch and not all(index < side for index, side in zip(options.patch, subject.grid, strict=True)):
        last = " ".join(str(side - 1) for side in subject.grid)
        raise UserError(f"--patch {options.patch[0]} {options.patch[1]} is outside of the image, whose last is {last}")
    fmt = pixel_format(subject.channels, subject.scale)
    pixels, skipped = readable_crops(images_named(options.images), fmt, subject.grid[0] * subject.patch_px)
    places = [subject.place(number, options.patch) for number in range(len(pixels))]
    looks = [looks_of(subject, image, place) for image, place in zip(pixels, places, strict=True)]
    distances = distances_of(looks)
    panels = [
        AttentionPanel(
            image.numpy(),
            (int(place.corner[0]), int(place.corner[1])),
            subject.patch_px,
            place.hidden.numpy(),
            place.query,
            torch.stack([each[layer - 1].shares for layer in layers]).numpy(),
        )
        for image, place, each in zip(pixels, places, looks, strict=True)
    ]
    caption = _caption(subject, distances[layers[-1] - 1][1], by_cls=places[0].query is None)
    try:
        save_png(figure1(panels, layers, [distances[layer - 1][0] for layer in layers], caption), out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    for name in skipped:
        sys.stderr.write(f"lomar: skipped an unreadable image: {name}\n")
    sys.stdout.write(_table(subject, distances))
    sys.stdout.write(f"{out}: {len(pixels)} images at layers {' '.join(map(str, layers))}\n")
    return 0


def looks_of(subject: Subject, image: Tensor, place: Place) -> list[Look]:
    """What each layer's attention is in one view of an image (C, S, S)."""
    top, left = (place.corner * subject.patch_px).tolist()
    rows, columns = (side * subject.patch_px for side in subject.size)
    view = image[None, :, top : top + rows, left : left + columns]
    # Tokens stand visible first, then hidden, each in raster order.
    order = place.hidden.to(torch.uint8).argsort(stable=True)
    coordinates = grid_coordinates(*subject.size)[order]

    def keep(weights: Tensor) -> Look:
        there = order[: weights.shape[-1] - 1]  # hidden patches, which stand last, may not have entered yet
        shares = between_patches(weights)[:, :, -len(there) :]  # (1, heads, queries, tokens), without cls
        asking = there[-shares.shape[2] :]  # in the last block hidden patches alone
        at = coordinates[None, : len(there)]
        looking = place.hidden[asking]
        if not looking.any():
            looking = torch.ones_like(looking)
        queries, queries_at = shares[:, :, looking], at[:, -len(asking) :][:, looking]
        distance = attention_distance(queries, queries_at, at)
        even = attention_distance(torch.full_like(queries, 1 / len(there)), queries_at, at)
        if place.query is None:
            of_query = between_patches(weights)[0, :, 0].mean(dim=0)  # all tokens are asked for, cls first
        else:
            of_query = shares[0, :, asking == place.query].mean(dim=0).sum(dim=0)  # (tokens,)
        return Look(torch.zeros(len(order)).index_copy(0, there, of_query), distance, even)

    with torch.inference_mode(), recorded_attention(subject.blocks, keep) as looks:
        subject.run(view, place.corner[None], place.hidden[None])
    return looks


def distances_of(looks: Sequence[Sequence[Look]]) -> list[list[float]]:
    """Of each layer its distance and what it would be if attention were spread evenly, means over images."""
    # (images, layers, 2)
    return torch.tensor([[(look.distance, look.even) for look in each] for each in looks]).mean(dim=0).tolist()


def subject_of(options: AttentionOptions) -> Subject:
    """What `--model` names: a run or reconstructor, an encoder, or a released checkpoint of either kind."""
    try:
        method, composition = load_reconstructor(options.model)
    except UserError:
        encoder, mean, std = load_most(options.model)  # its complaint is the better one where there is neither
        assert isinstance(encoder, Encoder)
        scale = encoder.pretrained_cfg["scale"] if encoder.pretrained_cfg else 255.0  # released ones are for 8 bits
        return _of_encoder(encoder, mean, std, scale, options)
    return _of_method(method, composition, options)


def _of_method(method: MaskedReconstruction, composition: Composition, options: AttentionOptions) -> Subject:
    if options.mask_ratio is not None:
        try:
            method = composition.with_mask_ratio(method, options.mask_ratio)
        except ValueError as error:
            raise UserError(f"--mask-ratio: {error}") from None
    draw = method.draw(options.seed)

    def hides(image: int) -> tuple[Tensor, Tensor]:
        drawn = draw(SampleKey(epoch=0, index=image, batch=0, slot=0))
        return drawn["corners"][0], drawn["hidden"][0]

    part, blocks, first = _layers_with_mask_tokens(method.architecture)
    size = method.views.size
    view = "each image" if size == composition.grid else f"one {size[0]}x{size[1]} window of each image"
    ratio = method.mask.count / method.mask.patches
    return Subject(
        part=part,
        blocks=blocks,
        first=first,
        grid=composition.grid,
        size=size,
        patch_px=composition.patch_size,
        channels=len(composition.mean),
        scale=composition.scale,
        hides=hides,
        run=lambda pixels, corners, hidden: method.predict(method.normalise(pixels), corners, hidden),
        looking="hidden patch",
        about=f"{options.model}: {composition.method}, {ratio:.0%} of {view} hidden.",
    )


def _layers_with_mask_tokens(architecture: Architecture) -> tuple[str, nn.ModuleList, int]:
    """Which part hidden patches go through, its layers, and the number of the first that they are in."""
    if isinstance(architecture, MaskedEncoder):
        return "encoder", architecture.encoder.blocks, architecture.mask_layer + 1
    return "decoder", architecture.decoder.blocks, 1


def _of_encoder(
    encoder: Encoder, mean: Sequence[float], std: Sequence[float], scale: float, options: AttentionOptions
) -> Subject:
    if options.mask_ratio is not None:
        raise UserError(
            f"--mask-ratio: {options.model} holds an encoder alone, which has no mask token to hide patches with"
        )
    side = min(encoder.patch_embed.grid_size)
    shift, factor = (torch.tensor(each).view(-1, 1, 1) for each in (mean, std))

    def run(pixels: Tensor, corners: Tensor, hidden: Tensor) -> Tensor:
        return encoder.forward_features((pixels.float() / scale - shift) / factor)

    return Subject(
        part="encoder",
        blocks=encoder.blocks,
        first=1,
        grid=(side, side),
        size=(side, side),
        patch_px=encoder.patch_embed.patch_size[0],
        channels=len(mean),
        scale=scale,
        hides=lambda image: (torch.zeros(2, dtype=torch.int64), torch.zeros(side**2, dtype=torch.bool)),
        run=run,
        looking="patch",
        about=f"{options.model}: visible patches only, since an encoder alone has no mask token.",
        by_cls=encoder.global_pool == "token",
    )


def _layers(asked: tuple[int, ...] | None, subject: Subject) -> tuple[int, ...]:
    """The numbers of the layers to draw."""
    first, last = subject.first, len(subject.blocks)
    if asked is None:
        count = last - first + 1
        maps = min(MAPS, count)
        return tuple(first - 1 + ceil(count * i / maps) for i in range(1, maps + 1))
    for layer in asked:
        if layer > last:
            raise UserError(f"--layers {layer}: the last layer of the {subject.part} is {last}")
        if layer < first:
            raise UserError(f"--layers {layer}: hidden patches are there from layer {first} to {last} (--mask-layer)")
    return asked


def _caption(subject: Subject, even: float, by_cls: bool) -> str:
    looker = "cls token to the patches" if by_cls else f"outlined {subject.looking} to the others and to itself"
    return (
        f"{subject.about} Colours: attention of the {looker}, mean over the heads of each "
        f"{subject.part} layer; below each map, what share its brightest patch has. In the titles: how far "
        f"{subject.looking}es look on average, weighted by attention, over all images here; spread evenly, attention "
        f"would go {even:.1f} patches. {'What it gives itself' if by_cls else 'The cls token'} is left out."
    )


def _table(subject: Subject, distances: list[list[float]]) -> str:
    """Lines for the terminal: of each layer, the mean attention distance and that of attention spread evenly."""
    lines = [f"how far {subject.looking}es look in the {subject.part}, in patches", "layer  distance  spread evenly"]
    for layer, (distance, even) in enumerate(distances, start=1):
        note = "  (of visible patches: the hidden ones come later)" if layer < subject.first else ""
        lines.append(f"{layer:5}{distance:10.2f}{even:15.2f}{note}")
    return "\n".join(lines) + "\n"
