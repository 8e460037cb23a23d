"""Options of the commands that draw what a pretrained model does."""

from dataclasses import dataclass

from lomar.options.fields import LARGEST_SEED, option


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions:
    """Draw reconstructions of masked windows."""

    model: str = option("a run's folder, finished or not, or its reconstructor.safetensors", metavar="RUN")
    images: tuple[str, ...] = option("images or folders of images", metavar="PATH")
    out: str = option("picture to write", metavar="FILE.png")
    mask_ratios: tuple[float, ...] = option(
        "one column each; one ratio alone draws original, window, masked and reconstruction",
        default=(0.6, 0.7, 0.8, 0.9),
        above=0,
        below=1,
        metavar="R",
    )
    seed: int = option("fixes windows and masks", default=0, low=0, high=LARGEST_SEED, metavar="N")


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Draw where a hidden patch or the cls token looks, and say how far."""

    model: str = option(
        "a run's folder, its reconstructor.safetensors, or an encoder alone (which has visible patches only)",
        metavar="RUN",
    )
    images: tuple[str, ...] = option("images or folders of images", metavar="PATH")
    out: str = option("picture to write", metavar="FILE.png")
    layers: tuple[int, ...] | None = option(
        "layers to draw, counted from 1: the decoder's where there is one, else the encoder's",
        default=None,
        auto="four, evenly spaced up to the last",
        low=1,
        metavar="L",
    )
    patch: tuple[int, int] | None = option(
        "the patch that looks: its row and column in the image, counted from 0",
        default=None,
        auto="a hidden one near the middle; of encoders that pool by cls that token",
        low=0,
        metavar="ROW COL",
    )
    mask_ratio: float | None = option(
        "share of patches that are hidden", default=None, auto="the run's", above=0, below=1, metavar="R"
    )
    seed: int = option("fixes windows and masks", default=0, low=0, high=LARGEST_SEED, metavar="N")
