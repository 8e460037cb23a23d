"""Attention with contextual relative position, fused into Triton kernels for a GPU.

softmax(q k' / sqrt(d) + b) v with b[i, j] = q_i . R[bucket(i, j)], as `attention.contextual_bias` and
`positions.contextual_buckets` define them. The kernels work from coordinates and write nothing of size heads x M x N.

A tile is a block of queries against a block of keys. T = q R, queries x buckets, stays in registers, and the bias of a
tile is T looked up at the tile's buckets. The columns of R are put at 8 * row index + column index, so that 50 columns
fill 64 = 8 x 8; cls has the last.

The gradient of T needs sums of the logits' gradient over the keys of one bucket, dT[i, b] = sum of dS[i, j] over the j
with bucket(i, j) = b, and Triton has no scatter. For one row index, the keys of a column index are those whose column
lies in an interval that the query's column shifts: a product of dS, masked to the row index, with a 0/1 step matrix
gives its sums up to every column, and a difference of two of them each interval's sum. That costs about four operations
an element of the tile and a small product for every row index in the tile: up to seven in a window, one or two in a
tile of a large image. 49 masked sums would cost three operations each.

Every sum has a fixed order and there are no atomics: the same input gives the same bits on the same kind of device. A
program goes through many tiles one after another, so that R is loaded and its gradient written once for all of them.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"
# Triton reads the annotations of kernels in its own way, has no stubs, and is not on every platform.

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lomar.model import positions
from lomar.model.positions import BUCKETS, CLS_BUCKET, SIDE

_MOST_BYTES = 256  # of a token in one head: 128 channels of 16 bits; beyond, the compiler runs out of registers
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)  # the first NVIDIA GPUs with bfloat16
_INTERPRETED = bool(triton.knobs.runtime.interpret)  # for good: a kernel is made for the interpreter or the compiler

NOWHERE = tl.constexpr(positions.NOWHERE)
STRIDE = tl.constexpr(8)  # columns of R for each row index: 7 column indices, and one to spare
COLUMNS = tl.constexpr(64)  # for 7 row indices, and one to spare
CLS = tl.constexpr(63)
FAR = tl.constexpr(2**20)  # beyond every coordinate
LOG2_E = tl.constexpr(1.4426950408889634)


class Blocks(NamedTuple):
    """How the work is cut; numbers that decide about speed alone.

    Args:
        queries, keys: tokens in a tile, powers of two and at least 16.
        span: columns of the grid that one step matrix covers.
        warps: of a program.
        stages: of software pipelining.
    """

    queries: int
    keys: int
    span: int
    warps: int
    stages: int


# The largest blocks of each kernel, and those where one tile holds all queries and keys. Not measured on hardware: cut
# so that the compiler for an H100 keeps nearly everything in registers (tests/model/test_kernels.py prints its needs).
WINDOW = Blocks(64, 64, 16, 4, 1)
FORWARD = Blocks(64, 64, 32, 4, 2)
BACKWARD_QUERIES = Blocks(32, 64, 32, 4, 1)
BACKWARD_KEYS = Blocks(64, 64, 32, 4, 1)
_WARPS = 32 * 132  # of all programs of a launch: half of what an H100 has room for


def supported(q: Tensor) -> bool:
    """Whether `fused_attention` takes these queries here: on an NVIDIA GPU since Ampere, or in Triton's interpreter."""
    if q.dtype not in _DTYPES or q.shape[-1] * q.dtype.itemsize > _MOST_BYTES:
        return False
    return capable() if q.device.type == "cuda" else _INTERPRETED


@torch.compiler.assume_constant_result  # a compiled step need not know how it is found out
def capable() -> bool:
    """Whether this process's GPU is one."""
    return torch.version.hip is None and torch.cuda.get_device_capability() >= _LEAST_CAPABILITY


def fused_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, queries_at: Tensor, keys_at: Tensor) -> Tensor:
    """Attention with contextual relative position.

    Differentiable once, in q, k, v and the table. Sums, softmax and T are float32.

    Args:
        q: (R, heads, M, d), float32, bfloat16 or float16; `supported` says which.
        k, v: (R, heads, N, d), of q's type.
        table: (d, 50), the vectors R as columns, shared by the heads.
        queries_at: int32 (R or 1, M, 2), row and column of every query; `positions.NOWHERE` of cls.
        keys_at: int32 (R or 1, N, 2), the same of every key.

    Returns:
        (R, heads, M, d), in memory as (R, M, heads, d).

    Raises:
        ValueError: shapes that do not go together, which a kernel would read beyond.
    """
    rows, _, m, d = q.shape
    shapes = [tuple(each.shape) for each in (k, v, table, queries_at, keys_at)]
    n = k.shape[2]
    fits = shapes[0] == shapes[1] == (rows, q.shape[1], n, d) and shapes[2] == (d, BUCKETS)
    if not fits or any(at.shape not in ((1, each, 2), (rows, each, 2)) for at, each in ((queries_at, m), (keys_at, n))):
        raise ValueError(f"queries {tuple(q.shape)} do not go with keys, values, table and places {shapes}")
    out, _ = torch.ops.lomar.contextual_attention(q, k, v, table, queries_at, keys_at)
    return out


@torch.library.custom_op("lomar::contextual_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, queries_at: Tensor, keys_at: Tensor
) -> tuple[Tensor, Tensor]:
    """What `fused_attention` returns, and log2 of each query's sum of e^logits: float32 (R, heads, M)."""
    q, k, v = (_rows_contiguous(each) for each in (q, k, v))
    rows, heads, m, _ = q.shape
    n = k.shape[2]
    out, lse = _empty_outputs(q)
    blocks = _cut(WINDOW if _one_tile(q, n) else FORWARD, q, n)
    items = rows * heads * triton.cdiv(m, blocks.queries)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _forward[(_programs(items, blocks),)](
            q, k, v, _spread(table, q.dtype), *_places(queries_at), *_places(keys_at), out, lse,
            *_strides(q, k, v, out), heads, m, n, items, **_constants(q, n, blocks),
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("lomar::contextual_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    queries_at: Tensor,
    keys_at: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the table."""
    q, k, v, grad = (_rows_contiguous(each) for each in (q, k, v, grad))
    rows, heads, m, d = q.shape
    n = k.shape[2]
    dq, dk, dv = (_token_major(each) for each in (q, k, v))
    vectors = _spread(table, q.dtype)
    at = (*_places(queries_at), *_places(keys_at))
    delta = torch.empty_like(lse)
    one_tile = _one_tile(q, n)
    blocks = _cut(WINDOW if one_tile else BACKWARD_QUERIES, q, n)
    items = rows * heads * triton.cdiv(m, blocks.queries)
    partial = torch.empty(_programs(items, blocks), d, COLUMNS.value, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _backward_queries[(len(partial),)](
            q, k, v, vectors, *at, out, grad, lse, delta, dq, dk, dv, partial,
            *_strides(q, k, v, out, grad, dq, dk, dv), heads, m, n, items,
            span=blocks.span, one_tile=one_tile, **_constants(q, n, blocks),
        )  # fmt: skip
    if not one_tile:
        blocks = _cut(BACKWARD_KEYS, q, n)
        items = rows * heads * triton.cdiv(n, blocks.keys)
        with torch.cuda.device_of(q):
            _backward_keys[(_programs(items, blocks),)](
                q, k, v, vectors, *at, grad, lse, delta, dk, dv,
                *_strides(q, k, v, grad, dk, dv), heads, m, n, items, **_constants(q, n, blocks),
            )  # fmt: skip
    return dq, dk, dv, _gathered(partial.sum(0)).to(table.dtype)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor, queries_at: Tensor, keys_at: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q)


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    queries_at: Tensor,
    keys_at: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _token_major(q), _token_major(k), _token_major(v), torch.empty_like(table)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.lomar.contextual_attention_backward(grad, *ctx.saved_tensors)
    return (*gradients, None, None)


_attention.register_autograd(_differentiate, setup_context=_keep)


def _one_tile(q: Tensor, n: int) -> bool:
    blocks = _cut(WINDOW, q, n)
    return q.shape[2] <= blocks.queries and n <= blocks.keys


def _cut(largest: Blocks, q: Tensor, n: int) -> Blocks:
    """Blocks for queries (R, heads, M, d) and n keys: as many tokens as there are, and fewer if they are wide."""
    m, d = q.shape[2:]
    wide = max(1, _padded(d) * q.dtype.itemsize // 128)  # against d = 64 in bfloat16
    queries = max(16, min(largest.queries // wide, _padded(m)))
    keys = max(16, min(largest.keys // wide, _padded(n)))
    return largest._replace(queries=queries, keys=keys, warps=largest.warps if max(queries, keys) > 16 else 2)


def _programs(items: int, blocks: Blocks) -> int:
    return max(1, min(items, _WARPS // blocks.warps))


def _constants(q: Tensor, n: int, blocks: Blocks) -> dict[str, Any]:
    """What the kernels are compiled for."""
    d = q.shape[-1]
    return {
        "scale": d**-0.5,
        "head_dim": d,
        "width": _padded(d),
        "query_block": blocks.queries,
        "key_block": blocks.keys,
        "one_key_block": n <= blocks.keys,
        "precision": "ieee",  # of products of float32; those of the other types are exact
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _padded(size: int) -> int:
    """The next power of two, and at least 16: what products of tiles take."""
    return max(16, triton.next_power_of_2(size))


def _strides(*tensors: Tensor) -> Iterator[int]:
    """From row to row, head to head and token to token of each."""
    return (stride for tensor in tensors for stride in tensor.stride()[:3])


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _places(at: Tensor) -> tuple[Tensor, int]:
    """Coordinates (R or 1, N, 2), and how far it is to those of the next row."""
    at = at if at.stride()[1:] == (2, 1) else at.contiguous()
    return at, at.stride(0) if at.shape[0] > 1 else 0


def _token_major(tensor: Tensor) -> Tensor:
    """Uninitialised, of the shape (R, heads, N, d), in memory as (R, N, heads, d)."""
    rows, heads, n, d = tensor.shape
    return tensor.new_empty(rows, n, heads, d).transpose(1, 2)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _spread(table: Tensor, dtype: torch.dtype) -> Tensor:
    """The table (d, 50) with its columns where the kernels have them: (d, 64)."""
    vectors = table.new_zeros(table.shape[0], STRIDE.value, STRIDE.value, dtype=dtype)
    vectors[:, :SIDE, :SIDE] = table[:, :CLS_BUCKET].unflatten(1, (SIDE, SIDE))
    vectors[:, -1, -1] = table[:, CLS_BUCKET]
    return vectors.flatten(1)


def _gathered(vectors: Tensor) -> Tensor:
    """The inverse of `_spread`: (d, 64) -> (d, 50)."""
    vectors = vectors.unflatten(1, (STRIDE.value, STRIDE.value))
    return torch.cat([vectors[:, :SIDE, :SIDE].flatten(1), vectors[:, -1, -1:]], dim=1)


@triton.jit
def _vector_places(vectors, head_dim: tl.constexpr, width: tl.constexpr):
    """(width, COLUMNS): pointers to the table's vectors as columns, and where there is something."""
    row = tl.arange(0, width)[:, None]
    return vectors + row * COLUMNS + tl.arange(0, COLUMNS)[None, :], row < head_dim


@triton.jit
def _tile_places(
    first, pair, heads, token, n, row_stride, head_stride, token_stride, head_dim: tl.constexpr, width: tl.constexpr
):
    """(tokens, width): pointers to tokens of one row and head, and where there is something."""
    dims = tl.arange(0, width)
    # A row may lie more than 2^31 elements from the first, a token of it not.
    at = first + (pair // heads).to(tl.int64) * row_stride + (pair % heads) * head_stride
    return at + token[:, None] * token_stride + dims[None, :], (token < n)[:, None] & (dims < head_dim)[None, :]


@triton.jit
def _load_tile(
    first, pair, heads, token, n, row_stride, head_stride, token_stride, head_dim: tl.constexpr, width: tl.constexpr
):
    """(tokens, width), zero where there is nothing."""
    at, there = _tile_places(first, pair, heads, token, n, row_stride, head_stride, token_stride, head_dim, width)
    return tl.load(at, mask=there, other=0.0)


@triton.jit
def _store_tile(
    first, tile, pair, heads, token, n, row_stride, head_stride, token_stride,
    head_dim: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """A tile (tokens, width), rounded to the type of where it goes."""
    at, there = _tile_places(first, pair, heads, token, n, row_stride, head_stride, token_stride, head_dim, width)
    tl.store(at, tile.to(first.dtype.element_ty), mask=there)


@triton.jit
def _coordinates(at, row_stride, pair, heads, token, there):
    """Row and column of tokens; `NOWHERE` of cls and of tokens that are not there."""
    at += (pair // heads).to(tl.int64) * row_stride + token * 2
    return tl.load(at, mask=there, other=NOWHERE), tl.load(at + 1, mask=there, other=NOWHERE)


@triton.jit
def _index(delta):
    """Piecewise index of query - key along one axis, counted from 0."""
    near = tl.minimum(tl.maximum(delta, -4), 4)
    return near - (near >= 3).to(tl.int32) + (near <= -3).to(tl.int32) + 3


@triton.jit
def _least_delta(index):
    """The smallest query - key with this index: far below, -3, -1, 0, 1, 2, 4 for 0 to 6; far above for more."""
    delta = index - 3 - (index == 1).to(tl.int32) + (index == 6).to(tl.int32)
    return tl.where(index == 0, -FAR, tl.where(index > 6, FAR, delta))


@triton.jit
def _with_cls(query_row, key_row):
    """(queries, keys): the pairs in which the query or the key is the cls token."""
    return (query_row == NOWHERE)[:, None] | (key_row == NOWHERE)[None, :]


@triton.jit
def _bucket_columns(query_row, query_column, key_row, key_column):
    """(queries, keys): the column of T that each pair looks up."""
    row = _index(query_row[:, None] - key_row[None, :])
    column = _index(query_column[:, None] - key_column[None, :])
    return tl.where(_with_cls(query_row, key_row), CLS, row * STRIDE + column)


@triton.jit
def _by_bucket(q, vectors, scale: tl.constexpr, precision: tl.constexpr):
    """T as `_logits` wants it: float32 (queries, COLUMNS)."""
    return tl.dot(q, vectors, input_precision=precision) / scale


@triton.jit
def _logits(q, k, by_bucket, bucket, key_there, scale: tl.constexpr, precision: tl.constexpr):
    """Logits to the base of 2, float32 (queries, keys)."""
    # The product is added to the bias, not the other way round: so the compiler goes on in the product's layout.
    logits = tl.dot(q, tl.trans(k), tl.gather(by_bucket, bucket, axis=1), input_precision=precision)
    return tl.where(key_there[None, :], logits * (scale * LOG2_E), float("-inf"))


@triton.jit
def _running_at(running, column, span: tl.constexpr):
    """Running sums (queries, span) at columns (queries, STRIDE): zero before the first, that of the last behind it."""
    return tl.where(column >= 0, tl.gather(running, tl.minimum(tl.maximum(column, 0), span - 1), axis=1), 0.0)


@triton.jit
def _bucket_sums(
    ds, cls, query_row, query_column, key_row, key_column, sums, span: tl.constexpr, precision: tl.constexpr
):
    """`sums` (queries, STRIDE, STRIDE) plus ds (queries, keys) summed over the keys of each bucket but that of cls."""
    row_index = tl.where(cls, STRIDE, _index(query_row[:, None] - key_row[None, :]))
    places = tl.arange(0, STRIDE)
    query_patch = query_row != NOWHERE
    key_patch = key_row != NOWHERE
    lowest = tl.min(tl.where(query_patch, query_row, FAR), 0) - tl.max(tl.where(key_patch, key_row, -FAR), 0)
    highest = tl.max(tl.where(query_patch, query_row, -FAR), 0) - tl.min(tl.where(key_patch, key_row, FAR), 0)
    first = tl.min(tl.where(key_patch, key_column, FAR), 0)
    last = tl.max(tl.where(key_patch, key_column, -FAR), 0)
    for start in range(first, last + 1, span):
        # The keys of this span of columns, up to each of its columns.
        column = key_column[:, None] - start
        upto_column = (column >= 0) & (column <= tl.arange(0, span)[None, :])  # (keys, span)
        step = tl.where(upto_column, 1.0, 0.0).to(ds.dtype)
        # A column index takes the keys up to one column, less those up to where the next index begins.
        upto = query_column[:, None] - start - _least_delta(places)[None, :]  # (queries, STRIDE)
        below = query_column[:, None] - start - _least_delta(places + 1)[None, :]
        for row in range(_index(lowest), _index(highest) + 1):
            of_row = tl.where(row_index == row, ds, 0.0)
            running = tl.dot(of_row, step, input_precision=precision)  # (queries, span)
            part = _running_at(running, upto, span) - _running_at(running, below, span)  # (queries, STRIDE)
            sums += tl.where((places == row)[None, :, None], tl.expand_dims(part, 1), 0.0)
    return sums


@triton.jit
def _forward(
    q_at, k_at, v_at, vectors_at, queries_at, queries_at_row, keys_at, keys_at_row, out_at, lse_at,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, out_row, out_head, out_token,
    heads, m, n, items,
    scale: tl.constexpr, head_dim: tl.constexpr, width: tl.constexpr, query_block: tl.constexpr,
    key_block: tl.constexpr, one_key_block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """An item is a block of queries of one row and head; softmax goes through the keys block by block."""
    at, there = _vector_places(vectors_at, head_dim, width)
    vectors = tl.load(at, mask=there, other=0.0)
    query_blocks = tl.cdiv(m, query_block)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        pair = item // query_blocks
        query = item % query_blocks * query_block + tl.arange(0, query_block)
        query_there = query < m
        q = _load_tile(q_at, pair, heads, query, m, q_row, q_head, q_token, head_dim, width)
        query_row, query_column = _coordinates(queries_at, queries_at_row, pair, heads, query, query_there)
        by_bucket = _by_bucket(q, vectors, scale, precision)
        highest = tl.full([query_block], float("-inf"), tl.float32)
        total = tl.zeros([query_block], tl.float32)
        mixed = tl.zeros([query_block, width], tl.float32)
        for start in range(0, key_block if one_key_block else n, key_block):
            key = start + tl.arange(0, key_block)
            key_there = key < n
            k = _load_tile(k_at, pair, heads, key, n, k_row, k_head, k_token, head_dim, width)
            v = _load_tile(v_at, pair, heads, key, n, v_row, v_head, v_token, head_dim, width)
            key_row, key_column = _coordinates(keys_at, keys_at_row, pair, heads, key, key_there)
            bucket = _bucket_columns(query_row, query_column, key_row, key_column)
            logits = _logits(q, k, by_bucket, bucket, key_there, scale, precision)
            higher = tl.maximum(highest, tl.max(logits, 1))
            weights = tl.exp2(logits - higher[:, None])
            shrunk = tl.exp2(highest - higher)
            total = total * shrunk + tl.sum(weights, 1)
            mixed = mixed * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=precision)
            highest = higher
        _store_tile(
            out_at, mixed / total[:, None], pair, heads, query, m, out_row, out_head, out_token, head_dim, width
        )
        tl.store(lse_at + pair.to(tl.int64) * m + query, highest + tl.log2(total), mask=query_there)


@triton.jit
def _backward_queries(
    q_at, k_at, v_at, vectors_at, queries_at, queries_at_row, keys_at, keys_at_row, out_at, grad_at, lse_at, delta_at,
    dq_at, dk_at, dv_at, partial_at,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, out_row, out_head, out_token,
    grad_row, grad_head, grad_token, dq_row, dq_head, dq_token, dk_row, dk_head, dk_token, dv_row, dv_head, dv_token,
    heads, m, n, items,
    span: tl.constexpr, one_tile: tl.constexpr,
    scale: tl.constexpr, head_dim: tl.constexpr, width: tl.constexpr, query_block: tl.constexpr,
    key_block: tl.constexpr, one_key_block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries and, summed over a program's items, of the table.

    An item is a block of queries of one row and head. Where one tile holds all queries and keys, the gradients of keys
    and values come with it; else `_backward_keys` needs `delta`, each query's sum of out times its gradient.
    """
    dtype: tl.constexpr = q_at.dtype.element_ty
    at, there = _vector_places(vectors_at, head_dim, width)
    vectors = tl.load(at, mask=there, other=0.0)
    table_grad = tl.zeros([width, COLUMNS], tl.float32)
    query_blocks = tl.cdiv(m, query_block)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        pair = item // query_blocks
        query = item % query_blocks * query_block + tl.arange(0, query_block)
        query_there = query < m
        q = _load_tile(q_at, pair, heads, query, m, q_row, q_head, q_token, head_dim, width)
        grad = _load_tile(grad_at, pair, heads, query, m, grad_row, grad_head, grad_token, head_dim, width)
        query_row, query_column = _coordinates(queries_at, queries_at_row, pair, heads, query, query_there)
        place = pair.to(tl.int64) * m + query
        lse = tl.load(lse_at + place, mask=query_there, other=0.0)
        by_bucket = _by_bucket(q, vectors, scale, precision)
        if not one_tile:
            out = _load_tile(out_at, pair, heads, query, m, out_row, out_head, out_token, head_dim, width)
            delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
            tl.store(delta_at + place, delta, mask=query_there)
        dq = tl.zeros([query_block, width], tl.float32)
        sums = tl.zeros([query_block, STRIDE, STRIDE], tl.float32)
        cls_sum = tl.zeros([query_block], tl.float32)
        for start in range(0, key_block if one_key_block else n, key_block):
            key = start + tl.arange(0, key_block)
            key_there = key < n
            k = _load_tile(k_at, pair, heads, key, n, k_row, k_head, k_token, head_dim, width)
            v = _load_tile(v_at, pair, heads, key, n, v_row, v_head, v_token, head_dim, width)
            key_row, key_column = _coordinates(keys_at, keys_at_row, pair, heads, key, key_there)
            bucket = _bucket_columns(query_row, query_column, key_row, key_column)
            weights = tl.exp2(_logits(q, k, by_bucket, bucket, key_there, scale, precision) - lse[:, None])
            dweights = tl.dot(grad, tl.trans(v), input_precision=precision)
            if one_tile:
                delta = tl.sum(weights * dweights, 1)
            ds = weights * (dweights - delta[:, None])
            cls = _with_cls(query_row, key_row)
            cls_sum += tl.sum(tl.where(cls, ds, 0.0), 1)
            rounded = ds.to(dtype)
            if one_tile:
                dv = tl.dot(tl.trans(weights.to(dtype)), grad, input_precision=precision)
                _store_tile(dv_at, dv, pair, heads, key, n, dv_row, dv_head, dv_token, head_dim, width)
                dk = tl.dot(tl.trans(rounded), q, input_precision=precision) * scale
                _store_tile(dk_at, dk, pair, heads, key, n, dk_row, dk_head, dk_token, head_dim, width)
            sums = _bucket_sums(rounded, cls, query_row, query_column, key_row, key_column, sums, span, precision)
            dq += tl.dot(rounded, k, input_precision=precision)
        by_bucket_grad = tl.reshape(sums, [query_block, COLUMNS])
        by_bucket_grad += tl.where((tl.arange(0, COLUMNS) == CLS)[None, :], cls_sum[:, None], 0.0)
        rounded = by_bucket_grad.to(dtype)
        table_grad += tl.dot(tl.trans(q), rounded, input_precision=precision)
        dq = dq * scale + tl.dot(rounded, tl.trans(vectors), input_precision=precision)
        _store_tile(dq_at, dq, pair, heads, query, m, dq_row, dq_head, dq_token, head_dim, width)
    at, there = _vector_places(partial_at + tl.program_id(0) * (head_dim * COLUMNS), head_dim, width)
    tl.store(at, table_grad, mask=there)


@triton.jit
def _backward_keys(
    q_at, k_at, v_at, vectors_at, queries_at, queries_at_row, keys_at, keys_at_row, grad_at, lse_at, delta_at,
    dk_at, dv_at,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, grad_row, grad_head, grad_token,
    dk_row, dk_head, dk_token, dv_row, dv_head, dv_token,
    heads, m, n, items,
    scale: tl.constexpr, head_dim: tl.constexpr, width: tl.constexpr, query_block: tl.constexpr,
    key_block: tl.constexpr, one_key_block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values. An item is a block of keys of one row and head."""
    dtype: tl.constexpr = q_at.dtype.element_ty
    at, there = _vector_places(vectors_at, head_dim, width)
    vectors = tl.load(at, mask=there, other=0.0)
    key_blocks = tl.cdiv(n, key_block)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        pair = item // key_blocks
        key = item % key_blocks * key_block + tl.arange(0, key_block)
        key_there = key < n
        k = _load_tile(k_at, pair, heads, key, n, k_row, k_head, k_token, head_dim, width)
        v = _load_tile(v_at, pair, heads, key, n, v_row, v_head, v_token, head_dim, width)
        key_row, key_column = _coordinates(keys_at, keys_at_row, pair, heads, key, key_there)
        dk = tl.zeros([key_block, width], tl.float32)
        dv = tl.zeros([key_block, width], tl.float32)
        for start in range(0, m, query_block):
            query = start + tl.arange(0, query_block)
            query_there = query < m
            q = _load_tile(q_at, pair, heads, query, m, q_row, q_head, q_token, head_dim, width)
            grad = _load_tile(grad_at, pair, heads, query, m, grad_row, grad_head, grad_token, head_dim, width)
            query_row, query_column = _coordinates(queries_at, queries_at_row, pair, heads, query, query_there)
            place = pair.to(tl.int64) * m + query
            lse = tl.load(lse_at + place, mask=query_there, other=0.0)
            delta = tl.load(delta_at + place, mask=query_there, other=0.0)
            by_bucket = _by_bucket(q, vectors, scale, precision)
            bucket = _bucket_columns(query_row, query_column, key_row, key_column)
            weights = tl.exp2(_logits(q, k, by_bucket, bucket, key_there, scale, precision) - lse[:, None])
            dv += tl.dot(tl.trans(weights.to(dtype)), grad, input_precision=precision)
            ds = weights * (tl.dot(grad, tl.trans(v), input_precision=precision) - delta[:, None])
            dk += tl.dot(tl.trans(ds.to(dtype)), q, input_precision=precision)
        _store_tile(dk_at, dk * scale, pair, heads, key, n, dk_row, dk_head, dk_token, head_dim, width)
        _store_tile(dv_at, dv, pair, heads, key, n, dv_row, dv_head, dv_token, head_dim, width)
