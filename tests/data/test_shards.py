"""Claims about images in tar files: what is written, who can read it, what is refused. WebDataset and Pillow judge."""

import io
import json
import os
import pickle
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import safetensors
import tifffile
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lomar.data.decode import PixelFormat, read_image
from lomar.data.labels import judging_images, labelled_data
from lomar.data.opening import folders_in, images_at, is_there, open_source
from lomar.data.preparing import Preparation, Prepared
from lomar.data.shard_writer import ShardWriter, member_name, more_than_once, without_ending
from lomar.data.shards import INDEX_FILE, JOURNAL_FILE, Members, Shard, damaged, read_index
from lomar.data.sources import ImageSource, joined
from lomar.errors import BadImageError, UserError

SETTINGS = {"short_side": 17, "encoding": "raw"}


def written(folder: Path, files: dict[bytes, bytes], shard_mb: float = 0.02, ending: str = "npy") -> Path:
    """Prepared images of given paths and contents."""
    paths = list(files)
    repeated = more_than_once(map(without_ending, paths))
    writer = ShardWriter.begin(folder, {"shard_mb": shard_mb})
    for number, (path, content) in enumerate(files.items()):
        writer.add(number, f"{member_name(path, bool(repeated[number]))}.{ending}", content)
    writer.finish(len(paths), SETTINGS, paths.__getitem__, "0.1")
    return folder


def streamed(folder: Path) -> list[dict[str, Any]]:
    """All samples as WebDataset reads them."""
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def held(source: ImageSource) -> dict[bytes, bytes]:
    return {source.relative_path(index): bytes(source.read(index)) for index in range(len(source))}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def noise(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    """Random numbers, the same ones each time."""
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)


def smooth(rows: int, columns: int) -> np.ndarray:
    """(rows, columns, 3), in which JPEG loses little; no two corners are alike."""
    y, x = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    waves = [np.sin(9 * y + 3 * x), np.cos(5 * x * y), np.sin(7 * x - 2 * y)]
    return (np.stack(waves, axis=2) * 100 + 120).astype(np.uint8)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other.astype(float)) ** 2)))


# What is written

NAMES = st.binary(min_size=1, max_size=6).filter(
    lambda name: not {0, ord("/")} & set(name) and name not in (b".", b"..")
)
ODD = st.sampled_from(
    [
        "a.jpg",
        "a.png",
        "a.b.jpg",
        "a",
        "a.",
        ".a",
        "a%2Ejpg",
        "a%2Epng.jpg",
        "a b.jpg",
        "ü\u2028.jpg",
        "__a__",
        "x\ny.jpg",
    ]
)
PATHS = st.lists(st.one_of(NAMES, ODD.map(str.encode)), min_size=1, max_size=3).map(b"/".join)


@settings(max_examples=60, deadline=None)
@given(paths=st.lists(PATHS, min_size=1, max_size=9, unique=True), mb=st.sampled_from([0.00001, 0.03, 1]))
def test_webdataset_reads_one_sample_for_each_image_whatever_its_name(
    tmp_path_factory: pytest.TempPathFactory, paths: list[bytes], mb: float
) -> None:
    files = {path: b"content of " + path for path in paths}
    folder = written(tmp_path_factory.mktemp("any") / "out", files, mb)
    samples = streamed(folder)
    assert [sample["npy"] for sample in samples] == list(files.values())
    assert len({sample["__key__"] for sample in samples}) == len(files)
    assert held(open_source(str(folder))) == files


def test_ordinary_names_stay_as_they_are_and_class_folders_stay_folders() -> None:
    assert member_name(b"train/n01 \xc3\xbc/photo_1.JPEG", False) == "train/n01 ü/photo_1"
    assert member_name(b"v1.2/a.jpg", False) == "v1.2/a"
    assert member_name(b"v1.2/a.jpg", True) == "v1.2/a%2Ejpg"
    assert member_name(b"2024.07.01.jpg", False) == "2024%2E07%2E01%2Ejpg"
    assert member_name(b"100%\n\xff.png", False) == "100%25%0A%FF"


def test_only_paths_that_are_equal_but_for_the_ending_count_as_repeated() -> None:
    paths = [b"a/1.jpg", b"a/1.png", b"b/1.jpg", b"1", b"a/1.jpg.png"]
    assert more_than_once(map(without_ending, paths)).tolist() == [True, True, False, False, False]


def test_equal_images_are_equal_files_and_a_long_name_is_whole(tmp_path: Path) -> None:
    files = {b"long/" * 40 + b"n" * 130 + b".jpg": b"x", b"b.jpg": bytes(70_000)}
    one, other = written(tmp_path / "one", files), written(tmp_path / "other", files)
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()
    with tarfile.open(one / "shard-000000.tar") as tar:
        member = tar.getmembers()[0]
    assert member.name == "long/" * 40 + "n" * 130 + ".npy" and (member.mtime, member.uid) == (0, 0)


def test_a_shard_is_no_longer_than_asked_for_unless_one_image_is(tmp_path: Path) -> None:
    files = {f"{number}.jpg".encode(): bytes(size) for number, size in enumerate([5000, 5000, 5000, 90_000, 10, 10])}
    folder = written(tmp_path / "out", files, shard_mb=0.02)
    assert [path.stat().st_size for path in sorted(folder.glob("*.tar"))] == [
        20_480 - 10_240,
        10_240,
        10_240,
        92_160,
        10_240,
    ]


# What an image becomes


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 23),
    columns=st.integers(2, 23),
    channels=st.integers(1, 6),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
    encoding=st.sampled_from(["jpeg", "raw"]),
)
def test_what_is_small_enough_and_no_jpeg_is_kept_to_the_last_bit_as_an_array(
    rows: int, columns: int, channels: int, dtype: str, encoding: str
) -> None:
    pixels = np.arange(rows * columns * channels).reshape(rows, columns, channels).astype(dtype)
    stored = pixels[:, :, 0] if channels == 1 else pixels
    if channels > 1 and rows < columns and rows < channels:  # as whoever has such an array must store it
        stored = pixels.transpose(2, 0, 1)
    try:
        original = read_image(npy(stored), "x.npy")
    except BadImageError:
        return  # of one row or column, for it is read in another order
    whole = (0, 0, original.height, original.width)
    expected = original.crop(whole, whole[2:], PixelFormat(original.channels, dtype))
    try:
        made = Preparation(23, encoding, 95)(npy(stored), "x.npy")
    except BadImageError as error:
        assert "too few for an array" in str(error) and original.height < original.channels >= original.width
        return
    if encoding == "jpeg" and dtype == "uint8" and original.channels in (1, 3):
        assert made.ending == "jpg"
        return
    assert made.ending == "npy" and not made.kept
    again = read_image(made.content, "x.npy")
    assert (again.height, again.width, again.channels, again.dtype) == (*whole[2:], original.channels, dtype)
    np.testing.assert_array_equal(again.crop(whole, whole[2:], PixelFormat(original.channels, dtype)), expected)
    loaded = np.load(io.BytesIO(made.content))
    assert sorted(loaded.shape) == sorted(stored.shape)


def test_a_small_upright_jpeg_stays_byte_for_byte_and_a_larger_or_turned_one_does_not() -> None:
    data = encoded(smooth(40, 60), "JPEG", quality=50)
    make = Preparation(40, "jpeg", 95)
    assert make(data, "x.jpg") == Prepared("jpg", data, kept=True)
    assert not Preparation(39, "jpeg", 95)(data, "x.jpg").kept
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = encoded(smooth(40, 60), "JPEG", exif=exif, quality=95)
    made = make(turned, "x.jpg")
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(turned)))
    shown = PIL.Image.open(io.BytesIO(made.content))
    assert not made.kept and shown.size == upright.size == (40, 60) and 0x0112 not in shown.getexif()
    assert decibels(np.asarray(shown), np.asarray(upright)) > 38


@pytest.mark.parametrize(("shape", "size"), [((350, 467), (33, 44)), ((467, 350), (44, 33)), ((90, 700), (33, 257))])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_image_is_as_pillow_makes_it_smaller(shape: tuple[int, int], size: tuple[int, int], kind: str) -> None:
    data = encoded(smooth(*shape), kind)
    upright = PIL.Image.open(io.BytesIO(data))
    expected = np.asarray(upright.resize(size[::-1], PIL.Image.Resampling.BICUBIC))
    raw = np.load(io.BytesIO(Preparation(33, "raw", 95)(data, "x").content))
    assert raw.shape == (*size, 3) and decibels(raw, expected) > 42
    jpeg = PIL.Image.open(io.BytesIO(Preparation(33, "jpeg", 95)(data, "x").content))
    assert (jpeg.format, jpeg.size) == ("JPEG", size[::-1])
    assert decibels(np.asarray(jpeg), expected) > 35


def test_fine_detail_is_filtered_and_not_taken_over_by_the_decoders_shrinking() -> None:
    """A photograph's finest texture; Pillow, of all pixels, is the measure."""
    data = encoded(noise(320, 320, 3), "JPEG", quality=95, subsampling=0)
    expected = np.asarray(PIL.Image.open(io.BytesIO(data)).resize((38, 38), PIL.Image.Resampling.BICUBIC))
    raw = np.load(io.BytesIO(Preparation(38, "raw", 95)(data, "x").content))
    image = read_image(data, "x")
    plain = image.crop((0, 0, 320, 320), (38, 38), PixelFormat(3, "uint8")).transpose(1, 2, 0)
    assert decibels(raw, expected) > decibels(plain, expected) + 3


def test_gray_stays_gray_and_colour_is_sampled_as_the_original() -> None:
    def sampling(data: bytes) -> tuple[int, int]:
        return PIL.Image.open(io.BytesIO(data)).layer[0][1:3]  # type: ignore[attr-defined]

    make = Preparation(20, "jpeg", 95)
    gray = PIL.Image.open(io.BytesIO(make(encoded(noise(40, 50), "PNG"), "x").content))
    assert (gray.mode, gray.size) == ("L", (25, 20))
    assert sampling(make(encoded(noise(40, 50, 3), "PNG"), "x").content) == (1, 1)
    assert sampling(make(encoded(noise(40, 50, 3), "JPEG"), "x").content) == (2, 2)


def test_many_bands_and_sixteen_bits_are_made_smaller_too() -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.full((5, 60, 80), 40_000, dtype=np.uint16), photometric="minisblack")
    made = Preparation(30, "jpeg", 95)(file.getvalue(), "x.tif")
    array = np.load(io.BytesIO(made.content))
    assert made.ending == "npy" and array.shape == (30, 40, 5) and array.dtype == np.uint16 and (array == 40_000).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(smooth(40, 60), "JPEG")[:-300], "truncated"),  # small enough to be kept
        (encoded(smooth(90, 60), "JPEG")[:700], "truncated"),
        (encoded(noise(40, 60, 3), "PNG")[:700], "truncated"),
        (npy(np.full((9, 9), np.nan, dtype=np.float32)), "not finite"),
        (b"", "empty"),
    ],
)
def test_what_is_damaged_is_not_written(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        Preparation(50, "jpeg", 95)(data, "x")


# Reading


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Four images in two shards, of two classes to train on and two to be judged."""
    names = (b"train/blue/1.png", b"train/red/2.png", b"val/blue/3.png", b"val/red/4.png")
    return written(tmp_path / "prepared", {name: npy(noise(60, 61, 3) + np.uint8(i)) for i, name in enumerate(names)})


def test_a_large_array_is_mapped_and_a_small_one_read(tmp_path: Path) -> None:
    large, small = npy(noise(700, 701, 3)), npy(noise(5, 7, 3))
    source = open_source(str(written(tmp_path / "out", {b"small": small, b"large": large}, shard_mb=9)))
    assert type(source.read(0)) is bytes and type(source.read(1)) is memoryview
    assert held(source) == {b"small": small, b"large": large}
    crop = read_image(source.read(1), "large").crop((10, 20, 30, 40), (30, 40), PixelFormat(3, "uint8"))
    np.testing.assert_array_equal(crop.transpose(1, 2, 0), noise(700, 701, 3)[10:40, 20:60])


def test_a_part_is_named_by_the_path_of_the_originals(prepared: Path) -> None:
    whole = open_source(str(prepared))
    part = open_source(str(prepared / "train"))
    assert [part.relative_path(index) for index in range(len(part))] == [b"blue/1.png", b"red/2.png"]
    assert part.name(1) == whole.name(1) == str(prepared / "train/red/2.png")
    one = open_source(part.name(1))
    assert len(one) == 1 and one.relative_path(0) == b"2.png" and one.read(0) == part.read(1) == whole.read(1)
    assert folders_in(str(prepared), "--data") == ["train", "val"]
    assert folders_in(str(prepared / "val"), "--data") == ["blue", "red"]
    assert is_there(str(prepared / "val/red")) and not is_there(str(prepared / "va"))
    assert not is_there("x" * 300)
    with pytest.raises(
        UserError, match=r"--data .*prepared/nothing: no such folder or file among the images prepared in"
    ):
        open_source(str(prepared / "nothing"))


def test_a_subset_and_a_join_read_what_their_parts_read(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.png").write_bytes(b"a plain file")
    whole, plain = open_source(str(prepared)), open_source(str(tmp_path / "plain.png"))
    some = whole.subset([3, 0])
    other = open_source(str(written(tmp_path / "other", {b"x.png": b"of another folder"})))
    both = joined([some, plain, whole, other])
    assert [both.read(index) for index in range(len(both))] == [
        *(whole.read(index) for index in (3, 0)),
        b"a plain file",
        *(whole.read(index) for index in range(4)),
        b"of another folder",
    ]
    assert both.name(2) == str(tmp_path / "plain.png") and both.name(0) == whole.name(3)


def test_labels_come_from_folders_and_tables_as_of_the_originals(prepared: Path) -> None:
    data = labelled_data(str(prepared), seed=0)
    assert data.classes == ["blue", "red"] and not data.drawn
    assert [data.val.source.name(i) for i in range(2)] == [str(prepared / f"val/{n}.png") for n in ("blue/3", "red/4")]
    table = prepared / "labels.csv"
    table.write_text("path,label\nval/red/4.png,warm\ntrain/blue/1.png,cold\n./train/red/gone.png,warm\n")
    labelled, _ = judging_images(str(table), ["cold", "warm"])
    assert labelled.labels.tolist() == [1, 0, 1]
    assert labelled.source.read(0) == open_source(str(prepared)).read(3)
    with pytest.raises(FileNotFoundError):  # it could not be read when the others were prepared, as it might be now
        labelled.source.read(2)
    (prepared / "some.txt").write_text("val/blue/3.png\n")
    assert open_source(str(prepared / "some.txt")).read(0) == open_source(str(prepared)).read(2)
    assert images_at(str(prepared / "val"), [b"red/4.png"], "--data").read(0) == open_source(str(prepared)).read(3)


def test_a_table_may_begin_with_an_image_whose_name_has_no_ending(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", {b"scan": b"content", b"other.png": b"x"})
    (folder / "labels.csv").write_text("scan,a\nother.png,b\n")
    labelled, _ = judging_images(str(folder / "labels.csv"), ["a", "b"])
    assert labelled.source.read(0) == b"content"


def test_a_fingerprint_tells_the_content_and_not_the_place(prepared: Path, tmp_path: Path) -> None:
    before = open_source(str(prepared)).fingerprint()
    shutil.copytree(prepared, tmp_path / "moved")
    assert open_source(str(tmp_path / "moved")).fingerprint() == before
    names = [open_source(str(prepared)).relative_path(index) for index in range(4)]
    other = written(tmp_path / "other", {name: npy(noise(60, 61, 3)) for name in names})
    assert open_source(str(other)).fingerprint() != before
    assert ImageSource("", names).fingerprint() != before


def test_a_long_listing_stays_under_200_bytes_an_image_and_goes_to_workers_so() -> None:
    count = 200_000
    shards = tuple(Shard(f"/data/shard-{number:06d}.tar", 10**9, "0" * 64) for number in range(100))
    offset = np.arange(count, dtype=np.int64) * 1000
    members = Members(shards, (offset % 100).astype(np.int32), offset, offset)
    source = ImageSource(
        "/data", (f"n{i % 1000:08d}/n{i % 1000:08d}_{i:08d}.JPEG".encode() for i in range(count)), members
    )
    assert len(pickle.dumps(source)) < 100 * count
    again = pickle.loads(pickle.dumps(source))
    assert again.members.offset[123_456] == 123_456_000


# What is refused


def changed(folder: Path, **arrays: Any) -> None:
    """Write the index with some arrays, or parts of its metadata, changed."""
    file = folder / INDEX_FILE
    tensors = load_file(file)
    with safetensors.safe_open(file, "numpy") as opened:
        about = json.loads(opened.metadata()["lomar_shards"])
    about |= {name: value for name, value in arrays.items() if name in about}
    tensors |= {name: value for name, value in arrays.items() if name not in about}
    save_file({name: np.asarray(value) for name, value in tensors.items()}, file, {"lomar_shards": json.dumps(about)})


def paths(*names: bytes) -> dict[str, Any]:
    return {"paths": np.frombuffer(b"".join(names), dtype=np.uint8), "ends": np.cumsum([len(name) for name in names])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: changed(folder, format=2), "in a newer format than this one reads"),
        (lambda folder: changed(folder, **paths(b"a", b"b", b"/etc/c", b"d")), "b'/etc/c' leads out of the folder"),
        (lambda folder: changed(folder, **paths(b"a", b"b", b"c/../../d", b"e")), "leads out of the folder"),
        (lambda folder: changed(folder, **paths(b"a", b"b", b"c\0", b"d")), "leads out of the folder"),
        (lambda folder: changed(folder, shards=[["../x.tar", 9, ""]]), "'../x.tar' is no name of a shard"),
        (lambda folder: changed(folder, shard=np.array([0, 0, 7, 0], np.int32)), "a shard that is not listed"),
        (lambda folder: changed(folder, offset=np.array([0, 0, 2**62, 0])), "an image outside of its shard"),
        (lambda folder: changed(folder, size=np.array([1, 1, -1, 1])), "an image outside of its shard"),
        (lambda folder: changed(folder, size=np.ones(3, np.int64)), "size is int64 of shape (3,)"),
        (lambda folder: changed(folder, ends=np.array([3, 2, 5, 9])), "the paths do not end where they should"),
        (lambda folder: (folder / INDEX_FILE).write_bytes((folder / INDEX_FILE).read_bytes()[:99]), "is damaged"),
        (lambda folder: (folder / INDEX_FILE).write_bytes(b"short"), "is damaged"),
        (lambda folder: (folder / "shard-000001.tar").unlink(), "shard-000001.tar: No such file or directory"),
        (lambda folder: os.truncate(folder / "shard-000000.tar", 700), "is 700 bytes long and should be"),
        (lambda folder: (folder / JOURNAL_FILE).touch(), "--resume goes on with it"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(
    prepared: Path, change: Callable[[Path], object], message: str
) -> None:
    change(prepared)
    with pytest.raises(UserError) as caught:
        open_source(str(prepared))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--data {prepared}: ")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_mutated_index_is_refused_or_read_but_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutated"
    if not folder.exists():
        written(folder, {f"{number}.jpg".encode(): b"x" * number for number in range(1, 5)})
        shutil.copy(folder / INDEX_FILE, folder / "whole")
    content = bytearray((folder / "whole").read_bytes())
    for place in data.draw(st.lists(st.integers(8, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    (folder / INDEX_FILE).write_bytes(content)
    try:
        index = read_index(folder, "--data")
        assert all(index.members.read(number) for number in range(len(index.ends)))
    except UserError as error:
        assert "\n" not in str(error)


def test_a_file_of_the_index_name_that_is_someone_elses_makes_no_folder_prepared(tmp_path: Path) -> None:
    save_file({"features": np.ones(3)}, tmp_path / INDEX_FILE)
    (tmp_path / "a.jpg").write_bytes(b"content")
    assert open_source(str(tmp_path)).read(0) == b"content"


def test_a_shard_cut_short_after_it_was_opened_is_an_unreadable_image_and_no_crash(tmp_path: Path) -> None:
    files = {b"small": bytes(3000), b"large": bytes(2_000_000)}
    source = open_source(str(written(tmp_path / "out", files, shard_mb=9)))
    os.truncate(tmp_path / "out" / "shard-000000.tar", 600)
    for index in range(2):
        with pytest.raises(OSError, match=r"shard-000000\.tar is cut short"):
            source.read(index)


def test_a_changed_byte_is_found_by_the_check_sum(prepared: Path) -> None:
    shards = read_index(prepared, "--data").members.shards
    assert damaged(shards) == []
    with (prepared / "shard-000001.tar").open("r+b") as file:
        file.seek(2000)
        file.write(b"\1\2\3")
    assert damaged(shards) == [str(prepared / "shard-000001.tar")]
    (prepared / "shard-000000.tar").unlink()
    assert len(damaged(shards)) == 2


# Going on


@pytest.mark.parametrize("harm", ["nothing", "cut line", "lost shard", "short shard", "stray shard"])
def test_what_was_finished_is_kept_and_the_rest_written_anew(tmp_path: Path, harm: str) -> None:
    files = {f"{number}.jpg".encode(): bytes([number]) * 6000 for number in range(12)}
    whole = written(tmp_path / "whole", files)
    folder = tmp_path / "out"
    writer = ShardWriter.begin(folder, {"shard_mb": 0.02})
    for number in range(9):
        writer.add(number, f"{number}.npy", bytes([number]) * 6000)
    writer.close()
    finished = sorted(path.name for path in folder.glob("*.tar"))
    assert len(finished) == 8 and not list(folder.glob(".*"))
    journal = folder / JOURNAL_FILE
    if harm == "cut line":
        journal.write_bytes(journal.read_bytes()[:-5])
    elif harm == "lost shard":
        (folder / finished[4]).unlink()
    elif harm == "short shard":
        os.truncate(folder / finished[4], 9)
    elif harm == "stray shard":
        (folder / "shard-000008.tar").write_bytes(b"of a process that was killed before it could say so")
        (folder / "shard-000040.tar").write_bytes(b"whoever reads all shards would meet it")
        (folder / ".shard-000008.tar.tmp").write_bytes(b"likewise")
    writer = ShardWriter.resume(folder)
    assert writer.done == {"nothing": 8, "cut line": 7, "lost shard": 4, "short shard": 4, "stray shard": 8}[harm]
    first = writer.done
    for number in range(first, first + 2):
        writer.add(number, f"{number}.npy", bytes([number]) * 6000)
    writer.close()  # once more
    writer = ShardWriter.resume(folder)
    assert writer.done == first + 1
    for number in range(writer.done, 12):
        writer.add(number, f"{number}.npy", bytes([number]) * 6000)
    writer.finish(12, SETTINGS, list(files).__getitem__, "0.1")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_shard_that_reads_back_differently_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a disk that loses what it was given."""
    writer = ShardWriter.begin(tmp_path / "out", {"shard_mb": 1})
    writer.add(0, "a.npy", b"content")
    real = os.fsync

    def losing(descriptor: int) -> None:
        real(descriptor)
        monkeypatch.setattr(os, "fsync", real)
        os.pwrite(descriptor, b"!", 515)

    monkeypatch.setattr(os, "fsync", losing)
    with pytest.raises(OSError, match=r"shard-000000\.tar reads back differently"):
        writer.finish(1, SETTINGS, lambda number: b"a", "0.1")
    writer.close()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [JOURNAL_FILE]


def test_two_cannot_write_to_one_folder_and_a_killed_one_does_not_bar_it(tmp_path: Path) -> None:
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        writer = ShardWriter.begin(tmp_path, {"shard_mb": 1})
        os.write(told, b"!")
        signal.pause()
        writer.close()
    try:
        os.read(ready, 1)
        for opened in (ShardWriter.resume, lambda folder: ShardWriter.begin(folder, {"shard_mb": 1})):
            with pytest.raises(UserError, match=f"--out {tmp_path}: another lomar prepare is writing to it"):
                opened(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    ShardWriter.resume(tmp_path).close()


def test_a_journal_that_says_nothing_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"{}\n", b"nothing\n", b'{"shard_mb": "x"}\n', b'{"shard_mb": 1}'):
        (tmp_path / JOURNAL_FILE).write_bytes(content)
        with pytest.raises(UserError, match=r"--resume: .*unfinished\.jsonl is damaged; --overwrite starts anew"):
            ShardWriter.resume(tmp_path)
