"""Which labelled images pretrain, choose and judge: lists that are drawn once and lie beside a study."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lomar.data.labels import SPLIT_SEED, Labelled, LabelledData, held_out, labelled_data, of_each_class
from lomar.errors import UserError
from lomar.files import write_atomically

HELD_SHARE = 0.1  # of the images of each class that train
FOLDER = "images"
PRETRAIN, CHOOSE, JUDGE, TUNE = "pretrain.txt", "choose.csv", "judge.csv", "finetune.csv"


def draw_lists(data: str, bank: int | None, labels: int | None) -> tuple[LabelledData, dict[str, bytes]]:
    """The lists that the cells of a study read, by name; nothing is written.

    `pretrain.txt` names all images that train; `choose.csv` has nine tenths of them as train and the held-out tenth as
    val; `judge.csv` has `bank` of each class as train and val/ as val, `finetune.csv` the same with `labels` of each
    class.

    Args:
        data: labelled images, see `labelled_data`.
        bank, labels: images of each class that k-NN and probe, and that fine-tuning, learn from; None for all.

    Raises:
        UserError: there are no labels, the images are no files of this machine, or a class is too small.
    """
    found = labelled_data(data, SPLIT_SEED)
    known, held = held_out(found.train, HELD_SHARE, SPLIT_SEED, "study")
    lists = {
        PRETRAIN: "".join(f"{path}\n" for path in _paths(found.train, data)),
        CHOOSE: _table(data, found.classes, {"train": known, "val": held}),
        JUDGE: _table(data, found.classes, {"train": _few(found, bank, "--bank"), "val": found.val}),
        TUNE: _table(data, found.classes, {"train": _few(found, labels, "--labels"), "val": found.val}),
    }
    return found, {name: text.encode("utf-8", errors="surrogateescape") for name, text in lists.items()}


def keep_lists(lists: Mapping[str, bytes], out: Path) -> None:
    """Write them into a study's folder, where they are not there.

    Raises:
        UserError: those that are there are others.
        OSError: they cannot be written.
    """
    paths = {out / FOLDER / name: content for name, content in lists.items()}
    for path, content in paths.items():
        if path.exists() and path.read_bytes() != content:
            raise UserError(f"--data: {path} names other images; bring them back, or give another --out")
    for path, content in paths.items():
        if not path.exists():
            _write(path, content)


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _few(found: LabelledData, count: int | None, flag: str) -> Labelled:
    """So many images of each class.

    Raises:
        UserError: a class has fewer.
    """
    if count is None:
        return found.train
    for number, name in enumerate(found.classes):
        there = int((found.train.labels == number).sum())
        if there < count:
            raise UserError(f"{flag} is {count}, but class {name!r} has {there} images that train")
    return of_each_class(found.train, count, SPLIT_SEED, "study")


def _paths(part: Labelled, data: str) -> Iterable[str]:
    for index in range(len(part)):
        path = Path(os.fsdecode(part.source.path(index)))
        if not path.is_file():
            raise UserError(f"--data {data}: a study needs images in files of this machine, and {path} is none")
        if "\n" in str(path):
            raise UserError(f"--data {data}: {str(path)!r} has a line break in its name")
        yield str(path.resolve())


def _table(data: str, classes: Sequence[str], parts: dict[str, Labelled]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("path", "label", "split"))
    for split, part in parts.items():
        names = (classes[label] for label in part.labels.tolist())
        writer.writerows((path, name, split) for path, name in zip(_paths(part, data), names, strict=True))
    return text.getvalue()
