"""The rate of plain matrix products, which the use of a machine is measured by."""

from collections.abc import Callable

import torch

from lomar.benchmark.place import Place


def product_flops(side: int) -> int:
    """FLOPs of the product of two square matrices."""
    return 2 * side**3


def product_step(place: Place, images: int, *, side: int) -> Callable[[], object]:
    """One product of two matrices of side x side, in the place's precision."""
    left, right = (torch.randn(side, side, device=place.device, dtype=place.dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)
