import numpy as np
import pytest

from modeling_tscir.metrics import average_precision_at_k, mean_average_precision_at_k, ranks_of_truths, recall_at_k


def test_recall_counts_ranks():
    assert recall_at_k([1, 2, 5, 6], 5) == 0.75


def test_average_precision_by_hand():
    # Truths at ranks 1, 3 and 7 of three: precisions 1, 2/3, 3/7.
    assert average_precision_at_k([3, 1, 7], 5) == pytest.approx((1 + 2 / 3) / 3)
    assert average_precision_at_k([3, 1, 7], 10) == pytest.approx((1 + 2 / 3 + 3 / 7) / 3)
    # Fewer places than truths: divided by the places.
    assert average_precision_at_k([1, 2, 9], 2) == 1
    assert average_precision_at_k([1, 0, 0], 5) == 1  # zeros only fill up
    assert mean_average_precision_at_k([[1], [6]], 5) == 0.5


def test_average_precision_equals_a_walk_down_the_ranking():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        ranks, k = rng.permutation(40)[: rng.integers(1, 9)] + 1, int(rng.integers(1, 30))
        hits, total = 0, 0.0
        for place in range(1, k + 1):
            if place in ranks:
                hits += 1
                total += hits / place
        assert average_precision_at_k(ranks, k) == pytest.approx(total / min(len(ranks), k))


def test_ranks_begin_with_one_and_so_do_depths():
    for wrong, message in (((([1, 0], 1)), "0 is of no target"), (([1], 0), "whole number from 1 on, not 0"),
                           (([1], 1.5), "not 1.5"), (([], 1), "no queries")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            recall_at_k(*wrong)
    with pytest.raises(ValueError, match="a query has no truths"):
        mean_average_precision_at_k([[1], [0, 0]], 5)
    with pytest.raises(ValueError, match="not 0"):
        mean_average_precision_at_k([[1]], 0)
    assert recall_at_k([1, 2], np.int64(1)) == 0.5


def test_ranks_that_no_ranking_gives_are_refused():
    with pytest.raises(ValueError, match="nan is of no target"):
        recall_at_k([1, float("nan")], 1)
    for ranks, message in (([1, 1, 2], r"share a rank: \[1, 1, 2\]"), ([1, float("nan")], "not all ranks from 1"),
                           ([3, -1], "not all ranks from 1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            average_precision_at_k(ranks, 5)


def test_what_has_no_rank_is_refused():
    with pytest.raises(ValueError, match="1 scores are NaN"):
        ranks_of_truths([0.1, float("nan")], [0])
    with pytest.raises(ValueError, match="each once"):
        ranks_of_truths([0.1, 0.2], [0, 0])
    with pytest.raises(ValueError, match="each once"):
        ranks_of_truths([0.1, 0.2], [])
    with pytest.raises(ValueError, match="not all indices of 2"):
        ranks_of_truths([0.1, 0.2], [2])
    with pytest.raises(ValueError, match="excluded"):
        ranks_of_truths([0.1, 0.2], [1], exclude=[1])
