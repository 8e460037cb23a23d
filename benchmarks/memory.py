"""Memory of a long pretraining, a long embedding and a long listing, and what a survey reads: tables, and a JSON.

    python benchmarks/memory.py [steps] [embeds] [listing] [survey] [--steps 10000] [--images 100000]
                                [--files 1000000] [--json FILE]

- steps: resident memory of `lomar pretrain` and its workers over many steps of a small encoder, without workers and
  with two. The slope is that of a straight line through the second half of the samples: it must be about 0. The
  system counts memory that processes share in each of them.
- embeds: the same of `lomar embed` over many small images: patch features of an encoder of one block, so that their
  file is large; .safetensors without workers and with two, .npz without.
- listing: seconds until `open_source` returns for so many empty files, in folders of a thousand, in one folder, and
  in a .txt list; bytes for each file that stay, and the peak on the way. Each in a fresh process.
- survey: files opened and bytes read by what `lomar pretrain` does before its first step, of a long listing.

All files are made in a temporary folder and deleted. Linux alone.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lomar.downstream.embedding import begun

SIDE_PX = 32
SETTINGS = (
    f"--model 16x2x2 --image-size {SIDE_PX} --patch-size 8 --window-size 3 --views 2 --batch-size 4 --micro-batch 4 "
    "--device cpu --precision fp32 --checkpoint-steps 1000 --log-every 1000 --eval-every 1e9"
)
EMBEDDING = f"--model scratch:384x1x6 --image-size {SIDE_PX} --features patches --device cpu --precision fp32"
IN_A_FOLDER = 1000
PARTS = ("steps", "embeds", "listing", "survey")
MIB = 2**20


def make_images(root: Path, count: int) -> None:
    """So many small images."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)).save(root / f"{number:04}.png")


def resident_bytes(process: int) -> int:
    """Of a process; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def children_of(process: int) -> list[int]:
    """Processes that it started and that live."""
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def sampled(words: list[str], done: Callable[[], int], before: str = "") -> list[tuple[int, int, int]]:
    """Run a command line and look at it five times a second: how far it is, bytes of the process, of its workers.

    Args:
        words: of the command line.
        done: how far it is; -1 while that is not known.
        before: Python to run before the command.
    """
    code = f"{before}\nimport sys; from lomar.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    samples: list[tuple[int, int, int]] = []
    while process.poll() is None:
        time.sleep(0.2)
        if (at := done()) >= 0:
            samples.append((at, resident_bytes(process.pid), sum(map(resident_bytes, children_of(process.pid)))))
    if process.returncode:
        raise SystemExit(f"lomar {words[0]} ended with status {process.returncode}")
    return [sample for sample in samples if sample[1]]


def slopes(samples: list[tuple[int, int, int]], total: int) -> list[float]:
    """Bytes that the process and its workers grow by for each step or image of the second half.

    Not of the last twentieth: at the end something else is done.
    """
    at = np.array(samples, dtype=float)
    late = at[(at[:, 0] >= total / 2) & (at[:, 0] <= 0.95 * total)]
    return [float(np.polyfit(late[:, 0], late[:, column], 1)[0]) for column in (1, 2)]


def at_marks(samples: list[tuple[int, int, int]], marks: list[int]) -> list[tuple[int, int, int]]:
    """The first sample from each mark on."""
    at = np.array([sample[0] for sample in samples])
    return [samples[int(np.searchsorted(at, mark))] for mark in marks if mark <= at[-1]]


def memory_of_steps(folder: Path, steps: int, workers: int) -> dict[str, Any]:
    """Resident memory over a run: of the process and of its workers, at every step of the table."""
    out = folder / f"run-{workers}"
    words = ["pretrain", "--data", str(folder / "images"), "--out", str(out), *SETTINGS.split()]
    words += ["--workers", str(workers), "--max-steps", str(steps)]
    metrics, read, step = out / "metrics.jsonl", 0, -1

    def done() -> int:
        nonlocal read, step
        if metrics.exists():
            with metrics.open("rb") as file:
                file.seek(read)
                lines = file.read().split(b"\n")[:-1]
            read += sum(len(line) + 1 for line in lines)
            step = json.loads(lines[-1])["step"] if lines else step
        return step

    samples = [sample for sample in sampled(words, done) if 0 < sample[0] < steps]
    own, others = slopes(samples, steps)  # the evaluation at the end, and its curves, come after them
    marks = [steps // 100, *range(steps // 10, steps + 1, steps // 10)]
    return {
        "workers": workers,
        "samples": at_marks(samples, marks),
        "slope_bytes_a_step": own,
        "slope_bytes_a_step_of_workers": others,
    }


def memory_of_embedding(folder: Path, count: int, ending: str, workers: int) -> dict[str, Any]:
    """Resident memory while so many images are embedded: of the process and of its workers, at tenths of them.

    Rows are made safe, and so counted, twice a second here.
    """
    data, out = folder / "linked", folder / f"features-{workers}.{ending}"
    link_images(folder / "images", data, count)
    words = ["embed", "--data", str(data), "--out", str(out), *EMBEDDING.split(), "--workers", str(workers)]
    often = "import lomar.downstream.embedding_writer as writer; writer.KEEP_EVERY_S = 0.5"
    samples = sampled(words, lambda: count if out.exists() else (begun(out) or -1), often)
    own, others = slopes(samples, count)
    size = out.stat().st_size
    out.unlink()
    tenth = count // 10
    return {
        "ending": ending,
        "workers": workers,
        "images": count,
        "file_bytes": size,
        "samples": at_marks(samples, [tenth // 10, *range(tenth, count + 1, tenth)]),
        "peak_bytes": max(sample[1] for sample in samples),
        "slope_bytes_an_image": own,
        "slope_bytes_an_image_of_workers": others,
    }


def link_images(images: Path, root: Path, count: int) -> None:
    """So many names of a few images, a thousand in a folder; nothing where they are there already."""
    if root.exists():
        return
    files = sorted(images.iterdir())
    for number in range(count):
        path = root / f"{number // IN_A_FOLDER:05}" / f"{number:08}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(files[number % len(files)], path)


MEASURE = """
import json, sys, threading, time
from pathlib import Path
import lomar.data.opening as opening
import numpy
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before, peak, done = resident(), [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], resident())
threading.Thread(target=watch, daemon=True).start()
began = time.monotonic()
source = opening.open_source(sys.argv[1])
seconds = time.monotonic() - began
done.set()
import gc; gc.collect()
print(json.dumps({"files": len(source), "seconds": seconds, "bytes_held": resident() - before,
                  "bytes_of_paths": len(source._blob) + source._ends.nbytes, "bytes_peak": peak[0] - before}))
"""


def listings(folder: Path, count: int) -> list[dict[str, Any]]:
    """What it costs to open so many files, by how they lie."""
    found = []
    for kind in ("folders", "flat", "list"):
        root = folder / kind
        root.mkdir()
        if kind == "list":
            (root / "some.txt").write_text("".join(f"{n // IN_A_FOLDER:04}/image-{n:08}.jpg\n" for n in range(count)))
            asked = root / "some.txt"
        else:
            for number in range(count):
                below = root / f"{number // IN_A_FOLDER:04}" if kind == "folders" else root
                if number % IN_A_FOLDER == 0:
                    below.mkdir(exist_ok=True)
                os.close(os.open(below / f"image-{number:08}.jpg", os.O_CREAT | os.O_WRONLY))
            asked = root
        words = [sys.executable, "-c", MEASURE, str(asked)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found.append({"kind": kind, **json.loads(done.stdout)})
        show_listing(found[-1])
    return found


class Counted:
    """What is read of a source."""

    def __init__(self) -> None:
        self.files = self.bytes = 0
        self.lock = threading.Lock()

    def __call__(self, content: Any) -> Any:
        with self.lock:
            self.files += 1
            self.bytes += len(content)
        return content


def surveyed(folder: Path, count: int) -> dict[str, Any]:
    """Files and bytes that the two looks at a list of so many files read."""
    from lomar.data.sources import ImageSource
    from lomar.data.survey import channel_statistics, survey

    counted = Counted()

    class Watched(ImageSource):
        def read(self, index: int) -> Any:
            return counted(super().read(index))

    names = [os.fsencode(path.name) for path in sorted((folder / "images").iterdir())]
    source = Watched(str(folder / "images"), (names[number % len(names)] for number in range(count)))
    began = time.monotonic()
    found = survey(source)
    channel_statistics(source, found.format)
    seconds = time.monotonic() - began
    return {"files": count, "files_read": counted.files, "bytes_read": counted.bytes, "seconds": seconds}


def show_steps(found: dict[str, Any]) -> None:
    print(f"\n{found['workers']} workers\n\n| step | process | workers |\n|---|---|---|")  # noqa: T201
    show_samples(found["samples"])
    grown = [1000 * found[name] / 1024 for name in ("slope_bytes_a_step", "slope_bytes_a_step_of_workers")]
    print(f"\nslope: {grown[0]:+.1f} KiB in 1,000 steps; of the workers {grown[1]:+.1f}", flush=True)  # noqa: T201


def show_embedding(found: dict[str, Any]) -> None:
    print(  # noqa: T201
        f"\n.{found['ending']} of {found['file_bytes'] / MIB:.0f} MiB, {found['workers']} workers\n\n"
        "| images | process | workers |\n|---|---|---|"
    )
    show_samples(found["samples"])
    grown = [10_000 * found[name] / MIB for name in ("slope_bytes_an_image", "slope_bytes_an_image_of_workers")]
    print(  # noqa: T201
        f"\npeak {found['peak_bytes'] / MIB:.1f} MiB; slope: {grown[0]:+.3f} MiB in 10,000 images; "
        f"of the workers {grown[1]:+.3f}",
        flush=True,
    )


def show_samples(samples: list[tuple[int, int, int]]) -> None:
    for at, own, others in samples:
        print(f"| {at:,} | {own / MIB:.1f} MiB | {others / MIB:.1f} MiB |")  # noqa: T201


def show_listing(found: dict[str, Any]) -> None:
    count = found["files"]
    print(  # noqa: T201
        f"| {found['kind']} | {count:,} | {found['seconds']:.1f} s | {found['bytes_of_paths'] / count:.0f} | "
        f"{found['bytes_held'] / count:.0f} | {found['bytes_peak'] / count:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--steps", type=int, default=10_000, metavar="N", help="steps of a run [10000]")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], metavar="W", help="of the runs [0 2]")
    parser.add_argument("--images", type=int, default=100_000, metavar="N", help="images to embed [100000]")
    parser.add_argument("--files", type=int, default=1_000_000, metavar="N", help="files of a listing [1000000]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args()
    parts = options.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {' '.join(sorted(unknown))}; there are {', '.join(PARTS)}")

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}"
    numbers: dict[str, Any] = {"versions": versions}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "images", 200)
        if "steps" in parts:
            numbers["steps"] = []
            for workers in options.workers:
                numbers["steps"].append(memory_of_steps(folder, options.steps, workers))
                show_steps(numbers["steps"][-1])
        if "embeds" in parts:
            numbers["embeds"] = []
            for ending, workers in (("safetensors", 0), ("safetensors", 2), ("npz", 0)):
                numbers["embeds"].append(memory_of_embedding(folder, options.images, ending, workers))
                show_embedding(numbers["embeds"][-1])
        if "listing" in parts:
            print("\nbytes a file: of its path, held, at the peak")  # noqa: T201
            print("\n| listing | files | time | path | held | peak |\n|---|---|---|---|---|---|")  # noqa: T201
            numbers["listing"] = listings(folder, options.files)
        if "survey" in parts:
            numbers["survey"] = found = surveyed(folder, options.files)
            print("\n| files | read | bytes read | time |\n|---|---|---|---|")  # noqa: T201
            print(  # noqa: T201
                f"| {found['files']:,} | {found['files_read']:,} | {found['bytes_read']:,} | {found['seconds']:.1f} s |"
            )
    print(f"\n{versions}")  # noqa: T201
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
