"""Which cells a study has, and which of them can run now: functions of what earlier cells found, and of nothing else.

So any number of processes may ask at any time, and a study that was stopped goes on where it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lomar.methods.recipes import RECIPES, mask_layer_for
from lomar.study.grids import Entry, Sizes

# name of a cell -> what is known of it, by step: "pretraining", "probe", "knn", "finetuned"
Results = Mapping[str, Mapping[str, Any]]

# Recipes by whose name a cell is called when changes of another one come to the same.
_NAMED = ("lomar", "lomar-late", "mae", "beit", "beit-lomar", "dino", "mocov3")


@dataclass(frozen=True)
class Cell:
    """One pretraining run with one seed, and what judges it.

    Args:
        method: a recipe; "" for no pretraining.
        changes: (option, value) beside the recipe's and the study's, sorted.
        epochs: passes over the images; 0 without pretraining.
        base_lr: learning rate for 256 images; 0 without pretraining.
        seed: of all of it.
    """

    method: str
    changes: tuple[tuple[str, Any], ...]
    epochs: float
    base_lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder: cells of several studies that are the same have the same name."""
        changed = [f"{option}={value}" for option, value in self.changes]
        course = [f"epochs={self.epochs:g}", f"lr={self.base_lr:g}"] if self.method else []
        return ",".join([self.method or "none", *changed, *course, f"seed={self.seed}"])


@dataclass(frozen=True)
class Job:
    """A cell that can run, and how far.

    Args:
        cell: it.
        chosen: whether it is judged to the end; else as far as the choice of a learning rate needs.
    """

    cell: Cell
    chosen: bool


@dataclass(frozen=True)
class Plan:
    """The rows of a study with what is common to them.

    Args:
        entries: rows, those that others refer to first.
        sizes: images and encoder.
        epochs: of a whole pretraining.
        base_lrs: the sweep that each row has.
        seeds: the first of them is swept.
    """

    entries: Sequence[Entry]
    sizes: Sizes
    epochs: float
    base_lrs: Sequence[float]
    seeds: Sequence[int]

    def jobs(self, found: Results) -> Iterator[Job]:
        """What can run by what is known, done or not: first what chooses rates, then row by row for each seed."""
        for entry in self.entries:
            yield from (Job(cell, chosen=False) for cell in self.sweep(entry, found))
        for seed in self.seeds:
            for entry in self.entries:
                cell = self.cell(entry, seed, found)
                if cell:
                    yield Job(cell, chosen=True)

    def cell(self, entry: Entry, seed: int, found: Results) -> Cell | None:
        """The cell that stands in the table for a row and a seed; None while its rate or length is not known."""
        if not entry.method:
            return Cell("", (), 0, 0, seed)
        rate, epochs = self.rate(entry, found), self.length(entry, found)
        if rate is None or epochs is None:
            return None
        return self._made(entry, epochs, rate, seed)

    def sweep(self, entry: Entry, found: Results) -> list[Cell]:
        """The cells among which a row's rate is chosen; none where there is nothing to choose, or not yet."""
        epochs = self.length(entry, found)
        if not entry.method or entry.rate_of or len(self.base_lrs) == 1 or epochs is None:
            return []
        return [self._made(entry, epochs, rate, self.seeds[0]) for rate in self.base_lrs]

    def rate(self, entry: Entry, found: Results) -> float | None:
        """The rate whose probe does best on images held out, or that of the row whose rate it takes.

        None while that is not known, and where training diverged at every rate.
        """
        if entry.rate_of:
            return self.rate(self.entry(entry.rate_of), found)
        if len(self.base_lrs) == 1:
            return self.base_lrs[0]
        cells = self.sweep(entry, found)
        results = {cell.base_lr: found.get(cell.name, {}) for cell in cells}
        results = {rate: result for rate, result in results.items() if not diverged(result)}
        if not results or any("probe" not in result for result in results.values()):
            return None
        return max(results, key=lambda rate: results[rate]["probe"]["held_out"])

    def at_edge(self, entry: Entry, found: Results) -> bool:
        """Whether the best rate is the lowest or the highest that was tried."""
        return len(self.base_lrs) > 1 and self.rate(entry, found) in (min(self.base_lrs), max(self.base_lrs))

    def length(self, entry: Entry, found: Results) -> float | None:
        """Epochs of a row: a share of the study's, or as many as take the time of another row.

        By the speed of the first seed's runs alone, so that it is the same whatever runs later.
        """
        if not entry.as_long_as:
            return self.epochs * entry.share
        other = self.cell(self.entry(entry.as_long_as), self.seeds[0], found)
        same = self.cell(self.entry(entry.rate_of), self.seeds[0], found)
        if other is None or same is None:
            return None
        speeds = [found.get(cell.name, {}).get("pretraining", {}).get("images_per_s") for cell in (same, other)]
        if None in speeds:
            return None
        return max(0.1, round(other.epochs * speeds[0] / speeds[1], 1))

    def entry(self, name: str) -> Entry:
        """The row of a name."""
        return next(entry for entry in self.entries if entry.name == name)

    def _made(self, entry: Entry, epochs: float, rate: float, seed: int) -> Cell:
        method, changes = canonical(entry.method, entry.changes, self.sizes)
        return Cell(method, tuple(sorted(changes.items())), round(epochs, 6), rate, seed)


def diverged(result: Mapping[str, Any]) -> bool:
    """Whether a cell's pretraining broke off since its loss was not finite, or went on at half the rate after that."""
    return bool(result.get("pretraining", {}).get("diverged"))


def chosen_entries(entries: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """The rows of the given names and those that they refer to, in order."""
    by_name = {entry.name: entry for entry in entries}
    wanted = set(names)
    for name in names:
        for other in (by_name[name].as_long_as, by_name[name].rate_of):
            wanted |= {each.name for each in chosen_entries(entries, [other])} if other else set()
    return [entry for entry in entries if entry.name in wanted]


def canonical(method: str, changes: Mapping[str, Any], sizes: Sizes) -> tuple[str, dict[str, Any]]:
    """A recipe and what differs from it, in the one form that equal methods share."""
    whole = _method(method, sizes) | dict(changes)
    for name in _NAMED:
        if whole == _method(name, sizes):
            return name, {}
    own = _method(method, sizes)
    return method, {option: value for option, value in changes.items() if option not in own or own[option] != value}


def _method(name: str, sizes: Sizes) -> dict[str, Any]:
    """What a recipe says of the method alone, at a study's sizes."""
    options = dict(RECIPES[name].options)
    if "mask_layer" in options:
        options["mask_layer"] = mask_layer_for(options["mask_layer"], sizes.depth)
    return options | {"image_size": sizes.image_size, "patch_size": sizes.patch_size}
