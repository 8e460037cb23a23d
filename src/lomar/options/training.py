"""Options that the commands that train a vision transformer have in common."""

from typing import Any

from lomar.options.fields import AUTO, MOST_WORKERS, option


def grad_checkpointing_option() -> Any:
    """Less memory for more time."""
    return option(
        "work out each block again in the backward pass: less memory, a third more time", default=False, results=False
    )


def shuffle_option() -> Any:
    """How well images in shards at an address are mixed."""
    return option(
        "gigabytes of tar files at an address that images are drawn from at a time, on all machines together",
        default=16.0,
        above=0,
        metavar="GB",
    )


def strategy_option() -> Any:
    """How processes work together."""
    return option(
        "of several processes: ddp, each with all weights, or fsdp, weights spread over them",
        default="ddp",
        choices=("ddp", "fsdp"),
        metavar="NAME",
        results=False,
    )


def compile_option() -> Any:
    """torch.compile."""
    return option(
        "whether the training step is compiled by torch.compile",
        auto=AUTO,
        choices=("auto", "yes", "no"),
        metavar="WORD",
        results=False,
    )


def workers_option() -> Any:
    """Loading processes of a command that trains."""
    return option(
        "processes that read images, per device", auto=AUTO, low=0, high=MOST_WORKERS, metavar="W", results=False
    )


def checkpoint_steps_option() -> Any:
    """Checkpoints by steps."""
    return option("steps between checkpoints, beside the timed ones", default=None, low=1, metavar="N", results=False)


def checkpoint_minutes_option() -> Any:
    """Checkpoints by time."""
    return option("minutes between checkpoints", default=10.0, above=0, metavar="MIN", results=False)


def log_every_option(default: int = 10) -> Any:
    """Plain progress."""
    return option("steps between two plain progress lines", default=default, low=1, metavar="N", results=False)


def eval_every_option(results: bool = True) -> Any:
    """How often a run is judged; where the best weights are kept, that changes what it leaves."""
    return option(
        "epochs between evaluations; without it they take at most a tenth of the time",
        default=None,
        above=0,
        metavar="E",
        results=results,
    )


def max_bad_share_option() -> Any:
    """How many files may be unreadable."""
    return option(
        "share of unreadable images from which to refuse", default=0.25, low=0, high=1, metavar="S", results=False
    )
