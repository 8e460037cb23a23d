"""What a run is to do, settled before it begins: flags over --config over recipe over what the data suggests.

Every option that does not fit the data, the hardware or another option is refused here.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lomar.commands.automatic import Choice, Hardware, check_compile, choose, find_hardware
from lomar.commands.runs import (
    CONFIG_FILE,
    asked_for,
    check_kind,
    check_new,
    check_processes,
    fitting_micro_batch,
    kept_by_a_block,
    merged,
    notes_on,
    stored,
)
from lomar.commands.two_view_settling import check_views, fitted_views, kept_by_views, told_of_length
from lomar.data.decode import PixelFormat
from lomar.data.loader import SampleKey
from lomar.data.opening import open_source
from lomar.data.sources import ImageSource
from lomar.data.survey import channel_statistics, survey
from lomar.errors import UserError, is_out_of_memory
from lomar.interop.initial import initial_options
from lomar.interop.tokenizers import load_tokenizer
from lomar.methods.composition import Composition, TwoViewComposition
from lomar.methods.cost import FIXED_BYTES, TRAINED_BYTES
from lomar.methods.recipes import (
    DEPTH,
    IMAGENET_MEAN,
    IMAGENET_STD,
    OF_MASKS,
    OF_VIEWS,
    RECIPES,
    VIEWS_OF_WINDOW,
    Recipe,
    mask_layer_for,
)
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.targets import TARGETS, VisualTokens
from lomar.methods.tokenizer import STRIDE, DiscreteVAE
from lomar.methods.two_view import TwoView
from lomar.model.encoder import SIZES, size_of
from lomar.options import PretrainOptions, fields_of, flag, read_config, suggestion
from lomar.options.pretraining import MOST_DEPTH, MOST_WIDTH
from lomar.training.memory import saved_bytes

TOKENIZER_FILE = "tokenizer.safetensors"  # the run's own copy
WARMUP_SHARE = 0.025  # of the run: 40 of 1600 epochs, 20 of 800, 10 of 400 (section 6.1)


@dataclass
class Settled:
    """All that a run needs to begin or to go on.

    Args:
        options: every one with a value.
        source: the images.
        hardware: where to compute.
        tokenizer: for methods that predict tokens.
        notes: what the user should know.
    """

    options: PretrainOptions
    source: ImageSource
    hardware: Hardware
    tokenizer: DiscreteVAE | None
    notes: list[str] = field(default_factory=list)

    @property
    def fmt(self) -> PixelFormat:
        """What all pixels become."""
        return pixel_format(self.options)

    @property
    def composition(self) -> Composition | TwoViewComposition:
        """What rebuilds the method."""
        vocab = self.tokenizer.vocab if self.tokenizer else 0
        return RECIPES[self.options.method].compose(asdict(self.options), vocab, self.fmt.scale)

    def build(self) -> MaskedReconstruction | TwoView:
        """The method with fresh weights, and its tokenizer."""
        method = self.composition.build()
        if isinstance(method, MaskedReconstruction) and isinstance(method.target, VisualTokens) and self.tokenizer:
            method.target.attach(self.tokenizer)
        method.set_grad_checkpointing(self.options.grad_checkpointing)
        return method

    @property
    def tokenised_px(self) -> int:
        """Side of the picture that a tokenizer sees of a crop; 0 where there is none."""
        return tokenised_px(self.options.image_size // self.options.patch_size) if self.tokenizer else 0


def tokenised_px(grid_side: int) -> int:
    """Side in pixels of the picture that has one token for each patch of a grid."""
    return STRIDE * grid_side


def pixel_format(options: PretrainOptions) -> PixelFormat:
    """What all pixels become."""
    return PixelFormat(options.channels, options.pixel_type)


def asked_for_pretraining(given: Mapping[str, Any]) -> dict[str, Any]:
    """What flags and --config ask for; "auto" asks for nothing."""
    asked = asked_for(given, PretrainOptions, ("data", "eval_data", "init", "tokenizer"))
    config = read_config(given["config"], PretrainOptions) if given.get("config") else {}
    if "method" in config and given.get("method", config["method"]) != config["method"]:
        raise UserError(
            f"--config {given['config']} is of {config['method']}, which --method {given['method']} would only rename"
        )
    return asked


def settle(asked: Mapping[str, Any], run: Path, typed: Collection[str] = ()) -> Settled:
    """A new run: what was asked for (flag, then --config), then the recipe, then --init, then automatic choices.

    Args:
        asked: from flags and --config.
        run: its folder.
        typed: the flags among them, which must mean something; a configuration may be of more than is used.

    Raises:
        UserError: something is missing, wrong, or does not fit the rest.
    """
    method = asked.get("method", fields_of(PretrainOptions)["method"].default)
    recipe = _recipe(method)
    wanted = set(asked)
    asked = merged(dict(recipe.options) | {"method": method}, asked)
    if "data" not in asked:
        raise UserError("--data is missing: a folder of images, a .txt file of paths, or 'sample'")
    check_new(run, asked)
    check_kind(run, PretrainOptions)
    _check_meant(recipe, asked, typed)
    if "model" in asked:
        _size(asked["model"])
    hardware = find_hardware(asked.get("device", "auto"))
    check_compile(asked, hardware)
    tokenizer = _tokenizer(asked)
    initial = initial_options(asked["init"]) if "init" in asked else {}
    asked = {name: value for name, value in (initial | asked).items() if name not in recipe.lacks}
    source = open_source(asked["data"])
    share = asked.get("max_bad_share", fields_of(PretrainOptions)["max_bad_share"].default)
    found = survey(source, max_bad_share=share, channels=asked.get("channels"))
    choices = choose(asked, found.count, found.median_short_side_px, found.format, hardware, recipe.full["base_lr"])
    values = {key: choice.value for key, choice in choices.items()} | asked
    choices |= {key: Choice(value, "the --init file's") for key, value in initial.items() if asked.get(key) == value}
    if recipe.objective:
        fitted = fitted_views(recipe.objective, values, wanted, found.count)
    else:
        fitted = _fitted(values, wanted)
    values |= {key: choice.value for key, choice in fitted.items()}
    choices |= fitted
    if found.format.dtype == "float32" and values["pixel_type"] != "float32":
        raise UserError(f"--pixel-type is {values['pixel_type']}; images of float32 can be read as float32 alone")
    fmt = PixelFormat(values["channels"], values["pixel_type"])
    check_fit(values, tokenizer)
    mean, std = _statistics(values, source, fmt)
    values.setdefault("mean", mean)
    values.setdefault("std", std)
    check_per_channel(values, "mean", "std")
    values.setdefault("warmup_epochs", WARMUP_SHARE * _epochs(values, found.count))
    values["micro_batch"] = values.get("micro_batch", 1)
    settled = Settled(PretrainOptions(**values), source, hardware, tokenizer)
    _check_parts(settled)
    if "micro_batch" not in asked:
        try:
            choices["micro_batch"] = _micro_batch(settled)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                "one image takes more memory than is free; take a smaller --model, --window-size or grid of patches"
            ) from None
        settled.options = PretrainOptions(**values | {"micro_batch": choices["micro_batch"].value})
    settled.notes = notes_on(found, choices, settled.options.image_size)
    settled.notes += told_of_length(recipe.objective, values, found.count)
    return settled


def _check_meant(recipe: Recipe, asked: Mapping[str, Any], typed: Collection[str]) -> None:
    """Refuse flags for parts that the method does not have."""
    for name in typed:
        if name in recipe.lacks:
            others = ", ".join(
                each for each in ("lomar", "mae", "beit", "dino", "mocov3") if name not in RECIPES[each].lacks
            )
            raise UserError(f"{flag(name)} is for {others}; --method {asked['method']} has no such part")
    if recipe.objective:
        return
    lacks = {
        "--architecture encoder-decoder": (
            asked["architecture"] != "encoder-decoder",
            ("decoder_width", "decoder_depth", "decoder_heads"),
        ),
        "--mask blockwise": (asked["mask"] != "blockwise", ("mask_min_block",)),
        "windows (--window-size)": (not asked["window_size"], ("window_layout",)),
        "--predict-share below 1": (asked["predict_share"] == 1, ("predict_choice",)),
    }
    for part, (lacking, names) in lacks.items():
        for name in names:
            if lacking and name in typed:
                raise UserError(f"{flag(name)} is for {part}, which this method does not have")


def _fitted(values: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Choice]:
    """What a recipe says of one size, for the size that was asked for; `wanted` options stay as they are."""
    choices = {}
    side = values["window_size"]
    views = VIEWS_OF_WINDOW.get(side, max(1, round(196 / side**2))) if side else 1
    if "views" not in wanted and "window_size" in wanted and (values["views"] == 1) != (views == 1):
        reason = "about as many visible patches as in Table 4" if side else ""
        choices["views"] = Choice(views, reason)
    patches = (side or values["image_size"] // values["patch_size"]) ** 2
    smallest = max(1, round(16 * patches / 196))
    if values["mask"] == "blockwise" and "mask_min_block" not in wanted and values["mask_min_block"] > smallest:
        choices["mask_min_block"] = Choice(smallest, f"BEiT's 16 of 196, for views of {patches}")
    width, depth, _ = _size(values["model"])
    if values["mask_layer"] and depth != DEPTH and "mask_layer" not in wanted:
        layer = values["mask_layer"]
        choices["mask_layer"] = Choice(mask_layer_for(layer, depth), f"the recipe's {layer} of {DEPTH} blocks")
    large = width >= SIZES["large"][0]
    if values["transformer"] == "beit" and values["layer_scale"] == 0.1 and large and "layer_scale" not in wanted:
        choices["layer_scale"] = Choice(1e-5, "BEiT's for a large encoder")
    return choices


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UserError(f"--method is {name!r}; `lomar recipes` lists what there is{suggestion(name, list(RECIPES))}")
    return RECIPES[name]


def settle_again(asked: Mapping[str, Any], run: Path) -> Settled:
    """The run in --out; options that do not change results may be given anew.

    Raises:
        UserError: there is no run, its files are not whole, or another result is asked for.
    """
    values = stored(run, asked, PretrainOptions, _parts_of)
    options = PretrainOptions(**values)
    if options.model == "auto":
        raise UserError(f"{run / CONFIG_FILE} is not what a run writes: it must settle model")
    recipe = _recipe(options.method)
    for name in sorted(recipe.lacks):
        if values.get(name) is not None:
            raise UserError(f"{run / CONFIG_FILE} gives {name}, a part that {options.method} does not have")
    if options.target is not None:
        _check_target(options.target)
    tokenizer = load_tokenizer(run / TOKENIZER_FILE) if options.target == "tokens" else None
    check_fit(asdict(options), tokenizer)
    check_per_channel(asdict(options), "mean", "std")
    hardware = find_hardware(options.device)
    check_compile(values, hardware)
    settled = Settled(options, open_source(options.data), hardware, tokenizer)
    _check_parts(settled)
    return settled


def _parts_of(values: Mapping[str, Any]) -> frozenset[str]:
    """Options that a run's method has and others have not."""
    recipe = RECIPES.get(values.get("method", ""))
    return frozenset() if recipe is None else (OF_MASKS | OF_VIEWS) - recipe.lacks - {"tokenizer"}


def _size(model: str) -> tuple[int, int, int]:
    try:
        width, depth, heads = size_of(model)
    except ValueError as error:
        raise UserError(f"--model {error}{suggestion(model, list(SIZES))}") from None
    if width > MOST_WIDTH or depth > MOST_DEPTH:
        raise UserError(f"--model is {model}; it can be at most {MOST_WIDTH} wide and {MOST_DEPTH} blocks deep")
    return width, depth, heads


def _check_target(name: str) -> None:
    if name not in TARGETS:
        raise UserError(f"--target is {name!r}; it can be {', '.join(TARGETS)}{suggestion(name, list(TARGETS))}")


def _tokenizer(values: Mapping[str, Any]) -> DiscreteVAE | None:
    if "target" not in values:
        return None
    _check_target(values["target"])
    if values["target"] != "tokens":
        if "tokenizer" in values:
            raise UserError(f"--tokenizer is for --target tokens; this run predicts {values['target']}")
        return None
    if "tokenizer" not in values:
        raise UserError(
            "--tokenizer is missing: visual tokens need one; "
            "`lomar tokenizer train --data DIR --out FILE` makes it from your images"
        )
    return load_tokenizer(values["tokenizer"])


def check_fit(values: Mapping[str, Any], tokenizer: DiscreteVAE | None) -> None:
    """Refuse options that do not go together, naming both."""
    image, patch = values["image_size"], values["patch_size"]
    if image % patch:
        nearest = max(patch, round(image / patch) * patch)
        raise UserError(f"--image-size {image} is not a multiple of --patch-size {patch}; {nearest} would be")
    if patch**2 * values["channels"] < 2:
        raise UserError("--patch-size 1 with 1 channel leaves one number a patch, which cannot be normalised; take 2")
    objective = RECIPES[values["method"]].objective
    if objective:
        check_views(objective, values)
    else:
        _check_masks(values, image // patch, tokenizer)
    width, _, _ = _size(values["model"])
    if values["position"] == "sincos":
        decoder = ["decoder_width"] * (values.get("architecture") == "encoder-decoder")
        for name, of in [("model", width), *((name, values[name]) for name in decoder)]:
            if of % 4:
                raise UserError(f"--position sincos needs widths that 4 divides; {flag(name)} is {values[name]}")
    low, high = values["crop_scale"]
    if low > high:
        raise UserError(f"--crop-scale is {low} {high}; the smaller share comes first")
    check_processes(values["batch_size"], values.get("strategy", "ddp"))
    if values.get("strategy") == "fsdp" and values.get("clip_by") == "tensor":
        raise UserError(
            "--clip-by is tensor, which --strategy fsdp does not go with: tensors are spread; it can be all"
        )


def _check_masks(values: Mapping[str, Any], grid: int, tokenizer: DiscreteVAE | None) -> None:
    _check_views(values, grid)
    _, depth, _ = _size(values["model"])
    if values["mask_layer"] >= depth:
        raise UserError(
            f"--mask-layer is {values['mask_layer']}; --model {values['model']} has blocks 0 to {depth - 1}"
        )
    decodes = values["architecture"] == "encoder-decoder"
    if values["mask"] == "blockwise" and (decodes or values["mask_layer"]):
        other = "--architecture encoder-decoder" if decodes else f"--mask-layer {values['mask_layer']}"
        raise UserError(
            f"--mask blockwise hides more in one view than in another, which {other} cannot have; take --mask uniform"
        )
    if decodes and values["mask_layer"]:
        raise UserError(f"--mask-layer {values['mask_layer']} is for --architecture masked-encoder")
    if decodes and values["decoder_width"] % values["decoder_heads"]:
        raise UserError(
            f"--decoder-width {values['decoder_width']} is not a multiple of --decoder-heads {values['decoder_heads']}"
        )
    if tokenizer:
        _check_tokenizer(tokenizer, values["channels"], values["pixel_type"])


def _check_tokenizer(tokenizer: DiscreteVAE, channels: int, pixel_type: str) -> None:
    if len(tokenizer.high) != channels:
        raise UserError(f"--tokenizer was made for images of {len(tokenizer.high)} channels; these have {channels}")
    if tokenizer.pixel_type != pixel_type:
        raise UserError(
            f"--tokenizer was made for pixels of {tokenizer.pixel_type}; these are read as {pixel_type}, "
            "see --pixel-type, or train a tokenizer on these images"
        )


def _check_views(values: Mapping[str, Any], grid: int) -> None:
    window = values["window_size"]
    if window > grid:
        raise UserError(
            f"--window-size {window} is larger than the {grid}x{grid} grid of patches "
            f"(--image-size {values['image_size']} / --patch-size {values['patch_size']}); it can be at most {grid}"
        )
    if not window and values["views"] != 1:
        raise UserError(f"--views is {values['views']}; with --window-size 0 the whole image is the one view")
    patches = (window or grid) ** 2
    ratio = values["mask_ratio"]
    hidden = patches - int(patches * (1 - ratio)) if values["mask"] == "uniform-kept" else int(patches * ratio)
    if not 0 < hidden < patches:
        raise UserError(
            f"--mask-ratio {ratio} hides {hidden} of the {patches} patches of a {'window' if window else 'view'}; "
            "it must hide some and leave some"
        )
    share = values["predict_share"]
    predicted = round(hidden * share)
    if share < 1 and values["mask"] == "blockwise":
        raise UserError(f"--predict-share is {share}; of --mask blockwise all hidden patches are predicted: take 1")
    if share < 1 and not 0 < predicted < hidden:
        raise UserError(
            f"--predict-share {share} predicts {predicted} of the {hidden} hidden patches of a view; "
            + ("take 1 for all" if predicted else "it must predict some")
        )
    if values["mask"] == "blockwise" and values["mask_min_block"] > hidden:
        raise UserError(
            f"--mask-min-block {values['mask_min_block']} is more than the {hidden} patches that "
            f"--mask-ratio {ratio} hides of a view"
        )
    if window and values["window_layout"] == "released" and values["views"] > grid - window + 1:
        raise UserError(
            f"--views is {values['views']}; with --window-layout released a {grid}x{grid} grid "
            f"has at most {grid - window + 1} windows of side {window}"
        )


def _check_parts(settled: Settled) -> None:
    """Put the method together without its memory: what the checks before do not know, the parts themselves refuse."""
    try:
        with torch.device("meta"):
            method = settled.composition.build()
    except (ValueError, RuntimeError) as error:  # torch's own where sizes overflow
        raise UserError(f"these options do not make a method: {' '.join(str(error).split())[:300]}") from None
    weights = sum(tensor.numel() for tensor in (*method.parameters(), *method.buffers()))
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    needed, there = TRAINED_BYTES * trained + FIXED_BYTES * (weights - trained), settled.hardware.memory_bytes
    if needed > there and settled.options.strategy != "fsdp":
        raise UserError(
            f"these options make a method of {weights:,} weights; to train it takes {needed / 1e9:.1f} GB, and "
            f"{there / 1e9:.1f} GB of memory are free: take a smaller --model, or a smaller grid of patches"
        )


def check_per_channel(values: Mapping[str, Any], *names: str) -> None:
    """Refuse options that have not one number for each channel."""
    for name in names:
        if len(values[name]) != values["channels"]:
            raise UserError(
                f"{flag(name)} has {len(values[name])} numbers; the images have {values['channels']} channels"
            )


def _statistics(
    values: Mapping[str, Any], source: ImageSource, fmt: PixelFormat
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if "mean" in values and "std" in values:
        return values["mean"], values["std"]
    if values["statistics"] == "imagenet":
        if fmt.channels != 3:
            raise UserError(f"--statistics imagenet is for 3 channels; the images have {fmt.channels}")
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = channel_statistics(source, fmt, size_px=values["image_size"])
    return tuple(round(m, 6) for m in mean), tuple(round(s, 6) for s in std)


def _epochs(values: Mapping[str, Any], count: int) -> float:
    return values["epochs"] if values.get("epochs") else values["max_steps"] * values["batch_size"] / count


def _micro_batch(settled: Settled) -> Choice:
    """Measured: what one image keeps for the backward pass, from the difference of two images and one."""
    options, method = settled.options, settled.build()

    def kept(images: int) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            if isinstance(method, TwoView):
                return kept_by_views(method, options, images)
            return _kept_by_windows(method, settled, images)

    weights = sum(p.numel() for p in method.parameters() if p.requires_grad)
    a_block = kept_by_a_block(kept, method.set_grad_checkpointing, len(method.encoder.blocks))
    again = a_block if options.grad_checkpointing else None
    whole = isinstance(method, TwoView) and method.whole_share
    return fitting_micro_batch(kept, weights, options.batch_size, settled.hardware, again, whole)


def _kept_by_windows(method: MaskedReconstruction, settled: Settled, images: int) -> int:
    options = settled.options
    sides = [patches * options.patch_size for patches in method.views.size]
    inputs = method.draw(options.seed)(SampleKey(0, 0, 0, 0))
    inputs["pixels"] = torch.zeros((method.views.count, options.channels, *sides), dtype=torch.uint8)
    if settled.tokenised_px:
        inputs["tokenised"] = torch.zeros(options.channels, settled.tokenised_px, settled.tokenised_px)
    return saved_bytes(partial(method, **{name: t.expand(images, *t.shape) for name, t in inputs.items()}))
