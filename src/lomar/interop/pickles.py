"""Modules and state dicts that `torch.save` wrote, read without running anything of theirs.

A pickle names functions to import and call. Here a name is never imported: the few that make up tensors are answered
with our own functions, classes of modules with an empty class that keeps what the pickle sets on it, and any other
name is refused. (`torch.load(weights_only=True)` does not read whole modules in the older of the two formats.)
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lomar.errors import UserError

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first of five pickles in a file that is no zip archive


def read_module(path: Path, classes: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dict of a module, or the state dict itself, that a file of `torch.save` holds, in either format.

    Args:
        path: the file.
        classes: beginnings of the names of modules' classes, beside those of torch itself.

    Raises:
        UserError: it is no such file, is damaged, or names something that is neither tensor nor module.
    """
    try:
        found = _read_zip(path, classes) if zipfile.is_zipfile(path) else _read_legacy(path, classes)
        state = dict(found) if isinstance(found, dict) else _state_of(found)
    except _RefusedError as error:
        raise UserError(f"{path} is refused: its pickle asks for {error}, which has no place in weights") from None
    # A damaged or forged pickle can end in any error; none of them has run anything.
    except Exception as error:
        raise UserError(f"{path} is not a module or state dict of torch.save ({type(error).__name__})") from error
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise UserError(f"{path} holds something else than a module or a state dict")
    return state


class _RefusedError(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    """Knows tensors, plain containers and empty classes; `storages` collects what has to be filled with data."""

    def __init__(self, file: IO[bytes], classes: tuple[str, ...], room: int) -> None:
        super().__init__(file)
        self.storages: dict[str, Tensor] = {}
        self._room = room  # bytes that all storages can have
        self._prefixes = ("torch.nn.modules.", *classes)
        # Made anew for each file, since a pickle may set attributes on what it is given.
        self._stub = type("Stub", (), {})
        self._known: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
            "__builtin__.set": set,  # as Python 2 called it, and the pickles of torch do
            "torch.device": lambda *name: name,
            "torch._utils._rebuild_tensor_v2": _rebuilder(),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in self._known:
            return self._known[full_name]
        if full_name.startswith(self._prefixes):
            return self._stub
        raise _RefusedError(full_name)

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # the older format: a class and its source, which is of no interest
            return pid[1]
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or any(view):
            raise _RefusedError(f"a storage of kind {kind!r}")
        if key not in self.storages:
            self._room -= count * dtype.itemsize
            if count < 0 or self._room < 0:
                raise EOFError  # more data than the file has; torch would try to reserve it
            self.storages[key] = torch.empty(count, dtype=dtype)
        return self.storages[key]


def _rebuilder() -> Callable[..., Tensor]:
    def rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        if math.prod(size) > len(storage):
            raise EOFError  # a few numbers, repeated to more than the memory holds
        return torch.as_strided(storage, size, stride, offset)  # torch checks that it stays within the storage

    return rebuild


def _read_zip(path: Path, classes: tuple[str, ...]) -> Any:
    with zipfile.ZipFile(path) as archive:
        pickled = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        folder = pickled.filename.removesuffix("data.pkl")
        with archive.open(pickled) as file:
            unpickler = _Unpickler(file, classes, path.stat().st_size)
            found = unpickler.load()
        for key, storage in unpickler.storages.items():
            with archive.open(f"{folder}data/{key}") as file:
                _fill(storage, file)
    return found


def _read_legacy(path: Path, classes: tuple[str, ...]) -> Any:
    size = path.stat().st_size
    with path.open("rb") as file:
        magic, _, _ = (_Unpickler(file, (), 0).load() for _ in range(3))  # then protocol and system
        if magic != _LEGACY_MAGIC:
            raise pickle.UnpicklingError
        unpickler = _Unpickler(file, classes, size)
        found = unpickler.load()
        keys = _Unpickler(file, (), 0).load()
        if set(keys) != set(unpickler.storages):
            raise EOFError
        for key in keys:
            file.read(8)  # its length
            _fill(unpickler.storages[key], file)
    return found


def _fill(storage: Tensor, file: IO[bytes]) -> None:
    data = file.read(storage.nbytes)
    if len(data) < storage.nbytes:
        raise EOFError
    if data:
        storage.copy_(torch.frombuffer(bytearray(data), dtype=storage.dtype))


def _state_of(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a module that was read as empty classes, named as in its state dict."""
    contents = vars(module)
    own = {**contents["_parameters"], **contents["_buffers"]}
    state = {prefix + name: tensor for name, tensor in own.items() if tensor is not None}
    for name, child in contents["_modules"].items():
        state |= _state_of(child, f"{prefix}{name}.")
    return state
