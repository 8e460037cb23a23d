"""Claims about datasets of other libraries by name. torchvision is there; Hugging Face's is where it is installed."""

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from lomar.data import libraries
from lomar.data.decode import PixelFormat, read_image
from lomar.data.labels import labelled_data
from lomar.data.opening import folders_in, is_there, open_source
from lomar.data.sources import ImageSource, joined
from lomar.errors import UserError

RGB8 = PixelFormat(3, "uint8")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision's data sets are."""
    monkeypatch.setenv("LOMAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    return tmp_path / "cache" / "torchvision"


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels(source: ImageSource, index: int) -> np.ndarray:
    image = read_image(source.read(index), source.name(index))
    return image.crop((0, 0, image.height, image.width), (image.height, image.width), RGB8).transpose(1, 2, 0)


def paths(source: ImageSource) -> list[str]:
    return [source.relative_path(number).decode() for number in range(len(source))]


# torchvision


@pytest.fixture
def small(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets of three kinds in the place of torchvision's own: of arrays, of files, without classes."""
    torchvision = pytest.importorskip("torchvision")

    class Arrays(torchvision.datasets.VisionDataset):
        def __init__(self, root: str, train: bool = True, transform: Any = None, download: bool = False) -> None:
            super().__init__(root)
            if not Path(root).is_dir():
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            self.targets, self.classes = [0, 1, 1] if train else [1], ["cat", "great/dog"]

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            if index == 2:
                raise ValueError("a broken\nrow")
            return PIL.Image.fromarray(picture(index)), self.targets[index]

    class Files(Arrays):
        def __init__(self, root: str, split: str = "train", **_: Any) -> None:
            super().__init__(root)
            if split not in ("train", "val"):
                raise ValueError(f"Unknown value '{split}' for argument split. Valid values are train, val.")
            self.samples = [(str(path), int(path.stem) % 2) for path in sorted(Path(root).glob("*.png"))]

    class Plain(Arrays):
        def __init__(self, root: str) -> None:
            super().__init__(root)
            self.targets = np.zeros((3, 4))

    for kind in (Arrays, Files, Plain):
        monkeypatch.setattr(torchvision.datasets, kind.__name__, kind, raising=False)
    monkeypatch.setattr(torchvision.datasets, "__all__", (*torchvision.datasets.__all__, "Arrays", "Files", "Plain"))


def test_arrays_are_read_as_they_are_and_named_by_class(root: Path, small: None) -> None:
    root.mkdir(parents=True)
    source = open_source("torchvision:Arrays")
    assert paths(source) == ["cat/00000000", "great_dog/00000001", "great_dog/00000002"]
    np.testing.assert_array_equal(pixels(source, 1), picture(1))
    with pytest.raises(OSError, match=r"^a broken row$"):
        source.read(2)
    assert source.name(0) == "torchvision:Arrays/cat/00000000"
    assert paths(open_source("torchvision:Arrays:test")) == ["great_dog/00000000"]
    data = labelled_data("torchvision:Arrays", 0)
    assert data.classes == ["cat", "great_dog"] and data.drawn and folders_in("torchvision:Arrays", "--data") == []


def test_files_are_read_byte_for_byte(root: Path, small: None) -> None:
    root.mkdir(parents=True)
    for number in range(4):
        (root / f"{number}.png").write_bytes(encoded(picture(number)))
    source = open_source("torchvision:Files")
    assert [bytes(source.read(number)) for number in range(3)] == [encoded(picture(number)) for number in range(3)]
    part = source.subset([2, 0]).subset([1])
    assert bytes(part.read(0)) == encoded(picture(0)) and part.name(0) == source.name(0)
    assert part.fingerprint() != source.fingerprint() and source.by_shard() is None


def test_labels_of_another_form_are_none(root: Path, small: None) -> None:
    root.mkdir(parents=True)
    assert paths(open_source("torchvision:Plain")) == ["00000000", "00000001", "00000002"]


def test_torchs_own_folder_is_taken_where_it_is_set(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "elsewhere"))
    assert len(open_source("torchvision:Arrays")) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:", "a name must follow, as in torchvision:CIFAR10:test"),
        ("torchvision:LSUN", "has no dataset 'LSUN' that can be opened by name"),  # it unpickles what is beside it
        ("torchvision:CIFAR11", "has no dataset 'CIFAR11' that can be opened by name; do you mean CIFAR10?"),
        ("torchvision:VisionDataset", "has no dataset"),
        ("torchvision:FakeData", "has no dataset"),
        ("torchvision:Arrays:val", "the split is 'val'; it can be train or test"),
        ("torchvision:Plain:test", "this dataset has no splits"),
        ("torchvision:Files:dev", "Valid values are train, val"),
    ],
)
def test_a_name_or_a_split_that_is_none_is_refused_in_one_line(
    root: Path, small: None, name: str, message: str
) -> None:
    root.mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        open_source(name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["CIFAR10", "MNIST", "STL10", "Flowers102", "ImageNet", "DTD", "SVHN"])
def test_nothing_is_downloaded_and_it_is_told_how_that_is_done(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(UserError, match="nothing is downloaded here: do it with python -c") as caught:
        open_source(f"torchvision:{name}")
    message = str(caught.value)
    assert f"datasets.{name}('{root}', " in message and "download=True" in message and "\n" not in message


def test_a_real_data_set_of_torchvision_is_read(root: Path) -> None:
    """CIFAR-10's files, with two images each."""
    torchvision = pytest.importorskip("torchvision")
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = np.stack([picture(n).repeat(7, 0)[:32].repeat(5, 1)[:, :32] for n in range(2)])  # (2, 32, 32, 3)
    batch = {"data": rows.transpose(0, 3, 1, 2).reshape(2, -1), "labels": [3, 5]}
    for name, _ in torchvision.datasets.CIFAR10.train_list:
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))
    check = torchvision.datasets.CIFAR10._check_integrity
    torchvision.datasets.CIFAR10._check_integrity = lambda self: True
    load = torchvision.datasets.cifar.check_integrity
    torchvision.datasets.cifar.check_integrity = lambda *_: True
    try:
        source = open_source("torchvision:CIFAR10")
    finally:
        torchvision.datasets.CIFAR10._check_integrity = check
        torchvision.datasets.cifar.check_integrity = load
    assert paths(source)[:2] == ["class 3/00000000", "class 5/00000001"] and len(source) == 10
    np.testing.assert_array_equal(pixels(source, 1), rows[1])


def test_images_of_a_library_are_given_alone(root: Path, small: None, tmp_path: Path) -> None:
    root.mkdir(parents=True)
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    with pytest.raises(UserError, match="images of a library are given alone"):
        joined([open_source("torchvision:Arrays"), open_source(str(tmp_path / "a.png"))])
    assert not is_there("torchvision:Arrays") and not is_there("hf:x")


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("datasets", "hf:uoft-cs/cifar10", r"needs Hugging Face datasets: pip install 'lomar\[hf\]'"),
        ("torchvision", "torchvision:CIFAR10", "needs torchvision: pip install torchvision"),
    ],
)
def test_a_library_that_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message):
        open_source(name)


# Hugging Face


@pytest.fixture
def table(tmp_path: Path) -> Any:
    """Four images with labels and a caption, one of them missing."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    (tmp_path / "3.png").write_bytes(encoded(picture(3)))
    images = [{"bytes": encoded(picture(n)), "path": None} for n in range(2)]
    images += [None, {"bytes": None, "path": str(tmp_path / "3.png")}]
    return datasets.Dataset.from_dict({"text": list("abcd"), "image": images, "label": [0, 1, 1, 0]}, features=features)


def test_a_folder_that_datasets_saved_is_read_undecoded_with_its_labels(table: Any, tmp_path: Path) -> None:
    table.save_to_disk(str(tmp_path / "saved"))
    source = open_source(f"hf:{tmp_path}/saved")
    assert paths(source) == ["cat/00000000", "dog/00000001", "dog/00000002", "cat/00000003"]
    assert [source.read(number) for number in (0, 1, 3)] == [encoded(picture(number)) for number in (0, 1, 3)]
    with pytest.raises(OSError, match="there is no image in this row"):
        source.read(2)
    assert pickle.loads(pickle.dumps(source)).read(1) == source.read(1)
    assert labelled_data(f"hf:{tmp_path}/saved", 0).classes == ["cat", "dog"]


def test_of_a_folder_of_splits_one_is_taken(table: Any, tmp_path: Path) -> None:
    import datasets

    splits = datasets.DatasetDict({"train": table, "test": table.select([1])})
    splits.save_to_disk(str(tmp_path / "saved"))
    assert len(open_source(f"hf:{tmp_path}/saved")) == 4
    assert paths(open_source(f"hf:{tmp_path}/saved:test")) == ["dog/00000000"]
    with pytest.raises(UserError, match="has no split 'val'; it has train, test"):
        open_source(f"hf:{tmp_path}/saved:val")


def test_a_table_without_images_is_refused(table: Any, tmp_path: Path) -> None:
    table.select_columns(["text", "label"]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="has no column of images; it has text, label"):
        open_source(f"hf:{tmp_path}/saved")


def test_what_is_not_on_this_machine_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="nothing is downloaded here") as caught:
        open_source("hf:nobody/nothing/small:test")
    assert "datasets.load_dataset('nobody/nothing', 'small')" in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_of_hugging_face_without_image_and_path_is_unreadable() -> None:
    with pytest.raises(OSError, match="neither an image nor a path"):
        libraries._Column([{"image": {"bytes": None, "path": None}}], "image")(0)
