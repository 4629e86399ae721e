"""Recall@k within each query's candidates: `evaluate.load("eval/metrics/subset_recall_at_k")`."""

import numbers

import datasets
import evaluate

from modeling_tscir.metrics import ranks_of_truths, recall_at_k


DESCRIPTION = """Share of queries whose target stands among the k best of the query's own candidates: CIRR's set of six
without the reference, GeneCIS's gallery. Equal scores count against the method."""
INPUTS = """
Args:
    predictions: for each query, the score of each of its candidates (higher is better); their number may differ.
    references: for each query, which of its candidates is the target.
    k: depths, 1, 2 and 3 unless given.
Returns:
    {"subset_recall_at_1": ..., ...}, fractions.
Raises:
    ValueError: for scores that are NaN and targets that are no candidates; naming the query.
"""


class SubsetRecallAtK(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions, references, k=(1, 2, 3)):
        ranks = []
        for number, (scores, target) in enumerate(zip(predictions, references, strict=True)):
            try:
                ranks.append(int(ranks_of_truths(scores, [target])[0]))
            except ValueError as error:
                raise ValueError(f"query {number}: {error}") from error
        depths = [k] if isinstance(k, numbers.Integral) else k
        return {f"subset_recall_at_{depth}": recall_at_k(ranks, depth) for depth in depths}
