"""Claims about shards in an object store, told by moto's imitation of S3 in this process, where that is installed."""

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data.test_remote import COUNTS, EVERYTHING, assert_same, batches, contents, picture, shards, tar

from lomar.data import fetching
from lomar.data.fetching import RemoteShard
from lomar.data.opening import open_source
from lomar.errors import UserError

moto = pytest.importorskip("moto.server", reason="needs moto[s3,server]")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs")

ALL = "s3://bucket/x-*.tar"


def ask(method: str, address: str, content: bytes = b"") -> None:
    """Of the imitation, beside s3fs."""
    plain = {"Content-Type": "text/plain", "Content-Length": str(len(content))}
    urllib.request.urlopen(urllib.request.Request(address, content, plain, method=method), timeout=30).read()


def put(server: str, name: str, content: bytes = b"") -> None:
    """Make a bucket or file."""
    ask("PUT", f"{server}/{name}", content)


def look_at_keys(server: str, after: str) -> None:
    """Refuse keys that are unknown, which are all, after so many requests."""
    ask("POST", f"{server}/moto-api/reset-auth", after.encode())


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an imitation of S3, which holds eight shards in s3://bucket."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    put(address, "bucket")
    for name, content in shards().items():
        put(address, f"bucket/{name}", content)
    yield address
    server.stop()


@pytest.fixture
def store(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its address, which s3fs takes for that of S3."""
    monkeypatch.setenv("LOMAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOMAR_CACHE_GB", raising=False)
    monkeypatch.setattr(fetching, "_FIRST_WAIT_S", 0.002)
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "word",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    return server


def test_wildcards_braces_and_buckets_are_the_images_of_their_shards(store: str) -> None:
    for name in (ALL, "s3://bucket/x-{0..7}.tar", "s3://bucket/x-?.tar", "s3://bucket", "s3://bucket/"):
        source = open_source(name)
        assert contents(source) == EVERYTHING and source.name(5) == "s3://bucket/x-1.tar/b/05.png"
    assert contents(open_source(f"{ALL}/a")) == EVERYTHING[::2]


def test_a_second_start_fetches_nothing(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert contents(open_source(ALL)) == EVERYTHING
    monkeypatch.setattr(RemoteShard, "_fetch", None)
    assert contents(open_source(ALL)) == EVERYTHING


def test_a_shard_that_has_changed_in_the_store_is_fetched_anew(store: str) -> None:
    """Also one of the same length, and though s3fs has listed the bucket before in this process."""
    assert contents(open_source(ALL)) == EVERYTHING
    before, other = shards()["x-3.tar"], picture(15)[:-1] + b"?"
    elsewhere = s3fs.S3FileSystem(skip_instance_cache=True)
    try:
        elsewhere.pipe_file("bucket/x-3.tar", before.replace(picture(15), other))
        assert contents(open_source(ALL)) == [*EVERYTHING[:15], other, *EVERYTHING[16:]]
        elsewhere.pipe_file("bucket/x-3.tar", tar(("other.png", picture(99))))
        assert len(open_source(ALL)) == sum(COUNTS) - COUNTS[3] + 1
    finally:
        elsewhere.pipe_file("bucket/x-3.tar", before)


def test_counts_beside_the_shards_are_found(store: str, tmp_path: Path) -> None:
    for name, content in shards().items():
        put(store, f"bucket/told/{name}", content)
    sizes = {f"x-{number}.tar": count for number, count in enumerate(COUNTS)}
    put(store, "bucket/told/sizes.json", json.dumps(sizes).encode())
    source = open_source("s3://bucket/told")
    assert len(source) == sum(COUNTS) and not list((tmp_path / "cache" / "shards").iterdir())
    assert contents(source) == EVERYTHING


def test_workers_and_any_number_of_processes_meet_the_same(store: str, tmp_path: Path) -> None:
    whole = batches(open_source(ALL), 9)
    assert len({name for part in whole for name in part.names}) == 36
    shutil.rmtree(tmp_path / "cache")
    assert_same(whole, batches(open_source(ALL), 9, workers=2))
    shares = [batches(open_source(ALL), 9, rank=rank, world_size=2) for rank in range(2)]
    assert [a.names + b.names for a, b in zip(*shares, strict=True)] == [part.names for part in whole]


def test_what_is_not_there_is_refused_in_one_line_and_at_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.time, "sleep", None)  # nothing is asked for again
    for name, message in {
        "s3://gone/x-*.tar": "cannot be fetched: the server answers 404 The specified bucket does not exist",
        "s3://gone/x-0.tar": "cannot be fetched: the server answers 404 The specified bucket does not exist",
        "s3://gone": "cannot be fetched: the server answers 404 The specified bucket does not exist",
        "s3://bucket/gone.tar": "there is no such file",
        "s3://bucket/x-{0..9}.tar": "s3://bucket/x-8.tar: there is no such file",
        "s3://bucket/gone-*.tar": "no tar file is there",
        "s3://bucket/gone": "no tar file is there",
    }.items():
        with pytest.raises(UserError) as caught:
            open_source(name)
        assert str(caught.value).startswith(f"--data {name}: ") and str(caught.value).endswith(message)


def test_keys_that_are_wrong_or_missing_are_told_in_one_line_and_at_once(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching.time, "sleep", None)

    def refused(reason: str) -> None:
        s3fs.S3FileSystem.clear_instance_cache()
        for name in (ALL, "s3://bucket/x-0.tar", "s3://bucket"):
            with pytest.raises(UserError, match=rf"^--data {name.replace('*', '.')}: may not be read \({reason}\)$"):
                open_source(name)

    look_at_keys(store, after="0")
    try:
        refused("[^\n]{5,150}")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        refused("Unable to locate credentials")
    finally:
        look_at_keys(store, after="inf")
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_run_from_a_store_goes_on_equal(
    store: str,
    lomar: Callable[..., Any],
    pretrain: Callable[..., Any],
    interrupted_at: Callable[[int], None],
    course: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    asked = ("--data", ALL, "--max-steps 9 --checkpoint-steps 4 --workers 1")
    assert pretrain(tmp_path / "whole", *asked).status == 0
    interrupted_at(6)
    assert pretrain(tmp_path / "cut", *asked).status == 130
    shutil.rmtree(tmp_path / "cache")
    assert lomar("pretrain --resume --out", tmp_path / "cut").status == 0
    assert course(tmp_path / "cut") == course(tmp_path / "whole")
