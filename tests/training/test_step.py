"""An update: what is learnt from micro-batches, and how they come to the device."""

import platform
from collections.abc import Generator

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from lomar.data.loader import MicroBatch
from lomar.training.memory import keep_freed_memory
from lomar.training.step import Paced, Step, on_device


class Squares(nn.Module):
    """The sum of squared errors of a linear map, and how many they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3)

    def forward(self, pixels: Tensor) -> tuple[Tensor, int]:
        losses = (self.linear(pixels) - 1).square()
        return losses.sum(), losses.numel()


def step(clip_grad: float = 0.0, compiled: bool = False, clip_each: bool = False, paced: Paced | None = None) -> Step:
    method = Squares()
    fabric = Fabric(accelerator="cpu", devices=1)
    return Step(fabric, method, torch.optim.SGD(method.parameters(), lr=0.0), 7, clip_grad, compiled, clip_each, paced)


@pytest.mark.parametrize("sizes", [[7], [4, 3], [1] * 7])
@pytest.mark.parametrize("clip_grad", [0.0, 0.5])
def test_an_update_is_that_of_the_mean_loss(sizes: list[int], clip_grad: float) -> None:
    """By hand: gradient descent on the mean over all of a batch, clipped by its norm."""
    pixels = torch.randn(7, 5)
    plain = Squares()
    total, count = plain(pixels)
    gradients = torch.autograd.grad(total / count, list(plain.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    factor = min(1.0, clip_grad / float(norm)) if clip_grad else 1.0
    expected = [(p - 0.1 * factor * g).detach() for p, g in zip(plain.parameters(), gradients, strict=True)]

    taken = step(clip_grad)
    parts = pixels.split(sizes)
    for number, part in enumerate(parts):
        taken.learn({"pixels": part}, last=number == len(parts) - 1)
    loss, grad_norm = taken.update(lr=0.1)
    torch.testing.assert_close([p.detach() for p in taken.method.parameters()], expected)
    torch.testing.assert_close(loss, (total / count).double().detach())
    torch.testing.assert_close(grad_norm.float(), norm)


def test_each_tensors_gradient_is_clipped_by_its_own_norm_if_asked_for() -> None:
    """As DINO does: of two tensors the one that is short enough stays as it is."""
    pixels = torch.randn(7, 5)
    plain = Squares()
    total, count = plain(pixels)
    gradients = torch.autograd.grad(total / count, list(plain.parameters()))
    norms = [float(g.norm()) for g in gradients]
    limit = sum(norms) / 2  # between the two
    assert min(norms) < limit < max(norms)
    expected = [
        (p - 0.1 * g * min(1.0, limit / norm)).detach()
        for p, g, norm in zip(plain.parameters(), gradients, norms, strict=True)
    ]
    taken = step(limit, clip_each=True)
    taken.learn({"pixels": pixels})
    _, grad_norm = taken.update(lr=0.1)
    torch.testing.assert_close([p.detach() for p in taken.method.parameters()], expected)
    torch.testing.assert_close(grad_norm.float(), torch.cat([g.flatten() for g in gradients]).norm())


def test_weight_decay_changes_where_there_is_any() -> None:
    taken = step()
    weight, bias = taken.method.linear.parameters()
    taken.optimizer = torch.optim.SGD(
        [
            {"params": [weight], "weight_decay": 0.0, "decayed": True},
            {"params": [bias], "weight_decay": 0.0, "decayed": False},
        ],
        lr=0.0,
    )
    taken.learn({"pixels": torch.zeros(7, 5)})
    before = weight.detach().clone()
    taken.update(lr=0.1, weight_decay=0.25)
    assert [group["weight_decay"] for group in taken.optimizer.param_groups] == [0.25, 0.0]
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.25))


class Following:
    """Notes what it is called for, and lets a parameter keep its value."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.bias: nn.Parameter | None = None
        self.weight = nn.Parameter(torch.zeros(0))
        self.seen: list[Tensor] = []

    def begin(self, step: int) -> None:
        self.calls.append(f"begin {step}")

    def before_update(self) -> None:
        assert self.bias is not None
        assert self.bias.grad is not None
        self.bias.grad = None
        self.seen.append(self.weight.detach().clone())
        self.calls.append("before")

    def after_update(self) -> dict[str, Tensor]:
        self.seen.append(self.weight.detach().clone())
        self.calls.append("after")
        return {"number": torch.tensor(2.0)}

    def trouble(self, numbers: object) -> str:
        return ""


def test_a_method_that_has_more_to_do_is_called_around_an_update() -> None:
    """Before gradients are clipped, so that one taken away does not count; and after the weights have moved."""
    paced = Following()
    taken = step(clip_grad=1e-3, paced=paced)
    linear = taken.method.linear
    paced.bias, paced.weight = linear.bias, linear.weight
    before = linear.bias.detach().clone(), linear.weight.detach().clone()
    taken.begin(4)
    taken.learn({"pixels": torch.randn(7, 5)})
    gradient = linear.weight.grad
    assert gradient is not None
    norm = float(gradient.norm()) * 7 / 21  # of the sum over 7 images, made that of the mean over 21 numbers
    _, grad_norm = taken.update(lr=0.1)
    assert float(grad_norm) == pytest.approx(norm, rel=1e-4)
    assert paced.calls == ["begin 4", "before", "after"]
    assert torch.equal(linear.bias, before[0])
    assert torch.equal(paced.seen[0], before[1]) and torch.equal(paced.seen[1], linear.weight)
    assert not torch.equal(linear.weight, before[1])
    assert taken.numbers == {"number": torch.tensor(2.0)}


def test_one_update_knows_nothing_of_the_one_before() -> None:
    taken = step()
    losses = []
    for _ in range(2):
        taken.learn({"pixels": torch.ones(7, 5)})
        losses.append(taken.update(lr=0.0)[0])
    torch.testing.assert_close(losses[0], losses[1])


def test_a_compiled_step_has_a_graph_for_each_size_of_micro_batch_and_no_more() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    taken, plain = step(compiled=True), step()
    for number in range(4):
        for each in (taken, plain):
            torch.manual_seed(number)
            for part in torch.randn(7, 5).split([4, 3]):
                each.learn({"pixels": part}, last=len(part) == 3)
            each.update(lr=0.1)
    torch.testing.assert_close(taken.method.state_dict(), plain.method.state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert list(taken.method.state_dict()) == ["linear.weight", "linear.bias"]  # no prefix of the compiler's


def test_micro_batches_arrive_in_order_and_their_source_is_closed() -> None:
    closed = []

    def batches() -> Generator[MicroBatch, None, None]:
        try:
            for number in range(5):
                yield MicroBatch({"pixels": torch.full((1,), number)}, [str(number)], [], last=True)
        finally:
            closed.append(True)

    moved = on_device(batches(), torch.device("cpu"))
    assert [next(moved).names for _ in range(3)] == [["0"], ["1"], ["2"]]
    moved.close()
    assert closed == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_micro_batches_arrive_whole_on_a_gpu() -> None:
    def batches() -> Generator[MicroBatch, None, None]:
        for number in range(20):
            pixels = torch.full((64, 3, 112, 112), number, dtype=torch.uint8).pin_memory()
            yield MicroBatch({"pixels": pixels}, [str(number)], [], last=True)

    arrived = list(on_device(batches(), torch.device("cuda")))
    assert [batch.names for batch in arrived] == [[str(number)] for number in range(20)]
    assert all(bool((batch.inputs["pixels"] == number).all()) for number, batch in enumerate(arrived))


def test_freed_memory_is_kept_where_the_c_library_is_glibc() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
