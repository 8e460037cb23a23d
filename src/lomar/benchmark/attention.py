"""Attention alone, forward and backward: each backend of the contextual bias, and PyTorch's own without a bias."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lomar.benchmark.place import Place
from lomar.model.attention import BACKENDS, Places
from lomar.model.positions import BUCKETS, contextual_buckets, grid_coordinates, with_cls
from lomar.training.memory import keep_freed_memory

NO_BIAS = "no bias"  # PyTorch's scaled_dot_product_attention


def attention_step(
    place: Place, images: int, *, backend: str, views: int, side: int, heads: int, head_width: int
) -> Callable[[], object]:
    """Values mixed and the gradients of queries, keys, values and table, for all views of a batch.

    Args:
        place: where.
        images: of a step.
        backend: a name in `lomar.model.attention.BACKENDS`, or `NO_BIAS`.
        views: of an image.
        side: of a view, in patches; with cls it has side * side + 1 tokens.
        heads, head_width: of the attention.
    """
    if place.device.type == "cpu":
        keep_freed_memory()  # as the training loop does
    shape = images * views, heads, side * side + 1, head_width
    made = {"device": place.device, "dtype": place.dtype, "requires_grad": True}
    q, k, v = (torch.randn(shape, **made) for _ in range(3))  # type: ignore[call-overload]
    table = torch.zeros(head_width, BUCKETS, device=place.device, requires_grad=True)
    at = with_cls(grid_coordinates(side, side, place.device)[None])
    if views > 1:  # windows lie elsewhere in each row, so that nothing is shared between rows
        at = at.repeat(len(q), 1, 1)
    places = Places(at, contextual_buckets(at))
    given = torch.randn_like(q)

    def mixed() -> torch.Tensor:
        if backend == NO_BIAS:
            return F.scaled_dot_product_attention(q, k, v)
        return BACKENDS[backend](q, k, v, table, places)

    compiled = torch.compile(mixed) if place.compiled else mixed

    def step() -> None:
        for each in (q, k, v, table):
            each.grad = None
        compiled().backward(given)

    return step
