"""Options of the command that writes a report."""

from dataclasses import dataclass

from lomar.options.downstream import DEVICES
from lomar.options.fields import LARGEST_SEED, option


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a report of a run, or of two side by side, as one HTML file."""

    run: str | None = option(
        "folder of a run, finished, going on or interrupted; or the file of a tokenizer", default=None, positional=True
    )
    other: str | None = option("a second run, to be compared", default=None, positional=True)
    out: str | None = option(
        "file to write; one that is there is replaced", default=None, auto="report.html in RUN", metavar="FILE.html"
    )
    images: tuple[str, ...] | None = option(
        "images or folders of images to draw and to map", default=None, auto="the run's own", metavar="PATH"
    )
    samples: int = option("most images of the embedding map; 0 for no map", default=300, low=0, high=3000, metavar="N")
    mask_ratios: tuple[float, ...] = option(
        "shares of hidden patches to reconstruct at", default=(0.5, 0.6, 0.7, 0.8, 0.9), above=0, below=1, metavar="R"
    )
    no_model: bool = option(
        "tell from the files alone, without asking the model anything: in a few seconds", default=False
    )
    seed: int = option("fixes windows, masks and the map", default=0, low=0, high=LARGEST_SEED, metavar="N")
    device: str = option("where to compute", default="cpu", choices=DEVICES, metavar="NAME")
