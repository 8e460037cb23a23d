"""The child process of a cell: python -m lomar.benchmark.child CELL, where CELL is a `Cell` as JSON.

It writes a `Measured` as JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch

from lomar.benchmark import attention, classifier, loading, pretraining, products
from lomar.benchmark.cells import Cell, Measured
from lomar.benchmark.memory import PeakMemory, limit_memory
from lomar.benchmark.place import Place

# name -> what prepares a step: the place, images in a step, and the cell's values -> the step
WORKS: dict[str, Callable[..., Callable[[], object]]] = {
    "pretraining": pretraining.training_step,
    "fine-tuning": classifier.training_step,
    "features": classifier.feature_step,
    "attention": attention.attention_step,
    "matrix product": products.product_step,
    "loading": loading.loading_step,
}


def measure(cell: Cell) -> Measured:
    """Measure a cell in this process."""
    place = Place.found(cell)
    peak = PeakMemory(place.device)
    if cell.memory_bytes and place.device.type == "cpu":
        limit_memory(cell.memory_bytes)
    if cell.threads:
        torch.set_num_threads(cell.threads)
    torch.manual_seed(0)
    step = WORKS[cell.work](place, cell.images, **cell.values)
    for _ in range(cell.warmup):
        step()
    place.wait()
    peak.restart()
    seconds = timed(step, cell.steps, place.device)
    found = Measured(seconds, peak.bytes)
    place.leave()
    return found


def timed(step: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` steps, one after the other.

    A GPU is not waited for between them, so that the host may run ahead as it does in training.
    """
    if device.type == "cuda":
        marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]
    times = [time.perf_counter()]
    for _ in range(count):
        step()
        times.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(times)]


if __name__ == "__main__":
    answer = json.dumps(asdict(measure(Cell(**json.loads(sys.argv[1])))))
    if Place.is_first():
        sys.stdout.write(answer + "\n")
