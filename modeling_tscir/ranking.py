"""Ranking by cosine similarity: one core for pipeline, evaluation and mining."""

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch


SCORES_AT_A_TIME = 2**24  # 64 MiB of fp32
QUERIES_AT_A_TIME = 64  # at least: with fewer, reading the gallery takes longer than the product
# With fewer, a product's kernel may score equal gallery rows unequally, and a truth would stand before its copies.
QUERIES_THAT_TIE = 16


class Ranking(NamedTuple):
    """The best of a gallery for each query, and where its true answers stand.

    Args:
        scores (`torch.Tensor` [Q, k]): best first; -inf where exclusions leave fewer than k rows.
        indices (`torch.LongTensor` [Q, k]): gallery rows; -1 where the score is -inf.
        truth_ranks (`torch.LongTensor` [Q, T], *optional*): rank of each truth, 1 the best, in the order given; 0
            where a query has fewer than T truths.
    """

    scores: torch.Tensor
    indices: torch.Tensor
    truth_ranks: torch.Tensor | None = None


def rank_gallery(
    query_embeds: torch.Tensor,
    gallery_embeds: torch.Tensor,
    k: int,
    truths: Sequence[Sequence[int]] | None = None,
    exclude: Sequence[Sequence[int]] | None = None,
    scores_at_a_time: int | None = None,
) -> Ranking:
    """Rank a gallery for every query: a blocked matrix product and a partial sort, on the embeddings' device.

    Works through the queries in blocks, so that memory stays at `scores_at_a_time` scores (one query's at least);
    unless told, 2**24 of them, or 64 queries' where that is more.

    Args:
        query_embeds (`torch.Tensor` [Q, D]) and gallery_embeds (`torch.Tensor` [N, D]): L2-normalised, one device.
        k (`int`): how many to return, at most N; of equal scores the lower index comes first.
        truths: for each query, gallery indices of its true answers, whose ranks are wanted. Equal scores count against
            them: a truth stands behind every picture that scores the same, but for truths given before it.
        exclude: for each query, gallery indices that do not take part (CIRR: the reference).

    Raises:
        ValueError: for an empty gallery, k < 1, embeddings that are not finite, or a truth that is excluded.
    """
    if k < 1 or len(gallery_embeds) == 0:
        raise ValueError(f"k is {k} and the gallery has {len(gallery_embeds)} rows; both must be at least 1")
    if not torch.isfinite(query_embeds).all():
        raise ValueError("query embeddings hold NaN or infinite values")
    k = min(k, len(gallery_embeds))
    budget = scores_at_a_time or max(SCORES_AT_A_TIME, QUERIES_AT_A_TIME * len(gallery_embeds))
    block_size = max(1, budget // len(gallery_embeds))
    blocks = []
    for start in range(0, len(query_embeds), block_size):
        rows = slice(start, start + block_size)
        asked = query_embeds[rows].to(gallery_embeds.dtype)
        number = len(asked)
        if truths is not None and number < QUERIES_THAT_TIE:
            asked = asked[torch.arange(QUERIES_THAT_TIE, device=asked.device) % number]
        with full_precision(gallery_embeds):
            scores = (asked @ gallery_embeds.T)[:number].float()  # [block, N]
        if not torch.isfinite(scores.sum()):  # cosines do not overflow, and one NaN or infinity makes the sum one
            raise ValueError("gallery embeddings hold NaN or infinite values")
        if exclude is not None:
            scores[_pairs(exclude[rows], scores.device)] = -torch.inf
        ranks = None if truths is None else _ranks_of(scores, truths[rows])
        blocks.append((*best_of_rows(scores, k), ranks))
    if not blocks:
        blocks = [(gallery_embeds.new_empty(0, k), torch.empty(0, k, dtype=torch.long), None)]
    scores, indices, ranks = zip(*blocks, strict=True)
    found = torch.cat(scores), torch.cat(indices).masked_fill(torch.cat(scores) == -torch.inf, -1)
    if truths is None:
        return Ranking(*found)
    most = max((r.shape[1] for r in ranks), default=0)
    return Ranking(*found, torch.cat([torch.nn.functional.pad(r, (0, most - r.shape[1])) for r in ranks]))


def top_k(
    query_embeds: torch.Tensor,
    gallery_embeds: torch.Tensor,
    k: int,
    exclude: Sequence[Sequence[int]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and indices, [Q, k] each, of the k most similar gallery rows of every query; see `rank_gallery`."""
    ranking = rank_gallery(query_embeds, gallery_embeds, k, exclude=exclude)
    return ranking.scores, ranking.indices


def rank_candidates(
    query_embeds: torch.Tensor,
    gallery_embeds: torch.Tensor,
    candidates: Sequence[Sequence[int]],
    truths: Sequence[Sequence[int]] | None = None,
) -> Ranking:
    """Rank a short list of candidates of each query's own (CIRR's set of six, GeneCIS's gallery of fifteen).

    Args:
        query_embeds (`torch.Tensor` [Q, D]) and gallery_embeds (`torch.Tensor` [N, D]): L2-normalised, one device.
        candidates: for each query, gallery indices, in any number.
        truths: for each query, those of its candidates that are true; ranks are as in `rank_gallery`.

    Returns:
        A [`Ranking`] of all candidates, k being the longest list's length; indices are gallery indices.

    Raises:
        ValueError: for embeddings that are not finite, or a truth that is no candidate.
    """
    places = _padded(candidates, -1).to(gallery_embeds.device)  # [Q, C]
    absent = places < 0
    block_size = max(1, SCORES_AT_A_TIME // (max(1, places.shape[1]) * gallery_embeds.shape[1]))
    with full_precision(gallery_embeds):
        scores = torch.cat(
            [
                _own_scores(queries.to(gallery_embeds.dtype), gallery_embeds[picked])
                for picked, queries in zip(places.split(block_size), query_embeds.split(block_size), strict=True)
            ]
        )
    if not torch.isfinite(scores).all():
        raise ValueError("embeddings of queries or candidates hold NaN or infinite values")
    scores = scores.masked_fill(absent, -torch.inf)
    ranks = None
    if truths is not None:
        for number, (row, own) in enumerate(zip(candidates, truths, strict=True)):
            if not set(own) <= set(row):
                raise ValueError(
                    f"query {number} has truths {sorted(set(own) - set(row))} that are no candidates of it"
                )
        columns = [[list(row).index(t) for t in own] for row, own in zip(candidates, truths, strict=True)]
        ranks = _ranks_of(scores, columns)
    best, order = best_of_rows(scores, places.shape[1])
    return Ranking(best, places.gather(1, order), ranks)


def _own_scores(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Scores [q, C] of each query's own candidates [q, C, D]; a query alone is taken twice, so that equal ones tie."""
    number = len(queries)
    if number == 1:
        queries, candidates = queries.repeat(2, 1), candidates.repeat(2, 1, 1)
    return torch.einsum("qcd,qd->qc", candidates, queries)[:number].float()


def full_precision(embeds: torch.Tensor) -> torch.autocast:
    """Products in the embeddings' own precision, in the middle of training too: autocast's is too coarse for ranks."""
    return torch.autocast(embeds.device.type, enabled=False)


def best_of_rows(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top k of each row of [B, N], best first, equal scores by index: a partial sort, mended for ties at its end."""
    values, columns = scores.topk(k, dim=1)
    if 0 < k < scores.shape[1]:
        # topk may pick any of the scores that equal the last place; take the first of them instead.
        last = values[:, -1:]
        ties = _count(scores, range(len(scores)), last[:, 0], operator.eq).to(values.device)
        for row in (ties > (values == last).sum(1)).nonzero().flatten().tolist():
            above = columns[row][values[row] > last[row]]
            equal = (scores[row] == last[row]).nonzero().flatten()[: k - len(above)]
            columns[row] = torch.cat([above, equal])
            values[row] = scores[row, columns[row]]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _ranks_of(scores: torch.Tensor, truths: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rank of each truth in its row of `scores` [B, N], [B, T]; 0 where a row has fewer truths than T."""
    columns = _padded(truths, -1).to(scores.device)  # [B, T]
    present = columns >= 0
    own = scores.gather(1, columns.clamp(min=0)).masked_fill(~present, torch.inf)  # [B, T]
    if (own == -torch.inf).any():
        raise ValueError("a truth is among its query's excluded images")
    ranks = torch.zeros_like(columns)
    rows, places = present.nonzero(as_tuple=True)
    # Itself included, so that 1 is the best.
    ranks[rows, places] = _count(scores, rows.tolist(), own[rows, places], operator.ge).to(ranks.device)
    # Of truths that score the same, one given earlier stands behind one given later: the target, given first, is
    # behind everything of its score.
    same = (own[:, :, None] == own[:, None, :]).tril(diagonal=-1) & present[:, :, None]
    return ranks - same.sum(2)


def _count(scores: torch.Tensor, rows: Sequence[int], values: torch.Tensor, compare: Callable) -> torch.Tensor:
    """For each of `rows`, how many scores of that row of [B, N] compare so with its value; `values` [len(rows)]."""
    if scores.device.type == "cpu":
        # NumPy counts fifteen times faster than torch sums booleans.
        matrix, bounds = scores.detach().numpy(), values.detach().numpy()
        counts = [np.count_nonzero(compare(matrix[row], bound)) for row, bound in zip(rows, bounds, strict=True)]
        return torch.tensor(counts, dtype=torch.long)
    return torch.stack([compare(scores[row], value).sum() for row, value in zip(rows, values, strict=True)])


def _padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=torch.long).reshape(
        len(rows), longest
    )


def _pairs(lists: Sequence[Sequence[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every entry."""
    rows = [i for i, columns in enumerate(lists) for _ in columns]
    columns = [c for row in lists for c in row]
    return torch.tensor(rows, dtype=torch.long, device=device), torch.tensor(columns, dtype=torch.long, device=device)
