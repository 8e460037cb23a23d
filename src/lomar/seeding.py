"""Every random draw of a run is seeded here, by what it is for."""

import hashlib

import torch


def seeded(*identity: int | str) -> torch.Generator:
    """A CPU generator whose stream is fixed by an identity such as (seed, epoch, index, "crop").

    Two draws share a stream only if every part is equal; neither the worker nor the process matters.

    Args:
        identity: integers and purposes, in a fixed order.
    """
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
