"""The paper's tables and figures as grids: what is trained, beside what, and what is drawn of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lomar.methods.recipes import RATIOS, VIEWS_OF_WINDOW, mask_layer_for


@dataclass(frozen=True)
class Sizes:
    """What a study is run at; the paper's are 224, 16 and 12.

    Args:
        image_size: side of the crop, in pixels.
        patch_size: side of a patch, in pixels.
        depth: blocks of the encoder.
    """

    image_size: int
    patch_size: int
    depth: int

    def scaled(self, paper_px: int) -> int:
        """The side that is to `image_size` as the paper's is to 224, in whole patches."""
        return max(1, round(self.image_size * paper_px / 224 / self.patch_size)) * self.patch_size


@dataclass(frozen=True)
class Entry:
    """A row of a study's table.

    Args:
        name: what it is called there.
        method: a recipe; "" for no pretraining.
        changes: options of `lomar pretrain` beside the recipe's and the study's.
        share: of the study's epochs that it is trained for.
        as_long_as: the row whose pretraining time it is given, in epochs by what both were measured to need.
        rate_of: the row whose learning rate it takes; "" where it has a sweep of its own.
        group: rows of one line in the picture.
        at: where on that line.
    """

    name: str
    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    as_long_as: str = ""
    rate_of: str = ""
    group: str = ""
    at: float = 0.0


@dataclass(frozen=True)
class Study:
    """A grid.

    Args:
        paper: the table, figure or section that it asks again.
        about: the question.
        entries: sizes -> the rows, in the order of the table; rows that others refer to come before them.
        along: what the picture's horizontal axis is; "" for bars, "minutes" for pretraining time.
    """

    paper: str
    about: str
    entries: Callable[[Sizes], list[Entry]]
    along: str = ""


def _table1(sizes: Sizes) -> list[Entry]:
    small = {"patch_size": sizes.patch_size // 2}
    rows = [
        Entry("none", "", group="no pretraining"),
        Entry("mae", "mae", group="equal epochs"),
        Entry("beit", "beit", group="equal epochs"),
        Entry("lomar", "lomar", group="equal epochs"),
        Entry("lomar-small-patches", "lomar", small, group="equal epochs"),
        Entry("lomar-late", "lomar-late", group="equal epochs"),
        Entry("dino", "dino", group="equal epochs"),
        Entry("mocov3", "mocov3", group="equal epochs"),
    ]
    as_long = [
        Entry(
            f"{row.name}, mae's time", row.method, row.changes, as_long_as="mae", rate_of=row.name, group="equal time"
        )
        for row in rows
        if row.method not in ("", "mae")
    ]
    return rows + as_long


def _table3(sizes: Sizes) -> list[Entry]:
    return [Entry("beit", "beit"), Entry("beit-lomar", "beit-lomar")]


def _fig3(sizes: Sizes) -> list[Entry]:
    return [
        Entry(
            method if share == 1 else f"{method}, {share:g} of the epochs",
            method,
            share=share,
            rate_of="" if share == 1 else method,
            group=method,
        )
        for method in ("lomar", "lomar-late", "mae", "beit")
        for share in (1, 0.5, 0.25)
    ]


def _fig4(sizes: Sizes) -> list[Entry]:
    views = {224: 4, 384: 6, 448: 9}
    return [
        Entry(
            f"{method}, {sizes.scaled(paper_px)} px",
            method,
            {"image_size": sizes.scaled(paper_px)} | ({"views": count} if method.startswith("lomar") else {}),
            group=method,
            at=sizes.scaled(paper_px),
        )
        for method in ("lomar", "lomar-late", "mae", "beit")
        for paper_px, count in views.items()
    ]


def _fig5(sizes: Sizes) -> list[Entry]:
    about = {"rpe": "simple, relative", "ape": "simple, absolute", "decoder": "encoder-decoder, absolute"}
    return [
        Entry(f"{text}, {side}x{side}", f"fig5-{kind}-{side}", group=text, at=side)
        for kind, text in about.items()
        for side in VIEWS_OF_WINDOW
    ]


def _fig6(sizes: Sizes) -> list[Entry]:
    return [Entry(f"{ratio:.0%} hidden", "lomar", {"mask_ratio": ratio}, group="lomar", at=ratio) for ratio in RATIOS]


def _late(sizes: Sizes) -> list[Entry]:
    layers = dict.fromkeys(mask_layer_for(layer, sizes.depth) for layer in (0, 6, 8, 10, 11))
    shares = {1.0: "all", 0.5: "half", 0.25: "a quarter"}
    return [
        Entry(
            f"block {layer}, {text}",
            "lomar",
            {"mask_layer": layer, "predict_share": share},
            group=f"{text} predicted",
            at=layer,
        )
        for layer in layers
        for share, text in shares.items()
    ]


def _layout(sizes: Sizes) -> list[Entry]:
    return [Entry(f"{layout} windows", "lomar", {"window_layout": layout}) for layout in ("independent", "released")]


STUDIES: dict[str, Study] = {
    "table1": Study("Table 1", "methods at equal epochs, and at equal time", _table1),
    "table3": Study("Table 3", "beit with and without windows", _table3),
    "fig3": Study("Fig. 3", "accuracy against pretraining time", _fig3, "minutes"),
    "fig4": Study("Fig. 4", "methods at three resolutions", _fig4, "side of the image, px"),
    "fig5": Study("Fig. 5", "window size, architecture and position", _fig5, "side of the window, patches"),
    "fig6": Study("Fig. 6", "share of hidden patches", _fig6, "share of a window that is hidden"),
    "late": Study(
        "section 5", "where mask tokens enter and how many patches are predicted", _late, "block of the masks"
    ),
    "layout": Study("section 3.2", "windows of each image's own against the released code's repeated one", _layout),
}
