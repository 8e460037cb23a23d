"""How weights begin: as in MAE and LoMaR, or as in BEiT."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

TOKEN_STD = 0.02


def _xavier(weight: Tensor) -> None:
    nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))


def _normal(token: Tensor) -> None:
    nn.init.normal_(token, std=TOKEN_STD)


def _truncated(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=TOKEN_STD, a=-TOKEN_STD, b=TOKEN_STD)


@dataclass(frozen=True)
class Initialisation:
    """What fills fresh weights.

    Args:
        weight: fills a matrix, or a convolution seen as (out, in * height * width).
        token: fills a learned token.
        plain_patch_bias: whether the patch embedding keeps torch's own bias; else it is zero.
        rescaled: whether what leaves block l (from 1) is divided by sqrt(2 l).
    """

    weight: Callable[[Tensor], None]
    token: Callable[[Tensor], None]
    plain_patch_bias: bool
    rescaled: bool

    def linear(self, module: nn.Module) -> None:
        """Fill a linear layer, its bias with zeros; other modules stay as they are."""
        if isinstance(module, nn.Linear):
            self.weight(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def convolution(self, module: nn.Conv2d) -> None:
        """Fill the patch embedding."""
        self.weight(module.weight)
        if module.bias is not None and not self.plain_patch_bias:
            nn.init.zeros_(module.bias)

    def blocks(self, blocks: nn.ModuleList) -> None:
        """Fill all linear layers of a transformer's blocks."""
        blocks.apply(self.linear)
        if not self.rescaled:
            return
        for number, block in enumerate(blocks, start=1):
            for layer in cast(_Block, block).attn.proj, cast(_Block, block).mlp.fc2:
                layer.weight.data.div_((2 * number) ** 0.5)


class _Attention(Protocol):
    proj: nn.Linear


class _Mlp(Protocol):
    fc2: nn.Linear


class _Block(Protocol):
    attn: _Attention
    mlp: _Mlp


INITIALISATIONS = {
    # The released MAE and LoMaR code: Xavier-uniform, q, k and v as one matrix; tokens N(0, 0.02).
    "xavier": Initialisation(_xavier, _normal, plain_patch_bias=True, rescaled=False),
    # BEiT: N(0, 0.02) cut at one deviation, branches scaled down with depth.
    "beit": Initialisation(_truncated, _truncated, plain_patch_bias=False, rescaled=True),
}
