"""Claims about `lomar map`; scikit-learn is the judge of neighbours and variances."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from lomar.commands import map as subject
from lomar.figures.map import Shown

Command = Callable[..., Any]

FOLDERS = ("cats", "dogs", "emus")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders of seven images, each folder of a colour; gray, 16-bit and five channels are among them."""
    root = tmp_path_factory.mktemp("zoo")
    rng = np.random.default_rng(0)
    for number, folder in enumerate(FOLDERS):
        (root / folder).mkdir()
        for image in range(7):
            pixels = rng.integers(0, 100, (11 + image, 17, 3), dtype=np.uint8)
            pixels[..., number] += 150
            Image.fromarray(pixels).save(root / folder / f"{image}.png")
    Image.fromarray(np.arange(143, dtype=np.uint8).reshape(11, 13)).save(root / "cats" / "0.png")
    Image.fromarray(np.arange(143, dtype=np.uint16).reshape(11, 13) * 400).save(root / "cats" / "1.png")
    np.save(root / "cats" / "2.npy", rng.random((5, 11, 13), dtype=np.float32))
    (root / "cats" / "2.png").unlink()
    return root


def paths_of(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.glob("*/*"))


def features_of(count: int) -> np.ndarray:
    """Three groups in seven dimensions."""
    rng = np.random.default_rng(1)
    return (np.eye(3, 7)[np.arange(count) * 3 // count] + rng.normal(0, 0.2, (count, 7))).astype(np.float32)


def embedded(out: Path, root: Path, features: np.ndarray | None = None, **other: Any) -> Path:
    paths = other.get("paths", paths_of(root))
    features = features_of(len(paths)) if features is None else features
    good = other.get("good", np.ones(len(paths), bool))
    about = {"kind": "embedding", "root": str(root), "model": "hand", "layer": 3, "features": "mean"}
    np.savez(out, features=features, good=good, paths=np.array(paths), lomar=json.dumps(about))
    return out


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """What was handed to the pictures."""
    seen: dict[str, tuple[Any, ...]] = {}

    def watch(name: str) -> None:
        draw = getattr(subject, name)

        def watched(*given: Any) -> Image.Image:
            seen[name] = given
            return draw(*given)

        monkeypatch.setattr(subject, name, watched)

    watch("map_figure")
    watch("nearest_figure")
    return seen


def test_both_pictures_are_written_and_told_about(
    zoo: Path, lomar: Command, drawn: dict[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "map.png"
    outcome = lomar("map --embedding", embedded(tmp_path / "e.npz", zoo), "--out", out)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == (
        f"{out}: 21 images by t-SNE of perplexity 6.67.\n"
        f"{out.with_name('map-nearest.png')}: 8 neighbours of 6 images among 21\n"
    )
    for path in (out, out.with_name("map-nearest.png")):
        with Image.open(path) as picture:
            assert picture.format == "PNG" and np.asarray(picture).std() > 5
    thumbnails, places, groups, names, caption = drawn["map_figure"]
    assert all(thumbnail.dtype == np.uint8 and thumbnail.shape[2] == 3 for thumbnail in thumbnails)
    assert places.shape == (21, 2) and list(names) == list(FOLDERS) and groups == [0] * 7 + [1] * 7 + [2] * 7
    assert caption == (
        "hand, layer 3, mean: 21 images by t-SNE of perplexity 6.67. "
        "Each image stands in the free cell nearest to its place."
    )


@pytest.mark.parametrize("name", ["map.png", "map-nearest.png"])
def test_a_picture_that_is_there_stays_unless_overwrite_says_otherwise(
    name: str, zoo: Path, lomar: Command, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("mine")
    words = ("map --method pca --embedding", embedded(tmp_path / "e.npz", zoo), "--out", tmp_path / "map.png")
    outcome = lomar(*words)
    assert outcome.status == 2
    assert outcome.err == f"lomar: error: --out: {tmp_path / name} already exists; --overwrite replaces it\n"
    assert (tmp_path / name).read_text() == "mine"
    assert lomar(*words, "--overwrite").status == 0
    with Image.open(tmp_path / name) as picture:
        assert picture.format == "PNG"


def test_images_that_are_alike_are_near_on_the_map(
    zoo: Path, lomar: Command, drawn: dict[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    """Nearest in the layout is one of the same group, and the seed decides it all."""
    layouts = []
    for seed in (0, 0, 1):
        file = embedded(tmp_path / "e.npz", zoo)
        words = f"--seed {seed} --overwrite"
        assert lomar("map --embedding", file, "--out", tmp_path / "map.png", words).status == 0
        layouts.append(drawn["map_figure"][1])
        near = NearestNeighbors(n_neighbors=1).fit(layouts[-1]).kneighbors(return_distance=False)[:, 0]
        assert (near // 7 == np.arange(21) // 7).mean() > 0.9
    assert np.array_equal(layouts[0], layouts[1])


def test_the_share_of_variance_is_scikit_learns(
    zoo: Path, lomar: Command, drawn: dict[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    out = tmp_path / "map.png"
    outcome = lomar("map --method pca --embedding", embedded(tmp_path / "e.npz", zoo), "--out", out)
    judge = PCA().fit(normalize(features_of(21)))
    first, second = judge.explained_variance_ratio_[:2]
    assert f"21 images by PCA, whose two axes have {first:.0%} and {second:.0%} of the variance." in outcome.out
    turned = judge.transform(normalize(features_of(21)))[:, :2]
    np.testing.assert_allclose(np.abs(drawn["map_figure"][1]), np.abs(turned), atol=1e-4)


def test_neighbours_are_those_of_scikit_learn_in_order_with_their_similarity(
    zoo: Path, lomar: Command, drawn: dict[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    file = embedded(tmp_path / "e.npz", zoo)
    paths = paths_of(zoo)
    words = ("--queries dogs/3.png", zoo / "emus" / "0.png", "--neighbours 4")
    assert lomar("map --method pca --embedding", file, "--out", tmp_path / "map.png", *words).status == 0
    rows = drawn["nearest_figure"][0]
    judge = NearestNeighbors(n_neighbors=5, metric="cosine").fit(features_of(21))
    for row, query in zip(rows, ("dogs/3.png", "emus/0.png"), strict=True):
        distances, places = judge.kneighbors(features_of(21)[[paths.index(query)]])
        assert [shown.title for shown in row[1:]] == [f"{1 - d:.3f}" for d in distances[0, 1:]]
        assert [shown.group for shown in row[1:]] == [Path(paths[p]).parent.name for p in places[0, 1:]]
        assert (row[0].title, row[0].group) == (Path(query).name, Path(query).parent.name)
        assert all(isinstance(shown, Shown) and shown.thumbnail is not None for shown in row)


def test_a_query_is_found_as_the_shell_completes_it(
    zoo: Path, lomar: Command, drawn: dict[str, tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = embedded(tmp_path / "e.npz", zoo)
    (tmp_path / "link").symlink_to(zoo)
    monkeypatch.chdir(tmp_path)
    words = (
        "--queries link/dogs/1.png",
        f"../{zoo.name}/dogs/2.png" if zoo.parent == tmp_path.parent else "dogs/2.png",
    )
    assert lomar("map --method pca --embedding", file, "--out map.png", *words).status == 0
    assert [row[0].title for row in drawn["nearest_figure"][0]] == ["1.png", "2.png"]


def test_at_most_limit_images_are_laid_out_but_all_are_neighbours(
    zoo: Path, lomar: Command, drawn: dict[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    file = embedded(tmp_path / "e.npz", zoo, good=np.arange(21) != 4)
    outcome = lomar("map --limit 5 --neighbours 50 --embedding", file, "--out", tmp_path / "map.png")
    assert "5 of 21 images by t-SNE of perplexity 1.33." in outcome.out
    assert "19 neighbours of 6 images among 20" in outcome.out
    assert len(drawn["map_figure"][0]) == 5 and len(drawn["nearest_figure"][0][0]) == 20


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_three_images_are_a_map(method: str, zoo: Path, lomar: Command, tmp_path: Path) -> None:
    file = embedded(tmp_path / "e.npz", zoo, good=np.arange(21) % 9 == 2)
    outcome = lomar("map --embedding", file, "--out", tmp_path / "map.png", f"--method {method}")
    assert outcome.status == 0 and "2 neighbours of 3 images among 3" in outcome.out


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["train/a/0", "train/b/1", "train/b/2"], ["a", "b"]),
        (["train/a/0", "val/b/1", "val/b/2"], ["train", "val"]),
        (["a/0", "1", "2"], [".", "a"]),
        (["0", "1", "2"], ["."]),
        (["a/b/0", "a/b/1", "a/b/2"], ["."]),
        (["/x/y/a/0", "/x/y/b/1", "/x/y/b/2"], ["a", "b"]),
    ],
)
def test_a_folder_is_the_first_that_not_all_share(paths: list[str], names: list[str]) -> None:
    numbers, found = subject.folders_of(paths)
    assert found == names and len(numbers) == 3 and set(numbers) == set(range(len(names)))


@pytest.mark.parametrize(("count", "note"), [(1, False), (20, False), (21, True)])
def test_only_two_to_twenty_folders_are_coloured(
    count: int, note: bool, zoo: Path, lomar: Command, drawn: dict[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    paths = [f"../{zoo.name}/dogs/../dogs/{i % 7}.png" if count == 1 else f"{i % count}/{i}.png" for i in range(21)]
    for i, path in enumerate(paths):
        if count > 1:
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes((zoo / "dogs" / f"{i % 7}.png").read_bytes())
    file = embedded(tmp_path / "e.npz", zoo if count == 1 else tmp_path, paths=paths)
    outcome = lomar("map --method pca --embedding", file, "--out", tmp_path / "map.png")
    assert outcome.status == 0 and ("21 folders are too many for colours." in outcome.out) == note
    assert len(drawn["map_figure"][3]) == (20 if count == 20 else 0)
    words = ("--out", tmp_path / "map.png", "--colour-by none --overwrite")
    assert lomar("map --method pca --embedding", file, *words).status == 0
    assert not drawn["map_figure"][3]


def test_missing_images_are_empty_tiles_and_counted(
    zoo: Path, lomar: Command, drawn: dict[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    paths = ["gone/1.png", *paths_of(zoo)[1:], "gone/0.png"]
    file = embedded(tmp_path / "e.npz", zoo, paths=paths)
    outcome = lomar("map --method pca --embedding", file, "--out", tmp_path / "map.png")
    assert outcome.status == 0
    assert outcome.out.endswith(
        f"2 images are not there or cannot be read; their tiles are empty, for example {zoo}/gone/0.png\n"
    )
    assert [thumbnail is None for thumbnail in drawn["map_figure"][0]] == [path[:4] == "gone" for path in paths]


def test_images_that_moved_are_found_with_data(zoo: Path, lomar: Command, tmp_path: Path) -> None:
    file = embedded(tmp_path / "e.npz", tmp_path / "nowhere", paths=paths_of(zoo))
    words = ("map --method pca --embedding", file, "--out", tmp_path / "map.png")
    outcome = lomar(*words)
    assert outcome.status == 2 and outcome.err == (
        f"lomar: error: --embedding {file}: none of its images can be read, for example "
        f"{tmp_path}/nowhere/cats/0.png; --data says where they are now\n"
    )
    outcome = lomar(*words, "--data", zoo, "--queries", zoo / "dogs" / "1.png")
    assert outcome.status == 0 and "empty" not in outcome.out


def test_a_name_that_is_no_text_is_drawn(zoo: Path, lomar: Command, tmp_path: Path) -> None:
    odd = Path(f"{tmp_path}/odd\udcff")
    odd.mkdir()
    for name in ("0.png", "1.png", "2\udcff.png"):
        (odd / name).write_bytes((zoo / "dogs" / "0.png").read_bytes())
    Image.new("RGB", (7, 7)).save(tmp_path / "a.png")
    paths = [f"{odd.name}/{name}" for name in ("0.png", "1.png", "2\udcff.png", "gone.png")] + ["a.png"]
    file = embedded(tmp_path / "e.npz", tmp_path, paths=paths)
    outcome = lomar("map --method pca --embedding", file, "--out", tmp_path / "map.png")
    assert outcome.status == 0 and outcome.out.endswith("odd\ufffd/gone.png\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--out {out}", "--embedding is missing; see lomar map --help"),
        ("--embedding {good}", "--out is missing; see lomar map --help"),
        ("--embedding {good} --out map.jpg", "--out is map.jpg; it must end in .png"),
        ("--embedding {good} --out {photo}/map.png", "--out {photo}/map.png cannot be written: "),
        ("--embedding nowhere.npz --out {out}", "there is no embedding nowhere.npz"),
        ("--embedding {photo} --out {out}", "{photo} is no embedding; lomar embed writes one, as .safetensors or .npz"),
        (
            "--embedding {patches} --out {out}",
            "--embedding {patches} holds 2 x 3 x 5 numbers an image, of patches; a map needs one vector an image",
        ),
        ("--embedding {two} --out {out}", "--embedding {two} holds 2 good images; a map needs at least 3"),
        ("--embedding {thin} --out {out}", "--embedding {thin} holds one number an image; a map needs two"),
        ("--embedding {alike} --out {out}", "--embedding {alike}: all images have the same features"),
        ("--embedding {good} --out {out} --data nowhere", "--data nowhere: no such folder"),
        (
            "--embedding {good} --out {out} --queries dog/3.png",
            "--queries dog/3.png: no such image in the embedding (there is cats/3.png, dogs/3.png, emus/3.png)",
        ),
        ("--embedding {good} --out {out} --queries dogs/3.pgn", "no such image in the embedding (there is dogs/3.png"),
        ("--embedding {good} --out {out} --queries xyz", "--queries xyz: no such image in the embedding\n"),
        (
            "--embedding {bad} --out {out} --queries cats/0.png",
            "--queries cats/0.png: it could not be used when the embedding was made",
        ),
        ("--embedding {good} --out {out} --limit 2", "--limit is '2'; it must be a whole number, at least 3"),
        (
            "--embedding {good} --out {out} --neighbours 51",
            "--neighbours is '51'; it must be a whole number, at least 1 and at most 50",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_line(words: str, message: str, zoo: Path, lomar: Command, tmp_path: Path) -> None:
    files = {
        "good": embedded(tmp_path / "good.npz", zoo),
        "patches": embedded(tmp_path / "patches.npz", zoo, np.zeros((21, 2, 3, 5))),
        "two": embedded(tmp_path / "two.npz", zoo, good=np.arange(21) < 2),
        "bad": embedded(tmp_path / "bad.npz", zoo, good=np.arange(21) > 0),
        "thin": embedded(tmp_path / "thin.npz", zoo, features_of(21)[:, :1]),
        "alike": embedded(tmp_path / "alike.npz", zoo, np.ones((21, 5))),
        "photo": zoo / "dogs" / "0.png",
        "out": tmp_path / "map.png",
    }
    outcome = lomar("map --method pca", words.format(**files))
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and message.format(**files) in outcome.err
    assert not (tmp_path / "map.png").exists()
