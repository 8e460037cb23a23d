"""Claims about `lomar report`: one file of a run in any state, made without touching the run."""

import base64
import io
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs_made import CONFIG, FINETUNE, course, judged, make_run

import lomar as package
from lomar.commands import detect, finetune, pretrain, probe, report_model
from lomar.commands.report import REPORT_FILE
from lomar.errors import UserError

Command = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("miniature")


def pictures_of(page: str) -> list[Image.Image]:
    """The pictures of a page that are no charts."""
    found = re.findall(r'src="data:image/(?:jpeg|png);base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB") for each in found]


def section(page: str, name: str) -> str:
    return page.split(f'<h2 id="{name}">')[1].split("<h2 ")[0]


def files_of(run: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without curves: most of the time of one of a small run."""
    monkeypatch.setattr("lomar.commands.report.charts_of", lambda runs: [])


@pytest.fixture(scope="module")
def reported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a real run, as `lomar report` makes it."""
    out = tmp_path_factory.mktemp("reported") / "page.html"
    before = files_of(finished_run)
    assert package.report(run=finished_run, out=out, samples=8) == out
    assert files_of(finished_run) == before
    return out.read_text()


def test_the_report_of_a_real_run_has_every_section(reported: str) -> None:
    ids = re.findall(r'<h2 id="([\w-]+)">', reported)
    wanted = "summary curves over-time ratios attention map configuration versions bad-files log"
    assert ids == wanted.split()
    assert "could not be drawn" not in reported
    assert len(reported) < 1_500_000


def test_reconstructions_over_time_show_the_same_images_at_each_evaluation(reported: str) -> None:
    over_time = section(reported, "over-time")
    assert re.findall(r"<figcaption>([^<]+)</figcaption>", over_time) == [
        "original",
        "masked",
        "step 0",
        "step 4",
    ]
    sizes = {picture.size for picture in pictures_of(over_time)}
    assert len(sizes) == 1


def test_reconstructions_are_drawn_at_each_ratio(reported: str) -> None:
    titles = re.findall(r"<figcaption>([^<]+)</figcaption>", section(reported, "ratios"))
    assert titles == ["window", "50% hidden", "60% hidden", "70% hidden", "80% hidden", "90% hidden"]


def test_the_map_and_the_attention_are_of_the_runs_own_images(reported: str) -> None:
    assert "6 images that train or vote" in section(reported, "map")  # two that judge are too few for a map
    assert "framed by 2 classes" in section(reported, "map")
    assert "over 8 images that the run trains on" in section(reported, "attention")


def test_the_terminal_tells_the_hints_and_where_the_page_is(lomar: Command, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    done = lomar("report", run, "--no-model")
    assert done.status == 0, done.err
    assert "run: note: 8 images, each seen 2 times, are few" in done.out
    assert f"{run / 'report.html'}: " in done.out and (run / "report.html").stat().st_size > 10_000
    assert done.err == ""


@pytest.mark.parametrize("files", [pretrain.RUN_FILES, finetune.RUN_FILES, detect.RUN_FILES, probe.PROBE_FILES])
def test_overwrite_deletes_the_report_with_the_run_it_is_of(files: tuple[str, ...]) -> None:
    assert REPORT_FILE in files


def test_without_the_model_torch_is_not_loaded(finished_run: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from lomar.cli import main
status = main(["report", {str(finished_run)!r}, "--no-model", "--out", {str(tmp_path / "page.html")!r}])
sys.exit(f"status {{status}}, torch loaded" if status or "torch" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'id="over-time"' in (tmp_path / "page.html").read_text()


@pytest.mark.usefixtures("no_charts")
def test_a_run_that_goes_on_is_read_and_not_touched(lomar: Command, finished_run: Path, tmp_path: Path) -> None:
    """Its lock is held, its last row half-written, its weights there."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    rows = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(rows[: rows[:-1].rindex(b"\n") + 20])
    (run / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    before = files_of(run)
    done = lomar("report", run, "--out", tmp_path / "page.html", "--samples", "0", "--mask-ratios", "0.5")
    assert done.status == 0, done.err
    assert files_of(run) == before
    page = (tmp_path / "page.html").read_text()
    assert "still running: step 3 of 4" in page and 'id="map"' not in page
    assert "50% hidden" in section(page, "ratios")


@pytest.mark.usefixtures("no_charts")
def test_a_real_run_is_reported_while_it_goes(spawn: Any, lomar: Command, tmp_path: Path) -> None:
    going = spawn(tmp_path / "run", "--max-steps", "400", "--checkpoint-steps", "5")
    going.wait_for_rows(8)
    done = lomar("report", tmp_path / "run", "--out", tmp_path / "page.html", "--samples 0 --mask-ratios 0.5")
    assert done.status == 0, done.err
    page = (tmp_path / "page.html").read_text()
    assert "still running: step" in page and "of 400" in page and "could not be drawn" not in page
    assert going.process.is_alive()


def test_two_runs_stand_side_by_side(lomar: Command, finished_run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", judged([0.4, 0.5]), CONFIG | {"base_lr": 0.5})
    done = lomar("report", finished_run, other, "--out", tmp_path / "page.html", "--no-model")
    assert done.status == 0, done.err
    page = (tmp_path / "page.html").read_text()
    assert "<h1>run and other</h1>" in page and "--base-lr" in section(page, "comparison")
    assert "The run has not drawn any yet." in section(page, "over-time")
    assert "over time" in section(page, "curves")


@pytest.mark.usefixtures("no_charts")
def test_what_cannot_be_drawn_is_a_sentence(lomar: Command, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"^(data|eval_data): .*$", r"\1: /nowhere/photos", config, flags=re.M))
    (run / "figures" / "reconstruction-0000000.png").write_bytes(b"no picture")
    assert lomar("report", run, "--out", tmp_path / "page.html").status == 0
    page = (tmp_path / "page.html").read_text()
    for name in ("ratios", "attention", "map"):
        assert "This could not be drawn: --" in section(page, name), name
        assert "/nowhere/photos: no such folder or file" in section(page, name)
    assert "step 4" in section(page, "over-time") and "step 0<" not in section(page, "over-time")


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "no memory is left for it"),
        (RuntimeError("CUDA out of memory: tried to allocate"), "no memory is left for it"),
        (KeyError("x"), "KeyError: "),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_whatever_fails_costs_its_section_alone(
    error: Exception, said: str, lomar: Command, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    for name in ("_ratios", "_attention", "_map"):
        monkeypatch.setattr(report_model, name, fail)
    assert lomar("report", finished_run, "--out", tmp_path / "page.html").status == 0
    page = (tmp_path / "page.html").read_text()
    assert all(f"This could not be drawn: {said}" in section(page, name) for name in ("ratios", "attention", "map"))


@pytest.mark.usefixtures("no_charts")
def test_images_on_a_network_are_not_asked_for(lomar: Command, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    config = (run / "config.yaml").read_text()
    address = "https://example.invalid/{00..09}.tar"
    (run / "config.yaml").write_text(re.sub(r"^(data|eval_data): .*$", rf"\1: {address}", config, flags=re.M))
    assert lomar("report", run, "--out", tmp_path / "page.html").status == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("which a report does not ask; --images names some here") == 3


@pytest.mark.usefixtures("no_charts")
def test_images_can_be_named(lomar: Command, finished_run: Path, photos: Path, tmp_path: Path) -> None:
    done = lomar("report", finished_run, "--out", tmp_path / "page.html", "--images", photos / "red")
    assert done.status == 0, done.err
    page = (tmp_path / "page.html").read_text()
    assert f"over 4 images of {photos / 'red'}" in section(page, "attention")
    assert f"4 images of {photos / 'red'}" in section(page, "map")


@pytest.mark.usefixtures("no_charts")
def test_a_classifier_has_its_results_and_its_map(
    lomar: Command, finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    words = "--epochs 2 --batch-size 4 --micro-batch 4 --workers 0 --device cpu --precision fp32 --auto-augment none"
    made = lomar("finetune", "--model", finished_run, "--data", photos, "--out", tmp_path / "run", words)
    assert made.status == 0, made.err
    done = lomar("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert done.status == 0, done.err
    page = (tmp_path / "page.html").read_text()
    assert "could not be drawn" not in page
    assert "Confusion matrix" in section(page, "results") and "<td>red</td>" in section(page, "results")
    assert "framed by 2 classes" in section(page, "map") and "The best classifier&#39;s" in section(page, "map")
    assert "patches look in the encoder" in section(page, "attention")
    assert 'id="over-time"' not in page and 'id="ratios"' not in page


@pytest.mark.usefixtures("no_charts")
def test_folders_of_other_commands_are_told_as_far_as_they_have_rows(lomar: Command, tmp_path: Path) -> None:
    detect = {"model": "/run", "data": "/coco", "framework": "vitdet", "annotations": None, "max_steps": 200}
    judged_ap = judged([0.1, 0.2, 0.3], "box_ap", start=None)
    make_run(tmp_path / "detect", judged_ap, detect | {"batch_size": 50, "lr": 1e-4, "dry_run": False, "mask": True})
    make_run(tmp_path / "finetune", course(), FINETUNE)
    make_run(tmp_path / "nothing", config=None)
    for name, told in {
        "detect": "Box AP",
        "finetune": "lomar finetune",
        "nothing": "There is no configuration",
    }.items():
        done = lomar("report", tmp_path / name)
        assert done.status == 0, done.err
        assert told in (tmp_path / name / "report.html").read_text()


@pytest.mark.usefixtures("no_charts")
def test_a_tokenizers_report_lies_beside_its_file(lomar: Command, tmp_path: Path) -> None:
    make_run(tmp_path / "x", course())
    (tmp_path / "x" / "metrics.jsonl").rename(tmp_path / "t.jsonl")
    (tmp_path / "t.safetensors").write_bytes(b"")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "t.png")
    done = lomar("report", tmp_path / "t.safetensors")
    assert done.status == 0, done.err
    page = (tmp_path / "t-report.html").read_text()
    assert "A tokenizer keeps no configuration beside itself." in page and "What is kept" in section(page, "results")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "RUN is missing: the folder of a run; see lomar report --help"),
        ("missing", "there is no run missing"),
        ("{empty}", "{empty} is not the folder of a run: it holds neither config.yaml nor metrics.jsonl"),
        ("{run} {empty}", "{empty} is not the folder of a run: it holds neither config.yaml nor metrics.jsonl"),
        ("{run} --out page.txt", "--out is page.txt; it must end in .html"),
        ("{run} --out {run}/config.yaml/page.html --no-model", "--out {run}/config.yaml/page.html cannot be written"),
        ("{run} {run} {run}", "there is no option {run}"),
        ("{run} --samples -1", "--samples is '-1'; it must be a whole number, at least 0"),
        ("{run} --mask-ratios 1.5", "--mask-ratios is '1.5'; it must be a number, above 0 and below 1"),
        ("{run} --imges x", "there is no option --imges (did you mean --images?)"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words: str, message: str, lomar: Command, tmp_path: Path) -> None:
    run, empty = make_run(tmp_path / "run", course(20)), tmp_path / "empty"
    empty.mkdir()
    done = lomar("report", *words.format(run=run, empty=empty).split())
    assert done.status == 2
    assert done.err.startswith(f"lomar: error: {message.format(run=run, empty=empty)}") and done.err.count("\n") == 1


def test_from_python_a_mistake_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no option 'runn'"):
        package.report(runn=str(tmp_path))
