"""Time and memory of a training step against the size of the image: at a fixed number of views they do not change.

    python benchmarks/resolution.py [--model base] [--mask-layer 0] [--device cpu]

Each cell is a fresh process, so that its peak is its own; the rounds alternate between the sizes, and the table gives
medians. Peak memory is the process's (ru_maxrss) on a CPU, the allocator's on a GPU. Data is synthetic: loading is
measured by benchmarks/loader.py.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

SIDES_PX = (224, 448, 896)
PATCH_PX = 16


def measure(model: str, side_px: int, mask_layer: int, images: int, steps: int, device: str) -> dict[str, float]:
    """Median seconds of a step and peak bytes of this process."""
    import torch

    from lomar.data.loader import SampleKey
    from lomar.methods.recipes import RECIPES, compose
    from lomar.training.optim import adamw

    recipe = RECIPES["lomar"]
    options = {"method": "lomar", "model": model, "image_size": side_px, "patch_size": PATCH_PX, "batch_size": images}
    options |= {"mask_layer": mask_layer, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    torch.manual_seed(0)
    method = compose(dict(recipe.options) | dict(recipe.full) | options, vocab=0, scale=255.0).build()
    method.to(device)
    optimizer = adamw(method, recipe.options["weight_decay"], recipe.options["betas"])
    draws = [method.draw(seed=0)(SampleKey(0, i, 0, i)) for i in range(images)]
    batch = {name: torch.stack([each[name] for each in draws]).to(device) for name in draws[0]}
    side = method.views.size[0] * PATCH_PX
    shape = images, method.views.count, 3, side, side
    batch["pixels"] = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    synchronise: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    took_s = []
    for step in range(steps + 1):
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            total, count = method(**batch)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronise()
        if step:  # the first one warms up
            took_s.append(time.perf_counter() - began)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_kib * 1024
    return {"seconds": statistics.median(took_s), "bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base")
    parser.add_argument("--mask-layer", type=int, default=0)
    parser.add_argument("--images", type=int, default=4, help="images a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cell", type=int, help=argparse.SUPPRESS)  # the image side that a child process measures
    args = parser.parse_args()
    if args.cell:
        cell = measure(args.model, args.cell, args.mask_layer, args.images, args.steps, args.device)
        sys.stdout.write(json.dumps(cell))
        return
    cells: dict[int, list[dict[str, float]]] = {side: [] for side in SIDES_PX}
    for _ in range(args.rounds):
        for side, measured in cells.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--cell", str(side)]
            measured.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    import torch

    device = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    )
    out = [
        f"ViT-{args.model}/{PATCH_PX}, {args.images} images a step, 4 views of 7x7, masks at block {args.mask_layer}, "
        f"bfloat16; {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}; median of {args.rounds} rounds of {args.steps} steps",
        "",
        "| image | s a step | ratio | peak memory | ratio |",
        "|---|---|---|---|---|",
    ]
    base = {key: statistics.median(c[key] for c in cells[SIDES_PX[0]]) for key in ("seconds", "bytes")}
    for side, measured in cells.items():
        seconds, peak = (statistics.median(c[key] for c in measured) for key in ("seconds", "bytes"))
        out.append(
            f"| {side} px | {seconds:.3f} | {seconds / base['seconds']:.2f} "
            f"| {peak / 1e9:.2f} GB | {peak / base['bytes']:.2f} |"
        )
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
