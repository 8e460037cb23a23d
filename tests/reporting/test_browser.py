"""Claims about the page in a real browser: skipped where Chromium or Playwright's package is missing.

apt-get install chromium; pip install 'lomar[browser]'
"""

import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs_made import CONFIG, FINETUNE, judged, make_run

from lomar.figures.charts import charts_of, distance_chart
from lomar.reporting.hints import hints_on
from lomar.reporting.page import Picture, Shown, render
from lomar.reporting.reading import RunRecord, read_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
WIDE, NARROW = 1440, 375
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">" + "long" * 40


def picture(tmp_path: Path, size: tuple[int, int], title: str = "", wide: bool = False) -> Picture:
    file = tmp_path / f"{size}.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, quality=30)
    return Picture(title, file.read_bytes(), "image/jpeg", "noise", wide)


def written(tmp_path: Path, name: str, records: list[RunRecord], shown: list[Shown]) -> Path:
    charts = charts_of({f"run {number}": record.rows for number, record in enumerate(records)})
    charts.append(distance_chart({f"run {number}": [(1.0, 2.0), (1.5, 2.0)] for number in range(len(records))}))
    pictures = [Picture(each.title, each.svg, "image/svg+xml", each.alt) for each in charts]
    page = render(
        records, [hints_on(record) for record in records], shown, pictures[:-1], pictures[-1], datetime(2026, 1, 2)
    )
    (tmp_path / name).write_text(page)
    return tmp_path / name


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretraining run, two side by side, a classifier, and one whose names are hostile; each with every section."""
    root = tmp_path_factory.mktemp("pages")
    strips = [picture(root, (168, 1000), f"step {number}") for number in range(10)]
    pairs = [strips[0], *(picture(root, (341, 1000), f"{number}0% hidden", wide=True) for number in range(5, 10))]
    everything = Shown(
        over_time=strips, ratios=pairs, map=picture(root, (1600, 1200)), results=[picture(root, (1600, 1600), "drawn")]
    )
    everything.notes = dict.fromkeys(("over-time", "ratios", "attention", "map"), "A sentence on what is shown here.")
    run = read_run(make_run(root / "run", judged([0.4, 0.5, 0.55, 0.6]), log="a line of a log\n" * 50))
    other = read_run(make_run(root / "other", judged([0.3, 0.4]), CONFIG | {"base_lr": 0.1}))
    classifier = read_run(make_run(root / "classifier", judged([0.4, 0.5], "top1", start=None), FINETUNE))
    hostile = read_run(
        make_run(
            root / "hostile",
            judged([0.3, 0.2]),
            {HOSTILE.replace(" ", "-"): HOSTILE} | CONFIG | {"data": HOSTILE},
            log=HOSTILE + "\n",
            bad=f"{HOSTILE}\t{HOSTILE}\n",
        )
    )
    return {
        "one": written(root, "one.html", [run], [everything]),
        "two": written(root, "two.html", [run, other], [everything, everything]),
        "classifier": written(root, "classifier.html", [classifier], [everything]),
        "hostile": written(root, "hostile.html", [hostile], [everything]),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.mark.parametrize("name", ["one", "two", "classifier", "hostile"])
def test_the_page_is_read_on_wide_and_narrow_screens_light_and_dark(
    name: str, pages: dict[str, Path], browser: Any
) -> None:
    for width, scheme in ((WIDE, "light"), (NARROW, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        check(context.new_page(), pages[name].as_uri(), width)
        context.close()


def check(page: Any, address: str, width: int) -> None:
    told: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    assert told == [] and page.title() != "taken"
    assert [url for url in asked if not url.startswith("data:")] == [address]
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")  # must fit as well
    assert page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]") == [width, width]
    sizes = page.evaluate("[...document.images].map(each => [each.complete, each.naturalWidth, each.width])")
    assert len(sizes) > 15 and all(done and natural > 0 and shown > 30 for done, natural, shown in sizes)
    links = page.eval_on_selector_all("nav a", "all => all.map(each => each.getAttribute('href'))")
    assert len(links) >= 8
    for link in links:
        page.click(f'nav a[href="{link}"]')
        top = page.evaluate("name => document.querySelector(name).getBoundingClientRect().top", link)
        assert -1 <= top < 900, link


def test_the_colours_of_page_and_charts_follow_the_screen(pages: dict[str, Path], browser: Any, tmp_path: Path) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 800, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.goto(pages["one"].as_uri())
        page.locator(".charts img").first.screenshot(path=tmp_path / "chart.png")
        pixels = np.asarray(Image.open(tmp_path / "chart.png").convert("L"), dtype=float)
        paper = float(np.median(pixels))
        brightness[scheme] = paper
        # Letters and lines stand out: some pixels are far from the paper.
        assert np.abs(pixels - paper).max() > 120
        context.close()
    assert brightness["light"] > 230 and brightness["dark"] < 60


def test_what_is_wider_than_a_phone_is_scrolled_within_itself(pages: dict[str, Path], browser: Any) -> None:
    page = browser.new_page(viewport={"width": NARROW, "height": 800})
    page.goto(pages["one"].as_uri())
    strips = page.locator(".strips").first
    wide, shown = strips.evaluate("each => [each.scrollWidth, each.clientWidth]")
    assert wide > shown <= NARROW
    strips.evaluate("each => { each.scrollLeft = 300 }")
    # The originals stay in sight beside what is compared with them.
    left = strips.locator("figure").first.evaluate("each => each.getBoundingClientRect().left")
    assert 0 <= left < 40
    page.close()
