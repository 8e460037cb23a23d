"""Claims about the page: it is whole in itself, well formed, and whatever names hold stays text."""

import re
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from runs_made import CONFIG, FINETUNE, VIEWS, course, judged, make_run

from lomar.figures.charts import charts_of
from lomar.reporting.hints import hints_on
from lomar.reporting.page import QUIET, Picture, Shown, labels, render
from lomar.reporting.reading import RunRecord, read_run

MADE = datetime(2026, 1, 2, 3, 4)
VOID = {"meta", "link", "img", "br", "hr", "input", "source"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}&amp;"
PIXEL = Picture("a title", b"\x89PNG", "image/png", 'an "alt" <text>')


class Page(HTMLParser):
    """The elements of a page; raises where one is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"{tag} is closed, which was not the last one opened"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def full(**parts: object) -> Shown:
    shown = Shown(over_time=[PIXEL] * 3, ratios=[PIXEL, replace(PIXEL, wide=True)], map=PIXEL, results=[PIXEL])
    shown.distances = [(1.0, 2.0)]
    shown.notes = {"over-time": "noted", "ratios": "noted", "attention": "noted", "map": "noted"}
    for name, value in parts.items():
        setattr(shown, name, value)
    return shown


@pytest.fixture
def run(tmp_path: Path) -> RunRecord:
    return read_run(make_run(tmp_path / "quiet", judged([0.35, 0.38, 0.41, 0.445, 0.45, 0.454]), bad="a.png\tcut\n"))


def page(*records: RunRecord, shown: Shown | None = None) -> Page:
    return Page(
        render(records, [hints_on(each) for each in records], [shown or full()] * len(records), [PIXEL], PIXEL, MADE)
    )


def test_the_page_is_well_formed_and_has_every_section(run: RunRecord) -> None:
    found = page(run)
    assert found.all("html") == [{"lang": "en"}] and len(found.all("h1")) == 1
    ids = [attributes["id"] for attributes in found.all("h2")]
    wanted = "summary curves over-time ratios attention map results configuration versions bad-files"
    assert ids == wanted.split()
    assert len(set(ids)) == len(ids)
    assert [attributes["href"] for attributes in found.all("a")] == [f"#{name}" for name in ids]


def test_headings_go_down_one_level_at_a_time(run: RunRecord) -> None:
    for found in (page(run), page(run, run)):
        levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert all(below <= above + 1 for above, below in pairwise(levels))


def test_every_picture_has_words_and_lies_within_the_page(run: RunRecord) -> None:
    pictures = page(run).all("img")
    assert len(pictures) == 9
    for attributes in pictures:
        assert attributes["alt"] and (attributes["src"] or "").startswith("data:image/")


def test_nothing_outside_of_the_page_is_named(run: RunRecord) -> None:
    charts = [Picture(each.title, each.svg, "image/svg+xml", each.alt) for each in charts_of({"quiet": run.rows})]
    text = render([run], [hints_on(run)], [full()], charts, None, MADE)
    found = Page(text)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in found.elements}
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                assert (value or "").startswith(("data:", "#")), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r'"data:[^"]*"', "", text))


def test_what_names_hold_is_shown_as_text(tmp_path: Path) -> None:
    config = CONFIG | {"data": HOSTILE, "method": HOSTILE, HOSTILE: HOSTILE}
    log = f"2026-01-02 03:04:05  INFO     lomar {HOSTILE.replace(' ', '')}, options in x\n{HOSTILE}\n"
    folder = tmp_path / "<b>&'\"run"
    run = read_run(make_run(folder, course(), config, log=log, bad=f"{HOSTILE}\t{HOSTILE}\n"))
    shown = full(notes={"map": HOSTILE}, over_time=[Picture(HOSTILE, b"", "image/png", HOSTILE)])
    found = page(run, run, shown=shown)
    assert not found.all("script") and not found.all("b")
    assert all("onerror" not in attributes for _, attributes in found.elements)
    assert found.text.count("<script>alert(1)</script>") > 8 and "49" not in found.text.split("{{ 7*7 }}")[0]
    assert "<b>&'\"run" in found.text


def test_what_classes_and_results_hold_is_text_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", course(), FINETUNE)
    rows = [{"class": HOSTILE, "images": 3, "accuracy": 0.5, "most_often_taken_for": HOSTILE}]
    run = replace(read_run(folder), results={"top1": 0.5, "classes": rows, HOSTILE: 1})
    found = page(run)
    assert not found.all("script") and found.text.count("<script>") == 3
    assert "50.0 %" in found.text


def test_a_quiet_run_is_told_so_and_one_with_hints_is_told_those(run: RunRecord) -> None:
    assert QUIET in page(run).text
    noisy = replace(run, rows=[row | {"data_wait": 0.5} for row in run.rows])
    found = page(noisy)
    assert QUIET not in found.text and "Problem The loader is the bottleneck: 50%" in found.text


def test_what_is_missing_leaves_a_page_without_it(tmp_path: Path) -> None:
    nothing = read_run(make_run(tmp_path / "run", config=None))
    found = Page(render([nothing], [hints_on(nothing)], [Shown()], [], None, MADE))
    assert [attributes["id"] for attributes in found.all("h2")] == ["summary", "configuration", "versions", "bad-files"]
    assert "There is no configuration." in found.text and "None were found." in found.text


def test_two_runs_are_compared(run: RunRecord, tmp_path: Path) -> None:
    config = CONFIG | {"base_lr": 0.002, "workers": 4}
    del config["views"]
    other = read_run(make_run(tmp_path / "other", judged([0.5, 0.6]), config))
    found = page(run, other)
    assert "comparison" in [attributes["id"] for attributes in found.all("h2")]
    assert found.text.index("--base-lr 0.001 0.002") < found.text.index("--workers · 2 4")
    assert "--views 2 \N{EN DASH}" in found.text and "--mask-ratio 0.8 0.8" not in found.text
    assert "k-NN top-1 30.0 % before training → 45.4 % 30.0 % before training → 60.0 %" in found.text
    assert "No option differs." in page(run, run).text


def test_a_method_that_compares_views_is_told_in_its_own_words(run: RunRecord, tmp_path: Path) -> None:
    rows = course(300, feature_deviation=lambda share: 0.6 - 0.1 * share, output_entropy=3.0)
    views = read_run(make_run(tmp_path / "views", rows, VIEWS))
    drawn = Shown(crops=PIXEL, notes={"attention": "noted"})
    told = Page(render([views], [hints_on(views)], [drawn], [PIXEL], PIXEL, MADE))
    ids = [attributes["id"] for attributes in told.all("h2")]
    assert "crops" in ids and "over-time" not in ids and "ratios" not in ids
    for text in (
        "two large crops of 32 pixels (40% to 100% of the area), 8 small ones of 16 (5% to 40% of the area), patches",
        "Heads 64 prototypes, layers 32 wide",
        "Teacher follows with a momentum of 0.996, which rises to 1",
        "Temperatures 0.1 of the student, 0.04 to 0.07 of the teacher over 30 epochs",
        "Deviation of features 0.597 → 0.502 of 1",
        "Entropy of outputs 3 → 3 nats",
    ):
        assert text in told.text, text
    unlike = "losses measure different things"
    assert unlike in page(run, views).text and unlike not in page(run, run).text


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / folder / "run", course())) for folder in ("a", "b")]
    assert labels(runs) == ["a", "b"]
    deeper = read_run(make_run(tmp_path / "b" / "c" / "run", course()))
    assert labels([runs[0], deeper]) == ["a", "b/c"]
    within = read_run(make_run(tmp_path / "a" / "run" / "run", course()))
    assert (
        all(label.endswith("run") for label in labels([runs[0], within])) and len(set(labels([runs[0], within]))) == 2
    )
    assert labels([runs[0], runs[0]]) == ["run (1)", "run (2)"]
    assert labels(runs[:1]) == ["run"]


def test_a_long_list_of_bad_files_is_cut(tmp_path: Path) -> None:
    bad = "".join(f"{number}.png\tcut\n" for number in range(700))
    found = page(read_run(make_run(tmp_path / "run", course(), bad=bad)))
    assert "700 files The first 500; all are in bad_files.txt." in found.text
    assert "499.png" in found.text and "500.png" not in found.text
