"""What stands behind an encoder while two views teach each other: DINO's head, MoCo v3's projector and predictor."""

import torch
from torch import Tensor, nn

from lomar.methods.gathering import count_of_processes, summed

BOTTLENECK = 256  # width of what DINO compares with its prototypes


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the batches of all processes.

    As torch's SyncBatchNorm, which is for GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        if not self.training or count_of_processes() == 1:
            return super().forward(x)
        wide = x.float()
        count = summed(torch.full((), len(x), dtype=torch.float32, device=x.device))
        mean = summed(wide.sum(dim=0)) / count
        centred = wide - mean
        variance = summed(centred.square().sum(dim=0)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.momentum is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
            self.num_batches_tracked.add_(1)
        normalised = centred * (variance + self.eps).rsqrt()
        return (normalised if self.weight is None else normalised * self.weight + self.bias).to(x.dtype)


class PrototypeHead(nn.Module):
    """DINO's head: three layers, unit length, and directions to compare with.

    Args:
        width: D, of the encoder.
        hidden: width of the perceptron's layers.
        prototypes: K, directions.
        bottleneck: width of what is compared.
        unit_length: whether prototypes keep their length, as in the source's default; else each learns its own.

    Source: DINO's released code (its `norm_last_layer`).
    """

    def __init__(
        self, width: int, hidden: int, prototypes: int, bottleneck: int = BOTTLENECK, unit_length: bool = True
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)  # as torch's linear layers begin
        self.lengths = None if unit_length else nn.Parameter(torch.ones(prototypes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K), unit vectors of the bottleneck times the prototypes, of unit length or their own."""
        directions = nn.functional.normalize(self.prototypes)
        prototypes = directions if self.lengths is None else self.lengths * directions
        return nn.functional.linear(nn.functional.normalize(self.mlp(x)), prototypes)

    def freeze(self) -> None:
        """Let the next update leave the prototypes as they are."""
        self.prototypes.grad = None
        if self.lengths is not None:
            self.lengths.grad = None


def batch_normed_mlp(width: int, hidden: int, outputs: int, layers: int) -> nn.Sequential:
    """MoCo v3's projector (3 layers) and predictor (2): linear without bias, batch norm, ReLU; the last norm is plain.

    Args:
        width: of what goes in.
        hidden: of the layers between.
        outputs: of what comes out.
        layers: how many.

    Source: MoCo v3's released code.
    """
    parts: list[nn.Module] = []
    for layer in range(1, layers + 1):
        last = layer == layers
        parts.append(nn.Linear(width, outputs if last else hidden, bias=False))
        parts += [BatchNorm(outputs, affine=False)] if last else [BatchNorm(hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*parts)
