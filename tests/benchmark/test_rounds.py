"""Claims about rounds and what follows from given times; nothing is timed here."""

from dataclasses import replace

import pytest

from lomar.benchmark.cells import OUT_OF_MEMORY, Cell, CellError, Measured
from lomar.benchmark.rounds import Row, base_of, measure_rounds, ratio


def row(name: str, *seconds: list[float], images: int = 6, processes: int = 1, **about: object) -> Row:
    """A row whose rounds took these seconds, each a list of steps."""
    made = Row(Cell("nothing", images=images, processes=processes), name, {"name": name})
    made.rounds = [Measured(list(steps), peak_bytes=100 + len(made.rounds)) for steps in seconds]
    return replace(made, **about)


def test_a_round_is_the_median_of_its_steps_and_a_row_the_median_of_its_rounds() -> None:
    slow_once = row("one", [1.0, 1.0, 9.0], [2.0, 2.0, 2.0], [4.0, 3.0, 4.0])
    assert slow_once.round_s == [1.0, 2.0, 4.0] and slow_once.step_s == 2.0
    assert slow_once.images_per_s == 6 / 2.0
    assert row("unmeasured").step_s is row("unmeasured").images_per_s is row("unmeasured").peak_bytes is None


def test_where_steps_come_in_bursts_their_mean_counts() -> None:
    assert row("loading", [0.1, 0.1, 2.8], bursts=True).step_s == pytest.approx(1.0)


def test_a_ratio_is_of_images_a_second_round_by_round() -> None:
    """Of 3 images in 1, 2 and 4 s against 6 images in 4, 4 and 4 s: 2, 1 and 0.5."""
    found = ratio(row("fast", [1.0], [2.0], [4.0], images=3), row("base", [4.0], [4.0], [4.0]))
    assert found == (1.0, 0.5, 2.0)
    two = ratio(row("two", [2.0], processes=2), row("one", [2.0]))
    assert two is not None and two.median == 2.0


def test_a_ratio_takes_the_rounds_that_both_have() -> None:
    found = ratio(row("fast", [1.0], [1.0]), row("base", [3.0]))
    assert found is not None and found.median == 3.0
    assert ratio(row("fast", [1.0]), row("base")) is None


def test_the_base_is_the_fastest_of_its_group_that_was_measured() -> None:
    plain, compiled = row("mae", [2.0], group="a", is_base=True), row("mae, compiled", [1.0], group="a", is_base=True)
    failed, elsewhere = row("mae 3", group="a", is_base=True), row("mae 4", [0.1], group="b", is_base=True)
    rows = [plain, compiled, failed, elsewhere, asked := row("lomar", [1.0], group="a")]
    assert base_of(asked, rows) is compiled
    assert base_of(row("lomar", [1.0], group="c"), rows) is None


def test_rows_take_turns_and_back_again_and_each_round_is_kept() -> None:
    rows = [row(name) for name in "abc"]
    order: list[str] = []
    kept: list[int] = []
    names = {id(each.cell): each.title for each in rows}

    def measure(cell: Cell) -> Measured:
        order.append(names[id(cell)])
        return Measured([1.0], 1)

    measure_rounds(rows, 3, measure, lambda text: None, lambda: kept.append(len(order)))
    assert "".join(order) == "abc" + "cba" + "abc"
    assert kept == [3, 6, 9]


def test_what_fails_is_said_and_not_tried_again_and_the_others_go_on() -> None:
    rows = [row("large"), row("small")]
    notes: list[str] = []

    def measure(cell: Cell) -> Measured:
        if cell is rows[0].cell:
            raise CellError(OUT_OF_MEMORY)
        return Measured([0.25], 1)

    measure_rounds(rows, 2, measure, notes.append, lambda: None)
    assert rows[0].failed == OUT_OF_MEMORY and not rows[0].rounds
    assert not rows[1].failed and len(rows[1].rounds) == 2
    assert notes == ["round 1/2: large: out of memory", "round 1/2: small: 0.25 s", "round 2/2: small: 0.25 s"]
