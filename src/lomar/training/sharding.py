"""Weights, gradients and optimiser state spread over processes (FSDP), for encoders that one GPU cannot train.

Torch's FSDP2: each weight is a DTensor, of which a process holds a slice; a block's weights are brought together
while it works. What the rest of lomar sees is the plain method, which is brought up to date when someone looks at it.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread a module over the processes, block by block, in place."""
    processes = mesh["data_parallel"]
    for each in module.modules():
        if isinstance(each, nn.ModuleList):
            for block in each:
                fully_shard(block, mesh=processes)
    fully_shard(module, mesh=processes)
    return module


def is_sharded(fabric: Fabric) -> bool:
    """Whether this run spreads its weights."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


class Sharded:
    """A spread copy of a method, which is trained in its place.

    Args:
        fabric: the processes.
        method: the plain one; it stays whole in every process.
        optimizer: over the plain method's parameters, new; from here on over the copy's.
    """

    def __init__(self, fabric: Fabric, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.plain = method
        self.method = copy.deepcopy(method)
        self.model = fabric.setup_module(self.method)
        spread = dict(zip(map(id, method.parameters()), self.method.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [spread[id(parameter)] for parameter in group["params"]]
        self.optimizer = cast(torch.optim.Optimizer, fabric.setup_optimizers(optimizer))

    @torch.no_grad()
    def bring_up_to_date(self) -> None:
        """The copy's weights into the plain method; all processes must call it."""
        for whole, part in self._pairs():
            whole.copy_(_whole(part))

    @torch.no_grad()
    def take_over(self) -> None:
        """The plain method's weights, alike in all processes, into the copy."""
        for whole, part in self._pairs():
            part.copy_(_like(whole, part))

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state, whole and on the CPU, as one process would have it; all processes must call it."""
        state: dict[str, Any] = self.optimizer.state_dict()
        whole = {
            number: {name: _whole(value).cpu() if isinstance(value, Tensor) else value for name, value in each.items()}
            for number, each in state["state"].items()
        }
        return state | {"state": whole}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Back to a state as `optimizer_state` gives it.

        Raises:
            KeyError, ValueError: it is of another method.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        spread = {
            number: {
                name: _like(value, parameters[number]) if _is_of(value, parameters[number]) else value
                for name, value in each.items()
            }
            for number, each in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": spread})

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        whole = [*self.plain.parameters(), *self.plain.buffers()]
        return list(zip(whole, [*self.method.parameters(), *self.method.buffers()], strict=True))


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(whole: Tensor, part: Tensor) -> Tensor:
    """A whole tensor, spread as another is."""
    if not isinstance(part, DTensor):
        return whole
    # Every process has all of it, so that nothing need be sent.
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements, src_data_rank=None)


def _is_of(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
