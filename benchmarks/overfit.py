"""A detector learns eight images by heart: whether all its parts work together.

    python benchmarks/overfit.py --data ../shared/data/coco_mini --out overfit [--model scratch:192x6x3] [--steps 800]

Takes the eight training images of COCO data with the most objects of no more than --most each, trains on them with
`lomar detect`, judges by the same images, and ends with status 1 if box AP is not above 0.8.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

COUNT, WANTED = 8, 0.8
SETTINGS = (
    "--image-size 256 --jitter 1 1 --batch-size 4 --micro-batch 4 --lr 1e-3 --layer-decay 1 --weight-decay 0.01 "
    "--head-channels 64 --regions 64 --clip-grad 1 --warmup-steps 20 --log-every 20"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="scratch:192x6x3")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--most", type=int, default=6)
    asked, others = parser.parse_known_args()
    asked.out.mkdir(parents=True)
    told = json.loads(next((asked.data / "annotations").glob("instances_train*.json")).read_text())
    crowded = {each["image_id"] for each in told["annotations"] if each["iscrowd"]}
    counts = Counter(each["image_id"] for each in told["annotations"] if each["image_id"] not in crowded)
    ranked = sorted((image for image, count in counts.items() if count <= asked.most), key=lambda i: (-counts[i], i))
    chosen = set(ranked[:COUNT])
    told["images"] = [each for each in told["images"] if each["id"] in chosen]
    told["annotations"] = [each for each in told["annotations"] if each["image_id"] in chosen]
    few = asked.out / "few.json"
    few.write_text(json.dumps(told))
    images = next(path for path in asked.data.iterdir() if path.name.startswith("train"))
    lomar = [sys.executable, "-m", "lomar", "detect", "--model", asked.model, "--out", str(asked.out / "run")]
    where = ["--data", str(images), "--annotations", str(few), "--val", str(images), "--val-annotations", str(few)]
    words = [*lomar, *where, *SETTINGS.split(), "--max-steps", str(asked.steps), *others]
    subprocess.run(words, check=True)
    found = json.loads((asked.out / "run" / "evaluation.json").read_text())
    objects = sum(counts[image] for image in chosen)
    print(f"{len(chosen)} images, {objects} objects: box AP {found['box_ap']:.3f}, mask AP {found['mask_ap']:.3f}")  # noqa: T201
    return 0 if found["box_ap"] > WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
