"""Claims about reading a run's folder, in whatever state it is."""

import json
import os
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs_made import CONFIG, FINETUNE, course, judged, make_run

from lomar.errors import UserError
from lomar.figures.charts import charts_of
from lomar.reporting.facts import key_results
from lomar.reporting.hints import hints_on
from lomar.reporting.page import Shown, render
from lomar.reporting.reading import UNKNOWN, read_run

LOG = """\
2026-01-02 03:04:05  INFO     lomar 0.0.9, options in /run/config.yaml
2026-01-02 03:04:05  INFO     versions: python 3.11.2, torch 2.11.0
2026-01-02 03:04:05  INFO     hardware: old, 1 cores a process
2026-01-02 04:00:00  INFO     lomar 0.1.0, options in /run/config.yaml
2026-01-02 04:00:00  INFO     versions: python 3.12.1, torch 2.14.0+cpu
2026-01-02 04:00:00  INFO     hardware: AMD EPYC, 2 cores a process
2026-01-02 04:05:00  INFO     the loss is not finite at step 7; its batch holds a.png; back to step 5 with half
2026-01-02 05:00:00  INFO     step 200/200  epoch 2.00
"""


def lock(folder: Path, process: int, host: str = socket.gethostname()) -> None:
    (folder / ".lock").write_text(f"process {process} on {host}\n")


def ended_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_whole_run_is_read(tmp_path: Path) -> None:
    bad = "a.png\tcut short\nb.png\tno image\n"
    run = read_run(make_run(tmp_path / "run", judged([0.4, 0.5]), log=LOG, bad=bad))
    assert (run.kind, run.state, run.name) == ("pretrain", "finished", "run")
    assert (run.total_steps, run.last_step, run.images) == (200, 200, 5000)
    assert run.points("knn_top1") == [(0, 0.3), (100, 0.4), (200, 0.5)]
    assert (run.lomar, run.versions) == ("0.1.0", [("python", "3.12.1"), ("torch", "2.14.0+cpu")])
    assert (run.hardware, run.sittings) == ("AMD EPYC, 2 cores a process", 2)
    assert (str(run.begun), str(run.heard)) == ("2026-01-02 03:04:05", "2026-01-02 05:00:00")
    assert run.bad_files == [("a.png", "cut short"), ("b.png", "no image")]
    assert len(run.non_finite) == 1 and not run.troubles


def test_the_length_of_a_run_of_epochs_is_as_the_commands_work_it_out(tmp_path: Path) -> None:
    rows = [{"step": step, "epoch": round(step * 64 / 9469, 6), "loss": 1.0} for step in range(1, 149)]
    config = CONFIG | {"max_steps": None, "epochs": 1.0, "batch_size": 64}
    run = read_run(make_run(tmp_path, rows, config))
    assert (run.images, run.total_steps, run.state) == (9469, 148, "finished")
    assert read_run(make_run(tmp_path, rows[:-1], config)).state == "interrupted"


def test_a_run_is_running_while_the_process_that_holds_its_lock_lives(tmp_path: Path) -> None:
    run = make_run(tmp_path, course()[:50])
    assert read_run(run).state == "interrupted"
    lock(run, os.getpid())
    assert read_run(run).state == "running"
    lock(run, ended_process())  # as kill -9 leaves it
    assert read_run(run).state == "interrupted"
    (run / ".lock").write_text("")
    assert read_run(run).state == "interrupted"


def test_of_a_run_on_another_machine_the_age_of_its_rows_decides(tmp_path: Path) -> None:
    run = make_run(tmp_path, course()[:50])
    lock(run, 1, host="elsewhere")
    assert read_run(run).state == "running"
    os.utime(run / "metrics.jsonl", (0, 0))
    assert read_run(run).state == "interrupted"


def test_reading_changes_nothing_in_the_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", course(), log=LOG)
    lock(run, os.getpid())
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*")}
    read_run(run)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*")} == before


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.data())
def test_any_truncation_of_the_metrics_is_read_and_rendered(tmp_path: Path, cut: st.DataObject) -> None:
    rows = judged([0.31, 0.4, 0.5, 0.6], steps=40)
    run = make_run(tmp_path, rows)
    whole = (run / "metrics.jsonl").read_bytes()
    kept = cut.draw(st.integers(0, len(whole)))
    (run / "metrics.jsonl").write_bytes(whole[:kept])
    read = read_run(run)
    # Every whole line is there; behind the last newline there may be one more that happens to be whole.
    complete = whole[:kept].count(b"\n")
    assert len(read.rows) in (complete, complete + 1)
    assert read.rows == rows[: len(read.rows)]
    assert "</html>" in render([read], [hints_on(read)], [Shown()], [], None, made=_now())


def _now() -> datetime:
    return datetime(2026, 1, 2)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["loss", "lr", "grad_norm", "images_per_s", "data_wait", "epoch", "knn_top1", "elapsed_s"]),
            st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.floats(), st.integers(), st.just([1])),
        ),
        max_size=60,
    ),
    config=st.dictionaries(st.sampled_from(list(CONFIG)), st.one_of(st.none(), st.text(max_size=3), st.floats())),
)
def test_rows_and_options_of_any_kind_are_read_and_rendered(tmp_path: Path, rows: list, config: dict) -> None:
    """What a damaged disk or a hand leaves: numbers of any size, words, nothing."""
    run = make_run(tmp_path, [{"step": number, **row} for number, row in enumerate(rows)], config)
    assert "</html>" in render([read_run(run)], [hints_on(read_run(run))], [Shown()], [], None, made=_now())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"\xff\xfe: ["),
        ("config.yaml", b"- 1\n- 2\n"),
        ("config.yaml", b"[" * 500),
        ("train.log", b"\xff\x00\n2026-99-02 03:04:05  INFO     lomar 0.1.0, options in x\n"),
        ("bad_files.txt", b"\xff\tx\nno tab\nhalf a li"),
        ("metrics.jsonl", b'\xff\n[1]\n{}\n{"step": "x"}\n{"step": 1}\n'),
        (".lock", b"\xff process"),
        (".lock", b"process 99999999999999999999 on " + socket.gethostname().encode()),
    ],
)
def test_a_damaged_file_costs_what_it_holds_alone(tmp_path: Path, name: str, content: bytes) -> None:
    run = make_run(tmp_path, course()[:50], log=LOG)
    (run / name).write_bytes(content)
    read = read_run(run)
    assert read.kind == (UNKNOWN if name == "config.yaml" else "pretrain")
    assert "</html>" in render([read], [hints_on(read)], [Shown()], [], None, made=_now())


def test_each_command_is_known_by_its_options(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path / "a", course(), FINETUNE)).kind == "finetune"
    assert read_run(make_run(tmp_path / "b", course(), CONFIG | {"of_a_later_version": 1})).kind == "pretrain"
    assert read_run(make_run(tmp_path / "c", course(), None)).kind == UNKNOWN
    probe = make_run(tmp_path / "d", course()[:5], {"model": "x", "data": "y", "protocol": "fast", "base_lrs": [0.1]})
    assert (read_run(probe).kind, read_run(probe).state) == ("probe", "interrupted")
    (probe / "probe.json").write_text(json.dumps({"chosen": {"val": {"top1": 0.5}}}))
    assert read_run(probe).state == "finished"


def test_a_tokenizer_is_named_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in course(20)))
    (tmp_path / "t.safetensors.partial").mkdir()
    run = read_run(tmp_path / "t.safetensors")
    assert (run.kind, run.state, run.last_step) == ("tokenizer train", "interrupted", 20)
    (tmp_path / "t.safetensors.partial").rmdir()
    (tmp_path / "t.safetensors").write_bytes(b"")
    assert read_run(tmp_path / "t.safetensors").state == "finished"


def test_what_is_no_run_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "lonely.safetensors").write_bytes(b"")
    for name, message in {
        "missing": f"there is no run {tmp_path / 'missing'}",
        "empty": "is not the folder of a run: it holds neither config.yaml nor metrics.jsonl",
        "file.txt": "is a file; a report is of a run's folder",
        "lonely.safetensors": "is a file; a report is of a run's folder",
    }.items():
        with pytest.raises(UserError, match=message):
            read_run(tmp_path / name)


def test_pictures_are_found_by_their_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, course())
    (run / "figures").mkdir()
    for name in ("reconstruction.png", "reconstruction-0000200.png", "reconstruction-0000000.png", "curves.png"):
        (run / "figures" / name).write_bytes(b"")
    assert list(read_run(run).drawn) == [0, 200]


def test_every_option_of_a_real_configuration_tells_its_command(finished_run: Path) -> None:
    run = read_run(finished_run)
    assert (run.kind, run.state, run.images, run.total_steps) == ("pretrain", "finished", 8, 4)
    assert set(run.config) == set(yaml.safe_load((finished_run / "config.yaml").read_text()))
    assert dict(run.versions)["torch"] and "cores" in run.hardware and run.sittings == 1
    assert list(run.drawn) == [0, 4]


def test_what_cannot_be_read_or_reckoned_with_costs_itself_alone(tmp_path: Path) -> None:
    rows = course(20)
    rows[-1]["epoch"], rows[3]["loss"], rows[4]["data_wait"], rows[5]["data_wait"] = 5e-324, 10**400, 1.7e308, 1.7e308
    record = read_run(make_run(tmp_path / "run", rows))
    assert len(record.values("loss")) == 19 and key_results(record) and charts_of({"run": record.rows})
    hints_on(record)
    broken = make_run(tmp_path / "broken", [])
    (broken / "metrics.jsonl").unlink()
    (broken / "metrics.jsonl").mkdir()
    (broken / "config.yaml").touch()
    assert any("metrics.jsonl cannot be read" in trouble for trouble in read_run(broken).troubles)
