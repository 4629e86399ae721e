"""Search in a gallery's rows, each picture once, however many files have its bytes."""

from collections.abc import Collection, Sequence
from numbers import Integral

import numpy as np
import torch

from .exact_search import search_exactly
from .metadata import Where, conditions_of, matching, values_of
from .ranking import full_precision


class SearchMixin:
    """Search in a [`Gallery`]; a base class of it."""

    def search(
        self,
        queries: torch.Tensor,
        top_k: int = 10,
        where: Where | None = None,
        exclude: Sequence[str] = (),
        exact: bool = False,
    ) -> list[list[dict]]:
        """The most similar pictures for each query, best first.

        Args:
            queries (`torch.Tensor` [Q, D]): L2-normalised embeddings, as `TSCIRModel.get_composed_features` gives.
            top_k (`int`): how many.
            where: conditions on metadata columns, all of which must hold: {column: value}, {column: [value, ...]},
                {column: (operator, value)} or [(column, operator, value), ...] with =, !=, <, <=, >, >=, "in" and
                "not in". A picture without a value meets none.
            exclude: ids that are not wanted, such as the reference's own; pictures of the same bytes go with them, and
                unknown ids exclude nothing.
            exact (`bool`): leave a FAISS index aside.

        Returns:
            For each query a list of {"score", "id", "path", "duplicates", "metadata"}. Of pictures with the same bytes
            the first is given and the others are named in its "duplicates". Scores are cosine similarities.

        Raises:
            ValueError: for queries of another size or that are not finite, and for unknown columns and operators.
        """
        check_search(queries, top_k, exclude, self.info["dimensions"])
        first, others = self._wanted(where)
        excluded = self.rows.of(list(exclude))
        if (excluded >= 0).any():
            first = first & ~np.isin(self.rows.content, self.rows.content[excluded[excluded >= 0]])
        queries = queries.detach().float().cpu()
        index = None if exact or where else self._faiss()
        k = min(int(top_k), int(first.sum()))
        with full_precision(queries):
            if index is None:
                scores, rows = search_exactly(self.embeds, queries, k, first)
            else:
                scores, rows = self._search_index(index, queries, k, first)
        return [
            [self._result(score, row, others) for score, row in zip(*found, strict=True)]
            for found in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def _result(self, score: float, row: int, others: dict[int, list[int]]) -> dict:
        name = self.table["id"][row].as_py()
        same = [other for other in others.get(int(self.rows.content[row]), []) if other != row]
        return {
            "score": score,
            "id": name,
            "path": self.path(row),
            "duplicates": self.table["id"].take(same).to_pylist() if same else [],
            "metadata": values_of(self.metadata, name),
        }

    def _wanted(self, where: Where | None) -> tuple[np.ndarray, dict[int, list[int]]]:
        """Which rows take part, the first of each content, and all rows of those contents that several have."""
        if not where and self._everything is not None:
            return self._everything
        allowed = self.rows.live
        if where:
            conditions = conditions_of(where, self.columns, str(self))
            found = self.rows.of(matching(self.metadata, conditions))
            allowed = np.zeros(len(self.rows.live), dtype=bool)
            allowed[found[found >= 0]] = True
        rows = np.flatnonzero(allowed)
        _, firsts, counts = np.unique(self.rows.content[rows], return_index=True, return_counts=True)
        first = np.zeros(len(allowed), dtype=bool)
        first[rows[firsts]] = True
        several = self.rows.content[rows[firsts[counts > 1]]]
        others: dict[int, list[int]] = {}
        for row in rows[np.isin(self.rows.content[rows], several)]:
            others.setdefault(int(self.rows.content[row]), []).append(int(row))
        if not where:
            self._everything = first, others
        return first, others


def check_search(queries: torch.Tensor, top_k: int, exclude: Sequence[str], dimensions: int) -> None:
    """Raise `ValueError` for arguments that cannot be searched with."""
    if not isinstance(queries, torch.Tensor):
        raise ValueError(
            f"queries are a tensor of embeddings, as a pipeline's embed gives, not a {type(queries).__name__}"
        )
    if queries.ndim != 2 or queries.shape[1] != dimensions:
        raise ValueError(f"queries are {tuple(queries.shape)}; this gallery wants [Q, {dimensions}]")
    if not isinstance(top_k, Integral) or top_k < 1:
        raise ValueError(f"top_k is a whole number of at least 1, not {top_k!r}")
    if isinstance(exclude, str) or not isinstance(exclude, Collection) or not all(isinstance(x, str) for x in exclude):
        raise ValueError(f"exclude is a list of ids, which are texts, not {exclude!r}")
    if not torch.isfinite(queries).all():
        raise ValueError("queries hold NaN or infinite values")
