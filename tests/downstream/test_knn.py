"""Claims about the judges of frozen features, held against scikit-learn and cases worked by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from lomar.downstream import knn
from lomar.downstream.knn import effective_rank, knn_top1, neighbour_accuracy


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes in 13 dimensions, so that neither nearly all nor nearly none are found."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(7, 13, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(7, (count,), generator=generator)
    return centres[labels] + 1.7 * torch.randn(count, 13, generator=generator), labels


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_share_equals_scikit_learns_with_the_same_weights(k: int) -> None:
    bank, bank_labels = clusters(211, seed=1)
    queries, query_labels = clusters(103, seed=2)
    judge = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    judge.fit(bank.numpy(), bank_labels.numpy())
    expected = judge.score(queries.numpy(), query_labels.numpy())
    assert 0.3 < expected < 0.95
    assert knn_top1(bank, bank_labels, queries, query_labels, k=k) == pytest.approx(expected)


def test_a_near_neighbour_outvotes_two_far_ones() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([-4, 11, 11])
    query = torch.tensor([[1.0, 0.1]])
    assert knn_top1(bank, labels, query, torch.tensor([-4]), k=3) == 1.0
    # At a high temperature all weigh the same and the majority wins.
    assert knn_top1(bank, labels, query, torch.tensor([11]), k=3, temperature=100.0) == 1.0


def test_only_direction_counts() -> None:
    bank, bank_labels = clusters(97, seed=3)
    queries, query_labels = clusters(89, seed=4)
    lengths = torch.rand(97, 1, generator=torch.Generator().manual_seed(5)) + 0.1
    plain = knn_top1(bank, bank_labels, queries, query_labels)
    assert knn_top1(bank * lengths, bank_labels, queries * 31, query_labels) == plain


def test_chunks_do_not_change_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, bank_labels = clusters(97, seed=6)
    queries, query_labels = clusters(89, seed=7)
    whole = knn_top1(bank, bank_labels, queries, query_labels)
    monkeypatch.setattr(knn, "SIMILARITIES_PER_CHUNK", 97 * 10)
    assert knn_top1(bank, bank_labels, queries, query_labels) == whole
    assert neighbour_accuracy(bank, bank_labels, queries, query_labels, [3, 20])[20][0] == whole


def test_k_is_limited_to_the_bank_and_an_unknown_label_is_a_miss() -> None:
    bank = torch.eye(3)
    assert knn_top1(bank, torch.arange(3), bank, torch.tensor([0, 1, 9]), k=20) == pytest.approx(2 / 3)


def test_a_tiny_temperature_does_not_overflow() -> None:
    bank = torch.eye(3)
    assert knn_top1(bank, torch.arange(3), bank, torch.arange(3), k=3, temperature=1e-4) == 1.0


@pytest.mark.parametrize(
    ("bank", "labels", "queries", "k", "said"),
    [
        (torch.ones(0, 3), torch.ones(0), torch.ones(2, 3), 20, r"bank .*\(0, 3\)"),
        (torch.ones(5, 3), torch.ones(4), torch.ones(2, 3), 20, r"\(5, 3\) and \(4,\)"),
        (torch.ones(5, 3), torch.ones(5), torch.ones(2, 4), 20, r"\(5, 3\) and queries \(2, 4\)"),
        (torch.ones(5, 3), torch.ones(5), torch.ones(2, 3), 0, "k must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(
    bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, k: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        knn_top1(bank, labels, queries, torch.ones(2), k=k)


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_both_accuracies_of_several_k_are_those_of_scikit_learn(temperature: float) -> None:
    bank, labels = clusters(61, seed=8)
    queries, wanted = clusters(103, seed=9)
    labels, wanted = labels * 3 + 1, wanted * 3 + 1  # labels need not be 0, 1, 2
    found = neighbour_accuracy(bank, labels, queries, wanted, [13, 1, 40], temperature)
    assert list(found) == [13, 1, 40]
    unit = [x / x.norm(dim=1, keepdim=True) for x in (bank, queries)]
    for k, (first, few) in found.items():
        judge = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
        ).fit(unit[0], labels)
        shares = judge.predict_proba(unit[1])
        order = np.argsort(-shares, axis=1, kind="stable")
        right = (judge.classes_[order] == wanted.numpy()[:, None]) & (np.take_along_axis(shares, order, axis=1) > 0)
        assert first == pytest.approx(right[:, 0].mean())
        assert few == pytest.approx(right[:, :5].any(axis=1).mean())
        assert k == 1 or 0.3 < first < few < 1


def test_a_class_without_a_vote_is_not_among_the_five() -> None:
    (first, few), *_ = neighbour_accuracy(*clusters(61, seed=10), *clusters(23, seed=11), [1]).values()
    assert first == few < 1


def test_orthogonal_features_have_full_rank() -> None:
    features = torch.linalg.qr(torch.randn(101, 17, generator=torch.Generator().manual_seed(1)))[0]
    assert effective_rank(features) == pytest.approx(17, rel=1e-4)


def test_collapsed_features_have_rank_one() -> None:
    generator = torch.Generator().manual_seed(1)
    rank_one = torch.randn(101, 1, generator=generator) @ torch.randn(1, 17, generator=generator)
    assert effective_rank(rank_one) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(101, 17)) == pytest.approx(1, abs=1e-3)


def test_rank_is_worked_by_hand_for_two_unequal_directions() -> None:
    # Singular values 3 and 1: shares 3/4 and 1/4.
    features = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(features) == pytest.approx(math.exp(entropy), rel=1e-5)


def test_rank_does_not_depend_on_scale_but_does_on_the_mean() -> None:
    features = torch.randn(101, 17, generator=torch.Generator().manual_seed(1))
    rank = effective_rank(features)
    assert effective_rank(features * 1000) == pytest.approx(rank, rel=1e-4)
    # Not centred: a large shared offset is one dominant direction.
    assert effective_rank(features + 100) < 0.5 * rank


@pytest.mark.parametrize("shape", [(0, 3), (5,), (2, 3, 4)])
def test_rank_refuses_what_is_not_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        effective_rank(torch.zeros(shape))


def test_features_that_are_nearly_alike_are_told_apart_under_autocast() -> None:
    """As early in MAE, where a large constant part makes all cosines about 0.999: in bfloat16 these are all equal."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    features = 40 + torch.eye(4)[labels].repeat_interleave(8, dim=1) + 0.1 * torch.randn(200, 32, generator=generator)
    parts = features[:100], labels[:100], features[100:], labels[100:]
    with torch.autocast("cpu", torch.bfloat16):
        assert knn_top1(*parts) == knn_top1(*parts) == 1.0
        rank = effective_rank(features)
    assert rank == effective_rank(features)
