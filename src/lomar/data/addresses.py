"""Names that stand for many files: braces and wildcards; and which names are addresses in a network."""

import re
from pathlib import Path

MOST_NAMES = 100_000  # that braces may stand for; a hundred thousand shards of 1 GB are 100 TB
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
_USER = re.compile(r"(?<=://)[^/?#]*@")
_TAR = re.compile(r"\.tar(\?[^/]*)?(?=/|$)", re.IGNORECASE)  # an address may have a query behind it


def is_address(name: str) -> bool:
    """Whether a name is an address, https://host/x.tar or s3://bucket/x.tar, and no path."""
    return _ADDRESS.match(name) is not None


def has_wildcards(name: str) -> bool:
    """Whether a name stands for what matches it. In an address of the web a question mark begins the query."""
    signs = "*[" if name.lower().startswith("http") else "*[?"
    path = name.partition("://")[2].partition("/")[2] if is_address(name) else name  # a host may be [::1]
    return any(sign in path for sign in signs)


def has_braces(name: str) -> bool:
    """Whether a name has braces that stand for several names."""
    return any(_RANGE.fullmatch(inside) or "," in inside for inside in _BRACES.findall(name))


def without_braces(name: str) -> list[str]:
    """All names that one with braces stands for, in order: {000..011} counts, with its zeros, {a,b} lists.

    Raises:
        ValueError: they are more than MOST_NAMES.
    """
    names = [name]
    while True:
        # One pair of braces of each at a time. Doubles go at once: {,a}{,a}{,a} and so on stands for few names.
        fewer: dict[str, None] = {}
        for each in names:
            fewer |= dict.fromkeys(_without_first_braces(each))
            if len(fewer) > MOST_NAMES:
                raise ValueError(f"the braces stand for more than {MOST_NAMES:,} names")
        if list(fewer) == names:
            return names
        names = list(fewer)


def _without_first_braces(name: str) -> list[str]:
    for braces in _BRACES.finditer(name):
        if (inside := _expanded(braces[1])) is not None:
            return [name[: braces.start()] + middle + name[braces.end() :] for middle in inside]
    return [name]


def _expanded(inside: str) -> list[str] | None:
    """What one pair of braces stands for; None where it stands for itself."""
    if "," in inside:
        return inside.split(",")
    ends = _RANGE.fullmatch(inside)
    if ends is None:
        return None
    first, last = int(ends[1]), int(ends[2])
    if abs(last - first) >= MOST_NAMES:
        raise ValueError(f"the braces stand for more than {MOST_NAMES:,} names")
    width = max(map(len, ends.groups())) if any(len(end) > 1 and end[0] == "0" for end in ends.groups()) else 0
    step = 1 if first <= last else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def tars_and_inside(name: str) -> tuple[str, str] | None:
    """A name cut behind the first `.tar`: the tar files, and the path in them ("" for all of it); None without one."""
    found = _TAR.search(name)
    return (name[: found.end()], name[found.end() :].strip("/")) if found else None


def within(path: str, name: str) -> str:
    """The name of something in a folder, in tar files or below an address."""
    return f"{path.rstrip('/')}/{name}" if is_address(path) else str(Path(path, name))


def shown(name: str) -> str:
    """A name as messages and lists may show it: an address without what may be a key to it, which is the user before
    the host and the query; x://user:word@host/a.tar?sign=word/b.png is x://***@host/a.tar?***/b.png."""
    if not is_address(name):
        return name
    here, inside = tars_and_inside(name) or (name, "")
    path, mark, _ = here.partition("?") if name.lower().startswith("http") else (here, "", "")
    return _USER.sub("***@", path) + (mark and "?***") + (inside and f"/{inside}")
