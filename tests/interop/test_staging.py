"""Claims about files that appear together."""

from pathlib import Path

import pytest

from lomar.interop.staging import staged


def test_files_appear_together_and_replace_those_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "other").write_text("kept")
    with staged(tmp_path) as place:
        (place / "a").write_text("new")
        (place / "b").write_text("new")
        assert (tmp_path / "a").read_text() == "old" and not (tmp_path / "b").exists()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "new", "b": "new", "other": "kept"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_all_is_as_it_was(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for folder in (tmp_path, tmp_path / "new", tmp_path / "deep" / "a" / "b"):
        with pytest.raises(error), staged(folder) as place:
            (place / "a").write_text("half")
            raise error
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "old"}
