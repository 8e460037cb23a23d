"""Claims about the fresh processes: their memory is their own, too large ones are told, and they work together."""

import json
import os
import signal
from dataclasses import asdict, replace
from mmap import mmap
from typing import Any

import pytest
import torch

from lomar.benchmark.cells import OUT_OF_MEMORY, Cell, CellError, Measured, measured, read_answer
from lomar.benchmark.memory import PeakMemory
from lomar.methods.recipes import IMAGENET_MEAN, IMAGENET_STD, RECIPES, compose

SIZES = {"model": "24x2x2", "image_size": 28, "patch_size": 4, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
LOMAR = dict(RECIPES["lomar"].options) | dict(RECIPES["lomar"].full) | SIZES | {"method": "lomar", "views": 1}


def pretraining(images: int, **settings: Any) -> Cell:
    composition = compose(LOMAR, vocab=0, scale=255.0).to_dict()
    return Cell("pretraining", {"composition": composition, "clip_grad": 3.0}, images, **settings)


def test_a_larger_batch_peaks_higher_and_each_step_is_timed() -> None:
    small, large = (measured(pretraining(images, warmup=1, steps=2, threads=1)) for images in (1, 256))
    assert len(small.seconds) == len(large.seconds) == 2 and min(small.seconds + large.seconds) > 0
    kept = 255 * 50 * 2 * 24 * 36  # bytes of 255 images more: 50 tokens through 2 blocks of 24
    assert large.peak_bytes > small.peak_bytes + kept


def test_what_does_not_fit_is_out_of_memory_and_no_traceback() -> None:
    """The limit is what this process may take beyond what it holds: half a gigabyte, less than such a product needs."""
    with pytest.raises(CellError, match=f"^{OUT_OF_MEMORY}$"):
        measured(Cell("matrix product", {"side": 2**14}, memory_bytes=2**29))


def test_processes_work_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = measured(pretraining(3, processes=2, threads=1))
    assert len(found.seconds) == 1 and found.peak_bytes > 0


ANSWER = Measured([0.5, 0.25], 7)


def test_the_answer_is_the_last_line() -> None:
    assert read_answer(f"a library said this\n{json.dumps(asdict(ANSWER))}\n", "a warning\n", 0) == ANSWER


@pytest.mark.parametrize(
    ("err", "status", "told"),
    [
        ("Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n", 1, OUT_OF_MEMORY),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\n", 1, OUT_OF_MEMORY),
        ("MemoryError\n", 1, OUT_OF_MEMORY),
        ("", -signal.SIGKILL, OUT_OF_MEMORY),
        ("Traceback ...\n  File x\nValueError: a window does not fit\n\n", 1, "ValueError: a window does not fit"),
        ("", 3, "ended with status 3"),
        ("", 0, "ended with status 0"),
    ],
)
def test_why_there_is_no_answer_is_told_in_a_line(err: str, status: int, told: str) -> None:
    with pytest.raises(CellError) as caught:
        read_answer("", err, status)
    assert str(caught.value) == told


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system keeps no such peak")
def test_the_peak_is_of_what_came_after_the_restart() -> None:
    peak = PeakMemory(torch.device("cpu"))
    with mmap(-1, 2**28) as large:  # not torch's: what that frees may stay with the process
        large.write(bytes(2**28 - 1) + b"1")
        assert peak.bytes > 2**27
    peak.restart()
    assert peak.bytes < 2**27


def test_a_cell_goes_through_json_unchanged() -> None:
    cell = replace(pretraining(2), precision="bf16", compiled=True)
    again = Cell(**json.loads(json.dumps(asdict(cell))))
    assert again.images == 2 and again.compiled and again.values["composition"]["window_size"] == 7
