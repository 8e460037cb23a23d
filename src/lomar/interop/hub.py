"""An encoder as a folder in timm's layout, for the Hugging Face hub or a disk: config.json, weights, model card.

What timm's own `vit_*` or `beit_*` computes goes out as such and needs timm alone. The rest goes out as `lomar_vit`,
which `import lomar.model` makes known to timm.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lomar import __version__
from lomar.errors import UserError
from lomar.interop.card import Background, model_card
from lomar.interop.graphs import relative_difference
from lomar.interop.official import BEIT, family_of, official_state
from lomar.interop.staging import staged
from lomar.interop.weights import EXPORTED_FILE, metadata_of, save_file
from lomar.model import SIZES, Encoder
from lomar.model.encoder import ANY_SIZE
from lomar.seeding import seeded

CONFIG_FILE, CARD_FILE = "config.json", "README.md"
FILES = (CONFIG_FILE, EXPORTED_FILE, CARD_FILE)
# Largest difference allowed, over the largest number: timm's modules may add up in another order than ours, and each
# of a block's sums rounds by 6e-8. What is wired wrongly differs by about 1.
TOLERANCE = 1e-5
_NOT_TIMMS = ("architecture", "scale", "label_names")  # of `pretrained_cfg`: named at the root, or unknown to timm


@dataclass(frozen=True)
class Layout:
    """An encoder as one of timm's architectures.

    Args:
        architecture: its name in timm.
        arguments: what `timm.create_model` needs beside the name and `num_classes`.
        state: name -> weights.
        any_size: whether images of other sizes go in.
        encoder: of ours, which the weights are of.
        names: whose names they have, as `metadata_of` takes it.
    """

    architecture: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]
    any_size: bool
    encoder: Encoder
    names: str = ""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        architecture: its name in timm.
        difference: largest, between what timm and lomar compute of random images, over the largest number.
    """

    architecture: str
    difference: float

    @property
    def needs_lomar(self) -> bool:
        """Whether timm must be told of the architecture."""
        return self.architecture == ANY_SIZE


def write_hub_folder(folder: Path, encoder: Encoder, background: Background) -> Exported:
    """Write the three files, once timm computes from them what the encoder does.

    Args:
        folder: made if need be; what else is in it stays.
        encoder: as `lomar.load` gives it, with its `pretrained_cfg`.
        background: what the model card tells beside the weights.

    Raises:
        UserError: timm computes something else.
    """
    difference = float("inf")
    with staged(folder) as place:
        for layout in _layouts(encoder):
            config = _config(encoder, layout)
            (place / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            metadata = metadata_of(layout.encoder, layout.names)
            save_file(place / EXPORTED_FILE, layout.state, "encoder", metadata)
            difference = _difference(place, encoder)
            if difference <= TOLERANCE:
                card = model_card(folder.resolve().name, encoder, config, background)
                (place / CARD_FILE).write_text(card, encoding="utf-8")
                return Exported(layout.architecture, difference)
        raise UserError(
            f"timm {timm.__version__} computes otherwise from what was exported, by {difference:.1e} of the largest "
            "output"
        )


def _layouts(encoder: Encoder) -> Iterator[Layout]:
    """What the encoder can be written as, those that need timm alone first."""
    made = encoder.architecture
    shape = {name: made[name] for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")}
    shape |= {"mlp_ratio": made["mlp_ratio"], "init_values": made["init_values"], "global_pool": encoder.global_pool}
    normalises_pooled = isinstance(encoder.fc_norm, nn.LayerNorm)
    if made["position"] in ("sincos", "learned", "none") and made["key_bias"]:
        own: dict[str, Any] = {"fc_norm": normalises_pooled, "dynamic_img_size": True}
        own |= {"pos_embed": "none"} if made["position"] == "none" else {}
        yield Layout(_name_in_timm("vit", made), shape | own, encoder.state_dict(), True, encoder)
    if _is_beit(encoder):
        shared = made["position"] == "shared-bias"
        own = {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared}
        if normalises_pooled != (encoder.global_pool == "avg"):
            own |= {"use_fc_norm": normalises_pooled}  # not every timm knows it
        fitted = copy.deepcopy(encoder)
        fitted.set_input_size(encoder.patch_embed.img_size)  # timm's tables cover the image
        yield Layout(_name_in_timm("beit", made), shape | own, _beit_state(fitted), False, fitted, "beit")
    own = {"fc_norm": True} if normalises_pooled else {}
    everything = {name: value for name, value in made.items() if value is not None}
    arguments = everything | {"global_pool": encoder.global_pool} | own
    yield Layout(ANY_SIZE, arguments, encoder.state_dict(), True, encoder)


def _name_in_timm(family: str, made: Mapping[str, Any]) -> str:
    """The architecture of the encoder's own size, if timm has it; any other takes the arguments as well."""
    shape = tuple(made[name] for name in ("embed_dim", "depth", "num_heads"))
    size = next((name for name, known in SIZES.items() if known == shape), "base")
    name = f"{family}_{size}_patch{made['patch_size']}_224"
    return name if timm.is_model(name) else f"{family}_base_patch16_224"


def _is_beit(encoder: Encoder) -> bool:
    try:
        return family_of(encoder) is BEIT
    except UserError:
        return False


def _beit_state(encoder: Encoder) -> dict[str, Tensor]:
    """Weights under BEiT's names, which are timm's."""
    state = official_state(encoder)
    return {name: tensor for name, tensor in state.items() if not name.endswith("relative_position_index")}


def _config(encoder: Encoder, layout: Layout) -> dict[str, Any]:
    """config.json, as timm writes it; what timm has no place for stands under "lomar"."""
    told = encoder.pretrained_cfg or {}
    labels = {"label_names": list(told["label_names"])} if told.get("label_names") else {}
    channels = encoder.architecture["in_chans"]
    return {
        "architecture": layout.architecture,
        "num_classes": encoder.num_classes,
        "num_features": encoder.num_features,
        "global_pool": encoder.global_pool,
        **labels,
        # Without the number of classes: transformers gives that itself, and would give it twice.
        "model_args": layout.arguments,
        "pretrained_cfg": {
            **{name: value for name, value in told.items() if name not in _NOT_TIMMS},
            "input_size": [channels, *encoder.patch_embed.img_size],
            "fixed_input_size": not layout.any_size,
            # Named, older timm would make the first layer's weights fit from 3 channels, whatever they are for.
            "first_conv": "patch_embed.proj" if channels == 3 else None,
            "num_classes": encoder.num_classes,
        },
        "lomar": {"version": __version__, "scale": told.get("scale", 255.0)},
    }


def _difference(folder: Path, encoder: Encoder) -> float:
    """Largest, between what timm makes of the folder and the encoder, over the largest number; NaN if any is."""
    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (TypeError, RuntimeError):  # an older timm, whose architecture lacks an argument or has other tensors
        return float("inf")
    channels, size = encoder.architecture["in_chans"], encoder.patch_embed.img_size
    images = torch.randn(2, channels, *size, generator=seeded(0, "export"))
    models: tuple[Any, Any] = loaded, encoder
    with torch.inference_mode():
        outputs = [(model.forward_features(images), model(images)) for model in models]
        differences = [relative_difference(*pair) for pair in zip(*outputs, strict=True)]
    return float(torch.tensor(differences).max())
