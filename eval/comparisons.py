"""Paired comparisons of runs over queries and seeds: bootstrap clustered by reference, Holm's correction."""

import functools
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
    """Means [resamples] of `values` [Q] over queries drawn anew with replacement.

    Queries are drawn by cluster: those of one reference come together or not at all.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(index, weights=values), np.bincount(index)  # [G]
    means = np.empty(resamples)
    for start in range(0, resamples, 1000):
        weights = drawn_counts(len(names), len(means[start : start + 1000]), rng)  # [r, G]
        means[start : start + 1000] = (weights @ sums) / (weights @ sizes)
    return means


def drawn_counts(groups: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `groups` comes up in as many draws with replacement, [resamples, groups].

    What `rng.multinomial` gives with equal shares, six to eight times as fast for thousands of groups.
    """
    draws = rng.integers(groups, size=(resamples, groups)) + groups * np.arange(resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=resamples * groups).reshape(resamples, groups)


@functools.cache
def students_t(freedom: int, count: int) -> np.ndarray:
    """Numbers [count] that lie as Student's t does, evenly rather than as so few draws of it would."""
    return np.sort(np.random.default_rng(0).standard_t(freedom, 200 * count))[100::200]


def compared(parts: Sequence[tuple[np.ndarray, Sequence]], seed: int = 0, resamples: int = RESAMPLES) -> Effect:
    """The mean over several benchmarks of paired differences.

    What references add to its uncertainty is a bootstrap's, benchmark by benchmark. Of seeds, which are few, and which
    are the same models on every benchmark, it is Student's t of their means over all benchmarks: five seeds drawn anew
    would spread too little, and too little again if each benchmark drew its own. The interval is that of their sum. Of
    one seed it is of references alone, and p is 1: how far another seed would be from it is not known.

    Benchmarks are taken for independent, though some share references: on the miniature that makes the references'
    share of an interval up to a twentieth too narrow.

    Args:
        parts: for each benchmark, differences [S, Q] of two runs, by seed and query, and the queries' clusters.

    Raises:
        ValueError: for differences that are not finite.
    """
    rng = np.random.default_rng(seed)
    if not all(np.isfinite(values).all() for values, _ in parts):
        raise ValueError("differences hold NaN or infinite values")
    means = np.mean([resampled_means(values.mean(0), clusters, rng, resamples) for values, clusters in parts], axis=0)
    of_seeds = np.mean([values.mean(1) for values, _ in parts], axis=0)  # [S]
    if (seeds := len(of_seeds)) > 1:
        means += of_seeds.std(ddof=1) / seeds**0.5 * rng.permutation(students_t(seeds - 1, len(means)))
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).mean(), (means >= 0).mean()) if seeds > 1 else 1.0
    return Effect(float(of_seeds.mean()), float(low), float(high), float(min(1.0, 2 * max(tail, 1 / len(means)))))


def holm(p_values: Sequence[float], number: int | None = None) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given.

    Where they are some of `number`, at least as much as among all of these.
    """
    number = len(p_values) if number is None else number
    order = np.argsort(p_values)
    adjusted, highest = np.empty(len(p_values)), 0.0
    for place, row in enumerate(order):
        highest = max(highest, min(1.0, (number - place) * p_values[row]))
        adjusted[row] = highest
    return adjusted.tolist()


def verdict(effect: Effect, adjusted_p: float) -> str:
    """ "holds", "does not hold" (the opposite does) or "cannot be told", at 5% after correction."""
    if adjusted_p >= 0.05:
        return "cannot be told"
    return "holds" if effect.effect > 0 else "does not hold"
