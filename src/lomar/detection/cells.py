"""The block of ViTAE-B: a transformer's, with convolutions beside its attention."""

from torch import Tensor, nn

from lomar.model.attention import Attention, Places, Relation
from lomar.model.transformer import Block

_GROUP = 4  # channels of a group of the convolutions: 192 groups of 768


class NormalCell(Block):
    """x + attention(norm(x)) + convolutions(x), then the perceptron.

    The convolutions see the tokens as a map: 3 x 3 in groups to the perceptron's hidden width, batch norm, SiLU, 3 x 3
    in groups back. The last one is zero at the start, so that a cell begins as the block whose weights it takes.

    Args:
        attention, width, mlp_ratio, drop_path, init_values: as of `Block`.

    Source: Zhang et al. 2022 ("ViTAEv2") and the ViTDet of its repository; to begin at zero is ours.
    """

    def __init__(
        self, attention: Attention, width: int, mlp_ratio: float, drop_path: float, init_values: float | None
    ) -> None:
        super().__init__(attention, width, mlp_ratio, drop_path, init_values)
        groups, hidden = max(1, width // _GROUP), int(width * mlp_ratio)
        last = nn.Conv2d(hidden, width, 3, padding=1, groups=groups)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        first = nn.Conv2d(width, hidden, 3, padding=1, groups=groups)
        self.convolutions = nn.Sequential(first, nn.BatchNorm2d(hidden), nn.SiLU(), last)

    def attended(self, x: Tensor, relation: Relation, asked: slice) -> Tensor:
        """Attention and convolutions of tokens (B, H * W, D), which share a draw of drop path: the same shape."""
        assert isinstance(relation, Places) and relation.extent is not None
        beside = self.convolutions(x.transpose(1, 2).unflatten(2, relation.extent)).flatten(2).transpose(1, 2)
        return super().attended(x, relation, asked) + beside
