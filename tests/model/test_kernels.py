"""The fused kernels against plain float64 arithmetic: forward, every gradient, every layout they are given.

Triton decides when it is imported whether kernels run in its interpreter, and then for the whole process. So the tests
of what the kernels compute run where this process has a GPU or the interpreter, and one test runs them in a process of
their own with the interpreter.
"""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")

from lomar.model import kernels  # noqa: E402
from lomar.model.positions import BUCKETS, NOWHERE, contextual_buckets  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"

computes = pytest.mark.skipif(not (GPU or INTERPRETED), reason="runs on a GPU, and below in Triton's interpreter")
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
HALF = torch.bfloat16 if GPU else torch.float16

# Against the largest number of the reference. The interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


class Problem(NamedTuple):
    """What attention is given, and the gradient of what it returns."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    queries_at: Tensor
    keys_at: Tensor
    grad: Tensor


def problem(
    rows: int,
    heads: int,
    m: int,
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    grid: tuple[int, int] | None = None,
    own_places: bool = True,
    asked: slice | None = None,
    seed: int = 0,
) -> Problem:
    """Random tokens at distinct cells of a grid in random order, cls among them; m queries, the last if not said."""
    generator = torch.Generator().manual_seed(seed)
    side = next(side for side in range(1, n + 1) if side * side >= n - 1)
    grid = grid or (side, side)
    places = []
    for _ in range(rows if own_places else 1):
        cells = torch.randperm(grid[0] * grid[1], generator=generator)[: n - 1]
        at = torch.stack([cells // grid[1], cells % grid[1]], dim=1)
        at = torch.cat([torch.full((1, 2), NOWHERE), at])[torch.randperm(n, generator=generator)]
        places.append(at)
    keys_at = torch.stack(places).int().to(DEVICE)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    q, k, v = normal(rows, heads, m, d), normal(rows, heads, n, d), normal(rows, heads, n, d)
    table = (normal(d, BUCKETS) * d**-0.5).float()
    return Problem(q, k, v, table, keys_at[:, asked or slice(n - m, None)], keys_at, normal(rows, heads, m, d))


def results(given: Problem, attention: Any) -> list[Tensor]:
    """What an attention returns, and its gradients of q, k, v and the table."""
    inputs = [each.detach().requires_grad_() for each in given[:4]]
    out = attention(*inputs, given.queries_at, given.keys_at)
    return [out.detach(), *torch.autograd.grad(out, inputs, given.grad.to(out.dtype))]


def reference(q: Tensor, k: Tensor, v: Tensor, table: Tensor, queries_at: Tensor, keys_at: Tensor) -> Tensor:
    """The definition, in float64, bias and all written out."""
    m, d = q.shape[2:]
    q, k, v, table = (each.double() for each in (q, k, v, table))
    buckets = contextual_buckets(torch.cat([queries_at, keys_at], dim=1))[:, :m, m:]
    bias = (q @ table).gather(-1, buckets[:, None].expand(q.shape[0], q.shape[1], -1, -1))
    return (q @ k.transpose(-2, -1) * d**-0.5 + bias).softmax(dim=-1) @ v


def assert_right(given: Problem) -> None:
    rounded = given._replace(table=given.table.to(given.q.dtype).float())  # as the kernels take it
    names = ("out", "dq", "dk", "dv", "dtable")
    ours, theirs = results(given, kernels.fused_attention), results(rounded, reference)
    for name, our, their in zip(names, ours, theirs, strict=True):
        tolerance = TOLERANCE[given.q.dtype] * max(1.0, their.abs().max().item())
        error = (our.double() - their).abs().max().item()
        assert error <= tolerance, f"{name} is {error:.2g} from the definition, more than {tolerance:.2g}"


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bits of bfloat16 as integers (3.8): here it makes them float32 first."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), triton.language.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_the_kernels_compute_the_definition_in_tritons_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@computes
@pytest.mark.parametrize("n", [50, 31, 11, 2, 1])
def test_windows_equal_the_definition(n: int) -> None:
    assert_right(problem(rows=3, heads=2, m=n, n=n, d=64))


@computes
@pytest.mark.parametrize(("n", "d"), [(17, 16), (37, 24), (67, 80), (197, 24)])
def test_prime_lengths_equal_the_definition(n: int, d: int) -> None:
    assert_right(problem(rows=1 if n > 37 else 3, heads=1, m=n, n=n, d=d))


@computes
@pytest.mark.parametrize(("m", "n"), [(1, 50), (40, 50), (13, 67), (67, 131)])
def test_fewer_queries_than_keys_equal_the_definition(m: int, n: int) -> None:
    assert_right(problem(rows=2, heads=1, m=m, n=n, d=16))


@computes
@pytest.mark.parametrize("n", [26, 65])
def test_the_first_token_may_be_the_one_query(n: int) -> None:
    """As where an encoder pools by its cls token."""
    assert_right(problem(rows=2, heads=1, m=1, n=n, d=16, asked=slice(0, 1)))


@computes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [50, 11, 67])
def test_sixteen_bits_equal_the_definition_up_to_their_rounding(n: int, dtype: torch.dtype) -> None:
    assert_right(problem(rows=2, heads=2, m=n, n=n, d=64, dtype=dtype))


@computes
@pytest.mark.parametrize("grid", [(1, 101), (101, 1), (60, 60)])
def test_places_may_be_far_apart(grid: tuple[int, int]) -> None:
    assert_right(problem(rows=2, heads=1, m=50, n=50, d=16, grid=grid))


@computes
def test_rows_may_share_their_places() -> None:
    shared = problem(rows=3, heads=2, m=37, n=50, d=16, own_places=False)
    assert shared.keys_at.shape == (1, 50, 2)
    assert_right(shared)


@computes
@settings(max_examples=5, deadline=None)
@given(st.data())
def test_any_shape_equals_the_definition(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 80), label="keys")
    side = st.integers(1, 90)
    grid = data.draw(st.tuples(side, side).filter(lambda grid: grid[0] * grid[1] >= n - 1), label="grid")
    assert_right(
        problem(
            rows=data.draw(st.integers(1, 3), label="rows"),
            heads=data.draw(st.integers(1, 3), label="heads"),
            m=data.draw(st.integers(1, n), label="queries"),
            n=n,
            d=data.draw(st.integers(1, 40), label="d"),
            grid=grid,
            own_places=data.draw(st.booleans(), label="own places"),
        )
    )


@computes
@pytest.mark.parametrize("n", [31, 67])
def test_parts_of_a_projection_give_what_copies_give(n: int) -> None:
    rows, heads, d = 1 if n > 64 else 2, 3, 16
    at = problem(rows, heads, m=n, n=n, d=d)
    qkv = torch.stack([at.q, at.k, at.v]).permute(1, 3, 0, 2, 4).reshape(rows, n, 3 * heads * d)
    q, k, v = (each.unflatten(-1, (heads, d)).transpose(1, 2) for each in qkv.chunk(3, dim=-1))
    assert not q.is_contiguous()
    strided = results(at._replace(q=q, k=k, v=v), kernels.fused_attention)
    for ours, copied in zip(strided, results(at, kernels.fused_attention), strict=True):
        assert torch.equal(ours, copied)


@computes
def test_a_gradient_without_strides_is_taken() -> None:
    at = problem(rows=2, heads=2, m=11, n=11, d=16)
    at = at._replace(grad=torch.ones((), device=DEVICE).expand(at.q.shape))
    assert at.grad.stride() == (0, 0, 0, 0)
    assert_right(at)


@computes
def test_heads_are_joined_without_a_copy() -> None:
    at = problem(rows=2, heads=3, m=11, n=17, d=16)
    out = kernels.fused_attention(*at[:6])
    assert out.shape == (2, 3, 11, 16)
    assert out.transpose(1, 2).is_contiguous()


@computes
@pytest.mark.parametrize("n", [31, 67])
def test_the_same_input_gives_the_same_bits(n: int) -> None:
    at = problem(rows=257 if GPU else 1, heads=2, m=n, n=n, d=16, dtype=HALF)
    first, second = (results(at, kernels.fused_attention) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@computes
@pytest.mark.parametrize("n", [11, 67])
def test_few_programs_do_the_work_of_many(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_WARPS", 4)
    assert_right(problem(rows=1, heads=3, m=n, n=n, d=16))


@computes
def test_the_table_gets_its_gradient_in_its_own_type() -> None:
    at = problem(rows=1, heads=1, m=11, n=11, d=16, dtype=HALF)
    assert results(at, kernels.fused_attention)[4].dtype == torch.float32
    assert results(at._replace(table=at.table.to(HALF)), kernels.fused_attention)[4].dtype == HALF


@computes
def test_the_operator_keeps_pytorchs_rules() -> None:
    at = problem(rows=2, heads=2, m=7, n=11, d=16)
    inputs = (*(each.requires_grad_() for each in at[:4]), at.queries_at, at.keys_at)
    torch.library.opcheck(torch.ops.lomar.contextual_attention.default, inputs)


@computes
def test_it_compiles_without_a_graph_break() -> None:
    # On a GPU with inductor's kernels around it; the interpreter's process only traces.
    compiled = torch.compile(kernels.fused_attention, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    at = problem(rows=2, heads=2, m=31, n=31, d=16, dtype=HALF)
    plain = results(at, kernels.fused_attention)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(at, compiled), plain, strict=True))


@on_gpu
@pytest.mark.parametrize("n", [11, 31, 50, 197, 1025])
def test_a_gpu_computes_the_sizes_of_practice(n: int) -> None:
    grid = (n - 1, n - 1) if n < 50 else None  # some tokens of a larger image, or a whole one
    assert_right(problem(rows=5, heads=12, m=n, n=n, d=64, dtype=torch.bfloat16, grid=grid))


@on_gpu
def test_rows_more_than_2_to_the_31_elements_apart() -> None:
    at = problem(rows=2, heads=2, m=31, n=31, d=64, dtype=torch.bfloat16)
    memory = torch.empty(2**31 + at.q.numel(), dtype=torch.bfloat16, device=DEVICE)
    apart = memory.as_strided(at.q.shape, (2**31, *at.q.stride()[1:]))
    apart.copy_(at.q)
    far = results(at._replace(q=apart), kernels.fused_attention)
    assert all(torch.equal(ours, near) for ours, near in zip(far, results(at, kernels.fused_attention), strict=True))


def test_supported_says_where_the_kernels_run() -> None:
    q = torch.zeros(1, 1, 2, 64, device=DEVICE)
    assert kernels.supported(q) == (GPU or INTERPRETED)
    assert torch.compile(kernels.supported, fullgraph=True, backend="eager")(q) == (GPU or INTERPRETED)
    assert not kernels.supported(q.double())
    assert not kernels.supported(torch.zeros(1, 1, 2, 65, device=DEVICE))


def test_shapes_that_do_not_go_together_are_refused() -> None:
    """A kernel would read beyond them."""
    at = problem(rows=2, heads=2, m=3, n=5, d=16)
    for wrong in (
        {"k": at.k[:, :, :4]},
        {"v": at.v[:1]},
        {"table": at.table[:, :49]},
        {"queries_at": at.queries_at[:, :2]},
        {"keys_at": at.keys_at[:1].expand(3, -1, -1)},
    ):
        with pytest.raises(ValueError, match="do not go with"):
            kernels.fused_attention(*at._replace(**wrong)[:-1])


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Launches compile for an H100 and are not run; the list fills with what was compiled."""
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    try:
        assert Path(triton.knobs.nvidia.ptxas.path).exists()
    except RuntimeError as error:
        pytest.skip(f"no assembler: {error}")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    compile_and_run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(compile_and_run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", only_compile)
    pretended = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 90,  # whose kernels are kept apart from those of a device that is there
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", pretended)
    return compiled


@pytest.mark.parametrize(("n", "d", "count"), [(50, 64, 2), (31, 64, 2), (11, 64, 2), (197, 64, 3), (257, 80, 3)])
def test_the_kernels_compile_for_an_h100(n: int, d: int, count: int, h100: list[Any]) -> None:
    x = torch.empty(2, n, 3 * 12 * d, dtype=torch.bfloat16)
    q, k, v = (each.unflatten(-1, (12, d)).transpose(1, 2) for each in x.chunk(3, dim=-1))
    table, at = torch.empty(d, BUCKETS), torch.empty(1, n, 2, dtype=torch.int32)
    out, lse = torch.ops.lomar.contextual_attention(q, k, v, table, at, at)
    torch.ops.lomar.contextual_attention_backward(out, q, k, v, table, at, at, out, lse)
    assert len(h100) == count
    for kernel in h100:
        needs = f"{kernel.metadata.shared} bytes shared, {registers(kernel.asm['cubin'])}"
        logging.info("%s of %d x %d: %s", kernel.name, n, d, needs)  # to be seen with --log-cli-level=INFO
        assert ".target sm_90" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= 99 * 1024  # what a program may have on every GPU since Ampere


def registers(cubin: bytes) -> str:
    """REG, registers of a thread, and STACK, bytes of what found no room in them."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return " ".join(re.findall(r"(?:REG|STACK):\d+", usage))
