"""`lomar export`: an encoder or a classifier -> a folder for timm and the hub, ONNX, or a program of torch.export."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from lomar.errors import UserError
from lomar.interop.graphs import Graph, graph_of, require_onnx, write_onnx, write_torch_export
from lomar.interop.hub import FILES, write_hub_folder
from lomar.interop.models import check_size, size_given
from lomar.interop.weights import RECONSTRUCTOR_FILE, load
from lomar.model import Encoder
from lomar.options import ExportOptions, flag

_ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
# Of a composition: how it was pretrained. The rest is told elsewhere, or is for other methods.
_PRETRAINING = (
    *("method", "image_size", "window_size", "views", "mask", "mask_ratio", "architecture", "mask_layer"),
    *("transformer", "layer_scale", "drop_path", "target"),
)


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar export` with the options that were given; returns the exit status."""
    for name in ("model", "to", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar export --help")
    options = ExportOptions(**given)
    _check(given, options)
    encoder = load(options.model)
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
    for name, fitting in {"opset": ("onnx",), "output": ("onnx", "torch-export")}.items():
        if name in given and options.to not in fitting:
            raise UserError(f"{flag(name)} is for --to {' and '.join(fitting)}, not for --to {options.to}")
    out, ending = Path(options.out), _ENDINGS.get(options.to, "")
    if ending and out.suffix != ending:
        raise UserError(f"--out is {out}; with --to {options.to} it must end in {ending}")
    if not ending and (out.suffix in (*_ENDINGS.values(), ".safetensors") or out.is_file()):
        raise UserError(f"--out is {out}; with --to hub-folder it must be a folder")
    if ending and out.is_dir():
        raise UserError(f"--out is {out}, a folder; it must be a file")
    files = [out] if ending else [out / name for name in FILES]
    there = next((file for file in files if file.exists()), None)
    if there is not None and not options.overwrite:
        raise UserError(f"--out: {there} exists already; --overwrite replaces it, or give another --out")
    if options.to == "onnx":
        require_onnx()


def _hub_folder(encoder: Encoder, options: ExportOptions) -> Iterator[str]:
    """Write the folder; gives what to tell."""
    folder = Path(options.out)
    written = write_hub_folder(folder, encoder, _pretraining(Path(options.model)))
    yield f"{folder} written: {', '.join(FILES)}"
    if written.needs_lomar:
        yield f"  architecture {written.architecture}, which no ViT of timm's can hold: it needs `import lomar.model`"
    else:
        yield f"  architecture {written.architecture} with the arguments in config.json: it needs timm alone"
    yield (
        f'  timm.create_model("local-dir:{folder}", pretrained=True) computes what lomar does; '
        f"largest difference {written.difference:.1e}"
    )


def _graph(encoder: Encoder, options: ExportOptions) -> Iterator[str]:
    """Write the file; gives what to tell."""
    out, graph = Path(options.out), graph_of(encoder, tokens=options.output == "tokens")
    if options.to == "onnx":
        difference = write_onnx(out, graph, options.opset)
        yield f"{out} written: ONNX, operator set {options.opset}; {out.stat().st_size / 1e6:.1f} MB"
    else:
        difference = write_torch_export(out, graph)
        yield f"{out} written: torch.export of PyTorch {torch.__version__}; {out.stat().st_size / 1e6:.1f} MB"
    yield from _shapes(graph)
    if options.output == "tokens" and encoder.num_classes and encoder.global_pool == "avg":
        yield "  a classifier of pooled patches has no norm for tokens: they are as the last block leaves them"
    yield f"  checked against PyTorch with batches of 1 and 3: largest difference {difference:.1e}"


def _shapes(graph: Graph) -> Iterator[str]:
    height, width = graph.size
    if graph.any_size:
        sides = f"height and width multiples of {graph.patch} from {2 * graph.patch} px"
        yield f"  images (any number, {graph.channels}, height, width): {sides}"
    else:
        yield (
            f"  images (any number, {graph.channels}, {height}, {width}): tables of positions are made for this size; "
            "--image-size gives another"
        )
    yield f"  output {graph.output}; normalisation is in the metadata"


def _pretraining(run: Path) -> dict[str, Any]:
    """Options of the pretraining that a run's reconstructor tells of; empty where there is none."""
    file = run / RECONSTRUCTOR_FILE
    if not file.is_file():
        return {}
    with safetensors.safe_open(file, framework="pt") as opened:
        composition = json.loads((opened.metadata() or {}).get("lomar", "{}")).get("composition", {})
    return {name: composition[name] for name in _PRETRAINING if name in composition}
