"""What is kept between runs on this machine's own disk: shards that were fetched, and where images are in tar files.

It lies in `$LOMAR_CACHE`, or else in `lomar` in `$XDG_CACHE_HOME` or `~/.cache`, and can be deleted at any time:
`shards/` holds fetched tar files, at most `$LOMAR_CACHE_GB` of them; `indexes/` what was found in tar files.
"""

import hashlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lomar.data.tars import TarIndex, read_tar_index, write_tar_index
from lomar.errors import UserError
from lomar.launch import launched

try:
    import fcntl
except ImportError:  # not a Unix: two processes then do the same work, and either's file is good
    fcntl = None  # type: ignore[assignment]

SHARDS, INDEXES, LOCKS = "shards", "indexes", "locks"
_DEFAULT_GB = 100.0
_SPARED_BYTES = 2 * 10**9  # of the disk, which checkpoints may need
_ABANDONED_S = 3600.0  # since a part of a shard grew: whoever fetched it was killed


def cache_folder() -> Path:
    """Where it is; it may not be there yet."""
    if told := os.environ.get("LOMAR_CACHE"):
        return Path(told).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lomar"


def cache_limit() -> int:
    """Bytes of shards that are kept at most.

    Raises:
        UserError: LOMAR_CACHE_GB is no such number.
    """
    told = os.environ.get("LOMAR_CACHE_GB") or str(_DEFAULT_GB)
    try:
        limit = float(told)
        if not (limit > 0 and math.isfinite(limit)):
            raise ValueError
    except ValueError:
        raise UserError(f"LOMAR_CACHE_GB is {told!r}; it must be a number of gigabytes above 0") from None
    return int(limit * 1e9)


def check_writable(where: str) -> None:
    """Refuse a cache that cannot be written, before anything is fetched.

    Args:
        where: the option that needs it, and its value.

    Raises:
        UserError: it cannot, or its limit is no number.
    """
    cache_limit()
    folder = cache_folder()
    try:
        for part in (SHARDS, INDEXES, LOCKS):
            (folder / part).mkdir(parents=True, exist_ok=True)
            if not os.access(folder / part, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(
            f"{where}: shards are fetched into {folder}, which cannot be written ({error.strerror}); "
            "set LOMAR_CACHE to a folder that can"
        ) from None


def key_of(*identity: object) -> str:
    """A name for what has such an identity."""
    return hashlib.blake2b(repr(identity).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@contextmanager
def alone(kind: str, key: str, wait: bool = True) -> Iterator[bool]:
    """While no other process or thread of this machine does the same; gives False where one does and nobody waits.

    It ends with the process, however that ends. Where the file system has no locks, two may do the same at once: what
    they make must be good whoever makes it.

    Args:
        kind: of what is done.
        key: what it is done to, as `key_of` made it; a few share a lock.
        wait: until it is done elsewhere.

    Raises:
        OSError: the cache cannot be written.
    """
    folder = cache_folder() / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{kind}-{key[:3]}").open("a") as file:
        if fcntl is None:
            yield True
            return
        try:
            # By the open file and not by the process, as files.locked does it: of one process's threads each fetches.
            # (There a lock must not pass to workers that are forked, here it is given back before they could keep it.)
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # such as Lustre, where it is not mounted with flock
        try:
            yield True
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # closing would leave it to a process that was forked meanwhile


def kept_index(key: str, length: int, find: Callable[[], TarIndex]) -> TarIndex:
    """What is in a tar file, found once; where nothing can be kept, each time.

    Args:
        key: of the tar file and its version.
        length: of the file, in bytes.
        find: looks through it; may raise OSError or UserError.
    """
    file = cache_folder() / INDEXES / f"{key}.safetensors"
    index = read_tar_index(file, length)
    if index is None:
        with ExitStack() as held:
            with suppress(OSError):
                held.enter_context(alone("index", key))
            index = read_tar_index(file, length) or find()
            with suppress(OSError):
                write_tar_index(file, index)
    return index


def make_room(size: int) -> None:
    """Delete shards, those first that were not read for the longest time, until another one fits or none is left.

    Whoever reads one that is deleted reads on: it has the file open. What others fetch now counts with what has come of
    it; what was left of a fetch that was killed is deleted.

    Args:
        size: of the one that comes, in bytes.
    """
    folder, limit = cache_folder() / SHARDS, cache_limit()
    found, coming = [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.name.endswith(".tar"):
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
                elif entry.name.endswith(".part"):
                    status = entry.stat()
                    if time.time() - status.st_mtime > _ABANDONED_S:
                        os.unlink(entry.path)  # noqa: PTH108
                    else:
                        coming += status.st_size
    kept = coming + sum(length for _, length, _ in found)
    free = shutil.disk_usage(folder).free - _SPARED_BYTES
    for _, length, path in sorted(found):
        if kept + size <= limit and size <= free:
            break
        with suppress(OSError):  # another process has deleted it
            os.unlink(path)  # noqa: PTH108
        kept, free = kept - length, free + length


def tell(line: str) -> None:
    """A line on standard error, from one process of a run alone."""
    if launched().rank == 0:
        sys.stderr.write(f"lomar: {line}\n")
