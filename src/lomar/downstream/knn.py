"""How good frozen features are, without training anything: weighted k-NN with labels, effective rank without."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")

# Similarities held at once, query x bank: 2**25 float32 values are 128 MiB, whatever the size of the bank.
SIMILARITIES_PER_CHUNK = 2**25


def _in_float32(measure: Callable[P, float]) -> Callable[P, float]:
    """`measure` without autocast: cosines that are all close to 1 would be all alike in bfloat16."""

    @wraps(measure)
    def measured(*args: P.args, **kwargs: P.kwargs) -> float:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return measure(*args, **kwargs)

    return measured


@_in_float32
def knn_top1(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries (0 to 1) whose label wins the weighted vote of their k nearest bank features.

    Nearness is cosine similarity s; each of the k neighbours votes for its label with weight exp(s / temperature).

    Args:
        bank: (N, D) features that vote.
        bank_labels: (N,) any integers.
        queries: (M, D) features to classify, on the bank's device.
        query_labels: (M,) integers; a label the bank lacks counts as a miss.
        k: neighbours asked, limited to N.
        temperature: smaller values let the nearest neighbours decide alone.

    Raises:
        ValueError: an empty set, shapes that do not fit together, or k or temperature not positive.

    Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section
    3.4; k = 20 and temperature 0.07 as DINO's `eval_knn.py`.
    """
    _check_labelled("bank", bank, bank_labels)
    _check_labelled("queries", queries, query_labels)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank {tuple(bank.shape)} and queries {tuple(queries.shape)} differ in width")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and temperature above 0, not {k} and {temperature}")

    bank = F.normalize(bank.float(), dim=1)
    queries = F.normalize(queries.float(), dim=1)
    classes, bank_class = torch.unique(bank_labels, return_inverse=True)  # (L,), (N,) in [0, L)
    rows = max(1, SIMILARITIES_PER_CHUNK // len(bank))

    hits = 0
    for chunk, labels in zip(queries.split(rows), query_labels.split(rows), strict=True):
        similarity, neighbour = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)  # (m, k) each, best first
        # Relative to the best neighbour, so that a small temperature cannot overflow; the winner is the same.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(chunk), len(classes)).scatter_add_(1, bank_class[neighbour], weight)
        hits += int((classes[votes.argmax(dim=1)] == labels).sum())
    return hits / len(queries)


@_in_float32
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
