"""The file of an embedding being written: a row of features for each image, as they come, and resumed.

What it holds is said in `embedding`. Until it is finished, `FILE.partial/` holds the rows and, in `state.json`, what
they are and how many are safe on disk.
"""

import json
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lomar.downstream.embedding import METADATA, STATE_FILE, partial_of, read_embedding, state_of, text_of
from lomar.errors import UserError
from lomar.files import write_text

ENDINGS = (".safetensors", ".npz")
KEEP_EVERY_S = 5.0  # at most so many seconds of work are lost when the process is killed
LARGEST_TEXT = 2**30  # bytes of a text array of paths in .npz; above, they are written as bytes
_ARCHIVE = "embedding.npz"  # while it is made
_MADE = ("rows", STATE_FILE, f".{STATE_FILE}.tmp", _ARCHIVE)  # all that the folder of an unfinished one may hold
_CHUNK = 2**22  # bytes copied at once
_NAMES = ("model", "root")  # in the metadata, of what digests tell as well
_DTYPES = {"float32": "F32", "float16": "F16"}


@dataclass(frozen=True)
class Plan:
    """What an embedding is to be.

    Args:
        about: the metadata, which JSON can hold; "weights" and "images" are digests of what "model" and "root" name.
            Rows go on only below rows that were made with an equal one, but for these two names: what moved, or is
            named from another folder, goes on, and the file says what it was begun with.
        count: N, images.
        row: shape of the features of an image.
        dtype: "float32" or "float16".
        path: number of an image -> its path, relative to `root` in `about` or absolute.
    """

    about: dict[str, Any]
    count: int
    row: tuple[int, ...]
    dtype: str
    path: Callable[[int], bytes]

    @property
    def features_bytes(self) -> int:
        """Size of all features."""
        return self.count * prod(self.row) * np.dtype(self.dtype).itemsize

    def metadata(self) -> str:
        """JSON of what the file says of itself."""
        return json.dumps({"kind": "embedding", **self.about})

    def fixed(self) -> dict[str, Any]:
        """What must be equal for rows to go on below others."""
        return _fixed(json.loads(self.metadata()), (self.count, *self.row), self.dtype)

    def named_as(self, fixed: dict[str, Any]) -> "Plan":
        """The same, with the names that an earlier plan had for model and images."""
        return replace(self, about=self.about | {name: fixed[name] for name in _NAMES if name in fixed})

    def path_blocks(self) -> Iterator[list[bytes]]:
        """All paths in order, some at a time."""
        for start in range(0, self.count, 2**14):
            yield [self.path(index) for index in range(start, min(start + 2**14, self.count))]

    def paths_as_bytes(self) -> Iterator[bytes]:
        """The paths with a zero byte between two, in pieces."""
        separator = b""
        for block in self.path_blocks():
            yield separator + b"\0".join(block)
            separator = b"\0"


def _fixed(metadata: dict[str, Any], shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    found = {name: value for name, value in metadata.items() if name != "kind"}
    return found | {"shape": list(shape), "dtype": dtype}


class _Safetensors:
    """The rows stand in the file that is to be: its header is known before the first row.

    Features come first, since their numbers must be aligned: the header is padded to eight bytes.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        paths_bytes = sum(map(len, plan.paths_as_bytes()))
        sizes = {"features": plan.features_bytes, "paths": paths_bytes, "good": plan.count}
        kinds = {"features": _DTYPES[plan.dtype], "paths": "U8", "good": "BOOL"}
        shapes = {"features": [plan.count, *plan.row], "paths": [paths_bytes], "good": [plan.count]}
        header: dict[str, Any] = {"__metadata__": {"format": "pt", METADATA: plan.metadata()}}
        end = 0
        for name, size in sizes.items():
            header[name] = {"dtype": kinds[name], "shape": shapes[name], "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self.features_at = len(self._header)
        self._paths_at = self.features_at + plan.features_bytes
        self.good_at = self._paths_at + paths_bytes
        self.rows_bytes = self.good_at + plan.count
        self.copies = 1

    def prepare(self, file: IO[bytes]) -> None:
        """Write what is no row."""
        file.write(self._header)
        file.seek(self._paths_at)
        file.writelines(self._plan.paths_as_bytes())

    def complete(self, rows: Path) -> Path:
        """The finished file, made from that of the rows."""
        return rows


class _Npz:
    """The rows stand in a plain file and are copied into the archive, whose check sums need them all."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.features_at, self.good_at = 0, plan.features_bytes
        self.rows_bytes = self.good_at + plan.count
        self.copies = 2

    def prepare(self, file: IO[bytes]) -> None:
        """Nothing: there is nothing but rows."""

    def complete(self, rows: Path) -> Path:
        """The finished file, made from that of the rows."""
        plan = self._plan
        whole = rows.with_name(_ARCHIVE)
        with zipfile.ZipFile(whole, "w") as archive, rows.open("rb") as file:
            shape = (plan.count, *plan.row)
            _store(archive, "features", np.dtype(plan.dtype), shape, _pieces(file, plan.features_bytes))
            _store(archive, "good", np.dtype(bool), (plan.count,), _pieces(file, plan.count))
            _store(archive, "paths", *self._paths())
            metadata = np.array(plan.metadata())
            _store(archive, METADATA, metadata.dtype, (), iter([metadata.tobytes()]))
        return whole

    def _paths(self) -> tuple[np.dtype, tuple[int, ...], Iterator[bytes]]:
        """Type, shape and bytes of the array of paths."""
        plan = self._plan
        longest = max(max(len(text_of(path)) for path in block) for block in plan.path_blocks())
        text = np.dtype(f"<U{max(1, longest)}")
        if text.itemsize * plan.count > LARGEST_TEXT:
            size = sum(map(len, plan.paths_as_bytes()))
            return np.dtype(np.uint8), (size,), plan.paths_as_bytes()
        blocks = (np.array([text_of(path) for path in block], text).tobytes() for block in plan.path_blocks())
        return text, (plan.count,), blocks


def _store(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], pieces: Iterator[bytes]
) -> None:
    """Add an array to an .npz, a piece at a time. Text, most of it zeros, is compressed."""
    info = zipfile.ZipInfo(f"{name}.npy")  # without a date: equal embeddings are equal files
    info.compress_type = zipfile.ZIP_DEFLATED if dtype.kind == "U" else zipfile.ZIP_STORED
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for piece in pieces:
            member.write(piece)


def _pieces(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The next `size` bytes of a file."""
    while size:
        piece = file.read(min(size, _CHUNK))
        if not piece:
            raise OSError("the rows end early")
        size -= len(piece)
        yield piece


class EmbeddingWriter:
    """An embedding on its way into a file; opened with `begin` or `resume`, closed by `finish` or `close`."""

    def __init__(self, out: Path, plan: Plan, rows: int) -> None:
        """
        Args:
            out: the file to be, .safetensors or .npz.
            plan: what it is to be.
            rows: how many of its rows are there.
        """
        self.out, self.plan, self.rows = out, plan, rows
        self._layout = _layout(out, plan)
        self._folder = partial_of(out)
        self._rows_file = self._folder / "rows"
        self._file: IO[bytes] = self._rows_file.open("r+b")
        self._kept = time.monotonic()

    @classmethod
    def begin(cls, out: Path, plan: Plan) -> "EmbeddingWriter":
        """One without rows; what is left of an earlier one is deleted, but not a finished file.

        Raises:
            OSError: the folder cannot be written to.
        """
        folder = partial_of(out)
        discard(out)
        folder.mkdir(parents=True)
        layout = _layout(out, plan)
        with (folder / "rows").open("wb") as file:
            layout.prepare(file)
            file.truncate(layout.rows_bytes)
        writer = cls(out, plan, 0)
        writer.keep()
        return writer

    @classmethod
    def resume(cls, out: Path, plan: Plan) -> "EmbeddingWriter":
        """One that goes on after the last row that is safe.

        Raises:
            UserError: nothing was begun, or it was something else.
        """
        state = state_of(partial_of(out))
        if state is None:
            raise UserError(f"--resume: there is nothing begun in {partial_of(out)}; leave it out to begin")
        _check_same(out, state["fixed"], plan)
        plan = plan.named_as(state["fixed"])
        rows = partial_of(out) / "rows"
        if rows.stat().st_size != _layout(out, plan).rows_bytes:
            raise UserError(f"--resume: {rows} is damaged; --overwrite starts anew")
        return cls(out, plan, state["rows"])

    def write(self, features: NDArray[np.floating], good: NDArray[np.bool_]) -> None:
        """Add rows; now and then all are made safe.

        Args:
            features: (B, ...) of the plan's shape.
            good: (B,); the rows of others become zeros, and so do rows that are not finite in the plan's type.
        """
        with np.errstate(over="ignore"):
            rows = features.astype(self.plan.dtype, order="C")
        good = good & np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
        rows[~good] = 0
        self._file.seek(self._layout.features_at + self.rows * rows[0].nbytes)
        self._file.write(rows.data)
        self._file.seek(self._layout.good_at + self.rows)
        self._file.write(good.data)
        self.rows += len(rows)
        if time.monotonic() - self._kept > KEEP_EVERY_S:
            self.keep()

    def keep(self) -> None:
        """Make all rows safe: on disk, and counted there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        state = json.dumps({"rows": self.rows, "fixed": self.plan.fixed()})
        write_text(self._folder / STATE_FILE, state)
        self._kept = time.monotonic()

    def good(self) -> NDArray[np.bool_]:
        """(rows,) which of the rows so far are good."""
        self._file.flush()
        self._file.seek(self._layout.good_at)
        return np.frombuffer(self._file.read(self.rows), dtype=bool)

    def finish(self) -> None:
        """Put the whole file in its place.

        Raises:
            ValueError: rows are missing.
        """
        if self.rows != self.plan.count:
            raise ValueError(f"{self.rows} of {self.plan.count} rows are written")
        self.keep()
        self.close()
        whole = self._layout.complete(self._rows_file)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(self.out)
        folder = os.open(self.out.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        shutil.rmtree(self._folder)

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        self._file.close()


def discard(out: Path) -> None:
    """Delete what was begun and not finished."""
    if partial_of(out).exists():
        shutil.rmtree(partial_of(out))


def holds_other(out: Path) -> bool:
    """Whether something else is in the folder in which an embedding is made, as the checkpoints of a tokenizer."""
    return any(path.name not in _MADE for path in partial_of(out).glob("*"))


def bytes_needed(out: Path, plan: Plan) -> int:
    """Most that is on disk while an embedding is made, less what is there already."""
    layout = _layout(out, plan)
    rows = partial_of(out) / "rows"
    there = rows.stat().st_blocks * 512 if rows.exists() else 0
    return max(0, layout.copies * layout.rows_bytes - there)


def check_finished(out: Path, plan: Plan) -> None:
    """Refuse a finished file that is not what is asked for.

    Raises:
        UserError: it is no embedding, or one of other images, weights or options.
    """
    there = read_embedding(out)
    _check_same(out, _fixed(there.about, there.features.shape, there.features.dtype.name), plan)


def _check_same(out: Path, before: dict[str, Any], plan: Plan) -> None:
    """Raises UserError, naming the first difference between what was begun and what is planned."""
    now = plan.fixed()
    for name in ("weights", "images"):  # whose values tell nobody anything
        if before.get(name) != now[name]:
            raise UserError(f"--resume: {out} was begun with other {name}; --overwrite starts anew")
    for name in now:
        if name in _NAMES:
            continue
        if before.get(name) != now[name]:
            raise UserError(
                f"--resume: {out} was begun with {name.replace('_', ' ')} {before.get(name)}, not {now[name]}; "
                "give that again, or --overwrite to start anew"
            )


def _layout(out: Path, plan: Plan) -> _Safetensors | _Npz:
    return _Npz(plan) if out.suffix.lower() == ".npz" else _Safetensors(plan)
