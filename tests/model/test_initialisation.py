"""Fresh weights follow the released code of their family (SPEC.md, A.7, B.4 and C.1)."""

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
