"""The list of files that could not be read."""

from collections.abc import Sequence
from pathlib import Path

_ON_ONE_LINE = str.maketrans("\t\r\n", "   ")


class BadFiles:
    """`bad_files.txt`: each unreadable file once, with the reason.

    Args:
        path: of the list; what it already holds counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: set[str] = set()
        self._torn = False
        if path.exists():
            *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
            self.names = {line.split("\t")[0] for line in lines}
            self._torn = bool(rest)  # a line that a kill or a full disk has cut

    def noted(self, found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Keep some (name, reason) in mind; those that are new come back, each once and on one line."""
        on_one_line = {name.translate(_ON_ONE_LINE): reason.translate(_ON_ONE_LINE) for name, reason in found}
        new = [(name, reason) for name, reason in on_one_line.items() if name not in self.names]
        self.names.update(name for name, _ in new)
        return new

    def write(self, new: Sequence[tuple[str, str]]) -> None:
        """Add what `noted` gave to the list.

        Raises:
            OSError: it cannot be written.
        """
        if not new:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._torn)
            self._torn = True  # until the line is whole
            file.writelines(f"{name}\t{reason}\n" for name, reason in new)
        self._torn = False

    def add(self, found: Sequence[tuple[str, str]]) -> list[str]:
        """Note and write; the names that are new come back.

        Raises:
            OSError: the list cannot be written.
        """
        new = self.noted(found)
        self.write(new)
        return [name for name, _ in new]
