"""The encoder: a pre-norm vision transformer, which knows positions through contextual relative encoding or otherwise.

It is a timm model: `import lomar.model`, then `timm.create_model("lomar_vit_base_patch16")`.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import PatchEmbed, global_pool_nlc
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from lomar.model.attention import ALL, Relation
from lomar.model.initialisation import INITIALISATIONS
from lomar.model.positions import Grid, grid_coordinates, resize_absolute
from lomar.model.transformer import NORM_EPS, Transformer

# name -> width, depth, heads. Base, large, huge: MAE and LoMaR; tiny and small: DeiT.
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


def size_of(model: str) -> tuple[int, int, int]:
    """Width, depth and heads of a name in `SIZES`, or of "WIDTHxDEPTHxHEADS".

    Raises:
        ValueError: it is neither, or the width is not a multiple of the heads.
    """
    if model in SIZES:
        return SIZES[model]
    parts = model.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{model!r} is no size; it can be {', '.join(SIZES)}, or WIDTHxDEPTHxHEADS such as 768x12x12")
    width, depth, heads = map(int, parts)
    if width % heads:
        raise ValueError(f"{model!r}: a width of {width} is not a multiple of {heads} heads")
    return width, depth, heads


def crop_pct(size: tuple[int, int]) -> float:
    """How much of an image's shorter side evaluation looks at: 0.875 up to 224 pixels, all of it above.

    Args:
        size: (height, width) of what the encoder gets, in pixels.

    Source: the released fine-tuning code of MAE and LoMaR. The name is timm's, in a model's `pretrained_cfg`.
    """
    return 0.875 if max(size) <= 224 else 1.0


class Encoder(Transformer):
    """Vision transformer; with contextual relative position if nothing else is asked for.

    Any image whose sides are multiples of the patch side goes in, at any resolution. Contextual position needs nothing
    for that; tables of absolute positions and relative biases are resized to the image.

    An encoder (`num_classes=0`) normalises its tokens with `norm`. A classifier that pools patch tokens has no `norm`;
    it normalises the pooled vector with `fc_norm`, as MAE and LoMaR fine-tune.

    Args:
        img_size: default input side or (height, width), in pixels.
        patch_size: patch side P, in pixels.
        in_chans: input channels C.
        num_classes: outputs of `head`; 0 leaves the pooled features.
        global_pool: "avg" pools patch tokens, "token" takes the cls token, "" keeps all tokens.
        fc_norm: whether `fc_norm` normalises the pooled vector and `norm` is absent; None is as said above.
        embed_dim, depth, num_heads: see `SIZES`.
        mlp_ratio: hidden width of the perceptrons over `embed_dim`.
        drop_rate: dropout before `head`.
        drop_path_rate: probability of skipping the last block's branches; it grows linearly from 0 at the first block.
        position: one of `lomar.model.transformer.POSITIONS`.
        bias_grid: (rows, columns) that the tables of relative biases cover; None is the grid of `img_size`.
        key_bias: whether keys have a bias; BEiT's have none.
        init_values: initial value of layer scale, or None for no layer scale.
        weight_init: a name in `lomar.model.initialisation.INITIALISATIONS`.

    Raises:
        ValueError: `embed_dim` is not a multiple of `num_heads`, or `global_pool` or `position` is unknown.

    Source: LoMaR sections 3.2 and 6.1; sizes and initialisation as the released code; MAE; BEiT.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        fc_norm: bool | None = None,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        position: str = "contextual",
        bias_grid: Grid | None = None,
        key_bias: bool = True,
        init_values: float | None = None,
        weight_init: str = "xavier",
    ) -> None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid = height // patch_size, width // patch_size
        bias_grid = tuple(bias_grid) if bias_grid else grid  # type: ignore[assignment]  # JSON makes it a list
        assert bias_grid is not None
        super().__init__(
            position, grid, bias_grid, embed_dim, depth, num_heads, mlp_ratio, key_bias, drop_path_rate, init_values
        )
        if global_pool not in ("avg", "token", ""):
            raise ValueError(f"global_pool is {global_pool!r}; it can be 'avg', 'token' or ''")
        # What rebuilds this encoder without its classifier; saved beside the weights.
        self.architecture: dict[str, Any] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "position": position,
            "bias_grid": bias_grid,
            "key_bias": key_bias,
            "init_values": init_values,
            "weight_init": weight_init,
        }
        self.pretrained_cfg: dict[str, Any] | None = (
            None  # where the weights come from; set by timm and by `lomar.load`
        )
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.initialisation = INITIALISATIONS[weight_init]

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        normalises_pooled = num_classes > 0 and global_pool == "avg" if fc_norm is None else fc_norm
        if normalises_pooled:
            self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim, eps=NORM_EPS) if normalises_pooled else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.init_weights()

    def init_weights(self) -> None:
        """Fill all weights as `weight_init` says; tables of positions stay as they are."""
        self.initialisation.blocks(self.blocks)
        self.initialisation.convolution(self.patch_embed.proj)
        self.initialisation.token(self.cls_token)
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Tokens of patches that were already cut out; equal to the convolution on the image.

        Args:
            patches: (R, N, P * P * C), pixels in order (row, column, channel).

        Returns:
            (R, N, D), in the weights' own type under autocast too, as in the released LoMaR, MAE and BEiT: what the
            blocks add up to is not rounded.
        """
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P * P * C)
        return nn.functional.linear(patches, weight, self.patch_embed.proj.bias).to(weight.dtype)

    def embed(self, patches: Tensor, coordinates: Tensor) -> Tensor:
        """Tokens of some patches of an image, cls first, with their absolute positions where there are any.

        Args:
            patches: (R, N, P * P * C), pixels in order (row, column, channel).
            coordinates: int64 (R or 1, N, 2).

        Returns:
            (R, 1 + N, D).
        """
        return self.prepend_cls(self.place(self.embed_patches(patches), coordinates))

    def prepend_cls(self, tokens: Tensor) -> Tensor:
        """(R, N, D) patch tokens -> (R, 1 + N, D) with the cls token first."""
        return torch.cat([self.place_cls(self.cls_token).expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def _tokens(self, images: Tensor) -> tuple[Tensor, Relation]:
        """(B, C, height, width) -> tokens (B, 1 + N, D) and what the blocks need to know of their positions."""
        extent = self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        coordinates = grid_coordinates(*extent, images.device)[None]
        tokens = self.place(self.patch_embed(images).to(self.cls_token.dtype), coordinates, extent)
        return self.prepend_cls(tokens), self.relate(coordinates, extent)

    def forward_features(self, x: Tensor, paths: Tensor | None = None) -> Tensor:
        """(B, C, height, width) normalised images -> (B, 1 + N, D) tokens, cls first, after the final norm.

        Args:
            x: the images.
            paths: (B, depth, 2) uniform numbers that decide for drop path; without them it draws its own in training.
        """
        return self._features(x, paths, ALL)

    def _features(self, x: Tensor, paths: Tensor | None, asked: slice) -> Tensor:
        """Those of the tokens (B, M, D) that are asked for."""
        return self.norm(self.run_blocks(*self._tokens(x), paths=paths, asked=asked))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1 + N, D) tokens -> logits (B, num_classes), or the pooled features before `head`."""
        x = self.fc_norm(global_pool_nlc(x, self.global_pool, num_prefix_tokens=self.num_prefix_tokens))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, paths: Tensor | None = None) -> Tensor:
        """(B, C, height, width) normalised images -> logits, or pooled features where there is no classifier.

        Where the cls token is what is pooled, the last block works for it alone, which changes nothing but what a hook
        sees there; `forward_features` has it work for all.

        Args:
            x: the images.
            paths: as for `forward_features`.
        """
        asked = slice(0, 1) if self.global_pool == "token" else ALL
        return self.forward_head(self._features(x, paths, asked))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Tokens after chosen blocks, with timm's arguments and order of results.

        Args:
            x: (B, C, height, width).
            indices: blocks to return: the last n, a list, or None for all.
            return_prefix_tokens: return (patch tokens, cls token) pairs.
            norm: apply the final norm to every one.
            stop_early: do not run the blocks after the last one asked for.
            output_fmt: "NCHW" maps (B, D, H, W) or "NLC" sequences (B, N, D).
            intermediates_only: leave out the final features.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it can be 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        rows, columns = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        x, relation = self._tokens(x)
        kept = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run(block, x, relation)
            if i in take:
                kept.append(self.norm(x) if norm else x)
        prefix = [t[:, : self.num_prefix_tokens] for t in kept]
        maps = [t[:, self.num_prefix_tokens :] for t in kept]
        if output_fmt == "NCHW":
            maps = [t.transpose(1, 2).unflatten(2, (rows, columns)).contiguous() for t in maps]
        intermediates = list(zip(maps, prefix, strict=True)) if return_prefix_tokens else maps
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one in `indices`, and the norm and head if asked; return `indices`."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        An encoder that becomes a classifier of pooled patches gets a fresh `fc_norm` in the place of its `norm`, as in
        MAE's and LoMaR's fine-tuning; 0 classes later keep that `fc_norm` for the pooled features.
        """
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        device, dtype = self.cls_token.device, self.cls_token.dtype
        if num_classes and self.global_pool == "avg" and isinstance(self.fc_norm, nn.Identity):
            self.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(self.embed_dim, eps=NORM_EPS, device=device, dtype=dtype)
        self.head = nn.Linear(self.embed_dim, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()
        self._init_head()

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the default input size, in pixels; tables of positions are resized, contextual ones need not be."""
        self.patch_embed.set_input_size(img_size)
        self.set_grid(self.patch_embed.grid_size)
        self.architecture |= {"img_size": img_size, "bias_grid": self.grid}
        self.tell_size()

    def tell_size(self) -> None:
        """Let `pretrained_cfg`, which timm's transforms are made from, say the default input size."""
        if self.pretrained_cfg is not None:
            size = self.patch_embed.img_size
            channels = self.architecture["in_chans"]
            self.pretrained_cfg |= {"input_size": (channels, *size), "crop_pct": crop_pct(size)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass: less memory, about a third more time."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names that fine-tuning does not decay beside biases and norms."""
        return {"cls_token", "pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates: stem, blocks in order, then all that follows."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^rel_pos_bias", (99999,))],
        }


# An encoder of any size: whoever names it gives the size too, as the config.json of `lomar export` does.
ANY_SIZE = "lomar_vit"


def _shapes() -> dict[str, dict[str, int]]:
    """timm name -> the arguments of `Encoder` that it stands for."""
    named = [(size, patch) for size in SIZES if size != "huge" for patch in (8, 14, 16)] + [("huge", 14)]
    shapes: dict[str, dict[str, int]] = {ANY_SIZE: {}}
    for size, patch in named:
        width, depth, heads = SIZES[size]
        shape = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
        shapes[f"lomar_vit_{size}_patch{patch}"] = shape
    return shapes


default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "fixed_input_size": False,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
        for name in _shapes()
    }
)


def _fitted(state: dict[str, Tensor], model: Encoder) -> dict[str, Tensor]:
    """Pretrained weights for a model that was asked for another image size: absolute positions are resized to it."""
    table = state.get("pos_embed")
    if table is None or model.pos_embed is None or table.shape == model.pos_embed.shape:
        return state
    assert model.pretrained_cfg is not None  # timm has set it
    patch = model.architecture["patch_size"]
    height, width = (side // patch for side in model.pretrained_cfg["input_size"][1:])
    return state | {"pos_embed": resize_absolute(table, (height, width), model.grid)}


def _entry_point(name: str, shape: dict[str, int]) -> Callable[..., Encoder]:
    def create(pretrained: bool = False, **kwargs: Any) -> Encoder:
        model = build_model_with_cfg(
            Encoder,
            name,
            pretrained,
            pretrained_filter_fn=_fitted,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **(shape | kwargs),
        )
        config = model.pretrained_cfg or {}
        if isinstance(model, Encoder) and model.patch_embed.img_size != tuple(config["input_size"][1:]):
            model.tell_size()  # it was made for another size than its weights, or than timm's default
        return model

    create.__name__ = create.__qualname__ = name
    values = ", ".join(f"{argument} {value}" for argument, value in shape.items())
    create.__doc__ = f"LoMaR encoder: {values or 'of the arguments that are given, as for `Encoder`'}."
    return register_model(create)


for _name, _shape in _shapes().items():
    _entry_point(_name, _shape)
