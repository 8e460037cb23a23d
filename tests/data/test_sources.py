import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from lomar.data.sources import ImageSource, labelled_split, open_source
from lomar.errors import UserError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def names_in(source):
    return [source.name(index) for index in range(len(source))]


def test_a_folder_is_searched_in_sorted_order_without_hidden_and_unknown_files(tmp_path):
    touch(tmp_path, "b/2.JPG", "b/c/1.png", "a.tiff", ".hidden/x.jpg", ".x.jpg", "notes.txt", "b/10.webp", "d.npy")
    source = open_source(str(tmp_path))
    expected = ["a.tiff", "b/10.webp", "b/2.JPG", "b/c/1.png", "d.npy"]
    assert names_in(source) == [str(tmp_path / name) for name in expected]
    assert source.read(2) == b"b/2.JPG"


def test_symbolic_links_to_folders_are_followed_and_loops_end(tmp_path):
    touch(tmp_path, "data/a/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    assert len(open_source(str(tmp_path / "data"))) == 2


def test_a_vanished_target_of_a_link_is_listed_so_that_it_can_be_reported(tmp_path):
    touch(tmp_path, "1.jpg")
    (tmp_path / "2.jpg").symlink_to(tmp_path / "gone")
    source = open_source(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        source.read(1)


def test_a_list_is_relative_to_its_own_folder(tmp_path):
    touch(tmp_path, "in/a b.jpg", "other/c.jpg")
    lines = ["\ufeff# photographs", "", "in/a b.jpg ", str(tmp_path / "other/c.jpg"), "in/ünï.jpg"]
    (tmp_path / "list.txt").write_text("\r\n".join(lines), encoding="utf-8")
    source = open_source(str(tmp_path / "list.txt"))
    assert len(source) == 3
    assert source.read(0) == b"in/a b.jpg"
    assert source.read(1) == b"other/c.jpg"
    assert source.name(2).endswith("in/ünï.jpg")


def test_names_that_are_not_text_can_be_read_and_printed(tmp_path):
    (tmp_path / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(b"content")
    source = open_source(str(tmp_path))
    assert source.read(0) == b"content"
    source.name(0).encode("utf-8")


def test_one_image_is_a_source(tmp_path):
    touch(tmp_path, "one.JPEG")
    assert names_in(open_source(str(tmp_path / "one.JPEG"))) == [str(tmp_path / "one.JPEG")]


def test_the_embedded_sample_needs_no_scikit_import():
    code = (
        "import sys; from lomar.data.sources import open_source; s = open_source('sample');"
        "assert len(s) >= 14, len(s);"
        "assert all(len(s.read(i)) > 10_000 for i in range(len(s)));"
        "assert not {'sklearn', 'skimage'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_a_folder_named_sample_is_reached_with_a_dot(tmp_path, monkeypatch):
    touch(tmp_path, "sample/mine.jpg")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("./sample")) == 1
    assert len(open_source("sample")) > 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, ["no such folder or file"]),
        (lambda root: (root / "x").mkdir(), ["no image", "looked for jpg", "npy"]),
        (lambda root: touch(root, "x"), ["neither a folder", "sample"]),
    ],
)
def test_what_cannot_be_a_source_is_one_line_naming_the_flag(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path / "x"), flag="--images")
    message = str(caught.value)
    assert message.startswith(f"--images {tmp_path / 'x'}: ")
    assert "\n" not in message
    assert all(word in message for word in words)


def test_a_list_that_names_nothing_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("# nothing\n\n")
    with pytest.raises(UserError, match=r"--data .*list\.txt: the list names no file"):
        open_source(str(tmp_path / "list.txt"))


def test_a_long_list_stays_under_200_bytes_a_file():
    count = 200_000
    source = ImageSource("/data", (f"n{i % 1000:08d}/n{i % 1000:08d}_{i:08d}.JPEG".encode() for i in range(count)))
    assert len(source) == count
    assert source.name(123_457) == "/data/n00000457/n00000457_00123457.JPEG"
    # A pickle holds everything that the object holds, so it bounds what a worker receives as well.
    assert len(pickle.dumps(source)) < 200 * count
    assert pickle.loads(pickle.dumps(source)).name(7) == source.name(7)


def test_a_subset_keeps_the_order_asked_for(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    subset = open_source(str(tmp_path)).subset([2, 0])
    assert names_in(subset) == [str(tmp_path / "c.jpg"), str(tmp_path / "a.jpg")]
    assert subset.read(0) == b"c.jpg"


def class_of(source, index):
    return source.name(index).split("/")[-2]


def test_train_and_val_become_bank_and_queries_with_labels_by_name(tmp_path):
    touch(tmp_path, *(f"train/{c}/{i}.jpg" for c in "zxy" for i in range(5)), "train/stray.jpg")
    touch(tmp_path, *(f"val/{c}/{i}.jpg" for c in "xz" for i in range(3)))
    split = labelled_split(str(tmp_path), seed=1)
    assert split.classes == ["x", "y", "z"]
    assert (len(split.bank), len(split.queries)) == (15, 6)
    assert [split.classes[label] for label in split.bank_labels] == [class_of(split.bank, i) for i in range(15)]
    assert [split.classes[label] for label in split.query_labels] == [class_of(split.queries, i) for i in range(6)]
    assert split.bank_labels.dtype == split.query_labels.dtype == np.int64


def test_one_folder_is_split_without_overlap_and_thinned_in_proportion(tmp_path):
    touch(tmp_path, *(f"a/{i}.jpg" for i in range(100)), *(f"b/{i}.jpg" for i in range(50)), "c/0.jpg")
    split = labelled_split(str(tmp_path), seed=1)
    assert np.bincount(split.query_labels, minlength=3).tolist() == [20, 10, 0]
    assert np.bincount(split.bank_labels, minlength=3).tolist() == [80, 40, 1]
    assert not set(names_in(split.bank)) & set(names_in(split.queries))

    thin = labelled_split(str(tmp_path), seed=1, bank_limit=30, query_limit=9)
    assert np.bincount(thin.bank_labels)[:2].tolist() == [20, 10]
    assert np.bincount(thin.query_labels).tolist() == [6, 3]
    assert set(names_in(thin.queries)) <= set(names_in(split.queries))


def test_a_split_is_fixed_by_its_seed(tmp_path):
    touch(tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(20)))
    first, again, other = (labelled_split(str(tmp_path), seed=seed) for seed in (3, 3, 4))
    assert names_in(first.queries) == names_in(again.queries)
    assert names_in(first.queries) != names_in(other.queries)


def test_without_two_classes_there_are_no_labels(tmp_path):
    touch(tmp_path, "only/1.jpg", "only/2.jpg", "3.jpg")
    assert labelled_split(str(tmp_path), seed=0) is None
    assert labelled_split("sample", seed=0) is None


def test_a_query_class_that_the_bank_lacks_is_refused(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/dog/1.jpg")
    with pytest.raises(UserError, match=r"--eval-data .*val: class 'dog' has no images in .*train"):
        labelled_split(str(tmp_path), seed=0)


def test_a_run_inside_the_data_is_left_out(tmp_path):
    """Its own pictures would be trained on, and would change the data when it is resumed."""
    touch(tmp_path, "a.png", "run/figures/curves.png", "run/config.yaml", "run/train.log", "other/b.png")
    source = open_source(str(tmp_path))
    assert [source.relative_path(index) for index in range(len(source))] == [b"a.png", b"other/b.png"]


def test_a_fingerprint_tells_the_files_and_not_where_they_lie():
    here, there = (ImageSource(root, [b"a", b"bc"]).fingerprint() for root in ("x", "y"))
    assert here == there != ImageSource("x", [b"ab", b"c"]).fingerprint()
