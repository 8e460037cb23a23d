"""Claims about the file of an embedding; the readers of safetensors and NumPy are the judges."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from lomar.downstream import embedding as reading
from lomar.downstream import embedding_writer as writing
from lomar.downstream.embedding import Embedding, begun, nearest, partial_of, read_embedding
from lomar.downstream.embedding_writer import EmbeddingWriter, Plan, bytes_needed, check_finished, discard
from lomar.errors import UserError

ROOT = "/photos"
PATHS = ["red/0.png", "red/é ß.png", "blue/odd\udcff.png", "/else/where.png", "blue/4\n.png", "5.png", "a b/6.png"]
ENDINGS = ["safetensors", "npz"]


def plan(row: tuple[int, ...] = (5,), dtype: str = "float32", **about: Any) -> Plan:
    told = {"root": ROOT, "model": "vit", "weights": "w", "images": "i", "image_size": (3, 5), "layer": 2} | about
    encoded = [path.encode("utf-8", "surrogateescape") for path in PATHS]
    return Plan(told, len(PATHS), row, dtype, encoded.__getitem__)


def rows(row: tuple[int, ...] = (5,)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(len(PATHS), *row)).astype(np.float32)


GOOD = np.array([True, True, False, True, True, True, False])


def written(out: Path, row: tuple[int, ...] = (5,), dtype: str = "float32") -> Path:
    writer = EmbeddingWriter.begin(out, plan(row, dtype))
    for start in (0, 3, 6):
        writer.write(rows(row)[start : start + 3], GOOD[start : start + 3])
    writer.finish()
    return out


def expected(row: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.where(GOOD.reshape(-1, *[1] * len(row)), rows(row), 0).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("row", [(5,), (7, 3), (2, 3, 5)])
def test_the_reader_of_safetensors_reads_it(row: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    out = written(tmp_path / "a.safetensors", row, dtype)
    arrays = safetensors.numpy.load_file(out)
    assert arrays["features"].dtype == dtype
    np.testing.assert_array_equal(arrays["features"], expected(row, dtype))
    np.testing.assert_array_equal(arrays["good"], GOOD)
    assert bytes(arrays["paths"]).decode("utf-8", "surrogateescape").split("\0") == PATHS
    assert safetensors.torch.load_file(out)["features"].shape == (len(PATHS), *row)
    with safetensors.safe_open(out, framework="np") as file:
        about = json.loads(file.metadata()["lomar"])
    assert about["kind"] == "embedding" and about["image_size"] == [3, 5] and about["root"] == ROOT


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("row", [(5,), (7, 3), (2, 3, 5)])
def test_numpy_reads_it(row: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    with np.load(written(tmp_path / "a.npz", row, dtype), allow_pickle=False) as arrays:
        assert arrays["features"].dtype == dtype
        np.testing.assert_array_equal(arrays["features"], expected(row, dtype))
        np.testing.assert_array_equal(arrays["good"], GOOD)
        assert arrays["paths"].tolist() == PATHS
        assert json.loads(str(arrays["lomar"]))["layer"] == 2
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_our_reader_agrees_with_what_was_written(ending: str, dtype: str, tmp_path: Path) -> None:
    found = read_embedding(written(tmp_path / f"a.{ending}", (2, 3, 5), dtype))
    np.testing.assert_array_equal(found.features, expected((2, 3, 5), dtype))
    np.testing.assert_array_equal(found.good, GOOD)
    assert (found.paths, found.root, found.about["model"]) == (PATHS, ROOT, "vit")
    assert isinstance(found.features, np.memmap)
    assert [found.file(0), found.file(3)] == ["/photos/red/0.png", "/else/where.png"]


def test_paths_whose_text_would_be_huge_are_bytes_in_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "LARGEST_TEXT", 100)
    out = written(tmp_path / "a.npz")
    with np.load(out) as arrays:
        assert bytes(arrays["paths"]).decode("utf-8", "surrogateescape").split("\0") == PATHS
    assert read_embedding(out).paths == PATHS


def test_a_file_made_by_hand_is_read(tmp_path: Path) -> None:
    """By the description in docs/embedding.md, compressed, with arrays in the order of Fortran."""
    features = np.asfortranarray(rows())
    about = json.dumps({"kind": "embedding", "root": "/r"})
    np.savez_compressed(tmp_path / "a.npz", features=features, good=GOOD, paths=np.array(PATHS), lomar=about)
    blob = np.frombuffer("\0".join(["a", "b"]).encode(), np.uint8)
    arrays = {"features": features[:2].copy(), "good": GOOD[:2], "paths": blob}
    safetensors.numpy.save_file(arrays, tmp_path / "b.safetensors", {"lomar": about})
    found = read_embedding(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.features, features)
    assert (found.paths, found.root) == (PATHS, "/r")
    found = read_embedding(tmp_path / "b.safetensors")
    np.testing.assert_array_equal(found.features, features[:2])
    assert found.paths == ["a", "b"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("safe", [0, 3, 6, 7])
def test_resumed_after_a_kill_it_is_the_same_file_byte_for_byte(safe: int, ending: str, tmp_path: Path) -> None:
    whole = written(tmp_path / f"whole.{ending}")
    out = tmp_path / f"out.{ending}"
    writer = EmbeddingWriter.begin(out, plan())
    writer.write(rows()[:safe], GOOD[:safe]) if safe else None
    writer.keep()
    # Written, but not known to be safe: a killed process leaves it so.
    writer.write(np.full((7 - safe, 5), 9.0, np.float32), np.ones(7 - safe, bool)) if safe < 7 else None
    writer.close()
    assert begun(out) == safe and not out.exists()
    again = EmbeddingWriter.resume(out, plan())
    assert again.rows == safe
    if safe < 7:
        again.write(rows()[safe:], GOOD[safe:])
    again.finish()
    assert out.read_bytes() == whole.read_bytes()
    assert not partial_of(out).exists() and begun(out) is None


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (plan(weights="x"), "--resume: {out} was begun with other weights; --overwrite starts anew"),
        (plan(images="x"), "--resume: {out} was begun with other images; --overwrite starts anew"),
        (plan(layer=3), "--resume: {out} was begun with layer 2, not 3; give that again, or --overwrite to start anew"),
        (plan(image_size=(5, 3)), "was begun with image size [3, 5], not [5, 3]"),
        (plan(dtype="float16"), "was begun with dtype float32, not float16"),
        (plan((2, 3)), "was begun with shape [7, 5], not [7, 2, 3]"),
    ],
)
@pytest.mark.parametrize("ending", ENDINGS)
def test_it_goes_on_with_the_same_alone(ending: str, now: Plan, message: str, tmp_path: Path) -> None:
    """Whether it was begun or is finished."""
    out = tmp_path / f"a.{ending}"
    EmbeddingWriter.begin(out, plan()).close()
    with pytest.raises(UserError) as refused:
        EmbeddingWriter.resume(out, now)
    assert message.format(out=out) in str(refused.value)
    discard(out)
    check_finished(written(out), plan())
    with pytest.raises(UserError) as refused:
        check_finished(out, now)
    assert message.format(out=out) in str(refused.value)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_model_or_images_of_another_name_go_on_under_the_first(ending: str, tmp_path: Path) -> None:
    """Their digests tell that they are the same: they moved, or are named from another folder."""
    out, moved = tmp_path / f"a.{ending}", plan(model="./a/longer/name/of/vit", root="/photos/moved")
    writer = EmbeddingWriter.begin(out, plan())
    writer.write(rows()[:3], GOOD[:3])
    writer.keep()
    writer.close()
    again = EmbeddingWriter.resume(out, moved)
    again.write(rows()[3:], GOOD[3:])
    again.finish()
    assert out.read_bytes() == written(tmp_path / f"whole.{ending}").read_bytes()
    check_finished(out, moved)


def test_nothing_begun_cannot_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    with pytest.raises(
        UserError, match=r"--resume: there is nothing begun in .*a\.npz\.partial; leave it out to begin"
    ):
        EmbeddingWriter.resume(out, plan())
    partial_of(out).mkdir()
    (partial_of(out) / "rows").write_bytes(b"")  # killed before the first state was written
    assert begun(out) is None
    EmbeddingWriter.begin(out, plan()).close()
    (partial_of(out) / "rows").write_bytes(b"")
    with pytest.raises(UserError, match="rows is damaged; --overwrite starts anew"):
        EmbeddingWriter.resume(out, plan())


def test_a_finished_file_stays_until_its_successor_is_whole(tmp_path: Path) -> None:
    out = written(tmp_path / "a.safetensors")
    before = out.read_bytes()
    writer = EmbeddingWriter.begin(out, plan((2,)))
    writer.write(rows((2,)), GOOD)
    assert out.read_bytes() == before
    writer.finish()
    assert read_embedding(out).features.shape == (7, 2)


def test_rows_that_are_missing_are_no_finished_file(tmp_path: Path) -> None:
    writer = EmbeddingWriter.begin(tmp_path / "a.npz", plan())
    writer.write(rows()[:3], GOOD[:3])
    with pytest.raises(ValueError, match="3 of 7 rows are written"):
        writer.finish()
    writer.close()


def test_numbers_that_float16_cannot_hold_are_not_good(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    writer = EmbeddingWriter.begin(out, plan(dtype="float16"))
    features = rows()
    features[1, 4], features[3, 0] = 70_000.0, np.nan
    writer.write(features, np.ones(7, bool))
    assert writer.good().tolist() == [True, False, True, False, True, True, True]
    writer.finish()
    found = read_embedding(out)
    assert not found.features[[1, 3]].any() and found.good.tolist() == [True, False, True, False, True, True, True]


@pytest.mark.parametrize(("ending", "copies"), [("safetensors", 1), ("npz", 2)])
def test_the_space_it_takes_is_known_beforehand(ending: str, copies: int, tmp_path: Path) -> None:
    out = tmp_path / f"a.{ending}"
    needed = bytes_needed(out, plan((997, 11)))
    assert copies * 7 * 997 * 11 * 4 <= needed < copies * 7 * 997 * 11 * 4 + 2000


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_are_made_safe_now_and_then(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / f"a.{ending}"
    writer = EmbeddingWriter.begin(out, plan())
    writer.write(rows()[:3], GOOD[:3])
    assert begun(out) == 0
    monkeypatch.setattr(writing, "KEEP_EVERY_S", 0.0)
    writer.write(rows()[3:5], GOOD[3:5])
    assert begun(out) == 5
    writer.close()


def tensors(path: Path, metadata: dict[str, str], **arrays: np.ndarray) -> None:
    safetensors.numpy.save_file(arrays, path, metadata)


@pytest.mark.parametrize("content", ["text", "empty", "tensors", "encoder", "list", "npz", "photo.zip"])
def test_what_is_no_embedding_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    x = np.zeros((3, 2), np.float32)
    if content == "text":
        path.write_text("no")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "tensors":
        tensors(path, {"format": "pt"}, features=x)
    elif content == "encoder":
        tensors(path, {"lomar": json.dumps({"kind": "encoder"})}, features=x, good=x, paths=x)
    elif content == "list":
        tensors(path, {"lomar": "[]"}, features=x, good=x, paths=x)
    elif content == "npz":
        np.savez(tmp_path / "file.npz", features=x)
        path = tmp_path / "file.npz"
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("photo.png", b"no")
    with pytest.raises(UserError) as refused:
        read_embedding(path)
    assert str(refused.value) == f"{path} is no embedding; lomar embed writes one, as .safetensors or .npz"


@pytest.mark.parametrize("lost", [1, 3, 50, 100, 150])
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_has_lost_its_end_is_said_to_be_cut_short(ending: str, lost: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(written(tmp_path / f"a.{ending}").read_bytes()[:-lost])
    with pytest.raises(UserError) as refused:
        read_embedding(path)
    assert str(refused.value) == f"{path} is an embedding that is cut short; copy it again, or make it anew"


@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
@pytest.mark.parametrize("ending", ENDINGS)
def test_whichever_byte_is_wrong_it_is_read_or_one_line(ending: str, tmp_path: Path) -> None:
    whole = written(tmp_path / f"a.{ending}").read_bytes()
    path = tmp_path / "file"
    damaged = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x28]) + whole[place + 1 :])
        try:
            read_embedding(path)
        except UserError as error:
            assert str(error).startswith(f"{path} is ") and "\n" not in str(error)
            damaged += "is damaged" in str(error)
    assert damaged > 30 or ending == "safetensors"


def test_what_is_not_there_or_does_not_fit_together_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    with pytest.raises(UserError, match=r"there is no embedding .*a\.npz$"):
        read_embedding(out)
    EmbeddingWriter.begin(out, plan()).close()
    with pytest.raises(UserError, match=r"a\.npz, but an unfinished one; finish it with lomar embed --resume$"):
        read_embedding(out)
    about = json.dumps({"kind": "embedding", "root": ""})
    np.savez(out, features=np.zeros((3, 2)), good=np.ones(2, bool), paths=np.array(["a"]), lomar=about)
    with pytest.raises(UserError, match="is damaged: 3 features, 2 marks and 1 paths"):
        read_embedding(out)


def test_the_header_is_padded_so_that_numbers_are_aligned(tmp_path: Path) -> None:
    for name in ("v", "vi", "vit", "vit_", "vit_t"):
        out = tmp_path / "a.safetensors"
        writer = EmbeddingWriter.begin(out, plan(model=name))
        writer.write(rows(), GOOD)
        writer.finish()
        assert struct.unpack("<Q", out.read_bytes()[:8])[0] % 8 == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 41), st.integers(2, 5), st.integers(1, 60), st.integers(0, 2**31), st.booleans())
def test_neighbours_are_those_of_scikit_learn(count: int, width: int, wanted: int, seed: int, chunks: bool) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, width)).astype(np.float32)
    good = rng.random(count) < 0.8
    good[:2] = True
    embedding = Embedding(features, good, [""] * count, "", {})
    queries = np.flatnonzero(good)[::2].tolist()
    with pytest.MonkeyPatch.context() as patch:
        if chunks:
            patch.setattr(reading, "_COMPARED", 7 * width)
        places, similarities = nearest(embedding, queries, wanted)
    bank = np.flatnonzero(good)
    k = min(wanted, len(bank) - 1)
    judge = NearestNeighbors(n_neighbors=k + 1, metric="cosine", algorithm="brute").fit(features[bank])
    assert places.shape == similarities.shape == (len(queries), k)
    distances, found = judge.kneighbors(features[queries])
    for number, query in enumerate(queries):
        others = [(d, bank[place]) for d, place in zip(distances[number], found[number], strict=True)]
        others = [each for each in others if each[1] != query][:k]
        np.testing.assert_allclose(similarities[number], [1 - d for d, _ in others], atol=1e-5)
        assert query not in places[number] and good[places[number]].all()


def test_of_equal_neighbours_the_first_comes_first_and_the_query_is_none() -> None:
    features = np.array([[1, 0], [2, 0], [0, 0], [3, 0], [0, 5]], np.float16)
    embedding = Embedding(features, np.array([True, True, False, True, True]), [""] * 5, "", {})
    places, similarities = nearest(embedding, [3, 0], 9)
    assert places.tolist() == [[0, 1, 4], [1, 3, 4]] and similarities.tolist() == [[1, 1, 0], [1, 1, 0]]


def test_patches_have_no_nearest_images() -> None:
    embedding = Embedding(np.zeros((3, 2, 2), np.float32), np.ones(3, bool), [""] * 3, "", {})
    with pytest.raises(ValueError, match=r"features must be \(N, D\), not \(3, 2, 2\)"):
        nearest(embedding, [0], 1)
