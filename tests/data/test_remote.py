"""Claims about shards at addresses, told by a server in this process that fails when it is asked to."""

import errno
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import PIL.Image
import pytest
import torch

from lomar.data import ahead, archives, cache, fetching
from lomar.data import order as order_module
from lomar.data.archives import RemoteTars
from lomar.data.decode import PixelFormat
from lomar.data.labels import labelled_data
from lomar.data.loader import Batching, CropPlan, MicroBatch, SampleKey, pretraining_batches
from lomar.data.opening import folders_in, is_there, open_source
from lomar.data.shard_writer import ShardWriter
from lomar.data.sources import ImageSource, joined
from lomar.data.survey import spread_over, survey
from lomar.data.tars import TarIndex
from lomar.errors import UserError

COUNTS = (5, 4, 6, 5, 3, 5, 4, 5)


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (19, 23, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tar(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def shards() -> dict[str, bytes]:
    """Eight tar files of a few images each, of two classes."""
    starts = np.cumsum((0, *COUNTS)).tolist()
    return {
        f"x-{shard}.tar": tar(
            *((f"{'ab'[n % 2]}/{n:02}.png", picture(n)) for n in range(starts[shard], starts[shard + 1]))
        )
        for shard in range(len(COUNTS))
    }


class Server:
    """Files by HTTP. `fails[name]` holds what is done instead to the next GETs of a file: a status, "cut" or "more"."""

    def __init__(self) -> None:
        self.files = shards()
        self.version: dict[str, str] = {}
        self.fails: dict[str, list[Any]] = {}
        self.got: list[str] = []
        self.slow_s = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, with_content: bool) -> None:
                name = self.path.lstrip("/").partition("?")[0]
                content = server.files.get(name)
                if name == "" or name.endswith("/"):
                    links = (each for each in server.files if each.startswith(name))
                    content = "".join(f'<a href="{each.removeprefix(name)}">x</a>' for each in links).encode()
                what = None
                if with_content and name:
                    server.got.append(name)
                    time.sleep(server.slow_s if name.endswith(".tar") else 0)
                    what = server.fails[name].pop(0) if server.fails.get(name) else None
                if content is None or isinstance(what, int):
                    self.send_error(what if isinstance(what, int) else 404)
                    return
                self.send_response(200)
                if what != "more":  # as much again, until the connection ends
                    self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", server.version.get(name, "first"))
                self.end_headers()
                if what == "more":
                    self.wfile.write(content * 2)
                elif with_content:
                    self.wfile.write(content[: len(content) // 2] if what == "cut" else content)

            def log_message(self, *_: Any) -> None:
                pass

        class Patient(ThreadingHTTPServer):
            request_queue_size = 64  # of as many connections at once

        self._server = Patient(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.all = f"{self.address}/x-{{0..7}}.tar"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def tars_got(self) -> list[str]:
        return sorted(name for name in self.got if name.endswith(".tar"))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the cache."""
    monkeypatch.setenv("LOMAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOMAR_CACHE_GB", raising=False)
    monkeypatch.setattr(fetching, "_FIRST_WAIT_S", 0.002)
    return tmp_path / "cache"


def contents(source: ImageSource) -> list[bytes]:
    return [bytes(source.read(number)) for number in range(len(source))]


def kept(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "shards").iterdir())


EVERYTHING = [picture(number) for number in range(sum(COUNTS))]


# What is there


@pytest.mark.parametrize("rest", ["/x-{0..7}.tar", "/x-*.tar", "/", "", "/x-{0..7}.tar?token=1"])
def test_braces_wildcards_and_folders_at_an_address_are_the_images_of_their_tars(server: Server, rest: str) -> None:
    source = open_source(server.address + rest)
    assert contents(source) == EVERYTHING
    assert server.tars_got() == sorted(server.files)  # each once, to be counted and to be read
    assert source.name(5).endswith(f"/x-1.tar{'?***' if '?' in rest else ''}/b/05.png")
    assert os.fsdecode(source.path(5)).endswith(f"/x-1.tar{rest.partition('.tar')[2]}/b/05.png")


def test_another_file_system_of_fsspec_is_read_alike() -> None:
    system = fsspec.filesystem("memory")
    for name, content in shards().items():
        system.pipe_file(f"/lomar-test/{name}", content)
    try:
        for name in ("memory://lomar-test/x-{0..7}.tar", "memory://lomar-test/*.tar", "memory://lomar-test"):
            assert contents(open_source(name)) == EVERYTHING
    finally:
        system.rm("/lomar-test", recursive=True)


def test_a_second_start_fetches_nothing(server: Server) -> None:
    before = open_source(server.all)
    server.got.clear()
    again = open_source(server.all)
    assert contents(again) == EVERYTHING and again.fingerprint() == before.fingerprint()
    assert server.tars_got() == []


def test_a_shard_that_has_changed_is_fetched_anew(server: Server) -> None:
    assert len(open_source(server.all)) == sum(COUNTS)
    server.files["x-3.tar"] = tar(("other.png", picture(99)))
    server.version["x-3.tar"] = "second"
    server.got.clear()
    assert len(open_source(server.all)) == sum(COUNTS) - 4 and server.tars_got() == ["x-3.tar"]


def test_what_is_told_beside_the_shards_need_not_be_counted(server: Server) -> None:
    server.files["sizes.json"] = json.dumps({f"x-{n}.tar": count for n, count in enumerate(COUNTS)}).encode()
    source = open_source(server.all)
    assert len(source) == sum(COUNTS) and server.tars_got() == []
    assert source.read(0) == EVERYTHING[0] and server.tars_got() == ["x-0.tar"]
    assert contents(source) == EVERYTHING


def test_images_are_counted_without_their_places_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred million would take some GB; here a million."""

    def found(shard: fetching.RemoteShard) -> TarIndex:
        numbers = np.arange(1, 10_001)
        return TarIndex(b"0123456789ab.jpg" * 10_000, 16 * numbers, 1024 * numbers, np.full(10_000, 500))

    monkeypatch.setattr(archives, "remote_index", found)
    monkeypatch.setattr(archives, "_told_counts", lambda shards: [None] * len(shards))
    shards = [fetching.RemoteShard(f"https://host/{number}.tar", 10**9, "") for number in range(100)]
    tracemalloc.start()
    assert archives._counts(shards, "--data x").tolist() == [10_000] * 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 10**6


def test_img2dataset_tells_it_too(server: Server) -> None:
    for number, count in enumerate(COUNTS):
        server.files[f"x-{number}_stats.json"] = json.dumps({"count": 99, "successes": count}).encode()
    assert len(open_source(server.all)) == sum(COUNTS) and server.tars_got() == []


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"[1]", b'{"x-0.tar": "5"}', b'{"x-0.tar": true}'])
def test_what_is_told_in_another_form_is_passed_over(server: Server, content: bytes) -> None:
    server.files["sizes.json"] = content
    assert len(open_source(server.all)) == sum(COUNTS)


def test_a_count_that_cannot_be_is_refused(server: Server) -> None:
    server.files["sizes.json"] = b'{"x-0.tar": 1000000000}'
    with pytest.raises(UserError, match=r"x-0\.tar is said to hold 1000000000 images, which .* bytes cannot"):
        open_source(server.all)


def test_images_that_a_count_promised_in_vain_are_unreadable_and_others_come_instead(server: Server) -> None:
    told = {f"x-{number}.tar": count + 2 for number, count in enumerate(COUNTS)}
    server.files["sizes.json"] = json.dumps(told).encode()
    source = open_source(server.all)
    assert len(source) == sum(COUNTS) + 16 and source.read(7) == EVERYTHING[5]
    with pytest.raises(OSError, match="the tar file holds 5 images and not 7, as is told of it"):
        source.read(5)
    assert source.name(5).endswith("x-0.tar/00000005")
    found = batches(source)
    assert all(len(part.names) == 4 for part in found) and any(part.bad for part in found)
    listed = source.listed()
    assert listed.read(7) == EVERYTHING[5]
    with pytest.raises(OSError):
        listed.read(5)


def test_labels_and_folders_are_found_in_the_shards(server: Server) -> None:
    assert folders_in(server.all, "--data") == ["a", "b"]
    data = labelled_data(server.all, seed=0)
    assert data.classes == ["a", "b"] and len(data.train) + len(data.val) == sum(COUNTS)
    part = open_source(f"{server.all}/a")
    assert contents(part) == EVERYTHING[::2] and part.name(0) == f"{server.address}/x-0.tar/a/00.png"
    assert contents(open_source(f"{server.address}/x-0.tar/a/02.png")) == [EVERYTHING[2]]
    assert not is_there(server.all)  # is no path that could be made absolute


def test_subsets_and_joins_read_what_their_parts_read(server: Server, tmp_path: Path) -> None:
    source = open_source(server.all)
    part = source.subset([30, 3, 4]).subset([2, 0])
    assert isinstance(part, RemoteTars) and contents(part) == [EVERYTHING[4], EVERYTHING[30]]
    assert part.fingerprint() != source.fingerprint()
    assert contents(part.listed()) == contents(part)
    (tmp_path / "a.png").write_bytes(b"a file")
    both = joined([part, open_source(str(tmp_path / "a.png"))])
    assert contents(both) == [EVERYTHING[4], EVERYTHING[30], b"a file"] and both.name(0) == part.name(0)


@pytest.fixture
def prepared(server: Server, tmp_path: Path) -> str:
    """The address of a prepared folder."""
    names = [b"train/a/0.png", b"train/b/1.png", b"train/a/2.png", b"train/b/3.png", b"train/a/4.png"]
    names += [b"val/a/5.png", b"val/b/6.png", b"val/b/7.png"]
    writer = ShardWriter.begin(tmp_path / "small", {"shard_mb": 0.012})
    for number, name in enumerate(names):
        writer.add(number, name.decode(), picture(number))
    writer.finish(len(names), {}, names.__getitem__, "0.1")
    for path in (tmp_path / "small").iterdir():
        server.files[f"small/{path.name}"] = path.read_bytes()
    shutil.rmtree(tmp_path / "small")
    return f"{server.address}/small"


def test_tar_files_of_prepared_folders_given_together_need_not_be_counted(server: Server, prepared: str) -> None:
    """`lomar prepare` tells beside them what each holds."""
    source = open_source(f"{prepared}/shard-{{000000..000001}}.tar")
    assert len(source) == 8 and server.tars_got() == []


def test_a_prepared_folder_at_an_address_is_read_by_its_index(server: Server, prepared: str) -> None:
    source = open_source(prepared)
    assert source.name(6) == f"{prepared}/shard-000001.tar/val/b/6.png"
    assert server.tars_got() == [] and len(source) == 8
    assert contents(source) == EVERYTHING[:8]
    assert server.tars_got() == ["small/shard-000000.tar", "small/shard-000001.tar"]
    assert contents(open_source(f"{prepared}/val")) == EVERYTHING[5:8]
    assert contents(open_source(f"{prepared}/val/b/6.png")) == EVERYTHING[6:7]
    data = labelled_data(prepared, seed=0)
    assert data.classes == ["a", "b"] and not data.drawn
    with pytest.raises(UserError, match="no such folder or file"):
        open_source(f"{prepared}/test")


def test_a_shard_that_is_not_what_was_prepared_is_not_read(server: Server, prepared: str) -> None:
    name = "small/shard-000000.tar"
    server.files[name] = server.files[name][:700] + b"?" + server.files[name][701:]
    source = open_source(prepared)
    with pytest.raises(OSError, match="its content is not what lomar prepare wrote"):
        source.read(0)
    assert source.read(7) == EVERYTHING[7]


# What fails


@pytest.mark.parametrize("failures", [[500, 503], ["cut"], [429, "cut", 500]])
def test_a_failure_that_passes_is_no_failure(server: Server, failures: list[Any], folder: Path) -> None:
    server.fails["x-2.tar"] = list(failures)
    assert contents(open_source(server.all)) == EVERYTHING
    assert server.tars_got().count("x-2.tar") == len(failures) + 1
    assert kept(folder) == [".tar"] * 8


def told_beside(server: Server) -> ImageSource:
    server.files["sizes.json"] = json.dumps({f"x-{n}.tar": count for n, count in enumerate(COUNTS)}).encode()
    return open_source(server.all)


@pytest.mark.parametrize(
    ("failures", "tries", "message"),
    [
        ([500] * 99, 6, "cannot be fetched in 6 tries: the server answers 500"),
        (["cut"] * 99, 6, "cannot be fetched in 6 tries: "),
        ([404], 1, "there is no such file"),
        ([403], 1, "may not be read"),
        ([418], 1, "cannot be fetched: the server answers 418"),
    ],
)
def test_what_cannot_be_fetched_is_unreadable_and_not_asked_for_again_for_a_while(
    server: Server, folder: Path, failures: list[Any], tries: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = told_beside(server)
    server.fails["x-1.tar"] = list(failures)
    for index in (5, 6, 7, 5):
        with pytest.raises(OSError, match=message) as caught:
            source.read(index)
        assert "\n" not in str(caught.value)
    assert server.tars_got() == ["x-1.tar"] * tries and kept(folder) == [".failed"]
    server.fails.clear()
    monkeypatch.setattr(fetching, "_FORGIVEN_S", 0.0)
    assert source.read(5) == EVERYTHING[5] and kept(folder) == [".tar"]


def test_a_start_asks_anew_for_what_an_earlier_one_could_not_fetch(server: Server) -> None:
    server.fails["x-1.tar"] = [404]
    with pytest.raises(OSError, match="there is no such file"):
        told_beside(server).read(5)
    assert told_beside(server).read(5) == EVERYTHING[5]


def test_a_failure_that_comes_later_by_a_clock_set_back_is_not_remembered(server: Server, folder: Path) -> None:
    source = told_beside(server)
    server.fails["x-1.tar"] = [404]
    with pytest.raises(OSError, match="there is no such file"):
        source.read(5)
    (failed,) = (folder / "shards").glob("*.failed")
    os.utime(failed, (time.time() + 1e5, time.time() + 1e5))
    assert source.read(5) == EVERYTHING[5]


def test_a_server_that_sends_more_than_it_said_is_not_listened_to(server: Server) -> None:
    """Without a length; asked again it would do the same."""
    source = told_beside(server)
    server.fails["x-0.tar"] = ["more"] * 99
    with pytest.raises(OSError, match=rf"cannot be fetched: more than {len(server.files['x-0.tar']):,} bytes come"):
        source.read(0)
    assert server.tars_got() == ["x-0.tar"] and source.read(5) == EVERYTHING[5]


def test_of_a_server_that_is_gone_one_line_says_so(server: Server) -> None:
    source = told_beside(server)
    server.close()
    with pytest.raises(OSError, match="cannot be fetched in 6 tries"):
        source.read(0)
    with pytest.raises(UserError, match=r"^--data http://127.*cannot be fetched in 6 tries") as caught:
        open_source(server.all)
    assert "\n" not in str(caught.value)


def test_an_image_of_a_lost_shard_is_replaced_alike_everywhere_by_few_others(server: Server) -> None:
    source = told_beside(server)
    server.fails["x-1.tar"] = [404] * 99
    found = batches(source, 6)
    bad = {name for part in found for name, _ in part.bad}
    assert bad and all("/x-1.tar/" in name for name in bad)
    assert all(len(part.names) == 4 and not set(part.names) & bad for part in found)
    assert_same(found, batches(open_source(server.all), 6, workers=2))


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("/gone.tar", "there is no such file"),
        ("/x-{0..9}.tar", r"127\.0\.0\.1:\d+/x-8\.tar: there is no such file"),
        ("/gone-*.tar", "no tar file is there"),
        ("/nothing/", "no tar file is there"),
        ("/x-0.tar.gz", r"plain \.tar files, not \.tar\.gz"),
        ("/x-{0..99999999}.tar", "more than 100,000 names"),
        ("/x-0.tar/nothing", "no such folder or file in the tar files"),
        ("/text.tar", "is no tar file"),
        ("/empty.tar", "no image in these tar files"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(server: Server, rest: str, message: str) -> None:
    server.files |= {"text.tar": b"a page of text " * 99, "empty.tar": bytes(1024)}
    with pytest.raises(UserError, match=message) as caught:
        open_source(server.address + rest, "--images")
    assert str(caught.value).startswith(f"--images {server.address}{rest}: ") and "\n" not in str(caught.value)


def test_keys_in_an_address_are_not_told(server: Server) -> None:
    address = server.all.replace("http://", "http://user:word@") + "?sign=secret"
    source = open_source(address)
    assert contents(source) == EVERYTHING and source.name(0).endswith("/x-0.tar?***/a/00.png")
    server.fails["x-0.tar"], server.files["y.tar"] = [403], b"no tar file"
    shutil.rmtree(cache.cache_folder())
    with pytest.raises(UserError) as caught:
        open_source(address)
    told = [str(caught.value)]
    for rest in ("/gone.tar", "/y.tar", "/x-0.tar/none"):
        with pytest.raises(UserError) as caught:
            open_source(address.partition("/x-")[0] + rest.replace(".tar", ".tar?sign=secret"))
        told.append(str(caught.value))
    server.close()
    with pytest.raises(UserError) as caught:
        open_source(address)
    told.append(str(caught.value))
    assert all("***@127.0.0.1" in line and "word" not in line and "secret" not in line for line in told)


def missing(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return True
    return False


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nothing://x/y.tar", "nothing:// is no protocol that fsspec knows"),
        ("file:///x/y.tar", "give the path alone, /x/y.tar"),
        ("https://", "the name of a host or bucket must follow ://"),
        ("https:///y.tar", "the name of a host or bucket must follow ://"),
        ("http://127.0.0.1:99999/y.tar", "cannot be fetched: Port out of range"),
        ("reference://y.tar", "missing 1 required positional argument"),
        *[
            pytest.param(
                f"{name}://x/y.tar",
                rf"pip install 'lomar\[{name}\]'",
                marks=pytest.mark.skipif(not absent, reason="is there"),
            )
            for name, absent in (("s3", missing("s3fs")), ("gs", missing("gcsfs")))
        ],
    ],
)
def test_a_protocol_that_cannot_be_used_is_told(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_source(address)
    assert "\n" not in str(caught.value)


# The cache


def test_of_two_processes_that_want_a_shard_one_fetches_it(server: Server, folder: Path) -> None:
    server.slow_s = 0.7
    code = (
        "import sys; from lomar.data.opening import open_source; s = open_source(sys.argv[1]);"
        "assert len(s) == 5 and s.read(3); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, f"{server.address}/x-0.tar"]
    started = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in started] == [0, 0]
    assert server.tars_got() == ["x-0.tar"] and kept(folder) == [".tar"]


def test_of_threads_that_want_a_shard_one_fetches_it(server: Server) -> None:
    source = told_beside(server)
    server.slow_s = 0.1
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, [0, 1, 2, 3, 4] * 4)) == EVERYTHING[:5] * 4
    assert server.tars_got() == ["x-0.tar"]


def test_one_that_does_not_wait_leaves_it_to_whoever_fetches(server: Server) -> None:
    shard = fetching.shard_at(f"{server.address}/x-0.tar")
    server.slow_s = 0.3
    thread = threading.Thread(target=shard.fetch)
    thread.start()
    while not server.got:
        time.sleep(0.01)
    began = time.monotonic()
    shard.fetch(wait=False)
    assert time.monotonic() - began < 0.2 and not shard.file.exists()
    thread.join()
    assert shard.file.exists()


def test_what_was_not_read_for_longest_is_deleted_first(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = told_beside(server)
    sizes = [len(server.files[f"x-{number}.tar"]) for number in (0, 2, 3)]
    monkeypatch.setenv("LOMAR_CACHE_GB", str((sum(sizes) + 500) / 1e9))
    for index in (0, 5, 9):  # of shards 0, 1, 2
        source.read(index)
        time.sleep(0.01)
    source.read(0)
    time.sleep(0.01)
    source.read(15)
    server.got.clear()
    source.read(0)
    assert server.got == []
    source.read(5)
    assert server.got == ["x-1.tar"] and len(kept(folder)) == 3


def test_who_reads_a_shard_that_is_deleted_reads_on(server: Server) -> None:
    shard = fetching.shard_at(f"{server.address}/x-0.tar")
    file = shard.open()
    shard.file.unlink()
    assert os.pread(file, len(server.files["x-0.tar"]), 0) == server.files["x-0.tar"]
    os.close(file)


def test_a_damaged_shard_in_the_cache_is_fetched_anew(server: Server) -> None:
    shard = fetching.shard_at(f"{server.address}/x-0.tar")
    shard.fetch()
    os.truncate(shard.file, 700)
    assert contents(open_source(f"{server.address}/x-0.tar")) == EVERYTHING[:5]
    assert server.tars_got() == ["x-0.tar"] * 2


def test_a_shard_larger_than_the_cache_is_unreadable(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    source = told_beside(server)
    monkeypatch.setenv("LOMAR_CACHE_GB", "0.000001")
    with pytest.raises(OSError, match="more than LOMAR_CACHE_GB allows"):
        source.read(0)


def test_when_it_may_be_larger_it_is_fetched(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    source = told_beside(server)
    monkeypatch.setenv("LOMAR_CACHE_GB", "0.000001")
    with pytest.raises(OSError, match="more than LOMAR_CACHE_GB allows"):
        source.read(0)
    monkeypatch.delenv("LOMAR_CACHE_GB")
    assert source.read(0) == EVERYTHING[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_no_fault_of_the_server(
    server: Server, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked once, and again when there is room."""
    monkeypatch.setenv("LOMAR_CACHE", str(small_disk))
    server.files["x-0.tar"] += bytes(5_000_000)
    source = told_beside(server)
    for _ in range(2):
        server.got.clear()
        with pytest.raises(OSError, match=f"cannot be kept in {small_disk}: No space left on device"):
            source.read(0)
        assert server.tars_got() == ["x-0.tar"] and kept(small_disk) == []
    server.files["x-0.tar"] = server.files["x-0.tar"][:-4_000_000]
    assert told_beside(server).read(0) == EVERYTHING[0]


def test_where_a_file_system_has_no_locks_two_that_fetch_a_shard_both_have_it(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    source = told_beside(server)
    server.slow_s = 0.2
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(source.read, [0, 1])) == EVERYTHING[:2]
    assert server.tars_got() == ["x-0.tar"] * 2 and kept(folder) == [".tar"]


def test_a_process_forked_while_a_shard_is_fetched_does_not_keep_its_lock(server: Server) -> None:
    shard = fetching.shard_at(f"{server.address}/x-0.tar")
    server.slow_s = 0.3
    thread = threading.Thread(target=shard.fetch)
    thread.start()
    while not server.got:
        time.sleep(0.01)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    thread.join()
    shard.file.unlink()
    shard.fetch(wait=False)
    assert shard.file.exists()
    child.kill()
    child.join()


def test_what_a_killed_process_left_is_deleted_and_what_others_fetch_counts(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = told_beside(server)
    source.read(0)
    for name in ("old", "new"):
        (folder / "shards" / f"{name}.part").write_bytes(bytes(20_000))
    os.utime(folder / "shards" / "old.part", (time.time() - 2 * cache._ABANDONED_S,) * 2)
    monkeypatch.setenv("LOMAR_CACHE_GB", str((20_000 + len(server.files["x-1.tar"])) / 1e9))
    source.read(5)
    assert not (folder / "shards" / "old.part").exists() and kept(folder) == [".part", ".tar"]


def test_the_cache_may_be_deleted_while_a_shard_comes(server: Server, folder: Path) -> None:
    source = told_beside(server)
    server.slow_s = 0.2

    def delete() -> None:
        while not server.tars_got():
            time.sleep(0.01)
        shutil.rmtree(folder)

    thread = threading.Thread(target=delete)
    thread.start()
    assert source.read(0) == EVERYTHING[0]
    thread.join()


def test_an_index_that_was_damaged_in_the_cache_is_fetched_anew(server: Server, prepared: str) -> None:
    assert len(open_source(prepared)) == 8
    kept_file = fetching.shard_at(f"{prepared}/index.safetensors").file
    os.truncate(kept_file, 50)
    assert len(open_source(prepared)) == 8
    size = kept_file.stat().st_size
    kept_file.write_bytes(bytes(size))
    with pytest.raises(UserError, match="is damaged"):
        open_source(prepared)
    assert len(open_source(prepared)) == 8


def test_several_are_worked_on_at_once_in_order_and_none_after_an_error() -> None:
    assert list(fetching.at_once(lambda number: number**2, range(100))) == [number**2 for number in range(100)]
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.02)
        return 6 // (3 - number)

    with pytest.raises(ZeroDivisionError):
        list(fetching.at_once(work, range(1000), threads=4))
    time.sleep(0.1)
    assert len(begun) < 20


def test_who_stops_a_run_that_counts_its_images_waits_for_no_shard(server: Server, tmp_path: Path) -> None:
    server.slow_s = 20.0
    command = [sys.executable, "-m", "lomar", "pretrain", "--data", server.all, "--out", str(tmp_path / "run")]

    def listen() -> None:  # a shell's background job passes on that Ctrl-C is none of its business
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    while not server.tars_got() and run.poll() is None:
        time.sleep(0.05)
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60)[1] == "lomar: interrupted\n" and run.returncode == 130
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("limit", ["a lot", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("LOMAR_CACHE_GB", limit)
    with pytest.raises(UserError, match=f"LOMAR_CACHE_GB is '{limit}'; it must be a number of gigabytes above 0"):
        open_source(server.all)


def test_where_nothing_can_be_kept_one_line_says_so(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOMAR_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\); set LOMAR_CACHE to a folder that can"):
        open_source(server.all)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOMAR_CACHE", "~/here")
    assert cache.cache_folder() == Path.home() / "here"
    monkeypatch.delenv("LOMAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache.cache_folder() == Path("/there/lomar")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.cache_folder() == Path.home() / ".cache" / "lomar"


# Training


class OneWindow:
    def __call__(self, key: SampleKey) -> dict[str, torch.Tensor]:
        return {"corners": torch.tensor([[0, 1]])}


def batches(source: ImageSource, total: int = 12, **options: Any) -> list[MicroBatch]:
    batching = Batching(3, 4, **({"micro_batch": 8, "total_batches": total} | options))
    fmt, plan = PixelFormat(3, "uint8"), CropPlan(16, (0.2, 1.0))
    return list(
        pretraining_batches(source, fmt, OneWindow(), plan=plan, patch_size_px=4, view_size=(2, 3), batching=batching)
    )


def parts_of(found: list[MicroBatch]) -> list[tuple[list[str], bytes]]:
    return [(part.names, part.inputs["pixels"].numpy().tobytes()) for part in found]


def assert_same(found: list[MicroBatch], others: list[MicroBatch]) -> None:
    assert parts_of(found) == parts_of(others)


def test_a_run_meets_the_same_whatever_reads_it_and_wherever_it_begins(server: Server, folder: Path) -> None:
    whole = batches(open_source(server.all))
    assert len({name for part in whole[:9] for name in part.names}) == 36  # two lanes, nothing twice in an epoch
    assert_same(whole, batches(open_source(server.all), workers=2))
    shutil.rmtree(folder)
    assert_same(whole[5:], batches(open_source(server.all), first_batch=5))
    shares = [parts_of(batches(open_source(server.all), rank=rank, world_size=2)) for rank in range(2)]
    together = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*shares, strict=True)]
    assert together == parts_of(whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_shards_that_come_next_are_fetched_meanwhile(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    source = told_beside(server)
    order = order_module.order_of(source, 3, 4, pooled_gb=1e-9)  # a pool is one shard, of one lane
    assert isinstance(order, order_module.Lanes) and (order.lanes, order.pooled) == (1, 1)
    batches(source, 1, workers=workers, shuffle_gb=1e-9)
    needed = {shard.path for some in (*order.needed(0, 0), *order.needed(0, 3)) for shard in some}
    deadline = time.monotonic() + 10
    while len(kept(folder)) < len(needed) and time.monotonic() < deadline and not workers:
        time.sleep(0.01)
    got = {f"{server.address}/{name}" for name in server.tars_got()}
    assert {order.needed(0, 0)[0][0].path} <= got <= needed
    assert workers or got == needed


def test_where_the_disk_is_too_small_for_the_batches_it_is_told(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = told_beside(server)
    monkeypatch.setenv("LOMAR_CACHE_GB", str(1.5 * len(server.files["x-0.tar"]) / 1e9))
    found = batches(source, 3)
    assert "lomar: batches come from shards of 0.0 GB at a time, but LOMAR_CACHE_GB keeps" in capsys.readouterr().err
    monkeypatch.delenv("LOMAR_CACHE_GB")
    assert_same(found, batches(source, 3))


def test_images_on_this_machine_are_read_without_a_look_ahead(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, content in shards().items():
        (tmp_path / "in" / name).write_bytes(content)
    source = open_source(str(tmp_path / "in"))
    dataset: Any = object()
    assert ahead.fetched_ahead(dataset, order_module.order_of(source, 0, 4), range(4)) is dataset
    names = {name for part in batches(source, 9) for name in part.names}
    assert len(names) == 36


def test_a_survey_looks_into_a_few_shards_alone(server: Server) -> None:
    source = told_beside(server)
    assert survey(source, limit=12).probed == 12
    assert server.tars_got() == ["x-0.tar", "x-2.tar", "x-5.tar", "x-7.tar"]
    assert spread_over(source.subset([3, 30, 5]), 9) == [0, 2, 1]


def test_nothing_of_a_network_is_imported_for_files_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(shards()["x-0.tar"])
    code = (
        "import sys; from lomar.data.opening import open_source; assert len(open_source(sys.argv[1])) == 5;"
        "assert not {'torch', 'fsspec', 'aiohttp', 'datasets', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.tar")], check=True)


def test_a_run_from_a_server_goes_on_equal(
    server: Server,
    lomar: Callable[..., Any],
    pretrain: Callable[..., Any],
    interrupted_at: Callable[[int], None],
    course: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    asked = ("--data", server.all, "--max-steps 12 --checkpoint-steps 4")
    assert pretrain(tmp_path / "whole", *asked).status == 0
    interrupted_at(6)
    assert pretrain(tmp_path / "cut", *asked).status == 130
    assert lomar("pretrain --resume --out", tmp_path / "cut").status == 0
    assert course(tmp_path / "cut") == course(tmp_path / "whole")
