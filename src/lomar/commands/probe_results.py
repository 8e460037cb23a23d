"""What a probe leaves behind: its head, its numbers, and what is said of them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lomar import __version__
from lomar.commands.frozen import FEW_FROM, INTERPOLATION
from lomar.commands.probe_cache import Cached
from lomar.commands.probe_learning import MaeProbe, Scores, SweepProbe, best_head
from lomar.commands.probe_settling import SettledProbe
from lomar.downstream.probe import HeadInput
from lomar.files import write_text
from lomar.interop.weights import save_file

RESULT_FILE, HEAD_FILE = "probe.json", "probe.safetensors"


def finish_sweep(
    learner: SweepProbe,
    caches: Mapping[str, Cached],
    settled: SettledProbe,
    folder: Path,
    about: Mapping[str, Any],
) -> str:
    """Choose the head that does best on the images held out, write what all are worth, and tell it in some lines.

    Args:
        learner: finished.
        caches: "fit", "held" and "val".
        settled: the probe.
        folder: of the files.
        about: the run, for probe.json.
    """
    held, val = learner.scores(caches["held"]), learner.scores(caches["val"])
    heads = [(place, rate) for place in range(len(learner.inputs)) for rate in range(len(learner.rates))]
    best = best_head(held)
    rates = settled.options.base_lrs
    rows = [
        {
            "input": learner.inputs[place].name,
            "base_lr": rates[rate],
            "chosen": (place, rate) == best,
            "held_out": _numbers(held, (place, rate)),
            "val": _numbers(val, (place, rate)),
        }
        for place, rate in heads
    ]
    chosen = learner.inputs[best[0]]
    weight, bias = learner.sweep.head(best[0], best[1])
    places = learner.columns.of(chosen)
    mean, std = (torch.cat([each[p] for p in places]) for each in (learner.standard.mean, learner.standard.std))
    _save_head(folder, settled, chosen, {"weight": weight, "bias": bias, "mean": mean, "std": std})
    images = {"fit": _images(caches["fit"]), "held_out": _images(caches["held"]), "val": _images(caches["val"])}
    found = {"images": images, "chosen": next(row for row in rows if row["chosen"]), "heads": rows}
    _write(folder, settled, {**about, **found})
    return "\n".join(
        [
            *_table(learner.inputs, rates, held, val, best[0]),
            *_diverged(rates, held),
            _result(folder, settled, val, best, f"{chosen.name} at --base-lrs {rates[best[1]]:g}"),
        ]
    )


def finish_mae(
    learner: MaeProbe,
    caches: Mapping[str, Cached],
    settled: SettledProbe,
    folder: Path,
    about: Mapping[str, Any],
    bad: Sequence[str],
) -> str:
    """Write the head of MAE's probe and what it is worth, and tell it in a line.

    Args:
        learner: finished.
        caches: "val".
        settled: the probe.
        folder: of the files.
        about: the run, for probe.json.
        bad: names of images to learn from that could not be read.
    """
    val = learner.scores(caches["val"])
    standard, linear = learner.head.standard(), learner.head.linear
    tensors = {"weight": linear.weight, "bias": linear.bias, "mean": standard.mean, "std": standard.std}
    _save_head(folder, settled, learner.only, tensors)
    images = {"fit": {"images": len(settled.fit), "unusable": sorted(bad)}, "val": _images(caches["val"])}
    chosen = {"input": learner.only.name, "base_lr": settled.options.base_lrs[0], "val": _numbers(val, ())}
    _write(folder, settled, {**about, "images": images, "chosen": chosen})
    return _result(folder, settled, val, (), learner.only.name)


def _table(inputs: Sequence[HeadInput], rates: Sequence[float], held: Scores, val: Scores, chosen: int) -> list[str]:
    """Of each input, the rate that did best on what was held out."""
    width = max(len(each.name) for each in inputs)
    lines = [f"{'':<{width}}  base lr  held out %    val %"]
    for place, each in enumerate(inputs):
        if not held.loss[place].isfinite().any():
            lines.append(f"{each.name:<{width}}  diverged at all rates")
            continue
        (rate,) = best_head(Scores(*(kind[place] for kind in held)))
        lines.append(
            f"{each.name:<{width}}{rates[rate]:9.0e}{100 * held.top1[place, rate].item():12.2f}"
            f"{100 * val.top1[place, rate].item():9.2f}" + ("  chosen" if place == chosen else "")
        )
    return lines


def _diverged(rates: Sequence[float], held: Scores) -> list[str]:
    """A line on heads that are left out, if there are any."""
    lost = ~held.loss.isfinite()
    if not lost.any():
        return []
    at = ", ".join(f"{rate:g}" for rate, any_lost in zip(rates, lost.any(dim=0).tolist(), strict=True) if any_lost)
    return [f"{int(lost.sum())} of {lost.numel()} heads diverged and are left out, at --base-lrs {at}"]


def _result(folder: Path, settled: SettledProbe, val: Scores, head: tuple[int, ...], name: str) -> str:
    few = f", top-5 {val.top5[head].item():.2%}" if len(settled.data.classes) >= FEW_FROM else ""
    return f"val: top-1 {val.top1[head].item():.2%}{few} ({name}); all numbers are in {folder / RESULT_FILE}"


def _save_head(folder: Path, settled: SettledProbe, seen: HeadInput, tensors: Mapping[str, torch.Tensor]) -> None:
    """A linear classifier: logits are ((features - mean) / std) @ weight.T + bias."""
    about = {
        "model": settled.options.model,
        "image_size": settled.encoder.input.size,
        "features": [[part.features, part.layer] for part in seen.parts],
        "classes": settled.data.classes,
    }
    save_file(folder / HEAD_FILE, dict(tensors), "probe", about)


def _write(folder: Path, settled: SettledProbe, found: Mapping[str, Any]) -> None:
    """probe.json, whose being there says that the probe is done."""
    encoder = settled.encoder
    options = {name: v for name, v in asdict(settled.options).items() if name not in ("resume", "overwrite")}
    whole = {
        "lomar": __version__,
        "torch": torch.__version__,
        "options": options,
        "model": type(encoder.model).__name__,
        "image_size": encoder.input.size,
        "crop": encoder.input.crop_pct,
        "interpolation": INTERPOLATION,
        "device": encoder.hardware.name,
        "precision": encoder.precision,
        "classes": settled.data.classes,
        "val_drawn_from_train": settled.data.drawn,
        **found,
    }
    text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(folder / RESULT_FILE, text)


def _numbers(scores: Scores, head: tuple[int, ...]) -> dict[str, float | None]:
    found = {"top1": scores.top1[head].item(), "top5": scores.top5[head].item(), "loss": scores.loss[head].item()}
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in found.items()}


def _images(cached: Cached) -> dict[str, Any]:
    return {"images": len(cached), "unusable": cached.unusable}
