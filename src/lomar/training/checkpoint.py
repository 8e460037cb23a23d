"""Checkpoints: all that continues a run, the last whole ones of them, and how a torn one is told from a whole one.

A checkpoint is what `torch.save` writes of tensors and plain values, and behind it a line with the SHA-256 of that,
which `torch.load` passes over.
"""

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lomar.errors import UserError
from lomar.files import write_atomically

FOLDER = "checkpoints"  # of a run
KEPT = 2  # the last one, and the one before in case that turns out to be damaged
_NAME = "step-{:09d}.pt"
_NAMED = re.compile(r"step-(\d{9,})\.pt")
_SEAL = b"\nlomar sha256 "  # before the 64 digits and the newline that end the file
_SEALED = len(_SEAL) + 64 + 1
_PIECE = 2**22  # bytes read at once


class Checkpoints:
    """The checkpoints of a run, `step-000001000.pt` and so on.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps of those that are there, whole or not, the last one first."""
        if not self.folder.is_dir():
            return []
        found = (_NAMED.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((int(name[1]) for name in found if name), reverse=True)

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / _NAME.format(step)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write one under a temporary name, flush it to disk, read it back and give it its name; delete the oldest.

        Args:
            step: updates done; one of the same step is replaced.
            state: tensors and plain values.

        Raises:
            OSError: the disk is full, or gives back something else. Those that were there before stay.
        """
        write_atomically(self.path(step), lambda temporary: _write(temporary, state))
        steps = self.steps()
        kept = [each for each in steps if each <= step][:KEPT]  # later ones are of a run that went back
        for each in set(steps) - set(kept):
            self.path(each).unlink(missing_ok=True)
        for left in self.folder.glob(".step-*.pt.tmp"):  # by a kill, of a step that may not be saved again
            left.unlink(missing_ok=True)

    def load(self, warn: Callable[[str], object] = lambda text: None) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the last whole one, on the CPU; None where there is none at all.

        A state holds no code that could run.

        Args:
            warn: told of those that are damaged and passed over.

        Raises:
            UserError: all are damaged.
        """
        reasons = []
        for step in self.steps():
            path = self.path(step)
            try:
                state = _read(path)
            except (OSError, ValueError) as error:
                reasons.append(f"{path} {error}")
                continue
            for reason in reasons:
                warn(f"warning: {reason}; going on from the checkpoint before it, of step {step}")
            return step, state
        if reasons:
            raise UserError(f"the checkpoint {'; '.join(reasons)}; start anew with --overwrite")
        return None

    def read(self, step: int) -> dict[str, Any]:
        """The state of a step, which another process has found whole.

        Raises:
            UserError: it cannot be read here.
        """
        try:
            return _read(self.path(step), checked=False)
        except (OSError, ValueError) as error:
            raise UserError(f"the checkpoint {self.path(step)} {error}; is it on this machine as well?") from error


def _write(path: Path, state: dict[str, Any]) -> None:
    """Raises OSError: not all of it is on disk."""
    with path.open("wb") as file:
        digesting = _Digesting(file)
        try:
            torch.save(state, digesting)  # type: ignore[arg-type]  # all that it does is write
        except RuntimeError as error:  # so torch's own writer tells of a full disk, and of Ctrl-C
            raise _reason(error) from error
        finally:
            digesting.file = None
        file.write(_SEAL + digesting.digest.hexdigest().encode() + b"\n")
    if not _is_whole(path):
        raise OSError(f"{path} does not read back as it was written")


def _reason(error: BaseException) -> BaseException:
    """What stopped torch's writer, which then fails with an error of its own."""
    cause = error.__context__
    while cause and not isinstance(cause, OSError | KeyboardInterrupt):
        cause = cause.__context__
    return cause or OSError(str(error).splitlines()[0])


def _read(path: Path, checked: bool = True) -> dict[str, Any]:
    """Raises OSError or ValueError: the file is not what was written."""
    if checked and not _is_whole(path):
        raise ValueError("is damaged: its content is not what was written")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot be read ({type(error).__name__})") from error
    return state


def _is_whole(path: Path) -> bool:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = path.stat().st_size - _SEALED
        while left > 0:
            piece = file.read(min(_PIECE, left))
            if not piece:
                return False
            digest.update(piece)
            left -= len(piece)
        return file.read() == _SEAL + digest.hexdigest().encode() + b"\n"


class _Digesting(io.RawIOBase):
    """A file that is written from beginning to end, and the SHA-256 of what was written."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self.file = file  # None once it is let go of
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        # torch's writer that was interrupted writes once more when it is freed, and an error would end the process.
        if self.file is not None:
            self.digest.update(data)
            self.file.write(data)
        return len(data)
