"""Images with rectangles in COCO's format, and a detector small enough to learn from them in a test."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SETTINGS = (
    "--image-size 64 --window 4 --head-channels 8 --regions 16 --batch-size 2 --micro-batch 1 --workers 0 "
    "--precision fp32 --device cpu --jitter 0.8 1.2"
)


def coco(folder: Path, count: int, first: int, masks: bool = True) -> dict[str, Any]:
    """Images with red and blue rectangles, and what COCO's format says of them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(first)
    told: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "red"}, {"id": 9, "name": "blue"}],
    }
    for number in range(first, first + count):
        pixels = rng.integers(90, 130, (48, 64, 3), dtype=np.uint8)
        for kind, channel in ((3, 0), (9, 2)):
            left, top = int(rng.integers(0, 30)), int(rng.integers(0, 20))
            width, height = int(rng.integers(14, 30)), int(rng.integers(14, 26))
            pixels[top : top + height, left : left + width] = 0
            pixels[top : top + height, left : left + width, channel] = 255
            corners = [left, top, left + width, top, left + width, top + height, left, top + height]
            told["annotations"].append(
                {
                    "id": len(told["annotations"]) + 1,
                    "image_id": number,
                    "category_id": kind,
                    "iscrowd": 0,
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    **({"segmentation": [corners]} if masks else {}),
                }
            )
        Image.fromarray(pixels).save(folder / f"{number}.png")
        told["images"].append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 64})
    return told


def coco_layout(root: Path) -> Path:
    """COCO's layout, of 4 images to train on and 2 to judge by."""
    (root / "annotations").mkdir(parents=True)
    for part, count, first in (("train", 4, 1), ("val", 2, 11)):
        told = coco(root / f"{part}2017", count, first)
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(told))
    return root
