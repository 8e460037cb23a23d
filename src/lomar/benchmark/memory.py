"""How much memory a process holds, and how much it has held at most."""

import contextlib
import resource
from pathlib import Path

import torch

from lomar.training.memory import peak_resident_bytes, process_status, resident_bytes


class PeakMemory:
    """The most memory that work on a device holds, beyond what the process held when this was made.

    On a CPU it is the process's resident memory, of which what the interpreter and its libraries hold is taken off; on
    a GPU it is what torch's allocator has given out.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._held = 0 if self._cuda else resident_bytes()

    def restart(self) -> None:
        """Forget the peak so far, where the system can: what warming up took is not counted."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # not Linux, or not allowed: then warming up counts
                Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes(self) -> int:
        """The peak since the last restart."""
        return torch.cuda.max_memory_allocated() if self._cuda else max(0, peak_resident_bytes() - self._held)


def limit_memory(more_bytes: int) -> None:
    """Let allocations fail beyond what this process holds now and so much more, before the system kills others for it.

    Linux alone keeps to it; elsewhere nothing changes.
    """
    if held := process_status("VmData"):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (held + more_bytes, hard))
