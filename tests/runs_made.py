"""Folders of runs, written by hand, as a report reads them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]

CONFIG = {
    "data": "/photos",
    "method": "lomar",
    "model": "16x3x2",
    "image_size": 32,
    "patch_size": 8,
    "window_size": 3,
    "views": 2,
    "mask_ratio": 0.8,
    "max_steps": 200,
    "batch_size": 50,
    "base_lr": 0.001,
    "clip_grad": 3.0,
    "workers": 2,
    "eval_data": None,
    "mask_layer": 0,
}
VIEWS = CONFIG | {
    "method": "dino",
    "window_size": None,
    "views": None,
    "mask_ratio": None,
    "local_crops": 8,
    "local_size": 16,
    "local_scale": [0.05, 0.4],
    "crop_scale": [0.4, 1.0],
    "head_width": 32,
    "head_outputs": 64,
    "momentum": 0.996,
    "temperature": 0.1,
    "teacher_temperature": [0.04, 0.07],
    "teacher_temperature_epochs": 30,
    "clip_by": "tensor",
    "max_steps": 300,
}
FINETUNE = {
    "model": "/run",
    "data": "/labelled",
    "val": None,
    "image_size": [32],
    "pool": "avg",
    "epochs": None,
    "max_steps": 200,
    "batch_size": 50,
    "layer_decay": 0.75,
    "mixup": 0.0,
    "smoothing": 0.1,
}


def course(steps: int = 200, **values: Any) -> list[Row]:
    """Rows of a quiet run of 5,000 images in batches of 50: each value is a number, or a function of the share done."""
    usual: Row = {
        "loss": lambda share: 1 - 0.3 * share,
        "lr": lambda share: 1e-3 * (1 - share),
        "grad_norm": 0.5,
        "images_per_s": 100.0,
        "data_wait": 0.05,
    }
    rows = []
    for step in range(1, steps + 1):
        row: Row = {"step": step, "epoch": round(step / 100, 6), "elapsed_s": step / 2}
        for name, value in (usual | values).items():
            row[name] = value(step / steps) if callable(value) else value
        rows.append(row)
    return rows


def judged(values: Sequence[float], key: str = "knn_top1", steps: int = 200, start: float | None = 0.3) -> list[Row]:
    """The rows of `course` with as many evaluations, evenly spread, and one before training."""
    rows = course(steps)
    for number, value in enumerate(values, start=1):
        rows[round(steps * number / len(values)) - 1][key] = value
    return ([] if start is None else [{"step": 0, "epoch": 0.0, "elapsed_s": 0.0, key: start}]) + rows


def make_run(folder: Path, rows: Sequence[Row] = (), config: Row | None = CONFIG, log: str = "", bad: str = "") -> Path:
    """A folder with these parts of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if log:
        (folder / "train.log").write_text(log)
    if bad:
        (folder / "bad_files.txt").write_text(bad)
    return folder
