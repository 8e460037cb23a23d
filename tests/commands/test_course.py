"""What commands that train have in common."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning_fabric import Fabric

from lomar.cli import parse
from lomar.commands.course import TrainingOptions, batching_of
from lomar.data.loader import Batching
from lomar.data.order import POOLED_GB
from lomar.options import DetectOptions, FinetuneOptions, PretrainOptions
from lomar.training.loop import Course


@pytest.mark.parametrize(
    ("command", "kind", "words", "own"),
    [
        ("pretrain", PretrainOptions, "--shuffle-gb 3", {"shuffle_gb": 3.0}),
        ("finetune", FinetuneOptions, "--shuffle-gb 3 --repeats 2", {"shuffle_gb": 3.0, "repeats": 2}),
        ("detect", DetectOptions, "", {"shuffle_gb": POOLED_GB}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_process_gets_its_share_of_what_the_options_say(
    command: str, kind: Any, words: str, own: dict[str, Any], device: str, tmp_path: Path
) -> None:
    typed = f"--data x --out y --model base --seed 7 --batch-size 12 --workers 2 {words}".split()
    options: TrainingOptions = object.__new__(kind)  # the others would be chosen, and do not matter here
    vars(options).update(parse(command, typed))
    processes = SimpleNamespace(global_rank=1, world_size=3, device=torch.device(device))
    course = SimpleNamespace(total_steps=50)
    found = batching_of(cast(Fabric, processes), options, cast(Course, course), 20, 4)
    expected = Batching(7, 12, 4, 50, first_batch=20, workers=2, rank=1, world_size=3, pin_memory=device == "cuda")
    assert found == Batching(**vars(expected) | own)
    assert found.share == range(4, 8)
