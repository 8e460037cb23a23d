"""Options of the commands that use an encoder."""

from dataclasses import dataclass
from typing import Any

from lomar.options.fields import ANY_IMAGES, AUTO, LARGEST_SEED, MOST_WORKERS, option
from lomar.options.pretraining import MOST_SIDE
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

ANY_MODEL = (
    "a run's folder, a file of its weights, a released checkpoint, or what timm.create_model takes: a name such as "
    "vit_small_patch16_224, hf-hub:REPO, local-dir:FOLDER; scratch:SIZE or scratch:NAME has random weights"
)
LABELLED = (
    "labelled images: train/ and val/ of class folders, class folders alone, both also in tar files or at an address "
    "(docs/shards.md), or a .csv of path,label"
)
IMAGE_SIZE = "side of the image, or height and width, in pixels"
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


def scratch_patch_option() -> Any:
    """Patches of an encoder that begins from random weights."""
    return option(
        "side of a patch, for --model scratch:SIZE",
        default=None,
        auto="the model's; 16",
        low=1,
        high=MOST_SIDE,
        metavar="PX",
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Train a classifier from an encoder and labelled images."""

    # What and where
    model: str = option(
        "where the weights come from: a run, a file of lomar, a released checkpoint; scratch:SIZE begins from none",
        metavar="RUN",
    )
    data: str = option(LABELLED, metavar="DIR", results=False)
    val: str | None = option(
        "labelled images to judge by, where --data has none of its own", default=None, metavar="DIR", results=False
    )
    out: str = option("folder of the run, made here", metavar="RUN2", results=False)
    config: str | None = option("YAML file of options; flags win over it", default=None, metavar="FILE", results=False)
    resume: bool = option(
        "go on with the run in --out, with no other option; begin it if there is none and --data is given",
        default=False,
        results=False,
    )
    overwrite: bool = option("delete the run in --out and start anew", default=False, results=False)
    recipe: str = option(
        "whose settings are taken where an option is not given: mae, the paper's, or deit, for encoders that learn by "
        "their cls token",
        auto=AUTO,
        choices=("auto", "mae", "deit"),
        metavar="NAME",
    )
    # The model
    image_size: tuple[int, ...] = option(IMAGE_SIZE, auto="the encoder's", low=1, metavar="PX")
    patch_size: int = option("side of a patch, for --model scratch:SIZE", auto="the encoder's", low=1, metavar="PX")
    channels: int = option("channels, for --model scratch:SIZE", auto="the encoder's", low=1, metavar="C")
    pixel_type: str = option(
        "what pixels are read as", auto="the encoder's", choices=("uint8", "uint16", "float32"), metavar="NAME"
    )
    mean: tuple[float, ...] = option("mean of each channel, white being 1", auto="the encoder's", metavar="M")
    std: tuple[float, ...] = option("deviation of each channel", auto="the encoder's", above=0, metavar="S")
    pool: str = option(
        "what the classifier sees: the mean of the patch tokens, or the cls token",
        auto="mae: avg; deit: token",
        choices=("avg", "token"),
        metavar="NAME",
    )
    drop_path: float = option(
        "probability that an image skips a branch of the last block", auto=AUTO, low=0, below=1, metavar="P"
    )
    head_only: bool = option("train nothing but the classifier", default=False)
    freeze_layers: int = option("blocks, from the first, that stay as they are", default=0, low=0, metavar="N")
    # What it sees
    crop_scale: tuple[float, float] = option(
        "smallest and largest share of an image's area that a crop covers", default=(0.08, 1.0), above=0, high=1
    )
    auto_augment: str = option("timm's policy for 8-bit gray or colour; 'none' for none", auto=AUTO, metavar="POLICY")
    color_jitter: float = option(
        "strength of random brightness, contrast and saturation", default=0.0, low=0, high=1, metavar="X"
    )
    erase: float = option("probability that a part of an image is erased", auto=AUTO, low=0, high=1, metavar="P")
    mixup: float = option("mixup's alpha; 0 for none", auto=AUTO, low=0, metavar="A")
    cutmix: float = option("CutMix's alpha; 0 for none", auto=AUTO, low=0, metavar="A")
    smoothing: float = option("label smoothing", default=0.1, low=0, below=1, metavar="S")
    repeats: int = option(
        "times that an image comes, each time augmented anew, before others do; an epoch has as many fewer images",
        auto=AUTO,
        low=1,
        metavar="N",
    )
    # The course of training
    epochs: float | None = option("passes over the images", auto=AUTO, above=0, metavar="E")
    max_steps: int | None = option("optimiser steps, instead of --epochs", default=None, low=1, metavar="S")
    warmup_epochs: float = option("passes with a rising learning rate", auto=AUTO, low=0, metavar="E")
    batch_size: int = option("images per optimiser step, over all devices", auto=AUTO, low=1, metavar="GLOBAL")
    base_lr: float = option(
        "learning rate for 256 images; scaled by --batch-size / 256", auto=AUTO, above=0, metavar="LR"
    )
    min_lr: float = option("learning rate at the end", auto="mae: 1e-6; deit: 1e-5", low=0, metavar="LR")
    layer_decay: float = option(
        "factor of the learning rate from each layer to the one before", auto=AUTO, above=0, high=1, metavar="F"
    )
    weight_decay: float = option("AdamW's weight decay", auto=AUTO, low=0, metavar="WD")
    betas: tuple[float, float] = option("AdamW's momenta", auto=AUTO, low=0, below=1, metavar="BETA1 BETA2")
    clip_grad: float = option("largest norm of the gradient; 0 leaves it as it is", default=0.0, low=0, metavar="NORM")
    ema: float = option(
        "share that the averaged weights keep at each step; 0 for none", auto=AUTO, low=0, below=1, metavar="D"
    )
    seed: int = option("fixes order, crops and the classifier", default=0, low=0, high=LARGEST_SEED, metavar="N")
    precision: str = option("precision of the matrix products", auto=AUTO, choices=PRECISIONS, metavar="NAME")
    shuffle_gb: float = shuffle_option()
    # How fast, how watched: another value leads to the same classifier
    micro_batch: int = option("images per forward pass of a device", auto=AUTO, low=1, metavar="N", results=False)
    grad_checkpointing: bool = grad_checkpointing_option()
    strategy: str = strategy_option()
    compile: str = compile_option()
    workers: int = workers_option()
    device: str = option("where to compute", auto=AUTO, choices=DEVICES, metavar="NAME", results=False)
    checkpoint_steps: int | None = checkpoint_steps_option()
    checkpoint_minutes: float = checkpoint_minutes_option()
    log_every: int = log_every_option()
    eval_every: float | None = eval_every_option()
    max_bad_share: float = max_bad_share_option()


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Judge a fine-tuned classifier on labelled images."""

    model: str = option("a fine-tuned run, or its classifier's file", metavar="RUN2")
    data: str = option(LABELLED + "; val/ is taken where there is one", metavar="DIR")
    out: str | None = option(
        "folder for evaluation.json and the confusion matrix's picture", default=None, metavar="DIR"
    )
    overwrite: bool = option("replace the evaluation in --out", default=False)
    image_size: tuple[int, ...] | None = option(IMAGE_SIZE, default=None, auto="the model's", low=1, metavar="PX")
    batch_size: int = option("images at once", default=32, low=1, metavar="N")
    workers: int | None = option(
        "processes that read images", default=None, auto=AUTO, low=0, high=MOST_WORKERS, metavar="W"
    )
    device: str = option("where to compute", default="auto", choices=DEVICES, metavar="NAME")
    precision: str = option("precision of the matrix products", default="auto", choices=PRECISIONS, metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Write the classes that a fine-tuned classifier sees in images."""

    model: str = option("a fine-tuned run, or its classifier's file", metavar="RUN2")
    images: tuple[str, ...] = option("images, folders of images, or .txt files of paths", metavar="PATH")
    out: str = option("table to write", metavar="FILE.csv")
    overwrite: bool = option("replace the table in --out", default=False)
    top: int = option("classes for each image, most probable first", default=1, low=1, metavar="K")
    image_size: tuple[int, ...] | None = option(IMAGE_SIZE, default=None, auto="the model's", low=1, metavar="PX")
    batch_size: int = option("images at once", default=32, low=1, metavar="N")
    workers: int | None = option(
        "processes that read images", default=None, auto=AUTO, low=0, high=MOST_WORKERS, metavar="W"
    )
    device: str = option("where to compute", default="auto", choices=DEVICES, metavar="NAME")
    precision: str = option("precision of the matrix products", default="auto", choices=PRECISIONS, metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """Judge frozen features by the classes of their nearest neighbours."""

    model: str = option(ANY_MODEL, metavar="MODEL")
    data: str = option(LABELLED, metavar="DIR")
    val: str | None = option(
        "labelled images to judge by, instead of those that --data has for it", default=None, metavar="DIR"
    )
    features: str = option(
        "one vector an image: as the model pools, the cls token, or the mean of the patch tokens",
        default="pooled",
        choices=("pooled", "cls", "mean"),
        metavar="NAME",
    )
    layers: tuple[int, ...] | None = option(
        "blocks after which to judge, counted from 1", default=None, auto="the last", low=1, metavar="L"
    )
    k: tuple[int, ...] = option("neighbours that vote", default=(20,), low=1, metavar="K")
    temperature: float = option("small values let the nearest decide alone", default=0.07, above=0, metavar="T")
    image_size: tuple[int, ...] | None = option(IMAGE_SIZE, default=None, auto="the model's", low=1, metavar="PX")
    patch_size: int | None = scratch_patch_option()
    out: str | None = option("file for the results", default=None, metavar="FILE.json")
    seed: int = option("fixes the weights of scratch: models", default=0, low=0, high=LARGEST_SEED, metavar="N")
    batch_size: int = option("images at once", default=64, low=1, metavar="N")
    workers: int | None = option(
        "processes that read images", default=None, auto=AUTO, low=0, high=MOST_WORKERS, metavar="W"
    )
    device: str = option("where to compute", default="auto", choices=DEVICES, metavar="NAME")
    precision: str = option("precision of the matrix products", default="auto", choices=PRECISIONS, metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Train a linear classifier on frozen features: many at once on cached ones, or as MAE does."""

    model: str = option(ANY_MODEL, metavar="MODEL")
    data: str = option(LABELLED, metavar="DIR", results=False)
    val: str | None = option(
        "labelled images to judge by, instead of those that --data has for it",
        default=None,
        metavar="DIR",
        results=False,
    )
    out: str = option("folder of the probe, made here", metavar="DIR", results=False)
    resume: bool = option(
        "go on with the probe in --out, with no other option; begin it if there is none and --data is given",
        default=False,
        results=False,
    )
    overwrite: bool = option("delete the probe in --out and start anew", default=False, results=False)
    protocol: str = option(
        "fast: features once, then a sweep of rates, layers and pooling judged on a held-out tenth of train; "
        "mae: MAE's, LARS and new crops in each epoch",
        default="fast",
        choices=("fast", "mae"),
        metavar="NAME",
    )
    features: tuple[str, ...] = option(
        "one vector an image: pooled (as the model pools), cls, mean (of the patch tokens), cls+mean",
        auto="fast: pooled and cls+mean; mae: cls; without a cls token pooled",
        choices=("pooled", "cls", "mean", "cls+mean"),
        metavar="NAME",
    )
    layers: tuple[int, ...] | None = option(
        "blocks after which to probe, counted from 1",
        default=None,
        auto="fast: the last four; mae: the last",
        low=1,
        metavar="L",
    )
    image_size: tuple[int, ...] | None = option(IMAGE_SIZE, default=None, auto="the model's", low=1, metavar="PX")
    patch_size: int | None = scratch_patch_option()
    base_lrs: tuple[float, ...] = option(
        "learning rates for 256 images",
        auto="fast: thirteen, DINOv2's; mae: 6.4 a step, MAE's",
        above=0,
        metavar="LR",
    )
    epochs: float = option("passes over the images", auto=AUTO, above=0, metavar="E")
    warmup_epochs: float = option("passes with a rising rate", auto="fast: 0; mae: a ninth", low=0, metavar="E")
    batch_size: int = option("images per step", auto=AUTO, low=1, metavar="N")
    seed: int = option(
        "fixes order, crops, initial weights and which tenth is held out",
        default=0,
        low=0,
        high=LARGEST_SEED,
        metavar="N",
    )
    workers: int | None = option(
        "processes that read images", default=None, auto=AUTO, low=0, high=MOST_WORKERS, metavar="W", results=False
    )
    device: str = option("where to compute", default="auto", choices=DEVICES, metavar="NAME", results=False)
    precision: str = option("precision of the encoder", default="auto", choices=PRECISIONS, metavar="NAME")
    checkpoint_minutes: float = checkpoint_minutes_option()
    log_every: int = log_every_option(50)


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Write the features of every image of a folder into one file."""

    model: str = option(ANY_MODEL, metavar="MODEL")
    data: str = option(ANY_IMAGES, metavar="DIR")
    out: str = option("file to write: .safetensors or .npz", metavar="FILE")
    features: str = option(
        "a vector an image: as the model pools, the cls token, or the mean of the patch tokens; or a vector a patch",
        default="pooled",
        choices=("pooled", "cls", "mean", "patches"),
        metavar="NAME",
    )
    layer: int | None = option(
        "block after which to take them, counted from 1", default=None, auto="the last", low=1, metavar="L"
    )
    image_size: tuple[int, ...] | None = option(IMAGE_SIZE, default=None, auto="the model's", low=1, metavar="PX")
    dtype: str = option("type of the numbers", default="float32", choices=("float32", "float16"), metavar="NAME")
    resume: bool = option("go on with what was begun in --out; begin it if nothing was", default=False)
    overwrite: bool = option("replace what is in --out, or was begun there", default=False)
    batch_size: int | None = option(
        "images at once", default=None, auto="64, fewer where each has many patches", low=1, metavar="N"
    )
    workers: int | None = option(
        "processes that read images", default=None, auto=AUTO, low=0, high=MOST_WORKERS, metavar="W"
    )
    device: str = option("where to compute", default="auto", choices=DEVICES, metavar="NAME")
    precision: str = option("precision of the matrix products", default="auto", choices=PRECISIONS, metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class MapOptions:
    """Draw an embedding as a map of thumbnails, and the nearest neighbours of chosen images."""

    embedding: str = option("file that `lomar embed` wrote, of one vector an image", metavar="FILE")
    out: str = option("picture to write; the neighbours go beside it, as NAME-nearest.png", metavar="FILE.png")
    overwrite: bool = option("replace the pictures that are there", default=False)
    method: str = option("how many dimensions become two", default="tsne", choices=("tsne", "pca"), metavar="NAME")
    data: str | None = option("where the images are now, if not where they were embedded", default=None, metavar="DIR")
    queries: tuple[str, ...] | None = option(
        "images of the embedding whose neighbours to draw", default=None, auto="six, evenly spread", metavar="PATH"
    )
    neighbours: int = option("neighbours of each, at most 50", default=8, low=1, high=50, metavar="N")
    limit: int = option("most images to lay out, evenly spread", default=2000, low=3, high=6000, metavar="N")
    colour_by: str = option(
        "frame thumbnails by the first folder that their paths do not share, or not",
        default="folder",
        choices=("folder", "none"),
        metavar="NAME",
    )
    seed: int = option("fixes t-SNE", default=0, low=0, high=LARGEST_SEED, metavar="N")
