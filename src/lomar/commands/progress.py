"""How far a command has come, on standard error."""

import sys
import time
from collections.abc import Generator, Sized
from contextlib import closing
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_LINE_S = 30.0  # between two lines of progress where there is no terminal

T = TypeVar("T")
Each = TypeVar("Each", bound=Sized)


def watched(
    batches: Generator[tuple[T, Each], None, None], what: str, total: int, first: int = 0
) -> Generator[tuple[T, Each], None, None]:
    """The same batches, their progress shown on standard error: as a bar in a terminal, else now and then as a line.

    Args:
        batches: whose second part is as long as there are images in the batch.
        what: is going on.
        total: images of all.
        first: images done before, in an earlier sitting.
    """
    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]:.0f} images/s")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    began = told = time.monotonic()
    done = first
    with closing(batches), Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=first, rate=0.0)
        for found, each in batches:
            yield found, each
            done += len(each)
            now = time.monotonic()
            images_per_s = (done - first) / max(1e-9, now - began)
            bar.update(task, completed=done, rate=images_per_s)
            if bar.disable and now - told > _PLAIN_LINE_S and done < total:
                left = timedelta(seconds=round((total - done) / images_per_s))
                sys.stderr.write(f"lomar: {what}: {done}/{total} images, {images_per_s:.0f} images/s, eta {left}\n")
                told = now
