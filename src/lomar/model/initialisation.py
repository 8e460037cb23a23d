"""How weights begin: as in MAE and LoMaR, BEiT, DINO, or MoCo v3."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

TOKEN_STD = 0.02


def _xavier(weight: Tensor) -> None:
    nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))


def _normal(token: Tensor) -> None:
    nn.init.normal_(token, std=TOKEN_STD)


def _almost_zero(token: Tensor) -> None:
    nn.init.normal_(token, std=1e-6)


def _truncated(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=TOKEN_STD, a=-TOKEN_STD, b=TOKEN_STD)


def _hardly_truncated(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=TOKEN_STD)  # at +-2, a hundred deviations away


@dataclass(frozen=True)
class Initialisation:
    """What fills fresh weights.

    Args:
        weight: fills a matrix, or a convolution seen as (out, in * height * width).
        token: fills a learned token.
        plain_patch: names of the patch embedding's tensors that stay as torch makes them; its bias is zero otherwise.
        rescaled: whether what leaves block l (from 1) is divided by sqrt(2 l).
        separate: whether q, k and v are filled as a matrix each; else they are one.
    """

    weight: Callable[[Tensor], None]
    token: Callable[[Tensor], None]
    plain_patch: tuple[str, ...] = ()
    rescaled: bool = False
    separate: bool = False

    def linear(self, module: nn.Module) -> None:
        """Fill a linear layer, its bias with zeros; other modules stay as they are."""
        if isinstance(module, nn.Linear):
            self.weight(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def convolution(self, module: nn.Conv2d) -> None:
        """Fill the patch embedding."""
        if "weight" not in self.plain_patch:
            self.weight(module.weight)
        if module.bias is not None and "bias" not in self.plain_patch:
            nn.init.zeros_(module.bias)

    def blocks(self, blocks: nn.ModuleList) -> None:
        """Fill all linear layers of a transformer's blocks."""
        blocks.apply(self.linear)
        for number, block in enumerate(cast(Iterable[_Block], blocks), start=1):
            if self.separate:
                for matrix in block.attn.qkv.weight.data.chunk(3):
                    self.weight(matrix)
            if self.rescaled:
                for layer in block.attn.proj, block.mlp.fc2:
                    layer.weight.data.div_((2 * number) ** 0.5)


class _Attention(Protocol):
    qkv: nn.Linear
    proj: nn.Linear


class _Mlp(Protocol):
    fc2: nn.Linear


class _Block(Protocol):
    attn: _Attention
    mlp: _Mlp


INITIALISATIONS = {
    # The released MAE and LoMaR code: Xavier-uniform, q, k and v as one matrix; tokens N(0, 0.02).
    "xavier": Initialisation(_xavier, _normal, plain_patch=("bias",)),
    # BEiT: N(0, 0.02) cut at one deviation, branches scaled down with depth.
    "beit": Initialisation(_truncated, _truncated, rescaled=True),
    # DINO: N(0, 0.02), but for the patch embedding.
    "dino": Initialisation(_hardly_truncated, _hardly_truncated, plain_patch=("weight", "bias")),
    # MoCo v3: Xavier-uniform, q, k and v as three matrices; cls N(0, 1e-6).
    "mocov3": Initialisation(_xavier, _almost_zero, separate=True),
}
