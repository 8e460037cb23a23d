"""How good frozen features are, without training anything: weighted k-NN with labels, effective rank without."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 5  # classes that "top-5" looks at
# Similarities held at once, query x bank: 2**25 float32 values are 128 MiB, whatever the size of the bank.
SIMILARITIES_PER_CHUNK = 2**25


@contextmanager
def _in_float32() -> Iterator[None]:
    """Without autocast: cosines that are all close to 1 would be all alike in bfloat16."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def knn_top1(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries (0 to 1) whose label wins the weighted vote of their k nearest bank features.

    See `neighbour_accuracy`.
    """
    return neighbour_accuracy(bank, bank_labels, queries, query_labels, [k], temperature)[k][0]


def neighbour_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, tuple[float, float]]:
    """For each k, the shares of queries (0 to 1) whose class has most votes, and is among the five that have most.

    Nearness is cosine similarity s; each of the k neighbours votes for its label with weight exp(s / temperature).
    Neighbours are looked for once. A class without a vote is not among the five.

    Args:
        bank: (N, D) features that vote.
        bank_labels: (N,) any integers.
        queries: (M, D) features to classify, on the bank's device.
        query_labels: (M,) integers; a label the bank lacks counts as a miss.
        ks: neighbours asked, each limited to N.
        temperature: smaller values let the nearest neighbours decide alone.

    Raises:
        ValueError: an empty set, shapes that do not fit together, or a k or the temperature not positive.

    Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section
    3.4; k = 20 and temperature 0.07 as DINO's `eval_knn.py`.
    """
    _check_labelled("bank", bank, bank_labels)
    _check_labelled("queries", queries, query_labels)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank {tuple(bank.shape)} and queries {tuple(queries.shape)} differ in width")
    if min(ks) < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and temperature above 0, not {min(ks)} and {temperature}")
    hits = {k: [0, 0] for k in ks}
    with _in_float32():
        bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
        classes, bank_class = torch.unique(bank_labels, return_inverse=True)  # (L,), (N,) in [0, L)
        most = min(max(ks), len(bank))
        rows = max(1, SIMILARITIES_PER_CHUNK // len(bank))
        for chunk, labels in zip(queries.split(rows), query_labels.split(rows), strict=True):
            similarity, neighbour = (chunk @ bank.T).topk(most, dim=1)  # (m, most) each, best first
            # Relative to the best neighbour, so that a small temperature cannot overflow; the order is the same.
            weight = ((similarity - similarity[:, :1]) / temperature).exp()
            for k in ks:
                votes = weight.new_zeros(len(chunk), len(classes))
                votes.scatter_add_(1, bank_class[neighbour[:, :k]], weight[:, :k])
                given, place = votes.topk(min(FEW, len(classes)), dim=1)  # (m, five)
                right = (classes[place] == labels[:, None]) & (given > 0)
                hits[k][0] += int(right[:, 0].sum())
                hits[k][1] += int(right.any(dim=1).sum())
    return {k: (first / len(queries), few / len(queries)) for k, (first, few) in hits.items()}


def effective_rank(features: Tensor, epsilon: float = 1e-7) -> float:
    """Effective rank of a feature matrix, from 1 (collapsed) to min(N, D): exp of its singular values' entropy.

    p_i = s_i / sum(s) + epsilon, rank = exp(-sum p_i log p_i). Features are not centred, as in the source.

    Args:
        features: (N, D); more rows than columns, or N bounds the answer.
        epsilon: the source's guard against log 0.

    Raises:
        ValueError: not a matrix with at least one element.

    Source: RankMe, Garrido et al. 2023, equation 1.
    """
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"features must be (N, D) and not empty, not {tuple(features.shape)}")
    with _in_float32():
        singular = torch.linalg.svdvals(features.float())  # (min(N, D),)
        # All-zero features have no distribution; the clamp makes them count as collapsed instead of NaN.
        share = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny) + epsilon
        return float((-(share * share.log()).sum()).exp())


def _check_labelled(name: str, features: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless features are (N, D), labels (N,), and N at least 1."""
    if features.ndim != 2 or len(features) == 0 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"{name} must be (N, D) with N >= 1 and labels (N,), not {tuple(features.shape)} and {tuple(labels.shape)}"
        )
