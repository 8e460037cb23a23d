"""WHERE to look, within a view: the patches that are hidden. True means hidden, everywhere."""

from dataclasses import dataclass

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
