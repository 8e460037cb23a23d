"""Claims about what a run leaves behind after a kill, and what it shows in and out of a terminal."""

import io
import json
import logging
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lomar.training.records import Display, Metrics, TensorBoard, close_log, open_log, progress_line


def row(step: int, **values: Any) -> dict[str, Any]:
    """A training row as the loop writes it."""
    usual = {"epoch": step / 79, "loss": 0.8123, "lr": 4.5e-4, "grad_norm": 1.21}
    return {"step": step, **usual, "images_per_s": 183.0, "data_wait": 0.04, **values}


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, force_interactive=terminal, width=60)


def text_of(where: Console) -> str:
    assert isinstance(where.file, io.StringIO)
    return where.file.getvalue()


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    rows = [row(1, loss=0.1 + 0.2), row(2), {"step": 2, "knn_top1": 0.351}]
    metrics.write(rows[:2])
    metrics.write(rows[2:])
    assert Metrics.read(path) == rows
    assert path.read_bytes().count(b"\n") == 3


def test_every_line_is_strict_json_even_when_the_loss_is_not_a_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Metrics(path).write([row(1, loss=math.nan, grad_norm=math.inf)])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read["loss"] is None and read["grad_norm"] is None and read["lr"] == 4.5e-4


def test_a_value_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(TypeError):
        Metrics(path).write([row(1), row(2, loss=object())])
    assert Metrics.read(path) == []


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write([{"step": 1, "loss": 1.0}])
    before = metrics.path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limit[1]))  # so a write is cut, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            metrics.write([{"step": 2, "loss": 2.0}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert metrics.path.read_bytes() == before
    metrics.write([{"step": 2, "loss": 2.0}])
    assert [row["step"] for row in Metrics.read(metrics.path)] == [1, 2]


def test_cutting_keeps_what_came_before_the_checkpoint_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write([{"step": 0, "knn_top1": 0.351}, row(1), row(2), {"step": 2, "knn_top1": 0.4}])
    before = path.read_bytes()
    metrics.write([row(3), row(4)])
    Metrics.cut(path, after_step=2)
    assert path.read_bytes() == before
    metrics.write([row(3)])
    assert [each["step"] for each in Metrics.read(path)] == [0, 1, 2, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_a_checkpoint_only_the_evaluation_of_step_0_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Metrics(path).write([{"step": 0, "knn_top1": 0.351}, row(1), row(2)])
    Metrics.cut(path, after_step=0)
    assert Metrics.read(path) == [{"step": 0, "knn_top1": 0.351}]


@pytest.mark.parametrize("torn", [b'{"step": 3, "los', b'{"step"', b"3", b"[]", b"\x00\x00\xff", b'{"step": null}'])
def test_a_torn_last_line_is_passed_over_and_cut_away(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write([row(1), row(2)])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert Metrics.read(path) == [row(1), row(2)]
    Metrics.cut(path, after_step=5)
    assert path.read_bytes() == whole
    metrics.write([row(3)])
    assert Metrics.read(path) == [row(1), row(2), row(3)]


def test_a_last_line_that_lacks_only_its_newline_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write([row(1)])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    Metrics.cut(path, after_step=1)
    metrics.write([row(2)])
    assert Metrics.read(path) == [row(1), row(2)]


def test_a_run_killed_before_its_first_row_can_be_cut_and_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Metrics.cut(path, after_step=0)
    assert Metrics.read(path) == []
    assert not path.exists()


def test_a_failed_cut_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    Metrics(path).write([row(1), row(2)])

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        Metrics.cut(path, after_step=1)
    assert Metrics.read(path) == [row(1), row(2)]


def test_the_line_names_every_number() -> None:
    line = progress_line(row(120, epoch=1.52), total_steps=800, eta_s=192)
    assert line == ("step 120/800  epoch 1.52  loss 0.8123  lr 4.5e-04  grad 1.21  183 img/s  wait  4%  eta 0:03:12")
    assert "step   7/800" in progress_line(row(7), 800, 1)
    assert progress_line(row(7), 800, 27 * 3600 + 3 * 60 + 12).endswith("eta 27:03:12")
    assert progress_line(row(7, loss=math.nan), 800, math.nan).endswith("eta ?")


def test_a_pipe_gets_one_unfolded_line_every_log_every_steps_and_one_for_the_last() -> None:
    where = console(terminal=False)
    with Display(log_every=4, console=where) as display:
        display.start(total_steps=10, first_step=0)
        for step in range(1, 11):
            display.step(row(step), eta_s=10 - step)
    lines = text_of(where).splitlines()
    assert [line.split("  epoch")[0] for line in lines] == ["step  4/10", "step  8/10", "step 10/10"]
    assert all(len(line) > 60 and "\x1b" not in line for line in lines)


def test_a_terminal_shows_a_bar_and_messages_above_it() -> None:
    where = console(terminal=True)
    with Display(log_every=100, console=where) as display:
        display.start(total_steps=10, first_step=3)
        display.step(row(4), eta_s=6)
        display.say("saved [bold]checkpoint[/bold] 4")
    shown = text_of(where)
    assert "━" in shown and "step  4/10" in shown
    assert "saved [bold]checkpoint[/bold] 4" in shown  # as written: no markup
    assert shown.index("saved") < shown.rindex("step  4/10")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is given back


def test_a_terminal_has_its_cursor_back_after_an_error() -> None:
    where = console(terminal=True)
    with pytest.raises(RuntimeError), Display(log_every=1, console=where) as display:
        display.start(total_steps=10, first_step=0)
        raise RuntimeError("out of memory")
    assert "\x1b[?25h" in text_of(where)


@pytest.mark.parametrize("terminal", [False, True])
def test_other_processes_show_and_log_nothing(tmp_path: Path, terminal: bool) -> None:
    open_log(tmp_path)
    where = console(terminal)
    with Display(log_every=1, enabled=False, console=where) as display:
        display.start(total_steps=2, first_step=0)
        display.step(row(1), eta_s=1)
        display.say("hello")
    close_log()
    assert text_of(where) == ""
    assert (tmp_path / "train.log").read_text() == ""


def test_the_log_has_the_lines_and_the_messages_with_their_time(tmp_path: Path) -> None:
    open_log(tmp_path)
    display = Display(log_every=2, console=console(terminal=True))
    display.start(total_steps=3, first_step=0)
    for step in (1, 2, 3):
        display.step(row(step), eta_s=0)
    display.say("done: 100 %")
    display.stop()
    display.stop()
    logging.getLogger("lomar.data").warning("one file is damaged")
    close_log()
    said = [line.split("  ", 1) for line in (tmp_path / "train.log").read_text().splitlines()]
    assert [what.split(None, 1)[1][:8] for _, what in said] == ["step 2/3", "step 3/3", "done: 10", "one file"]
    assert all(len(when) == len("2026-01-31 12:00:00") for when, _ in said)


def test_each_run_of_a_process_has_its_own_log(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    open_log(tmp_path / "a").info("first")
    logger = open_log(tmp_path / "b")
    logger.info("second")
    close_log()
    logger.info("nowhere")
    assert "second" not in (tmp_path / "a" / "train.log").read_text()
    assert (tmp_path / "b" / "train.log").read_text().count("\n") == 1
    assert not [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]


def test_tensorboard_shows_the_numbers_and_hides_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, after_step=-1)
    board.write([{"step": 0, "knn_top1": 0.25}, row(1), row(2, loss=7.0), row(3, loss=9.0)])
    board.close()
    board = TensorBoard(tmp_path, after_step=1)
    board.write([row(2, loss=0.5, grad_norm=None)])
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("knn_top1")] == [(0, 0.25)]
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [(1, 0.8123), (2, 0.5)]
    assert [e.step for e in events.Scalars("grad_norm")] == [1]
    assert "step" not in events.Tags()["scalars"]


def test_records_does_not_load_tensorboard() -> None:
    code = "import sys, lomar.training.records; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
