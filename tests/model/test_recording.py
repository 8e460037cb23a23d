"""Claims about recorded attention, and about the distance it goes."""

import math

import pytest
import torch
from torch import Tensor, nn

from lomar.model import Encoder
from lomar.model.positions import grid_coordinates
from lomar.model.recording import attention_distance, between_patches, recorded_attention
from lomar.model.transformer import POSITIONS


def encoder(position: str = "contextual") -> Encoder:
    """Five blocks of two heads, at a grid of 3 x 5; tables of positions, zero at first, are filled."""
    torch.manual_seed(0)
    made = Encoder((12, 20), 4, 3, 0, embed_dim=16, depth=5, num_heads=2, position=position, key_bias=False)
    for name, parameter in made.named_parameters():
        if "table" in name or "bias" in name:
            nn.init.normal_(parameter)
    return made.eval()


@pytest.mark.parametrize("position", POSITIONS)
def test_what_is_recorded_is_what_the_blocks_used(position: str) -> None:
    """Values weighted by it give each attention's output."""
    made = encoder(position)
    seen: list[tuple[Tensor, Tensor]] = []
    for block in made.blocks:
        block.attn.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    with torch.no_grad(), recorded_attention(made.blocks, lambda weights: weights) as kept:
        made.forward_features(torch.randn(2, 3, 12, 20))
    for block, weights, (x, out) in zip(made.blocks, kept, seen, strict=True):
        assert weights.shape == (2, 2, 16, 16) and torch.allclose(weights.sum(-1), torch.ones(()))
        v = x @ block.attn.qkv.weight[32:].T + block.attn.v_bias  # (R, 1 + N, D)
        heads = weights @ v.view(2, 16, 2, 8).transpose(1, 2)  # (R, heads, 1 + N, D / heads)
        assert torch.allclose(block.attn.proj(heads.transpose(1, 2).flatten(2)), out, atol=1e-5)


def test_recording_changes_no_output_and_no_gradient() -> None:
    made, images = encoder(), torch.randn(1, 3, 12, 20)
    plain = made.forward_features(images)
    plain.square().sum().backward()
    gradient = made.blocks[0].attn.qkv.weight.grad
    made.zero_grad(set_to_none=True)
    with recorded_attention(made.blocks, lambda weights: weights) as kept:
        recorded = made.forward_features(images)
    recorded.square().sum().backward()
    assert torch.equal(recorded, plain) and torch.equal(made.blocks[0].attn.qkv.weight.grad, gradient)
    assert not any(weights.requires_grad for weights in kept)


def test_only_the_chosen_blocks_are_recorded_and_only_what_is_kept_of_them() -> None:
    made, images = encoder(), torch.randn(1, 3, 12, 20)
    with torch.no_grad():
        with recorded_attention(made.blocks, lambda weights: weights[0, :, 7]) as every:
            made.forward_features(images)
        with recorded_attention(made.blocks[1::2], lambda weights: weights[0, :, 7]) as some:
            made.forward_features(images)
    assert len(every) == 5 and [len(some), *some[0].shape] == [2, 2, 16]
    assert torch.equal(some[0], every[1]) and torch.equal(some[1], every[3])


def test_nothing_is_recorded_afterwards_even_if_the_pass_failed() -> None:
    made = encoder()
    with pytest.raises(RuntimeError), recorded_attention(made.blocks, lambda weights: 1) as kept:
        made.forward_features(torch.randn(1, 4, 12, 20))
    made.forward_features(torch.randn(1, 3, 12, 20))
    assert kept == []


def test_attention_spread_evenly_over_a_grid_goes_the_mean_distance_of_its_pairs() -> None:
    at = grid_coordinates(3, 5)[None]
    # |difference| of rows and of columns -> how many of the 15 x 15 pairs have it
    rows, columns = {0: 3, 1: 4, 2: 2}, {0: 5, 1: 8, 2: 6, 3: 4, 4: 2}
    total = sum(n * m * math.hypot(a, b) for a, n in rows.items() for b, m in columns.items())
    assert attention_distance(torch.full((2, 3, 15, 15), 1 / 15), at, at) == pytest.approx(total / 225)


def test_a_patch_that_looks_at_itself_goes_no_way() -> None:
    at = grid_coordinates(7, 11)[None]
    assert attention_distance(torch.eye(77)[None, None], at, at) == 0.0


def test_distance_is_the_mean_over_heads_and_queries() -> None:
    """One head looks at itself and one 3 rows and 4 columns away; another query's looks go 1 and 2."""
    queries = torch.tensor([[[2, 3], [0, 0]]])
    keys = torch.tensor([[[2, 3], [5, 7], [0, 1], [2, 0]]])
    shares = torch.zeros(1, 2, 2, 4)
    shares[0, 0, 0, 0] = shares[0, 1, 0, 1] = shares[0, 0, 1, 2] = shares[0, 1, 1, 3] = 1
    assert attention_distance(shares, queries, keys) == pytest.approx((0 + 5 + 1 + 2) / 4)


def test_what_goes_to_cls_is_left_out_and_the_rest_are_shares_of_one() -> None:
    weights = torch.tensor([[0.6, 0.1, 0.3], [0.0, 0.5, 0.5]])
    assert torch.allclose(between_patches(weights), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
