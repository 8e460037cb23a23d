"""A run that is killed again and again: whatever hits it, what comes out equals a run that was left alone.

    python benchmarks/soak.py --out soak [--kills 60] [--seed 0]

A small encoder learns from the embedded sample, made smaller once, with worker processes and a checkpoint every few
steps. It is started with `--resume`, and after a random time gets SIGKILL (half of the times), SIGTERM, or SIGINT
twice; now and then the end of its last checkpoint, or of the metrics after it, is torn off, as a power cut may leave
them. When it has been hit often enough it may finish. Then its losses, learning rates and gradient norms, step for
step, its weights and its encoder are compared with those of a run that was left alone. A table of what was injected
ends it, with status 1 if anything differs.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lomar.training.checkpoint import FOLDER, Checkpoints

SETTINGS = (
    "--model 16x3x2 --image-size 32 --patch-size 8 --window-size 3 --views 2 --batch-size 4 "
    "--workers 1 --device cpu --precision fp32 --checkpoint-steps 7 --eval-every 1000 --warmup-epochs 1"
)
FAULTS = {"SIGKILL": 5, "SIGTERM": 2, "SIGINT twice": 1, "SIGKILL, checkpoint torn": 1, "SIGKILL, metrics torn": 1}


def started(run: Path, steps: int) -> subprocess.Popen[bytes]:
    """The run, begun or gone on with."""
    log = (run.parent / f"{run.name}.log").open("ab")
    command = [sys.executable, "-m", "lomar", "pretrain", "--out", str(run), "--resume", *SETTINGS.split()]
    command += ["--data", str(run.parent / "photos"), "--max-steps", str(steps)]
    return subprocess.Popen(command, stdout=log, stderr=log)


def rows(run: Path) -> list[dict[str, Any]]:
    """What metrics say, without clocks."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = ("step", "epoch", "loss", "lr", "grad_norm", "effective_rank")
    return [{name: row[name] for name in kept if name in row} for row in map(json.loads, lines)]


def hit(process: subprocess.Popen[bytes], fault: str, run: Path) -> None:
    """One fault, and the end of the process."""
    if fault == "SIGINT twice":
        process.send_signal(signal.SIGINT)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL)
    process.wait(timeout=120)
    checkpoints = Checkpoints(run / FOLDER)
    steps = checkpoints.steps()
    if fault.endswith("checkpoint torn") and len(steps) > 1:
        path = checkpoints.path(steps[0])
        path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])
    if fault.endswith("metrics torn") and steps and (run / "metrics.jsonl").exists():
        with (run / "metrics.jsonl").open("r+b") as file:
            content = file.read()
            safe = content.find(f'{{"step": {steps[0] + 1},'.encode())  # rows up to the checkpoint are flushed to disk
            if safe > 0:
                file.truncate(random.randrange(safe, len(content)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would pass it over
    args.out.mkdir(parents=True)
    prepare = ["prepare", "--data", "sample", "--out", str(args.out / "photos"), "--short-side", "64"]
    subprocess.run([sys.executable, "-m", "lomar", *prepare], check=True)
    alone, run = args.out / "alone", args.out / "run"
    if status := started(alone, args.steps).wait():
        raise SystemExit(f"the run that is left alone ended with status {status}")
    injected: Counter[str] = Counter()
    lost: list[int] = []
    while sum(injected.values()) < args.kills:
        process = started(run, args.steps)
        until = time.monotonic() + random.choice((random.uniform(0, 4), random.uniform(3, 6)))
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if process.poll() is not None:
            break  # finished, or failed: the comparison tells
        fault = random.choices(list(FAULTS), list(FAULTS.values()))[0]
        hit(process, fault, run)
        injected[fault] += 1
        if (run / "metrics.jsonl").exists() and (steps := Checkpoints(run / FOLDER).steps()):
            lost.append((run / "metrics.jsonl").read_bytes().count(b'"loss"') - steps[0])
    if status := started(run, args.steps).wait():
        raise SystemExit(f"the run ended with status {status}: see {args.out / 'run.log'}")
    weights = [Checkpoints(each / FOLDER).load()[1]["model"] for each in (alone, run)]  # type: ignore[index]
    encoders = [load_file(each / "encoder.safetensors") for each in (alone, run)]
    same = {
        "rows of metrics": rows(alone) == rows(run),
        "weights": all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]),
        "encoder": all(torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0]),
        "no traceback": b"Traceback" not in (args.out / "run.log").read_bytes(),
    }
    lines = ["| fault | times |", "|---|---|", *(f"| {name} | {count} |" for name, count in injected.items())]
    lines += ["", f"{args.steps} steps; steps done again after a fault: at most {max(lost, default=0)}."]
    lines += [f"{name}: {'equal' if equal else 'DIFFERENT'}" for name, equal in same.items()]
    text = "\n".join(lines)
    (args.out / "soak.md").write_text(text + "\n")
    print(text)  # noqa: T201
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
