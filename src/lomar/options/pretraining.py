"""Options of the commands that train without labels."""

from dataclasses import dataclass

from lomar.options.fields import ANY_IMAGES, AUTO, LARGEST_SEED, MOST_WORKERS, option
from lomar.options.training import (
    checkpoint_minutes_option,
    checkpoint_steps_option,
    compile_option,
    eval_every_option,
    grad_checkpointing_option,
    log_every_option,
    max_bad_share_option,
    shuffle_option,
    strategy_option,
    workers_option,
)

# More than anyone asks for but by a slip: beyond them numbers overflow, or parts are made until memory runs out.
MOST_SIDE = 16_384  # pixels, patches
MOST_WIDTH = 65_536
MOST_DEPTH = 1_000
MOST_BATCH = 2**24
MOST_STEPS = 10**12


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Pretrain a vision transformer on a folder of images."""

    # What and where
    data: str = option(f"{ANY_IMAGES} (a few embedded photographs)", metavar="DIR", results=False)
    out: str = option("folder of the run, made here", metavar="RUN", results=False)
    config: str | None = option("YAML file of options; flags win over it", default=None, metavar="FILE", results=False)
    resume: bool = option(
        "go on with the run in --out, with no other option; begin it if there is none and --data is given",
        default=False,
        results=False,
    )
    overwrite: bool = option("delete the run in --out and start anew", default=False, results=False)
    # The method; of those that it lacks, options have no value
    method: str = option("a recipe's name; `lomar recipes` lists them", default="lomar", metavar="NAME")
    init: str | None = option(
        "weights to begin with: a run, a file of lomar, or a released LoMaR, MAE, BEiT, DINO or MoCo v3 checkpoint",
        default=None,
        metavar="FILE",
    )
    model: str = option(
        "size of the encoder: tiny, small, base, large, huge, or WIDTHxDEPTHxHEADS", auto=AUTO, metavar="SIZE"
    )
    image_size: int = option("side of the crop, in pixels", auto=AUTO, low=1, high=MOST_SIDE, metavar="PX")
    patch_size: int = option("side of a patch, in pixels", auto=AUTO, low=1, high=MOST_SIDE, metavar="PX")
    window_size: int | None = option(
        "side of a window, in patches; 0 is the whole image",
        default=None,
        auto="lomar: 7; mae, beit: 0",
        low=0,
        metavar="K",
    )
    views: int | None = option("windows per image", default=None, auto="lomar: 4", low=1, high=MOST_SIDE, metavar="N")
    window_layout: str | None = option(
        "windows of each image's own, or shared and repeated as in the released code",
        default=None,
        auto="lomar: independent",
        choices=("independent", "released"),
        metavar="NAME",
    )
    mask: str | None = option(
        "which patches are hidden: any, as many as LoMaR or as MAE counts them, or blocks of them as in BEiT",
        default=None,
        auto="lomar: uniform",
        choices=("uniform", "uniform-kept", "blockwise"),
        metavar="NAME",
    )
    mask_ratio: float | None = option(
        "share of a view's patches that are hidden",
        default=None,
        auto="lomar: 0.8; mae: 0.75",
        above=0,
        below=1,
        metavar="R",
    )
    mask_min_block: int | None = option(
        "smallest block of --mask blockwise, in patches",
        default=None,
        auto="beit: 16; beit-lomar: 4",
        low=1,
        metavar="N",
    )
    predict_share: float | None = option(
        "share of the hidden patches that are predicted; the rest is left out, which is faster",
        default=None,
        auto="lomar, mae: 1; lomar-late: 0.5",
        above=0,
        high=1,
        metavar="S",
    )
    predict_choice: str | None = option(
        "which these are: any, or such as lie furthest from each other",
        default=None,
        auto="lomar, mae: furthest",
        choices=("uniform", "furthest"),
        metavar="NAME",
    )
    architecture: str | None = option(
        "one encoder for all, or an encoder for visible patches and a decoder",
        default=None,
        auto="lomar, beit: masked-encoder; mae: encoder-decoder",
        choices=("masked-encoder", "encoder-decoder"),
        metavar="NAME",
    )
    mask_layer: int | None = option(
        "block before which the mask tokens enter a masked encoder",
        default=None,
        auto="lomar: 0, the paper's",
        low=0,
        metavar="L",
    )
    decoder_width: int | None = option(
        "token width of the decoder", default=None, auto="512 for a base encoder", low=4, high=MOST_WIDTH, metavar="D"
    )
    decoder_depth: int | None = option(
        "blocks of the decoder", default=None, auto="8 for a base encoder", low=1, high=MOST_DEPTH, metavar="N"
    )
    decoder_heads: int | None = option(
        "attention heads of the decoder",
        default=None,
        auto="16 for a base encoder",
        low=1,
        high=MOST_WIDTH,
        metavar="N",
    )
    position: str = option(
        "how tokens know where they are",
        auto="lomar: contextual; mae: sincos; beit: shared-bias",
        choices=("contextual", "sincos", "learned", "shared-bias", "none"),
        metavar="NAME",
    )
    transformer: str | None = option(
        "the plain transformer, or BEiT's: no bias of keys, and its own initial weights",
        default=None,
        auto="lomar, mae: vit; beit: beit",
        choices=("vit", "beit"),
        metavar="NAME",
    )
    layer_scale: float = option(
        "initial factor of each branch; 0 for no such factors", auto="lomar: 0; beit: 0.1", low=0, metavar="X"
    )
    drop_path: float = option(
        "probability that a view skips a branch of the last block",
        auto="lomar: 0; beit: 0.1",
        low=0,
        below=1,
        metavar="P",
    )
    target: str | None = option(
        "what is predicted: normalised-pixels, pixels or tokens",
        default=None,
        auto="lomar, mae: normalised-pixels",
        metavar="NAME",
    )
    tokenizer: str | None = option(
        "for tokens: a file of `lomar tokenizer train`, or a folder with OpenAI's encoder.pkl and decoder.pkl",
        default=None,
        metavar="FILE",
    )
    # Methods that compare views
    patch_embed: str | None = option(
        "whether the patch embedding learns, or keeps its random weights",
        default=None,
        auto="dino: learned; mocov3: frozen",
        choices=("learned", "frozen"),
        metavar="NAME",
    )
    local_crops: int | None = option(
        "small crops of an image, beside the two large ones",
        default=None,
        auto="dino: 8",
        low=0,
        high=MOST_SIDE,
        metavar="N",
    )
    local_size: int | None = option(
        "side of a small crop, in pixels",
        default=None,
        auto="of dino, in proportion to 96 of 224",
        low=1,
        high=MOST_SIDE,
        metavar="PX",
    )
    local_scale: tuple[float, float] | None = option(
        "smallest and largest share of an image's area that a small crop covers",
        default=None,
        auto="dino: 0.05 0.4",
        above=0,
        high=1,
    )
    grayscale: float | None = option(
        "share of crops without colour", default=None, auto="dino, mocov3: 0.2", low=0, high=1, metavar="P"
    )
    blur: tuple[float, float, float] | None = option(
        "share of blurred ones among first, second and small crops",
        default=None,
        auto="dino, mocov3: 1 0.1 0.5",
        low=0,
        high=1,
        metavar="FIRST SECOND SMALL",
    )
    solarize: float | None = option(
        "share of second crops whose bright parts are inverted",
        default=None,
        auto="dino, mocov3: 0.2",
        low=0,
        high=1,
        metavar="P",
    )
    head_width: int | None = option(
        "width of the layers within a head",
        default=None,
        auto="of a base encoder, dino 2048, mocov3 4096",
        low=1,
        high=MOST_WIDTH,
        metavar="D",
    )
    head_outputs: int | None = option(
        "prototypes of dino, width of mocov3's queries and keys",
        default=None,
        auto="of a base encoder, dino 65536, mocov3 256",
        low=2,
        high=2**20,
        metavar="N",
    )
    momentum: float | None = option(
        "of the teacher or momentum encoder, at the beginning; 1 at the end",
        default=None,
        auto="dino 0.996, mocov3 0.99, less in a short run",
        low=0,
        below=1,
        metavar="M",
    )
    temperature: float | None = option(
        "of the student's softmax, or of that over the keys",
        default=None,
        auto="dino: 0.1; mocov3: 0.2",
        above=0,
        metavar="T",
    )
    teacher_temperature: tuple[float, float] | None = option(
        "of the teacher's softmax, before and after its warm-up",
        default=None,
        auto="dino: 0.04 0.04",
        above=0,
        metavar="FIRST LAST",
    )
    teacher_temperature_epochs: float | None = option(
        "passes that this warm-up takes", default=None, auto="of dino, a tenth of the run", low=0, metavar="E"
    )
    freeze_last_layer: float | None = option(
        "passes that the prototypes stay frozen for",
        default=None,
        auto="of dino, one at most, less in a short run",
        low=0,
        metavar="E",
    )
    norm_last_layer: str | None = option(
        "whether prototypes keep unit length: yes, no; DINO's code advises no for small encoders",
        default=None,
        auto="dino: yes",
        choices=("yes", "no"),
        metavar="WORD",
    )
    # What it sees
    crop_scale: tuple[float, float] = option(
        "smallest and largest share of an image's area that a crop covers", auto="lomar: 0.2 1", above=0, high=1
    )
    color_jitter: float = option(
        "strength of random brightness, contrast and saturation, of methods that compare views also of hue",
        auto="lomar: 0; beit, dino, mocov3: 0.4",
        low=0,
        high=1,
        metavar="X",
    )
    channels: int = option("channels the images are converted to", auto=AUTO, low=1, high=MOST_WIDTH, metavar="C")
    statistics: str = option(
        "mean and deviation of the pixels: ImageNet's, or estimated from the data",
        auto=AUTO,
        choices=("imagenet", "data"),
        metavar="NAME",
    )
    mean: tuple[float, ...] = option("mean of each channel, white being 1", auto="by --statistics", metavar="M")
    std: tuple[float, ...] = option("standard deviation of each channel", auto="by --statistics", above=0, metavar="S")
    pixel_type: str = option(
        "what pixels are read as", auto=AUTO, choices=("uint8", "uint16", "float32"), metavar="NAME"
    )
    # The course of training
    epochs: float | None = option("passes over the images", auto=AUTO, above=0, high=1e9, metavar="E")
    max_steps: int | None = option(
        "optimiser steps, instead of --epochs", default=None, low=1, high=MOST_STEPS, metavar="S"
    )
    warmup_epochs: float = option("passes with a rising learning rate", auto="2.5 % of the run", low=0, metavar="E")
    batch_size: int = option(
        "images per optimiser step, over all devices", auto=AUTO, low=1, high=MOST_BATCH, metavar="GLOBAL"
    )
    base_lr: float = option(
        "learning rate for 256 images; scaled by --batch-size / 256", auto=AUTO, above=0, metavar="LR"
    )
    min_lr: float = option("learning rate at the end", auto="lomar: 0; beit: 1e-5", low=0, metavar="LR")
    weight_decay: float = option(
        "AdamW's weight decay", auto="lomar, mae, beit: 0.05; dino: 0.04; mocov3: 0.1", low=0, metavar="WD"
    )
    weight_decay_end: float | None = option(
        "what it becomes along half a cosine, where it does not stay",
        default=None,
        auto="dino: 0.4",
        low=0,
        metavar="WD",
    )
    decayed: str = option(
        "what is decayed: weights, or all with norms and biases",
        default="weights",
        auto="mocov3: all",
        choices=("weights", "all"),
        metavar="NAME",
    )
    betas: tuple[float, float] = option(
        "AdamW's momenta", auto="lomar, mae: 0.9 0.95; beit: 0.9 0.999", low=0, below=1, metavar="BETA1 BETA2"
    )
    clip_grad: float = option("largest norm of the gradient; 0 leaves it as it is", default=3.0, low=0, metavar="NORM")
    clip_by: str = option(
        "whose norm it is: of all gradients together, or each tensor's own",
        default="all",
        auto="dino: tensor",
        choices=("all", "tensor"),
        metavar="NAME",
    )
    seed: int = option(
        "fixes crops, windows, masks and initial weights", default=0, low=0, high=LARGEST_SEED, metavar="N"
    )
    precision: str = option(
        "precision of the matrix products", auto=AUTO, choices=("auto", "fp32", "bf16"), metavar="NAME"
    )
    shuffle_gb: float = shuffle_option()
    # How fast, how watched: another value leads to the same encoder
    micro_batch: int = option(
        "images per forward pass of a device", auto=AUTO, low=1, high=MOST_BATCH, metavar="N", results=False
    )
    grad_checkpointing: bool = grad_checkpointing_option()
    strategy: str = strategy_option()
    compile: str = compile_option()
    workers: int = workers_option()
    device: str = option("where to compute", auto=AUTO, choices=("auto", "cpu", "cuda"), metavar="NAME", results=False)
    checkpoint_steps: int | None = checkpoint_steps_option()
    checkpoint_minutes: float = checkpoint_minutes_option()
    log_every: int = log_every_option()
    eval_data: str | None = option(
        "labelled folder for k-NN: train/ and val/ of class folders, or class folders alone",
        default=None,
        metavar="DIR",
        results=False,
    )
    eval_every: float | None = eval_every_option(results=False)
    max_bad_share: float = max_bad_share_option()


@dataclass(frozen=True, kw_only=True)
class RecipesOptions:
    """List the paper's methods and runs, or print one as a configuration."""

    name: str | None = option(
        "a recipe, to be printed in full as YAML for `lomar pretrain --config`", default=None, positional=True
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Train a tokenizer on a folder of images, for methods that predict tokens."""

    # What and where
    data: str = option(ANY_IMAGES, metavar="DIR", results=False)
    out: str = option(
        "tokenizer to write; metrics and a picture of what it keeps go beside it",
        metavar="FILE.safetensors",
        results=False,
    )
    resume: bool = option(
        "go on with what was begun in --out, with no other option; begin it if nothing was and --data is given",
        default=False,
        results=False,
    )
    overwrite: bool = option("delete what is in --out and start anew", default=False, results=False)
    # The tokenizer
    vocab: int = option("number of tokens", auto=AUTO, low=2, high=MOST_BATCH, metavar="N")
    width: int = option("channels of its first blocks, a multiple of 4", auto=AUTO, low=4, high=MOST_WIDTH, metavar="W")
    blocks_per_group: int = option("blocks at each of four resolutions", auto=AUTO, low=1, high=MOST_DEPTH, metavar="N")
    # What it sees
    image_size: int = option(
        "side of the crop, in pixels; a token stands for 8x8", auto=AUTO, low=16, high=MOST_SIDE, metavar="PX"
    )
    window_size: int = option(
        "side of the part of the crop that a step trains on, in tokens", auto=AUTO, low=1, high=MOST_SIDE, metavar="K"
    )
    channels: int = option("channels the images are converted to", auto=AUTO, low=1, high=MOST_WIDTH, metavar="C")
    pixel_type: str = option(
        "what pixels are read as", auto=AUTO, choices=("uint8", "uint16", "float32"), metavar="NAME"
    )
    black: tuple[float, ...] = option(
        "pixel value of each channel that counts as black", auto="0 of 8-bit images, else estimated", metavar="V"
    )
    white: tuple[float, ...] = option("and as white", auto="255 of 8-bit images, else estimated", metavar="V")
    # The course of training
    max_steps: int = option("optimiser steps", auto=AUTO, low=1, high=MOST_STEPS, metavar="S")
    batch_size: int = option("images per step", auto=AUTO, low=1, high=MOST_BATCH, metavar="N")
    lr: float = option("highest learning rate", auto=AUTO, above=0, metavar="LR")
    usage_weight: float = option("how much unused tokens weigh in the loss", default=0.2, low=0, metavar="W")
    seed: int = option("fixes crops, noise and initial weights", default=0, low=0, high=LARGEST_SEED, metavar="N")
    # How fast, how watched: another value leads to the same tokenizer
    workers: int = option("processes that read images", auto=AUTO, low=0, high=MOST_WORKERS, metavar="W", results=False)
    device: str = option("where to compute", auto=AUTO, choices=("auto", "cpu", "cuda"), metavar="NAME", results=False)
    checkpoint_minutes: float = checkpoint_minutes_option()
    log_every: int = log_every_option()
    max_bad_share: float = max_bad_share_option()
