"""A command that is killed again and again: whatever hits it, what comes out equals what it leaves undisturbed.

    python benchmarks/soak.py --out soak [--command pretrain] [--hits 50] [--seed 0]

A small job is done once undisturbed. Then it is started with `--resume`, and at a random moment (while it starts,
while it works, while it ends) gets SIGKILL, SIGTERM, or SIGINT twice; now and then what was not yet flushed to disk is
torn as a power cut may leave it: its end missing, or zeros. It is started again until it is done, and what is then in
its place is compared with what the undisturbed one left: metrics row for row without clocks, weights, files byte for
byte, and the names of all files. Where it is done before it was hit often enough, another one is begun. Tables of what
was injected and of what was compared end it, with status 1 if anything differs, a process ended with a status that
does not belong to its signal, or a traceback appeared that is not Python's own of a second Ctrl-C. Linux alone.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from lomar.cli import main as lomar
from lomar.data.shards import JOURNAL_FILE
from lomar.downstream import embedding_writer
from lomar.downstream.embedding import partial_of, state_of
from lomar.training.checkpoint import FOLDER, Checkpoints

IMAGES, DISTINCT = 3000, 200  # files; the others are links to some
CLOCKS = ("images_per_s", "data_wait", "elapsed_s")  # of a row of metrics
PROCESSES = multiprocessing.get_context("forkserver")  # from one that has imported torch, since that takes seconds
UNCOMPARED = (FOLDER, "tensorboard", "train.log")  # which step came before the last depends on what hit it; clocks
FAULTS = {"SIGKILL": 4, "SIGTERM": 3, "SIGINT twice": 3}
STATUS = {"SIGTERM": ("143", "-15"), "SIGINT twice": ("130", "-2")}  # expected; of the others -9
TORN = 3  # of each kind of tear, likewise a weight
MOMENTS = {"starting": 3, "working": 5, "ending": 1}  # when a fault comes, likewise
WINDOW_S = {"starting": 2.0, "working": 3.0, "ending": 0.3}  # from the start, its first word, the first sign of its end

# How a power cut may leave what was not flushed. Each returns whether there was anything to tear.


def damage(path: Path, first: int) -> bool:
    """A file from a random place behind byte `first` on: gone, or zeros."""
    size = path.stat().st_size if path.exists() else 0
    if size <= first:
        return False
    at = random.randrange(first, size)
    with path.open("r+b") as file:
        file.truncate(at)
        if random.random() < 0.5:
            file.truncate(size)
    return True


def tear_checkpoint(folder: Path) -> bool:
    """The last of several: it is flushed, but what was flushed may be lost as well."""
    kept = Checkpoints(folder)
    return len(kept.steps()) > 1 and damage(kept.path(kept.steps()[0]), 0)


def tear_metrics(folder: Path, metrics: Path) -> bool:
    """What came after the last checkpoint: rows up to it are flushed."""
    steps = Checkpoints(folder).steps()
    if not steps or not metrics.exists():
        return False
    safe = metrics.read_bytes().find(f'{{"step": {steps[0] + 1},'.encode())
    return safe > 0 and damage(metrics, safe)


def tear_rows(out: Path) -> bool:
    """Features behind those that are counted as safe."""
    state, rows = state_of(partial_of(out)), partial_of(out) / "rows"
    if state is None or not state["rows"]:
        return False
    with rows.open("r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")  # of a .safetensors
        count, *shape = state["fixed"]["shape"]
        row = int(np.prod(shape)) * np.dtype(state["fixed"]["dtype"]).itemsize
        first, end = header + state["rows"] * row, header + count * row
        at = random.randrange(first, end)
        file.seek(at)
        file.write(bytes(end - at))
    return True


def tear_features(run: Path) -> bool:
    """The features of a probe while they are made."""
    return sum(tear_rows(path.with_suffix("")) for path in run.glob("features-*.safetensors.partial")) > 0


def tear_shard(out: Path) -> bool:
    """The shard that grows."""
    return sum(damage(path, 0) for path in out.glob(".*.tmp")) > 0


def tear_journal(out: Path) -> bool:
    """The line of a shard that was being added."""
    journal = out / JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    return len(lines) > 1 and damage(journal, sum(map(len, lines[:-1])))


# What is compared. Each reads something that must be equal.


def rows(path: Path) -> Any:
    """Metrics without clocks."""
    found = map(json.loads, path.read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in found]


def weights(path: Path) -> Any:
    return {name: tensor.tolist() for name, tensor in load_file(path).items()}


def last_checkpoint(path: Path) -> Any:
    """The weights in it."""
    _, state = Checkpoints(path).load() or (0, {"model": {}})
    return {name: tensor.tolist() for name, tensor in state["model"].items()}


def numbers(path: Path) -> Any:
    """JSON without the seconds that it took, and where."""
    found = json.loads(path.read_text())
    found.pop("training_s", None), found.pop("model", None)
    found.get("options", {}).pop("out", None)
    return found


def content(path: Path) -> Any:
    return path.read_bytes()


@dataclass(frozen=True)
class Job:
    """A command to be hit, in a place of its own, an empty folder.

    Args:
        words: the command and its arguments but for --resume and --out; {images} is a folder.
        out: what it makes, below the place.
        ending: a file below the place that appears when it is about to end.
        compared: pattern of files below the place -> what of them must be equal.
        tears: name -> what tears something in the place, where there is something.
    """

    words: str
    out: str
    ending: str
    compared: dict[str, Callable[[Path], Any]]
    tears: dict[str, Callable[[Path], bool]]


RUN, METRICS, STATES = "run", "run/metrics.jsonl", f"run/{FOLDER}"
OF_A_RUN = {
    "checkpoint": lambda place: tear_checkpoint(place / STATES),
    "metrics": lambda place: tear_metrics(place / STATES, place / METRICS),
}
CPU = "--data {images} --device cpu --workers 1"
SMALL = f"{CPU} --precision fp32 --image-size 32 --patch-size 8 --batch-size 4 --checkpoint-steps 7"
JOBS = {
    "pretrain": Job(
        f"pretrain {SMALL} --model 16x3x2 --window-size 3 --views 2 --eval-every 0.5 --warmup-epochs 0.1 "
        "--max-steps 800",
        out=RUN,
        ending=f"{STATES}/step-000000800.pt",
        compared={METRICS: rows, STATES: last_checkpoint, "run/*.safetensors": weights},
        tears=OF_A_RUN,
    ),
    "finetune": Job(
        f"finetune {SMALL} --model scratch:16x3x2 --eval-every 0.25 --warmup-epochs 0.1 --drop-path 0.1 "
        "--max-steps 500",
        out=RUN,
        ending=f"{STATES}/step-000000500.pt",
        compared={
            METRICS: rows,
            STATES: last_checkpoint,
            "run/*.safetensors": weights,
            "run/evaluation.json": numbers,
        },
        tears=OF_A_RUN,
    ),
    "probe": Job(
        f"probe {CPU} --precision fp32 --model scratch:16x2x2 --image-size 32 --base-lrs 0.1 1 --batch-size 64 "
        "--epochs 120 --checkpoint-minutes 0.002",
        out=RUN,
        ending="run/probe.safetensors",
        compared={METRICS: rows, "run/probe.safetensors": weights, "run/probe.json": numbers},
        tears=OF_A_RUN | {"features": lambda place: tear_features(place / RUN)},
    ),
    "tokenizer": Job(
        f"tokenizer train {CPU} --image-size 32 --window-size 2 --width 4 --blocks-per-group 1 --vocab 16 "
        "--batch-size 4 --max-steps 500 --checkpoint-minutes 0.002",
        out="t.safetensors",
        ending="t.png",
        compared={"t.jsonl": rows, "t.safetensors": weights, "t.png": content},
        tears={
            "checkpoint": lambda place: tear_checkpoint(place / "t.safetensors.partial"),
            "metrics": lambda place: tear_metrics(place / "t.safetensors.partial", place / "t.jsonl"),
        },
    ),
    "prepare": Job(
        "prepare --data {images} --workers 1 --short-side 128 --shard-mb 0.3",
        out="shards",
        ending="shards/index.safetensors",
        compared={"shards/*.tar": content, "shards/index.safetensors": content},
        tears={
            "shard": lambda place: tear_shard(place / "shards"),
            "journal": lambda place: tear_journal(place / "shards"),
        },
    ),
    "embed": Job(
        f"embed {CPU} --precision fp32 --model scratch:192x4x3 --image-size 64 --features patches --batch-size 32",
        out="e.safetensors",
        ending="e.safetensors",
        compared={"e.safetensors": content},
        tears={"rows": lambda place: tear_rows(place / "e.safetensors")},
    ),
}


def make_images(root: Path) -> None:
    """Many files of few images in four class folders."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = root / "abcd"[number % 4] / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < DISTINCT:
            coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((384, 288)).save(path, quality=90)
        else:
            os.link(root / "abcd"[number % DISTINCT % 4] / f"{number % DISTINCT:05}.jpg", path)


def perform(words: list[str], log: Path) -> None:
    """A command line, in a process of its own."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    multiprocessing.set_start_method("fork", force=True)  # for its workers: as in a process started by hand
    torch.set_num_threads(1)  # for small matrices
    embedding_writer.KEEP_EVERY_S = 0.2  # not 5: it is hit more often
    sys.exit(lomar(words))


def ended(process: BaseProcess) -> int:
    """Wait for a process; its exit status, minus the signal's number where one ended it."""
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise SystemExit(f"process {process.pid} does not end")
    return process.exitcode


class Soak:
    """One job, done undisturbed and then hit.

    Args:
        job: what is hit.
        folder: an empty one for all that is made.
        data: images.
    """

    def __init__(self, job: Job, folder: Path, data: Path) -> None:
        self.job, self.folder, self.data = job, folder, data
        self.hits: Counter[tuple[str, str]] = Counter()  # (fault, how the process ended) -> times
        self.tracebacks: list[str] = []  # what was printed where one appeared
        self.interrupted: list[str] = []  # the same, after a second Ctrl-C, which Python meets outside of `main`
        self.sizes: dict[str, int] = {}
        self.differing: list[tuple[str, int, str]] = []  # (what is compared, which job, which files)
        self.rounds = 0

    def started(self, place: Path, log: Path) -> BaseProcess:
        """The job, begun or gone on with."""
        place.mkdir(exist_ok=True)
        words = [*self.job.words.format(images=self.data).split(), "--resume", "--out", str(place / self.job.out)]
        process = PROCESSES.Process(target=perform, args=(words, log))
        process.start()
        return process

    def undisturbed(self) -> float:
        """Do the job once; returns the seconds."""
        began = time.monotonic()
        if status := ended(self.started(self.folder / "alone", self.folder / "alone.log")):
            raise SystemExit(f"undisturbed it ended with status {status}: see {self.folder / 'alone.log'}")
        return time.monotonic() - began

    def hit_until_done(self, most: int) -> None:
        """Do it again, hit up to so many times, and compare."""
        self.rounds += 1
        place = self.folder / f"hit-{self.rounds}"
        log = self.folder / f"hit-{self.rounds}.log"
        while True:
            log.touch()
            told = log.stat().st_size
            process = self.started(place, log)
            fault = self.hit(process, place, log, told) if self.hits.total() < most else ""
            status = ended(process)
            text = log.read_bytes()[told:].decode(errors="replace")
            if "Traceback" in text:
                (self.interrupted if "KeyboardInterrupt" in text else self.tracebacks).append(text)
            if not fault:
                break
            self.hits[fault, str(status)] += 1
            if str(status) not in STATUS.get(fault, ("-9",)):
                self.differing.append(("statuses", self.rounds, f"{status} after {fault}, see {log}"))
        if status:
            raise SystemExit(f"it ended by itself with status {status}: see {log}")
        self.compare(place)

    def hit(self, process: BaseProcess, place: Path, log: Path, told: int) -> str:
        """One fault at a random moment; its name, or "" where the process ended before.

        Args:
            process: to be hit.
            place: of the job.
            log: of the job.
            told: bytes of it before the process was started.
        """
        faults = FAULTS | {f"SIGKILL, {name} torn": TORN for name in self.job.tears}
        fault = random.choices(list(faults), list(faults.values()))[0]
        moment = random.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        signs = {
            "starting": lambda: True,
            "working": lambda: log.stat().st_size > told,
            "ending": (place / self.job.ending).exists,
        }
        while process.is_alive() and not signs[moment]():
            time.sleep(0.002)
        until = time.monotonic() + random.uniform(0, WINDOW_S[moment])
        while process.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        if not process.is_alive():
            return ""
        numbers = {"SIGINT twice": [signal.SIGINT, signal.SIGINT], "SIGTERM": [signal.SIGTERM]}
        for number in numbers.get(fault, [signal.SIGKILL]):
            os.kill(process.pid or 0, number)
            time.sleep(random.uniform(0, 0.05))
        if ended(process) == 0:
            return ""  # it was just done
        kind = fault.removeprefix("SIGKILL, ").removesuffix(" torn")
        if kind in self.job.tears and not self.job.tears[kind](place):
            return "SIGKILL"  # there was nothing to tear
        return fault

    def compare(self, place: Path) -> None:
        """Note all that is not as in the undisturbed one."""
        alone = self.folder / "alone"
        names = [self.names(each) for each in (alone, place)]
        if names[0] != names[1]:
            self.differing.append(("names of files", self.rounds, " ".join(sorted(names[0] ^ names[1]))))
        for pattern, read in self.job.compared.items():
            paths = sorted(alone.glob(pattern))
            self.sizes[pattern] = len(paths)
            for path in paths:
                other = place / path.relative_to(alone)
                if not other.exists() or read(path) != read(other):
                    self.differing.append((pattern, self.rounds, str(path.relative_to(alone))))

    def names(self, place: Path) -> set[str]:
        """All files there, but for those of which others may be left, and of them the half-written ones."""
        paths = {path.relative_to(place) for path in place.rglob("*") if path.is_file()}
        return {str(path) for path in paths if not set(path.parts) & set(UNCOMPARED) or path.suffix == ".tmp"}

    def report(self, alone_s: float) -> str:
        faults: dict[str, Counter[str]] = {}
        for (fault, status), count in self.hits.items():
            faults.setdefault(fault, Counter())[status] += count
        ends = {name: ", ".join(f"{each[s]} x {s}" for s in sorted(each)) for name, each in faults.items()}
        lines = ["| fault | times | how often with which status |", "|---|---|---|"]
        lines += [f"| {name} | {faults[name].total()} | {ends[name]} |" for name in sorted(faults)]
        lines += ["", f"{self.hits.total()} hits in {self.rounds} jobs of {alone_s:.0f} s.", ""]
        lines += ["| compared | files | by | |", "|---|---|---|---|"]
        differing = {what for what, _, _ in self.differing}
        for what, count in {**self.sizes, "names of files": "all", "statuses": "all"}.items():
            how = self.job.compared[what].__name__.replace("_", " ") if what in self.job.compared else ""
            lines.append(f"| {what} | {count} | {how} | {'DIFFERENT' if what in differing else 'equal'} |")
        lines += ["", *(f"job {number}: {what}: {which}" for what, number, which in self.differing)]
        lines += [f"Tracebacks: {len(self.tracebacks)}; after a second Ctrl-C: {len(self.interrupted)}"]
        lines += self.tracebacks
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is made; must not exist")
    parser.add_argument("--command", choices=JOBS, default="pretrain")
    parser.add_argument("--hits", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would pass it over
    PROCESSES.set_forkserver_preload(["lomar.commands.pretrain", "lomar.commands.probe", "lomar.commands.tokenizer"])
    args.out.mkdir(parents=True)
    make_images(args.out / "images")
    soak = Soak(JOBS[args.command], args.out, args.out / "images")
    alone_s = soak.undisturbed()
    while soak.hits.total() < args.hits:
        soak.hit_until_done(args.hits)
        if not soak.differing:
            shutil.rmtree(args.out / f"hit-{soak.rounds}")
    text = soak.report(alone_s)
    text += f"\n\n    python benchmarks/soak.py --command {args.command} --hits {args.hits} --seed {args.seed}\n"
    (args.out / "soak.md").write_text(text)
    print(text)  # noqa: T201
    return 1 if soak.differing or soak.tracebacks else 0


if __name__ == "__main__":
    sys.exit(main())
