"""Records, hints and pictures -> one HTML page that needs nothing beside itself: no script, address or other file."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template

from lomar import __version__
from lomar.reporting.facts import (
    class_rows,
    compared_results,
    differences,
    key_results,
    measured_unlike,
    options,
    result_numbers,
    state,
    summary,
)
from lomar.reporting.hints import Hint
from lomar.reporting.reading import RunRecord

TEMPLATE = "page.html.j2"
MOST_BAD = 500  # unreadable files that are named
QUIET = "Nothing stands out."


@dataclass(frozen=True)
class Picture:
    """A picture of a page.

    Args:
        title: above it; may be empty.
        data: the file's content.
        mime: such as image/jpeg.
        alt: what it shows, in words.
        wide: whether it has two tiles beside each other.
    """

    title: str
    data: bytes
    mime: str
    alt: str
    wide: bool = False

    @property
    def uri(self) -> str:
        """The picture as an address that holds it."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"


@dataclass
class Shown:
    """What was drawn of a run. What could not be is missing, and `notes` says why.

    Args:
        over_time: strips of the same images: first the originals, then what was filled in at each step.
        ratios: strips of the same images: the originals, then masked and filled in at each ratio.
        distances: of each layer, mean attention distance in patches, and what it would be if spread evenly.
        map: of the embedding.
        crops: what a method that compares views sees of a few images.
        results: pictures that the run itself has drawn of its result.
        notes: name of a section -> sentences on it.
    """

    over_time: Sequence[Picture] = ()
    ratios: Sequence[Picture] = ()
    distances: Sequence[tuple[float, float]] = ()
    map: Picture | None = None
    crops: Picture | None = None
    results: Sequence[Picture] = ()
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Told:
    """A run as the template takes it."""

    label: str
    record: RunRecord
    shown: Shown
    state: str
    summary: Sequence[tuple[str, str]]
    results: Sequence[tuple[str, str]]
    hints: Sequence[Hint]
    options: Sequence[object]
    classes: Sequence[tuple[str, str, str, str]]
    class_count: int
    numbers: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]
    bad_files: Sequence[tuple[str, str]]


def labels(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run, no two alike: its folder's, or, where these are the same, what differs of their paths."""
    names = [record.name for record in records]
    if len(set(names)) == len(names):
        return names
    paths = [record.path.absolute().parts for record in records]
    if len(set(paths)) < len(paths):
        return [f"{name} ({i})" for i, name in enumerate(names, start=1)]
    first, same = _alike(paths), _alike([parts[::-1] for parts in paths])
    differing = ["/".join(parts[first : max(first + 1, len(parts) - same)]) for parts in paths]
    return differing if all(differing) else ["/".join(parts).removeprefix("/") for parts in paths]


def _alike(paths: Sequence[tuple[str, ...]]) -> int:
    """How many of their first parts are the same in all."""
    pairs = enumerate(zip(*paths, strict=False))
    return next((place for place, parts in pairs if len(set(parts)) > 1), min(map(len, paths)))


def render(
    records: Sequence[RunRecord],
    hints: Sequence[Sequence[Hint]],
    shown: Sequence[Shown],
    charts: Sequence[Picture],
    distance: Picture | None,
    made: datetime,
    more: Sequence[Picture] = (),
) -> str:
    """The page.

    Args:
        records: one run or two.
        hints: on each.
        shown: what was drawn of each.
        charts: curves, of all runs together.
        distance: attention distance, likewise.
        made: when.
        more: curves that not every reader looks for, folded away.
    """
    runs = [_told(*each) for each in zip(labels(records), records, hints, shown, strict=True)]
    sections = _sections(runs, bool(charts or more), distance is not None)
    return _template().render(
        runs=runs,
        several=len(runs) > 1,
        sections=sections,
        charts=charts,
        more=more,
        distance=distance,
        compared=compared_results(records),
        differences=differences(records),
        unlike=measured_unlike(records),
        most_bad=MOST_BAD,
        quiet=QUIET,
        made=f"{made:%Y-%m-%d %H:%M}",
        version=__version__,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))


def _told(label: str, record: RunRecord, hints: Sequence[Hint], shown: Shown) -> _Told:
    rows, count = class_rows(record.results)
    versions = [("lomar", record.lomar)] if record.lomar else []
    versions += [(name, version) for name, version in record.versions if name != "lomar"]
    versions += [(name, str(record.results[name])) for name in ("lomar", "torch") if _is_told(record.results, name)]
    return _Told(
        label=label,
        record=record,
        shown=shown,
        state=state(record),
        summary=summary(record),
        results=key_results(record),
        hints=hints,
        options=options(record),
        classes=rows,
        class_count=count,
        numbers=result_numbers(record.results),
        versions=list(dict(versions).items()),
        bad_files=record.bad_files[:MOST_BAD],
    )


def _is_told(results: Mapping[str, object], name: str) -> bool:
    return isinstance(results.get(name), str)


def _sections(runs: Sequence[_Told], charts: bool, distance: bool) -> list[tuple[str, str]]:
    """(id, heading) of the sections that the page has."""

    def any_has(*names: str) -> bool:
        return any(getattr(run.shown, name) for run in runs for name in names)

    def noted(name: str) -> bool:
        return any(name in run.shown.notes for run in runs)

    found = {
        "summary": ("Summary", True),
        "comparison": ("Comparison", len(runs) > 1),
        "curves": ("Curves", charts),
        "crops": ("What it saw", any_has("crops") or noted("crops")),
        "over-time": ("Reconstructions over time", any_has("over_time") or noted("over-time")),
        "ratios": ("Reconstructions across mask ratios", any_has("ratios") or noted("ratios")),
        "attention": ("Attention distance", distance or noted("attention")),
        "map": ("Embedding map", any_has("map") or noted("map")),
        "results": ("Results", any_has("results") or any(run.numbers or run.classes for run in runs)),
        "configuration": ("Configuration", True),
        "versions": ("Versions", True),
        "bad-files": ("Unreadable files", True),
        "log": ("Log", any(run.record.log for run in runs)),
    }
    return [(name, heading) for name, (heading, there) in found.items() if there]
