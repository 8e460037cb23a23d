"""An encoder as a graph that runs without lomar: ONNX, or a program of torch.export.

A graph is written only if it computes what the encoder does, for one image and for several, and at a second size where
it takes any.
"""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from lomar import __version__
from lomar.errors import UserError
from lomar.interop.staging import staged
from lomar.interop.weights import first_line
from lomar.model import Encoder
from lomar.seeding import seeded

# Largest difference allowed, over the largest number. Other orders of adding up, and other approximations of erf and
# exp, make 1e-6 of ViT-tiny and 6e-6 of ViT-B or of 32 blocks in float32; what is wired wrongly differs by about 1.
TOLERANCE = 1e-4
OLDEST_OPSET = 18  # of which the exporter makes all others
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
METADATA_FILE = "lomar.json"  # of a .pt2
_SMALLEST = torch.finfo(torch.float32).tiny  # in the place of a largest number of 0
# Positions worked out from the grid by arithmetic; tables of absolute places and of biases are resized by splines.
_ANY_SIZE = ("contextual", "none")
_SMALLEST_GRID = 2  # torch.export keeps sides of 1 apart from all others
_BATCHES = (1, 3)


class _Forward(nn.Module):
    """What the graph computes of normalised images (B, C, height, width)."""

    def __init__(self, encoder: Encoder, tokens: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokens = tokens

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.forward_features(images) if self.tokens else self.encoder(images)


@dataclass(frozen=True)
class Graph:
    """What is to be written.

    Args:
        module: images -> output.
        output: "logits", "features" or "tokens".
        channels: of the images.
        size: (height, width) of the encoder's images, in pixels.
        patch: side in pixels, whose multiples the image's sides must be.
        any_size: whether the graph takes other sizes.
        has_tables: whether its positions are tables that would have to be resized for them.
        told: what a user of the graph must know: mean, std, scale, size, crop_pct, interpolation, classes and more.
    """

    module: nn.Module
    output: str
    channels: int
    size: tuple[int, int]
    patch: int
    any_size: bool
    has_tables: bool
    told: dict[str, Any]

    @property
    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """For torch.export: which sides of the input vary, and how."""
        sides = {0: Dim("batch")}
        if self.any_size:
            sides |= {2: self.patch * Dim("rows", min=_SMALLEST_GRID)}
            sides |= {3: self.patch * Dim("columns", min=_SMALLEST_GRID)}
        return {"images": sides}

    def images(self, batch: int, size: tuple[int, int] | None = None) -> Tensor:
        """Noise (batch, C, height, width) as of normalised images, the same every time."""
        return torch.randn(batch, self.channels, *(size or self.size), generator=seeded(0, batch, "export"))


def graph_of(encoder: Encoder, tokens: bool) -> Graph:
    """What an encoder of `lomar.load` becomes.

    Args:
        encoder: with its `pretrained_cfg`; its own image size is the graph's, or its first one.
        tokens: give all tokens of `forward_features`, not logits or pooled features.
    """
    made, config = encoder.architecture, encoder.pretrained_cfg or {}
    height, width = encoder.patch_embed.img_size
    has_tables = made["position"] not in _ANY_SIZE
    any_size = not has_tables and min(encoder.grid) >= _SMALLEST_GRID
    output = "tokens" if tokens else "logits" if encoder.num_classes else "features"
    told = {
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "scale": config["scale"],
        "size": [height, width],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "any_size": any_size,
        "patch_size": made["patch_size"],
        "classes": list(config.get("label_names", ())),
        "output": output,
        "lomar": __version__,
    }
    if not any_size:
        encoder = copy.deepcopy(encoder)
        encoder.set_input_size((height, width))  # biases of a smaller view are stretched once, not in every pass
    module = _Forward(encoder, tokens).eval()
    return Graph(module, output, made["in_chans"], (height, width), made["patch_size"], any_size, has_tables, told)


def require_onnx() -> None:
    """Raises UserError, with the command that installs them, if a package for ONNX is missing."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: pip install {' '.join(ONNX_PACKAGES)}")


def write_onnx(path: Path, graph: Graph, opset: int) -> float:
    """Write an ONNX file that onnxruntime computes as PyTorch does; what is told stands in its metadata as JSON.

    Weights of more than 2 GB stand beside it, in `data_file(path)`; one of an earlier export is removed.

    Returns:
        The largest difference between the two, over the largest output.

    Raises:
        UserError: a package is missing, the encoder cannot be written with this operator set, or the file computes
            something else.
    """
    require_onnx()
    with staged(path.parent) as place:
        file = place / path.name
        try:
            with _quiet(), torch.no_grad():
                program = _translated(graph.module, graph.images(2), opset, graph.output, graph.dynamic_shapes)
                program.model.metadata_props.update({name: json.dumps(value) for name, value in graph.told.items()})
                program.save(file)
                run = _onnxruntime(str(file))
        except OSError:
            raise
        except Exception as error:  # the exporter's and onnxruntime's have no common class
            newest = _newest_operator_set(opset)
            hint = f"; the newest that works here is {newest}" if newest and newest < opset else ""
            raise UserError(
                f"--to onnx: PyTorch {torch.__version__} and onnxruntime cannot do it with operator set {opset} "
                f"({first_line(error)}){hint}"
            ) from error
        difference = _checked(run, graph, "onnxruntime")
        large = data_file(file).exists()
    if not large:
        data_file(path).unlink(missing_ok=True)
    return difference


def _translated(module: nn.Module, images: Tensor, opset: int, output: str, shapes: dict[str, Any] | None) -> Any:
    """A module as a program of ONNX.

    Raises:
        Exception: of many classes; it cannot be done.
    """
    program = torch.onnx.export(
        module,
        (images,),
        dynamic_shapes=shapes,
        input_names=["images"],
        output_names=[output],
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    if program.model.opset_imports[""] != opset:  # it warns and keeps its own
        raise ValueError("the operators cannot be translated")
    return program


def _newest_operator_set(asked: int) -> int | None:
    """The newest one up to what was asked for with which a tiny encoder is written and run; None if there is none."""
    import onnx

    tiny = Encoder(2, 1, 1, 1, embed_dim=4, depth=1, num_heads=1).eval()
    for opset in range(min(asked, onnx.defs.onnx_opset_version()), OLDEST_OPSET - 1, -1):
        with contextlib.suppress(Exception), _quiet(), torch.no_grad():
            program = _translated(tiny, torch.zeros(1, 1, 2, 2), opset, "output", None)
            _onnxruntime(program.model_proto.SerializeToString())
            return opset
    return None


def data_file(path: Path) -> Path:
    """Where the weights of an ONNX file are that are too many to stand in it."""
    return path.with_name(f"{path.name}.data")


def write_torch_export(path: Path, graph: Graph) -> float:
    """Write a program that torch.export.load reads; what is told stands in it as `METADATA_FILE`.

    Returns:
        The largest difference between the program read back and the encoder, over the largest output.

    Raises:
        UserError: PyTorch cannot make a program of the encoder, or it computes something else.
    """
    with staged(path.parent) as place:
        file = place / path.name
        with _quiet(), torch.no_grad():
            try:
                program = torch.export.export(graph.module, (graph.images(2),), dynamic_shapes=graph.dynamic_shapes)
                torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(graph.told)})
                run = torch.export.load(file).module()
            except OSError:
                raise
            except Exception as error:  # there is no common class of what tracing, writing and reading raise
                raise UserError(
                    f"--to torch-export: PyTorch {torch.__version__} cannot do it ({first_line(error)})"
                ) from error
            return _checked(run, graph, "the program")


def _onnxruntime(model: str | bytes) -> Callable[[Tensor], Tensor]:
    """What runs a file, or what one holds."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _checked(run: Callable[[Tensor], Tensor], graph: Graph, by: str) -> float:
    """The largest difference between what runs the graph and PyTorch, over the largest output."""
    height, width = graph.size
    other = height + graph.patch, width + 2 * graph.patch
    inputs = [graph.images(batch, size) for size in (graph.size, other)[: 1 + graph.any_size] for batch in _BATCHES]
    largest = 0.0
    for images in inputs:
        with torch.no_grad():
            got, wanted = run(images), graph.module(images)
        difference = relative_difference(got, wanted)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{by} computes otherwise than PyTorch from images {tuple(images.shape)}, by {difference:.1e} of the "
                "largest output; nothing is written"
            )
        largest = max(largest, difference)
    return largest


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest number that is wanted; infinity for other shapes, NaN if any is NaN."""
    if got.shape != wanted.shape:
        return float("inf")
    return float((got - wanted).abs().max()) / max(_SMALLEST, float(wanted.abs().max()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings and messages, which speak of their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
