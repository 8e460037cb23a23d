"""The errors a user can cause, each one clear line."""

import re


class UserError(Exception):
    """Something the user asked for cannot be done; the text is one line: what, where, what would be right.

    The command line prints it without a traceback and exits with status 2.

    Args:
        text: the line.
        shared: whether all processes of a run meet with the same, so that one of them tells.
    """

    def __init__(self, text: str, shared: bool = False) -> None:
        super().__init__(text)
        self.shared = shared


class BadImageError(Exception):
    """One image cannot be read; the text says why in a few words. Training skips and lists such files."""


class TrainingError(Exception):
    """Training cannot go on; the text is one line that says at which step, with which files, and what was tried.

    Args:
        text: the line.
        shared: as of `UserError`.
    """

    def __init__(self, text: str, shared: bool = False) -> None:
        super().__init__(text)
        self.shared = shared


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch, on a CPU or a GPU, had no memory left. torch need not be imported to ask."""
    of_torch = isinstance(error, RuntimeError)
    return isinstance(error, MemoryError) or (
        of_torch and re.search("allocate memory|out of memory", str(error)) is not None
    )
