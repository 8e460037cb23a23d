"""The deterministic filler of the golden vectors: parameters and inputs that an independent implementation was run on.

Source: SPEC.md, appendix H; the released code at commit d9ca9c8, in float64.
"""

import re

import torch
from torch import Tensor, nn

TOLERANCE = {"rtol": 0.0, "atol": 1e-6}


def filler(*shape: int, j: int) -> Tensor:
    """u(n, j): ((i + 1) * 2654435761 + (j + 1) * 2246822519 mod 2^32) / 2^32 - 0.5, row-major, in float64."""
    n = torch.Size(shape).numel()
    i = torch.arange(1, n + 1, dtype=torch.int64)
    return (((i * 2654435761 + (j + 1) * 2246822519) % 2**32).double() / 2**32 - 0.5).reshape(shape)


def released_name(name: str) -> str:
    """Our name of a parameter -> its name in the released checkpoints, whose order numbers the filler."""
    name = name.removeprefix("architecture.").removeprefix("encoder.")
    name = name.replace("rpe.table", "rpe_k.lookup_table_weight")
    return re.sub(r"^head\.", "encoder_pred.", name) if "fc_norm" not in name else name


def fill(module: nn.Module, classifier: bool = False) -> None:
    """Give every parameter its golden value: 0.5 u, plus 1 for the weights of layer norms."""
    state = module.state_dict()
    names = {(n if classifier and n.startswith("head.") else released_name(n)): n for n in state}
    for j, released in enumerate(sorted(names)):
        tensor = state[names[released]]
        value = 0.5 * filler(*tensor.shape, j=j)
        if re.search(r"(^|\.)(fc_)?norm[12]?\.weight$", released):
            value += 1
        tensor.copy_(value)
