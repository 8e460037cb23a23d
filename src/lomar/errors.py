"""The errors a user can cause, each one clear line."""


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
