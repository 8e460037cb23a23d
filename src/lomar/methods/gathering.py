"""Sums and rows over the processes that train together; of one process, what it has itself."""

from typing import cast

import torch
import torch.distributed
import torch.distributed.nn
from torch import Tensor


def count_of_processes() -> int:
    """How many they are."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes of tensors of one shape; gradients flow back to each."""
    if count_of_processes() == 1:
        return tensor
    if tensor.requires_grad:
        return cast(Tensor, torch.distributed.nn.functional.all_reduce(tensor))
    tensor = tensor.clone()
    torch.distributed.all_reduce(tensor)
    return tensor


def rows_of_all(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes one after the other, without gradients, and the number of this one's first.

    Args:
        tensor: (B, ...), of one shape in all processes.
    """
    if count_of_processes() == 1:
        return tensor, 0
    parts = [torch.empty_like(tensor) for _ in range(count_of_processes())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts), torch.distributed.get_rank() * len(tensor)
