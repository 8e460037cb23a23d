"""Pre-norm transformer blocks and the positions their tokens carry: the body of an encoder, or of a decoder."""

from collections.abc import Callable

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomar.model.attention import ALL, Attention, BiasedAttention, ContextualAttention, Relation
from lomar.model.positions import Grid, RelativeBias, learned_table, resize_absolute, sincos_table

NORM_EPS = 1e-6
# How tokens know where they are: LoMaR; MAE and MoCo v3; DINO; BEiT in pretraining; BEiT in fine-tuning; not at all.
POSITIONS = ("contextual", "sincos", "learned", "shared-bias", "block-bias", "none")


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on normalised tokens and added to them.

    Args:
        attention: of width D.
        width: token width D.
        mlp_ratio: hidden width of the perceptron over D.
        drop_path: probability that a sample skips a branch.
        init_values: initial factor of each branch and channel (layer scale), or None for no such factors.
    """

    def __init__(
        self, attention: Attention, width: int, mlp_ratio: float, drop_path: float, init_values: float | None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = attention
        self.ls1 = LayerScale(width, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.ls2 = LayerScale(width, init_values) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, relation: Relation, keep: Tensor | None = None, asked: slice = ALL) -> Tensor:
        """Tokens (R, N, D) -> (R, M, D).

        Args:
            x: tokens.
            relation: what the attention's `relate` gave.
            keep: factor of each branch in each row (R, 2), in the place of drop path's own draw.
            asked: which of the tokens are wanted; the others are looked at and go no further.
        """
        branch = self.attended(x, relation, asked)
        x = x if asked == ALL else x[:, asked]
        x = x + (self.drop_path(branch) if keep is None else branch * keep[:, 0, None, None].to(branch.dtype))
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + (self.drop_path(branch) if keep is None else branch * keep[:, 1, None, None].to(branch.dtype))

    def attended(self, x: Tensor, relation: Relation, asked: slice) -> Tensor:
        """The first branch: (R, M, D), what is added to the tokens that are asked for."""
        return self.ls1(self.attn(self.norm1(x), relation, asked))


class Transformer(nn.Module):
    """Blocks, a final norm, and one of `POSITIONS`.

    Args:
        position: how tokens know where they are.
        grid: (H, W) of the image, in patches: what absolute positions cover.
        bias_grid: (H, W) that relative biases cover; the view, where views are smaller than the image.
        embed_dim: token width D.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the perceptrons over D.
        key_bias: whether keys have a bias.
        drop_path_rate: probability of skipping the last block's branches; it grows linearly from 0 at the first block.
        init_values: of layer scale, or None.

    Raises:
        ValueError: the width is not a multiple of the heads, or the position is unknown.
    """

    drop_rates: Tensor

    def __init__(
        self,
        position: str,
        grid: Grid,
        bias_grid: Grid,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        key_bias: bool = True,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if position not in POSITIONS:
            raise ValueError(f"position is {position!r}; it can be {', '.join(POSITIONS)}")
        self.grid = grid
        self.drop_path_rate = drop_path_rate
        self.grad_checkpointing = False
        self.pos_embed: nn.Parameter | None = None
        if position == "sincos":  # fixed in pretraining, as in MAE; fine-tuning may let it learn
            self.pos_embed = nn.Parameter(sincos_table(grid, embed_dim), requires_grad=False)
        elif position == "learned":
            self.pos_embed = nn.Parameter(learned_table(grid, embed_dim))
        self.rel_pos_bias = RelativeBias(bias_grid, num_heads) if position == "shared-bias" else None
        attention: Callable[[], Attention] = {
            "contextual": lambda: ContextualAttention(embed_dim, num_heads, key_bias),
            "block-bias": lambda: BiasedAttention(embed_dim, num_heads, key_bias, bias_grid),
        }.get(position, lambda: Attention(embed_dim, num_heads, key_bias))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList([Block(attention(), embed_dim, mlp_ratio, rate, init_values) for rate in rates])
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.register_buffer("drop_rates", torch.tensor(rates), persistent=False)

    def place(self, tokens: Tensor, coordinates: Tensor, extent: Grid | None = None) -> Tensor:
        """Patch tokens (R, N, D) with their absolute positions added, where there are any.

        Args:
            tokens: of patches.
            coordinates: int64 (R or 1, N, 2).
            extent: (rows, columns) of a whole image that they fill, if it may differ from `grid`.
        """
        if self.pos_embed is None:
            return tokens
        grid = extent or self.grid
        table = resize_absolute(self.pos_embed, self.grid, grid)[0, 1:]
        return tokens + table[coordinates[..., 0] * grid[1] + coordinates[..., 1]]

    def place_cls(self, cls_token: Tensor) -> Tensor:
        """A cls token (R, 1, D) with its absolute position added, where there is any."""
        return cls_token if self.pos_embed is None else cls_token + self.pos_embed[:, :1]

    def relate(self, coordinates: Tensor, extent: Grid | None = None) -> Relation:
        """What the blocks need to know of relative positions.

        Args:
            coordinates: integer (R or 1, N, 2).
            extent: (rows, columns) of a whole image that they fill, if it may be more than in pretraining.
        """
        if self.rel_pos_bias is not None:
            bias = self.rel_pos_bias(self.rel_pos_bias.relate(coordinates, extent))
            device = bias.device.type  # once for all blocks, which would each keep a copy of their own
            return bias.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else bias
        return self.blocks[0].attn.relate(coordinates, extent)  # type: ignore[union-attr,operator]

    def run_blocks(
        self,
        x: Tensor,
        relation: Relation,
        first: int = 0,
        last: int | None = None,
        paths: Tensor | None = None,
        asked: slice = ALL,
    ) -> Tensor:
        """Tokens after blocks `first` to `last` (exclusive).

        Args:
            x: (R, 1 + N, D), cls first.
            relation: from `relate`, for these tokens.
            first, last: range of blocks.
            paths: (R, depth, 2) uniform numbers that decide for drop path, so that a sample's draw is its own; without
                them it draws from torch's global generator.
            asked: which of the tokens are wanted; the last block spares what the others would need of it alone.

        Returns:
            (R, M, D), of M that are asked for.
        """
        keep = None if paths is None else (paths >= self.drop_rates[:, None]) / (1 - self.drop_rates[:, None])
        blocks = list(enumerate(self.blocks))[first:last]
        for i, block in blocks:
            ends = i == blocks[-1][0]
            x = self._run(block, x, relation, None if keep is None else keep[:, i], asked if ends else ALL)
        return x

    def _run(
        self, block: nn.Module, x: Tensor, relation: Relation, keep: Tensor | None = None, asked: slice = ALL
    ) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, relation, keep, asked, use_reentrant=False)
        return block(x, relation, keep, asked)

    def set_grid(self, grid: Grid) -> None:
        """Be made for another grid: tables that depend on it are resized for good."""
        if self.pos_embed is not None:
            fixed = not self.pos_embed.requires_grad
            table = resize_absolute(self.pos_embed.detach(), self.grid, grid)
            self.pos_embed = nn.Parameter(table, requires_grad=not fixed)
        for module in self.modules():
            if isinstance(module, RelativeBias):
                module.set_grid(grid)
        self.grid = grid
