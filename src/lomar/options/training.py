"""Options that the commands that train a vision transformer have in common."""

from typing import Any

from lomar.options.fields import AUTO, option


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
