"""Attention: every way it is worked out is one formula, in values and in every gradient."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lomar.model import attention
from lomar.model.attention import (
    ALL,
    BACKENDS,
    Attention,
    ContextualAttention,
    Places,
    attend,
    backend_for,
    by_products,
)
from lomar.model.encoder import Encoder
from lomar.model.positions import BUCKETS, contextual_buckets, grid_coordinates, piecewise_index, with_cls
from lomar.training.memory import saved_bytes

CPU_BACKENDS = [name for name in BACKENDS if name != "fused"]  # tests/model/test_kernels.py has that one


def by_hand(q: Tensor, k: Tensor, v: Tensor, table: Tensor, at: Tensor, asked: slice) -> Tensor:
    """softmax(q k' / sqrt(d) + q R[bucket]) v, bucket by bucket from `piecewise_index`; cls is token 0."""
    n = at.shape[1]
    buckets = torch.full((len(at), n, n), BUCKETS - 1)
    for row in range(len(at)):
        for i in range(1, n):
            for j in range(1, n):
                down, across = (int(at[row, i, axis] - at[row, j, axis]) for axis in (0, 1))
                buckets[row, i, j] = 7 * (piecewise_index(down) + 3) + piecewise_index(across) + 3
    vectors = table.T[buckets[:, asked]]  # (R or 1, M, N, d)
    bias = torch.einsum("rhid,rijd->rhij", q, vectors.expand(len(q), -1, -1, -1))
    return ((q @ k.mT) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v


def inputs(rows: int, heads: int, at: Tensor, d: int, asked: slice) -> list[Tensor]:
    """Queries of some tokens, keys and values of all with cls, and a table: float64, with gradients."""
    n = 1 + at.shape[1]
    shapes = [(rows, heads, len(range(n)[asked]), d), (rows, heads, n, d), (rows, heads, n, d), (d, BUCKETS)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 7), st.sampled_from([1, 3, 8]), st.booleans(), st.randoms())
def test_backends_equal_the_formula_in_values_and_gradients(
    backend: str, rows: int, heads: int, patches: int, d: int, shared: bool, chance: random.Random
) -> None:
    torch.manual_seed(chance.randrange(2**32))
    at = torch.randint(0, 12, (1 if shared else rows, patches, 2))
    first, last = sorted(torch.randperm(patches + 2)[:2].tolist())
    tensors = inputs(rows, heads, at, d, asked := slice(first, last))
    whole = with_cls(at)
    found = BACKENDS[backend](*tensors, Places(whole, contextual_buckets(whole)), asked)
    expected = by_hand(*tensors, whole, asked)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weights).sum(), tensors) for out in (found, expected)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*gradients)


def test_a_few_heads_at_a_time_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    at = grid_coordinates(2, 3)[None]
    tensors = inputs(2, 5, at, 4, ALL)
    places = Places(with_cls(at), None)
    whole = BACKENDS["products"](*tensors, places)
    monkeypatch.setattr(attention, "_ELEMENTS_AT_ONCE", 2 * 7 * 7)  # two heads
    torch.testing.assert_close(BACKENDS["recomputed"](*tensors, places), whole)


@pytest.mark.parametrize("bias", [None, (1, 3, 5, 7), (2, 3, 5, 7)])
def test_products_are_torchs_attention(bias: tuple[int, ...] | None) -> None:
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    added = None if bias is None else torch.randn(bias, dtype=torch.float64, requires_grad=True)
    tensors = [q, k, v] + ([] if added is None else [added])
    outs = [by_products(q, k, v, added), nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), tensors) for out in outs))
    torch.testing.assert_close(attend(q, k, v, added), outs[0])


def test_long_sequences_keep_no_weights_on_a_cpu() -> None:
    """Beyond `KEPT_TOKENS` nothing of size heads x N x N waits for the backward pass."""
    layer = ContextualAttention(8, 2)
    relation = layer.relate(grid_coordinates(33, 32)[None], None)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(1, 1057, 8), relation)
    assert backend_for(torch.zeros(1, 2, 3, 4), 1057) == "recomputed"
    assert backend_for(torch.zeros(1, 2, 3, 4), 785) == "products"
    assert max(kept) <= 1057 * 1057  # the buckets, which all heads and blocks share


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_in_bfloat16_backends_are_within_its_rounding(backend: str) -> None:
    """Three parts in a hundred of the float64 values, in every gradient too: logits are rounded to 8 bits."""
    torch.manual_seed(0)
    at = grid_coordinates(7, 7)[None]
    tensors = inputs(3, 2, at, 16, ALL)
    places = Places(with_cls(at), contextual_buckets(with_cls(at)))
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        given = [each.detach().to(dtype).requires_grad_() for each in tensors]
        out = BACKENDS[backend](*given, places)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for exact, rounded in zip(*results, strict=True):
        assert (rounded.double() - exact).norm() < 0.03 * exact.norm()


def test_counting_for_a_gpu_no_weights_are_kept() -> None:
    for position in ("none", "contextual"):
        layer = ContextualAttention(8, 2) if position == "contextual" else Attention(8, 2)
        relation = layer.relate(grid_coordinates(7, 7)[None], None)
        x = torch.randn(3, 50, 8)
        plain = saved_bytes(lambda layer=layer, x=x, relation=relation: layer(x, relation))
        with attention.as_fused():
            fused = saved_bytes(lambda layer=layer, x=x, relation=relation: layer(x, relation))
        assert plain - fused > 0.9 * 3 * 2 * 50 * 50 * 4  # a layer's weights in float32


def test_an_exported_program_asks_for_no_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU changes its way, at `KEPT_TOKENS`, a program made on one side of that runs on the other."""
    monkeypatch.setattr(attention, "KEPT_TOKENS", 10)
    model = Encoder(16, 4, 3, num_classes=0, embed_dim=8, depth=2, num_heads=2).eval()
    side = torch.export.Dim("side", min=2, max=64) * 4
    program = torch.export.export(model, (torch.zeros(1, 3, 16, 20),), dynamic_shapes=({2: side},))
    for height in (8, 40):
        images = torch.randn(1, 3, height, 20)
        torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.parametrize("asked", [slice(4, None), slice(0, 1), slice(None)])
@pytest.mark.parametrize("position", ["none", "contextual"])
def test_only_some_tokens_ask(position: str, asked: slice) -> None:
    """They get what they get when all ask, and look where they look then."""
    layer = ContextualAttention(12, 3) if position == "contextual" else Attention(12, 3, key_bias=False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, relation = torch.randn(2, 7, 12), layer.relate(grid_coordinates(2, 3)[None], None)
    torch.testing.assert_close(layer(x, relation, asked), layer(x, relation)[:, asked])
    torch.testing.assert_close(layer.weights(x, relation, asked), layer.weights(x, relation)[:, :, asked])
