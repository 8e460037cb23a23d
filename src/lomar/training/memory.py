"""How much memory a training step keeps, and a GPU has given; that a CPU need not fetch it anew for each step."""

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`; storage kept twice counts once.

    A count of tensors on the CPU; within `lomar.model.attention.as_fused` of what a GPU keeps, but for a learned bias,
    whose weights its attention need not keep.
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


def gpu_share(device: torch.device) -> float | None:
    """The share of a GPU's memory that this process's tensors have taken at most; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Let this process keep large blocks that it frees, for the next step; whether that could be had.

    glibc gives blocks of 32 MB and more back to the kernel, which hands them out again page by page, each filled with
    zeros: a large part of a training step's time on a CPU (docs/performance.md). The process stays as large as its
    largest step was.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    kept = any(mallopt(_M_MMAP_THRESHOLD, size) for size in (2**30, 2**25))  # older ones take 32 MB at most
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
