"""Claims about how cells are run: once each, in order, by several at a time, and what becomes of those that fail."""

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lomar.files import LOCK_FILE, only_writer
from lomar.study import queue as queue_file
from lomar.study.cells import RESULT, Setup, Step
from lomar.study.grids import Entry, Sizes
from lomar.study.plan import Job, Plan
from lomar.study.queue import LOG_FILE, Children, Queue, in_turn


def setup_in(out: Path) -> Setup:
    return Setup(out, "16x3x2", 56, 8, 4, 1, 4, 0, {"device": "cpu"}, out / "tokenizer.safetensors")


class Recorder:
    """Runs nothing; remembers what was asked, and by how many at a time."""

    def __init__(self, fails: Callable[[Sequence[str]], bool] = lambda words: False) -> None:
        self.words: list[list[str]] = []
        self.places: list[Mapping[str, str]] = []
        self.fails = fails
        self.most = self.now = 0
        self._lock = threading.Lock()

    def __call__(self, words: Sequence[str], log: Path, place: Mapping[str, str]) -> tuple[int, int]:
        with self._lock:
            self.words.append(list(words))
            self.places.append(place)
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.02)
        with self._lock:
            self.now -= 1
        log.parent.mkdir(parents=True, exist_ok=True)
        if self.fails(words):
            log.write_text("some lines\nlomar: error: the reason\n")
            return 2, 0
        if words[0] == "tokenizer":
            (log.parent.parent / "tokenizer.safetensors").touch()
        return 0, 12_345


def fake_steps(job: Job, setup: Setup) -> list[Step]:
    """Two steps for a choice, one more to the end."""
    found = {"held_out": job.cell.base_lr, "images_per_s": 100.0}
    names = ["pretraining", "probe"] + ["knn"] * job.chosen
    return [Step(name, [name, job.cell.name], lambda: dict(found)) for name in names]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_file, "steps", fake_steps)
    monkeypatch.setattr(queue_file, "ASK_AGAIN_S", 0.05)


def made(
    out: Path, run: Any, entries: Sequence[Entry] = (Entry("mae", "mae"), Entry("lomar", "lomar")), **more: Any
) -> Queue:
    plan = Plan(entries, Sizes(56, 8, 3), 1, (1e-3, 2e-3), (0, 1))
    values: dict[str, Any] = {"tokenizer": [], "say": lambda text: None, "done": lambda: None}
    return Queue(plan=plan, setup=setup_in(out), run=run, stopping=threading.Event(), **values | more)


def test_every_command_runs_once_and_what_it_left_is_kept(tmp_path: Path) -> None:
    run, told = Recorder(), []
    queue = made(tmp_path, run, done=lambda: told.append(1))
    queue.work([{"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2"}])
    assert len(run.words) == len({tuple(words) for words in run.words}) == len(told)
    assert run.most == 2 and {place["OMP_NUM_THREADS"] for place in run.places} == {"1", "2"}
    assert len(queue.found()) == 6  # two rates and a second seed, of two rows
    cell = queue.found()["lomar,epochs=1,lr=0.002,seed=1"]
    assert cell["knn"]["command"] == "lomar knn lomar,epochs=1,lr=0.002,seed=1" and cell["knn"]["peak_bytes"] == 12_345
    assert cell["cell"]["base_lr"] == 2e-3
    assert "knn" not in queue.found()["lomar,epochs=1,lr=0.001,seed=0"]
    assert queue.remaining() == []


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    made(tmp_path, Recorder()).work([{}])
    again = Recorder()
    made(tmp_path, again).work([{}])
    assert again.words == []


def test_a_study_that_was_stopped_goes_on_with_the_command_it_was_at(tmp_path: Path) -> None:
    first = Recorder()
    queue = made(tmp_path, first)
    first.fails = lambda words: bool(len(first.words) == 4 and not queue.stopping.set())
    queue.work([{}])
    assert len(first.words) == 4 and not queue.failed
    second = Recorder()
    made(tmp_path, second).work([{}])
    assert second.words[0] == first.words[-1]
    assert len(first.words) - 1 + len(second.words) == 16


def test_a_cell_that_fails_is_told_of_with_its_last_line_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    run = Recorder(fails=lambda words: words[1].startswith("mae,epochs=1,lr=0.001"))
    queue = made(tmp_path, run, say=said.append)
    queue.work([{}])
    name = "mae,epochs=1,lr=0.001,seed=0"
    assert list(queue.failed) == [name]
    assert queue.failed[name] == f"lomar: error: the reason (see {tmp_path / 'cells' / name / LOG_FILE})"
    assert any(line.startswith(f"{name}: failed: ") for line in said)
    assert sum(words[0] == "knn" for words in run.words) == 2  # of lomar; no rate of mae could be chosen


def test_a_cell_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom lomar.files import only_writer\n"
        "with only_writer(Path(sys.argv[1]), 'cell'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    import subprocess

    name = "mae,epochs=1,lr=0.001,seed=0"
    lock = tmp_path / "cells" / name / "run" / LOCK_FILE
    run = Recorder()
    queue = made(tmp_path, run)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdin and other.stdout.readline() == "held\n"
        thread = threading.Thread(target=queue.work, args=([{}],))
        thread.start()
        time.sleep(1)
        assert thread.is_alive() and not any(words[1] == name for words in run.words)
        assert sum(words[0] == "knn" for words in run.words) == 2
        other.stdin.close()
        thread.join(20)
    assert any(words[1] == name for words in run.words) and not queue.failed


def test_a_tokenizer_is_trained_once_before_the_rows_that_need_it(tmp_path: Path) -> None:
    run = Recorder()
    entries = [Entry("beit", "beit"), Entry("mae", "mae")]
    made(tmp_path, run, entries, tokenizer=["tokenizer", "train"]).work([{}, {}])
    names = [words[0] if words[0] == "tokenizer" else words[1].split(",")[0] for words in run.words]
    assert names.count("tokenizer") == 1 and names.index("tokenizer") < names.index("beit")


def test_a_tokenizer_that_fails_leaves_the_other_rows(tmp_path: Path) -> None:
    run = Recorder(fails=lambda words: words[0] == "tokenizer")
    entries = [Entry("beit", "beit"), Entry("mae", "mae")]
    queue = made(tmp_path, run, entries, tokenizer=["tokenizer", "train"])
    queue.work([{}])
    assert set(queue.failed) == {f"beit,epochs=1,lr={rate:g},seed=0" for rate in (1e-3, 2e-3)}
    assert sum(words[0] == "knn" for words in run.words) == 2


def test_a_damaged_result_is_as_none(tmp_path: Path) -> None:
    made(tmp_path, Recorder()).work([{}])
    path = tmp_path / "cells" / "mae,epochs=1,lr=0.001,seed=0" / RESULT
    path.write_text(path.read_text()[:20])
    again = Recorder()
    made(tmp_path, again).work([{}])
    assert [words[0] for words in again.words] == ["pretraining", "probe"]


def test_an_error_of_a_worker_reaches_who_waits(tmp_path: Path) -> None:
    def run(words: Sequence[str], log: Path, place: Mapping[str, str]) -> tuple[int, int]:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        made(tmp_path, run).work([{}, {}])


def test_children_run_log_and_are_asked_to_end(tmp_path: Path) -> None:
    children = Children()
    log = tmp_path / "cell.log"
    status, peak = children.run(["--version"], log, {})
    assert status == 0 and peak > 1e6
    assert log.read_text().startswith("$ lomar --version\nlomar ")
    children.stop()
    assert children.run(["--version"], log, {})[0] != 0
    assert log.read_text().count("\nlomar ") == 1


def test_turns_are_taken(tmp_path: Path) -> None:
    with in_turn(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
    with only_writer(tmp_path / "lock", "it"):
        pass
    assert json.dumps(list(tmp_path.iterdir())) == "[]"
