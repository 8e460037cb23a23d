import os
import pickle
import subprocess
import sys

import pytest

from lomar.data.opening import open_source
from lomar.data.sources import ImageSource
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
        "import sys; from lomar.data.opening import open_source; s = open_source('sample');"
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


def test_a_run_inside_the_data_is_left_out(tmp_path):
    """Its own pictures would be trained on, and would change the data when it is resumed."""
    touch(tmp_path, "a.png", "run/figures/curves.png", "run/config.yaml", "run/train.log", "other/b.png")
    source = open_source(str(tmp_path))
    assert [source.relative_path(index) for index in range(len(source))] == [b"a.png", b"other/b.png"]


def test_a_fingerprint_tells_the_files_and_not_where_they_lie():
    here, there = (ImageSource(root, [b"a", b"bc"]).fingerprint() for root in ("x", "y"))
    assert here == there != ImageSource("x", [b"ab", b"c"]).fingerprint()
