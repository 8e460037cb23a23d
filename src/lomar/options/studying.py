"""Options of the command that compares methods."""

from dataclasses import dataclass

from lomar.options.downstream import DEVICES, PRECISIONS
from lomar.options.fields import AUTO, LARGEST_SEED, MOST_WORKERS, option
from lomar.options.pretraining import MOST_BATCH, MOST_SIDE

STUDIES = {
    "table1": "MAE, BEiT, LoMaR, DINO and MoCo v3 at equal epochs and at equal time",
    "table3": "BEiT with and without windows",
    "fig3": "accuracy against pretraining time",
    "fig4": "resolution",
    "fig5": "window size, architecture and position",
    "fig6": "share of hidden patches",
    "late": "where mask tokens enter",
    "layout": "how windows are drawn",
}


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Compare methods: pretrain each with several rates and seeds, judge all alike, and write one table."""

    study: str = option(
        "what to compare: " + "; ".join(f"{name}: {text}" for name, text in STUDIES.items()), positional=True
    )
    data: str = option(
        "labelled images in files: train/ and val/ of class folders, class folders alone, or a .csv of path,label",
        metavar="DIR",
        results=False,
    )
    out: str = option(
        "folder of the study; what is in it is gone on with, also by several processes at once, and other studies of "
        "the same sizes share its runs",
        metavar="DIR",
        results=False,
    )
    rows: tuple[str, ...] | None = option(
        "rows of the table to run, and those that they refer to; `--dry-run` lists them",
        default=None,
        auto="all",
        metavar="ROW",
        results=False,
    )
    seeds: tuple[int, ...] | None = option(
        "of the runs; the first one chooses the learning rate",
        default=None,
        auto="0 1 2; on a CPU 0 1",
        low=0,
        high=LARGEST_SEED,
        metavar="N",
        results=False,
    )
    base_lrs: tuple[float, ...] | None = option(
        "learning rates for 256 images that each row is pretrained with; the best by a probe on images held out counts",
        default=None,
        auto="half, once and twice 1e-3 a step",
        above=0,
        metavar="LR",
        results=False,
    )
    # The runs
    model: str = option(
        "size of the encoder: tiny, small, base, large, huge, or WIDTHxDEPTHxHEADS",
        auto="small; on a CPU 128x6x4",
        metavar="SIZE",
    )
    image_size: int = option(
        "side of the crop, in pixels", auto="112; on a CPU 56", low=1, high=MOST_SIDE, metavar="PX"
    )
    patch_size: int = option("side of a patch, in pixels", auto="8; on a CPU 4", low=1, high=MOST_SIDE, metavar="PX")
    epochs: float = option(
        "passes over the images of a pretraining run", auto="300; on a CPU 6", above=0, high=1e9, metavar="E"
    )
    batch_size: int = option("images per optimiser step", auto="512; on a CPU 64", low=1, high=MOST_BATCH, metavar="N")
    tokenizer: str | None = option(
        "for rows that predict tokens; without it one is trained first",
        default=None,
        metavar="FILE",
    )
    bank: int | None = option(
        "images of each class that k-NN and probe learn from", default=None, auto="all", low=2, metavar="N"
    )
    labels: int | None = option(
        "images of each class that fine-tuning learns from", default=None, auto="all", low=1, metavar="N"
    )
    finetune_epochs: float = option("passes of fine-tuning", auto="100; on a CPU 6", above=0, high=1e9, metavar="E")
    finetune_batch_size: int = option(
        "images per step of fine-tuning", auto="256; on a CPU 32", low=1, high=MOST_BATCH, metavar="N"
    )
    evaluations: int = option(
        "how often a pretraining run measures its k-NN on images held out, for its report; 0 for never",
        default=2,
        low=0,
        metavar="N",
    )
    # How
    dry_run: bool = option("say what would be run, and run nothing", default=False, results=False)
    jobs: int | None = option(
        "cells at a time on this machine, spread over its GPUs, or each on its share of the cores",
        default=None,
        auto="one for each GPU; on a CPU one for each core, at most 8",
        low=1,
        high=MOST_WORKERS,
        metavar="N",
        results=False,
    )
    workers: int | None = option(
        "processes that read images, of each cell",
        default=None,
        auto="as in pretraining; 0 where a cell has one core",
        low=0,
        high=MOST_WORKERS,
        metavar="W",
        results=False,
    )
    device: str = option("where to compute", default="auto", choices=DEVICES, metavar="NAME", results=False)
    precision: str = option("precision of the matrix products", auto=AUTO, choices=PRECISIONS, metavar="NAME")
