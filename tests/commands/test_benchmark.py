"""Claims about `lomar benchmark`: what it measures, tells of given times, refuses, and leaves when it is ended."""

import json
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lomar import cli
from lomar.benchmark.cells import OUT_OF_MEMORY, Cell, CellError, Measured
from lomar.benchmark.child import measure
from lomar.benchmark.products import product_flops
from lomar.commands import benchmark
from lomar.commands.benchmark_settling import MACHINE, Plan, paper_views, plan
from lomar.methods.composition import Composition, composition_from
from lomar.methods.cost import forward_flops, step_flops, tokenizer_flops, trained_parameters
from lomar.methods.recipes import RECIPES
from lomar.options import BenchmarkOptions, command_line

TINY = "--model 24x2x2 --patch-size 8 --precision fp32 --device cpu"


def planned(words: str) -> Plan:
    """What a command line asks for, without measuring it."""
    _, arguments = cli.command_in(["benchmark", *shlex.split(words)])
    return plan(cli.parse("benchmark", arguments))


def composition(cell: Cell) -> Composition:
    return Composition.from_dict(cell.values["composition"])


@pytest.fixture
def timed_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Cell], Measured]], None]:
    """Take times as given in the place of child processes."""
    return lambda found: monkeypatch.setattr(benchmark, "measured", found)


@pytest.fixture
def in_this_process(timed_as: Any, miniature: None) -> None:
    """Measure without child processes, which take seconds to begin."""
    timed_as(lambda cell: measure(replace(cell, memory_bytes=0, threads=0)))


def by_size(cell: Cell) -> Measured:
    """A step of a second for each hundred pixels of the side, twice that of what is not lomar; a product of 0.5 s."""
    if cell.work == "matrix product":
        return Measured([0.5] * 3, 1)
    c = composition(cell)
    seconds = c.image_size / 100 * (1 if c.method == "lomar" else 2)
    return Measured([seconds, seconds, 9 * seconds], 1000 * c.image_size)


def test_the_views_are_the_papers_and_above_in_proportion_to_the_area() -> None:
    assert [paper_views(px) for px in (32, 224, 384, 448, 896)] == [4, 4, 6, 9, 36]
    assert paper_views(224) < paper_views(320) < paper_views(384) + 1


def test_steps_are_the_papers_methods_at_its_sizes_beside_mae() -> None:
    found = planned("--device cpu")
    cells = [row.cell for row in found.rows if row.group != MACHINE]
    assert [(row.about["name"], row.about["image_px"]) for row in found.rows if row.group != MACHINE] == [
        (name, px) for px in (224, 384, 448, 896) for name in ("lomar", "lomar-late", "mae", "beit")
    ]
    assert [row.about["name"] for row in found.rows if row.is_base] == 4 * ["mae"]
    views = {(c.method, c.image_size): c.view_count for c in map(composition, cells)}
    assert {px: views["lomar", px] for px in (224, 384, 448, 896)} == {224: 4, 384: 6, 448: 9, 896: 36}
    assert all(views["mae", px] == views["beit", px] == 1 for px in (224, 896))
    at_224 = {c.method: c for c in map(composition, cells) if c.image_size == 224}
    for name, c in at_224.items():  # what pretraining would build, but for the batch
        assert c == replace(RECIPES[name].composition(name), batch_size=2)
    beit = next(row for row in found.rows if row.about["name"] == "beit")
    assert beit.about["tokenizer_flops"] == tokenizer_flops((14, 14))
    assert beit.about["step_flops"] == 3 * forward_flops(at_224["beit"]).total + tokenizer_flops((14, 14))
    assert any("beit" in note and "OpenAI" in note for note in found.notes)


def test_the_flops_of_the_docs_are_those_of_the_recipes() -> None:
    """The table of docs/performance.md."""
    rows = planned("--device cpu").rows
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    for name in ("lomar", "lomar-late", "mae", "beit"):
        told = [f"{row.about['forward_flops'] / 1e9:.1f}" for row in rows if row.about["name"] == name]
        assert f"\n| {name} | {' | '.join(told)} |\n" in page, told


def test_a_method_may_be_changed_and_timms_be_the_yardstick() -> None:
    words = "--methods lomar lomar:position=none,mask-layer=3 timm-mae --image-sizes 224 --views 5 --compile both"
    rows = [row for row in planned(words).rows if row.group != MACHINE]
    assert [row.about["name"] for row in rows] == [
        name + ending
        for name in ("lomar", "lomar:position=none,mask-layer=3", "timm-mae")
        for ending in ("", ", compiled")
    ]
    assert [row.cell.compiled for row in rows] == 3 * [False, True]
    changed = composition(rows[2].cell)
    assert (changed.position, changed.mask_layer, changed.views) == ("none", 3, 5)
    assert rows[4].cell.values["of_timm"] and composition(rows[4].cell).method == "mae"
    assert [row.is_base for row in rows] == [True, True, False, False, False, False]  # no mae: the first


def test_methods_that_compare_views_are_those_that_pretraining_makes() -> None:
    """With its recipe's eight small crops, not the released run's ten."""
    found = planned("--methods dino mocov3 --image-sizes 224 448 --device cpu")
    rows = [row for row in found.rows if row.group != MACHINE]
    dino, _, large, _ = (composition_from(row.cell.values["composition"]) for row in rows)
    released = RECIPES["dino"].composition("dino")
    assert dino == replace(
        released,
        batch_size=2,
        local_crops=8,
        crop_scale=(0.4, 1.0),
        local_scale=(0.05, 0.4),
        teacher_temperature=(0.04, 0.04),
    )
    assert (large.local_size, large.head_outputs) == (192, 65536)
    for row in rows:
        c = composition_from(row.cell.values["composition"])
        assert row.about["step_flops"] == step_flops(c) and row.about["parameters"] == trained_parameters(c)
        assert row.about["window"] == 0
    assert [(row.about["views"], row.about["tokens"]) for row in rows[:2]] == [(10, 690), (2, 394)]
    assert [(row.cell.values["clip_grad"], row.cell.values["clip_each"]) for row in rows[:2]] == [
        (3.0, True),
        (0.0, False),
    ]
    assert any(note.startswith("Views and tokens of dino are those of all its crops") for note in found.notes)


def test_heads_and_small_crops_are_of_the_size_that_is_measured() -> None:
    words = "--methods dino dino:local_crops=3,head_width=70 --model 24x2x2 --image-sizes 56 --patch-size 8"
    plain, changed = (composition_from(row.cell.values["composition"]) for row in planned(words).rows[:2])
    assert (plain.local_size, plain.head_width, plain.head_outputs) == (24, 64, 256)
    assert (changed.local_size, changed.head_width, changed.local_crops) == (24, 70, 3)


def test_a_baseline_is_measured_too() -> None:
    rows = planned("--methods lomar --baseline timm-mae --image-sizes 224").rows
    assert [(row.about["name"], row.is_base) for row in rows if row.group != MACHINE] == [
        ("lomar", False),
        ("timm-mae", True),
    ]


def test_steps_are_compiled_where_pretraining_compiles_them() -> None:
    auto, yes = (planned(f"--methods lomar --image-sizes 224 --device cpu --compile {way}") for way in ("auto", "yes"))
    assert [found.rows[0].cell.compiled for found in (auto, yes)] == [False, True]
    assert {found.rows[0].about["name"] for found in (auto, yes)} == {"lomar"}
    assert "Compiled by torch.compile." in yes.notes and "Compiled by torch.compile." not in auto.notes


def test_without_its_tokenizer_beit_is_timed_alone() -> None:
    found = planned("--methods beit --image-sizes 224 --without-tokenizer")
    assert found.rows[0].cell.values["with_tokenizer"] is False and found.rows[0].about["tokenizer_flops"] == 0
    assert found.notes == ["A step of beit is without its tokenizer's forward pass."]


def test_windows_have_the_views_of_table_4() -> None:
    found = planned("windows --methods lomar")
    cells = [composition(row.cell) for row in found.rows if row.group != MACHINE]
    assert [(c.window_size, c.views) for c in cells] == [(5, 8), (7, 4), (9, 3), (11, 2), (14, 1)]
    assert [row.is_base for row in found.rows][:5] == [False, True, False, False, False]
    for c in cells:
        assert replace(c, mask_ratio=0.75, batch_size=4096) == replace(
            RECIPES[f"fig5-rpe-{c.window_size}"].composition("lomar"), method="lomar"
        )


def test_the_other_measures_have_their_rows(photos: Path) -> None:
    names = [row.about["name"] for row in planned("classifier --image-sizes 224").rows]
    assert names == 2 * ["timm", "lomar", "lomar, no positions"]
    attention = planned("attention --image-sizes 448 --batch-sizes 3 --device cpu").rows
    assert {row.group for row in attention} == {"27 x 50 tokens", "3 x 785 tokens"}
    assert {row.about["name"] for row in attention} >= {"no bias", "products"}
    processes = planned("processes --processes 1 2 4 --device cpu").rows
    assert [(row.cell.processes, row.cell.threads, row.is_base) for row in processes] == [
        (1, 1, True),
        (2, 1, False),
        (4, 1, False),
    ]
    loader = planned(f"loader --data {photos} --prepared {photos} --image-sizes 224").rows
    assert [row.is_base for row in loader] == [True] + [False] * (len(loader) - 1)
    assert loader[-1].about["name"] == "lomar, windows, prepared files"
    assert {row.about["precision"] for row in planned("products").rows} == {"fp32", "bf16"}


def test_without_torchvision_lomars_loader_stands_alone(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name))
    found = planned(f"loader --data {photos} --image-sizes 224")
    assert [row.about["name"] for row in found.rows] == ["lomar, windows"]
    assert any(note.startswith("torchvision is not installed (pip install torchvision)") for note in found.notes)


def test_table_json_and_picture_tell_the_given_times(lomar: Any, timed_as: Any, tmp_path: Path) -> None:
    timed_as(by_size)
    done = lomar(
        "benchmark --methods lomar mae --image-sizes 224 448 --batch-sizes 2 --device cpu --rounds 2 --out", tmp_path
    )
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "steps.json").read_text())
    assert done.out == (tmp_path / "steps.md").read_text()
    rows = {(row["method"], row["image_px"]): row for row in found["rows"] if row["group"] != MACHINE}
    assert len(rows) == 4
    side = found["rows"][-1]["side"]
    rate = product_flops(side) / 0.5
    for (method, px), row in rows.items():
        assert row["step_s"] == pytest.approx(px / 100 * (1 if method == "lomar" else 2))
        assert row["images_per_s"] == pytest.approx(2 / row["step_s"])
        assert row["s_per_image"] == pytest.approx(row["step_s"] / 2)
        assert row["peak_bytes"] == 1000 * px and row["peak_bytes_per_image"] == 500 * px
        ratio = 2.0 if method == "lomar" else 1.0
        assert (row["base"], row["ratio"]) == ("mae", {"median": ratio, "low": ratio, "high": ratio})
        assert row["time_of_smallest"] == pytest.approx(px / 224)
        assert row["utilisation"] == pytest.approx(row["step_flops"] * row["images_per_s"] / rate)
        assert [len(each["seconds"]) for each in row["rounds"]] == [3, 3] and row["failed"] == ""
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.out.splitlines() if line.startswith("| ")
    ]
    assert lines[0][:3] == ["method", "image", "batch"] and "images/s against mae" in lines[0]
    assert lines[1][:2] == ["lomar", "224 px"] and "2.00 (2.00 to 2.00)" in lines[1] and "2.24" in lines[1]
    assert len(lines) == 5
    for text in ("torch", "processor", "2026", "rounds"):
        assert text in json.dumps(found)
    assert found["command"].startswith("lomar benchmark --out ") and found["command"] in done.out
    assert found["command"].endswith(
        "--methods lomar mae --image-sizes 224 448 --batch-sizes 2 --device cpu --rounds 2"
    )
    assert Image.open(tmp_path / "figure-4.png").size[0] > 1000


def test_a_further_image_takes_what_a_larger_batch_takes_more(lomar: Any, timed_as: Any, tmp_path: Path) -> None:
    """A gigabyte, and 20 MB of each image."""
    timed_as(lambda cell: Measured([1.0], 10**9 + cell.images * 20 * 10**6))
    words = "benchmark --methods lomar mae --image-sizes 224 448 --batch-sizes 8 16 32 --device cpu --out"
    done = lomar(words, tmp_path)
    rows = [row for row in json.loads((tmp_path / "steps.json").read_text())["rows"] if "batch" in row]
    further = {row["batch"]: row.get("peak_bytes_per_further_image") for row in rows}
    assert len(rows) == 12 and further == {8: None, 16: 20e6, 32: 20e6}
    assert all(row["time_of_smallest"] == 1 for row in rows)
    assert "| a further image, MB |" in done.out
    assert "a further image" not in lomar("benchmark --methods lomar --image-sizes 224 --device cpu").out


def test_windows_are_drawn_as_figure_5(lomar: Any, timed_as: Any, tmp_path: Path) -> None:
    timed_as(by_size)
    done = lomar("benchmark windows --methods lomar --window-sizes 5 7 --device cpu --rounds 1 --out", tmp_path)
    assert done.status == 0 and (tmp_path / "figure-5-right.png").exists()
    assert "| 5x5 " in done.out and "images/s against 7x7" in done.out


def test_each_size_and_batch_has_a_curve_of_its_own(
    lomar: Any, timed_as: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    picture = ("picture.png", "window", lambda rows, path: drawn.extend(row["name"] for row in rows))
    monkeypatch.setitem(benchmark.PICTURES, "windows", picture)
    timed_as(by_size)
    words = "--methods lomar --window-sizes 5 7 --device cpu --rounds 1 --out"
    assert lomar("benchmark windows --image-sizes 224 448 --batch-sizes 1 2", words, tmp_path).status == 0
    assert list(dict.fromkeys(drawn)) == [f"lomar, {px} px, {batch} images" for px in (224, 448) for batch in (1, 2)]


def test_the_command_that_is_told_is_the_command(photos: Path) -> None:
    words = f"loader --data '{photos}' --image-sizes 224 448 --rounds 5"
    given = cli.parse("benchmark", shlex.split(words))
    again = shlex.split(command_line("benchmark", BenchmarkOptions, given))
    assert again[:2] == ["lomar", "benchmark"] and cli.parse("benchmark", again[2:]) == given
    assert (
        command_line("benchmark", BenchmarkOptions, {"without_tokenizer": True})
        == "lomar benchmark --without-tokenizer"
    )


def test_what_does_not_fit_in_memory_stands_in_the_table(lomar: Any, timed_as: Any, tmp_path: Path) -> None:
    def found(cell: Cell) -> Measured:
        if cell.work == "pretraining" and composition(cell).image_size == 448:
            raise CellError(OUT_OF_MEMORY)
        return by_size(cell)

    timed_as(found)
    done = lomar("benchmark --methods lomar --image-sizes 224 448 --device cpu --out", tmp_path)
    assert done.status == 0
    assert [OUT_OF_MEMORY in line for line in done.out.splitlines() if line.startswith("| lomar")] == [False, True]
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["failed"] for row in rows] == ["", OUT_OF_MEMORY, ""] and "step_s" not in rows[1]
    assert not (tmp_path / "figure-4.png").exists()  # one size alone is no curve


def test_what_fails_otherwise_is_told_with_status_1(lomar: Any, timed_as: Any) -> None:
    def found(cell: Cell) -> Measured:
        raise CellError("RuntimeError: no kernel")

    timed_as(found)
    done = lomar("benchmark products")
    assert done.status == 1 and "RuntimeError: no kernel" in done.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_measurement_leaves_what_it_has(
    number: signal.Signals, lomar: Any, timed_as: Any, tmp_path: Path
) -> None:
    count = 0

    def found(cell: Cell) -> Measured:
        nonlocal count
        count += 1
        if count == 6:  # in the second round of three rows and the machine
            signal.raise_signal(number)
        return by_size(cell)

    timed_as(found)
    done = lomar("benchmark --methods lomar mae lomar-late --image-sizes 224 --device cpu --out", tmp_path)
    assert done.status == 128 + number and "Traceback" not in done.err
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [len(row["rounds"]) for row in rows] == [1, 1, 1, 2]
    assert all(row.get("step_s") for row in rows) and done.out == (tmp_path / "steps.md").read_text()


def test_tiny_methods_are_really_measured(lomar: Any, in_this_process: None, tmp_path: Path) -> None:
    methods = "lomar lomar:mask_layer=1 mae timm-mae beit-lomar dino mocov3"
    words = f"benchmark --methods {methods} {TINY} --image-sizes 56 112"
    done = lomar(words, "--without-tokenizer --steps 2 --rounds 1 --out", tmp_path)
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert len(rows) == 15
    assert all(row["step_s"] > 0 for row in rows) and all(not row["failed"] for row in rows)
    assert (tmp_path / "figure-4.png").exists()
    assert len(done.err.splitlines()) == 17  # a heading, a line for each row, the picture


def test_files_and_loader_are_really_measured(lomar: Any, in_this_process: None, photos: Path) -> None:
    done = lomar(f"benchmark --methods lomar {TINY} --image-sizes 56 --steps 2 --rounds 1 --workers 0 --data", photos)
    assert done.status == 0, done.err
    done = lomar("benchmark loader --image-sizes 112 --steps 1 --rounds 1 --data", photos)
    assert done.status == 0 and "8 files a pass" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stps", "there is no measure 'stps' (did you mean steps?); it can be steps, windows, "),
        ("--methods lomer", "--methods: there is no method 'lomer' (did you mean lomar?); `lomar recipes` lists them"),
        ("--methods lomar:mask_leyer=3", "--methods lomar:mask_leyer=3: 'mask_leyer=3' is no change of a method"),
        ("--methods lomar:views=x", "--methods lomar:views=x: --views is 'x'; it must be a whole number, at least 1"),
        ("--methods lomar:epochs=3", "--methods lomar:epochs=3: 'epochs=3' is no change of a method"),
        ("--methods timm-mae:views=2", "--methods timm-mae:views=2: timm-mae cannot be changed"),
        ("--baseline nothing", "--baseline: there is no method 'nothing'"),
        ("--model bsae", "--model 'bsae' is no size; "),
        ("--image-sizes 230", "--image-sizes 230 is not a multiple of the patch side, 16 px; 224 would be"),
        ("--methods lomar --image-sizes 64", "lomar at 64 px: --window-size 7 is larger than the 4x4 grid of patches"),
        (
            "--methods lomar:mask_layer=12",
            "lomar:mask_layer=12 at 224 px: --mask-layer is 12; --model base has blocks 0 to 11",
        ),
        ("windows --methods mae", "--methods mae has no windows, whose size could be measured"),
        ("windows --methods dino", "--methods dino has no windows, whose size could be measured"),
        ("--methods dino:mask_ratio=0.5", "--methods dino:mask_ratio=0.5: 'mask_ratio=0.5' is no change of a method"),
        ("--methods mocov3:local_crops=2", "--methods mocov3:local_crops=2: 'local_crops=2' is no change of a method"),
        ("--methods mocov3 --batch-sizes 1 --image-sizes 224", "mocov3 at 224 px: --batch-size is 1; mocov3 compares"),
        ("loader", "--data is missing: the images to load"),
        ("loader --data sample --image-sizes 96", "--image-sizes 96 is less than a window; it must be at least 112"),
        ("--data nowhere", "--data nowhere: no such folder or file"),
        ("classifier --methods lomar", "--methods is for steps and windows and processes, not for classifier"),
        ("--processes 2", "--processes is for processes, not for steps"),
        ("--device tpu", "--device is 'tpu'; it can be auto, cpu, cuda"),
        ("--compile maybe", "--compile is 'maybe'; it can be auto, no, yes, both"),
        ("--rounds 0", "--rounds is '0'; it must be a whole number, at least 1"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_timed(words: str, message: str, lomar: Any, timed_as: Any) -> None:
    def found(cell: Cell) -> Measured:
        raise AssertionError("measured")

    timed_as(found)
    done = lomar(f"benchmark {words}")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"lomar: error: {message}") and done.err.count("\n") == 1


def test_a_folder_that_cannot_be_written_shows_before_the_work(lomar: Any, timed_as: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    timed_as(by_size)
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        done = lomar("benchmark products --out", out)
        assert done.status == 2 and done.err.startswith(f"lomar: error: --out {out} "), done.err
        assert done.err.count("\n") == 1
