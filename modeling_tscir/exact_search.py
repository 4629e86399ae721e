"""Exact search over shards of embeddings, which are read once for all queries of a batch."""

from collections.abc import Sequence

import numpy as np
import torch


QUERIES_AT_A_TIME, ROWS_AT_A_TIME = 64, 65_536


def search_exactly(
    shards: Sequence[torch.Tensor], queries: torch.Tensor, k: int, wanted: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most similar of the wanted rows, best first; of equal scores the first row comes first.

    Memory holds the scores of some ten thousand rows beside the best so far.

    Args:
        shards: embeddings [n, D] each, in any floating type; rows are numbered through all of them.
        queries (`torch.Tensor` [Q, D]): in fp32.
        k (`int`): at most as many as are wanted.
        wanted (`np.ndarray` of truth values [rows]): which rows take part.

    Returns:
        Scores and rows [Q, k].
    """
    if k == 0 or not len(queries):
        return torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    found = [best_rows(shards, part, k, wanted) for part in queries.split(QUERIES_AT_A_TIME)]
    scores, rows = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(rows)


def best_rows(
    shards: Sequence[torch.Tensor], queries: torch.Tensor, k: int, wanted: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """`search_exactly` for few queries."""
    hidden = None if wanted.all() else torch.from_numpy(~wanted)
    scores, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    # Two buffers for all shards: fresh memory for each would cost as much as the products.
    largest = max(map(len, shards))
    single = torch.empty(largest, queries.shape[1])
    block = torch.empty(len(queries), ROWS_AT_A_TIME + largest)
    start = end = 0
    for number, embeds in enumerate(shards):
        shard = single[: len(embeds)].copy_(embeds)
        block[:, end - start : end - start + len(embeds)] = queries @ shard.T
        end += len(embeds)
        if end - start < ROWS_AT_A_TIME and number < len(shards) - 1:
            continue
        new = block[:, : end - start]
        if hidden is not None:
            new.masked_fill_(hidden[start:end], -torch.inf)
        new, columns = best(new, min(k, end - start))
        rows = torch.cat([rows, columns + start], dim=1)
        scores, places = best(torch.cat([scores, new], dim=1), min(k, rows.shape[1]))
        rows = rows.gather(1, places)
        start = end
    return scores, rows


def best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and columns [Q, k] of the k highest of each row; of equal scores the first column comes first."""
    values, columns = torch.topk(scores, k, dim=1)
    # topk takes any of those that tie with its last; take the first of them, then sort ties by column.
    for row in torch.nonzero((scores >= values[:, -1:]).sum(1) > k).flatten().tolist() if k else []:
        last = values[row, -1]
        above = torch.nonzero(scores[row] > last).flatten()
        tied = torch.nonzero(scores[row] == last).flatten()[: k - len(above)]
        columns[row] = torch.cat([above, tied])
        values[row] = scores[row, columns[row]]
    by_column = columns.argsort(dim=1)
    values, columns = values.gather(1, by_column), columns.gather(1, by_column)
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), columns.gather(1, order)
