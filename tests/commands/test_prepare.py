"""Claims about `lomar prepare` as typed, and about the commands that read what it leaves."""

import errno
import io
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

import lomar as package
from lomar.cli import main
from lomar.data import shard_writer as writing
from lomar.data.opening import open_source
from lomar.data.shard_writer import ShardWriter
from lomar.downstream.embedding import read_embedding
from lomar.errors import UserError

Command = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("miniature")

SMALL = "--short-side 24 --shard-mb 0.03 --workers 0"
TINY = "--device cpu --precision fp32 --workers 0"


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 photographs, smooth and of several sizes and kinds, in two class folders."""
    root = tmp_path_factory.mktemp("album")
    for folder in ("a", "b c"):
        (root / folder).mkdir()
    for number in range(29):
        y, x = np.mgrid[0 : 1 : (31 + number) * 1j, 0:1:47j]
        pixels = (np.stack([np.sin(number + 9 * y), np.cos(5 * x * y), np.sin(7 * x)], 2) * 100 + 120).astype(np.uint8)
        ending = ("jpg", "png", "webp")[number % 3]
        Image.fromarray(pixels).save(root / ("a", "b c")[number % 2] / f"{number:02d}.{ending}")
    return root


@pytest.fixture(scope="module")
def whole(album: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The album, prepared without interruption; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(["prepare", "--data", str(album), "--out", str(out), *SMALL.split()]) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(outcome: Any) -> str:
    """The message of a refusal: status 2 and one line."""
    assert outcome.status == 2, outcome.out + outcome.err
    assert outcome.err.startswith("lomar: error: ") and outcome.err.count("\n") == 1
    return outcome.err.removeprefix("lomar: error: ").rstrip("\n")


def dies(work: Callable[[], object]) -> None:
    """Do work in a process that is expected to kill itself."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            work()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# What is written


def test_webdataset_reads_every_image_at_its_size_under_its_path_as_good_as_pillow_makes_it(
    whole: Path, album: Path
) -> None:
    shards = sorted(str(path) for path in whole.glob("*.tar"))
    assert len(shards) > 2
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    originals = sorted(path for path in album.glob("*/*"))
    keys = [str(path.relative_to(album).with_suffix("")) for path in originals]
    assert [sample["__key__"] for sample in samples] == keys
    for sample, path in zip(samples, originals, strict=True):
        original = Image.open(path).convert("RGB")
        assert min(sample["jpg"].size) == 24
        expected = original.resize(sample["jpg"].size, Image.Resampling.BICUBIC)
        file = io.BytesIO()
        expected.save(file, "JPEG", quality=95, subsampling=2 if path.suffix == ".jpg" else 0)
        ours, pillows = (
            np.abs(np.asarray(picture, dtype=int) - np.asarray(expected)).mean()
            for picture in (sample["jpg"], Image.open(file))
        )
        assert ours < pillows + 0.5


def test_what_was_done_is_told(lomar: Command, album: Path, tmp_path: Path) -> None:
    outcome = lomar("prepare", "--data", album, "--out", tmp_path / "out", "--short-side 40 --workers 0")
    assert outcome.status == 0
    first, second, third = outcome.out.splitlines()
    assert first == "29 images: shorter side at most 40 px, jpeg; 1 process"
    assert second.startswith(f"{tmp_path / 'out'}: 29 images in 1 shard, ")
    assert third == "4 JPEG files were small enough and stayed as they are"
    original = (album / "a" / "00.jpg").read_bytes()
    assert open_source(str(tmp_path / "out" / "a" / "00.jpg")).read(0) == original
    outcome = lomar("prepare", "--out", tmp_path / "out", "--verify")
    assert outcome.status == 0 and outcome.out.startswith(f"{tmp_path / 'out'} is whole: 29 images in 1 shard, ")


def test_workers_change_nothing(lomar: Command, album: Path, whole: Path, tmp_path: Path) -> None:
    assert lomar("prepare", "--data", album, "--out", tmp_path / "out", SMALL, "--workers 2").status == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_from_python_it_is_the_same(album: Path, whole: Path, tmp_path: Path) -> None:
    out = package.prepare(data=str(album), out=tmp_path / "out", short_side=24, shard_mb=0.03, workers=0)
    assert out == tmp_path / "out" and contents(out) == contents(whole)
    with pytest.raises(UserError, match="already holds prepared images"):
        package.prepare(data=str(album), out=out)


def test_a_list_of_paths_from_everywhere_is_kept_below_the_folder_they_share(
    lomar: Command, album: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text(f"{album}/a/../b c/01.png\n{album}/a/00.jpg\n{album}/./a/00.jpg\n")
    outcome = lomar("prepare", "--data", tmp_path / "list.txt", "--out", tmp_path / "out", SMALL)
    assert outcome.status == 0 and outcome.out.startswith("2 images (1 listed twice): ")
    source = open_source(str(tmp_path / "out"))
    assert [source.relative_path(index) for index in range(2)] == [b"b c/01.png", b"a/00.jpg"]


# Killed, stopped, out of space


@pytest.mark.parametrize("moment", ["in a shard", "before the journal", "before the index", "after the index"])
@pytest.mark.parametrize("workers", ["--workers 0", "--workers 2"])
def test_a_killed_run_goes_on_to_the_bytes_of_one_that_was_not(
    lomar: Command, album: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, workers: str
) -> None:
    def work() -> None:
        real_add, real_append = ShardWriter.add, writing._append

        def add(self: ShardWriter, number: int, name: str, content: bytes) -> None:
            real_add(self, number, name, content)
            if moment == "in a shard" and len(self.shards) == 2:
                killed()

        def append(journal: Any, line: bytes) -> None:
            if moment == "before the journal" and b"shard-000001" in line:
                killed()
            real_append(journal, line)

        monkeypatch.setattr(ShardWriter, "add", add)
        monkeypatch.setattr(writing, "_append", append)
        if moment == "before the index":
            monkeypatch.setattr(writing, "write_index", killed)
        if moment == "after the index":
            monkeypatch.setattr(ShardWriter, "close", killed)
        main(["prepare", "--data", str(album), "--out", str(tmp_path / "out"), *SMALL.split(), *workers.split()])

    out = tmp_path / "out"
    dies(work)
    assert (out / "unfinished.jsonl").exists()
    assert "--resume goes on, --overwrite starts anew" in refused(lomar("prepare", "--data", album, "--out", out))
    assert f"lomar prepare --out {out} --resume goes on" in refused(lomar(f"knn --model scratch:8x1x1 --data {out}"))
    outcome = lomar("prepare", "--out", out, "--resume", workers)
    assert outcome.status == 0 and contents(out) == contents(whole)
    outcome = lomar("prepare", "--out", out, "--resume")
    assert (outcome.status, outcome.out) == (0, f"{out} is finished: 29 images\n")


@pytest.mark.parametrize("journal", [b"", b'{"data": "al', bytes(99)])
def test_killed_before_its_plan_was_written_it_begins(
    journal: bytes, lomar: Command, album: Path, whole: Path, tmp_path: Path
) -> None:
    """But shards beside a journal that does not say what they are, are kept."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "unfinished.jsonl").write_bytes(journal)
    assert lomar("prepare --resume --data", album, "--out", out, SMALL).status == 0
    assert contents(out) == contents(whole)
    (out / "unfinished.jsonl").write_bytes(journal)
    assert "is damaged; --overwrite starts anew" in refused(lomar("prepare --resume --data", album, "--out", out))
    (out / "unfinished.jsonl").unlink()
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_and_says_how_it_goes_on(
    lomar: Command, album: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    real = ShardWriter.add

    def add(self: ShardWriter, image: int, name: str, content: bytes) -> None:
        if image == 20:
            os.kill(os.getpid(), number)
        real(self, image, name, content)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "add", add)
        outcome = lomar("prepare", "--data", album, "--out", tmp_path / "out", SMALL)
    assert outcome.status == status
    done = int(outcome.out.splitlines()[-1].split()[1])
    assert 0 < done <= 20 and outcome.out.endswith(
        f"stopped; {done} of 29 images are in finished shards; go on with --resume\n"
    )
    assert not list((tmp_path / "out").glob(".*"))
    outcome = lomar("prepare", "--out", tmp_path / "out", "--resume --workers 0")
    assert outcome.out.startswith(f"29 images, from {done} on: ") and contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("when", ["first shard", "third shard", "index"])
def test_a_full_disk_is_one_line_and_loses_no_finished_shard(
    lomar: Command, album: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    real = writing._Tar._write

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self: Any, data: bytes) -> None:
        name = {"first shard": "000000", "third shard": "000002"}.get(when)
        (full if name and name in self._path.name and self._end > 3000 else real)(self, data)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(writing._Tar, "_write", write)
        if when == "index":
            patched.setattr(writing, "write_index", full)
        message = refused(lomar("prepare", "--data", album, "--out", out, SMALL))
    assert message == f"--out {out} cannot be written: No space left on device; --resume goes on when it can"
    assert len(list(out.glob("*.tar"))) == {"first shard": 0, "third shard": 2}.get(
        when, len(list(whole.glob("*.tar")))
    )
    assert not list(out.glob(".*"))
    assert lomar("prepare", "--out", out, "--resume --workers 0").status == 0
    assert contents(out) == contents(whole)


# Bad files, bad words


def test_bad_files_are_skipped_and_listed_with_the_reason(lomar: Command, album: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    for path in album.glob("a/*"):
        (data / "a" / path.name).write_bytes(path.read_bytes())
    (data / "a" / "05 no.jpg").write_bytes(b"nothing")
    (data / "zz.png").write_bytes(b"")
    outcome = lomar("prepare", "--data", data, "--out", tmp_path / "out", SMALL)
    assert outcome.status == 0
    assert outcome.out.endswith(f"2 of 17 images cannot be read, listed in {tmp_path / 'out' / 'bad_files.txt'}\n")
    assert (tmp_path / "out" / "bad_files.txt").read_text() == (
        f"{data}/a/05 no.jpg\tthe content is not an image, despite .jpg\n{data}/zz.png\tempty file\n"
    )
    assert len(open_source(str(tmp_path / "out"))) == 15


def test_too_many_bad_files_end_it_and_a_higher_share_goes_on(lomar: Command, album: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in album.glob("a/*"):
        (data / path.name).write_bytes(path.read_bytes())
    for number in range(9):
        (data / f"z{number}.jpg").write_bytes(b"nothing")
    out = tmp_path / "out"
    message = refused(lomar("prepare", "--data", data, "--out", out, SMALL))
    assert "of 24 images cannot be read, for example" in message and "--max-bad-share allows 25%" in message
    assert message.endswith(", and with more of it --resume goes on")
    assert lomar("prepare", "--out", out, "--resume --workers 0 --max-bad-share 0.5").status == 0
    assert len((out / "bad_files.txt").read_text().splitlines()) == 9
    for path in album.glob("a/*"):
        (data / path.name).unlink()
    message = refused(lomar("prepare", "--data", data, "--out", tmp_path / "none", SMALL, "--max-bad-share 1"))
    assert message.startswith("--data: none of 9 images can be read, for example")
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_is_one_line_and_leaves_all_as_it_was(
    lomar: Command, album: Path, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "empty").mkdir()
    before = contents(whole)
    for words, message in (
        (("--data", album), "--out is missing; see lomar prepare --help"),
        (("--out", tmp_path / "x"), "--data is missing: a folder of images"),
        (("--data", tmp_path / "gone", "--out", tmp_path / "x"), "no such folder or file"),
        (("--data", tmp_path / "empty", "--out", tmp_path / "x"), "no image in this folder"),
        (("--data", whole, "--out", tmp_path / "x"), "these images are prepared already; give the originals"),
        (("--data", whole / "a", "--out", tmp_path / "x"), "these images are prepared already; give the originals"),
        (("--data", album, "--out", whole), "already holds prepared images; --overwrite replaces them"),
        (("--data", album, "--out", tmp_path / "full"), "holds something else; give a new folder"),
        (("--data", album, "--out", tmp_path / "full" / "thesis.tex"), "is a file; it must be a folder"),
        (("--data", album, "--out", tmp_path / "full" / "thesis.tex" / "x"), "cannot be written: Not a directory"),
        (("--data", album, "--out", tmp_path / ("x" * 300)), "cannot be written: File name too long"),
        (("--data", "x" * 300, "--out", tmp_path / "x"), "File name too long"),
        (("--out", tmp_path / ("x" * 300), "--verify"), "holds no prepared images"),
        (("--data", album, "--out", album / "small"), "give a folder beside it"),
        (("--data", album, "--out", tmp_path / "x", "--encoding raw --quality 90"), "--quality is of --encoding jpeg"),
        (("--data", album, "--out", tmp_path / "x", "--encoding png"), "it can be jpeg, raw"),
        (("--out", tmp_path / "x", "--resume"), "holds nothing to resume; leave --resume out to begin"),
        (("--out", whole, "--resume --short-side 99"), "--short-side is 99, but"),
        (("--out", whole, "--resume --overwrite"), "--resume and --overwrite are both given"),
        (("--out", tmp_path / "x", "--verify"), "holds no prepared images"),
    ):
        assert message in refused(lomar("prepare", *words, "--workers 0")), words
        assert not (tmp_path / "x").exists()
    assert contents(whole) == before and [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_other_options_and_other_files_are_no_continuation(
    lomar: Command, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    data.mkdir()
    for path in album.glob("a/*"):
        (data / path.name).write_bytes(path.read_bytes())
    with monkeypatch.context() as patched:
        patched.setattr(writing, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert lomar("prepare", "--data", data, "--out", out, SMALL).status == 130
    message = refused(lomar("prepare", "--out", out, "--resume --encoding raw"))
    assert message == f"--encoding is 'raw', but {out} has 'jpeg'; --overwrite starts anew"
    (data / "new.png").write_bytes((album / "a" / "04.png").read_bytes())
    assert "other files than when" in refused(lomar("prepare", "--out", out, "--resume"))
    assert lomar("prepare", "--data", data, "--out", out, SMALL, "--overwrite").status == 0
    assert len(open_source(str(out))) == 16


def test_overwriting_replaces_shards_and_nothing_else(lomar: Command, album: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert lomar("prepare", "--data", album, "--out", out, SMALL, "--encoding raw --shard-mb 0.02").status == 0
    (out / "labels.csv").write_text("mine")
    assert lomar("prepare", "--data", album, "--out", out, SMALL, "--overwrite").status == 0
    assert contents(out) == contents(whole) | {"labels.csv": b"mine"}


def test_a_damaged_shard_is_found_by_verify(lomar: Command, album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert lomar("prepare", "--data", album, "--out", out, SMALL).status == 0
    with (out / "shard-000001.tar").open("r+b") as file:
        file.seek(3000)
        file.write(b"!!!!")
    message = refused(lomar("prepare", "--out", out, "--verify"))
    assert message == (
        f"--out {out}: {out / 'shard-000001.tar'} changed since it was written; copy it again, or prepare anew"
    )


# The commands that read it


@pytest.fixture(scope="module")
def arrays(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs of the other tests, which are PNG and small, as arrays: no bit of a pixel changes."""
    out = tmp_path_factory.mktemp("arrays") / "out"
    words = ["prepare", "--data", str(photos), "--out", str(out), "--encoding", "raw", "--workers", "0"]
    assert main(words) == 0
    return out


def test_pretraining_is_the_same_from_the_arrays_of_images(
    pretrain: Command, arrays: Path, tmp_path: Path, course: Callable[[Path], Any]
) -> None:
    assert pretrain(tmp_path / "one", "--max-steps 3").status == 0
    assert pretrain(tmp_path / "other", "--data", arrays, "--max-steps 3 --workers 2").status == 0
    assert course(tmp_path / "one") == course(tmp_path / "other")


def test_resuming_on_images_that_were_prepared_otherwise_is_refused(
    pretrain: Command, lomar: Command, photos: Path, arrays: Path, tmp_path: Path, interrupted_at: Callable[[int], None]
) -> None:
    interrupted_at(2)
    pretrain(tmp_path / "run", "--data", arrays, "--max-steps 4 --checkpoint-steps 1")
    other = tmp_path / "other"
    words = "--encoding raw --short-side 20 --workers 0"
    assert lomar("prepare", "--data", photos, "--out", other, words).status == 0
    outcome = lomar("pretrain --resume --out", tmp_path / "run", "--data", other)
    assert refused(outcome).startswith("the images are not those that the run in")
    assert lomar("pretrain --resume --out", tmp_path / "run").status == 0


def test_a_part_of_prepared_images_is_found_again_from_another_folder(
    pretrain: Command, lomar: Command, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(arrays.parent)
    assert pretrain(tmp_path / "run", "--data out/red", "--max-steps 1 --batch-size 2 --micro-batch 2").status == 0
    assert f"data: {arrays}/red\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_every_other_command_reads_it(
    lomar: Command, photos: Path, arrays: Path, finished_run: Path, tmp_path: Path
) -> None:
    """Each gives what it gives for the originals."""

    def both(*words: str | Path) -> None:
        told = []
        for data in (photos, arrays):
            outcome = lomar(
                *(data if word == "DATA" else str(word).replace("OUT", str(tmp_path / data.name)) for word in words)
            )
            assert outcome.status == 0, outcome.err
            said = outcome.out.replace(str(data), "DATA").replace(str(tmp_path / data.name), "OUT")
            told.append(re.sub(r"\d+ images a second", "", said))
        assert told[0] == told[1]

    both("knn --model", finished_run, "--data", "DATA", "--k 1", TINY)
    for data in (photos, arrays):
        out = tmp_path / f"{data.name}.npz"
        assert lomar("embed --model", finished_run, "--data", data, "--out", out, TINY).status == 0
        outcome = lomar("map --embedding", out, "--out", tmp_path / f"{data.name}.png", "--method pca")
        assert outcome.status == 0 and "cannot be read" not in outcome.out
    one, other = (read_embedding(tmp_path / f"{data.name}.npz") for data in (photos, arrays))
    np.testing.assert_array_equal(one.features, other.features)
    assert one.paths == other.paths and other.root == str(arrays)
    maps = [(tmp_path / f"{data.name}.png").read_bytes() for data in (photos, arrays)]
    nearest = [(tmp_path / f"{data.name}-nearest.png").read_bytes() for data in (photos, arrays)]
    assert maps[0] == maps[1] and nearest[0] == nearest[1]
    both("reconstruct --model", finished_run, "--images", "DATA", "--out", "OUT-made.png")
    pictures = [(tmp_path / f"{data.name}-made.png").read_bytes() for data in (photos, arrays)]
    assert pictures[0] == pictures[1]


def test_a_classifier_is_trained_judged_and_asked_on_it(
    lomar: Command, photos: Path, arrays: Path, finished_run: Path, no_pictures: None, tmp_path: Path
) -> None:
    settings = "--batch-size 4 --micro-batch 4 --epochs 1 --device cpu --precision fp32 --workers 0"
    for data, name in ((photos, "one"), (arrays, "other")):
        run = tmp_path / name
        outcome = lomar("finetune --model", finished_run, "--data", data, "--out", run, settings)
        assert outcome.status == 0, outcome.err
        outcome = lomar("evaluate --model", run, "--data", data, "--out", tmp_path / f"judged-{name}", "--device cpu")
        assert outcome.status == 0, outcome.err
        table = tmp_path / f"{name}.csv"
        outcome = lomar("predict --model", run, "--images", data / "red", "--out", table, "--device cpu")
        assert outcome.status == 0, outcome.err
    found = [json.loads((tmp_path / f"judged-{name}" / "evaluation.json").read_text()) for name in ("one", "other")]
    assert found[0]["top1"] == found[1]["top1"] and found[0]["val_loss"] == found[1]["val_loss"]
    one, other = ((tmp_path / f"{name}.csv").read_text() for name in ("one", "other"))
    assert one == other.replace(str(arrays), str(photos)) and one.count("\n") == 5
