"""Peak memory of `lomar embed` against the number of images: it does not grow, but for their paths.

    python benchmarks/embed_memory.py [--counts 1000 10000 100000]

Patch features of images of 32 x 32 px, from an encoder of one block, so that 100,000 take minutes and their file
is large. Each run is a fresh process, and the peak is its own (ru_maxrss): the list of paths is in it, the system's
cache of the disk is not. All files are made in a temporary folder and deleted.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIDE_PX = 32
SETTINGS = (
    f"--model scratch:384x1x6 --image-size {SIDE_PX} --features patches --device cpu --precision fp32 --workers 0"
)
IN_A_FOLDER = 1000


def make_images(root: Path, first: int, count: int) -> None:
    """Images number `first` up to `count` of a data set, a thousand in a folder."""
    rng = np.random.default_rng(first)
    for number in range(first, count):
        path = root / f"{number // IN_A_FOLDER:05}" / f"{number:08}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)).save(path, compress_level=0)


def peak_bytes(arguments: list[str]) -> int:
    """Peak resident memory of a command line in a process of its own."""
    code = f"""
import resource, sys
from lomar.cli import main
if main({arguments!r}):
    sys.exit(1)
sys.stdout.write(f"peak {{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}}")
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.rsplit("peak ", 1)[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of `lomar embed` against the number of images.")
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000], metavar="N")
    options = parser.parse_args()

    print("| images | size of the file | peak, .safetensors | peak, .npz |\n|---|---|---|---|")  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        made = 0
        for count in sorted(options.counts):
            make_images(Path(folder, "images"), made, count)
            made = count
            row = []
            for ending in ("safetensors", "npz"):
                out = Path(folder, f"features.{ending}")
                words = ["--data", f"{folder}/images", "--out", str(out)]
                peak = peak_bytes(["embed", *SETTINGS.split(), *words])
                row = row or [f"{out.stat().st_size / 2**20:.1f} MiB"]
                row.append(f"{peak / 2**20:.0f} MiB")
                out.unlink()
            print(f"| {count:,} | {' | '.join(row)} |", flush=True)  # noqa: T201
    print(f"\nPython {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}")  # noqa: T201


if __name__ == "__main__":
    main()
