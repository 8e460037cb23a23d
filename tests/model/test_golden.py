"""Parity with the released code, by its golden vectors (SPEC.md, H1 and H3)."""

import pytest
import torch
from golden import TOLERANCE, fill, filler

from lomar.model import Encoder, attention, positions
from lomar.model.attention import ContextualAttention
from lomar.model.positions import NOWHERE, grid_coordinates


def classifier() -> Encoder:
    model = Encoder(32, 4, num_classes=10, embed_dim=48, depth=2, num_heads=3).double().eval()
    fill(model, "classifier")
    return model


def logits(model: Encoder, images: int, side_px: int) -> torch.Tensor:
    return model((4 * filler(images * 3 * side_px**2, j=1000)).reshape(images, 3, side_px, side_px))


def test_attention_equals_the_released_layer() -> None:
    """H1."""
    layer = ContextualAttention(48, 3).double()
    fill(layer)
    x = (4 * filler(2 * 50 * 48, j=1000)).reshape(2, 50, 48)
    out = layer(x, layer.relate(grid_coordinates(7, 7)[None], None))
    expected = {
        (0, 0): [0.41391782, 3.13943365, -3.63805445, 0.79820989],
        (0, 1): [-0.08445485, 2.3904794, -3.81202128, 0.29157272],
        (1, 49): [-0.05795863, 3.1554869, -3.71601154, 0.3644138],
    }
    for (row, token), values in expected.items():
        torch.testing.assert_close(out[row, token, :4], torch.tensor(values).double(), **TOLERANCE)


def test_classifier_equals_the_released_fine_tuning_model() -> None:
    """H3 at the size of its training, and at 64 px with the same weights: nothing is resized."""
    model = classifier()
    small = logits(model, 2, 32)
    first = [-0.21113577, -0.06702526, 0.17585611, -0.2839936, -0.1398831]
    first += [0.10299828, -0.35685144, -0.21274094, 0.03014044, 0.07029073]
    torch.testing.assert_close(small[0], torch.tensor(first).double(), **TOLERANCE)
    second = torch.tensor([-0.06545077, -0.14706238, 0.18302997, -0.13835924]).double()
    torch.testing.assert_close(small[1, :4], second, **TOLERANCE)
    large = [-0.26261373, -0.02174919, 0.18040147, -0.33549985, -0.09463531]
    large += [0.10751535, -0.40838597, -0.16752143, 0.03462923, 0.01872791]
    torch.testing.assert_close(logits(model, 1, 64)[0], torch.tensor(large).double(), **TOLERANCE)


def test_the_vectors_tell_a_scaled_query_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias from the scaled query, as the original iRPE has it, gives H3's wrong numbers and so would be noticed."""
    right = attention.contextual_bias

    def scaled(q: torch.Tensor, table: torch.Tensor, buckets: torch.Tensor) -> torch.Tensor:
        return right(q, table * q.shape[-1] ** -0.5, buckets)

    monkeypatch.setattr(attention, "contextual_bias", scaled)
    wrong = torch.tensor([-0.20727516, -0.06840875, 0.17585207]).double()
    torch.testing.assert_close(logits(classifier(), 2, 32)[0, :3], wrong, **TOLERANCE)


def test_the_vectors_tell_a_flipped_sign_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key minus query in place of query minus key gives H3's wrong numbers and so would be noticed."""

    def flipped(at: torch.Tensor) -> torch.Tensor:
        return positions.contextual_buckets(torch.where(at == NOWHERE, at, -at))

    monkeypatch.setattr(attention, "contextual_buckets", flipped)
    wrong = torch.tensor([-0.20393246, -0.07098072, 0.17239139]).double()
    torch.testing.assert_close(logits(classifier(), 2, 32)[0, :3], wrong, **TOLERANCE)
