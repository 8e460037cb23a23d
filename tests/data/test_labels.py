"""Claims about labelled images: class folders, tables, and what trains and what judges."""

from pathlib import Path

import numpy as np
import pytest

from lomar.data.labels import Labelled, evaluation_split, held_out, judging_images, labelled_data
from lomar.data.sources import ImageSource
from lomar.errors import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def table(path: Path, *lines: str, encoding: str = "utf-8") -> str:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return str(path)


def names_in(labelled: Labelled) -> list[str]:
    return [labelled.source.name(index) for index in range(len(labelled))]


def class_of(name: str) -> str:
    return name.split("/")[-2]


# Folders


@pytest.mark.parametrize("judging", ["val", "valid", "validation", "test"])
def test_train_and_val_have_labels_by_name(tmp_path: Path, judging: str) -> None:
    touch(tmp_path, *(f"train/{c}/{i}.jpg" for c in "zxy" for i in range(5)), "train/stray.jpg")
    touch(tmp_path, *(f"{judging}/{c}/deep/{i}.jpg" for c in "xz" for i in range(3)))
    data = labelled_data(str(tmp_path), seed=1)
    assert data.classes == ["x", "y", "z"] and not data.drawn
    assert (len(data.train), len(data.val)) == (15, 6)
    assert [data.classes[label] for label in data.train.labels] == [class_of(name) for name in names_in(data.train)]
    assert [data.classes[label] for label in data.val.labels] == [name.split("/")[-3] for name in names_in(data.val)]
    assert data.train.labels.dtype == data.val.labels.dtype == np.int64


@pytest.mark.parametrize("names", [("Train", "Val"), ("training", "Validation"), ("TRAIN", "Testing")])
def test_the_parts_may_be_written_in_any_case(tmp_path: Path, names: tuple[str, str]) -> None:
    touch(tmp_path, *(f"{part}/{c}/1.jpg" for part in names for c in "ab"))
    data = labelled_data(str(tmp_path), seed=0)
    assert data.classes == ["a", "b"] and not data.drawn and len(data.train) == len(data.val) == 2


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    touch(tmp_path, "Val/a/1.jpg", "test/a/1.jpg")
    assert refused(str(tmp_path)) == f"--data {tmp_path}: Val and test are no classes; beside them there must be train/"


def test_val_is_preferred_to_test(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{part}/{c}/{part}.jpg" for part in ("train", "val", "test") for c in "ab"))
    assert all("/val/" in name for name in names_in(labelled_data(str(tmp_path), seed=0).val))


def test_one_folder_is_split_without_overlap_and_thinned_in_proportion(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a/{i}.jpg" for i in range(100)), *(f"b/{i}.jpg" for i in range(50)), "c/0.jpg")
    data = labelled_data(str(tmp_path), seed=1)
    assert data.drawn
    assert np.bincount(data.val.labels, minlength=3).tolist() == [20, 10, 0]
    assert np.bincount(data.train.labels, minlength=3).tolist() == [80, 40, 1]
    assert not set(names_in(data.train)) & set(names_in(data.val))

    thin = evaluation_split(str(tmp_path), 1, 30, 9)
    assert thin is not None
    assert np.bincount(thin.train.labels)[:2].tolist() == [20, 10]
    assert np.bincount(thin.val.labels).tolist() == [6, 3]
    assert set(names_in(thin.val)) <= set(names_in(data.val))


def test_train_alone_is_split_as_well(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{c}/{i}.jpg" for c in "ab" for i in range(10)), "notes/c/0.jpg")
    data = labelled_data(str(tmp_path), seed=0)
    assert data.drawn and data.classes == ["a", "b"] and (len(data.train), len(data.val)) == (16, 4)


def test_a_split_is_fixed_by_its_seed(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(20)))
    first, again, other = (names_in(labelled_data(str(tmp_path), seed).val) for seed in (3, 3, 4))
    assert first == again != other


def test_val_of_its_own_judges_and_all_else_trains(tmp_path: Path) -> None:
    touch(tmp_path, *(f"mine/{c}/{i}.jpg" for c in "ab" for i in range(5)), "theirs/b/1.jpg", "theirs/a/2.jpg")
    data = labelled_data(str(tmp_path / "mine"), 0, val=str(tmp_path / "theirs"))
    assert (len(data.train), data.val.labels.tolist(), data.drawn) == (10, [0, 1], False)


def test_without_two_classes_there_is_nothing_to_evaluate_on(tmp_path: Path) -> None:
    touch(tmp_path, "only/1.jpg", "only/2.jpg", "3.jpg")
    assert evaluation_split(str(tmp_path), 0, 10, 10) is None
    assert evaluation_split("sample", 0, 10, 10) is None


def test_the_images_that_judge_a_classifier_are_val_or_all(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/b/2.jpg")
    assert judging_images(str(tmp_path), ["a", "b", "c"])[0].labels.tolist() == [1]
    assert judging_images(str(tmp_path / "train"), ["b", "a"])[0].labels.tolist() == [1, 0]


# Tables


def test_a_table_labels_paths_relative_to_itself_or_absolute(tmp_path: Path) -> None:
    lines = ["photos/1.jpg,cat", f'"{tmp_path}/other, too/2.jpg",dog', "", " photos/3.jpg , cat ", "photos/ü.jpg,dog"]
    path = table(tmp_path / "labels.CSV", *lines, "photos/5.jpg,cat", "6.jpg,dog", encoding="utf-8-sig")
    data = labelled_data(path, seed=0)
    assert data.classes == ["cat", "dog"] and data.drawn
    named = dict(zip([*names_in(data.train), *names_in(data.val)], [*data.train.labels, *data.val.labels], strict=True))
    expected = {"photos/1.jpg": 0, "other, too/2.jpg": 1, "photos/3.jpg": 0, "photos/ü.jpg": 1, "photos/5.jpg": 0}
    assert named == {str(tmp_path / name): label for name, label in (expected | {"6.jpg": 1}).items()}


def test_a_header_names_and_orders_the_columns(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "Split,note,Label,Path", "train,,b,1.jpg", "VAL,x,a,2.jpg", ",,a,3.jpg")
    data = labelled_data(path, seed=0)
    assert names_in(data.train) == [str(tmp_path / "1.jpg"), str(tmp_path / "3.jpg")]
    assert (data.train.labels.tolist(), data.val.labels.tolist(), data.drawn) == ([1, 0], [0], False)


@pytest.mark.parametrize("header", ["image,class", "Filename,Target", "label_name,file_name"])
def test_a_header_may_have_the_usual_names(tmp_path: Path, header: str) -> None:
    rows = [("1.jpg", "a"), ("2.jpg", "a"), ("3.jpg", "b"), ("4.jpg", "b")]
    turned = -1 if header.startswith("label") else 1
    data = labelled_data(table(tmp_path / "t.csv", header, *(",".join(row[::turned]) for row in rows)), seed=0)
    assert data.classes == ["a", "b"] and all(name.endswith(".jpg") for name in names_in(data.train))


def test_a_third_column_says_what_judges(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "1.jpg,a,train", "2.jpg,b", "3.jpg,b,test", "4.jpg,a,validation")
    data = labelled_data(path, seed=0)
    assert (data.train.labels.tolist(), data.val.labels.tolist()) == ([0, 1], [1, 0])
    assert judging_images(path, ["a", "b"])[0].labels.tolist() == [1, 0]


def test_a_folder_can_be_judged_by_a_table(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    path = table(tmp_path / "judge.csv", "x.jpg,b,train", "y.jpg,a,val")  # all of it judges
    assert labelled_data(str(tmp_path), 0, val=path).val.labels.tolist() == [1, 0]


def test_names_that_are_not_text_are_found(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"caf\xe9.jpg,a\nx.jpg,b\ny.jpg,a\n")
    data = labelled_data(str(tmp_path / "t.csv"), seed=0)
    parts = [part.source.relative_path(i) for part in (data.train, data.val) for i in range(len(part))]
    assert b"caf\xe9.jpg" in parts


# What is held out


def test_a_share_of_each_class_is_held_out_and_lone_images_are_not() -> None:
    labels = np.array([0] * 30 + [1] * 4 + [2] + [3] * 15)
    labelled = Labelled(ImageSource("", (f"{i}".encode() for i in range(len(labels)))), labels)
    rest, out = held_out(labelled, 0.1, 5, "probe")
    assert np.bincount(out.labels, minlength=4).tolist() == [3, 1, 0, 2]
    assert sorted([*names_in(rest), *names_in(out)]) == sorted(names_in(labelled))
    assert names_in(held_out(labelled, 0.1, 5, "probe")[1]) == names_in(out)
    assert names_in(held_out(labelled, 0.1, 5, "other")[1]) != names_in(out)


# What is refused


def refused(path: str, val: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        labelled_data(path, 0, val, flag="--data")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg")
    assert refused(str(tmp_path)) == (
        f"--data {tmp_path}: the images have no labels; put those of each class in a folder of its own, "
        "or give a .csv of path,label"
    )


def test_one_class_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "only/1.jpg", "only/2.jpg", "3.jpg")
    assert refused(str(tmp_path)) == f"--data {tmp_path}: there is one class alone, 'only'; at least two are needed"


def test_classes_of_one_image_each_cannot_be_split(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    assert refused(str(tmp_path)) == (
        f"--data {tmp_path}: no class has two images, so that none can be held out to judge by"
    )


def test_a_class_that_judges_and_does_not_train_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/dog/1.jpg")
    expected = f"--data {tmp_path}: class 'dog' is to be judged, but no image of it is there to train on"
    assert refused(str(tmp_path)) == expected
    val = str(tmp_path / "val")
    assert refused(str(tmp_path / "train"), val=val) == expected.replace(f"--data {tmp_path}", f"--val {val}")


def test_judges_without_labels_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/1.jpg")
    assert refused(str(tmp_path)) == (
        f"--data {tmp_path}: the images to judge by have no labels, but those to train on have them"
    )


def test_a_classifier_is_not_asked_about_classes_it_does_not_know(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "dog/1.jpg", "2.jpg")
    known = [f"c{i}" for i in range(10)]
    with pytest.raises(UserError) as caught:
        judging_images(str(tmp_path), ["a", *known])
    assert str(caught.value) == (
        f"--data {tmp_path}: the model does not know the class 'dog'; it knows a, c0, c1, c2, c3, c4, c5, c6 and 3 more"
    )
    with pytest.raises(UserError, match="the images have no labels; a folder for each class, or"):
        judging_images(str(tmp_path / "a"), ["a"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1.jpg,a", "2.jpg"], " line 2: it must hold a path and a label, not '2.jpg'"),
        (["1.jpg,"], " line 1: it must hold a path and a label, not '1.jpg,'"),
        (["path,label", ",a"], " line 2: it must hold a path and a label, not ',a'"),
        (["path,label", "", "1.jpg,a", "1.jpg,a"], " line 4: 1.jpg stands on line 3 already"),
        (["1.jpg,a", "1.jpg,b"], " line 2: 1.jpg stands on line 1 already, as 'a' and not 'b'"),
        (
            ["1.jpg,a,dev"],
            " line 1: split is 'dev'; it can be train, training, val, valid, validation, test, testing",
        ),
        (["image_no,kind", "1.jpg,a"], " line 1: 'image_no' is no image; a header names path and label"),
        (["file,clas,fold"], " line 1: a header must name path and label; of what it names, path, split is known"),
        (["./1.jpg,a", "x/../1.jpg,b"], " line 2: 1.jpg stands on line 1 already, as 'a' and not 'b'"),
        (["1.jpg,a", "2\0.jpg,b"], " line 2: a zero byte; a table must be UTF-8 text"),
        (["path,label"], ": the table names no image; it has a line path,label for each"),
        (["", "  "], ": the table names no image; it has a line path,label for each"),
        (["1.jpg,a,val", "2.jpg,b,val"], ": split leaves no image to train on"),
    ],
)
def test_a_wrong_table_is_one_line_that_names_the_place(tmp_path: Path, lines: list[str], message: str) -> None:
    path = table(tmp_path / "t.csv", *lines)
    assert refused(path) == f"--data {path}{message}"


def test_what_is_no_table_and_no_folder_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert refused(f"{missing}.csv") == f"--data {missing}.csv: No such file or directory"
    assert refused(str(missing)) == f"--data {missing}: no such folder or file"
    (tmp_path / "folder.csv").mkdir()
    assert "Is a directory" in refused(str(tmp_path / "folder.csv"))
    big = table(tmp_path / "big.csv", "x" * 200_000 + ",a")
    assert refused(big) == f"--data {big} is not a table: field larger than field limit (131072)"
    (tmp_path / "empty").mkdir()
    assert "no image in this folder" in refused(str(tmp_path / "empty"))
