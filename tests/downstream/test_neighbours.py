"""Claims about k-NN for several k and the first five classes."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from lomar.downstream import neighbours
from lomar.downstream.knn import knn_top1
from lomar.downstream.neighbours import neighbour_accuracy

TEMPERATURE = 0.2


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(7, 5, generator=generator)
    labels = torch.arange(61) % 7
    others = torch.arange(23) % 7
    bank = centres[labels] + torch.randn(61, 5, generator=generator)
    queries = centres[others] + torch.randn(23, 5, generator=generator)
    return bank, labels * 3 + 1, queries, others * 3 + 1  # labels need not be 0, 1, 2


def test_both_accuracies_are_those_of_scikit_learn() -> None:
    bank, labels, queries, wanted = data()
    found = neighbour_accuracy(bank, labels, queries, wanted, [13, 1, 40], TEMPERATURE)
    assert list(found) == [13, 1, 40]
    unit = [x / x.norm(dim=1, keepdim=True) for x in (bank, queries)]
    for k, (first, few) in found.items():
        judge = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / TEMPERATURE)
        ).fit(unit[0], labels)
        shares = judge.predict_proba(unit[1])
        order = np.argsort(-shares, axis=1, kind="stable")
        right = (judge.classes_[order] == wanted.numpy()[:, None]) & (np.take_along_axis(shares, order, axis=1) > 0)
        assert first == pytest.approx(right[:, 0].mean())
        assert few == pytest.approx(right[:, :5].any(axis=1).mean())
        assert first == knn_top1(bank, labels, queries, wanted, k, TEMPERATURE)


def test_a_class_without_a_vote_is_not_among_the_five() -> None:
    bank, labels, queries, wanted = data()
    (first, few), *_ = neighbour_accuracy(bank, labels, queries, wanted, [1]).values()
    assert first == few < 1


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = neighbour_accuracy(*data(), [3, 20])
    monkeypatch.setattr(neighbours, "SIMILARITIES_PER_CHUNK", 2 * 61)
    assert neighbour_accuracy(*data(), [3, 20]) == whole


def test_shapes_that_do_not_fit_are_refused() -> None:
    bank, labels, queries, wanted = data()
    with pytest.raises(ValueError, match=r"bank \(61, 5\) and queries \(23, 4\) must be"):
        neighbour_accuracy(bank, labels, queries[:, :4], wanted, [1])
    with pytest.raises(ValueError, match="60 and 23 labels for 61 and 23 rows"):
        neighbour_accuracy(bank, labels[:60], queries, wanted, [1])
    with pytest.raises(ValueError, match="must be"):
        neighbour_accuracy(bank[:0], labels[:0], queries, wanted, [1])
