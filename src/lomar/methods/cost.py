"""What an image costs by arithmetic alone: multiplications, weights, bytes; docs/performance.md has the formulas.

One multiply-add is two FLOPs. Matrix products and convolutions count; norms, softmax and the like are left out.
"""

from dataclasses import astuple, dataclass
from typing import NamedTuple

from lomar.methods.composition import Composition
from lomar.methods.tokenizer import GROUPS, STRIDE
from lomar.model.positions import BUCKETS, Grid

STEP = 3  # forward passes that a training step costs: the backward pass is two products for each one

TRAINED_BYTES = 16  # of a weight in float32, its gradient and two moments


class Passage(NamedTuple):
    """Blocks of one transformer that the tokens of a view (cls among them) go through.

    Args:
        tokens: that give keys and values.
        queries: of them that are worked on.
        blocks: how many blocks.
        width: of a token.
        mlp_ratio: hidden width of the perceptrons over the width.
    """

    tokens: int
    queries: int
    blocks: int
    width: int
    mlp_ratio: float


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass for one image, by what they are spent on.

    Args:
        embedding: patches -> tokens.
        linear: linear layers of all blocks, and that between encoder and decoder.
        attention: queries by keys, weights by values.
        position: the contextual position's products of queries and table.
        head: latents of the predicted patches -> predictions.
    """

    embedding: int
    linear: int
    attention: int
    position: int
    head: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(astuple(self))


def passages(c: Composition) -> list[Passage]:
    """How the tokens of one view go through encoder and decoder; the last block works on the predicted ones alone."""
    visible = 1 + c.view_size[0] * c.view_size[1] - c.hidden
    all_tokens = visible + c.predicted
    encoder, decoder = (c.embed_dim, c.mlp_ratio), (c.decoder_width, 4.0)
    if c.architecture == "encoder-decoder":
        early, late, (width, ratio) = c.depth, c.decoder_depth, decoder
    else:
        early, late, (width, ratio) = c.mask_layer, c.depth - c.mask_layer, encoder
    found = [
        Passage(visible, visible, early, *encoder),
        Passage(all_tokens, all_tokens, late - 1, width, ratio),
        Passage(all_tokens, c.predicted, 1, width, ratio),
    ]
    return [passage for passage in found if passage.blocks]


def forward_flops(c: Composition) -> Flops:
    """FLOPs of a forward pass for one image; a tokenizer's are extra, see `tokenizer_flops`."""
    patches = c.view_size[0] * c.view_size[1]
    embedded = patches if c.mask == "blockwise" else patches - c.hidden
    values = c.patch_size**2 * len(c.mean)
    linear = attention = position = 0
    for tokens, queries, blocks, width, ratio in passages(c):
        hidden_width = int(width * ratio)
        # queries and the projection; keys and values; both layers of the perceptron
        linear += blocks * (2 * queries * width + 2 * tokens * width + 2 * queries * hidden_width) * width
        attention += blocks * 2 * queries * tokens * width
        position += blocks * queries * width * BUCKETS if c.position == "contextual" else 0
    if c.architecture == "encoder-decoder":
        linear += (1 + patches - c.hidden) * c.embed_dim * c.decoder_width
    head = c.predicted * c.latent_width * c.outputs
    parts = embedded * values * c.embed_dim, linear, attention, position, head
    return Flops(*(2 * c.view_count * part for part in parts))


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


def trained_parameters(c: Composition) -> int:
    """Numbers that pretraining learns, of encoder, decoder and head."""
    count = c.patch_size**2 * len(c.mean) * c.embed_dim + 2 * c.embed_dim  # patch embedding, cls token
    count += _transformer_parameters(c, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio)
    if c.architecture == "encoder-decoder":
        count += (c.embed_dim + 1) * c.decoder_width
        count += _transformer_parameters(c, c.decoder_width, c.decoder_depth, c.decoder_heads, 4.0)
    return count + c.latent_width + (c.latent_width + 1) * c.outputs  # mask token, head


def _transformer_parameters(c: Composition, width: int, depth: int, heads: int, mlp_ratio: float) -> int:
    """Of blocks and their last norm, with the tables of positions that learn."""
    hidden_width = int(width * mlp_ratio)
    qkv_bias = 2 * width if c.transformer == "beit" else 3 * width
    block = 4 * width + 3 * width**2 + qkv_bias + (width + 1) * width + 2 * width * hidden_width + hidden_width + width
    block += 2 * width if c.layer_scale else 0
    rows, columns = c.view_size
    bias = ((2 * rows - 1) * (2 * columns - 1) + 3) * heads
    block += {"contextual": width // heads * BUCKETS, "block-bias": bias}.get(c.position, 0)
    places = 1 + c.grid[0] * c.grid[1]
    table = {"shared-bias": bias, "learned": places * width}.get(c.position, 0)
    return depth * block + 2 * width + table


def kept_bytes(c: Composition, item_bytes: int) -> int:
    """Bytes of one image's activations that blocks must keep for the backward pass if nothing is worked out twice.

    For each token, block and channel: the inputs of four matrix products (1 + 1 + 1 + 4 numbers), queries, keys and
    values (3), the input of the perceptron's GELU (4), all in `item_bytes`, and the inputs of two norms in float32.
    Attention that keeps its weights needs more; what lies outside the blocks is not counted.

    Args:
        c: the method.
        item_bytes: of a number in matrix products: 2 in bfloat16, 4 in float32.
    """
    kept = 0
    for tokens, queries, blocks, width, ratio in passages(c):
        of_queries = (3 + 2 * ratio) * item_bytes + 4  # the query, inputs of the projection and the perceptron
        of_tokens = 3 * item_bytes + 4  # input of the three, key, value
        kept += int(blocks * width * (queries * of_queries + tokens * of_tokens))
    return c.view_count * kept


def weight_bytes(c: Composition) -> int:
    """Bytes of the weights, their gradients and AdamW's two moments, in float32."""
    return TRAINED_BYTES * trained_parameters(c)
