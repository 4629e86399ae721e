"""mAP@k with several truths, as an `evaluate` module: `evaluate.load("eval/metrics/mean_average_precision_at_k")`."""

import numbers

import datasets
import evaluate

from modeling_tscir.metrics import mean_average_precision_at_k, ranks_of_truths


DESCRIPTION = """Mean over queries of average precision at k: the sum, over ranks up to k that hold a right answer, of
precision at that rank, divided by the smaller of k and the number of right answers (CIRCO). Equal scores count against
the method: a right answer stands behind every wrong one that scores the same."""
CITATION = """@inproceedings{baldrati2023zero,
  title={Zero-Shot Composed Image Retrieval with Textual Inversion},
  author={Baldrati, Alberto and Agnolucci, Lorenzo and Bertini, Marco and Del Bimbo, Alberto},
  booktitle={ICCV},
  year={2023}
}"""
INPUTS = """
Args:
    predictions: for each query, the score of every gallery picture (higher is better).
    references: for each query, the indices of all its right answers.
    k: depths, 5, 10, 25 and 50 unless given.
    exclude: for each query, indices that take no part; none unless given.
Returns:
    {"map_at_5": ..., ...}, fractions.
Raises:
    ValueError: for scores that are NaN, and right answers that are excluded, outside the gallery, given twice, or
        none; naming the query.
"""


class MeanAveragePrecisionAtK(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions, references, k=(5, 10, 25, 50), exclude=None):
        exclude = exclude if exclude is not None else [()] * len(references)
        ranks = []
        for number, (scores, truths, out) in enumerate(zip(predictions, references, exclude, strict=True)):
            try:
                ranks.append(ranks_of_truths(scores, truths, out))
            except ValueError as error:
                raise ValueError(f"query {number}: {error}") from error
        depths = [k] if isinstance(k, numbers.Integral) else k
        return {f"map_at_{depth}": mean_average_precision_at_k(ranks, depth) for depth in depths}
