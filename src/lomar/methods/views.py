"""WHERE to look: the windows of an image that are reconstructed."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lomar.data.loader import SampleKey
from lomar.seeding import seeded

# Windows of the released code are shared by the images of one forward call; its README runs 256 a call.
RELEASED_CALL = 256


def local_windows(grid: tuple[int, int], size: int, count: int, generator: torch.Generator) -> Tensor:
    """Top-left corners of random square windows in one image, drawn independently and uniformly.

    Args:
        grid: (rows, columns) of the image, in patches.
        size: window side K, in patches.
        count: windows per image (the paper's "views").
        generator: the only source of randomness.

    Returns:
        int64 (count, 2): row and column; row in [0, rows - size].

    Raises:
        ValueError: the window does not fit the grid.

    Source: LoMaR, section 3.2 "Implementation"; counts in Table 4.
    """
    rows, columns = _offsets(grid, size)
    tops = torch.randint(rows, (count,), generator=generator)
    lefts = torch.randint(columns, (count,), generator=generator)
    return torch.stack([tops, lefts], dim=1)


def released_windows(tops: Tensor, lefts: Tensor, images: int) -> Tensor:
    """The released code's assignment of shared windows to the images of one forward call.

    Image n receives windows (w * images + n) mod M for w = 0 ... M - 1, so it sees M / gcd(images, M) distinct ones.

    Args:
        tops, lefts: int64 (M,), rows and columns of the shared windows.
        images: images in the call.

    Returns:
        int64 (images, M, 2).

    Source: junchen14/LoMaR at d9ca9c8, by execution (features are tiled window-major, windows laid out image-major).
    """
    shared = torch.stack([tops, lefts], dim=1)  # (M, 2)
    count = len(shared)
    image, window = torch.arange(images)[:, None], torch.arange(count)[None]
    return shared[(window * images + image) % count]


def _offsets(grid: tuple[int, int], size: int) -> tuple[int, int]:
    rows, columns = grid[0] - size + 1, grid[1] - size + 1
    if size < 1 or min(rows, columns) < 1:
        raise ValueError(f"a window of {size}x{size} patches does not fit a grid of {grid[0]}x{grid[1]}")
    return rows, columns


@dataclass(frozen=True)
class LocalWindows:
    """`count` windows of `side` x `side` patches, each image its own.

    Args:
        grid: (rows, columns) of the image, in patches.
        side: window side K, in patches.
        count: views per image V.
    """

    grid: tuple[int, int]
    side: int
    count: int

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of a view, in patches."""
        return self.side, self.side

    def corners(self, key: SampleKey, seed: int) -> Tensor:
        """int64 (V, 2): top-left corners of one sample's windows."""
        generator = seeded(seed, key.epoch, key.index, "windows")
        return local_windows(self.grid, self.side, self.count, generator)


@dataclass(frozen=True)
class WholeImage(LocalWindows):
    """One view that is the whole image, as in MAE and BEiT.

    Args:
        grid: (rows, columns) of the image, in patches.
    """

    side: int = field(init=False, default=0)
    count: int = field(init=False, default=1)

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of the view: the image's."""
        return self.grid

    def corners(self, key: SampleKey, seed: int) -> Tensor:
        """int64 (1, 2): the image's corner."""
        return torch.zeros(1, 2, dtype=torch.int64)


@dataclass(frozen=True)
class ReleasedWindows(LocalWindows):
    """The released code's windows: shared by groups of at most `RELEASED_CALL` images of a batch, and repeated.

    Tops and lefts are prefixes of permutations, so no two windows share either, and at most (grid side - K + 1) exist.

    Args:
        batch_size: global batch size.
    """

    batch_size: int

    def __post_init__(self) -> None:
        available = min(_offsets(self.grid, self.side))
        if self.count > available:
            raise ValueError(f"the released layout has at most {available} windows here, not {self.count}")

    def corners(self, key: SampleKey, seed: int) -> Tensor:
        """int64 (V, 2): top-left corners of one sample's windows."""
        call, place = divmod(key.slot, RELEASED_CALL)
        images = min(RELEASED_CALL, self.batch_size - call * RELEASED_CALL)
        generator = seeded(seed, key.batch, call, "released windows")
        rows, columns = _offsets(self.grid, self.side)
        tops = torch.randperm(rows, generator=generator)[: self.count]
        lefts = torch.randperm(columns, generator=generator)[: self.count]
        return released_windows(tops, lefts, images)[place]
