"""Options of the command that measures speed and memory."""

from dataclasses import dataclass

from lomar.options.downstream import DEVICES, PRECISIONS
from lomar.options.fields import MOST_WORKERS, option

MEASURES = {
    "steps": "pretraining steps of methods against image size",
    "windows": "pretraining steps against window size",
    "classifier": "fine-tuning and features beside timm's vision transformer",
    "attention": "attention with a contextual bias, by every backend, beside PyTorch's without",
    "loader": "loading on one core beside Pillow and torchvision",
    "processes": "pretraining steps of several processes",
    "products": "plain matrix products, the most that the machine can do",
}
COMPILE = ("auto", "no", "yes", "both")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Measure speed and memory: of pretraining, classifiers, attention, loading, several processes."""

    measure: str = option(
        "what to measure: " + "; ".join(f"{name}: {text}" for name, text in MEASURES.items()),
        default="steps",
        positional=True,
    )
    out: str | None = option(
        "folder for table, JSON and pictures; those of an earlier measurement of the same kind are replaced",
        default=None,
        metavar="DIR",
    )
    # What
    methods: tuple[str, ...] | None = option(
        "recipes, each as it is or with changes: lomar:mask_layer=8,predict_share=0.5; timm-mae is MAE put together "
        "from timm's blocks; dino and mocov3 are measured with their teachers and distortions",
        default=None,
        auto="lomar lomar-late mae beit; windows: lomar lomar-late; processes: lomar-late",
        metavar="NAME",
    )
    baseline: str | None = option(
        "the one of them that the others are compared with",
        default=None,
        auto="mae if it is among them, else the first",
        metavar="NAME",
    )
    model: str = option(
        "size of the encoder: tiny, small, base, large, huge, or WIDTHxDEPTHxHEADS", default="base", metavar="SIZE"
    )
    image_sizes: tuple[int, ...] | None = option(
        "sides of the image, in pixels",
        default=None,
        auto="steps: 224 384 448 896; windows, processes: 224; classifier, attention, loader: 224 448",
        low=1,
        metavar="PX",
    )
    patch_size: int | None = option(
        "side of a patch, in pixels", default=None, auto="the recipe's, or 16", low=1, metavar="PX"
    )
    batch_sizes: tuple[int, ...] | None = option(
        "images per step, of each process", default=None, auto="64 on a GPU, 2 on a CPU", low=1, metavar="N"
    )
    views: int | None = option(
        "windows per image of methods that have windows",
        default=None,
        auto="the paper's: 4 at 224 px, 6 at 384, 9 at 448; above in proportion to the area",
        low=1,
        metavar="N",
    )
    window_sizes: tuple[int, ...] | None = option(
        "sides of a window, in patches, for windows", default=None, auto="Table 4's: 5 7 9 11 14", low=1, metavar="K"
    )
    processes: tuple[int, ...] | None = option(
        "processes that work together, for processes",
        default=None,
        auto="1, 2, 4 ... up to the GPUs, or to the cores",
        low=1,
        metavar="N",
    )
    data: str | None = option(
        "images to be read by the real pipeline, instead of noise that lies ready; loader needs it",
        default=None,
        metavar="DIR",
    )
    prepared: str | None = option(
        "what `lomar prepare` made of --data, to be loaded beside it", default=None, metavar="DIR"
    )
    workers: int | None = option(
        "processes that read the images of --data",
        default=None,
        auto="as in pretraining",
        low=0,
        high=MOST_WORKERS,
        metavar="W",
    )
    without_tokenizer: bool = option("leave out the time of beit's tokenizer", default=False)
    # How
    precision: str = option("precision of the matrix products", default="auto", choices=PRECISIONS, metavar="NAME")
    device: str = option("where to compute", default="auto", choices=DEVICES, metavar="NAME")
    compile: str = option(
        "whether steps are compiled by torch.compile: as pretraining does it here, no, yes, or one row for each way",
        default="auto",
        choices=COMPILE,
        metavar="WORD",
    )
    warmup: int | None = option(
        "steps before those that are timed", default=None, auto="5 on a GPU, 1 on a CPU", low=0, metavar="S"
    )
    steps: int | None = option(
        "timed steps of a round", default=None, auto="20 on a GPU, 3 on a CPU", low=1, metavar="S"
    )
    rounds: int = option("rounds, each with a fresh process for every row", default=3, low=1, metavar="R")
