"""Claims about exported graphs. The judges are onnxruntime and the program that torch.export reads back."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from lomar.errors import UserError
from lomar.interop import graphs
from lomar.interop.graphs import METADATA_FILE, graph_of, write_onnx, write_torch_export
from lomar.interop.weights import describe
from lomar.model import Encoder

SMALL: dict[str, Any] = {
    "img_size": (28, 20),
    "patch_size": 4,
    "in_chans": 5,
    "num_classes": 0,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
}
OWN = (28, 20)
OTHERS = [(8, 8), (12, 44), (20, 28)]
BEIT: dict[str, Any] = {"key_bias": False, "init_values": 0.1, "bias_grid": (3, 3)}
QUICK: dict[str, Any] = {"position": "none", "depth": 1}  # where only the writing is looked at


def encoder(**changes: Any) -> Encoder:
    """A small encoder whose every tensor matters."""
    torch.manual_seed(0)
    made = Encoder(**SMALL | changes).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn_like(parameter) / 8
    return describe(made, (0.4,) * 5, (0.2,) * 5, 65535.0, [f"class {n}" for n in range(made.num_classes)])


def run_onnx(path: Path) -> tuple[Callable[[Tensor], Tensor], onnxruntime.InferenceSession]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), session


def computes_the_same(run: Callable[[Tensor], Tensor], wanted: Callable[[Tensor], Tensor], *sizes: Any) -> None:
    for size in sizes:
        for batch in (1, 5):
            images = torch.randn(batch, 5, *size)
            with torch.no_grad():
                assert torch.allclose(run(images), wanted(images), atol=2e-5), (batch, size)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with contextual position; not to be changed."""
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    assert write_onnx(path, graph_of(encoder(num_classes=3), tokens=False), 18) < 1e-5
    return path


def test_onnx_takes_any_number_of_images_of_any_size(written: Path) -> None:
    run, session = run_onnx(written)
    assert session.get_inputs()[0].shape == ["batch", 5, "4*rows", "4*columns"]
    assert [output.name for output in session.get_outputs()] == ["logits"]
    computes_the_same(run, encoder(num_classes=3), OWN, *OTHERS)


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "sincos"},
        {"position": "learned"},
        {"position": "shared-bias"},
        {"position": "block-bias", **BEIT},
        {"img_size": (4, 20)},
    ],
    ids=str,
)
def test_graphs_of_one_size_take_any_number_of_images(changes: dict[str, Any], tmp_path: Path) -> None:
    """Tables would have to be resized; and a grid of one row is apart from all others."""
    ours = encoder(num_classes=7, **changes)
    graph = graph_of(ours, tokens=False)
    height, width = ours.patch_embed.img_size
    write_onnx(tmp_path / "m.onnx", graph, 18)
    write_torch_export(tmp_path / "m.pt2", graph)
    run, session = run_onnx(tmp_path / "m.onnx")
    assert not graph.any_size and session.get_inputs()[0].shape == ["batch", 5, height, width]
    assert [output.name for output in session.get_outputs()] == ["logits"]
    computes_the_same(run, ours, (height, width))
    computes_the_same(torch.export.load(tmp_path / "m.pt2").module(), ours, (height, width))
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run(torch.randn(1, 5, 12, 12))


def test_tokens_are_those_of_forward_features(tmp_path: Path) -> None:
    """Of an encoder without any position, too."""
    ours = encoder(**BEIT | QUICK)
    graph = graph_of(ours, tokens=True)
    write_onnx(tmp_path / "m.onnx", graph, 18)
    run, session = run_onnx(tmp_path / "m.onnx")
    assert [output.name for output in session.get_outputs()] == ["tokens"]
    computes_the_same(run, ours.forward_features, OWN, OTHERS[0])


def test_a_program_takes_any_number_of_images_of_any_size(tmp_path: Path) -> None:
    ours = encoder(num_classes=7)
    assert write_torch_export(tmp_path / "m.pt2", graph_of(ours, tokens=False)) < 1e-5
    extra = {METADATA_FILE: ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    computes_the_same(program, ours, OWN, *OTHERS)
    assert json.loads(extra[METADATA_FILE])["classes"] == [f"class {n}" for n in range(7)]
    with pytest.raises(Exception, match="Guard failed"):
        program(torch.randn(1, 5, 30, 20))


def test_the_metadata_tells_how_images_are_prepared(written: Path) -> None:
    _, session = run_onnx(written)
    told = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert told == told | {
        "mean": [0.4] * 5,
        "std": [0.2] * 5,
        "scale": 65535.0,
        "size": [28, 20],
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "any_size": True,
        "patch_size": 4,
        "classes": ["class 0", "class 1", "class 2"],
        "output": "logits",
    }


@pytest.mark.parametrize("opset", [18, 21])
def test_the_operator_set_is_the_one_asked_for(opset: int, tmp_path: Path) -> None:
    write_onnx(tmp_path / "m.onnx", graph_of(encoder(**QUICK), tokens=False), opset)
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model)
    assert {item.domain: item.version for item in model.opset_import}[""] == opset


def test_an_operator_set_there_is_not_is_refused(tmp_path: Path) -> None:
    """And the newest there is named, which then works."""
    graph = graph_of(encoder(**QUICK), tokens=False)
    with pytest.raises(UserError, match=r"^--to onnx: PyTorch .* cannot do it with operator set 99 \(") as caught:
        write_onnx(tmp_path / "m.onnx", graph, 99)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    newest = int(str(caught.value).rpartition("; the newest that works here is ")[2])
    assert newest > 18 and write_onnx(tmp_path / "m.onnx", graph, newest) < 1e-5


def test_what_torch_export_cannot_do_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **others: Any) -> None:
        raise RuntimeError("Could not guard on it\nat length")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(UserError) as caught:
        write_torch_export(tmp_path / "deep" / "m.pt2", graph_of(encoder(**QUICK), tokens=False))
    told = f"--to torch-export: PyTorch {torch.__version__} cannot do it (Could not guard on it)"
    assert str(caught.value) == told and not list(tmp_path.iterdir())


def test_a_program_moves_to_another_device(tmp_path: Path) -> None:
    """As docs/export.md says: every tensor, and what the graph itself makes of the image's size."""
    write_torch_export(tmp_path / "m.pt2", graph_of(encoder(num_classes=7), tokens=False))
    program = torch.export.load(tmp_path / "m.pt2")
    assert {str(node.kwargs.get("device")) for node in program.graph.nodes} == {"None", "cpu"}
    moved = move_to_device_pass(program, "meta")
    assert {tensor.device.type for tensor in (*moved.state_dict.values(), *moved.constants.values())} == {"meta"}
    assert {str(node.kwargs.get("device")) for node in moved.graph.nodes} == {"None", "meta"}
    assert moved.module()(torch.empty(3, 5, 12, 44, device="meta")).shape == (3, 7)


def test_onnx_drops_what_is_over_a_multiple_and_takes_one_row(written: Path) -> None:
    """As docs/export.md says."""
    run, _ = run_onnx(written)
    images = torch.randn(2, 5, 15, 22)
    assert torch.equal(run(images), run(images[:, :, :12, :20].contiguous()))
    computes_the_same(run, encoder(num_classes=3), (4, 20), (12, 4))


def test_a_graph_that_computes_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a little, or of another shape; the file of before stays."""
    (tmp_path / "m.onnx").write_text("before")
    graph = graph_of(encoder(**QUICK), tokens=False)
    for wrong, off in ((lambda images: graph.module(images) * 1.001, "1.0e-03"), (lambda images: images, "inf")):
        monkeypatch.setattr(graphs, "_onnxruntime", lambda file, wrong=wrong: wrong)
        with pytest.raises(UserError) as caught:
            write_onnx(tmp_path / "m.onnx", graph, 18)
        assert str(caught.value) == (
            f"onnxruntime computes otherwise than PyTorch from images (1, 5, 28, 20), by {off} of the largest output; "
            "nothing is written"
        )
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_small_outputs_are_held_to_the_same_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = encoder(num_classes=3, **QUICK)
    with torch.no_grad():
        for parameter in ours.head.parameters():
            parameter *= 1e-6
    graph = graph_of(ours, tokens=False)
    assert write_torch_export(tmp_path / "m.pt2", graph) < 1e-5
    monkeypatch.setattr(graphs, "_onnxruntime", lambda model: lambda images: graph.module(images) * 1.5)
    with pytest.raises(UserError, match=r"by 5\.0e-01 of the largest output; nothing is written$"):
        write_onnx(tmp_path / "m.onnx", graph, 18)


def test_missing_packages_are_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else there(name))
    with pytest.raises(UserError) as caught:
        write_onnx(tmp_path / "m.onnx", graph_of(encoder(), tokens=False), 18)
    assert (
        str(caught.value)
        == "--to onnx needs onnx and onnxruntime and onnxscript: pip install onnx onnxruntime onnxscript"
    )


def test_large_weights_stand_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of models above 2 GB."""
    from torch.onnx._internal.exporter import _onnx_program

    ours = encoder(**QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
        write_onnx(tmp_path / "m.onnx", graph_of(ours, tokens=False), 18)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    computes_the_same(run_onnx(tmp_path / "m.onnx")[0], ours, OWN)
    write_onnx(tmp_path / "m.onnx", graph_of(ours, tokens=False), 18)  # all of it in one file now
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    computes_the_same(run_onnx(tmp_path / "m.onnx")[0], ours, OWN)


def test_the_encoder_is_left_as_it_was(tmp_path: Path) -> None:
    ours = encoder(position="block-bias", **BEIT)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    write_torch_export(tmp_path / "m.pt2", graph_of(ours, tokens=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
