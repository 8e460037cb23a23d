"""Claims about the backbone of a detector: golden vectors, timm, and the encoder that it comes from."""

from typing import Any, TypeVar

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import filler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lomar.detection.attention import GridAttention, contextual_on_grid, folded, from_windows, to_windows
from lomar.detection.backbone import LEVELS, Backbone, SimplePyramid, global_blocks
from lomar.detection.frameworks import FRAMEWORKS, Framework
from lomar.model import Encoder
from lomar.model.attention import ALL, contextual_bias
from lomar.model.positions import contextual_buckets, grid_coordinates

M = TypeVar("M", bound=nn.Module)

VITDET, VITAE = FRAMEWORKS["vitdet"], FRAMEWORKS["vitae"]


def encoder(position: str = "contextual", **changes: object) -> Encoder:
    values: dict[str, object] = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
    key_bias = position not in ("shared-bias", "block-bias")
    return Encoder(**values | {"num_classes": 0, "position": position, "key_bias": key_bias} | changes)  # type: ignore[arg-type]


def filled(module: M, fixed: tuple[str, ...] = ()) -> M:
    """The module, every tensor with its golden value, which its place among the sorted names decides."""
    state = module.state_dict()
    for j, name in enumerate(sorted(name for name in state if name not in fixed)):
        norm = name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
        state[name].copy_(0.5 * filler(*state[name].shape, j=j) + norm)
    return module


def looked_at(attention: GridAttention, side: int) -> Tensor:
    x = 4 * filler(1, side * side, 48, j=1000)
    relation = attention.relate(grid_coordinates(side, side)[None], (side, side))
    with torch.no_grad():
        return attention(x, relation)[0]


@pytest.mark.parametrize(
    ("window", "scaled", "token", "values"),
    [
        (0, False, 0, [0.17590774, 3.16304139, -3.67457069, 0.55548482]),
        (0, False, 63, [0.23584492, 3.74465015, -4.1297814, 0.61634383]),
        (0, True, 0, [0.40702739, 3.14439748, -3.64319828, 0.79101343]),
        (0, True, 63, [0.31823593, 3.18511139, -3.65873041, 0.70442614]),
        (6, True, 0, [0.41873214, 3.16383181, -3.66031287, 0.80268677]),
    ],
)
def test_decomposed_position_is_that_of_both_sources(
    window: int, scaled: bool, token: int, values: list[float]
) -> None:
    """SPEC H8: detectron2 with unscaled queries, the ViTAE repository with scaled ones and with padded windows."""
    attention = filled(GridAttention(48, 3, (8, 8), window, decomposed=True, scaled=scaled).double())
    torch.testing.assert_close(looked_at(attention, 8)[token, :4], torch.tensor(values).double(), atol=1e-6, rtol=0)


def test_the_backbone_is_detectron2s() -> None:
    """SPEC H7: windows of 6 in blocks 0 and 1, block 2 global, positions resized from 32 px."""
    backbone = Backbone(encoder("sincos").architecture, VITDET, img_size=64, window=6, globals_=(2,))
    filled(backbone.double().eval())
    with torch.no_grad():
        (out,) = backbone(4 * filler(1, 3, 64, 64, j=1000))
    assert out.shape == (48, 16, 16)
    first = [-1.45440421, 2.85778104, -1.60526273, -0.96679128, 2.84914816]
    last = [-2.74512347, -1.32214728, 2.2163956, -2.33194651, -1.52030579]
    torch.testing.assert_close(out[:5, 0, 0], torch.tensor(first).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(out[:5, 15, 15], torch.tensor(last).double(), atol=1e-6, rtol=0)
    assert out.sum().item() == pytest.approx(-5021.585244448, abs=1e-6)


def test_one_window_of_full_size_is_the_plain_transformer() -> None:
    """timm's, without cls and position, judges; the window is as large as the grid."""
    judge = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=0,
        class_token=False, pos_embed="none", global_pool="avg", fc_norm=False,
    ).double().eval()  # fmt: skip
    backbone = Backbone(
        encoder("none").architecture, VITAE, 64, window=16, globals_=(), decomposed=False, drop_path=0.0
    )
    backbone.load_state_dict(judge.state_dict())
    images = filler(2, 3, 64, 64, j=1000)
    with torch.no_grad():
        expected = judge.forward_features(images).transpose(1, 2).unflatten(2, (16, 16))
        torch.testing.assert_close(backbone.double().eval()(images), expected)


@pytest.mark.parametrize("position", ["contextual", "sincos", "learned", "shared-bias", "block-bias", "none"])
def test_all_windows_at_once_are_global_attention(position: str) -> None:
    """With every position, whatever it needs to know: a window of the image's size against blocks that are global."""
    ours = filled(encoder(position).double(), fixed=("pos_embed",))
    outs = []
    for window, globals_ in ((8, ()), (4, (0, 1, 2))):
        backbone = Backbone(ours.architecture, VITDET, 32, window, globals_, drop_path=0.0).double().eval()
        new = backbone.begin_with(ours)
        assert new == [f"blocks.{i}.attn.rel_pos.rel_pos_{axis}" for i in range(3) for axis in "hw"]
        outs.append(backbone(filler(1, 3, 32, 32, j=7)))
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("position", ["contextual", "sincos", "learned", "shared-bias", "block-bias", "none"])
def test_without_cls_the_encoders_blocks_say_the_same(position: str) -> None:
    """The encoder's own blocks, whose attention is told of patches alone, against the backbone."""
    ours = filled(encoder(position).double().eval(), fixed=("pos_embed",))
    backbone = Backbone(ours.architecture, VITAE, 32, window=0, decomposed=False, drop_path=0.0).double().eval()
    assert backbone.begin_with(ours) == []
    images = filler(1, 3, 32, 32, j=7)
    tokens, _ = ours._tokens(images)
    x = tokens[:, 1:]
    at = grid_coordinates(8, 8)[None]
    relation = ours.relate(at, (8, 8))
    if position == "contextual":
        relation = relation._replace(at=relation.at[:, 1:], buckets=relation.buckets[:, 1:, 1:])  # type: ignore[union-attr,index]
    elif position == "shared-bias":
        relation = relation[:, :, 1:, 1:]  # type: ignore[index,call-overload]
    elif position == "block-bias":
        relation = (relation[0][:, 1:, 1:], relation[1])  # type: ignore[index]
    with torch.no_grad():
        expected = ours.norm(ours.run_blocks(x, relation)).transpose(1, 2).unflatten(2, (8, 8))
        torch.testing.assert_close(backbone(images), expected)


@pytest.mark.parametrize("contextual", [False, True])
def test_long_sequences_are_worked_out_in_parts_and_give_the_same(
    contextual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, of the tables too."""
    attention = filled(GridAttention(48, 3, (6, 6), contextual=contextual, decomposed=True).double())
    relation = attention.relate(grid_coordinates(6, 6)[None], (6, 6))
    x = 4 * filler(2, 36, 48, j=5)

    def outcome() -> list[Tensor]:
        attention.zero_grad()
        out = attention(x, relation)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in attention.parameters() if p.grad is not None)]

    plain = outcome()
    monkeypatch.setattr("lomar.detection.attention.KEPT_TOKENS", 8)
    for a, b in zip(outcome(), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_without_kernels_a_gpu_keeps_no_weights_of_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = filled(GridAttention(48, 3, (6, 6), contextual=True).double())
    relation = attention.relate(grid_coordinates(6, 6)[None], (6, 6))
    monkeypatch.setattr("lomar.detection.attention.backend_for", lambda q, tokens: "products")
    monkeypatch.setattr("lomar.detection.attention.KEPT_TOKENS", 8)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() if tensor.is_floating_point() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attention(4 * filler(2, 36, 48, j=5), relation)
    assert max(kept) < 2 * 3 * 36 * 36


@given(st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None, max_examples=20)
def test_contextual_position_by_products_is_what_is_looked_up(rows: int, columns: int) -> None:
    """The pretraining's own bias judges, at any grid."""
    q, table = filler(2, 3, rows * columns, 8, j=1), filler(8, 50, j=2)
    buckets = contextual_buckets(grid_coordinates(rows, columns)[None])
    torch.testing.assert_close(contextual_on_grid(q, table, (rows, columns)), contextual_bias(q, table, buckets))


def test_folded_into_the_product_a_decomposed_position_is_the_same() -> None:
    attention = filled(GridAttention(48, 3, (5, 7), decomposed=True).double())
    relation = attention.relate(grid_coordinates(5, 7)[None], (5, 7))
    q, k, v = attention._project(4 * filler(2, 35, 48, j=5), ALL)
    assert attention.rel_pos is not None
    expected = attention.mixed(q, k, v, relation, ALL)
    torch.testing.assert_close(folded(q, k, v, *attention.rel_pos.along(q, (5, 7)), (5, 7)), expected)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
@settings(deadline=None)
def test_windows_are_put_together_as_they_were(rows: int, columns: int, side: int) -> None:
    x = torch.arange(2 * rows * columns * 3).view(2, rows, columns, 3)
    windows, padded = to_windows(x, side)
    assert windows.shape[1:] == (side * side, 3) and all(extent % side == 0 for extent in padded)
    assert torch.equal(windows[0, 0], x[0, 0, 0])
    assert torch.equal(from_windows(windows, side, padded, (rows, columns)), x)


@pytest.mark.parametrize(("depth", "blocks"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (3, (2,))])
def test_the_last_block_of_each_quarter_is_global(depth: int, blocks: tuple[int, ...]) -> None:
    assert global_blocks(depth) == blocks


@pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (13, 7), (3, 2)])
def test_the_pyramids_maps_are_each_half_of_the_one_before(framework: object, rows: int, columns: int) -> None:
    """Also where the image's sides are primes in patches: what does not fit is left out on the way down."""
    pyramid = SimplePyramid(48, framework, 32)  # type: ignore[arg-type]
    maps = pyramid(torch.randn(2, 48, rows, columns))
    assert tuple(maps) == LEVELS
    expected = [(4 * rows, 4 * columns), (2 * rows, 2 * columns), (rows, columns), (rows // 2, columns // 2)]
    expected.append(tuple((side + 1) // 2 for side in expected[-1]))  # type: ignore[arg-type]
    assert [tuple(each.shape) for each in maps.values()] == [(2, 32, *size) for size in expected]


@pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_the_pyramid_is_that_of_its_sources(framework: Framework) -> None:
    """Written out with torch's functions: deconvolutions up, one norm and GELU between two, two normed convolutions."""
    pyramid = filled(SimplePyramid(16, framework, 8).double())
    eps = framework.neck_eps

    def norm(x: Tensor, layer: Any, eps: float) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), (x.shape[1],), layer.weight, layer.bias, eps).movedim(-1, 1)

    def up(x: Tensor, layer: Any) -> Tensor:
        return F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)

    def neck(x: Tensor, layers: Any) -> Tensor:
        x = norm(F.conv2d(x, layers[0].weight), layers[1], eps)
        return norm(F.conv2d(x, layers[2].weight, padding=1), layers[3], eps)

    x = filler(2, 16, 6, 4, j=3)
    first, between, _, second = pyramid.p2
    p2 = up(F.gelu(norm(up(x, first), between, 1e-6)), second)
    scaled = (p2, up(x, pyramid.p3), x, F.max_pool2d(x, 2))
    expected = [neck(each, layers) for each, layers in zip(scaled, pyramid.necks, strict=True)]
    found = list(pyramid(x).values())
    for ours, theirs in zip(found[:-1], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(found[-1], found[-2][:, :, ::2, ::2])


def test_drop_path_grows_block_by_block_and_follows_the_numbers_given() -> None:
    """Rates of 0, 0.25 and 0.5: a number of 0.3 skips the last block alone."""
    architecture = encoder("none").architecture | {"depth": 3}
    backbone = filled(Backbone(architecture, VITAE, 32, window=0, decomposed=False, drop_path=0.5).double())
    images = filler(2, 3, 32, 32, j=7)

    def through(number: float) -> Tensor:
        return backbone(images, torch.full((2, 3, 2), number, dtype=torch.float64))

    with torch.no_grad():
        skipped, whole = through(0.3), through(1.0)
        last: Any = backbone.blocks[2]
        for layer in (last.attn.proj, last.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        torch.testing.assert_close(skipped, through(1.0))
        assert not torch.allclose(skipped, whole) and not torch.allclose(skipped, through(0.2))


def test_vit_base_has_detectron2s_number_of_weights() -> None:
    """85,889,024, with the row of cls in the table of positions, which is not in the pyramid's image."""
    sizes = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    with torch.device("meta"):
        plain = Encoder(224, 16, position="none", num_classes=0, **sizes)
    architecture = plain.architecture | {"position": "sincos"}
    with torch.device("meta"):
        backbone = Backbone(architecture, VITDET)
    assert sum(p.numel() for p in backbone.parameters()) == 85_889_024
