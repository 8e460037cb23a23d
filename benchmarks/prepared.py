"""Images a second that one core loads: from photographs, and from what `lomar prepare` makes of them, in one run.

    python benchmarks/prepared.py --data imagenet_samples [--enlarge 4000 3000] [--image-sizes 224] [--short-sides 512]

`--enlarge` first makes photographs of that width and height of the files, JPEG of quality 90, in a temporary folder;
enlarged ones hold less detail than a camera's, so decoding the originals is made too cheap rather than too expensive.
Then it prepares them as JPEG and as arrays, and loads each as `lomar benchmark loader` does; the ratios are to Pillow
with torchvision on the originals. Times are those of the processor, of one thread, and passes over the same files take
turns, so that other load on the machine, which slows memory and caches down, meets all; the table gives medians. All
files are in memory (the page cache).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import PIL.Image
from lightning_fabric import Fabric

from lomar.benchmark.loading import LOMAR, PILLOW, loading_step
from lomar.benchmark.machine import processor_name, versions
from lomar.benchmark.place import Place
from lomar.commands.prepare import prepare
from lomar.data.opening import open_source

VIEWS = 4


def enlarged(data: str, folder: Path, width: int, height: int, limit: int) -> Path:
    """A folder of photographs of this size, made of the first images of another."""
    source = open_source(data)
    folder.mkdir()
    for index in range(min(limit, len(source))):
        with PIL.Image.open(source.name(index)) as file:
            picture = file.convert("RGB").resize((width, height), PIL.Image.Resampling.LANCZOS)
        picture.save(folder / f"{index:04d}.jpg", quality=90)
    return folder


def rates_of(steps: dict[str, Callable[[], object]], images: int, seconds: float) -> dict[str, list[float]]:
    """Images a second of each pass, which take turns for so long."""
    for step in steps.values():
        step()  # warms the page cache and the libraries
    rates: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, rates.values())) < 3:
        for name, step in steps.items():
            began = time.process_time()
            step()
            rates[name].append(images / (time.process_time() - began))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second from photographs and from prepared ones, one core.")
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--enlarge", type=int, nargs=2, metavar=("W", "H"), help="make photographs of this size first")
    parser.add_argument("--limit", type=int, default=50, help="most photographs to enlarge")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[224], metavar="PX", help="sides of the crop")
    parser.add_argument("--short-sides", type=int, nargs="+", default=[512], metavar="PX", help="to prepare for")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each crop size")
    options = parser.parse_args()

    place = Place(Fabric(accelerator="cpu", devices=1), False, "fp32")
    rows = ["| crop, px | read from | MB an image | images/s | ratio (range) |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), Path(options.data)
        if options.enlarge:
            data = enlarged(options.data, folder / "photographs", *options.enlarge, options.limit)
        count = len(open_source(str(data)))
        paths = {"originals, Pillow + torchvision": (PILLOW, data), "originals": (LOMAR, data)}
        for side_px in options.short_sides:
            for encoding in ("jpeg", "raw"):
                out = folder / f"{encoding}-{side_px}"
                prepare(data=data, out=out, short_side=side_px, encoding=encoding, workers=0)
                paths[f"{encoding}, shorter side {side_px}"] = (LOMAR, out)
        sizes = {}
        for kind, (_, images) in paths.items():
            source = open_source(str(images))
            sizes[kind] = sum(len(source.read(index)) for index in range(count)) / count / 1e6
        for image_px in options.image_sizes:
            steps = {
                kind: loading_step(place, count, path=path, data=str(images), image_px=image_px, views=VIEWS)
                for kind, (path, images) in paths.items()
            }
            rates = rates_of(steps, count, options.seconds)
            baseline = next(iter(rates.values()))
            for kind, found in rates.items():
                ratios = [rate / base for rate, base in zip(found, baseline, strict=True)]
                rows.append(
                    f"| {image_px} | {kind} | {sizes[kind]:.2f} | {statistics.median(found):.0f} "
                    f"| {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) |"
                )
    made = " made {} x {} px".format(*options.enlarge) if options.enlarge else ""
    software = ", ".join(f"{package} {version}" for package, version in versions().items())
    print("\n".join(rows))  # noqa: T201
    print(f"\n{count} photographs of {options.data}{made}; one core of {processor_name()}; {software}")  # noqa: T201


if __name__ == "__main__":
    main()
