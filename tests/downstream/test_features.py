"""Claims about taking features from an encoder without disturbing it."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lomar.downstream.features import pooled_features

CPU = torch.device("cpu")


class Tokens(nn.Module):
    """A toy encoder whose tokens can be worked by hand: cls = 1000, then each pixel row as one token."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3).eval()

    def forward_features(self, x: Tensor) -> Tensor:
        tokens = x[:, 0]  # (B, S, S): S tokens of width S
        return torch.cat([torch.full_like(tokens[:, :1], 1000.0), self.drop(tokens)], dim=1)


def halved(pixels: Tensor) -> Tensor:
    return pixels.float() / 2


def pixels(count: int) -> Tensor:
    return torch.randint(256, (count, 1, 3, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_the_feature_is_the_mean_of_the_patch_tokens_without_cls() -> None:
    images = pixels(5)
    good = torch.tensor([True, True, False, True, True])
    batches = [(images[:3], good[:3]), (images[3:], good[3:])]
    features, kept = pooled_features(Tokens(), batches, halved, CPU)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, images[:, 0].float().mean(dim=1) / 2)
    assert torch.equal(kept, good)


def test_16_bit_pixels_reach_the_normalisation_unchanged() -> None:
    images = torch.full((2, 1, 3, 3), 40_000, dtype=torch.uint16)
    features, _ = pooled_features(Tokens(), [(images, torch.ones(2, dtype=torch.bool))], halved, CPU)
    assert torch.equal(features, torch.full((2, 3), 20_000.0))


def test_training_flags_and_the_random_state_are_left_as_they_were() -> None:
    encoder = Tokens().train()
    encoder.frozen.eval()
    loader = DataLoader(TensorDataset(pixels(4), torch.ones(4, dtype=torch.bool)), batch_size=2)
    state = torch.get_rng_state()
    pooled_features(encoder, loader, halved, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training and encoder.drop.training and not encoder.frozen.training


def test_training_flags_come_back_when_a_batch_fails() -> None:
    encoder = Tokens().train()
    with pytest.raises(IndexError):
        pooled_features(encoder, [(torch.zeros(2), torch.ones(2))], halved, CPU)
    assert encoder.training and encoder.drop.training


def test_the_features_can_be_trained_on() -> None:
    features, _ = pooled_features(Tokens(), [(pixels(2), torch.ones(2))], halved, CPU)
    nn.Linear(3, 2)(features).sum().backward()


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batch"):
        pooled_features(Tokens(), [], halved, CPU)
