"""`lomar knn`: how well the nearest neighbours of frozen features tell classes, for any encoder, layer and k."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lomar import __version__
from lomar.commands.frozen import (
    FEW_FROM,
    INTERPOLATION,
    FrozenEncoder,
    Part,
    check_features,
    check_readable,
    left_out,
    open_frozen,
)
from lomar.commands.progress import watched
from lomar.data.labels import SPLIT_SEED, LabelledData, labelled_data
from lomar.downstream.features import Wanted, layer_count
from lomar.downstream.knn import neighbour_accuracy
from lomar.errors import UserError
from lomar.files import write_text
from lomar.options import KnnOptions


@dataclass(frozen=True)
class _Features:
    """Features of the images that can be used: one (N, D) for each layer; their labels (N,); names of the others."""

    features: list[Tensor]
    labels: Tensor
    unusable: list[str]


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar knn` with the options that were given; returns the exit status."""
    for name in ("model", "data"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar knn --help")
    options = KnnOptions(**given)
    out = Path(options.out) if options.out else None
    if out and out.exists():
        raise UserError(f"--out {out} already exists; give another file, or remove it")
    data = labelled_data(options.data, SPLIT_SEED, options.val)
    encoder = open_frozen(
        options.model,
        options.image_size,
        patch_size=options.patch_size,
        seed=options.seed,
        device=options.device,
        precision=options.precision,
        workers=options.workers,
    )
    layers = tuple(dict.fromkeys(options.layers or (layer_count(encoder.model),)))
    check_features(encoder.model, [options.features], layers)
    wanted = [Wanted(options.features, layer) for layer in layers]
    encoder.shapes(wanted)  # refuses what the model cannot give, before the work
    if max(options.k) > len(data.train):
        raise UserError(f"--k {max(options.k)}: there are {len(data.train)} train images to be neighbours")
    where = f"--data {options.data}"
    # First those that are asked about: usually they are fewer, so that what is wrong with the images shows early.
    parts = [
        Part(data.val, "val images", f"--val {options.val}" if options.val else where),
        Part(data.train, "train images", where),
    ]
    for part in parts:
        check_readable(part.labelled.source, encoder, part.where, part.name)
    began = time.monotonic()
    val, train = (_features(encoder, part, wanted, options.batch_size) for part in parts)
    images_per_s = (len(data.train) + len(data.val)) / (time.monotonic() - began)
    ks = _ks(options.k, len(train.labels))
    found = _accuracies(encoder, layers, train, val, ks, options.temperature)
    sys.stdout.write(_table(encoder, data, train, val, options, found, images_per_s))
    if out:
        about = {
            "lomar": __version__,
            "options": asdict(options),
            "model": type(encoder.model).__name__,
            "image_size": encoder.input.size,
            "crop": encoder.input.crop_pct,
            "interpolation": INTERPOLATION,
            "precision": encoder.precision,
            "device": encoder.hardware.name,
            "classes": data.classes,
            "val_drawn_from_train": data.drawn,
            "train": {"images": len(train.labels), "unusable": train.unusable},
            "val": {"images": len(val.labels), "unusable": val.unusable},
            "images_per_s": round(images_per_s, 2),
            "results": found,
        }
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        try:
            write_text(out, text)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    return 0


def _features(encoder: FrozenEncoder, part: Part, wanted: Sequence[Wanted], batch_size: int) -> _Features:
    """Features of a part's images.

    Raises:
        UserError: none of them can be used.
    """
    features: list[list[Tensor]] = []
    goods: list[Tensor] = []
    batches = encoder.features(part.labelled.source, wanted, batch_size)
    with encoder.autocast(), closing(watched(batches, part.name, len(part))) as seen:
        for found, usable in seen:
            features.append(found)
            goods.append(usable)
    good = torch.cat(goods)
    names = left_out(part, good, encoder, _warn)
    labels = torch.from_numpy(part.labelled.labels)
    return _Features([torch.cat(kind)[good] for kind in zip(*features, strict=True)], labels[good], names)


def _ks(asked: Sequence[int], usable: int) -> list[int]:
    """The numbers of neighbours, in order; where fewer images can be used, all of these vote."""
    for k in sorted(set(asked)):
        if k > usable:
            _warn(f"--k {k}: {usable} train images can be used, and all of them vote")
    return sorted({min(k, usable) for k in asked})


def _warn(text: str) -> None:
    sys.stderr.write(f"lomar: {text}\n")


def _accuracies(
    encoder: FrozenEncoder,
    layers: Sequence[int],
    train: _Features,
    val: _Features,
    ks: Sequence[int],
    temperature: float,
) -> list[dict[str, Any]]:
    """A row for each layer and k; neighbours are looked for on the encoder's device."""
    device = encoder.device
    rows = []
    for layer, bank, queries in zip(layers, train.features, val.features, strict=True):
        shares = neighbour_accuracy(
            bank.to(device), train.labels.to(device), queries.to(device), val.labels.to(device), ks, temperature
        )
        rows += [{"layer": layer, "k": k, "top1": round(a, 6), "top5": round(b, 6)} for k, (a, b) in shares.items()]
    return rows


def _table(
    encoder: FrozenEncoder,
    data: LabelledData,
    train: _Features,
    val: _Features,
    options: KnnOptions,
    found: Sequence[Mapping[str, Any]],
    images_per_s: float,
) -> str:
    """What was asked of whom, then a line for each layer and k, in per cent."""
    height, width = encoder.input.size
    few = len(data.classes) >= FEW_FROM
    drawn = " (a fifth, drawn from all)" if data.drawn else ""
    lines = [
        f"{options.model}: {options.features} features of {height} x {width} px images, {encoder.precision} on "
        f"{encoder.hardware.name}, {images_per_s:.0f} images a second",
        f"{len(val.labels)} val images{drawn} asked about, {len(train.labels)} train images vote, "
        f"{len(data.classes)} classes",
        "layer     k  top-1 %" + ("  top-5 %" if few else ""),
    ]
    for row in found:
        line = f"{row['layer']:5}{row['k']:6}{100 * row['top1']:9.2f}"
        lines.append(line + (f"{100 * row['top5']:9.2f}" if few else ""))
    return "\n".join(lines) + "\n"
