"""The model card of an exported encoder: what it is, how to load it, what goes in and what comes out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm

from lomar import __version__
from lomar.model import Encoder
from lomar.model.encoder import ANY_SIZE

INSTALL = "`pip install .` in a clone of lomar's source (it is not on PyPI)"
_PAPERS = {  # on arXiv
    "lomar": "2206.00790",
    "mae": "2111.06377",
    "beit": "2106.08254",
    "dino": "2104.14294",
    "mocov3": "2104.02057",
}
_CLASSES_SHOWN = 50
_WHITE = 255.0  # of 8-bit images
_WHY = {
    "contextual": "A plain ViT cannot hold its contextual relative position encoding (RPE): vectors in every block, "
    "which queries meet by their distance to each key.",
}
_WHY_ELSE = "No architecture of timm's holds its positions together with its attention."


@dataclass(frozen=True)
class Accuracy:
    """How a classifier was judged.

    Args:
        top1: share of images whose first guess was right.
        images: that judged it.
        size: (height, width) at which they did, in pixels.
    """

    top1: float
    images: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Background:
    """What a card tells beside the weights.

    Args:
        pretraining: option -> value; empty where it is not known.
        finetuning: likewise.
        accuracy: of a classifier, where it is known.
        licence: of the weights, as the hub calls it.
    """

    pretraining: Mapping[str, Any] = field(default_factory=dict)
    finetuning: Mapping[str, Any] = field(default_factory=dict)
    accuracy: Accuracy | None = None
    licence: str | None = None


def model_card(name: str, encoder: Encoder, config: Mapping[str, Any], background: Background) -> str:
    """Markdown with the hub's front matter.

    Args:
        name: of the folder.
        encoder: that was exported.
        config: what config.json says.
        background: what it does not say.
    """
    sections = (
        _front_matter(encoder, background),
        _about(name, encoder),
        _accuracy(background.accuracy),
        _loading(name, encoder, config),
        _input(encoder, config),
        _classes(config.get("label_names", ())),
        _options("Pretraining", background.pretraining),
        _options("Fine-tuning", background.finetuning),
    )
    return "\n".join(line for section in sections for line in section)


def _front_matter(encoder: Encoder, background: Background) -> Iterator[str]:
    task = "image-classification" if encoder.num_classes else "image-feature-extraction"
    yield from ("---", "library_name: timm", f"pipeline_tag: {task}")
    yield from (f"license: {background.licence}",) if background.licence else ()
    yield from ("tags:", "- timm", "- lomar")
    contextual = encoder.architecture["position"] == "contextual"
    paper = _PAPERS.get(background.pretraining.get("method", "lomar" if contextual else ""))
    yield from (f"- arxiv:{paper}",) if paper else ()
    yield from ("---", "")


def _about(name: str, encoder: Encoder) -> Iterator[str]:
    made = encoder.architecture
    height, width = encoder.patch_embed.img_size
    what = f"classifier of {encoder.num_classes} classes" if encoder.num_classes else "encoder"
    yield from (f"# {name}", "")
    yield (
        f"A vision transformer, {what}: {made['embed_dim']} wide, {made['depth']} deep, {made['num_heads']} heads; "
        f"{made['patch_size']}-pixel patches of {made['in_chans']} channels, {height} x {width} px; "
        f"{made['position']} position."
    )
    yield from (f"Exported by lomar {__version__}.", "")


def _accuracy(found: Accuracy | None) -> Iterator[str]:
    if found:
        height, width = found.size
        yield from (f"Top-1 accuracy {found.top1:.1%} of {found.images} images at {height} x {width} px.", "")


def _loading(name: str, encoder: Encoder, config: Mapping[str, Any]) -> Iterator[str]:
    """What must be installed, and code that runs."""
    needs_lomar = config["architecture"] == ANY_SIZE
    yield from ("## Use", "")
    if needs_lomar:
        why = _WHY.get(encoder.architecture["position"], _WHY_ELSE)
        yield f"{why} It needs lomar: {INSTALL}."
        yield from ("One line then makes timm know the architecture:", "")
        yield from ("```python", "import lomar.model", "```", "")
    else:
        yield f"timm alone loads it, as its `{config['architecture']}` with the arguments in config.json"
        yield from (f"(written and compared with timm {timm.__version__}).", "")
    yield "```python"
    yield from ("import lomar.model  # makes it known to timm",) if needs_lomar else ()
    yield from ("import timm", "import torch", *(("from PIL import Image, ImageOps",) if _is_photo(config) else ()), "")
    yield f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()  # from the hub: "hf-hub:USER/{name}"'
    yield from _preparation(config)
    yield "with torch.inference_mode():"
    yield f"    {_output(encoder)}"
    yield "    tokens = model.forward_features(images)  # (1, 1 + patches, width), cls token first"
    yield from ("```", "")
    yield "`timm.create_model(..., num_classes=10)` gives it a new head, `features_only=True` maps of features"
    yield from ("after chosen blocks.", "")


def _output(encoder: Encoder) -> str:
    if encoder.num_classes:
        return f"logits = model(images)  # (1, {encoder.num_classes})"
    pooled = {"avg": "mean of the patches", "token": "cls token"}.get(encoder.global_pool, "all tokens")
    return f"features = model(images)  # {pooled}"


def _is_photo(config: Mapping[str, Any]) -> bool:
    """Whether timm's transforms prepare the images: 8-bit, of three colours."""
    return config["pretrained_cfg"]["input_size"][0] == 3 and config["lomar"]["scale"] == _WHITE


def _preparation(config: Mapping[str, Any]) -> Iterator[str]:
    """Code that makes `images`."""
    if _is_photo(config):
        yield "config = timm.data.resolve_model_data_config(model)"
        yield "transform = timm.data.create_transform(**config, is_training=False)"
        yield 'photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")  # upright'
        yield "images = transform(photo)[None]"
        return
    channels, height, width = config["pretrained_cfg"]["input_size"]
    scale = f"{config['lomar']['scale']:g}"
    yield f"pixels = torch.rand(1, {channels}, {height}, {width}) * {scale}  # your images, from 0 to {scale}"
    yield 'mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))'
    yield f"images = (pixels / {scale} - mean) / std"


def _input(encoder: Encoder, config: Mapping[str, Any]) -> Iterator[str]:
    told, scale = config["pretrained_cfg"], config["lomar"]["scale"]
    channels, height, width = told["input_size"]
    yield from ("## Input", "")
    yield f"- {channels} channels, {height} x {width} px; {_sizes(encoder, config)}"
    yield f"- normalised: (pixels / {scale:g} - mean) / deviation, with mean {_numbers(told['mean'])} and deviation"
    yield f"  {_numbers(told['std'])}"
    if scale != _WHITE:
        yield f"- timm's transforms know nothing of the {scale:g}: divide before they normalise"
    yield ""


def _sizes(encoder: Encoder, config: Mapping[str, Any]) -> str:
    patch = encoder.architecture["patch_size"]
    if config["pretrained_cfg"]["fixed_input_size"]:
        return f"`img_size=` of `timm.create_model` resizes its tables for other sizes, multiples of {patch}"
    others = f"other sizes, multiples of {patch}, go in as they are"
    if config["architecture"] == ANY_SIZE or encoder.architecture["position"] == "none":
        return others
    return (
        f"{others}, but timm resizes the table of positions with antialiasing, lomar without: features differ by up to "
        "4 % of the largest; `lomar export --image-size` resizes it as lomar does"
    )


def _classes(names: Sequence[str]) -> Iterator[str]:
    if not names:
        return
    yield from ("## Classes", "")
    yield from (f"{number}. {name}" for number, name in enumerate(names[:_CLASSES_SHOWN]))
    if len(names) > _CLASSES_SHOWN:
        yield from ("", f"The other {len(names) - _CLASSES_SHOWN} are under `label_names` in config.json.")
    yield ""


def _options(title: str, options: Mapping[str, Any]) -> Iterator[str]:
    if not options:
        return
    yield from (f"## {title}", "", "| option | value |", "|---|---|")
    yield from (f"| {name} | {_value(value)} |" for name, value in options.items())
    yield ""


def _value(value: Any) -> str:
    return _numbers(value) if isinstance(value, list | tuple) else str(value)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
