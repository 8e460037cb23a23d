"""How long a checkpoint takes: written, flushed to disk and read back; read at resume.

    python benchmarks/checkpoint.py [--models base large huge] [--folder .] [--rounds 3]

The state is what a run holds: weights and AdamW's two moments in float32. The disk is the one of --folder. What is read
may come from the operating system's cache. Prints a table; medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lomar.model.encoder import SIZES
from lomar.training.checkpoint import Checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["base", "large", "huge"])
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| model | GB | saved, s | MB/s | read, s |\n|---|---|---|---|---|")  # noqa: T201
    for model in args.models:
        width, blocks, _ = SIZES[model]
        state = {
            f"{kind}.{block}": torch.rand(12 * width**2)  # weights of a block, nearly all there are
            for kind in ("weight", "exp_avg", "exp_avg_sq")
            for block in range(blocks)
        }
        saved, read = [], []
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            checkpoints = Checkpoints(Path(folder))
            for step in range(1, args.rounds + 1):
                began = time.perf_counter()
                checkpoints.save(step, state)
                saved.append(time.perf_counter() - began)
                began = time.perf_counter()
                checkpoints.load()
                read.append(time.perf_counter() - began)
            gigabytes = checkpoints.path(args.rounds).stat().st_size / 1e9
        took = statistics.median(saved)
        cells = (model, f"{gigabytes:.2f}", f"{took:.1f}", f"{1000 * gigabytes / took:.0f}")
        print(f"| {' | '.join(cells)} | {statistics.median(read):.1f} |")  # noqa: T201


if __name__ == "__main__":
    main()
