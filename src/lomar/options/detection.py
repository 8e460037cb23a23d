"""Options of the commands that find objects."""

from dataclasses import dataclass

from lomar.options.downstream import DEVICES, PRECISIONS
from lomar.options.fields import ANY_IMAGES, AUTO, LARGEST_SEED, MOST_WORKERS, option
from lomar.options.training import (
    checkpoint_minutes_option,
    checkpoint_steps_option,
    eval_every_option,
    grad_checkpointing_option,
    log_every_option,
    max_bad_share_option,
    workers_option,
)

COCO = (
    "objects in COCO's format: a folder with annotations/ and train*/ and val*/, one with train/ and valid/ that hold "
    "_annotations.coco.json, or a .json beside its images"
)
DETECTOR = "a run of lomar detect, or a detector's file"


@dataclass(frozen=True, kw_only=True)
class DetectOptions:
    """Train a detector (Mask R-CNN) from an encoder and COCO data."""

    # What and where
    model: str = option(
        "where the encoder comes from: a run, a file of lomar, a released checkpoint; scratch:SIZE begins from none",
        metavar="RUN",
    )
    data: str = option(COCO, metavar="DIR", results=False)
    annotations: str | None = option(
        "the .json of what trains, if it is not found in --data", default=None, metavar="FILE", results=False
    )
    val: str | None = option(
        "objects to judge by, where --data has none of its own", default=None, metavar="DIR", results=False
    )
    val_annotations: str | None = option(
        "the .json of what judges, if it is not found in --val or --data", default=None, metavar="FILE", results=False
    )
    out: str = option("folder of the run, made here", metavar="RUN2", results=False)
    config: str | None = option("YAML file of options; flags win over it", default=None, metavar="FILE", results=False)
    resume: bool = option(
        "go on with the run in --out, with no other option; begin it if there is none and --data is given",
        default=False,
        results=False,
    )
    overwrite: bool = option("delete the run in --out and start anew", default=False, results=False)
    dry_run: bool = option(
        "do two steps on made-up images, print shapes, schedule and memory, and end; nothing is written",
        default=False,
        results=False,
    )
    # The detector
    framework: str = option(
        "whose ViTDet: detectron2's, or the ViTAE repository's",
        default="vitdet",
        choices=("vitdet", "vitae"),
        metavar="NAME",
    )
    cells: bool = option("blocks of ViTAE-B: convolutions beside each attention", default=False)
    cascade: bool = option("three stages that refine the boxes (Cascade Mask R-CNN)", default=False)
    boxes_only: bool = option("no masks, even where the data has them", default=False)
    decomposed: str = option(
        "whether ViTDet's decomposed positions are added to the encoder's own",
        default="yes",
        choices=("yes", "no"),
        metavar="WORD",
    )
    image_size: int = option(
        "side of the square that images are fitted into, in pixels", auto=AUTO, low=1, metavar="PX"
    )
    window: int = option(
        "side of the windows of attention, in patches; 0 for none: global attention", default=14, low=0, metavar="N"
    )
    drop_path: float = option(
        "probability that an image skips a branch of the last block", auto=AUTO, low=0, below=1, metavar="P"
    )
    head_channels: int = option(
        "channels of the pyramid's maps; 4 times as many in the box layer", auto=AUTO, low=1, metavar="C"
    )
    regions: int = option("regions of an image that are learned from", auto=AUTO, low=1, metavar="N")
    # What it sees
    jitter: tuple[float, float] = option(
        "smallest and largest size of an image, relative to --image-size", default=(0.1, 2.0), above=0
    )
    # The course of training
    epochs: float | None = option("passes over the images", auto=AUTO, above=0, metavar="E")
    max_steps: int | None = option("optimiser steps, instead of --epochs", default=None, low=1, metavar="S")
    warmup_steps: int = option("steps with a rising learning rate", auto=AUTO, low=0, metavar="S")
    batch_size: int = option("images per optimiser step, over all devices", auto=AUTO, low=1, metavar="GLOBAL")
    lr: float = option("learning rate of a step", auto=AUTO, above=0, metavar="LR")
    layer_decay: float = option(
        "factor of the learning rate from each layer of the encoder to the one before",
        auto=AUTO,
        above=0,
        high=1,
        metavar="F",
    )
    weight_decay: float = option("AdamW's weight decay", default=0.1, low=0, metavar="WD")
    betas: tuple[float, float] = option("AdamW's momenta", default=(0.9, 0.999), low=0, below=1, metavar="BETA1 BETA2")
    clip_grad: float = option("largest norm of the gradient; 0 leaves it as it is", auto=AUTO, low=0, metavar="NORM")
    seed: int = option("fixes order, crops, draws and what is new", default=0, low=0, high=LARGEST_SEED, metavar="N")
    precision: str = option("precision of the matrix products", auto=AUTO, choices=PRECISIONS, metavar="NAME")
    micro_batch: int = option(
        "images per forward pass of a device; losses are over those that go through together",
        default=2,
        low=1,
        metavar="N",
    )
    # How fast, how watched
    grad_checkpointing: bool = grad_checkpointing_option()
    workers: int = workers_option()
    device: str = option("where to compute", auto=AUTO, choices=DEVICES, metavar="NAME", results=False)
    checkpoint_steps: int | None = checkpoint_steps_option()
    checkpoint_minutes: float = checkpoint_minutes_option()
    log_every: int = log_every_option()
    eval_every: float | None = eval_every_option()
    max_bad_share: float = max_bad_share_option()


@dataclass(frozen=True, kw_only=True)
class DetectEvaluateOptions:
    """Judge a detector: average precision of boxes and masks."""

    model: str = option(DETECTOR, metavar="RUN2")
    data: str = option(f"{COCO}; what judges is taken", metavar="DIR")
    annotations: str | None = option("the .json, if it is not found in --data", default=None, metavar="FILE")
    out: str | None = option("folder for numbers, results and pictures", default=None, metavar="DIR")
    pictures: int = option("images of --out's picture", default=8, low=0, metavar="N")
    image_size: int | None = option("side of the square that images are fitted into", default=None, low=1, metavar="PX")
    batch_size: int = option("images at once", default=1, low=1, metavar="N")
    workers: int | None = option(
        "processes that read images", default=None, auto=AUTO, low=0, high=MOST_WORKERS, metavar="W"
    )
    device: str = option("where to compute", default="auto", choices=DEVICES, metavar="NAME")
    precision: str = option("precision of the matrix products", default="auto", choices=PRECISIONS, metavar="NAME")
    overwrite: bool = option("replace what is in --out", default=False)


@dataclass(frozen=True, kw_only=True)
class DetectPredictOptions:
    """Find objects in images: COCO results as JSON, and pictures with boxes and masks."""

    model: str = option(DETECTOR, metavar="RUN2")
    images: tuple[str, ...] = option(ANY_IMAGES, metavar="PATH")
    out: str = option("folder for results.json and the pictures", metavar="DIR")
    score: float = option("least score of what is drawn", default=0.5, low=0, high=1, metavar="S")
    pictures: int | None = option("images that are drawn; all without it", default=None, low=0, metavar="N")
    image_size: int | None = option("side of the square that images are fitted into", default=None, low=1, metavar="PX")
    batch_size: int = option("images at once", default=1, low=1, metavar="N")
    workers: int | None = option(
        "processes that read images", default=None, auto=AUTO, low=0, high=MOST_WORKERS, metavar="W"
    )
    device: str = option("where to compute", default="auto", choices=DEVICES, metavar="NAME")
    precision: str = option("precision of the matrix products", default="auto", choices=PRECISIONS, metavar="NAME")
    overwrite: bool = option("replace what is in --out", default=False)
