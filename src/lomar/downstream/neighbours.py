"""Weighted k-NN for several k at once: how often the right class has most votes, or is among the first few."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lomar.downstream.knn import SIMILARITIES_PER_CHUNK

FEW = 5  # classes that "top-5" looks at


def neighbour_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, tuple[float, float]]:
    """For each k, the shares of queries (0 to 1) whose class has most votes, and is among the five that have most.

    Votes are those of `lomar.downstream.knn.knn_top1`; neighbours are looked for once. A class without a vote is not
    among the five.

    Args:
        bank: (N, D) features that vote.
        bank_labels: (N,) integers.
        queries: (M, D) features to classify, on the bank's device.
        query_labels: (M,) integers; a label the bank lacks counts as a miss.
        ks: neighbours asked, each limited to N.
        temperature: smaller values let the nearest neighbours decide alone.

    Raises:
        ValueError: an empty set, or shapes that do not fit together.
    """
    if bank.ndim != 2 or queries.shape[1:] != bank.shape[1:] or not (len(bank) and len(queries)):
        raise ValueError(f"bank {tuple(bank.shape)} and queries {tuple(queries.shape)} must be (N, D) and (M, D)")
    if len(bank_labels) != len(bank) or len(query_labels) != len(queries):
        raise ValueError(f"{len(bank_labels)} and {len(query_labels)} labels for {len(bank)} and {len(queries)} rows")
    # Without autocast: cosines that are all close to 1 would be all alike in bfloat16.
    with torch.autocast(bank.device.type, enabled=False):
        bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
        classes, bank_class = torch.unique(bank_labels, return_inverse=True)  # (L,), (N,) in [0, L)
        most = min(max(ks), len(bank))
        hits = {k: [0, 0] for k in ks}
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
