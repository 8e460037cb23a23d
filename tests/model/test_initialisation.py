"""Fresh weights follow the released code of their family (SPEC.md, A.7, B.4, C.1, D.1 and D.2)."""

import pytest
import torch

from lomar.model import Encoder

SIZE = {"num_classes": 0, "img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item()


def test_xavier_fills_q_k_and_v_as_one_matrix_and_keeps_the_patch_bias() -> None:
    encoder = Encoder(**SIZE)
    bound = (6 / (48 + 3 * 48)) ** 0.5
    for block in encoder.blocks:
        assert 0.97 * bound < largest(block.attn.qkv.weight) <= bound
        assert largest(block.attn.qkv.bias) == largest(block.mlp.fc1.bias) == 0
    projection = encoder.patch_embed.proj
    assert 0.97 * (6 / (48 + 48)) ** 0.5 < largest(projection.weight) <= (6 / (48 + 48)) ** 0.5
    assert 0 < largest(projection.bias) <= 48**-0.5  # torch's own
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.4)


def test_beit_cuts_normal_weights_at_one_deviation_and_scales_branches_down_with_depth() -> None:
    encoder = Encoder(**SIZE, position="shared-bias", key_bias=False, init_values=0.1, weight_init="beit")
    for number, block in enumerate(encoder.blocks, start=1):
        for layer in block.attn.qkv, block.mlp.fc1:
            assert 0.019 < largest(layer.weight) <= 0.02
        for layer in block.attn.proj, block.mlp.fc2:
            assert 0.019 < largest(layer.weight) * (2 * number) ** 0.5 <= 0.02 + 1e-7
        assert largest(block.attn.q_bias) == largest(block.attn.v_bias) == 0
        assert block.ls1.gamma.eq(0.1).all() and block.ls2.gamma.eq(0.1).all()
    assert largest(encoder.patch_embed.proj.weight) <= 0.02
    assert largest(encoder.patch_embed.proj.bias) == 0
    assert 0 < largest(encoder.cls_token) <= 0.02
    assert largest(encoder.rel_pos_bias.table) == 0


def test_dino_leaves_the_patch_embedding_to_torch_and_draws_the_rest_from_one_normal() -> None:
    encoder = Encoder(**SIZE, position="learned", weight_init="dino")
    for block in encoder.blocks:
        for layer in block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2:
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert largest(layer.weight) > 0.05  # cut nowhere near
            assert largest(layer.bias) == 0
    assert 0.01 < encoder.cls_token.std() < 0.03
    projection = encoder.patch_embed.proj
    for tensor in projection.weight, projection.bias:
        assert 0.9 * 48**-0.5 < largest(tensor) <= 48**-0.5  # torch's own, of 3 * 4^2 inputs


def test_mocov3_fills_q_k_and_v_as_a_matrix_each_and_begins_with_cls_near_zero() -> None:
    encoder = Encoder(**SIZE, position="sincos", weight_init="mocov3")
    for block in encoder.blocks:
        for matrix in block.attn.qkv.weight.chunk(3):
            bound = (6 / (48 + 48)) ** 0.5
            assert 0.97 * bound < largest(matrix) <= bound
            assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        for layer, fans in (block.attn.proj, 48 + 48), (block.mlp.fc1, 5 * 48), (block.mlp.fc2, 5 * 48):
            assert 0.97 * (6 / fans) ** 0.5 < largest(layer.weight) <= (6 / fans) ** 0.5
            assert largest(layer.bias) == 0
        assert largest(block.attn.qkv.bias) == 0
    projection = encoder.patch_embed.proj
    assert 0.97 * (6 / (3 * 4**2 + 48)) ** 0.5 < largest(projection.weight) <= (6 / (3 * 4**2 + 48)) ** 0.5
    assert largest(projection.bias) == 0
    assert 0 < largest(encoder.cls_token) < 1e-5
