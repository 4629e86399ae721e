"""Retrieval metrics from ranks. A rank is 1 for the best; equal scores count against the method (see `ranking.py`)."""

import numbers
from collections.abc import Sequence

import numpy as np


def ranks_of_truths(scores: Sequence[float], truths: Sequence[int], exclude: Sequence[int] = ()) -> np.ndarray:
    """Rank of each truth among one query's scores, equal scores counting against it.

    For whole benchmarks use `ranking.rank_gallery`, which never holds all scores.

    Args:
        scores: similarity of every gallery picture.
        truths: indices of the pictures that are right. Of truths that score the same, one given earlier
            stands behind one given later.
        exclude: indices that take no part.

    Raises:
        ValueError: for scores that are NaN; for truths that are excluded, outside the gallery, given twice, or none;
            for excluded indices outside the gallery.
    """
    scores = np.asarray(scores, dtype=np.float64)
    truths = np.asarray(truths, dtype=np.int64).reshape(-1)
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} scores are NaN; a ranking of them would mean nothing")
    if len(truths) == 0 or len(set(truths.tolist())) < len(truths):
        raise ValueError(f"a query needs truths, each once; got {truths.tolist()}")
    if truths.min() < 0 or truths.max() >= len(scores):
        raise ValueError(f"truths {truths.tolist()} are not all indices of {len(scores)} scores")
    if any(not 0 <= i < len(scores) for i in exclude):
        raise ValueError(f"excluded indices {list(exclude)} are not all indices of {len(scores)} scores")
    taking_part = np.ones(len(scores), dtype=bool)
    taking_part[list(exclude)] = False
    if not taking_part[truths].all():
        raise ValueError("a truth is among its query's excluded images")
    own = scores[truths]
    at_least = (scores[taking_part][None, :] >= own[:, None]).sum(1)
    earlier_equals = np.tril(own[None, :] == own[:, None], k=-1).sum(1)
    return at_least - earlier_equals


def check_k(k: int) -> None:
    if not isinstance(k, numbers.Integral) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k is a whole number from 1 on, not {k!r}")


def recall_at_k(ranks: Sequence[int], k: int) -> float:
    """Share of queries whose target stands at rank `k` or better. `ranks` [Q]: each query's target's, from 1 on."""
    check_k(k)
    if len(ranks) == 0:
        raise ValueError("there are no queries")
    ranks = np.asarray(ranks)
    if not ranks.min() >= 1:  # which NaN is not, either
        raise ValueError(f"ranks begin with 1; {ranks.min()} is of no target")
    return float((ranks <= k).mean())


def average_precision_at_k(ranks: Sequence[int], k: int) -> float:
    """AP@k of one query with several truths, as CIRCO defines it (Baldrati et al. 2023).

    Sum over ranks r <= k that hold a truth of precision at r, divided by min(number of truths, k).

    Args:
        ranks: rank of each of the query's truths, in any order; zeros are ignored.

    Raises:
        ValueError: for ranks that are NaN or negative, or that two truths share; for no truth.
    """
    check_k(k)
    ranks = np.sort(np.asarray(ranks))
    if not (ranks >= 0).all():
        raise ValueError(f"{ranks.tolist()} are not all ranks from 1 on, or zeros that fill up")
    ranks = ranks[ranks > 0]
    if len(ranks) == 0:
        raise ValueError("a query has no truths")
    if (ranks[1:] == ranks[:-1]).any():
        raise ValueError(f"two truths share a rank: {ranks.tolist()}")
    found = ranks[ranks <= k]
    return float((np.arange(1, len(found) + 1) / found).sum() / min(len(ranks), k))


def mean_average_precision_at_k(ranks: Sequence[Sequence[int]], k: int) -> float:
    """mAP@k: the mean of `average_precision_at_k` over queries."""
    if len(ranks) == 0:
        raise ValueError("there are no queries")
    return float(np.mean([average_precision_at_k(row, k) for row in ranks]))
