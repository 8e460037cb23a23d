"""How much memory a process holds, and how much it has held at most."""

import contextlib
import re
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


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


def resident_bytes() -> int:
    """Resident memory of this process now; where the system does not say, its peak."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that this process has held."""
    # Not ru_maxrss on Linux: a new program inherits it from the process that started it.
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _status(name: str) -> int:
    with contextlib.suppress(OSError):
        if found := re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text()):
            return int(found[1]) * 1024
    return 0


def limit_memory(more_bytes: int) -> None:
    """Let allocations fail beyond what this process holds now and so much more, before the system kills others for it.

    Linux alone keeps to it; elsewhere nothing changes.
    """
    if held := _status("VmData"):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (held + more_bytes, hard))
