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


RELEASED = (
    (r"^architecture\.", ""),
    (r"^encoder\.", ""),
    (r"rpe\.table", "rpe_k.lookup_table_weight"),
    (r"^decoder\.(pos_embed|norm)", r"decoder_\1"),
    (r"^decoder\.blocks", "decoder_blocks"),
    (r"ls([12])\.gamma", r"gamma_\1"),
    (r"^rel_pos_bias\.table", "rel_pos_bias.relative_position_bias_table"),
)
HEADS = {"lomar": "encoder_pred", "mae": "decoder_pred", "beit": "lm_head", "classifier": "head"}


def released_name(name: str, family: str = "lomar") -> str:
    """Our name of a parameter -> its name in the released checkpoints, whose order numbers the filler."""
    for ours, theirs in RELEASED:
        name = re.sub(ours, theirs, name)
    return re.sub(r"^head\.", f"{HEADS[family]}.", name)


def fill(module: nn.Module, family: str = "lomar") -> None:
    """Give every parameter its golden value: 0.5 u, plus 1 for the weights of layer norms; sines and cosines stay."""
    state = module.state_dict()
    names = {released_name(n, family): n for n in state if not n.endswith("pos_embed")}
    for j, released in enumerate(sorted(names)):
        tensor = state[names[released]]
        value = 0.5 * filler(*tensor.shape, j=j)
        if re.search(r"(^|[._])(fc_)?norm[12]?\.weight$", released):
            value += 1
        tensor.copy_(value)
