"""Claims about the lists of images that a study is run on."""

import csv
from pathlib import Path

import pytest

from lomar.data.labels import Labelled, of_each_class
from lomar.errors import UserError
from lomar.study.splits import CHOOSE, FOLDER, JUDGE, PRETRAIN, TUNE, draw_lists, keep_lists


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """20 images of each of two classes that train, 3 that judge; the files are empty, for nothing reads them here."""
    for split, count in (("train", 20), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number:02}.png").touch()
    return tmp_path / "data"


def write_splits(data: str, out: Path, bank: int | None, labels: int | None) -> None:
    """Draw the lists and keep them."""
    _, lists = draw_lists(data, bank, labels)
    keep_lists(lists, out)


def table(path: Path) -> dict[str, set[str]]:
    """Split -> paths."""
    found: dict[str, set[str]] = {"train": set(), "val": set()}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            assert Path(row["path"]).is_absolute() and Path(row["path"]).parent.name == row["label"]
            found[row["split"]].add(row["path"])
    return found


def test_a_tenth_of_train_chooses_and_val_judges_and_nothing_of_val_is_elsewhere(
    labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_splits(str(labelled), out, 10, 5)
    folder = out / FOLDER
    train = {str(path) for path in (labelled / "train").glob("*/*")}
    val = {str(path) for path in (labelled / "val").glob("*/*")}
    assert set((folder / PRETRAIN).read_text().split()) == train
    choose, judge, tune = (table(folder / name) for name in (CHOOSE, JUDGE, TUNE))
    assert choose["train"] | choose["val"] == train and not choose["train"] & choose["val"]
    assert [sum(f"/{name}/" in path for path in choose["val"]) for name in ("cat", "dog")] == [2, 2]
    assert judge["val"] == tune["val"] == val
    assert [sum(f"/{name}/" in path for path in judge["train"]) for name in ("cat", "dog")] == [10, 10]
    assert len(tune["train"]) == 10 and tune["train"] <= judge["train"] <= train


def test_without_numbers_all_of_train_is_learnt_from(labelled: Path, tmp_path: Path) -> None:
    write_splits(str(labelled), tmp_path / "out", None, None)
    for name in (JUDGE, TUNE):
        assert len(table(tmp_path / "out" / FOLDER / name)["train"]) == 40


def test_the_same_lists_are_drawn_again_and_others_refused(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_splits(str(labelled), out, None, 5)
    before = {path: path.read_bytes() for path in (out / FOLDER).iterdir()}
    write_splits(str(labelled), out, None, 5)
    (labelled / "train" / "cat" / "new.png").touch()
    with pytest.raises(UserError, match=r"names other images; bring them back, or give another --out"):
        write_splits(str(labelled), out, None, 5)
    assert {path: path.read_bytes() for path in (out / FOLDER).iterdir()} == before


@pytest.mark.parametrize(("bank", "labels", "flag"), [(21, 5, "--bank"), (None, 30, "--labels")])
def test_a_class_that_is_too_small_is_named(
    labelled: Path, tmp_path: Path, bank: int | None, labels: int, flag: str
) -> None:
    with pytest.raises(UserError, match=rf"{flag} is \d+, but class 'cat' has 20 images that train"):
        write_splits(str(labelled), tmp_path / "out", bank, labels)
    assert not (tmp_path / "out").exists()


def test_images_that_are_no_files_are_refused(tmp_path: Path, photos: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, ".")
    with pytest.raises(UserError, match="a study needs images in files of this machine"):
        write_splits(str(tmp_path / "photos.tar"), tmp_path / "out", None, None)


def test_fewer_images_of_each_class_are_some_of_more(photos: Path) -> None:
    import numpy as np

    from lomar.data.opening import open_source

    labelled = Labelled(open_source(str(photos)), np.array([0] * 4 + [1] * 4))
    few, more = (of_each_class(labelled, count, 0, "test") for count in (1, 3))
    assert few.labels.tolist() == [0, 1] and more.labels.tolist() == [0] * 3 + [1] * 3
    assert {few.source.name(i) for i in range(2)} <= {more.source.name(i) for i in range(6)}
    assert of_each_class(labelled, 9, 0, "test").labels.tolist() == labelled.labels.tolist()
