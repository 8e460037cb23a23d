"""How much memory a training step keeps."""

from collections.abc import Callable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`; storage kept twice counts once.

    A count of tensors on the CPU. A GPU may keep less: its attention with a learned bias need not keep probabilities.
    """
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())
