"""Claims about atomic writing, and one writer at a time."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lomar.errors import UserError
from lomar.files import only_writer, write_atomically


def test_a_failure_inside_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert temporary.parent == path.parent  # a rename within one file system is atomic
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


def test_what_a_kill_left_half_written_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.tmp").write_text("left by a kill, and longer")
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


HOLDER = """
import sys, time
from pathlib import Path
from lomar.files import only_writer
with only_writer(Path(sys.argv[1]), "--out run"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_is_gone_however_it_goes(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError) as refused, only_writer(lock, "--out run"):
        pass
    who = f"process {holder.pid} on {socket.gethostname()}"
    assert str(refused.value) == f"--out run is being written by {who}; wait for it, or give another"
    holder.kill()
    holder.wait()
    with only_writer(lock, "--out run"):
        assert lock.exists()
    assert not lock.exists()
