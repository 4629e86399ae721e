"""Paired comparisons of runs over queries and seeds: bootstrap clustered by reference, Holm's correction."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


RESAMPLES = 10_000


class Effect(NamedTuple):
    """A mean difference with its 95% confidence interval and two-sided p-value."""

    effect: float
    ci_low: float
    ci_high: float
    p_value: float


def resampled_means(
    values: np.ndarray, clusters: Sequence, rng: np.random.Generator, resamples: int = RESAMPLES
) -> np.ndarray:
    """Means [resamples] of `values` [S, Q] over seeds and queries drawn anew, both with replacement.

    Queries are drawn by cluster: those of one reference come together or not at all.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    seeds, groups = len(values), len(names)
    sums = np.stack([np.bincount(index, weights=row, minlength=groups) for row in values])  # [S, G]
    sizes = np.bincount(index, minlength=groups)
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)  # [R, S]
    means = np.empty(resamples)
    for start in range(0, resamples, 1000):
        rows = slice(start, start + 1000)
        weights = drawn_counts(groups, len(seed_weights[rows]), rng)  # [r, G]
        means[rows] = ((seed_weights[rows] @ sums) * weights).sum(1) / (seeds * (weights @ sizes))
    return means


def drawn_counts(groups: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `groups` comes up in as many draws with replacement, [resamples, groups].

    What `rng.multinomial` gives with equal shares, six to eight times as fast for thousands of groups.
    """
    draws = rng.integers(groups, size=(resamples, groups)) + groups * np.arange(resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=resamples * groups).reshape(resamples, groups)


def compared(parts: Sequence[tuple[np.ndarray, Sequence]], seed: int = 0) -> Effect:
    """The mean over several benchmarks of paired differences.

    Args:
        parts: for each benchmark, differences [S, Q] of two runs, by seed and query, and the queries' clusters.

    Raises:
        ValueError: for differences that are not finite.
    """
    rng = np.random.default_rng(seed)
    if not all(np.isfinite(values).all() for values, _ in parts):
        raise ValueError("differences hold NaN or infinite values")
    means = np.mean([resampled_means(values, clusters, rng) for values, clusters in parts], axis=0)
    effect = float(np.mean([values.mean() for values, _ in parts]))
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return Effect(effect, float(low), float(high), float(min(1.0, 2 * max(tail, 1 / len(means)))))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given."""
    order = np.argsort(p_values)
    adjusted, highest = np.empty(len(p_values)), 0.0
    for place, row in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[row]))
        adjusted[row] = highest
    return adjusted.tolist()


def verdict(effect: Effect, adjusted_p: float) -> str:
    """ "holds", "does not hold" (the opposite does) or "cannot be told", at 5% after correction."""
    if adjusted_p >= 0.05:
        return "cannot be told"
    return "holds" if effect.effect > 0 else "does not hold"
