"""What a run's last weights make of images, drawn for a report: reconstructions, attention, a map."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lomar.commands.attention import distances_of, looks_of, subject_of
from lomar.commands.automatic import find_hardware
from lomar.commands.evaluation import PICTURED_IMAGES, TOKENS_AT_ONCE
from lomar.commands.map import folders_of, layout
from lomar.commands.panels import caption, central_crops, images_named, panels, pixel_format, tokenised_crops
from lomar.commands.report_pictures import TILE_PX, attempt, encoded, strip
from lomar.commands.settling import TOKENIZER_FILE
from lomar.data.addresses import is_address
from lomar.data.labels import SPLIT_SEED, evaluation_split, labelled_data
from lomar.data.loader import centre_crops
from lomar.data.opening import open_source
from lomar.data.sources import ImageSource
from lomar.data.survey import spread
from lomar.downstream.embedding import unit_length
from lomar.downstream.features import Wanted, features_in_batches
from lomar.errors import UserError
from lomar.figures.map import MOST_COLOURS, cell_px, map_figure
from lomar.figures.reconstruction import Panel, filled_in
from lomar.figures.sheet import Rgb, rgb, shown_range
from lomar.interop.models import input_of
from lomar.interop.tokenizers import load_tokenizer
from lomar.interop.weights import load, load_reconstructor
from lomar.methods.targets import VisualTokens
from lomar.options import AttentionOptions, ReportOptions
from lomar.reporting.page import Picture, Shown
from lomar.reporting.reading import RunRecord
from lomar.training.checkpoint import FOLDER, Checkpoints

ASKED = ("pretrain", "finetune")  # commands whose models are asked
LEAST_MAPPED = 3
ATTENTIVE_IMAGES = 16
PIXELS_HELD = 2**28  # bytes of the images of a map


def ask_model(run: RunRecord, shown: Shown, options: ReportOptions, say: Callable[[str], object]) -> None:
    """Add to what is shown of a run what its last weights make of images; what fails is a note in its section.

    Args:
        run: what was read of it.
        shown: of the run; changed.
        options: images, ratios, limits, device.
        say: tells what is done now.
    """
    if run.kind not in ASKED:
        return
    find_hardware(options.device)  # what was asked for and cannot be had is an error, and no note
    if options.images:
        images_named(options.images, of_a_folder=None)
    reconstructs = run.kind == "pretrain" and not run.compares_views
    say("asking the model for attention" + (" and reconstructions" if reconstructs else ""))
    images = _Images(run, options)
    if reconstructs:
        attempt(shown, "ratios", lambda: _ratios(run, shown, options, images))
    attempt(shown, "attention", lambda: _attention(run, shown, options, images))
    if options.samples:
        say(f"embedding up to {options.samples} images for the map")
        attempt(shown, "map", lambda: _map(run, shown, options, images))


@dataclass(frozen=True)
class _Mapped:
    """Images of a map, and what colours them.

    Args:
        source: the images.
        groups: of each the index of its name.
        names: of the groups; none draws no colours.
        of: what they are, in words.
    """

    source: ImageSource
    groups: Sequence[int]
    names: Sequence[str]
    of: str


class _Images:
    """The images that a report asks the model about: those of --images, else the run's own where they are at hand."""

    def __init__(self, run: RunRecord, options: ReportOptions) -> None:
        self._run, self._options = run, options
        self._of = ", ".join(options.images or ())

    def some(self, count: int) -> tuple[ImageSource, str]:
        """At most so many, evenly spread, and what they are in words.

        Raises:
            UserError: there is none.
        """
        if self._run.kind == "finetune" and not self._options.images:  # its --data may be a table
            mapped = self.mapped
            return mapped.source.subset(spread(len(mapped.source), count)), mapped.of
        return self._unlabelled(count)

    @cached_property
    def mapped(self) -> _Mapped:
        """Those of the map: labelled ones that judge where the run has such, and their classes.

        Raises:
            UserError: there is none.
        """
        limit, seed = max(self._options.samples, ATTENTIVE_IMAGES), self._options.seed
        split, where = None, ""
        # Drawn as the run itself draws them, so that images that judge are those that judged.
        if not self._options.images and self._run.kind == "finetune":
            val = self._own("val") if self._run.option("val", str) else None
            where = val or self._own("data")
            split = labelled_data(self._own("data"), SPLIT_SEED, val).thinned(limit, limit, seed)
        elif not self._options.images and self._run.option("eval_data", str):
            where = self._own("eval_data")
            split = evaluation_split(where, self._run.option("seed", int) or 0, limit, limit)
        if split is not None:
            part, does = (split.val, "judge") if len(split.val) >= LEAST_MAPPED else (split.train, "train or vote")
            return _Mapped(part.source, part.labels.tolist(), split.classes, f"that {does}, of {where}")
        source, of = self._unlabelled(limit)
        groups, names = folders_of([source.name(index) for index in range(len(source))])
        return _Mapped(source, groups, names, of)

    def _unlabelled(self, count: int) -> tuple[ImageSource, str]:
        if self._options.images:
            source, of = images_named(self._options.images, of_a_folder=None), f"of {self._of}"
        else:
            source, of = open_source(self._own("data")), "that the run trains on"
        return source.subset(spread(len(source), count)), of

    def _own(self, option: str) -> str:
        """Where the run's images are.

        Raises:
            UserError: that is not known, or it is on a network, which a report does not ask.
        """
        data = self._run.option(option, str)
        if data is None:
            raise UserError(f"the run's configuration does not name its images (--{option}); --images does")
        if is_address(data) or data.startswith(("hf:", "torchvision:")):
            raise UserError(f"the run's images are at {data}, which a report does not ask; --images names some here")
        return data


def _ratios(run: RunRecord, shown: Shown, options: ReportOptions, images: _Images) -> None:
    """The same windows at several mask ratios."""
    method, composition = load_reconstructor(run.folder)
    method.to(find_hardware(options.device).device)
    if isinstance(method.target, VisualTokens):
        method.target.attach(load_tokenizer(run.folder / TOKENIZER_FILE))
    source, of = images.some(PICTURED_IMAGES)
    fmt = pixel_format(len(composition.mean), composition.scale)
    pixels, _ = central_crops(source, fmt, composition.image_size)
    if not len(pixels):
        raise UserError(f"none of {len(source)} images can be read, for example {source.name(0)}")
    tokenised = tokenised_crops(method, source, fmt)
    strips: list[Picture] = []
    impossible = []
    for ratio in options.mask_ratios:
        try:
            masked = composition.with_mask_ratio(method, ratio)
        except ValueError:  # it would hide nothing, or all
            impossible.append(ratio)
            continue
        drawn = panels(masked, pixels, options.seed, tokenised)
        if not drawn:
            raise UserError("the method predicts what cannot be shown as pixels")
        if not strips:
            title = "image" if drawn[0].is_whole else "window"
            strips.append(strip(title, [[_window(panel) for panel in drawn]], f"each {title} as it is"))
        tiles = [list(column) for column in zip(*(filled_in(panel, TILE_PX) for panel in drawn), strict=True)]
        alt = f"the windows with {ratio:.0%} of their patches hidden, and filled in"
        strips.append(strip(f"{ratio:.0%} hidden", tiles, alt, wide=True))
    shown.ratios = strips
    ratio = run.option("mask_ratio", float)
    trained = f"The run trains with {ratio:.0%} hidden. " if ratio else ""
    shown.notes["ratios"] = (
        f"{_weights(run)} Images {of}, or windows of them, masked and filled in. {trained}{caption(method)}"
        + "".join(f" At {ratio:.0%} nothing is hidden, or all." for ratio in impossible)
    )


def _attention(run: RunRecord, shown: Shown, options: ReportOptions, images: _Images) -> None:
    """How far patches look in each layer."""
    subject = subject_of(AttentionOptions(model=str(run.folder), images=(), out="", seed=options.seed))
    source, of = images.some(ATTENTIVE_IMAGES)
    fmt = pixel_format(subject.channels, subject.scale)
    pixels, _ = central_crops(source, fmt, subject.grid[0] * subject.patch_px)
    if not len(pixels):
        raise UserError(f"none of {len(source)} images can be read, for example {source.name(0)}")
    looks = [looks_of(subject, image, subject.place(number, None)) for number, image in enumerate(pixels)]
    shown.distances = [(distance, even) for distance, even in distances_of(looks)]
    early = "" if subject.first == 1 else f" Before layer {subject.first} there are visible patches alone."
    patches = "{}x{}".format(*subject.size)
    shown.notes["attention"] = (
        f"How far {subject.looking}es look in the {subject.part}, on a grid of {patches}, weighted by their attention: "
        f"mean over heads and over {len(pixels)} images {of}.{early} A distance near that of attention spread evenly "
        "means that a layer looks everywhere alike."
    )


def _map(run: RunRecord, shown: Shown, options: ReportOptions, images: _Images) -> None:
    """Images where their features put them."""
    encoder = load(run.folder)
    takes = input_of(encoder)
    device = torch.device(find_hardware(options.device).device)
    encoder.to(device)
    mapped = images.mapped
    fmt = pixel_format(takes.channels, takes.scale)
    bytes_each = takes.channels * takes.size[0] * takes.size[1] * np.dtype(fmt.dtype).itemsize
    kept = spread(len(mapped.source), max(LEAST_MAPPED, min(options.samples, PIXELS_HELD // bytes_each)))
    source, groups, names = mapped.source.subset(kept), [mapped.groups[index] for index in kept], mapped.names
    tokens = (takes.size[0] // encoder.patch_embed.patch_size[0]) * (takes.size[1] // encoder.patch_embed.patch_size[1])
    crops = centre_crops(source, fmt, takes.size, 0, max(1, min(64, TOKENS_AT_ONCE // tokens)), takes.crop_pct)
    thumbnails: list[Rgb] = []

    def watched() -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, good in crops:
            thumbnails.extend(rgb(each, shown_range(each)) for each in pixels.numpy())
            yield pixels, good

    features: list[NDArray[np.float32]] = []
    usable: list[bool] = []
    for (found,), good in features_in_batches(encoder, [Wanted("pooled")], watched(), takes.normalise, device):
        features.append(found.numpy())
        usable += good.tolist()
    good_ones = np.flatnonzero(usable)
    if len(good_ones) < LEAST_MAPPED:
        raise UserError(f"a map needs {LEAST_MAPPED} images, and {len(good_ones)} can be used")
    places, how = layout(unit_length(np.concatenate(features)[good_ones]), "tsne", options.seed)
    features_are = "cls tokens" if encoder.global_pool == "token" else "pooled features"
    note = ""
    if len(names) > MOST_COLOURS:
        note = f" {len(names)} classes are too many for colours."
    if not 2 <= len(names) <= MOST_COLOURS:
        groups, names = [0] * len(groups), []
    side = cell_px(len(good_ones))
    small = [_small(thumbnails[index], side) for index in good_ones]
    printable = [name.encode(errors="replace").decode() for name in names]
    drawn = map_figure(small, places, [groups[index] for index in good_ones], printable, "")
    alt = f"{len(good_ones)} images laid out so that those with like features are near each other"
    shown.map = Picture("", *encoded(drawn), alt + (f", framed by {len(names)} classes" if names else ""))
    shown.notes["map"] = (
        f"{_weights(run)} {len(good_ones)} images {mapped.of}, by {how} of the encoder's {features_are}. Each stands "
        f"in the free cell nearest to its place.{note}"
    )


def _weights(run: RunRecord) -> str:
    """Which weights were asked, as far as the checkpoints tell."""
    steps = Checkpoints(run.folder / FOLDER).steps()
    if run.kind == "finetune":
        return "The best classifier's weights."
    return f"Weights of step {steps[0]:,}, the last checkpoint." if steps else "The run's last weights."


def _window(panel: Panel) -> Image.Image:
    """A panel's window as it is."""
    image = rgb(panel.original, shown_range(panel.original))
    return Image.fromarray(image[panel.box()])


def _small(pixels: Rgb, side: int) -> Rgb:
    """The middle square of a thumbnail."""
    height, width = pixels.shape[:2]
    least = min(height, width)
    top, left = (height - least) // 2, (width - least) // 2
    square = Image.fromarray(pixels[top : top + least, left : left + least])
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))
