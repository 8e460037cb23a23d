"""The processes of a run: how they find each other, and what they tell each other."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

from lomar.errors import TrainingError, UserError
from lomar.launch import launched, tell_torch
from lomar.training.precision import precision_on
from lomar.training.sharding import shard

T = TypeVar("T")

_PATIENCE = timedelta(minutes=30)  # with a process that does not answer


def make_fabric(device: str, precision: str, strategy: str = "ddp") -> Fabric:
    """Devices, precision and the processes that torchrun or srun started, which know each other from here on.

    Args:
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16".
        strategy: of several processes: "ddp", each with all weights, or "fsdp", each with a share of them.

    Raises:
        UserError: they cannot find each other.
    """
    launch = launched()
    tell_torch(launch)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces what the run announces itself
    several: Strategy | str = "auto"
    if launch.count > 1 and strategy == "fsdp":
        several = ModelParallelStrategy(
            shard, data_parallel_size=launch.count, tensor_parallel_size=1, timeout=_PATIENCE
        )
    elif launch.count > 1:
        several = DDPStrategy(timeout=_PATIENCE)
    fabric = Fabric(
        accelerator=device,
        devices=launch.local_count,
        num_nodes=launch.machines,
        strategy=several,
        plugins=[
            precision_on(device, precision),
            # Named, since Fabric takes any shell within a SLURM job for one of several processes, and waits for them.
            TorchElasticEnvironment() if launch.count > 1 else LightningEnvironment(),
        ],
    )
    try:
        fabric.launch()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the {launch.count} processes of this run cannot find each other: {reason}") from error
    return fabric


def disband(fabric: Fabric) -> None:
    """End the processes' connection, once all are done: threads of it that outlive a process would abort it."""
    fabric.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """What the processes do as one; when it is done their connection ends, and when one fails all end.

    Raises:
        TrainingError: another process has gone; what it said itself tells why.
    """
    try:
        yield
    except RuntimeError as error:
        if fabric.world_size > 1 and _is_about_a_connection(error):
            raise TrainingError(
                "another process of this run has ended, so this one ends; its own words say why"
            ) from error
        raise
    disband(fabric)


def _is_about_a_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    about = ("connection", "gloo", "nccl", "peer", "socket", "broken pipe", "tcpstore")
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in about)


def first_alone(fabric: Fabric, work: Callable[[], T]) -> T | None:
    """Let the first process do something while the others wait; what comes of it, in the others None.

    Raises:
        UserError: it could not be done; in all processes.
    """
    result: T | None = None
    failure: UserError | None = None
    if fabric.is_global_zero:
        try:
            result = work()
        except UserError as error:
            failure = error
    told = fabric.broadcast(str(failure) if failure else None)
    if told is not None:
        raise UserError(told, shared=True) from failure
    return result


def gathered(fabric: Fabric, part: Tensor) -> Tensor:
    """The rows of all processes, on the CPU, in the order of their numbers.

    Args:
        fabric: the processes.
        part: (n, ...), this one's rows; n may differ, the rest may not.
    """
    if fabric.world_size == 1:
        return part
    counts = cast(Tensor, fabric.all_gather(torch.tensor(len(part), device=fabric.device))).flatten().tolist()
    kind = torch.uint8 if part.dtype == torch.bool else part.dtype
    padded = torch.zeros(max(counts), *part.shape[1:], dtype=kind, device=fabric.device)
    padded[: len(part)] = part.to(fabric.device)
    rows = cast(Tensor, fabric.all_gather(padded)).cpu()  # (processes, largest n, ...)
    return torch.cat([each[:count] for each, count in zip(rows, counts, strict=True)]).to(part.dtype)


def said_by_all(fabric: Fabric, words: list[Any]) -> list[Any]:
    """The lists of all processes, one after another: plain values alone."""
    if fabric.world_size == 1:
        return words
    lists: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(lists, words)
    return [word for each in lists for word in each]
