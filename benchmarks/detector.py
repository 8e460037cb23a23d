"""Time and memory of a detector: what the positions of its backbone cost, in training and when it looks.

    python benchmarks/detector.py [--model base] [--image-size 1024] [--images 1] [--steps 2] [--rounds 2]

A cell is a kind of position (contextual, none) with or without decomposed positions. Each is measured in a fresh
process, in turn, --rounds times; the table has medians, and ratios within a round to the same detector without
contextual position. Images are noise with seven objects each, in bfloat16; peak memory is of a training step, beyond
what the process held before the detector was made.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

CELLS = (("contextual", True), ("none", True), ("contextual", False), ("none", False))


def measured(asked: argparse.Namespace, position: str, decomposed: bool) -> dict[str, float]:
    """One cell, in this process: seconds of a step, of looking, and bytes."""
    import torch

    from lomar.benchmark.memory import PeakMemory
    from lomar.commands.detect_plan import made_up
    from lomar.detection.detector import Detector, DetectorPlan
    from lomar.detection.optim import detector_adamw
    from lomar.model import Encoder
    from lomar.model.encoder import size_of
    from lomar.training.memory import keep_freed_memory

    device, side = torch.device(asked.device), asked.image_size
    if device.type == "cpu":
        keep_freed_memory()
    width, depth, heads = size_of(asked.model)
    torch.manual_seed(0)
    memory = PeakMemory(device)
    with torch.device("meta"):
        architecture = Encoder(
            224, asked.patch_size, 3, 0, embed_dim=width, depth=depth, num_heads=heads, position=position
        ).architecture
    classes = tuple(map(str, range(80)))
    half = (0.5,) * 3
    plan = DetectorPlan(
        architecture, classes, tuple(range(80)), half, half, 255.0, image_size=side, decomposed=decomposed
    )
    detector = Detector(plan).to(device)
    detector.backbone.grad_checkpointing = asked.grad_checkpointing
    optimizer = detector_adamw(detector, 0.1, (0.9, 0.999), 0.7)
    inputs = made_up(plan, asked.images, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss, images = detector(**inputs)
        (loss / images).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    def look() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            for found in detector.detect(inputs["pixels"], inputs["sizes"]):
                found.boxes.cpu()

    def seconds(work: Any) -> float:
        work()
        times = []
        for _ in range(asked.steps):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    detector.train()
    step_s = seconds(step)
    peak = memory.bytes
    detector.eval()
    return {"step_s": step_s, "look_s": seconds(look), "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grad-checkpointing", action="store_true")
    parser.add_argument("--cell", help="for the processes that this one starts")
    asked = parser.parse_args()
    if asked.cell:
        position, decomposed = asked.cell.split(",")
        print(json.dumps(measured(asked, position, decomposed == "yes")))  # noqa: T201
        return
    rounds: list[dict[tuple[str, bool], dict[str, float]]] = []
    for number in range(asked.rounds):
        rounds.append({})
        for position, decomposed in CELLS:
            cell = f"{position},{'yes' if decomposed else 'no'}"
            done = subprocess.run([sys.executable, *sys.argv, "--cell", cell], stdout=subprocess.PIPE, check=True)
            rounds[-1][position, decomposed] = json.loads(done.stdout)
            print(f"round {number + 1}: {cell} {rounds[-1][position, decomposed]}", file=sys.stderr, flush=True)  # noqa: T201
    print("| contextual | decomposed | step, s | against none | peak, GB | against none | looking, images/s |")  # noqa: T201
    print("|---|---|---|---|---|---|---|")  # noqa: T201
    for position, decomposed in CELLS:
        own = [each[position, decomposed] for each in rounds]
        base = [each["none", decomposed] for each in rounds]
        time_, memory = (
            statistics.median(a[name] / b[name] for a, b in zip(own, base, strict=True)) for name in ("step_s", "peak")
        )
        cells = (
            "yes" if position == "contextual" else "no",
            "yes" if decomposed else "no",
            f"{statistics.median(each['step_s'] for each in own):.2f}",
            f"{time_:.2f}",
            f"{statistics.median(each['peak'] for each in own) / 1e9:.2f}",
            f"{memory:.2f}",
            f"{asked.images / statistics.median(each['look_s'] for each in own):.3g}",
        )
        print(f"| {' | '.join(cells)} |")  # noqa: T201


if __name__ == "__main__":
    main()
