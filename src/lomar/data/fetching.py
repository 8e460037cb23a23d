"""Shards from a network, through fsspec: listed, fetched whole into the cache with retries, and read there like others.

Of one machine's processes and threads one fetches a shard, and the others wait for it. It comes under another name,
is checked and renamed, so that a file in the cache is whole. What cannot be fetched is not asked for again for a while,
so that its images cost little; they count as unreadable.
"""

import errno
import json
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lomar.data.addresses import has_wildcards, shown, without_braces
from lomar.data.cache import SHARDS, alone, cache_folder, cache_limit, key_of, make_room
from lomar.data.shards import Shard, sha256_of
from lomar.errors import UserError
from lomar.files import flush_to_disk

_TRIES = 6
_FIRST_WAIT_S = 0.5  # then twice as long each time: 16 s in all
_FORGIVEN_S = 300.0  # until a shard that could not be fetched is asked for again
_AT_ONCE = 16  # questions to a server
_SILENCE_S = 60  # of a server, after which a connection counts as lost
_MOST_TEXT_BYTES = 2**28
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of this machine's disk
_FORBIDDEN = (errno.EACCES, errno.EPERM)  # by it, if a file is named; else by a server
# What stores call the version of a file.
_VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "Last-Modified", "LastModified", "mtime", "updated", "created")
_PACKAGES = {"s3": "lomar[s3]", "s3a": "lomar[s3]", "gs": "lomar[gs]", "gcs": "lomar[gs]"}

S = TypeVar("S")
T = TypeVar("T")


class _TooMuchError(OSError):
    """A server sends more than it said, or than the cache may hold."""


@dataclass(frozen=True)
class RemoteShard(Shard):
    """A tar file at an address, read from the cache once it is there.

    Args:
        path: the address.
        size: in bytes; -1 where the server does not say.
        sha256: of its content; "" where it is not known.
        version: what the server says of its version.
    """

    version: str = ""
    remote: ClassVar[bool] = True

    @property
    def key(self) -> str:
        """Of this version of the file in the cache."""
        return key_of(self.path, self.size, self.version)

    @property
    def file(self) -> Path:
        """Where it is in the cache, or will be."""
        return cache_folder() / SHARDS / f"{self.key}.tar"

    def open(self) -> int:
        """A descriptor of the file in the cache; it is fetched first where it is not there.

        Raises:
            OSError: it cannot be fetched.
        """
        file = self.file
        for _ in range(3):
            try:
                opened = os.open(file, os.O_RDONLY)
            except FileNotFoundError:
                self.fetch()
                continue
            if self.size in (-1, os.fstat(opened).st_size):
                with suppress(OSError):
                    os.utime(file)  # read last, so deleted last
                return opened
            os.close(opened)  # a disk that was full or failed has left less
            file.unlink(missing_ok=True)
        raise OSError(
            f"{shown(self.path)} is deleted from the cache as soon as it is there; LOMAR_CACHE_GB must be larger"
        )

    def fetch(self, wait: bool = True) -> None:
        """Have the file in the cache.

        Args:
            wait: where another process or thread fetches it, until it has done so.

        Raises:
            OSError: it cannot be fetched.
        """
        file = self.file
        if file.exists():
            return
        if self.size > cache_limit():
            raise OSError(f"{shown(self.path)} has {self.size / 1e9:.1f} GB, more than LOMAR_CACHE_GB allows")
        with alone("shard", self.key, wait) as mine:
            if not mine or file.exists():
                return
            failed = file.with_suffix(".failed")
            if (reason := _recent(failed)) is not None:
                raise OSError(reason)
            try:
                self._fetch(file)
                failed.unlink(missing_ok=True)
            except OSError as error:
                if error.errno not in (*_FULL, *_FORBIDDEN) or error.filename == self.path:
                    with suppress(OSError):
                        failed.write_text(error.strerror or str(error), encoding="utf-8", errors="replace")
                raise

    def _fetch(self, file: Path) -> None:
        # A name of its own, since not every file system has locks.
        part = file.with_name(f"{self.key}-{secrets.token_hex(4)}.part")
        most = self.size if self.size >= 0 else cache_limit()

        def check(size: int | None, value: int, **_: object) -> None:
            if value > most:
                raise _TooMuchError(f"more than {most:,} bytes come")

        def get() -> None:
            from fsspec.callbacks import Callback

            system, path = file_system(self.path)
            part.parent.mkdir(parents=True, exist_ok=True)  # the cache may be deleted at any time
            make_room(max(self.size, 0))
            try:
                system.get_file(path, str(part), callback=Callback(hooks={"check": check}))
                size = part.stat().st_size
            except FileNotFoundError as error:
                if str(error.filename) != str(part):
                    raise
                raise OSError("it was deleted from the cache as it came") from None
            if self.size not in (-1, size):
                raise OSError(f"{size:,} bytes came instead of {self.size:,}")
            if self.sha256 and sha256_of(part) != self.sha256:
                raise OSError("its content is not what lomar prepare wrote")

        try:
            patiently(get, self.path)
            flush_to_disk(part)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


def _recent(failed: Path) -> str | None:
    """Why a shard could not be fetched a short while ago; None if it was not so, or not by this machine's clock."""
    try:
        if 0 <= time.time() - failed.stat().st_mtime < _FORGIVEN_S:
            return failed.read_text(encoding="utf-8", errors="replace") or "cannot be fetched"
    except OSError:
        pass
    return None


def forgive(shards: Iterable[RemoteShard]) -> None:
    """Have shards asked for again that could not be fetched a while ago: what was wrong may have been mended."""
    folder = cache_folder() / SHARDS
    with suppress(OSError):
        failed = {entry.name for entry in os.scandir(folder) if entry.name.endswith(".failed")}
        for shard in shards if failed else ():
            if f"{shard.key}.failed" in failed:
                (folder / f"{shard.key}.failed").unlink(missing_ok=True)


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path there.

    Raises:
        UserError: the protocol is unknown, or a package for it is not installed.
    """
    import fsspec

    protocol = address.partition("://")[0].lower()
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        options = {"client_kwargs": _client_options()}
    try:
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        how = f"pip install '{package}'" if package else " ".join(str(error).split())
        raise UserError(f"{shown(address)}: {protocol}:// needs a package that is not installed; {how}") from None
    except Exception as error:  # each file system has errors of its own
        if protocol not in fsspec.available_protocols():
            raise UserError(f"{shown(address)}: {protocol}:// is no protocol that fsspec knows") from None
        raise UserError(f"{shown(address)}: {_reason(error, address)}") from None


@cache
def _client_options() -> Mapping[str, Any]:
    """Of connections: fsspec's own end after five minutes, which a large shard may take."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
    return {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}


def patiently(ask: Callable[[], T], address: str) -> T:
    """What a server answers, asked again with growing pauses where it fails for now.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: it may not be read.
        UserError: the address cannot be asked for at all.
        OSError: it fails each time, or for good; one line that says why.
    """
    for attempt in range(_TRIES):
        try:
            return ask()
        except UserError:
            raise
        except Exception as error:  # each file system has errors of its own
            reason = _reason(error, address)
            if isinstance(error, OSError) and _of_this_disk(error):
                raise OSError(error.errno, f"cannot be kept in {cache_folder()}: {error.strerror}") from error
            if not _may_pass(error):
                raise _final(error, address) from None
            if attempt < _TRIES - 1:
                # Not all at the same moment, and without a draw from the run's own chance.
                time.sleep(_FIRST_WAIT_S * 2**attempt * random.SystemRandom().uniform(0.5, 1.5))
    raise OSError(f"cannot be fetched in {_TRIES} tries: {reason}")


def _of_this_disk(error: OSError) -> bool:
    return error.errno in _FULL or (error.errno in _FORBIDDEN and bool(error.filename))


def _cause(error: BaseException) -> tuple[BaseException, int, str]:
    """What is behind an error; what the server answered, 0 where it did not; and in which words.

    fsspec calls much "not found", and botocore's answers are in a dict.
    """
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status, words = getattr(cause, "status", None), str(getattr(cause, "message", ""))
    answer = getattr(cause, "response", None)
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        words = answer.get("Error", {}).get("Message", "")
    return (cause, status, words) if isinstance(status, int) else (cause, 0, "")


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may help."""
    cause, status, _ = _cause(error)
    if status:
        return status >= 500 or status in (408, 425, 429)
    if isinstance(cause, ValueError):  # an address that is none; but answers that break off are no JSON
        return isinstance(cause, json.JSONDecodeError)
    final = FileNotFoundError | PermissionError | NotImplementedError | TypeError | _TooMuchError
    return not (isinstance(cause, final) or _lacks_keys(cause))


def _lacks_keys(cause: BaseException) -> bool:
    return type(cause).__name__ in ("NoCredentialsError", "PartialCredentialsError")  # of botocore, if it is there


def _final(error: BaseException, address: str) -> OSError:
    """What is said of an error that asking again does not help."""
    cause, status, words = _cause(error)
    if status in (401, 403) or isinstance(cause, PermissionError) or _lacks_keys(cause):
        return PermissionError(errno.EACCES, f"may not be read ({_reason(error, address)})", address)
    missing = status in (404, 410) or (isinstance(cause, FileNotFoundError) and not status)
    if missing and "bucket" not in words:
        return FileNotFoundError(errno.ENOENT, "there is no such file", address)
    return OSError(f"cannot be fetched: {_reason(error, address)}")


def _reason(error: BaseException, address: str) -> str:
    cause, status, words = _cause(error)
    if status:
        return f"the server answers {status} {' '.join(words.split())[:200]}".rstrip()
    return " ".join(str(cause).replace(address, shown(address)).split())[:200] or type(cause).__name__


def at_once(work: Callable[[S], T], items: Sequence[S], threads: int = _AT_ONCE) -> Iterator[T]:
    """What work makes of each item, in order, several worked on at a time.

    The threads keep neither their user nor the process waiting, as those of a ThreadPoolExecutor do: after an error or
    Ctrl-C none begins another item, and nobody waits for a shard that is on its way.
    """
    made: list[Future[T]] = [Future() for _ in items]
    numbers, ended = iter(range(len(items))), threading.Event()

    def run() -> None:
        for number in numbers:  # of the threads one gets each, since a step of a range is one step of the interpreter
            if ended.is_set():
                return
            try:
                made[number].set_result(work(items[number]))
            except BaseException as error:  # whoever waits for it raises it
                made[number].set_exception(error)

    for _ in range(min(threads, len(items))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for future in made:
            yield future.result()
    finally:
        ended.set()


def listed(names: str, where: str) -> list[RemoteShard]:
    """The shards that an address stands for, with its braces and wildcards.

    Args:
        names: the address.
        where: the option it came from, and its value, for messages.

    Raises:
        UserError: one is not there, none is, or the server does not answer.
    """
    try:
        addresses = without_braces(names)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        file_system(names)[0].invalidate_cache()  # of what was listed before in this process
        matching = [match for some in at_once(_matching, addresses) for match in some]
        found = list(at_once(lambda match: match if isinstance(match, RemoteShard) else shard_at(match), matching))
    except OSError as error:
        file = f"{shown(error.filename)}: " if error.filename and error.filename != names else ""
        raise UserError(f"{where}: {file}{error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not found:
        raise UserError(f"{where}: no tar file is there")
    return found


def _matching(address: str) -> list[RemoteShard | str]:
    """What an address with wildcards stands for; addresses where nothing more is told of it."""
    if not has_wildcards(address):
        return [address]
    system, path = file_system(address)
    try:
        matches = patiently(lambda: system.glob(path, detail=True), address)
    except FileNotFoundError:
        return []
    found = {system.unstrip_protocol(name): info for name, info in sorted(matches.items())}
    # A page of links says nothing of what they lead to.
    return [
        each if info.get("size") is None else _shard(each, info)
        for each, info in found.items()
        if info.get("type") != "directory"
    ]


def shard_at(address: str) -> RemoteShard:
    """A file at an address, of which nothing is fetched.

    Raises:
        OSError, UserError: as of `patiently`.
    """
    system, path = file_system(address)
    return _shard(address, patiently(lambda: system.info(path), address))


def _shard(address: str, info: Mapping[str, Any]) -> RemoteShard:
    size = info.get("size")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return RemoteShard(address, int(size) if size is not None else -1, "", version)


def text_at(address: str) -> bytes | None:
    """The content of a small file; None where there is none that may be read.

    Raises:
        OSError: the server fails.
    """
    system, path = file_system(address)
    try:
        info = patiently(lambda: system.info(path), address)
        if (info.get("size") or 0) > _MOST_TEXT_BYTES or info.get("type") == "directory":
            return None
        return patiently(lambda: system.cat_file(path), address)
    except (FileNotFoundError, PermissionError):
        return None


def texts_at(addresses: Sequence[str]) -> list[bytes | None]:
    """The same of several, many at once."""
    return list(at_once(text_at, addresses))
