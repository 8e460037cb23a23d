"""Images by number: files, each of its own or in tar files; what every other kind of source is like."""

import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np

from lomar.data.addresses import shown
from lomar.data.shards import Members, ShardGroups, grouped, joined_members, nowhere

# In a folder only files with these endings are taken, in either case; a list may name any file.
EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"),
    *("pbm", "pgm", "ppm", "pnm", "jp2", "avif", "npy"),
)
ENDINGS = tuple(f".{extension}".encode() for extension in EXTENSIONS)


class ImageSource:
    """Image files by number. A million paths cost little memory: one string of bytes and the offsets into it.

    It holds no open file and no cache, so it is cheap to hand to worker processes.

    Args:
        root: the folder that relative paths start from; empty if there is none.
        paths: one path a file, relative to the root or absolute, as the file system spells it (os.fsencode).
        members: where in tar files they lie, if they do not lie at these paths: those of a prepared folder are named
            as if they did.
    """

    def __init__(self, root: str, paths: Iterable[bytes], members: Members | None = None) -> None:
        self.root = root
        self.members = members
        self._root = os.fsencode(root)
        blob = bytearray()
        ends = [0]
        for path in paths:
            blob += path
            ends.append(len(blob))
        self._blob = bytes(blob)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def relative_path(self, index: int) -> bytes:
        """The path of file `index` as it was given, relative to the root."""
        return self._blob[self._ends[index] : self._ends[index + 1]]

    def path(self, index: int) -> bytes:
        """Where file `index` lies, or would if it were in no tar file; `open_source` knows either."""
        return os.path.join(self._root, self.relative_path(index))  # noqa: PTH118

    def name(self, index: int) -> str:
        """The path of file `index` for messages; what is not valid text in it is replaced, and keys in an address."""
        return shown(self.path(index).decode(errors="replace"))

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or renamed, or one in a tar file changes; the root may move."""
        within = self.members.digest() if self.members else b""
        return hashlib.blake2b(self._blob + self._ends.tobytes() + within, digest_size=8).hexdigest()

    def read(self, index: int) -> bytes | memoryview:
        """The content of file `index`, mapped where it is large and lies in a tar file.

        Raises:
            OSError: the file cannot be read.
        """
        if self.members and self.members.hold(index):
            return self.members.read(index)
        # Path() would cost as much as opening the file, and bytes are what the file system speaks.
        try:
            with open(self.path(index), "rb") as file:  # noqa: PTH123
                return file.read()
        except ValueError as error:  # a zero byte in it
            raise OSError(f"no path of a file: {error}") from error

    def listed(self) -> "ImageSource":
        """The same with all paths and places known; the few sources that find them out as they are read do so now.

        Raises:
            UserError: they cannot.
        """
        return self

    def by_shard(self) -> ShardGroups | None:
        """The images of each shard, where one must be fetched to be read; None where all are at hand."""
        if self.members is None or not any(shard.remote for shard in self.members.shards):
            return None
        return grouped(self.members.shards, self.members.shard)

    def subset(self, indices: Iterable[int]) -> "ImageSource":
        """A source of the given files in the given order."""
        chosen = [int(index) for index in indices]
        members = self.members.subset(chosen) if self.members else None
        return ImageSource(self.root, (self.relative_path(index) for index in chosen), members)


def joined(sources: Sequence[ImageSource]) -> ImageSource:
    """All images of several sources, one source after another.

    Raises:
        UserError: one finds out what it holds as it is read, and cannot.
    """
    sources = [source.listed() for source in sources]
    paths = (source.path(index) for source in sources for index in range(len(source)))
    members = None
    if any(source.members for source in sources):
        members = joined_members([source.members or nowhere(len(source)) for source in sources])
    return ImageSource("", paths, members)
