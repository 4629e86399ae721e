"""Standard errors of means over queries that share references."""

import numpy as np


def mean_and_standard_error(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Mean of `values` [Q] and its standard error, clustered: queries of one cluster (reference) are not independent.

    For a paired comparison pass the differences of two methods' values.

    Args:
        values: one number a query; several seeds of a query are averaged before.
        clusters: each query's cluster, any hashable.

    Returns:
        The mean and sqrt(G / (G - 1) * sum_g (sum of residuals in g)^2) / Q, G clusters (Liang and Zeger 1986).
    """
    values = np.asarray(values, dtype=np.float64)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    mean = values.mean()
    sums = np.bincount(index, weights=values - mean)
    if len(sums) < 2:
        return float(mean), float("nan")
    return float(mean), float(np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(values))
