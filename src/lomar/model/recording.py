"""Looking into a forward pass: where the tokens of each block look, and how far."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lomar.model.attention import Attention

Kept = TypeVar("Kept")


@contextmanager
def recorded_attention(blocks: Iterable[nn.Module], keep: Callable[[Tensor], Kept]) -> Iterator[list[Kept]]:
    """What `keep` makes of each block's attention weights, in the order in which the blocks run.

    The weights are worked out a second time beside the pass, whose fused attention never holds them, so they change
    nothing in it. Nothing stays of them but what `keep` returns: the weights themselves are heads * tokens^2 numbers a
    block.

    Args:
        blocks: those to look into, such as `transformer.blocks[1::2]`; the others run as ever.
        keep: weights (R, heads, queries, tokens) of a block, rows of sum 1, cls first -> what to keep of them. The
            queries are the tokens that are asked for.
    """
    kept: list[Kept] = []

    @torch.no_grad()
    def record(attention: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        kept.append(keep(cast(Attention, attention).weights(*arguments)))

    hooks = [cast(nn.Module, block.attn).register_forward_hook(record) for block in blocks]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def between_patches(weights: Tensor) -> Tensor:
    """(..., queries, 1 + N) weights -> (..., queries, N): those on patches alone, as shares of sum 1."""
    on_patches = weights[..., 1:]
    return on_patches / on_patches.sum(dim=-1, keepdim=True)


def attention_distance(shares: Tensor, queries_at: Tensor, keys_at: Tensor) -> float:
    """How far queries look, in patches: sum over keys of share * distance, averaged over queries, heads and rows.

    Args:
        shares: (R, heads, M, N) of sum 1 over the keys, such as `between_patches` gives; cls, which is nowhere, is
            neither query nor key.
        queries_at: (R or 1, M, 2), row and column of each query.
        keys_at: (R or 1, N, 2), those of the keys.

    Source: the mean attention distance of ViT (Dosovitskiy et al. 2021, Fig. 7), there in pixels.
    """
    between = queries_at[:, :, None] - keys_at[:, None]  # (R or 1, M, N, 2)
    distances = between.to(shares.dtype).norm(dim=-1)
    return float((shares * distances[:, None]).sum(dim=-1).mean())
