"""WHERE to look, within a view: the patches that are hidden, and of them those that are predicted.

True means hidden, everywhere.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def hide_smallest(noise: Tensor, count: int) -> Tensor:
    """bool like `noise`: True at the `count` smallest entries of the last axis.

    Source: the released LoMaR code (MAE keeps the smallest instead).
    """
    hidden = torch.zeros_like(noise, dtype=torch.bool)
    return hidden.scatter_(-1, noise.argsort(dim=-1, stable=True)[..., :count], True)


@dataclass(frozen=True)
class UniformMask:
    """Each patch of a view is equally likely to be hidden; every view hides equally many.

    Args:
        patches: patches in a view N.
        ratio: share hidden; the count is int(N * ratio).

    Raises:
        ValueError: the count is 0 or N.

    Source: LoMaR, section 3.2 "Implementation"; 39 of 49 at the paper's 0.8.
    """

    patches: int
    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.count < self.patches:
            raise ValueError(
                f"a ratio of {self.ratio} hides {self.count} of {self.patches} patches; hide some, not all"
            )

    @property
    def count(self) -> int:
        """Hidden patches in a view."""
        return int(self.patches * self.ratio)

    def draw(self, views: int, generator: torch.Generator) -> Tensor:
        """bool (V, N), True where hidden."""
        return hide_smallest(torch.rand(views, self.patches, generator=generator), self.count)

    @property
    def even(self) -> bool:
        """Whether every view hides exactly `count` patches."""
        return True


@dataclass(frozen=True)
class KeptMask(UniformMask):
    """`UniformMask` counted the other way: int(N * (1 - ratio)) patches stay visible, those with the smallest noise.

    Source: MAE; 49 of 196 at its 0.75.
    """

    @property
    def count(self) -> int:
        """Hidden patches in a view."""
        return self.patches - int(self.patches * (1 - self.ratio))

    def draw(self, views: int, generator: torch.Generator) -> Tensor:
        """bool (V, N), True where hidden."""
        return hide_largest(torch.rand(views, self.patches, generator=generator), self.count)


def hide_largest(noise: Tensor, count: int) -> Tensor:
    """bool like `noise`: False at the smallest entries of the last axis, True at the `count` others.

    Source: the released MAE code.
    """
    return ~hide_smallest(noise, noise.shape[-1] - count)


ATTEMPTS = 10  # to place a block, before a mask is left as it is
ASPECT = 0.3  # a block's height over width is between this and its inverse


@dataclass(frozen=True)
class BlockwiseMask:
    """Rectangular blocks are hidden until about enough patches are; views hide at most `count`, most of them that many.

    Args:
        grid: (rows, columns) of a view.
        ratio: share hidden; the count is int(N * ratio).
        min_block: smallest area of a block, in patches.

    Raises:
        ValueError: the count is 0 or N.

    Source: BEiT; 75 of 196 with blocks of at least 16.
    """

    grid: tuple[int, int]
    ratio: float
    min_block: int

    def __post_init__(self) -> None:
        if not 0 < self.count < self.patches:
            raise ValueError(
                f"a ratio of {self.ratio} hides {self.count} of {self.patches} patches; hide some, not all"
            )

    @property
    def patches(self) -> int:
        """Patches in a view N."""
        return self.grid[0] * self.grid[1]

    @property
    def count(self) -> int:
        """The most that a view hides."""
        return int(self.patches * self.ratio)

    @property
    def even(self) -> bool:
        """Whether every view hides exactly `count` patches."""
        return False

    def draw(self, views: int, generator: torch.Generator) -> Tensor:
        """bool (V, N), True where hidden; at least one patch of each view is."""
        return torch.stack([self._draw_one(generator) for _ in range(views)])

    def _draw_one(self, generator: torch.Generator) -> Tensor:
        hidden = torch.zeros(self.grid, dtype=torch.bool)
        while (room := self.count - int(hidden.sum())) and self._hide_block(hidden, room, generator):
            pass
        if not hidden.any():  # a view too small for its blocks
            hidden.view(-1)[int(torch.randint(self.patches, (1,), generator=generator))] = True
        return hidden.flatten()

    def _hide_block(self, hidden: Tensor, room: int, generator: torch.Generator) -> bool:
        """Hide one more block of at most `room` new patches in (rows, columns) `hidden`; False if none was found."""
        rows, columns = self.grid
        for _ in range(ATTEMPTS):
            size, shape, down, across = torch.rand(4, generator=generator).tolist()
            area = self.min_block + size * (room - self.min_block)  # little room makes smaller blocks
            aspect = math.exp((2 * shape - 1) * math.log(1 / ASPECT))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < columns):
                continue
            top, left = int(down * (rows - height + 1)), int(across * (columns - width + 1))
            block = hidden[top : top + height, left : left + width]
            if 0 < height * width - int(block.sum()) <= room:
                block.fill_(True)
                return True
        return False


CHOICES = ("uniform", "furthest")


@dataclass(frozen=True)
class Share:
    """Some of the hidden patches: those that are predicted. The others are left out, as if they did not exist.

    Args:
        grid: (rows, columns) of a view.
        count: predicted patches of each view.
        choice: "uniform", any of them alike; or "furthest", one after another the one furthest from those chosen before
            (the first, and equals, by chance), so that all of the view is asked about.

    Source: CrossMAE predicts some, chosen uniformly; furthest ones PR-MIM (Li et al. 2024).
    """

    grid: tuple[int, int]
    count: int
    choice: str = "furthest"

    def draw(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """bool (V, N), True where a hidden patch is predicted.

        Args:
            hidden: bool (V, N), at least `count` True in each row.
            generator: the only source of randomness.
        """
        noise = torch.rand(hidden.shape, generator=generator)
        if self.choice == "uniform":
            return hide_smallest(noise.masked_fill(~hidden, 2.0), self.count)
        return torch.from_numpy(self._furthest(hidden.numpy(), noise.numpy()))

    def _furthest(self, hidden: np.ndarray, noise: np.ndarray) -> np.ndarray:
        rows, columns = np.divmod(np.arange(hidden.shape[1]), self.grid[1])
        apart = np.square(rows[:, None] - rows) + np.square(columns[:, None] - columns)  # whole numbers: (N, N)
        views = np.arange(len(hidden))
        gap = np.where(hidden, apart.max() + 1, -1)  # from the nearest chosen patch; 0 of a chosen one
        chosen = np.zeros_like(hidden)
        for _ in range(self.count):
            furthest = (gap + noise).argmax(axis=1)  # noise is below 1: it decides between equals alone
            chosen[views, furthest] = True
            gap = np.where(hidden, np.minimum(gap, apart[furthest]), -1)
        return chosen
