"""Exact search over shards of embeddings, which are read once for all queries of a batch."""

from collections.abc import Sequence

import numpy as np
import torch

from .ranking import best_of_rows


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
        return queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    found = [best_rows(shards, part, k, wanted) for part in queries.split(QUERIES_AT_A_TIME)]
    scores, rows = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(rows)


def best_rows(
    shards: Sequence[torch.Tensor], queries: torch.Tensor, k: int, wanted: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """`search_exactly` for few queries."""
    hidden = None if wanted.all() else torch.from_numpy(~wanted)
    scores, rows = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    # Two buffers for all shards: fresh memory for each would cost as much as the products.
    largest = max(map(len, shards))
    single = torch.empty(largest, queries.shape[1], dtype=queries.dtype)
    block = torch.empty(len(queries), ROWS_AT_A_TIME + largest, dtype=queries.dtype)
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
        new, columns = best_of_rows(new, min(k, end - start))
        rows = torch.cat([rows, columns + start], dim=1)
        scores, places = best_of_rows(torch.cat([scores, new], dim=1), min(k, rows.shape[1]))
        rows = rows.gather(1, places)
        start = end
    return scores, rows
