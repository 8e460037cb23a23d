"""Several files that appear together, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, whose files move into `folder` once all went well.

    They take the place of files of the same names; other files stay. After an error `folder` is as it was,
    and gone if it was not there, with the folders on the way to it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".lomar-export-", dir=folder) as temporary:
            yield Path(temporary)
            for file in sorted(Path(temporary).iterdir(), reverse=True):  # weights, what names them, the card
                with file.open("rb") as written:
                    os.fsync(written.fileno())
                file.replace(folder / file.name)
    except BaseException:
        with suppress(OSError):  # something else has come into one of them
            for place in made:
                place.rmdir()
        raise
