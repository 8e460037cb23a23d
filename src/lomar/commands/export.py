"""`lomar export`: an encoder or a classifier -> a folder for timm and the hub, ONNX, or a program of torch.export."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml

from lomar.commands.judging import EVALUATION_FILE
from lomar.commands.runs import CONFIG_FILE
from lomar.errors import UserError
from lomar.interop.card import Accuracy, Background
from lomar.interop.graphs import Graph, data_file, graph_of, require_onnx, write_onnx, write_torch_export
from lomar.interop.hub import FILES, write_hub_folder
from lomar.interop.models import check_size, size_given
from lomar.interop.weights import CLASSIFIER_FILE, ENCODER_FILE, RECONSTRUCTOR_FILE, load
from lomar.model import Encoder
from lomar.options import ExportOptions, flag
from lomar.training.records import Metrics

_ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
# Of a composition and of a run's configuration: how it was pretrained, and trained further. The rest is told elsewhere,
# is for other methods, or is the user's own, such as where the images are.
_PRETRAINING = (
    *("method", "image_size", "patch_size", "window_size", "views", "mask", "mask_ratio", "architecture"),
    *("mask_layer", "transformer", "layer_scale", "drop_path", "target"),
    *("crop_scale", "local_crops", "local_size", "local_scale", "grayscale", "blur", "solarize", "patch_embed"),
    *("head_width", "head_outputs", "momentum", "temperature", "teacher_temperature"),
    *("epochs", "steps", "batch_size", "base_lr", "weight_decay"),
)
_FINETUNING = (
    *("epochs", "max_steps", "batch_size", "base_lr", "layer_decay", "weight_decay", "drop_path"),
    *("auto_augment", "mixup", "cutmix", "smoothing", "head_only", "freeze_layers"),
)


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar export` with the options that were given; returns the exit status."""
    for name in ("model", "to", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar export --help")
    options = ExportOptions(**given)
    _check(given, options)
    encoder = load(options.model)
    _check_weights(encoder, options.model)
    if options.image_size is not None:
        size = size_given(options.image_size)
        check_size(encoder, size)
        encoder.set_input_size(size)
    try:
        lines = list(_hub_folder(encoder, options) if options.to == "hub-folder" else _graph(encoder, options))
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be written: {error.strerror or error}") from error
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def _check(given: Mapping[str, Any], options: ExportOptions) -> None:
    """Refuse what does not go together, before anything is read."""
    fitting_of = {"opset": ("onnx",), "output": ("onnx", "torch-export"), "license": ("hub-folder",)}
    for name, fitting in fitting_of.items():
        if name in given and options.to not in fitting:
            raise UserError(f"{flag(name)} is for --to {' and '.join(fitting)}, not for --to {options.to}")
    if options.license is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", options.license):
        raise UserError(f"--license is {options.license!r}; it must be one word, such as apache-2.0")
    if not options.out:
        raise UserError(f"--out is empty; it must be a {'file' if options.to in _ENDINGS else 'folder'}")
    out, ending = Path(options.out), _ENDINGS.get(options.to, "")
    _check_out(out, ending, options)
    if options.to == "onnx":
        require_onnx()


def _check_out(out: Path, ending: str, options: ExportOptions) -> None:
    """Refuse a place for what is written that has the wrong name, or is taken."""
    if ending and out.suffix != ending:
        raise UserError(f"--out is {out}; with --to {options.to} it must end in {ending}")
    if not ending and (out.suffix in (*_ENDINGS.values(), ".safetensors") or out.is_file()):
        raise UserError(f"--out is {out}; with --to hub-folder it must be a folder")
    if ending and out.is_dir():
        raise UserError(f"--out is {out}, a folder; it must be a file")
    run_file = next((name for name in (ENCODER_FILE, CLASSIFIER_FILE) if not ending and (out / name).exists()), None)
    if run_file:  # whatever reads the folder would take this one, not what is exported
        raise UserError(f"--out {out} holds {run_file}; give what is exported a folder of its own")
    files = [out, data_file(out)] if options.to == "onnx" else [out] if ending else [out / name for name in FILES]
    there = next((file for file in files if file.exists()), None)
    if there is not None and not options.overwrite:
        raise UserError(f"--out: {there} exists already; --overwrite replaces it, or give another --out")


def _check_weights(encoder: Encoder, model: str) -> None:
    """Refuse weights that compute nothing: a comparison with them would show nothing either."""
    state = encoder.state_dict()
    name = next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)
    if name is not None:
        raise UserError(f"--model {model}: the weights hold NaN or infinity, in {name}")


def _hub_folder(encoder: Encoder, options: ExportOptions) -> Iterator[str]:
    """Write the folder; gives what to tell."""
    folder = Path(options.out)
    notes: list[str] = []
    written = write_hub_folder(folder, encoder, _background(encoder, options, notes))
    yield f"{folder} written: {', '.join(FILES)}"
    if written.needs_lomar:
        yield f"  architecture {written.architecture}, which no ViT of timm's can hold: it needs `import lomar.model`"
    else:
        yield f"  architecture {written.architecture} with the arguments in config.json: it needs timm alone"
    yield (
        f'  timm.create_model("local-dir:{folder}", pretrained=True) computes what lomar does; '
        f"largest difference {written.difference:.1e} of the largest output"
    )
    yield from notes
    if options.license is None:
        yield "  its card states no licence; --license ID does, for example --license apache-2.0"


def _graph(encoder: Encoder, options: ExportOptions) -> Iterator[str]:
    """Write the file; gives what to tell."""
    out, graph = Path(options.out), graph_of(encoder, tokens=options.output == "tokens")
    if options.to == "onnx":
        difference = write_onnx(out, graph, options.opset)
        files = [file for file in (out, data_file(out)) if file.exists()]
        size = sum(file.stat().st_size for file in files)
        yield f"{' and '.join(map(str, files))} written: ONNX, operator set {options.opset}; {size / 1e6:.1f} MB"
    else:
        difference = write_torch_export(out, graph)
        yield f"{out} written: torch.export of PyTorch {torch.__version__}; {out.stat().st_size / 1e6:.1f} MB"
    yield from _shapes(graph, checked=options.to != "onnx")
    if options.output == "tokens" and encoder.num_classes and encoder.global_pool == "avg":
        yield "  a classifier of pooled patches has no norm for tokens: they are as the last block leaves them"
    checked = "checked against PyTorch with batches of 1 and 3"
    yield f"  {checked}: largest difference {difference:.1e} of the largest output"


def _shapes(graph: Graph, checked: bool) -> Iterator[str]:
    """What goes in, and what comes out.

    Args:
        graph: that was written.
        checked: whether what runs it refuses sides that are not whole patches.
    """
    height, width = graph.size
    if graph.any_size:
        sides = f"height and width multiples of {graph.patch} from {2 * graph.patch} px"
        unchecked = "" if checked else ", which nothing checks: rows and columns over a multiple are dropped"
        yield f"  images (any number, {graph.channels}, height, width): {sides}{unchecked}"
    else:
        why = "tables of positions are made for this size" if graph.has_tables else "one row or column of patches alone"
        yield f"  images (any number, {graph.channels}, {height}, {width}): {why}; --image-size gives another"
    yield f"  output {graph.output}; normalisation is in the metadata"


def _background(encoder: Encoder, options: ExportOptions, notes: list[str]) -> Background:
    """What the folder of a run tells of it.

    Args:
        encoder: that is exported.
        options: what was asked for.
        notes: to tell the user; a line is added for each file that cannot be read.
    """
    path = Path(options.model)
    run = path.parent if path.name in (ENCODER_FILE, CLASSIFIER_FILE) else path

    def read(name: str, values: Callable[[Path], Any]) -> Any:
        try:
            return values(run / name) if (run / name).is_file() else {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError, safetensors.SafetensorError):
            notes.append(f"  {run / name} cannot be read: the card says nothing of what it holds")
            return {}

    settings = read(CONFIG_FILE, _settings)
    pretraining = read(RECONSTRUCTOR_FILE, _composition)
    if "method" in settings:
        pretraining = pretraining | settings | read("metrics.jsonl", _progress)
    accuracy = read(EVALUATION_FILE, lambda file: _accuracy(file, run)) if encoder.num_classes else None
    return Background(
        pretraining=_told(_PRETRAINING, pretraining),
        finetuning=_told(_FINETUNING, settings if "layer_decay" in settings else {}),
        accuracy=accuracy or None,
        licence=options.license,
    )


def _told(names: tuple[str, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def _settings(file: Path) -> dict[str, Any]:
    """A run's configuration."""
    return {**yaml.safe_load(file.read_text(encoding="utf-8"))}


def _composition(file: Path) -> dict[str, Any]:
    """What a reconstructor's metadata tells of its method."""
    with safetensors.safe_open(file, framework="pt") as opened:
        return {**json.loads((opened.metadata() or {}).get("lomar", "{}")).get("composition", {})}


def _progress(file: Path) -> dict[str, Any]:
    """How far a run has come: epochs, which may be fewer than were asked for, and steps."""
    rows = [row for row in Metrics.read(file) if "epoch" in row]
    return {"epochs": round(rows[-1]["epoch"], 1), "steps": rows[-1]["step"]} if rows else {}


def _accuracy(file: Path, run: Path) -> Accuracy | None:
    """What an evaluation says of a run's best classifier; None if it is of something else."""
    told = json.loads(file.read_text(encoding="utf-8"))
    if Path(told["model"]).name not in (CLASSIFIER_FILE, run.resolve().name):
        return None
    height, width = told["image_size"]
    return Accuracy(float(told["top1"]), int(told["images"]), (int(height), int(width)))
