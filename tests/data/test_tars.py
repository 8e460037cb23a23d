"""Claims about tar files of anyone's on this machine: what of them is an image, what is refused, how they are named.

Python's tarfile writes and judges; what it would not write is put together from its headers.
"""

import io
import os
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.mutation import examples, mutated
from hypothesis import given
from hypothesis import strategies as st

from lomar.data import archives, tars
from lomar.data.addresses import MOST_NAMES, is_address, shown, tars_and_inside, without_braces
from lomar.data.labels import labelled_data
from lomar.data.opening import folders_in, images_at, is_there, open_source
from lomar.data.sources import ENDINGS, ImageSource, joined
from lomar.data.tars import TarIndex, read_tar_index, scan, write_tar_index
from lomar.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LOMAR_CACHE", str(folder))
    return folder


def member(name: str, content: bytes = b"content", **values: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in values.items():
        setattr(info, key, value)
    return info, content


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


def plain(path: Path, *names: str) -> Path:
    return tar(path, *(member(name, f"content of {path.name} {name}".encode()) for name in names))


def block(name: bytes, size: bytes, kind: bytes = b"0", content: bytes = b"", prefix: bytes = b"") -> bytes:
    """A header whose fields say anything, with a right check sum, and its content."""
    header = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0")[:12])
    header += b"0".rjust(11, b"0") + b"\0" + b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(80)
    header += prefix.ljust(155, b"\0") + bytes(12)
    assert len(header) == 512
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


def octal(number: int) -> bytes:
    return b"%011o\0" % number


def pax(*records: tuple[bytes, bytes]) -> bytes:
    text = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        while len(str(length)) + len(key) + len(value) + 3 != length:
            length = len(str(length)) + len(key) + len(value) + 3
        text += b"%d %s=%s\n" % (length, key, value)
    return block(b"pax", octal(len(text)), b"x", text)


GOOD = block(b"good.jpg", octal(7), content=b"content")
END = bytes(1024)


def scanned(content: bytes, tmp_path: Path) -> TarIndex:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    file = os.open(path, os.O_RDONLY)
    try:
        index = scan(file, "x.tar", ENDINGS)
        for number in range(len(index)):
            assert 0 <= index.offset[number] <= len(content) - index.size[number]
        return index
    finally:
        os.close(file)


def paths(source: ImageSource | TarIndex) -> list[bytes]:
    one = source.path if isinstance(source, TarIndex) else source.relative_path
    return [one(number) for number in range(len(source))]


def read(source: ImageSource) -> list[bytes]:
    return [bytes(source.read(number)) for number in range(len(source))]


# What is an image


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_are_found_where_tarfile_finds_them_in_every_format(tmp_path: Path, form: int) -> None:
    long = "folder/" * 12 + "n" * 90 + ".png"
    names = ["a/1.jpg", long, "b/ü.JPEG", "c.npy"] + ["x" * 200 + ".jpg"] * (form != tarfile.USTAR_FORMAT)
    written = tar(tmp_path / "x.tar", *(member(n, os.urandom(len(n) * 9)) for n in names), form=form)
    source = open_source(str(written))
    with tarfile.open(written) as archive:
        expected = [archive.extractfile(each).read() for each in archive.getmembers()]  # type: ignore[union-attr]
    assert paths(source) == [name.encode() for name in names] and read(source) == expected


def test_of_a_webdataset_sample_the_images_are_taken_and_nothing_else(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a/1.json", "a/1.cls", "a/2.depth.png", "a/2.jpg", "a/2.mask.png", "2024.07.01.jpg", "README"]
    assert paths(open_source(str(plain(tmp_path / "x.tar", *names)))) == [b"a/1.jpg", b"a/2.jpg", b"2024.07.01.jpg"]


def test_two_plain_images_of_a_sample_are_two_images(tmp_path: Path) -> None:
    assert paths(open_source(str(plain(tmp_path / "x.tar", "1.jpg", "1.png")))) == [b"1.jpg", b"1.png"]


def test_hidden_files_are_passed_over_and_dots_in_paths_too(tmp_path: Path) -> None:
    written = plain(tmp_path / "x.tar", "./a/1.jpg", "a/._1.jpg", ".git/2.jpg", "a//3.jpg", "./a/./4.jpg")
    assert paths(open_source(str(written))) == [b"a/1.jpg", b"a/3.jpg", b"a/4.jpg"]


def test_names_that_are_not_text_are_read_and_printed(tmp_path: Path) -> None:
    source = (
        open_source(str(tmp_path / "x.tar"))
        if (tmp_path / "x.tar").write_bytes(block(b"\xff\xfe.jpg", octal(7), content=b"content") + END)
        else None
    )
    assert source is not None and read(source) == [b"content"]
    source.name(0).encode()


# How they are named


def test_one_tar_braces_wildcards_and_a_folder_are_the_same_images_in_order(tmp_path: Path) -> None:
    for number in range(9, 12):
        plain(tmp_path / "in" / f"x-{number:03}.tar", "a.jpg", "b/c.jpg")
    (tmp_path / "in" / "notes.json").write_text("{}")
    named = [
        open_source(f"{tmp_path}/in{rest}") for rest in ("/x-{009..011}.tar", "/x-*.tar", "", "/x-0{09,10,11}.tar")
    ]
    for source in named:
        assert read(source) == [
            f"content of x-{n:03}.tar {m}".encode() for n in range(9, 12) for m in ("a.jpg", "b/c.jpg")
        ]
        assert source.fingerprint() == named[0].fingerprint()
    assert named[0].name(3) == f"{tmp_path}/in/x-010.tar/b/c.jpg"
    assert read(open_source(named[0].name(3))) == [b"content of x-010.tar b/c.jpg"]


def test_a_folder_of_images_and_tars_is_one_of_images(tmp_path: Path) -> None:
    plain(tmp_path / "x.tar", "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"content")
    assert paths(open_source(str(tmp_path))) == [b"b.jpg"]


def test_a_file_whose_name_has_wildcards_is_itself(tmp_path: Path) -> None:
    plain(tmp_path / "x[1].tar", "a.jpg")
    plain(tmp_path / "x1.tar", "b.jpg")
    assert paths(open_source(str(tmp_path / "x[1].tar"))) == [b"a.jpg"]


def test_a_folder_that_is_called_tar_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "a.jpg").write_bytes(b"content")
    assert read(open_source(str(tmp_path / "x.tar"))) == [b"content"]
    assert read(open_source(str(tmp_path / "x.tar" / "a.jpg"))) == [b"content"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x-{8..11}.tar", ["x-8.tar", "x-9.tar", "x-10.tar", "x-11.tar"]),
        ("x-{08..11}.tar", ["x-08.tar", "x-09.tar", "x-10.tar", "x-11.tar"]),
        ("x-{2..0}.tar", ["x-2.tar", "x-1.tar", "x-0.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("x{,y}.tar", ["x.tar", "xy.tar"]),
        ("{not a range}.tar", ["{not a range}.tar"]),
        ("{0..1}{x}.tar", ["0{x}.tar", "1{x}.tar"]),
        ("{a,{1..2}}", ["a", "1", "2"]),
        ("{a{1,2},b}", ["a1", "b", "a2"]),
        ("{,a}" * 40, ["a" * count for count in range(41)]),  # 2^40 ways to 41 names
        ("{0..0}" * 1200, ["0" * 1200]),
    ],
)
def test_braces_stand_for_what_a_shell_makes_of_them(name: str, expected: list[str]) -> None:
    assert without_braces(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://user:word@host/x-{0..9}.tar?key=1&b=%2F2", "https://***@host/x-{0..9}.tar?***"),
        ("https://host/x.tar?key=1/a/b.png", "https://host/x.tar?***/a/b.png"),
        ("HTTP://host/folder?key=1", "HTTP://host/folder?***"),
        ("s3://bucket/x-?.tar/a@b.png", "s3://bucket/x-?.tar/a@b.png"),
        ("ftp://me:word@host/x.tar", "ftp://***@host/x.tar"),
        ("a/b?c@d.png", "a/b?c@d.png"),
    ],
)
def test_of_an_address_all_is_shown_but_what_may_be_a_key(name: str, expected: str) -> None:
    assert shown(name) == expected


@pytest.mark.parametrize("name", ["{0..999999999}", "{0..999}{0..999}", "{0..999999999999}{0..9}"])
def test_braces_without_measure_are_refused_at_once(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"more than {MOST_NAMES:,} names"):
        without_braces(name)
    with pytest.raises(UserError, match="the braces stand for more than 100,000 names"):
        open_source(f"{tmp_path}/{name}.tar")


def test_addresses_are_told_from_paths() -> None:
    assert all(map(is_address, ["https://h/x.tar", "s3://b/x", "memory://x", "GS://b"]))
    assert not any(map(is_address, ["/a/b", "a:b", "C:/x", "hf:name", "./https://"]))
    assert tars_and_inside("https://h/x.tar?key=a.b/train/cat") == ("https://h/x.tar?key=a.b", "train/cat")
    assert tars_and_inside("a.tarot/b") is None


def test_labels_come_from_the_folders_in_the_tars(tmp_path: Path) -> None:
    plain(tmp_path / "0.tar", "train/cat/1.jpg", "train/dog/2.jpg", "val/dog/3.jpg")
    plain(tmp_path / "1.tar", "train/cat/4.jpg", "val/cat/5.jpg", "stray.jpg")
    for name in (f"{tmp_path}/{{0..1}}.tar", f"{tmp_path}/*.tar", str(tmp_path)):
        assert folders_in(name, "--data") == ["train", "val"]
        data = labelled_data(name, seed=0)
        assert data.classes == ["cat", "dog"] and not data.drawn
        assert paths(data.train.source) == [b"cat/1.jpg", b"dog/2.jpg", b"cat/4.jpg"]
        assert data.val.labels.tolist() == [1, 0]
        assert data.val.source.name(1) == f"{tmp_path}/1.tar/val/cat/5.jpg"
        assert read(data.val.source)[1] == b"content of 1.tar val/cat/5.jpg"
    assert labelled_data(f"{tmp_path}/0.tar/train", 0, val=f"{tmp_path}/1.tar/val").val.labels.tolist() == [0]


def test_what_is_there_can_be_asked_and_images_be_named_by_their_paths(tmp_path: Path) -> None:
    plain(tmp_path / "x.tar", "a/1.jpg", "a/2.jpg")
    for name in ("x.tar", "*.tar", "x.tar/a", "x.tar/a/2.jpg"):
        assert is_there(f"{tmp_path}/{name}"), name
    for name in ("y.tar", "y*.tar", "x.tar/b", "x.tar/a/3.jpg", "y-{0..3}.tar"):
        assert not is_there(f"{tmp_path}/{name}"), name
    held = images_at(f"{tmp_path}/*.tar", [b"a/2.jpg", b"gone.jpg"], "--data")
    assert held.read(0) == b"content of x.tar a/2.jpg"
    with pytest.raises(FileNotFoundError):
        held.read(1)


def test_a_subset_and_a_join_read_what_their_parts_read(tmp_path: Path) -> None:
    one = open_source(str(plain(tmp_path / "x.tar", "a/1.jpg", "a/2.jpg", "a/3.jpg")))
    part = one.subset([2, 0])
    assert part.name(0) == f"{tmp_path}/x.tar/a/3.jpg" and read(part) == [one.read(2), one.read(0)]
    (tmp_path / "b.png").write_bytes(b"a file")
    both = joined([open_source(str(tmp_path / "x.tar/a")), open_source(str(tmp_path / "b.png"))])
    assert [both.name(n) for n in (1, 3)] == [f"{tmp_path}/x.tar/a/2.jpg", str(tmp_path / "b.png")]
    assert read(both) == [*read(one), b"a file"]


# What is refused


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
MALICIOUS = {
    "absolute": (member("/etc/a.jpg"), "1 paths that lead out of the archive"),
    "upwards": (member("a/../../b.jpg"), "1 paths that lead out of the archive"),
    "symbolic link": (member("a.jpg", b"", **LINK), "1 links"),
    "hard link": (member("a.jpg", b"", **{**LINK, "type": tarfile.LNKTYPE}), "1 links"),
    "device": (member("a.jpg", b"", type=tarfile.CHRTYPE), "1 devices"),
    "block device": (member("a.jpg", b"", type=tarfile.BLKTYPE), "1 devices"),
    "pipe": (member("a.jpg", b"", type=tarfile.FIFOTYPE), "1 devices"),
    "two lines": (member("a\nb.jpg"), "1 names that are not one line"),
    "unknown kind": (member("a.jpg", type=b"Z"), "1 other kinds of files"),
}


@pytest.mark.parametrize("what", MALICIOUS)
def test_a_malicious_member_is_left_out_and_told(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, told = MALICIOUS[what]
    written = tar(tmp_path / "in" / "x.tar", member("1.jpg"), bad, member("2.jpg"))
    assert paths(open_source(str(written))) == [b"1.jpg", b"2.jpg"]
    assert capsys.readouterr().err == f"lomar: {written}: left out: {told}\n"
    open_source(str(written))  # from the cache
    assert told in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


RAW = {
    "zero byte in a name": (pax((b"path", b"a\0b.jpg")) + GOOD, [], "1 names that are not one line"),
    "an endless name": (pax((b"path", b"a/" * 5000 + b"b.jpg")) + GOOD, [], "1 names that are not one line"),
    "sparse of GNU": (block(b"a.jpg", octal(7), b"S", b"content"), [], "1 sparse files"),
    "sparse of pax": (pax((b"GNU.sparse.major", b"1")) + GOOD, [], "1 sparse files"),
    "upwards in pax": (pax((b"path", b"../a.jpg")) + GOOD, [], "1 paths that lead out of the archive"),
    "upwards by the front part": (
        block(b"a.jpg", octal(7), content=b"content", prefix=b"b/../.."),
        [],
        "1 paths that lead out of the archive",
    ),
    "a negative size": (block(b"a.jpg", b"\xff" * 12), [], "a number is negative or too large"),
    "a size beyond all": (block(b"a.jpg", b"\x80" + b"\xff" * 11), [], "it is cut short"),
    "minus in octal": (block(b"a.jpg", b"-0000000007\0"), [], "a number is none"),
    "underscores in octal": (block(b"a.jpg", b"0000_000_07\0"), [], "a number is none"),
    "a pax size beyond the end": (pax((b"size", b"999999")) + GOOD, [], "it is cut short"),
    "a pax size of 30 digits": (pax((b"size", b"9" * 30)) + GOOD, [], "a size is no number"),
    "a negative pax size": (pax((b"size", b"-1")) + GOOD, [], "a size is no number"),
    "a pax header that is cut": (block(b"pax", octal(20), b"x", b"20 path=a"), [], "a pax header is damaged"),
    "a pax record beyond its header": (block(b"pax", octal(9), b"x", b"99 path=a"), [], "a pax header is damaged"),
    "a pax record of no length": (block(b"pax", octal(9), b"x", b"0 path=a\n"), [], "a pax header is damaged"),
    "an overlong pax header": (block(b"pax", octal(2**20 + 1), b"x", bytes(2**20 + 1)) + GOOD, [], "is too long"),
    "an overlong name of GNU": (block(b"n", octal(2**20 + 1), b"L", bytes(2**20 + 1)) + GOOD, [], "is too long"),
    "headers without end": (block(b"pax", octal(0), b"x") * 40 + GOOD, [], "a member has too many headers"),
    "a wrong check sum": (b"x" + GOOD[1:], [], "a header is damaged"),
    "a long name of GNU": (block(b"n", octal(7), b"L", b"b/a.jpg") + GOOD, [b"b/a.jpg"], ""),
}


@pytest.mark.parametrize("what", RAW)
def test_a_broken_header_ends_the_archive_and_what_was_before_is_used(what: str, tmp_path: Path) -> None:
    content, found, told = RAW[what]
    index = scanned(GOOD + content + GOOD + END, tmp_path)
    after = [] if index.damage else [b"good.jpg"]
    assert paths(index) == [b"good.jpg", *found, *after]
    assert told in index.remark and "\n" not in index.remark
    assert not index.damage or f"at byte 1,024; the {1 + len(found)} images before are used" in index.remark


def test_a_pax_size_that_is_too_small_does_not_make_headers_of_content(tmp_path: Path) -> None:
    inner = pax((b"size", b"512")) + block(b"a.jpg", octal(1024), content=b"x" * 1024)
    index = scanned(GOOD + inner + GOOD + END, tmp_path)
    assert paths(index) == [b"good.jpg", b"a.jpg"] and "a header is damaged" in index.remark


def test_too_large_an_image_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_MEMBER_BYTES", 2**10)
    index = scanned(block(b"a.jpg", octal(1025), content=bytes(1025)) + GOOD + END, tmp_path)
    assert paths(index) == [b"good.jpg"] and "1 files of more than" in index.remark


def test_of_a_tar_that_is_cut_short_the_whole_images_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tar(tmp_path / "x.tar", *(member(f"{n}.jpg", bytes([n]) * 3000) for n in range(5)))
    os.truncate(written, 3 * 3584 + 700)
    assert read(open_source(str(written))) == [bytes([n]) * 3000 for n in range(3)]
    assert capsys.readouterr().err == (
        f"lomar: {written}: it is cut short at byte 10,752; the 3 images before are used\n"
    )
    os.truncate(written, 3 * 3584)  # between two members, as where tars are appended to each other
    assert len(open_source(str(written))) == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x1f\x8b\x08" + bytes(999), "is compressed by gzip; lomar reads plain tar files"),
        (b"\xfd7zXZ\0" + bytes(999), "is compressed by xz"),
        (b"(\xb5/\xfd" + bytes(999), "is compressed by zstandard"),
        (b"no tar at all" * 99, "is no tar file"),
        (b"short", "is no tar file"),
        (END, "no image in these tar files"),
        (block(b"a.txt", octal(7), content=b"content") + END, "no image in these tar files"),
        (block(b"/a.jpg", octal(7), content=b"content") + END, "left out: 1 paths that lead out of the archive"),
    ],
)
def test_what_is_no_tar_of_images_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path / "x.tar"))
    assert str(caught.value).startswith(f"--data {tmp_path}/x.tar: ") and "\n" not in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.tar.gz", r"lomar reads plain \.tar files, not \.tar\.gz"),
        ("y-{0..3}.tgz", r"not \.tgz"),
        ("x.tar/nothing", "no such folder or file in the tar files"),
        ("gone.tar", "no such folder or file"),
        ("gone-*.tar", "no such folder or file"),
        ("{x,gone}.tar", "there is no file .*gone.tar"),
    ],
)
def test_what_is_not_there_or_compressed_is_refused_in_one_line(tmp_path: Path, name: str, message: str) -> None:
    plain(tmp_path / "x.tar", "a.jpg")
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)


def test_of_many_tars_with_remarks_a_few_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(7):
        tar(tmp_path / f"{number}.tar", member("a.jpg"), member("/b.jpg"))
    assert len(open_source(str(tmp_path))) == 7
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[-1] == "lomar: and 4 more such files"


@examples(300)
@given(content=mutated([GOOD + pax((b"path", b"a.jpg")) + GOOD + END, block(b"n", octal(7), b"L", b"b/a.jpg") + GOOD]))
def test_a_mutated_tar_is_read_within_its_bounds_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    try:
        index = scanned(content, tmp_path_factory.getbasetemp())
    except UserError as error:
        assert "\n" not in str(error)
        return
    for path in paths(index):
        assert not path.startswith(b"/") and b".." not in path.split(b"/") and b"\0" not in path


def test_memory_is_that_of_the_images_found_whatever_else_is_in_the_tar(tmp_path: Path) -> None:
    small = block(b"a.txt", octal(1), content=b"x")
    (tmp_path / "x.tar").write_bytes(small * 10_000 + GOOD)
    file = os.open(tmp_path / "x.tar", os.O_RDONLY)
    tracemalloc.start()
    index = scan(file, "x.tar", ENDINGS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    os.close(file)
    assert len(index) == 1 and peak < 50_000


# What is kept


def test_a_tar_is_looked_through_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def counted(file: int, name: str, endings: tuple[bytes, ...]) -> TarIndex:
        looked.append(name)
        return scan(file, name, endings)

    monkeypatch.setattr(archives, "scan", counted)
    written = plain(tmp_path / "x.tar", "a.jpg")
    assert paths(open_source(str(written))) == paths(open_source(str(written))) == [b"a.jpg"]
    assert len(looked) == 1
    plain(tmp_path / "x.tar", "b.jpg")
    os.utime(written, ns=(1, 1))
    assert paths(open_source(str(written))) == [b"b.jpg"] and len(looked) == 2


def cut(path: Path) -> None:
    os.truncate(path, 100)


@pytest.mark.parametrize(
    "damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(os.urandom(999))]
)
def test_a_damaged_index_in_the_cache_is_made_anew(
    tmp_path: Path, cache: Path, damage: Callable[[Path], object]
) -> None:
    written = plain(tmp_path / "x.tar", "a.jpg")
    open_source(str(written))
    (kept,) = (cache / "indexes").iterdir()
    damage(kept)
    assert paths(open_source(str(written))) == [b"a.jpg"]
    assert read_tar_index(kept, written.stat().st_size) is not None


def test_an_index_that_leads_out_of_its_tar_is_none(tmp_path: Path) -> None:
    written = plain(tmp_path / "x.tar", "a.jpg")
    file = os.open(written, os.O_RDONLY)
    index = scan(file, "x.tar", ENDINGS)
    os.close(file)
    write_tar_index(tmp_path / "index", index)
    assert read_tar_index(tmp_path / "index", written.stat().st_size) is not None
    assert read_tar_index(tmp_path / "index", 520) is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc can be written nowhere")
def test_without_a_place_to_keep_it_a_tar_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOMAR_CACHE", "/proc/lomar")
    assert paths(open_source(str(plain(tmp_path / "x.tar", "a.jpg")))) == [b"a.jpg"]


def test_a_fingerprint_tells_the_images_and_not_where_the_tars_lie(tmp_path: Path) -> None:
    here = open_source(str(plain(tmp_path / "here" / "x.tar", "a.jpg", "b.jpg"))).fingerprint()
    (tmp_path / "here").rename(tmp_path / "there")
    assert open_source(str(tmp_path / "there" / "x.tar")).fingerprint() == here
    tar(tmp_path / "there" / "x.tar", member("a.jpg", b"longer" * 9), member("b.jpg"))
    assert open_source(str(tmp_path / "there" / "x.tar")).fingerprint() != here


@examples(50)
@given(names=st.lists(st.from_regex(r"[a-c]{1,2}(/[a-c]{1,2}){0,2}\.(jpg|txt|b\.png)", fullmatch=True), max_size=9))
def test_whatever_the_names_what_is_found_is_at_its_place(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    written = plain(tmp_path_factory.getbasetemp() / "any.tar", *names)
    file = os.open(written, os.O_RDONLY)
    index = scan(file, "any.tar", ENDINGS)
    for number in range(len(index)):
        content = os.pread(file, int(index.size[number]), int(index.offset[number]))
        assert content == b"content of any.tar " + index.path(number)
    os.close(file)
    assert set(paths(index)) >= {n.encode() for n in names if n.endswith(".jpg")}
