"""Checkpoints as they were released, at any size: names and shapes from SPEC.md, A.11, B.8, C.7, D.1 and D.2."""

import re
from collections.abc import Iterable

import numpy as np
import torch
from golden import filler
from torch import Tensor

State = dict[str, Tensor]

WIDTH, HEADS, DEPTH, PATCH, IMAGE, CLASSES, VOCAB = 48, 3, 2, 4, 32, 10, 20


def blocks(prefix: str, width: int, depth: int, qkv: dict[str, tuple[int, ...]], mlp: int = 4) -> dict[str, tuple]:
    """Shapes of `depth` blocks; `qkv` are those beside qkv.weight, proj, the norms and the perceptron."""
    shapes: dict[str, tuple] = {}
    for i in range(depth):
        block = {f"norm{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
        block |= {"attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
        block |= {"mlp.fc1.weight": (mlp * width, width), "mlp.fc1.bias": (mlp * width,)}
        block |= {"mlp.fc2.weight": (width, mlp * width), "mlp.fc2.bias": (width,)} | qkv
        shapes |= {f"{prefix}.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def pair(name: str, outputs: int, *inputs: int) -> dict[str, tuple]:
    """weight and bias of a layer; a norm has no inputs."""
    return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}


def lomar(
    stage: str,
    width: int = WIDTH,
    heads: int = HEADS,
    depth: int = DEPTH,
    patch: int = PATCH,
    channels: int = 3,
    image: int = IMAGE,
    mlp: int = 4,
) -> State:
    """`stage` is "pretrain" or "finetune" (A.11)."""
    attention = {"attn.qkv.bias": (3 * width,), "attn.rpe_k.lookup_table_weight": (1, width // heads, 50)}
    shapes = {"cls_token": (1, 1, width)} | pair("patch_embed.proj", width, channels, patch, patch)
    shapes |= blocks("blocks", width, depth, attention, mlp)
    if stage == "finetune":
        return filled(shapes | pair("fc_norm", width) | pair("head", CLASSES, width))
    shapes |= {"mask_token": (1, 1, width)} | pair("norm", width) | pair("encoder_pred", channels * patch**2, width)
    return filled(shapes) | {"pos_embed": sincos(image // patch, width)}


def mae(
    stage: str,
    width: int = WIDTH,
    depth: int = DEPTH,
    patch: int = PATCH,
    channels: int = 3,
    image: int = IMAGE,
    mlp: int = 4,
    decoder_width: int = 32,
    decoder_depth: int = 1,
) -> State:
    """`stage` is "pretrain", "encoder", "finetune" (pooled) or "finetune-cls" (B.8)."""
    shapes = {"cls_token": (1, 1, width)} | pair("patch_embed.proj", width, channels, patch, patch)
    shapes |= blocks("blocks", width, depth, {"attn.qkv.bias": (3 * width,)}, mlp)
    positions = {"pos_embed": sincos(image // patch, width)}
    shapes |= pair("fc_norm" if stage == "finetune" else "norm", width)
    if stage.startswith("finetune"):
        shapes |= pair("head", CLASSES, width)
    if stage == "pretrain":
        shapes |= {"mask_token": (1, 1, decoder_width)} | pair("decoder_embed", decoder_width, width)
        shapes |= blocks("decoder_blocks", decoder_width, decoder_depth, {"attn.qkv.bias": (3 * decoder_width,)})
        shapes |= pair("decoder_norm", decoder_width) | pair("decoder_pred", channels * patch**2, decoder_width)
        positions["decoder_pos_embed"] = sincos(image // patch, decoder_width)
    return filled(shapes) | positions


def beit(
    stage: str,
    width: int = WIDTH,
    heads: int = HEADS,
    depth: int = DEPTH,
    patch: int = PATCH,
    channels: int = 3,
    image: int = IMAGE,
    mlp: int = 4,
) -> State:
    """`stage` is "pretrain" or "finetune" (C.7)."""
    grid = image // patch
    table = {"relative_position_bias_table": ((2 * grid - 1) ** 2 + 3, heads)}
    attention = {"attn.q_bias": (width,), "attn.v_bias": (width,), "gamma_1": (width,), "gamma_2": (width,)}
    shapes = {"cls_token": (1, 1, width)} | pair("patch_embed.proj", width, channels, patch, patch)
    if stage == "finetune":
        attention |= {f"attn.{name}": shape for name, shape in table.items()}
        shapes |= blocks("blocks", width, depth, attention, mlp) | pair("fc_norm", width) | pair("head", CLASSES, width)
        index = [f"blocks.{i}.attn.relative_position_index" for i in range(depth)]
    else:
        shapes |= blocks("blocks", width, depth, attention, mlp) | {"mask_token": (1, 1, width)} | pair("norm", width)
        shapes |= pair("lm_head", VOCAB, width) | {f"rel_pos_bias.{name}": shape for name, shape in table.items()}
        index = ["rel_pos_bias.relative_position_index"]
    return filled(shapes) | {name: bias_index(grid) for name in index}


def plain(
    width: int = WIDTH,
    depth: int = DEPTH,
    patch: int = PATCH,
    channels: int = 3,
    image: int = IMAGE,
    mlp: int = 4,
    classes: int = 0,
) -> State:
    """DINO's encoder (D.1); its positions are learned, so that any numbers do."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + (image // patch) ** 2, width)}
    shapes |= pair("patch_embed.proj", width, channels, patch, patch) | pair("norm", width)
    shapes |= blocks("blocks", width, depth, {"attn.qkv.bias": (3 * width,)}, mlp)
    return filled(shapes | (pair("head", classes, width) if classes else {}))


def moco(**sizes: int) -> State:
    """MoCo v3's encoder (D.2): of its sines and cosines those of the row come first."""
    state = plain(**sizes)
    grid, width = int((state["pos_embed"].shape[1] - 1) ** 0.5), state["pos_embed"].shape[2]
    by_column = sincos(grid, width)
    return state | {"pos_embed": torch.cat([by_column[..., width // 2 :], by_column[..., : width // 2]], dim=-1)}


def changed(state: State, by: float) -> State:
    """Other numbers under the same names."""
    return {name: tensor + by for name, tensor in state.items()}


def prefixed(prefix: str, state: State) -> State:
    """The state under longer names."""
    return {prefix + name: tensor for name, tensor in state.items()}


def dino_whole(**sizes: int) -> dict[str, State]:
    """All of DINO's pretraining: a student, whose processes wrapped it, and its teacher."""
    teacher = plain(**sizes)
    head = {f"mlp.{i}.{kind}": torch.ones(5) for i in (0, 2, 4) for kind in ("weight", "bias")}
    head |= {"last_layer.weight_g": torch.ones(7, 1), "last_layer.weight_v": torch.ones(7, 5)}
    networks = prefixed("backbone.", teacher) | prefixed("head.", head)
    return {"student": prefixed("module.", changed(networks, 0.25)), "teacher": networks}


def moco_whole(**sizes: int) -> State:
    """All of MoCo v3's pretraining: the encoder with its projector, their momentum's, and the predictor."""
    norm = {"weight": torch.ones(5), "bias": torch.ones(5), "running_mean": torch.ones(5)}
    norm |= {"running_var": torch.ones(5), "num_batches_tracked": torch.tensor(7)}
    mlp = {"0.weight": torch.ones(5, 4), "3.weight": torch.ones(5, 5)} | prefixed("1.", norm) | prefixed("4.", norm)
    network = moco(**sizes) | prefixed("head.", mlp)
    momentum = prefixed("module.momentum_encoder.", changed(network, 0.25))
    return prefixed("module.base_encoder.", network) | momentum | prefixed("module.predictor.", mlp)


def filled(shapes: dict[str, tuple]) -> State:
    """Golden values (H): 0.5 u, the position in the alphabet choosing u, and 1 more for the weights of norms."""
    state = {}
    for j, name in enumerate(sorted(shapes)):
        is_norm = re.search(r"(^|\.|_)norm[12]?\.weight$", name)
        state[name] = (0.5 * filler(*shapes[name], j=j) + (1 if is_norm else 0)).float()
    return state


def sincos(grid: int, width: int) -> Tensor:
    """(1, 1 + grid^2, width): zeros, then sin and cos of the column and of the row (B.3)."""
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    rows = [np.zeros(width)]
    for y in range(grid):
        rows += [np.concatenate([f(v * omega) for v in (x, y) for f in (np.sin, np.cos)]) for x in range(grid)]
    return torch.from_numpy(np.stack(rows)).float()[None]


def bias_index(grid: int) -> Tensor:
    """int64 (1 + grid^2, 1 + grid^2) rows of the table (C.1)."""
    last = (2 * grid - 1) ** 2
    index = np.full((1 + grid**2,) * 2, last)
    places = [(r, c) for r in range(grid) for c in range(grid)]
    for q, (qr, qc) in enumerate(places, start=1):
        index[q, 0] = last + 1
        for k, (kr, kc) in enumerate(places, start=1):
            index[q, k] = (qr - kr + grid - 1) * (2 * grid - 1) + qc - kc + grid - 1
    index[0, 0] = last + 2
    return torch.from_numpy(index)


SILENT = ("MAE", "DINO", "MoCo v3")  # whose tensors do not tell the heads
ALL = {
    "LoMaR pretrained": lambda **sizes: lomar("pretrain", **sizes),
    "LoMaR fine-tuned": lambda **sizes: lomar("finetune", **sizes),
    "MAE pretrained": lambda **sizes: mae("pretrain", **sizes),
    "MAE encoder": lambda **sizes: mae("encoder", **sizes),
    "MAE fine-tuned": lambda **sizes: mae("finetune", **sizes),
    "MAE fine-tuned, cls": lambda **sizes: mae("finetune-cls", **sizes),
    "BEiT pretrained": lambda **sizes: beit("pretrain", **sizes),
    "BEiT fine-tuned": lambda **sizes: beit("finetune", **sizes),
    "DINO encoder": plain,
    "MoCo v3 encoder": moco,
}


def without(state: State, names: Iterable[str]) -> State:
    """The state less some of its tensors."""
    return {name: tensor for name, tensor in state.items() if name not in set(names)}
