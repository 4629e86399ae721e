"""Recall@k of retrieval, as a Hugging Face `evaluate` module: `evaluate.load("eval/metrics/recall_at_k")`."""

import numbers

import datasets
import evaluate

from modeling_tscir.metrics import ranks_of_truths, recall_at_k


DESCRIPTION = """Share of queries whose target stands among the k best of the gallery. Equal scores count against the
method: a target stands behind every picture that scores the same."""
INPUTS = """
Args:
    predictions: for each query, the score of every gallery picture (higher is better).
    references: for each query, the index of its target in the gallery.
    k: depths, 1, 5, 10 and 50 unless given.
    exclude: for each query, indices that take no part (CIRR: the reference); none unless given.
Returns:
    {"recall_at_1": ..., ...}, fractions.
Raises:
    ValueError: for scores that are NaN, and targets that are excluded or outside the gallery; naming the query.
"""


class RecallAtK(evaluate.Metric):
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

    def _compute(self, predictions, references, k=(1, 5, 10, 50), exclude=None):
        exclude = exclude if exclude is not None else [()] * len(references)
        ranks = []
        for number, (scores, target, out) in enumerate(zip(predictions, references, exclude, strict=True)):
            try:
                ranks.append(int(ranks_of_truths(scores, [target], out)[0]))
            except ValueError as error:
                raise ValueError(f"query {number}: {error}") from error
        depths = [k] if isinstance(k, numbers.Integral) else k
        return {f"recall_at_{depth}": recall_at_k(ranks, depth) for depth in depths}
