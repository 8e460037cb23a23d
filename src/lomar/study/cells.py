"""What a cell does: commands of lomar, one after the other, and what is kept of each."""

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lomar.data.decode import PixelFormat
from lomar.interop.tokenizers import load_tokenizer
from lomar.methods.cost import step_flops, tokenizer_flops
from lomar.methods.recipes import RECIPES
from lomar.options import PretrainOptions, flag, read_config
from lomar.study.plan import Cell, Job
from lomar.study.splits import FOLDER, JUDGE, PRETRAIN, TUNE, WATCH
from lomar.training.loop import AGAIN_NOT_FINITE, HALVED
from lomar.training.records import LOG_FILE, Metrics

CELLS, RESULT, TOKENIZER = "cells", "cell.json", "tokenizer.safetensors"
CONFIG = "config.yaml"  # of a run
LOSSES = 50  # last steps whose mean loss is told
NEIGHBOURS = 20
PAUSE = 20  # a step that takes so many median ones was no step: the process or the machine stood still

Found = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What all cells of a study have in common.

    Args:
        out: the study's folder.
        model, image_size, patch_size, batch_size: as the options of `lomar pretrain`.
        finetune_epochs, finetune_batch_size: of fine-tuning.
        evaluations: how often a pretraining run measures its k-NN; 0 for never.
        hardware: options of where and how fast, for every command that has them: "device", "precision", "workers".
        tokenizer: the file, for methods that predict tokens.
    """

    out: Path
    model: str
    image_size: int
    patch_size: int
    batch_size: int
    finetune_epochs: float
    finetune_batch_size: int
    evaluations: int
    hardware: Mapping[str, Any]
    tokenizer: Path

    def images(self, name: str) -> Path:
        """The place of a list of `lomar.study.splits`."""
        return self.out / FOLDER / name

    def folder(self, cell: Cell) -> Path:
        """Where a cell's files are."""
        return self.out / CELLS / cell.name


@dataclass(frozen=True)
class Step:
    """One command of a cell.

    Args:
        name: what is found stands under it in `cell.json`.
        words: the command, without `lomar`.
        read: what is kept of what it left.
        written: what it writes anew each time; of an earlier attempt it is removed.
    """

    name: str
    words: list[str]
    read: Callable[[], Found]
    written: Path | None = None


def steps(job: Job, setup: Setup) -> list[Step]:
    """The commands of a job in order; of one that only chooses a rate, the first two."""
    cell, folder = job.cell, setup.folder(job.cell)
    made = [_probing(cell, setup, folder)]
    if cell.method:
        made.insert(0, _pretraining(cell, setup, folder))
    return [*made, _asking(cell, setup, folder), _tuning(cell, setup, folder)] if job.chosen else made


def needs_tokenizer(method: str) -> bool:
    """Whether a recipe predicts tokens; "" is no pretraining."""
    return bool(method) and RECIPES[method].options.get("target") == "tokens"


def divergence(log: Path) -> Found | None:
    """What is kept of a pretraining that broke off since its loss was not finite again; None if it did not."""
    said = log.read_text(encoding="utf-8", errors="replace").rstrip().rsplit("\n", 1)[-1]
    return {"diverged": True} if said.endswith(AGAIN_NOT_FINITE) else None


def result_of(folder: Path) -> Found:
    """What is known of a cell; {} where nothing is."""
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options as they are typed."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [flag(name)] + ([] if value is True else [_text(each) for each in values])
    return words


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _model(cell: Cell, setup: Setup, folder: Path) -> dict[str, Any]:
    """The options that say which encoder is judged."""
    if cell.method:
        return {"model": folder / "run"}
    return {"model": f"scratch:{setup.model}", "image_size": setup.image_size, "patch_size": setup.patch_size}


def _pretraining(cell: Cell, setup: Setup, folder: Path) -> Step:
    run = folder / "run"
    options: dict[str, Any] = {
        "data": setup.images(PRETRAIN),
        "out": run,
        "resume": True,
        "method": cell.method,
        "model": setup.model,
        "image_size": setup.image_size,
        "patch_size": setup.patch_size,
        **dict(cell.changes),
        "batch_size": setup.batch_size,
        "base_lr": cell.base_lr,
        "epochs": cell.epochs,
        "seed": cell.seed,
        "eval_every": round(cell.epochs / max(1, setup.evaluations), 6),
        **setup.hardware,
    }
    if setup.evaluations:
        options["eval_data"] = setup.images(WATCH)
    if needs_tokenizer(cell.method):
        options["tokenizer"] = setup.tokenizer
    return Step("pretraining", ["pretrain", *_words(options)], lambda: _pretrained(run))


def _probing(cell: Cell, setup: Setup, folder: Path) -> Step:
    probe = folder / "probe"
    options = {
        **_model(cell, setup, folder),
        "data": setup.images(JUDGE),
        "out": probe,
        "resume": True,
        "features": "pooled",
        "seed": cell.seed,
        **setup.hardware,
    }
    return Step("probe", ["probe", *_words(options)], lambda: _probed(probe))


def _asking(cell: Cell, setup: Setup, folder: Path) -> Step:
    answer = folder / "knn.json"
    layer = result_of(folder).get("probe", {}).get("layer", "LAYER")
    options = {
        **_model(cell, setup, folder),
        "data": setup.images(JUDGE),
        "out": answer,
        "layers": layer,
        "k": NEIGHBOURS,
        "seed": cell.seed,
        **setup.hardware,
    }
    return Step("knn", ["knn", *_words(options)], lambda: _asked(answer), written=answer)


def _tuning(cell: Cell, setup: Setup, folder: Path) -> Step:
    classifier = folder / "classifier"
    options = {
        **_model(cell, setup, folder),
        "data": setup.images(TUNE),
        "out": classifier,
        "resume": True,
        "epochs": setup.finetune_epochs,
        "eval_every": setup.finetune_epochs,
        "batch_size": setup.finetune_batch_size,
        "seed": cell.seed,
        **setup.hardware,
    }
    return Step("finetuned", ["finetune", *_words(options)], lambda: _tuned(classifier))


def _pretrained(run: Path) -> Found:
    """Time is that of all steps, without evaluations, checkpoints and pauses."""
    rows = [row for row in Metrics.read(run / "metrics.jsonl") if "images_per_s" in row]
    options = read_config(str(run / CONFIG), PretrainOptions)
    batch_size = options["batch_size"]
    images = len(rows) * batch_size
    seconds = [batch_size / row["images_per_s"] for row in rows]
    usual = statistics.median(seconds)
    taken = sum(usual if each > PAUSE * usual else each for each in seconds)
    return {
        "images": images,
        "images_per_s": round(images / taken, 2),
        "minutes": round(taken / 60, 3),
        "elapsed_s": rows[-1]["elapsed_s"],
        "loss": round(statistics.mean(row["loss"] for row in rows[-LOSSES:]), 5),
        "data_wait": round(statistics.median(row["data_wait"] for row in rows), 4),
        "flops_of_image": _flops_of_image(run, options),
        "peak_bytes": rows[-1].get("peak_bytes"),
        "diverged": HALVED in (run / LOG_FILE).read_text(encoding="utf-8", errors="replace"),
    }


def _flops_of_image(run: Path, options: Mapping[str, Any]) -> int:
    """Of a step of the method that a run's options make, with the forward pass of its tokenizer if it has one."""
    tokenizer = load_tokenizer(run / TOKENIZER) if options.get("target") == "tokens" else None
    scale = PixelFormat(options["channels"], options["pixel_type"]).scale
    c = RECIPES[options["method"]].compose(options, tokenizer.vocab if tokenizer else 0, scale)
    if tokenizer is None:
        return step_flops(c)
    encoder = tokenizer.encoder
    tokens = tokenizer_flops(c.grid, encoder.channels, encoder.width, tokenizer.vocab, encoder.blocks_per_group)
    return step_flops(c) + tokens


def _probed(probe: Path) -> Found:
    found = json.loads((probe / "probe.json").read_text(encoding="utf-8"))
    chosen = found["chosen"]
    head = chosen["input"]
    return {
        "layer": int(head.rsplit(" ", 1)[1]),
        "base_lr": chosen["base_lr"],
        "held_out": chosen["held_out"]["top1"],
        "top1": chosen["val"]["top1"],
    }


def _asked(answer: Path) -> Found:
    (row,) = json.loads(answer.read_text(encoding="utf-8"))["results"]
    return {"layer": row["layer"], "k": row["k"], "top1": row["top1"]}


def _tuned(classifier: Path) -> Found:
    last = Metrics.read(classifier / "metrics.jsonl")[-1]
    return {"top1": last["top1"], "epoch": last["epoch"]}
