"""`lomar embed`: the features of every image in one file, in memory that does not grow with their number."""

import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lomar import __version__
from lomar.commands.frozen import FrozenEncoder, check_readable, open_frozen, weights_digest, why
from lomar.commands.progress import watched
from lomar.commands.runs import goes_on, raise_unless_done
from lomar.data.opening import open_source
from lomar.data.sources import ImageSource
from lomar.downstream.embedding import begun, partial_of
from lomar.downstream.embedding_writer import (
    ENDINGS,
    EmbeddingWriter,
    Plan,
    bytes_needed,
    check_finished,
    discard,
    holds_other,
)
from lomar.downstream.features import Wanted, layer_count
from lomar.errors import UserError
from lomar.files import only_writer
from lomar.interop.models import patch_size_of
from lomar.options import EmbedOptions, converted
from lomar.training.signals import StopRequest

_BATCH_SIZE = 64
# Patches an image may have at that batch size: attention may keep a number for each pair of them, in each head.
_PATCHES = {"cpu": 256, "cuda": 1024}
_PATCH_PX = 16  # taken for models without patches


def embed(**options: Any) -> Path:
    """Write the features of all images; the same keys as the options of `lomar embed`, with underscores.

    Returns:
        The file, for `lomar.downstream.embedding.read_embedding`.

    Raises:
        KeyboardInterrupt: SIGINT came; `resume=True` goes on.
        SystemExit: SIGTERM came; likewise.
        UserError: an option is unknown or wrong, or the images cannot be used.
    """
    given = converted(EmbedOptions, options)
    raise_unless_done(command(given))
    return Path(given["out"])


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar embed` with the options that were given; returns the exit status."""
    for name in ("model", "data", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar embed --help")
    options = EmbedOptions(**given)
    out = Path(options.out)
    _check_out(out, options)
    resume = goes_on(begun(out) is not None or out.exists(), given)
    source = open_source(options.data)
    encoder = open_frozen(
        options.model,
        options.image_size,
        seed=0,  # a scratch: model is the same one each time
        device=options.device,
        precision=options.precision,
        workers=options.workers,
    )
    check_readable(source, encoder, "--data", "files")
    batch_size = options.batch_size or _batch_size(encoder)
    plan = _plan(options, encoder, source, batch_size)
    try:
        if resume and begun(out) is None:
            check_finished(out, plan)
            _tidy(out)
            sys.stdout.write(f"{out} is finished: {plan.count} images\n")
            return 0
        _check_space(out, plan)
        with (
            only_writer(_lock_of(out), f"--out {out}"),
            closing((EmbeddingWriter.resume if resume else EmbeddingWriter.begin)(out, plan)) as writer,
        ):
            return _embed(writer, options, encoder, source, batch_size)
    except OSError as error:
        hint = "; --resume goes on when it can" if begun(out) is not None else ""
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}{hint}") from error


def _check_out(out: Path, options: EmbedOptions) -> None:
    """Refuse a file that cannot be written, or that nobody asked to replace.

    Raises:
        UserError: saying which option is right.
    """
    if out.suffix.lower() not in ENDINGS:
        raise UserError(f"--out is {options.out}; it must end in .safetensors or .npz")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder")
    if holds_other(out):
        raise UserError(f"--out {out}: {partial_of(out)} holds something else; give another file")
    if options.resume or options.overwrite:
        return  # `goes_on` refuses both
    rows = begun(out)
    if rows is not None:
        raise UserError(f"--out {out} was begun and has {rows} rows; --resume goes on, --overwrite starts anew")
    if out.exists():
        raise UserError(f"--out {out} exists; --overwrite replaces it")


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


def _tidy(out: Path) -> None:
    """Remove what a kill left beside a finished file."""
    if partial_of(out).exists() or _lock_of(out).exists():
        with only_writer(_lock_of(out), f"--out {out}"):
            discard(out)


def _batch_size(encoder: FrozenEncoder) -> int:
    """So many images that attention between their patches takes no more memory than at 256 (CPU) or 1024 (GPU)."""
    patch = [side if side > 1 else _PATCH_PX for side in patch_size_of(encoder.model)]
    patches = math.prod(size / side for size, side in zip(encoder.input.size, patch, strict=True))
    return max(1, min(_BATCH_SIZE, int(_BATCH_SIZE * (_PATCHES[encoder.hardware.device] / patches) ** 2)))


def _plan(options: EmbedOptions, encoder: FrozenEncoder, source: ImageSource, batch_size: int) -> Plan:
    """What the file is to be.

    Raises:
        UserError: the model does not give such features.
    """
    count = layer_count(encoder.model)
    if options.layer is not None and options.layer > count:
        raise UserError(f"--layer {options.layer}: the model has layers 1 to {count}")
    wanted = Wanted(options.features, options.layer)
    taken = encoder.input
    about = {
        "version": __version__,
        "model": options.model,
        "weights": weights_digest(encoder.model),
        "features": options.features,
        "layer": options.layer or count,
        "image_size": taken.size,
        "crop": taken.crop_pct,
        "channels": taken.channels,
        "scale": taken.scale,
        "mean": taken.mean,
        "std": taken.std,
        "root": str(Path(source.root).absolute()) if source.root else "",
        "images": source.fingerprint(),
        "batch_size": batch_size,
        "device": encoder.hardware.device,
        "precision": encoder.precision,
    }
    return Plan(about, len(source), _row_shape(encoder, wanted), options.dtype, source.relative_path)


def _row_shape(encoder: FrozenEncoder, wanted: Wanted) -> tuple[int, ...]:
    """(D,), or (H, W, D) of patches; (patches, D) where they are no grid.

    Raises:
        UserError: the model does not give such features.
    """
    (shape,) = encoder.shapes([wanted])
    if wanted.features != "patches":
        return shape
    infos: Sequence[Mapping[str, Any]] = encoder.model.feature_info  # type: ignore[assignment]  # every model of timm has it
    reduction = infos[(wanted.layer or len(infos)) - 1]["reduction"]
    sides = reduction if isinstance(reduction, Sequence) else (reduction, reduction)
    grid = tuple(math.ceil(size / side) for size, side in zip(encoder.input.size, sides, strict=True))
    return (*grid, shape[-1]) if math.prod(grid) == shape[0] else shape


def _check_space(out: Path, plan: Plan) -> None:
    """Refuse what the disk has no room for.

    Raises:
        UserError: with both numbers.
    """
    folder = next(each for each in out.absolute().parents if each.exists())
    needed, free = bytes_needed(out, plan), shutil.disk_usage(folder).free
    if needed > free:
        hints = ["--dtype float16 halves it"] if plan.dtype == "float32" else []
        hints += ["a .safetensors needs half of it"] if out.suffix.lower() == ".npz" else []
        advice = f"; {' and '.join(hints)}" if hints else ""
        raise UserError(f"--out {out} needs {needed / 1e9:.3g} GB, but {folder} has {free / 1e9:.3g} GB free{advice}")


def _embed(
    writer: EmbeddingWriter, options: EmbedOptions, encoder: FrozenEncoder, source: ImageSource, batch_size: int
) -> int:
    """All rows that are missing, and the file; returns the exit status."""
    out, plan, first = writer.out, writer.plan, writer.rows
    shape, device = " x ".join(map(str, plan.row)), encoder.hardware.name
    below = f", from {first} on" if first else ""
    sys.stdout.write(
        f"{plan.count} images{below}: {options.features} of layer {plan.about['layer']}, {shape} {plan.dtype} each, "
        f"{plan.features_bytes / 1e6:.4g} MB in all; {batch_size} at once in {encoder.precision} on {device}\n"
    )
    began = time.monotonic()
    with StopRequest() as stop, encoder.autocast():
        wanted = [Wanted(options.features, options.layer)]
        batches = encoder.features(source, wanted, batch_size, first)
        with closing(watched(batches, "embedding", plan.count, first)) as found:
            for (features,), good in found:
                writer.write(features.numpy().reshape(len(good), *plan.row), good.numpy())
                if stop.signal_number and writer.rows < plan.count:
                    writer.keep()
                    sys.stdout.write(f"stopped after {writer.rows} of {plan.count} images; go on with --resume\n")
                    return 128 + stop.signal_number
        bad = (~writer.good()).nonzero()[0].tolist()
        if len(bad) == plan.count:
            discard(out)
            raise UserError(f"--data: none of {plan.count} images can be used: {why(source, bad, encoder)}")
        writer.finish()
    rate = (plan.count - first) / max(1e-9, time.monotonic() - began)
    sys.stdout.write(f"{out}: {plan.count} rows, {rate:.0f} images/s\n")
    if bad:
        sys.stdout.write(
            f"{len(bad)} of {plan.count} images cannot be used; their rows are zeros and not good: "
            f"{why(source, bad, encoder)}\n"
        )
    return 0
