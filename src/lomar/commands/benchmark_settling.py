"""What `lomar benchmark` is to measure: options -> rows; what does not fit is refused before anything is timed."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from lomar.benchmark.attention import NO_BIAS
from lomar.benchmark.cells import Cell
from lomar.benchmark.classifier import CLASSIFIERS
from lomar.benchmark.loading import LOMAR, PATCH_PX, PILLOW, TENSOR, WINDOW
from lomar.benchmark.pretraining import OPENAI_BLOCKS, OPENAI_WIDTH
from lomar.benchmark.rounds import Row
from lomar.commands.automatic import Hardware, compiling, decoder_for, find_hardware, loading_workers
from lomar.commands.settling import check_fit
from lomar.commands.two_view_settling import fitted_sizes
from lomar.data.opening import open_source
from lomar.errors import UserError
from lomar.methods.composition import Composition, TwoViewComposition
from lomar.methods.cost import (
    forward_flops,
    image_tokens,
    kept_bytes,
    step_flops,
    tokenizer_flops,
    trained_parameters,
)
from lomar.methods.recipes import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_VOCAB,
    RECIPES,
    VIEWS_OF_WINDOW,
    mask_layer_for,
)
from lomar.model.attention import BACKENDS, backend_for
from lomar.model.encoder import SIZES, size_of
from lomar.options import BenchmarkOptions, PretrainOptions, convert, fields_of, flag, suggestion
from lomar.options.benchmarking import MEASURES

OF_TIMM = "timm-mae"
CLIP_GRAD: Any = fields_of(PretrainOptions)["clip_grad"].default
MACHINE = "the machine"  # group of the matrix products
LOADED_IMAGES = 200  # of a pass of the loader, at most

# option -> the measures that use it; the others are used by all
_USED_BY: dict[str, tuple[str, ...]] = {
    "methods": ("steps", "windows", "processes"),
    "baseline": ("steps",),
    "model": ("steps", "windows", "classifier", "attention", "processes"),
    "image_sizes": ("steps", "windows", "classifier", "attention", "loader", "processes"),
    "patch_size": ("steps", "windows", "classifier", "attention", "processes"),
    "batch_sizes": ("steps", "windows", "classifier", "attention", "processes"),
    "views": ("steps", "attention", "loader", "processes"),
    "window_sizes": ("windows",),
    "processes": ("processes",),
    "data": ("steps", "windows", "loader", "processes"),
    "prepared": ("loader",),
    "workers": ("steps", "windows", "processes"),
    "without_tokenizer": ("steps", "processes"),
    "compile": ("steps", "windows", "classifier", "attention", "processes"),
    "precision": ("steps", "windows", "classifier", "attention", "processes"),
}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        measure: one of `MEASURES`.
        hardware: where.
        precision: "fp32" or "bf16".
        rounds: how often each row is measured.
        rows: in the order of the table; not yet measured.
        notes: what a reader of the table should know.
    """

    measure: str
    hardware: Hardware
    precision: str
    rounds: int
    rows: list[Row]
    notes: list[str]


@dataclass(frozen=True)
class Variant:
    """A method as it is asked for.

    Args:
        name: as typed: a recipe, perhaps with changes.
        recipe: the recipe's name.
        changes: options of `lomar pretrain` that differ from it.
        of_timm: whether it is MAE put together from timm's blocks.
    """

    name: str
    recipe: str
    changes: Mapping[str, Any]
    of_timm: bool = False


def plan(given: Mapping[str, Any]) -> Plan:
    """The measurement that the options ask for.

    Raises:
        UserError: an option is wrong or does not fit the others.
    """
    options = BenchmarkOptions(**given)
    if options.measure not in MEASURES:
        known = list(MEASURES)
        raise UserError(
            f"there is no measure {options.measure!r}{suggestion(options.measure, known)}; it can be {', '.join(known)}"
        )
    for name in given:
        if options.measure not in _USED_BY.get(name, tuple(MEASURES)):
            raise UserError(f"{flag(name)} is for {' and '.join(_USED_BY[name])}, not for {options.measure}")
    _size(options.model)
    hardware = find_hardware(options.device)
    precision = options.precision if options.precision != "auto" else "bf16" if hardware.bf16 else "fp32"
    if options.data:
        open_source(options.data)
    return _Planner(options, hardware, precision).plan()


class _Planner:
    """Makes the rows of each measure.

    Args:
        options: as typed.
        hardware: where to measure.
        precision: settled.
    """

    def __init__(self, options: BenchmarkOptions, hardware: Hardware, precision: str) -> None:
        self.options = options
        self.hardware = hardware
        self.precision = precision
        self.gpu = hardware.device == "cuda"
        self.notes: list[str] = []
        self.batches = options.batch_sizes or ((64,) if self.gpu else (2,))
        wanted = compiling(self.gpu)[0] if options.compile == "auto" else options.compile
        self.compiled = {"no": (False,), "yes": (True,), "both": (False, True)}[wanted]

    def plan(self) -> Plan:
        """The rows of the measure that was asked for."""
        makers: dict[str, Callable[[], Iterator[Row]]] = {
            "steps": self._steps,
            "windows": self._windows,
            "classifier": self._classifiers,
            "attention": self._attention,
            "loader": self._loader,
            "processes": self._processes,
            "products": self._products,
        }
        measure = self.options.measure
        rows = list(makers[measure]())
        return Plan(measure, self.hardware, self.precision, self.options.rounds, rows, list(dict.fromkeys(self.notes)))

    def _cell(self, work: str, values: Mapping[str, Any], images: int, **more: Any) -> Cell:
        options, gpu = self.options, self.gpu
        settings = {
            "device": self.hardware.device,
            "precision": self.precision,
            "warmup": (5 if gpu else 1) if options.warmup is None else options.warmup,
            "steps": options.steps or (20 if gpu else 3),
            "memory_bytes": self.hardware.memory_bytes // more.get("processes", 1),
        }
        return Cell(work, values, images, **settings | more)

    def _steps(self) -> Iterator[Row]:
        options = self.options
        variants = self._variants(("lomar", "lomar-late", "mae", "beit"))
        base = options.baseline or next((v.name for v in variants if v.name == "mae"), variants[0].name)
        if base not in [variant.name for variant in variants]:
            variants.append(_variant(base, "--baseline"))
        for px in options.image_sizes or (224, 384, 448, 896):
            for batch in self.batches:
                for variant in variants:
                    composition = self._composition(variant, px, batch)
                    for compiled in self.compiled:
                        row = self._step_row(variant, composition, batch, compiled=compiled)
                        row.is_base = variant.name == base
                        yield row
        yield self._product(8192 if self.gpu else 4096, self.precision)

    def _windows(self) -> Iterator[Row]:
        options = self.options
        variants = self._variants(("lomar", "lomar-late"))
        for variant in variants:
            if variant.of_timm or not RECIPES[variant.recipe].options.get("window_size"):
                raise UserError(f"--methods {variant.name} has no windows, whose size could be measured")
        sides = options.window_sizes or tuple(VIEWS_OF_WINDOW)
        for px in options.image_sizes or (224,):
            for batch in self.batches:
                for variant in variants:
                    for side in sides:
                        views = VIEWS_OF_WINDOW.get(side, max(1, round(196 / side**2)))
                        changes = {"window_size": side, "views": max(1, round(views * paper_views(px) / 4))}
                        changed = replace(variant, changes={**variant.changes, **changes})
                        composition = self._composition(changed, px, batch)
                        for compiled in self.compiled:
                            row = self._step_row(changed, composition, batch, compiled=compiled)
                            row.title += f", windows of {side}x{side}"
                            row.group = f"{variant.name}, {row.group}"
                            row.is_base = side == (7 if 7 in sides else sides[0])
                            yield row
        self.notes.append("Windows per image as in the paper's Table 4: about equally many visible patches.")
        yield self._product(8192 if self.gpu else 4096, self.precision)

    def _processes(self) -> Iterator[Row]:
        options = self.options
        most = torch.cuda.device_count() if self.gpu else self.hardware.cores
        counts = options.processes or tuple(2**power for power in range(most.bit_length()) if 2**power <= most)
        if self.gpu and max(counts) > most:
            raise UserError(f"--processes {max(counts)} is more than the {most} GPUs here")
        for px in options.image_sizes or (224,):
            for batch in self.batches:
                for variant in self._variants(("lomar-late",)):
                    for compiled in self.compiled:
                        for count in counts:
                            composition = self._composition(variant, px, batch * count)
                            # One thread each, so that a process has the same whatever their number.
                            threads = 0 if self.gpu else 1
                            row = self._step_row(
                                variant, composition, batch, compiled=compiled, processes=count, threads=threads
                            )
                            row.title += f", {count} process{'es' * (count > 1)}"
                            row.group = f"{row.about['name']}, {row.group}"
                            row.is_base = count == min(counts)
                            yield row
        self.notes.append(
            "Gradients are averaged by NCCL." if self.gpu else "One thread a process; gradients are averaged by Gloo."
        )

    def _classifiers(self) -> Iterator[Row]:
        options = self.options
        width, depth, heads = _size(options.model)
        patch = options.patch_size or 16
        for px in options.image_sizes or (224, 448):
            self._check_multiple(px, patch)
            shape = {"img_size": px, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
            for batch in self.batches:
                for work in ("fine-tuning", "features"):
                    for compiled in self.compiled:
                        for name in CLASSIFIERS:
                            about = {
                                "name": self._named(name, compiled),
                                "work": work,
                                "image_px": px,
                                "patch_px": patch,
                            }
                            about |= {"tokens": 1 + (px // patch) ** 2, "batch": batch, "compiled": compiled}
                            cell = self._cell(work, {"name": name, "shape": shape}, batch, compiled=compiled)
                            group = f"{work}, {px} px, {batch} images"
                            yield Row(cell, f"{about['name']}, {group}", about, group, is_base=name == "timm")

    def _attention(self) -> Iterator[Row]:
        options = self.options
        width, _, heads = _size(options.model)
        patch = options.patch_size or 16
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        q = torch.empty(1, heads, 50, width // heads, dtype=dtype, device=self.hardware.device)
        fused = backend_for(q, 50) == "fused"
        available = [NO_BIAS, *(name for name in BACKENDS if fused or name != "fused")]
        for px in options.image_sizes or (224, 448):
            self._check_multiple(px, patch)
            for batch in self.batches:
                for views, side in ((options.views or paper_views(px), 7), (1, px // patch)):
                    for compiled in self.compiled:
                        for backend in available:
                            values = {"backend": backend, "views": views, "side": side, "heads": heads}
                            values |= {"head_width": width // heads}
                            about = {"name": self._named(backend, compiled), "image_px": px, "views": views}
                            about |= {"tokens": 1 + side**2, "batch": batch, "compiled": compiled}
                            group = f"{batch * views} x {1 + side**2} tokens"
                            cell = self._cell("attention", values, batch, compiled=compiled)
                            yield Row(cell, f"{about['name']}, {group}", about, group, is_base=backend == NO_BIAS)
        self.notes.append(f"{heads} heads of {width // heads}; forward and backward.")

    def _loader(self) -> Iterator[Row]:
        options = self.options
        if not options.data:
            raise UserError("--data is missing: the images to load")
        paths = {PILLOW: (PILLOW, options.data), TENSOR: (TENSOR, options.data), LOMAR: (LOMAR, options.data)}
        if not importlib.util.find_spec("torchvision"):
            self.notes.append("torchvision is not installed (pip install torchvision): lomar's path stands alone.")
            del paths[PILLOW], paths[TENSOR]
        if options.prepared:
            open_source(options.prepared, "--prepared")
            paths[f"{LOMAR}, prepared files"] = (LOMAR, options.prepared)
        images = min(LOADED_IMAGES, len(open_source(options.data)))
        for px in options.image_sizes or (224, 448):
            self._check_multiple(px, PATCH_PX)
            if px < WINDOW * PATCH_PX:
                raise UserError(f"--image-sizes {px} is less than a window; it must be at least {WINDOW * PATCH_PX}")
            for name, (path, data) in paths.items():
                views = options.views or paper_views(px)
                values = {"path": path, "data": data, "image_px": px, "views": views}
                about = {"name": name, "image_px": px, "batch": images}
                cell = self._cell("loading", values, images, device="cpu", precision="fp32")
                yield Row(cell, f"{name}, {px} px", about, f"{px} px", is_base=name == next(iter(paths)))
        self.notes.append(f"One core; {images} files a pass, {options.data}.")

    def _products(self) -> Iterator[Row]:
        for precision in ("fp32", "bf16"):
            for side in (1024, 2048, 4096, *((8192, 16384) if self.gpu else ())):
                yield self._product(side, precision)

    def _product(self, side: int, precision: str) -> Row:
        about = {"name": "matrix product", "side": side, "precision": precision}
        cell = self._cell("matrix product", {"side": side}, 1, precision=precision, warmup=1, steps=5)
        return Row(cell, f"matrix product, {side} x {side}, {precision}", about, MACHINE)

    def _step_row(
        self, variant: Variant, c: Composition | TwoViewComposition, batch: int, *, compiled: bool, **more: Any
    ) -> Row:
        options, recipe = self.options, RECIPES[variant.recipe]
        values: dict[str, Any] = {
            "composition": c.to_dict(),
            "clip_grad": recipe.options.get("clip_grad", CLIP_GRAD),
            "clip_each": recipe.options.get("clip_by") == "tensor",
            "of_timm": variant.of_timm,
            "with_tokenizer": not options.without_tokenizer,
        }
        if options.data:
            values |= {"data": options.data, "workers": self._workers(more.get("processes", 1))}
            values |= {name: recipe.options[name] for name in ("crop_scale", "color_jitter")}
        extra = self._tokenizer_flops(variant, c)
        about = {
            "name": self._named(variant.name, compiled),
            "method": variant.name,
            "model": options.model,
            "image_px": c.image_size,
            "patch_px": c.patch_size,
            "window": c.window_size if isinstance(c, Composition) else 0,
            "views": c.view_count,
            "tokens": max(image_tokens(c)),
            "batch": batch,
            "processes": more.get("processes", 1),
            "compiled": compiled,
            "data": options.data,
            "parameters": trained_parameters(c),
            "forward_flops": forward_flops(c).total,
            "tokenizer_flops": extra,
            "step_flops": step_flops(c) + extra,
            "kept_floor_bytes": kept_bytes(c, 2 if self.precision == "bf16" else 4),
        }
        cell = self._cell("pretraining", values, batch, compiled=compiled, **more)
        group = f"{c.image_size} px, {batch} images"
        return Row(cell, f"{about['name']}, {group}", about, group, bursts=bool(options.data))

    def _tokenizer_flops(self, variant: Variant, c: Composition | TwoViewComposition) -> int:
        """What the tokenizer adds to a step for one image; 0 where there is none, or it is left out."""
        if not isinstance(c, Composition) or c.target != "tokens":
            return 0
        if self.options.without_tokenizer:
            self.notes.append(f"A step of {variant.recipe} is without its tokenizer's forward pass.")
            return 0
        self.notes.append(
            f"In a step of {variant.recipe} is its tokenizer's forward pass: OpenAI's size, random weights, fp32."
        )
        return tokenizer_flops(c.grid, len(c.mean), OPENAI_WIDTH, c.vocab, OPENAI_BLOCKS)

    def _named(self, name: str, compiled: bool) -> str:
        """What a row is called; how it is run stands in its name where it is run both ways."""
        if compiled and len(self.compiled) == 1:
            self.notes.append("Compiled by torch.compile.")
        return f"{name}, compiled" if compiled and len(self.compiled) > 1 else name

    def _workers(self, processes: int) -> int:
        """As many as pretraining chooses."""
        chosen = loading_workers(max(1, self.hardware.cores // processes), self.gpu)
        return chosen if self.options.workers is None else self.options.workers

    def _variants(self, default: Sequence[str]) -> list[Variant]:
        return [_variant(name, "--methods") for name in dict.fromkeys(self.options.methods or default)]

    def _composition(self, variant: Variant, px: int, batch: int) -> Composition | TwoViewComposition:
        """A method at one image size, as `lomar pretrain` makes it there.

        Raises:
            UserError: it cannot be put together.
        """
        options, recipe = self.options, RECIPES[variant.recipe]
        values: dict[str, Any] = {"method": variant.recipe, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        values |= dict(recipe.full) | dict(recipe.options)
        patch = options.patch_size or values["patch_size"]
        self._check_multiple(px, patch)
        own_px = values["image_size"]
        values |= {"model": options.model, "image_size": px, "patch_size": patch, "batch_size": batch}
        values |= self._sizes_of_views(variant, values) if recipe.objective else self._sizes_of_masks(values, own_px)
        values |= variant.changes
        if "window_size" in values and not values["window_size"]:
            values["views"] = 1
        if values.get("mask") == "blockwise" and "mask_min_block" not in variant.changes:
            patches = (values["window_size"] or px // patch) ** 2
            values["mask_min_block"] = min(values["mask_min_block"], max(1, round(16 * patches / 196)))
        try:
            check_fit(values, None)
            composition = recipe.compose(values, OPENAI_VOCAB, scale=255.0)
            with torch.device("meta"):
                composition.build()
        except (UserError, ValueError) as error:
            raise UserError(f"{variant.name} at {px} px: {error}") from None
        if isinstance(composition, Composition) and composition.window_size and options.measure == "steps":
            self.notes.append(
                "Windows per image: "
                + (
                    f"{options.views}."
                    if options.views
                    else "the paper's up to 448 px, above in proportion to the area."
                )
            )
        return composition

    def _sizes_of_views(self, variant: Variant, values: Mapping[str, Any]) -> dict[str, Any]:
        """What of a method that compares views follows from the encoder and the image."""
        self.notes.append(
            f"Views and tokens of {variant.recipe} are those of all its crops, distorted within the step."
        )
        objective = RECIPES[variant.recipe].objective
        return {name: choice.value for name, choice in fitted_sizes(objective, values, variant.changes).items()}

    def _sizes_of_masks(self, values: Mapping[str, Any], own_px: int) -> dict[str, Any]:
        """What of masked reconstruction follows from them.

        Args:
            values: of the method at one image size.
            own_px: the recipe's.
        """
        options, px = self.options, values["image_size"]
        width, depth, _ = _size(options.model)
        fitted: dict[str, Any] = {"mask_layer": mask_layer_for(values["mask_layer"], depth)}
        if values["architecture"] == "encoder-decoder":
            fitted |= {name: value for name, value, _ in decoder_for(width)}
        if values["window_size"]:
            scaled = max(1, round(values["views"] * paper_views(px) / paper_views(own_px)))
            fitted["views"] = options.views or scaled
        return fitted

    @staticmethod
    def _check_multiple(px: int, patch: int) -> None:
        if px % patch:
            nearest = max(patch, round(px / patch) * patch)
            raise UserError(f"--image-sizes {px} is not a multiple of the patch side, {patch} px; {nearest} would be")


def paper_views(px: int) -> int:
    """Windows of 7x7 patches of an image: the paper's at 224, 384 and 448 px, and on straight lines between them.

    Larger images have as many for their area as at 448 px, smaller ones than 224 px the same four.
    """
    return round(9 * (px / 448) ** 2) if px > 448 else round(float(np.interp(px, [224, 384, 448], [4, 6, 9])))


def _variant(text: str, where: str) -> Variant:
    """A method as typed: NAME or NAME:option=value,option=value.

    Raises:
        UserError: there is no such recipe, or an option is no choice of a method.
    """
    name, _, changed = text.partition(":")
    known = [*RECIPES, OF_TIMM]
    if name not in known:
        raise UserError(f"{where}: there is no method {name!r}{suggestion(name, known)}; `lomar recipes` lists them")
    if name == OF_TIMM:
        if changed:
            raise UserError(f"{where} {text}: {OF_TIMM} cannot be changed")
        return Variant(text, "mae", {}, of_timm=True)
    recipe = RECIPES[name]
    kind = TwoViewComposition if recipe.objective else Composition
    fixed = {"method", "image_size", "patch_size", "batch_size", "mean", "std"} | recipe.lacks
    choices = [each.name for each in fields(kind) if each.name in fields_of(PretrainOptions).keys() - fixed]
    example = "head_width=1024" if recipe.objective else "mask_layer=8"
    changes = {}
    for part in changed.split(",") if changed else ():
        option, equals, value = part.partition("=")
        option = option.strip().replace("-", "_")
        if not equals or option not in choices:
            raise UserError(
                f"{where} {text}: {part!r} is no change of a method, such as {example}{suggestion(option, choices)}"
            )
        try:
            changes[option] = convert(PretrainOptions, option, value)
        except UserError as error:
            raise UserError(f"{where} {text}: {error}") from None
    return Variant(text, name, changes)


def _size(model: str) -> tuple[int, int, int]:
    try:
        return size_of(model)
    except ValueError as error:
        raise UserError(f"--model {error}{suggestion(model, list(SIZES))}") from None
