"""How much memory a process holds and a training step keeps; that a CPU need not fetch it anew for each step."""

import contextlib
import ctypes
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

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


def resident_bytes() -> int:
    """Resident memory of this process now; where the system does not say, its peak."""
    return process_status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that this process has held."""
    # Not ru_maxrss on Linux: a new program inherits it from the process that started it.
    return process_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def process_status(name: str) -> int:
    """Bytes that Linux tells of this process under a name such as VmRSS; 0 elsewhere."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    return 0


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held: of a GPU's memory what its tensors took, else resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def gpu_share(device: torch.device) -> float | None:
    """The share of a GPU's memory that this process's tensors have taken at most; None on a CPU."""
    if device.type != "cuda":
        return None
    return peak_bytes(device) / torch.cuda.get_device_properties(device).total_memory


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
