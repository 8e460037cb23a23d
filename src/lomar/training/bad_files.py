"""The list of files that could not be read."""

from collections.abc import Sequence
from pathlib import Path

_ON_ONE_LINE = str.maketrans("\t\r\n", "   ")


class BadFiles:
    """`bad_files.txt`: each unreadable file once, with the reason.

    Args:
        path: of the list; what it already holds counts.
        written: False in all processes but the first, which keep the names in mind alone.
    """

    def __init__(self, path: Path, written: bool = True) -> None:
        self.path = path
        self.written = written
        self.names: set[str] = set()
        self._torn = False
        if path.exists():
            *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
            self.names = {line.split("\t")[0] for line in lines}
            self._torn = bool(rest)  # a line that a kill or a full disk has cut

    def new(self, found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of some (name, reason) that are not in the list yet, each once and on one line."""
        on_one_line = {name.translate(_ON_ONE_LINE): reason.translate(_ON_ONE_LINE) for name, reason in found}
        return [(name, reason) for name, reason in on_one_line.items() if name not in self.names]

    def add(self, found: Sequence[tuple[str, str]]) -> list[str]:
        """Record files; the names that are new come back.

        Raises:
            OSError: the list cannot be written; the names count all the same.
        """
        new = self.new(found)
        self.names.update(name for name, _ in new)
        if new and self.written:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn)
                self._torn = True  # until the line is whole
                file.writelines(f"{name}\t{reason}\n" for name, reason in new)
            self._torn = False
        return [name for name, _ in new]
