import numpy as np
import pytest
from comparisons import Effect, compared, holm, resampled_means, verdict
from significance import mean_and_standard_error


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1, never falling."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.03]) == pytest.approx([0.03])


def test_some_of_many_claims_are_corrected_for_all_of_them():
    p_values = np.random.default_rng(0).random((50, 9)) ** 2 / 10
    for known in p_values:
        assert holm([0.01, 0.002], 5) == pytest.approx([0.04, 0.01])
        assert all(np.array(holm(known[:4], 9)) >= np.array(holm(known)[:4]) - 1e-12)


def test_the_bootstrap_spreads_as_the_clustered_standard_error():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(300), 3)
    values = rng.normal(size=300)[clusters] + rng.normal(size=900)
    mean, error = mean_and_standard_error(values, clusters)
    means = resampled_means(values, clusters, rng, 4000)
    assert means.mean() == pytest.approx(mean, abs=3 * error / 4000**0.5 + 0.002)
    assert means.std() == pytest.approx(error, rel=0.05)
    alone = resampled_means(values, np.arange(900), rng, 4000)
    assert alone.std() < 0.8 * means.std()  # queries of one reference are not independent


def test_of_few_references_the_standard_error_is_that_of_their_means():
    values = np.random.default_rng(0).normal(size=(4, 5))
    mean, error = mean_and_standard_error(values.ravel(), np.repeat(list("abcd"), 5))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.mean(1).std(ddof=1) / 4**0.5)
    assert np.isnan(mean_and_standard_error(values[0], ["a"] * 5)[1])  # of one nothing is known


def test_references_of_many_queries_count_by_their_queries():
    """Where all queries agree there is nothing to be uncertain of, whichever references are drawn."""
    clusters = np.repeat(np.arange(20), np.arange(1, 21))
    means = resampled_means(np.full(len(clusters), 0.3), clusters, np.random.default_rng(0), 500)
    assert means == pytest.approx(np.full(500, 0.3))


def test_seeds_count_as_the_few_that_they_are():
    """Where all queries of a seed agree, the interval is Student's: of five values 2.776 standard errors."""
    values = np.repeat([[-0.2], [0.1], [0.2], [0.3], [0.6]], 50, axis=1)
    found = compared([(values, np.arange(50))])
    half = 2.776 * values[:, 0].std(ddof=1) / 5**0.5
    assert found.effect == pytest.approx(0.2)
    assert (found.ci_low, found.ci_high) == pytest.approx((0.2 - half, 0.2 + half), rel=0.03)
    # The same models on a second benchmark are no further seeds; others that cancel them out would be.
    twice = compared([(values, np.arange(50)), (values, np.arange(50))])
    assert twice.ci_high - twice.ci_low == pytest.approx(2 * half, rel=0.03)
    opposite = compared([(values, np.arange(50)), (0.4 - values, np.arange(50))])
    assert opposite.ci_high - opposite.ci_low < 1e-9


def test_one_seed_tells_nothing():
    """However clear it is that its two models differ."""
    values = np.random.default_rng(0).normal(1, 0.1, size=(1, 200))
    alone = compared([(values, np.arange(200))])
    assert alone.ci_low > 0.9 and alone.p_value == 1 and verdict(alone, alone.p_value) == "cannot be told"
    assert compared([(np.repeat(values, 2, axis=0), np.arange(200))]).p_value < 0.001


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_nothing_is_told_where_nothing_is(shared):
    """Of 400 comparisons of equals a twentieth are told apart, whether benchmarks share their seeds' luck or not."""
    rng, told = np.random.default_rng(0), 0
    clusters = np.repeat(np.arange(60), 2)
    for _ in range(400):
        luck = shared**0.5 * rng.normal(size=(5, 1))
        parts = [
            (
                0.1 * (luck + (1 - shared) ** 0.5 * rng.normal(size=(5, 1)))
                + 0.5 * rng.normal(size=60)[clusters]
                + rng.normal(size=(5, 120)),
                clusters,
            )
            for _ in range(3)
        ]
        told += compared(parts, resamples=1000).p_value < 0.05
    assert told <= 0.08 * 400


def test_clear_effects_are_told_and_others_are_not():
    rng = np.random.default_rng(0)
    clusters, noise = np.arange(400), rng.normal(size=(3, 400))
    clear = compared([(noise + 1, clusters), (noise + 0.5, clusters)])
    assert clear.effect == pytest.approx(0.75, abs=0.1) and clear.ci_low > 0.5 and clear.p_value < 0.001
    nothing = compared([(noise - noise.mean(), clusters)])
    assert nothing.ci_low < 0 < nothing.ci_high and nothing.p_value > 0.5
    assert verdict(clear, 0.01) == "holds" and verdict(clear, 0.2) == "cannot be told"
    assert verdict(Effect(-1, -2, -0.5, 0.001), 0.001) == "does not hold"
    with pytest.raises(ValueError, match="NaN"):
        compared([(noise * np.nan, clusters)])
