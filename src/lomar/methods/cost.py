"""What an image costs by arithmetic alone: multiplications, weights, bytes; docs/performance.md has the formulas.

One multiply-add is two FLOPs. Matrix products and convolutions count; norms, softmax and the like are left out.
"""

from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

from lomar.methods.composition import Composition, TwoViewComposition
from lomar.methods.heads import BOTTLENECK
from lomar.methods.tokenizer import GROUPS, STRIDE
from lomar.methods.two_view import LARGE_CROPS
from lomar.model.positions import BUCKETS, Grid

STEP = 3  # forward passes that a training step costs: the backward pass is two products for each one

TRAINED_BYTES = 16  # of a weight in float32, its gradient and two moments
FIXED_BYTES = 4  # of one that is not trained


class Passage(NamedTuple):
    """Blocks of one transformer that the tokens of a view (cls among them) go through.

    Args:
        tokens: that give keys and values.
        queries: of them that are worked on.
        blocks: how many blocks.
        width: of a token.
        mlp_ratio: hidden width of the perceptrons over the width.
        views: of an image, which go through alike.
    """

    tokens: int
    queries: int
    blocks: int
    width: int
    mlp_ratio: float
    views: int


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass for one image, by what they are spent on.

    Args:
        embedding: patches -> tokens.
        linear: linear layers of all blocks, and that between encoder and decoder.
        attention: queries by keys, weights by values.
        position: the contextual position's products of queries and table.
        head: latents of the predicted patches -> predictions, or those of crops -> what is compared.
        teacher: all that a teacher or momentum encoder does, which no backward pass goes through.
    """

    embedding: int
    linear: int
    attention: int
    position: int
    head: int
    teacher: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(astuple(self))


def passages(c: Composition | TwoViewComposition) -> list[Passage]:
    """How the tokens of an image go through what learns: encoder and decoder, or the student, large crops first.

    The last block works on the predicted ones alone, of crops on the cls token.
    """
    if isinstance(c, TwoViewComposition):
        return _crop_passages(c, _crops(c))
    visible = 1 + c.view_size[0] * c.view_size[1] - c.hidden
    all_tokens = visible + c.predicted
    encoder, decoder = (c.embed_dim, c.mlp_ratio), (c.decoder_width, 4.0)
    if c.architecture == "encoder-decoder":
        early, late, (width, ratio) = c.depth, c.decoder_depth, decoder
    else:
        early, late, (width, ratio) = c.mask_layer, c.depth - c.mask_layer, encoder
    found = [
        Passage(visible, visible, early, *encoder, c.view_count),
        Passage(all_tokens, all_tokens, late - 1, width, ratio, c.view_count),
        Passage(all_tokens, c.predicted, 1, width, ratio, c.view_count),
    ]
    return [passage for passage in found if passage.blocks]


def _crops(c: TwoViewComposition) -> list[tuple[int, int]]:
    """Tokens (cls among them) of each kind of crop that the student sees, large ones first, and how many crops."""
    kinds = [(c.grid, LARGE_CROPS), (c.local_grid, c.local_crops)]
    return [(1 + rows * columns, count) for (rows, columns), count in kinds if count]


def _crop_passages(c: TwoViewComposition, crops: list[tuple[int, int]]) -> list[Passage]:
    """How crops go through an encoder; its last block works for the cls token."""
    found = [
        Passage(tokens, queries, blocks, c.embed_dim, c.mlp_ratio, count)
        for tokens, count in crops
        for queries, blocks in ((tokens, c.depth - 1), (1, 1))
    ]
    return [passage for passage in found if passage.blocks]


def image_tokens(c: Composition | TwoViewComposition) -> list[int]:
    """Tokens of an image, all its views and the cls token of each counted.

    Of masked reconstruction before and after the mask tokens enter, if there are any before; else one number, of all
    the crops that the student sees.
    """
    if isinstance(c, TwoViewComposition):
        return [sum(tokens * count for tokens, count in _crops(c))]
    return list(dict.fromkeys(passage.tokens * passage.views for passage in passages(c)))


def forward_flops(c: Composition | TwoViewComposition) -> Flops:
    """FLOPs of a forward pass for one image, a teacher's among them; a tokenizer's are extra, see `tokenizer_flops`.

    Crops that are distorted, and outputs that are compared, cost next to nothing and are left out.
    """
    if isinstance(c, TwoViewComposition):
        student, teacher = _tower_flops(c, _crops(c)), _tower_flops(c, _crops(c)[:1])  # it sees the large ones
        predicting = 2 * LARGE_CROPS * _products(_predictor_layers(c))
        return replace(student, head=student.head + predicting, teacher=teacher.total)
    patches = c.view_size[0] * c.view_size[1]
    embedded = patches if c.mask == "blockwise" else patches - c.hidden
    linear, attention, position = _block_products(passages(c), c.position)
    if c.architecture == "encoder-decoder":
        linear += c.view_count * (1 + patches - c.hidden) * c.embed_dim * c.decoder_width
    embedding = c.view_count * embedded * _patch_values(c) * c.embed_dim
    head = c.view_count * c.predicted * c.latent_width * c.outputs
    return Flops(*(2 * part for part in (embedding, linear, attention, position, head)))


def step_flops(c: Composition | TwoViewComposition) -> int:
    """FLOPs of a training step for one image: forward and backward through what learns, forward through a teacher.

    The patch embedding counts as all else, though the image needs no gradient, nor a frozen embedding any.
    """
    forward = forward_flops(c)
    return STEP * (forward.total - forward.teacher) + forward.teacher


def _patch_values(c: Composition | TwoViewComposition) -> int:
    return c.patch_size**2 * len(c.mean)


def _block_products(found: list[Passage], position: str) -> tuple[int, int, int]:
    """Multiply-adds of blocks for one image: linear layers, attention, contextual position."""
    linear = attention = contextual = 0
    for tokens, queries, blocks, width, ratio, views in found:
        hidden_width = int(width * ratio)
        # queries and the projection; keys and values; both layers of the perceptron
        linear += views * blocks * (2 * queries * width + 2 * tokens * width + 2 * queries * hidden_width) * width
        attention += views * blocks * 2 * queries * tokens * width
        contextual += views * blocks * queries * width * BUCKETS if position == "contextual" else 0
    return linear, attention, contextual


def _tower_flops(c: TwoViewComposition, crops: list[tuple[int, int]]) -> Flops:
    """Of an encoder and its head, for one image's crops of these tokens and numbers."""
    embedding = sum((tokens - 1) * count for tokens, count in crops) * _patch_values(c) * c.embed_dim
    head = sum(count for _, count in crops) * _products(_head_layers(c))
    return Flops(*(2 * part for part in (embedding, *_block_products(_crop_passages(c, crops), c.position), head)))


def _head_layers(c: TwoViewComposition) -> list[tuple[int, int]]:
    """What goes in and what comes out of each linear layer behind an encoder, the prototypes among them."""
    layers = [(c.embed_dim, c.head_width), (c.head_width, c.head_width)]
    if c.objective == "dino":
        return [*layers, (c.head_width, BOTTLENECK), (BOTTLENECK, c.head_outputs)]
    return [*layers, (c.head_width, c.head_outputs)]


def _predictor_layers(c: TwoViewComposition) -> list[tuple[int, int]]:
    """Likewise of the predictor behind MoCo v3's student."""
    return [] if c.objective == "dino" else [(c.head_outputs, c.head_width), (c.head_width, c.head_outputs)]


def _products(layers: list[tuple[int, int]]) -> int:
    """Multiply-adds of linear layers for one row, which are also their weights."""
    return sum(inputs * outputs for inputs, outputs in layers)


def tokenizer_flops(
    grid: Grid, channels: int = 3, width: int = 256, vocab: int = 8192, blocks_per_group: int = 2
) -> int:
    """FLOPs with which the encoder of a discrete VAE gives an image its tokens.

    Args:
        grid: (rows, columns) of tokens.
        channels, width, vocab, blocks_per_group: of the encoder, as for `DVAEEncoder`; OpenAI's if not given.
    """
    places = grid[0] * grid[1]
    total = places * STRIDE**2 * channels * width * 7**2
    before = width
    for group in range(GROUPS):
        after = width * 2**group
        inner = after // 4
        for _ in range(blocks_per_group):
            identity = before * after if before != after else 0
            residual = 9 * (before * inner + 2 * inner * inner) + inner * after
            total += places * (STRIDE >> group) ** 2 * (identity + residual)
            before = after
    return 2 * (total + places * before * vocab)


def trained_parameters(c: Composition | TwoViewComposition) -> int:
    """Numbers that pretraining learns: of encoder, decoder and head; not a teacher, nor a frozen patch embedding."""
    count = c.embed_dim + _transformer_parameters(c, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio)  # cls token
    patch_embedding = (_patch_values(c) + 1) * c.embed_dim
    if isinstance(c, TwoViewComposition):
        count += patch_embedding if c.patch_embed == "learned" else 0
        return count + _products(_head_layers(c) + _predictor_layers(c)) + _head_vectors(c)
    if c.architecture == "encoder-decoder":
        count += (c.embed_dim + 1) * c.decoder_width
        count += _transformer_parameters(c, c.decoder_width, c.decoder_depth, c.decoder_heads, 4.0)
    return count + patch_embedding + c.latent_width + (c.latent_width + 1) * c.outputs  # mask token, head


def _head_vectors(c: TwoViewComposition) -> int:
    """Biases of DINO's perceptron and lengths of prototypes; factors and offsets of three of MoCo v3's batch norms."""
    if c.objective == "mocov3":
        return 3 * 2 * c.head_width
    return 2 * c.head_width + BOTTLENECK + (c.head_outputs if c.norm_last_layer == "no" else 0)


def _transformer_parameters(
    c: Composition | TwoViewComposition, width: int, depth: int, heads: int, mlp_ratio: float
) -> int:
    """Of blocks and their last norm, with the tables of positions that learn."""
    hidden_width = int(width * mlp_ratio)
    qkv_bias = 2 * width if isinstance(c, Composition) and c.transformer == "beit" else 3 * width
    block = 4 * width + 3 * width**2 + qkv_bias + (width + 1) * width + 2 * width * hidden_width + hidden_width + width
    block += 2 * width if c.layer_scale else 0
    rows, columns = c.view_size
    bias = ((2 * rows - 1) * (2 * columns - 1) + 3) * heads
    block += {"contextual": width // heads * BUCKETS, "block-bias": bias}.get(c.position, 0)
    places = 1 + c.grid[0] * c.grid[1]
    table = {"shared-bias": bias, "learned": places * width}.get(c.position, 0)
    return depth * block + 2 * width + table


def kept_bytes(c: Composition | TwoViewComposition, item_bytes: int) -> int:
    """Bytes of one image's activations that blocks must keep for the backward pass if nothing is worked out twice.

    For each token, block and channel: the inputs of four matrix products (1 + 1 + 1 + 4 numbers), queries, keys and
    values (3), the input of the perceptron's GELU (4), all in `item_bytes`, and the inputs of two norms in float32.
    Attention that keeps its weights needs more; what lies outside the blocks is not counted.

    Args:
        c: the method.
        item_bytes: of a number in matrix products: 2 in bfloat16, 4 in float32.
    """
    kept = 0
    for tokens, queries, blocks, width, ratio, views in passages(c):
        of_queries = (3 + 2 * ratio) * item_bytes + 4  # the query, inputs of the projection and the perceptron
        of_tokens = 3 * item_bytes + 4  # input of the three, key, value
        kept += int(views * blocks * width * (queries * of_queries + tokens * of_tokens))
    return kept


def weight_bytes(c: Composition | TwoViewComposition) -> int:
    """Bytes of the weights that learn, their gradients and AdamW's two moments, in float32."""
    return TRAINED_BYTES * trained_parameters(c)
