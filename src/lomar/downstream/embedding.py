"""What `lomar embed` wrote: a row of features for each image, read from its file and searched.

Both formats hold

- `features`: (N, D), or (N, H, W, D) or (N, patches, D) of patches; float32 or float16; zeros where not good.
- `good`: bool (N,), whether the image could be used.
- `paths`: relative to `root` of the metadata, or absolute. In .npz an array of text; in .safetensors, and in .npz where
  that array would be huge, uint8: the paths as the file system spells them with a zero byte between two.
- `lomar`: JSON of the metadata, a string among the .safetensors metadata or an array of one in the .npz.
"""

import json
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from lomar.errors import UserError

METADATA = "lomar"
STATE_FILE = "state.json"
_COMPARED = 2**22  # numbers at once


@dataclass(frozen=True)
class Embedding:
    """What `lomar embed` wrote.

    Args:
        features: (N, D), or (N, H, W, D) or (N, patches, D); mapped from the file, so that only what is used is read.
        good: bool (N,), whether the image could be used; other rows are zeros.
        paths: N paths relative to the root, or absolute; what is no text in them is as in Python's file names.
        root: the folder they start from.
        about: the metadata: model, features, layer, image_size, mean, std, version and more.
    """

    features: NDArray[np.floating]
    good: NDArray[np.bool_]
    paths: list[str]
    root: str
    about: dict[str, Any]

    def file(self, index: int) -> str:
        """Where image `index` was."""
        return os.path.join(self.root, self.paths[index])  # noqa: PTH118


def read_embedding(file: str | Path) -> Embedding:
    """The embedding in a file of either format.

    Raises:
        UserError: there is no such file, it is no embedding, or a damaged one.
    """
    path = Path(file)
    if not path.is_file():
        unfinished = ", but an unfinished one; finish it with lomar embed --resume" if begun(path) is not None else ""
        raise UserError(f"there is no embedding {path}{unfinished}")
    try:
        arrays, metadata = (_read_npz if zipfile.is_zipfile(path) else _read_safetensors)(path)
        about = json.loads(metadata)
        if about.pop("kind") != "embedding":
            raise KeyError
        features, good, paths = arrays["features"], arrays["good"], arrays["paths"]
        named = paths.tolist() if paths.dtype.kind == "U" else text_of(paths.tobytes()).split("\0")
        root = about["root"]
    except (KeyError, ValueError, TypeError, AttributeError, OSError, safetensors.SafetensorError) as error:
        if _is_cut_short(path):
            raise UserError(f"{path} is an embedding that is cut short; copy it again, or make it anew") from error
        raise UserError(f"{path} is no embedding; lomar embed writes one, as .safetensors or .npz") from error
    # What damaged bytes lead zipfile, zlib and NumPy to is their affair: BadZipFile, EOFError, struct.error,
    # NotImplementedError, MemoryError and more, so that no list of types would be complete.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); copy it again, or make it anew") from error
    if features.ndim < 2 or not len(features) == len(good) == len(named):
        raise UserError(f"{path} is damaged: {len(features)} features, {len(good)} marks and {len(named)} paths")
    return Embedding(features, good, named, root, about)


def _is_cut_short(path: Path) -> bool:
    """Whether a file begins as `lomar embed` begins one, and has lost its end."""
    with path.open("rb") as file:
        begins = file.read(2**20)
    if begins.startswith(b"PK\3\4"):
        return begins[30:42] == b"features.npy" and not zipfile.is_zipfile(path)
    try:
        size = struct.unpack("<Q", begins[:8])[0]
        header = json.loads(begins[8 : 8 + size])
        whole = 8 + size + max(each["data_offsets"][1] for name, each in header.items() if name != "__metadata__")
        return METADATA in header["__metadata__"] and "features" in header and path.stat().st_size < whole
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        return False


def _read_safetensors(path: Path) -> tuple[dict[str, NDArray], str]:
    """Its arrays, mapped, and its metadata."""
    with safetensors.safe_open(path, framework="np") as file:  # refuses what is not whole
        metadata = (file.metadata() or {})[METADATA]
    with path.open("rb") as raw:
        (size,) = struct.unpack("<Q", raw.read(8))
        header = json.loads(raw.read(size))
    kinds = {"F32": "<f4", "F16": "<f2", "U8": "u1", "BOOL": "?"}
    return {
        name: _mapped(path, 8 + size + each["data_offsets"][0], np.dtype(kinds[each["dtype"]]), tuple(each["shape"]))
        for name, each in header.items()
        if name != "__metadata__"
    }, metadata


def _read_npz(path: Path) -> tuple[dict[str, NDArray], str]:
    """Its arrays, the large ones mapped, and its metadata."""
    arrays: dict[str, NDArray] = {}
    with np.load(path) as whole, zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        for name in ("features", "good", "paths"):
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran_order, dtype = read(member)
                begins = member.tell()
            if begins + prod(shape) * dtype.itemsize != info.file_size:
                raise EOFError(f"{name} is not of the size that it says")
            if info.compress_type != zipfile.ZIP_STORED or fortran_order:
                arrays[name] = whole[name]
                continue
            raw.seek(info.header_offset + 26)  # the lengths of name and extra field, after which the data begin
            begins += info.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4)))
            arrays[name] = _mapped(path, begins, dtype, shape)
        return arrays, str(whole[METADATA])


def _mapped(path: Path, begins: int, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray:
    return np.memmap(path, dtype, "r", begins, shape) if prod(shape) else np.zeros(shape, dtype)


def nearest(embedding: Embedding, queries: Sequence[int], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The images most like each query by cosine similarity: exact, in memory that does not grow with the embedding.

    Args:
        embedding: of one vector an image.
        queries: numbers of images.
        count: neighbours of each, at most all others that are good.

    Returns:
        (queries, count) numbers of images, most similar first, the query itself left out; and their similarities.

    Raises:
        ValueError: features of patches.
    """
    if embedding.features.ndim != 2:
        raise ValueError(f"features must be (N, D), not {embedding.features.shape}")
    asked = np.asarray(queries, dtype=np.int64)
    wanted = unit_length(embedding.features[asked])  # (Q, D)
    total = len(embedding.features)
    places = np.empty((len(asked), 0), dtype=np.int64)
    best = np.empty((len(asked), 0), dtype=np.float32)
    step = max(1, _COMPARED // max(embedding.features.shape[1], len(asked)))
    for start in range(0, total, step):
        here = np.arange(start, min(start + step, total))
        alike = wanted @ unit_length(embedding.features[start : start + step]).T  # (Q, step)
        alike[:, ~embedding.good[start : start + step]] = -np.inf
        alike[asked[:, None] == here] = -np.inf
        best = np.concatenate([best, alike], axis=1)
        places = np.concatenate([places, np.broadcast_to(here, alike.shape)], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :count]  # of equals the first
        best = np.take_along_axis(best, order, axis=1)
        places = np.take_along_axis(places, order, axis=1)
    others = int(embedding.good.sum()) - 1
    return places[:, :others], best[:, :others]


def unit_length(features: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows (n, D) divided by their length, float32; a row of zeros stays one."""
    rows = np.asarray(features, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def partial_of(out: Path) -> Path:
    """Where an embedding is made before it is finished."""
    return out.with_name(f"{out.name}.partial")


def begun(out: Path) -> int | None:
    """How many rows of an unfinished embedding are safe; None where none was begun."""
    state = state_of(partial_of(out))
    return None if state is None else state["rows"]


def state_of(folder: Path) -> dict[str, Any] | None:
    """What the folder of an unfinished embedding says; None where it was not really begun, or is finished."""
    if not (folder / "rows").exists():
        return None
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state


def text_of(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
