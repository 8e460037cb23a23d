"""Options of the command that makes images smaller."""

from dataclasses import dataclass

from lomar.options.fields import ANY_IMAGES, AUTO, MOST_WORKERS, option
from lomar.options.training import (
    max_bad_share_option,
)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Make images smaller once, in a few large files, so that training need not decode large photographs."""

    data: str = option(ANY_IMAGES, metavar="DIR")
    out: str = option("folder to write, which every command takes as --data", metavar="DIR2", results=False)
    resume: bool = option(
        "go on with what was begun in --out, with no other option; begin it if nothing was and --data is given",
        default=False,
        results=False,
    )
    overwrite: bool = option("replace what is prepared in --out, or was begun there", default=False, results=False)
    verify: bool = option("check what is in --out against its check sums, and end", default=False, results=False)
    short_side: int = option(
        "shorter side of the images; smaller ones keep their size. 512 is enough for crops of 224, 1024 for 448",
        default=512,
        low=2,
        metavar="PX",
    )
    encoding: str = option(
        "jpeg, with arrays for what is not 8-bit gray or colour; or raw: arrays alone, lossless, fastest and largest",
        default="jpeg",
        choices=("jpeg", "raw"),
        metavar="NAME",
    )
    quality: int = option("of JPEG", default=95, low=1, high=100, metavar="Q")
    shard_mb: float = option("megabytes of a file", default=256.0, above=0, metavar="MB")
    workers: int | None = option(
        "processes", default=None, auto=AUTO, low=0, high=MOST_WORKERS, metavar="W", results=False
    )
    max_bad_share: float = max_bad_share_option()
