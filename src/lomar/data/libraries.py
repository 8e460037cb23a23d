"""Datasets of other libraries by name: Hugging Face `datasets` and torchvision, where they are installed.

Nothing is downloaded: what is not on this machine yet is refused with the line of Python that downloads it. Images are
named `class/number`, or `number` where they have no class, so that labels are found as in class folders.
"""

import inspect
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from lomar.data.cache import cache_folder
from lomar.data.sources import ImageSource
from lomar.errors import UserError

_PICKLED = ("LSUN",)  # torchvision's that unpickle a file beside the images, whatever is in it
_LABELS = ("label", "labels", "fine_label", "class")  # columns of Hugging Face datasets, the first that is there


class LibrarySource(ImageSource):
    """Images that a library holds.

    Args:
        root: how they were named, for messages.
        paths: a name for each.
        content: number of an image -> its file's content, or an OSError; must be picklable.
        numbers: which of the library's images these are; all of them where it is not given.
    """

    def __init__(
        self,
        root: str,
        paths: Iterable[bytes],
        content: Callable[[int], bytes],
        numbers: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        super().__init__("", paths)
        self._name, self._content = root, content
        self._numbers = range(len(self)) if numbers is None else numbers

    def path(self, index: int) -> bytes:
        return os.fsencode(self._name) + b"/" + self.relative_path(index)

    def read(self, index: int) -> bytes:
        """The content of the file of an image.

        Raises:
            OSError: the library cannot read it.
        """
        return self._content(int(self._numbers[index]))

    def listed(self) -> "ImageSource":
        raise UserError(f"{self._name}: images of a library are given alone, as --data, and not here")

    def subset(self, indices: Iterable[int]) -> "LibrarySource":
        chosen = [int(index) for index in indices]
        numbers = np.array([self._numbers[index] for index in chosen], dtype=np.int64)
        return LibrarySource(self._name, (self.relative_path(index) for index in chosen), self._content, numbers)


def open_library(data: str, flag: str) -> LibrarySource:
    """The images of a dataset.

    Args:
        data: hf:NAME[/CONFIG][:SPLIT], where NAME is of the form `owner/dataset` or a folder that `save_to_disk` wrote;
            or torchvision:CLASS[:SPLIT]. The split is "train" where it is not given.
        flag: the option it came from, for messages.

    Raises:
        UserError: the library is not installed, has no such dataset, or not on this machine.
    """
    library, _, rest = data.partition(":")
    name, _, split = rest.partition(":")
    if not name:
        example = {"hf": "hf:uoft-cs/cifar10:test", "torchvision": "torchvision:CIFAR10:test"}[library]
        raise UserError(f"{flag} {data}: a name must follow, as in {example}")
    opened = {"hf": _hugging_face, "torchvision": _torchvision}[library]
    source = opened(name, split or "train", data, f"{flag} {data}")
    if not len(source):
        raise UserError(f"{flag} {data}: the dataset is empty")
    return source


def _names(count: int, labels: Sequence[Any] | None, classes: Sequence[str] | None) -> Iterator[bytes]:
    """class/number of each image."""
    for number in range(count):
        folder = ""
        if labels is not None:
            label = labels[number]
            label = int(label) if label is not None else -1  # unknown
            named = classes is not None and 0 <= label < len(classes)
            name = str(classes[label]) if named and classes is not None else str(label)
            folder = "" if label < 0 else name.replace("/", "_").strip(". ") + "/"
        yield f"{folder}{number:08d}".encode("utf-8", "replace")


# Hugging Face


def _hugging_face(name: str, split: str, data: str, where: str) -> LibrarySource:
    with _offline():
        try:
            import datasets
        except ImportError:
            raise UserError(f"{where}: needs Hugging Face datasets: pip install 'lomar[hf]'") from None
        table = _loaded(datasets, name, split, where)
    images = [column for column, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise UserError(f"{where}: has no column of images; it has {', '.join(table.features)}")
    labels = next((column for column in _LABELS if isinstance(table.features.get(column), datasets.ClassLabel)), None)
    column = table.cast_column(images[0], datasets.Image(decode=False)).select_columns([images[0]])
    names = _names(
        len(table),
        table.select_columns([labels]).with_format("arrow")[:].column(labels).to_pylist() if labels else None,
        table.features[labels].names if labels else None,
    )
    return LibrarySource(data, names, _Column(column, images[0]))


@contextmanager
def _offline() -> Iterator[None]:
    """Without a request to the network by libraries that are imported meanwhile."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _loaded(datasets: Any, name: str, split: str, where: str) -> Any:
    """The table of one split, from a folder or the library's own cache."""
    parts = name.split("/")
    named = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
            if isinstance(found, dict) and split not in found:
                raise UserError(f"{where}: has no split {split!r}; it has {', '.join(found)}")
            return found[split] if isinstance(found, dict) else found
        offline = datasets.DownloadConfig(local_files_only=True)
        return datasets.load_dataset(*named, split=split, download_config=offline)
    except UserError:
        raise
    except Exception as error:  # of any of the libraries it stands on
        reason = " ".join(str(error).split())[:200]
        call = ", ".join(repr(part) for part in named if part)
        raise UserError(
            f"{where}: cannot be loaded from this machine ({reason}); nothing is downloaded here: do it with "
            f'python -c "import datasets; datasets.load_dataset({call})"'
        ) from None


class _Column:
    """The files in a column of images."""

    def __init__(self, table: Any, column: str) -> None:
        self._table, self._column = table, column

    def __call__(self, number: int) -> bytes:
        try:
            entry = self._table[number][self._column]
        except Exception as error:  # of Arrow
            raise OSError(" ".join(str(error).split())[:200]) from error
        if entry is None:
            raise OSError("there is no image in this row")
        if entry["bytes"] is None and entry["path"] is None:
            raise OSError("there is neither an image nor a path in this row")
        return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()


# torchvision


def _torchvision(name: str, split: str, data: str, where: str) -> LibrarySource:
    try:
        from torchvision import datasets
        from torchvision.datasets import VisionDataset
    except ImportError:
        raise UserError(f"{where}: needs torchvision: pip install torchvision") from None
    known = [
        each
        for each in datasets.__all__
        if each not in _PICKLED and _is_dataset(getattr(datasets, each), VisionDataset)
    ]
    if name not in known:
        close = get_close_matches(name, known, n=1, cutoff=0.5)
        meant = f"; do you mean {close[0]}?" if close else ""
        raise UserError(f"{where}: torchvision has no dataset {name!r} that can be opened by name{meant}")
    root = Path(os.environ.get("TORCH_HOME") or cache_folder() / "torchvision").expanduser()
    kind = getattr(datasets, name)
    options = _split_options(kind, split, where)
    try:
        dataset = kind(str(root), **options)
        labels, classes = _classes(dataset)
        return LibrarySource(data, _names(len(dataset), labels, classes), _Items(dataset))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    except Exception as error:  # what they raise where files are missing is of any type
        told = ", ".join(f"{key}={value!r}" for key, value in (options | {"download": True}).items())
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{where}: is not in {root} ({reason}); nothing is downloaded here: do it with "
            f'python -c "from torchvision import datasets; datasets.{name}({str(root)!r}, {told})", '
            "or set TORCH_HOME to the folder that holds it"
        ) from None


def _is_dataset(kind: Any, base: type) -> bool:
    """Whether a class is a data set of images that opens from a folder alone."""
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        return False
    told = list(inspect.signature(kind).parameters.values())
    needed = [each.name for each in told if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    return kind is not base and bool(told) and told[0].name == "root" and needed in (["root"], [])


def _split_options(kind: Any, split: str, where: str) -> dict[str, Any]:
    """How a class is told its split."""
    known = inspect.signature(kind).parameters
    for name in ("split", "image_set"):
        if name in known:
            return {name: split}
    if "train" in known:
        if split not in ("train", "test"):
            raise UserError(f"{where}: the split is {split!r}; it can be train or test")
        return {"train": split == "train"}
    if split != "train":
        raise UserError(f"{where}: this dataset has no splits")
    return {}


def _classes(dataset: Any) -> tuple[Sequence[Any] | None, Sequence[str] | None]:
    """The label of each image and the names of classes, where a data set has them at hand."""
    samples = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    labels: Any = [sample[1] for sample in samples] if samples else None
    for name in ("targets", "labels", "_labels"):
        if labels is None:
            labels = getattr(dataset, name, None)
    numbers = np.asarray(labels) if labels is not None else None
    if numbers is None or numbers.shape != (len(dataset),) or numbers.dtype.kind not in "iu":
        return None, None
    classes = getattr(dataset, "classes", None)
    return numbers.tolist(), [_first(each) for each in classes] if classes else None


def _first(name: Any) -> str:
    """ImageNet's classes have several names each."""
    return str(name[0] if isinstance(name, tuple) else name)


class _Items:
    """The images of a torchvision data set as files: their own where it tells them, else arrays."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        samples = getattr(dataset, "samples", None)
        self._files = [str(sample[0]) for sample in samples] if samples else None

    def __call__(self, number: int) -> bytes:
        if self._files is not None:
            return Path(self._files[number]).read_bytes()
        try:
            image = self._dataset[number][0]
            pixels = np.asarray(image if image.mode in ("L", "RGB", "I;16", "F") else image.convert("RGB"))
        except Exception as error:  # a data set may do anything
            raise OSError(" ".join(str(error).split())[:200]) from error
        file = io.BytesIO()
        np.lib.format.write_array(file, np.ascontiguousarray(pixels), allow_pickle=False)
        return file.getvalue()
