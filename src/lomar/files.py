"""Files that are complete or absent, never half-written, and folders that one process writes at a time."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lomar.errors import UserError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"  # in a folder that is written


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then put it in the place of `path`.

    Folders on the way are made. After a power cut the old content is there, or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """`write_atomically` of a text, as UTF-8.

    Args:
        path: the file.
        text: its content.
        errors: what becomes of letters that UTF-8 lacks, as for `str.encode`.
    """
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors=errors))


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut.

    Raises:
        OSError: the disk is full or fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a folder, on file systems that know no such thing
            raise
    finally:
        os.close(descriptor)


def locked(file: IO[Any]) -> bool:
    """Lock an open file; False where another process has locked it.

    The lock ends when the file is closed or the process ends, however it ends; workers that it forks do not hold it.
    True also where the file system has no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


@contextmanager
def only_writer(lock: Path, what: str) -> Iterator[None]:
    """Keep other processes, also those of other machines that see the file, from writing the same.

    A kill leaves the file behind, unlocked.

    Args:
        lock: the file that is locked; made where it is missing, with its folder, and removed at the end.
        what: the option and its value, for the message.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be made.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(lock.parent)) from None
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(lock.open("a+", encoding="utf-8"))
            if not locked(file):
                file.seek(0)
                holder = " ".join(file.read(200).split()) or "another process"
                raise UserError(f"{what} is being written by {holder}; wait for it, or give another")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    break  # else its holder has just removed it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
