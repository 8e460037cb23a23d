"""In what precision a run computes."""

import torch
from torch import Tensor, nn

from lomar.training.processes import make_fabric


class Told(nn.Module):
    """A product, and the input as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels, (self.linear(pixels) - 1).square().sum()


def test_products_are_in_bfloat16_and_what_comes_in_is_not_rounded() -> None:
    """Pixels that are floats differ by less than bfloat16 tells apart; so do numbers that decide for a sample."""
    fabric = make_fabric("cpu", "bf16")
    pixels = torch.tensor([[20001.0, 0.1234567, 65535.0]])
    torch.manual_seed(0)
    method = Told()
    came, told = fabric.setup(method)(pixels)
    assert torch.equal(came, pixels)
    rounded = nn.functional.linear(pixels.bfloat16(), method.linear.weight.bfloat16(), method.linear.bias.bfloat16())
    torch.testing.assert_close(told, (rounded.float() - 1).square().sum(), rtol=5e-2, atol=0)
    exact = (method.linear(pixels) - 1).square().sum()
    assert told.dtype == torch.float32 and not torch.equal(told, exact)
