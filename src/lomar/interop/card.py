"""The model card of an exported encoder: what it is, how to load it, what goes in and what comes out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm

from lomar import __version__
from lomar.model import Encoder
from lomar.model.encoder import ANY_SIZE

_CLASSES_SHOWN = 50
_WHITE = 255.0  # of 8-bit images
_WHY = {
    "contextual": "A plain ViT cannot hold its contextual relative position encoding (RPE): vectors in every block, "
    "which queries meet by their distance to each key.",
}
_WHY_ELSE = "No architecture of timm's holds its positions together with its attention."


def model_card(name: str, encoder: Encoder, config: Mapping[str, Any], pretraining: Mapping[str, Any]) -> str:
    """Markdown with the hub's front matter.

    Args:
        name: of the folder.
        encoder: that was exported.
        config: what config.json says.
        pretraining: option -> value.
    """
    sections = (
        _front_matter(encoder),
        _about(name, encoder),
        _loading(name, encoder, config),
        _input(encoder, config),
        _classes(config.get("label_names", ())),
        _pretraining(pretraining),
    )
    return "\n".join(line for section in sections for line in section)


def _front_matter(encoder: Encoder) -> Iterator[str]:
    task = "image-classification" if encoder.num_classes else "image-feature-extraction"
    yield from ("---", "library_name: timm", f"pipeline_tag: {task}", "tags:", "- timm", "- lomar", "---", "")


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


def _loading(name: str, encoder: Encoder, config: Mapping[str, Any]) -> Iterator[str]:
    """What must be installed, and code that runs."""
    needs_lomar = config["architecture"] == ANY_SIZE
    yield from ("## Use", "")
    if needs_lomar:
        why = _WHY.get(encoder.architecture["position"], _WHY_ELSE)
        yield from (f"{why} Two lines make timm know the architecture:", "")
        yield from ("```sh", "pip install lomar", "```", "", "```python", "import lomar.model", "```", "")
    else:
        yield f"timm alone loads it, as its `{config['architecture']}` with the arguments in config.json"
        yield from (f"(written and compared with timm {timm.__version__}).", "")
    yield "```python"
    yield from ("import lomar.model  # makes it known to timm",) if needs_lomar else ()
    yield from ("import timm", "import torch", *(("from PIL import Image",) if _is_photo(config) else ()), "")
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
        yield 'images = transform(Image.open("photo.jpg").convert("RGB"))[None]'
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
        f"{others}; timm resizes the table of positions with antialiasing, lomar without: their numbers differ a little"
    )


def _classes(names: Sequence[str]) -> Iterator[str]:
    if not names:
        return
    yield from ("## Classes", "")
    yield from (f"{number}. {name}" for number, name in enumerate(names[:_CLASSES_SHOWN]))
    if len(names) > _CLASSES_SHOWN:
        yield from ("", f"The other {len(names) - _CLASSES_SHOWN} are under `label_names` in config.json.")
    yield ""


def _pretraining(options: Mapping[str, Any]) -> Iterator[str]:
    if not options:
        return
    yield from ("## Pretraining", "", "| option | value |", "|---|---|")
    yield from (f"| {name} | {_value(value)} |" for name, value in options.items())
    yield ""


def _value(value: Any) -> str:
    return _numbers(value) if isinstance(value, list | tuple) else str(value)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
