"""Methods by name: the paper's, those it compares with, and its ablations, each one composition."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lomar.methods.composition import Composition, EncoderComposition, TwoViewComposition
from lomar.model.encoder import size_of

OPENAI_VOCAB = 8192
DEPTH = 12  # blocks of the encoders that recipes are for
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


OBJECTIVES = ("dino", "mocov3")  # of methods that compare views
_COMMON = {f.name for f in fields(EncoderComposition)}
OF_MASKS = frozenset(f.name for f in fields(Composition)) - _COMMON - {"vocab"} | {"tokenizer"}
OF_VIEWS = frozenset(f.name for f in fields(TwoViewComposition)) - _COMMON - {"objective", "crop_scale", "color_jitter"}
OF_DINO = frozenset(
    (
        "local_crops",
        "local_size",
        "local_scale",
        "teacher_temperature",
        "teacher_temperature_epochs",
        "freeze_last_layer",
        "norm_last_layer",
    )
)


@dataclass(frozen=True)
class Recipe:
    """A method, and the paper's run of it.

    Args:
        paper: the table or figure it stands in.
        about: what it is, or what it changes.
        options: option values that define it; defaults of `lomar pretrain --method NAME`.
        full: the other options of the paper's run on ImageNet-1K, printed by `lomar recipes NAME`; where there is no
            such run, the sizes of all of them.
        result: what the paper reports: top-1 accuracy in per cent after fine-tuning at 224 px, if not said otherwise.
        hours: the paper's pretraining time on four A100; None where it does not say.
        objective: "" for masked reconstruction, else one of `OBJECTIVES`.
        note: what a reader of the full run should know.
    """

    paper: str
    about: str
    options: Mapping[str, Any]
    full: Mapping[str, Any] = field(default_factory=lambda: IMAGENET)
    result: str = ""
    hours: int | None = None
    objective: str = ""
    note: str = ""

    def composition(self, name: str) -> Composition | TwoViewComposition:
        """The method at the paper's size."""
        values = {"method": name, "mean": IMAGENET_MEAN, "std": IMAGENET_STD} | dict(self.options) | dict(self.full)
        return self.compose(values, OPENAI_VOCAB, scale=255.0)

    def compose(self, values: Mapping[str, Any], vocab: int, scale: float) -> Composition | TwoViewComposition:
        """Option values -> the composition of this recipe's kind; arguments as for `compose`."""
        if self.objective:
            return TwoViewComposition(**_named(TwoViewComposition, values), objective=self.objective, scale=scale)
        return compose(values, vocab, scale)

    @property
    def lacks(self) -> frozenset[str]:
        """Options of `lomar pretrain` for parts that the method does not have."""
        return {"": OF_VIEWS, "dino": OF_MASKS, "mocov3": OF_MASKS | OF_DINO}[self.objective]


def mask_layer_for(layer: int, depth: int) -> int:
    """A recipe's mask layer, which is of `DEPTH` blocks, in an encoder of another depth: as far on, before the last."""
    return min(depth - 1, round(layer * depth / DEPTH))


def compose(values: Mapping[str, Any], vocab: int, scale: float) -> Composition:
    """Option values -> the masked reconstruction that they name.

    Args:
        values: options of `lomar pretrain` by name.
        vocab: codebook size of the tokenizer, for methods that have one.
        scale: pixel value that stands for 1.

    Raises:
        ValueError: `model` is no size.
    """
    named = _named(Composition, values)
    return Composition(**named, vocab=vocab if values["target"] == "tokens" else 0, scale=scale)


def _named(kind: type[EncoderComposition], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a composition among option values; an option that a method lacks is None."""
    width, depth, heads = size_of(values["model"])
    named = {f.name: values[f.name] for f in fields(kind) if values.get(f.name) is not None}
    return named | {"embed_dim": width, "depth": depth, "num_heads": heads}


LOMAR: dict[str, Any] = {
    "window_size": 7,
    "views": 4,
    "window_layout": "independent",
    "mask": "uniform",
    "mask_ratio": 0.8,
    "mask_min_block": 16,
    "predict_share": 1.0,
    "predict_choice": "furthest",
    "architecture": "masked-encoder",
    "mask_layer": 0,
    "position": "contextual",
    "transformer": "vit",
    "layer_scale": 0.0,
    "drop_path": 0.0,
    "target": "normalised-pixels",
    "crop_scale": (0.2, 1.0),
    "color_jitter": 0.0,
    "weight_decay": 0.05,
    "betas": (0.9, 0.95),
    "min_lr": 0.0,
}
WHOLE_IMAGE = {"window_size": 0, "views": 1}
MAE = (
    LOMAR
    | WHOLE_IMAGE
    | {
        "mask": "uniform-kept",
        "mask_ratio": 0.75,
        "architecture": "encoder-decoder",
        "position": "sincos",
    }
)
BEIT = (
    LOMAR
    | WHOLE_IMAGE
    | {
        "mask": "blockwise",
        "mask_ratio": 0.383,  # 75 of 196
        "position": "shared-bias",
        "transformer": "beit",
        "layer_scale": 0.1,
        "drop_path": 0.1,
        "target": "tokens",
        "crop_scale": (0.08, 1.0),
        "color_jitter": 0.4,
        "betas": (0.9, 0.999),
        "min_lr": 1e-5,
        "clip_grad": 3.0,
    }
)
# What the paper leaves open, decided here: blocks as in BEiT, their smallest area scaled with the view (16 x 49 / 196);
# 19 of 49 hidden, as BEiT hides 75 of 196; one bias table of 7 x 7 for all blocks. SPEC C.8.
BEIT_LOMAR = BEIT | {"window_size": 7, "views": 4, "mask_ratio": 0.39, "mask_min_block": 4}

COMPARED: dict[str, Any] = {
    "layer_scale": 0.0,
    "color_jitter": 0.4,
    "grayscale": 0.2,
    "blur": (1.0, 0.1, 0.5),
    "solarize": 0.2,
    "betas": (0.9, 0.999),
}
DINO = COMPARED | {
    "position": "learned",
    "drop_path": 0.1,
    "patch_embed": "learned",
    "crop_scale": (0.4, 1.0),
    "local_crops": 8,
    "local_scale": (0.05, 0.4),
    "temperature": 0.1,
    "teacher_temperature": (0.04, 0.04),
    "norm_last_layer": "yes",
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "min_lr": 1e-6,
    "clip_grad": 3.0,
    "clip_by": "tensor",
}
MOCOV3 = COMPARED | {
    "position": "sincos",
    "drop_path": 0.0,
    "patch_embed": "frozen",
    "crop_scale": (0.08, 1.0),
    "temperature": 0.2,
    "weight_decay": 0.1,
    "decayed": "all",
    "min_lr": 0.0,
    "clip_grad": 0.0,
}

MAE_DECODER = {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16}
_SIZES: dict[str, Any] = {
    "model": "base",
    "image_size": 224,
    "patch_size": 16,
    "channels": 3,
    "pixel_type": "uint8",
    "statistics": "imagenet",
    "batch_size": 4096,
    "base_lr": 1.5e-4,
}
IMAGENET: dict[str, Any] = _SIZES | {"clip_grad": 0.0} | MAE_DECODER


def _course(epochs: int, warmup_epochs: float | None = None) -> dict[str, Any]:
    """Length of a run and of its warm-up: 2.5 % where the paper gives none."""
    return {"epochs": epochs, "warmup_epochs": 0.025 * epochs if warmup_epochs is None else warmup_epochs}


# 1.5e-3 at batch 2048, as one rate for 256 images.
BEIT_IMAGENET = IMAGENET | {"batch_size": 2048, "base_lr": 1.5e-3 * 256 / 2048, "clip_grad": 3.0}
# The released ViT-B/16, as its file of arguments has it (SPEC D.1, from memory): other crops, clipping and freezing
# than the code's defaults, which are the recipe's.
DINO_IMAGENET: dict[str, Any] = _SIZES | {
    "batch_size": 1024,
    "base_lr": 7.5e-4,
    "min_lr": 2e-6,
    "crop_scale": (0.25, 1.0),
    "local_crops": 10,
    "local_size": 96,
    "local_scale": (0.05, 0.25),
    "head_width": 2048,
    "head_outputs": 65536,
    "momentum": 0.996,
    "teacher_temperature": (0.04, 0.07),
    "teacher_temperature_epochs": 50,
    "freeze_last_layer": 3,
    "clip_grad": 0.3,
}
MOCOV3_IMAGENET: dict[str, Any] = _SIZES | {"head_width": 4096, "head_outputs": 256, "momentum": 0.99}
VIEWS_OF_WINDOW = {5: 8, 7: 4, 9: 3, 11: 2, 14: 1}  # Table 4: about equally many visible patches
RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

RECIPES: dict[str, Recipe] = {
    "lomar": Recipe(
        "Table 1",
        "four windows of 7x7 patches, 80% hidden, one encoder, contextual position",
        LOMAR,
        IMAGENET | _course(1600),
        "84.1 (85.4 at 384)",
        264,
    ),
    "lomar-b8": Recipe(
        "Table 1",
        "lomar on patches of 8 px, at the cost of 16",
        LOMAR | {"image_size": 224, "patch_size": 8},
        IMAGENET | {"patch_size": 8} | _course(400),
        "84.3",
        66,
    ),
    "lomar-384": Recipe(
        "Fig. 4",
        "lomar at 384 px, 6 windows; 2.5 times as fast as MAE, 5.0 times as BEiT",
        LOMAR | {"image_size": 384, "patch_size": 16, "views": 6},
        IMAGENET | {"image_size": 384} | _course(300),
        "MAE + 0.2, BEiT + 0.8",
    ),
    "lomar-384-9": Recipe(
        "Table 2",
        "lomar at 384 px, 9 windows; on COCO box AP 51.6 (ViTDet), 52.0 (ViTAE)",
        LOMAR | {"image_size": 384, "patch_size": 16, "views": 9},
        IMAGENET | {"image_size": 384} | _course(1600),
        "",
    ),
    "lomar-448": Recipe(
        "Fig. 4",
        "lomar at 448 px, 9 windows; 3.1 times as fast as MAE, 5.3 times as BEiT",
        LOMAR | {"image_size": 448, "patch_size": 16, "views": 9},
        IMAGENET | {"image_size": 448} | _course(300),
        "MAE + 0.2, BEiT + 0.6",
    ),
    "lomar-late": Recipe(
        "section 5",
        "lomar, mask tokens entering at block 10, half of the hidden patches predicted",
        LOMAR | {"mask_layer": 10, "predict_share": 0.5},
        IMAGENET | _course(1600),
    ),
    "mae": Recipe(
        "Table 1",
        "the whole image, 75% hidden, encoder and decoder, sine-cosine position",
        MAE,
        IMAGENET | _course(1600, 40),
        "83.6 (84.8 at 384)",
        232,
    ),
    "beit": Recipe(
        "Table 1",
        "the whole image, blocks hidden, predicts tokens of a discrete VAE, relative bias",
        BEIT,
        BEIT_IMAGENET | _course(800, 10),
        "83.2 (84.6 at 384)",
        285,
    ),
    "dino": Recipe(
        "Table 1",
        "a student's crops, small ones among them, agree with a teacher's large ones; prototypes, learned position",
        DINO,
        DINO_IMAGENET | _course(300, 10),
        "82.8",
        objective="dino",
        note="Arguments of DINO's released ViT-B/16, told from memory; that run had 400 epochs, the paper's row 300.",
    ),
    "mocov3": Recipe(
        "Table 1",
        "a crop picks out the other crop of its image among those of the batch; frozen patch embedding",
        MOCOV3,
        MOCOV3_IMAGENET | _course(300, 40),
        "83.2",
        objective="mocov3",
        note="The paper's 600 epochs count both crops: they are MoCo v3's 300.",
    ),
    "beit-lomar": Recipe(
        "Table 3",
        "beit on four windows of 7x7 patches, 19 of 49 hidden in blocks",
        BEIT_LOMAR,
        BEIT_IMAGENET | _course(300, 10),
        "83.4",
        102,
    ),
}


def _rows(
    paper: str, base: str, epochs_of: Mapping[int, tuple[str, int]], warmup_epochs: float | None = None
) -> dict[str, Recipe]:
    """The shorter runs of a method in one of the paper's tables: epochs -> result and hours."""
    recipe = RECIPES[base]
    return {
        f"{base}-{epochs}e": Recipe(
            paper,
            f"{base} for {epochs} epochs",
            recipe.options,
            dict(recipe.full) | _course(epochs, warmup_epochs),
            result,
            hours,
        )
        for epochs, (result, hours) in epochs_of.items()
    }


RECIPES |= _rows("Table 1", "lomar", {300: ("83.3", 49), 400: ("83.6", 66), 800: ("83.8 (85.2 at 384)", 132)})
RECIPES |= _rows("Table 1", "mae", {400: ("83.1", 58), 800: ("83.3", 116)}, warmup_epochs=40)
RECIPES |= _rows("Table 3", "beit", {300: ("82.8", 107)}, warmup_epochs=10)

RECIPES |= {
    f"{base}-{px}": Recipe(
        "Fig. 4",
        f"{base} at {px} px",
        dict(RECIPES[base].options) | {"image_size": px, "patch_size": 16},
        dict(RECIPES[base].full) | {"image_size": px} | _course(300, warmup),
        "",
    )
    for base, warmup in (("mae", 40), ("beit", 10))
    for px in (384, 448)
}

FIGURE_5 = {
    "rpe": ("one encoder, contextual position", {}),
    "ape": ("one encoder, sine-cosine position", {"position": "sincos"}),
    "decoder": ("encoder-decoder, sine-cosine position", {"position": "sincos", "architecture": "encoder-decoder"}),
}
RECIPES |= {
    f"fig5-{kind}-{side}": Recipe(
        "Fig. 5, Table 4",
        f"{about}; {views} window{'s' * (views > 1)} of {side}x{side}",
        LOMAR | {"window_size": side, "views": views, "mask_ratio": 0.75} | changes,
        IMAGENET | _course(400),
    )
    for kind, (about, changes) in FIGURE_5.items()
    for side, views in VIEWS_OF_WINDOW.items()
}
RECIPES |= {
    f"fig6-{ratio:.0%}".rstrip("%"): Recipe(
        "Fig. 6",
        f"lomar, {ratio:.0%} hidden" + " (the best)" * (ratio == 0.8),
        LOMAR | {"mask_ratio": ratio},
        IMAGENET | _course(400),
        "83.6" if ratio == 0.8 else "",
    )
    for ratio in RATIOS
}
