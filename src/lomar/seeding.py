"""Every random draw of a run is seeded here, by what it is for."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seeded(*identity: int | str) -> torch.Generator:
    """A CPU generator whose stream is fixed by an identity such as (seed, epoch, index, "crop").

    Two draws share a stream only if every part is equal; neither the worker nor the process matters.

    Args:
        identity: integers and purposes, in a fixed order.
    """
    return torch.Generator().manual_seed(_number(*identity))


@contextmanager
def globally_seeded(*identity: int | str) -> Iterator[None]:
    """The same for code that draws from the global generators of Python, NumPy and torch (CPU); put back afterwards.

    Args:
        identity: as for `seeded`.
    """
    number = _number(*identity)
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(number)
        np.random.seed(number % 2**32)
        torch.default_generator.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _number(*identity: int | str) -> int:
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
