"""Ranking by cosine similarity: one core for pipeline, evaluation and mining."""

from collections.abc import Sequence

import torch


def top_k(
    query_embeds: torch.Tensor,
    gallery_embeds: torch.Tensor,
    k: int,
    exclude: Sequence[Sequence[int]] | None = None,
    block_size: int = 16_384,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most similar gallery rows of every query, best first; of equal scores the lower index comes first.

    Works through the gallery in blocks, so that memory stays at Q x (block_size + 2k) scores whatever its size.

    Args:
        query_embeds (`torch.Tensor` [Q, D]) and gallery_embeds (`torch.Tensor` [N, D]): L2-normalised, one device.
        k (`int`): at most N; where exclusions leave fewer than k rows, the rest have score -inf and index -1.
        exclude: for each query, gallery indices that must not be returned.
        block_size (`int`): gallery rows at a time.

    Returns:
        scores [Q, k] and indices [Q, k].

    Raises:
        ValueError: for an empty gallery, k < 1, or embeddings that are not finite.
    """
    if k < 1 or len(gallery_embeds) == 0:
        raise ValueError(f"k is {k} and the gallery has {len(gallery_embeds)} rows; both must be at least 1")
    if not torch.isfinite(query_embeds).all():
        raise ValueError("query embeddings hold NaN or infinite values")
    k = min(k, len(gallery_embeds))
    device = gallery_embeds.device
    pairs = _pairs(exclude, device)
    best_scores = torch.full((len(query_embeds), 0), 0.0, device=device)
    best_indices = torch.zeros((len(query_embeds), 0), dtype=torch.long, device=device)
    for start in range(0, len(gallery_embeds), block_size):
        block = gallery_embeds[start : start + block_size]
        scores = (query_embeds.to(block.dtype) @ block.T).float()  # [Q, block]
        if not torch.isfinite(scores).all():
            raise ValueError(f"gallery embeddings {start} to {start + len(block) - 1} hold NaN or infinite values")
        if pairs is not None:
            rows, columns = pairs
            here = (columns >= start) & (columns < start + len(block))
            scores[rows[here], columns[here] - start] = -torch.inf
        # A stable sort breaks ties by index, but is slow over a whole block: cut to its best first, ties included.
        found, columns = _best_of_block(scores, min(k, len(block)))
        merged = torch.cat([best_scores, found], dim=1)
        merged_indices = torch.cat([best_indices, columns + start], dim=1)
        order = torch.sort(merged, dim=1, descending=True, stable=True).indices[:, :k]
        best_scores, best_indices = merged.gather(1, order), merged_indices.gather(1, order)
    return best_scores, best_indices.masked_fill(best_scores == -torch.inf, -1)


def _best_of_block(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top k of each row, equal scores by index."""
    values, columns = scores.topk(k, dim=1)
    if k < scores.shape[1]:
        # topk may pick any of the scores that equal the last place; take the first of them instead.
        last = values[:, -1:]
        for row in ((scores == last).sum(1) > (values == last).sum(1)).nonzero().flatten().tolist():
            above = columns[row][values[row] > last[row]]
            equal = (scores[row] == last[row]).nonzero().flatten()[: k - len(above)]
            columns[row] = torch.cat([above, equal])
            values[row] = scores[row, columns[row]]
    columns, order = columns.sort(dim=1)
    values = values.gather(1, order)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _pairs(exclude: Sequence[Sequence[int]] | None, device) -> tuple[torch.Tensor, torch.Tensor] | None:
    if exclude is None:
        return None
    rows = [i for i, columns in enumerate(exclude) for _ in columns]
    columns = [c for row in exclude for c in row]
    return torch.tensor(rows, dtype=torch.long, device=device), torch.tensor(columns, dtype=torch.long, device=device)


def target_ranks(
    query_embeds: torch.Tensor,
    gallery_embeds: torch.Tensor,
    targets: torch.Tensor,
    exclude: Sequence[Sequence[int]] | None = None,
    block_size: int = 1024,
) -> torch.Tensor:
    """Rank of each query's target in the whole gallery, 1 the best; equal scores count against it.

    Args:
        query_embeds (`torch.Tensor` [Q, D]), gallery_embeds (`torch.Tensor` [N, D]): L2-normalised.
        targets (`torch.LongTensor` [Q]): gallery indices.
        exclude: for each query, gallery indices that do not take part (CIRR: the reference).
        block_size (`int`): queries at a time.

    Raises:
        ValueError: for scores that are not finite, or a target that is excluded.
    """
    ranks = []
    for start in range(0, len(query_embeds), block_size):
        rows = slice(start, start + block_size)
        scores = query_embeds[rows] @ gallery_embeds.T  # [block, N]
        if not torch.isfinite(scores).all():
            raise ValueError(f"scores of queries {start} to {start + len(scores) - 1} hold NaN or infinite values")
        if exclude is not None:
            out, columns = _pairs(exclude[rows], scores.device)
            if (columns == targets[rows][out]).any():
                raise ValueError("a target is among its query's excluded images")
            scores[out, columns] = -torch.inf
        own = scores.gather(1, targets[rows, None])  # [block, 1]
        ranks.append((scores >= own).sum(1))  # the target itself counts once: rank 1 is the best
    return torch.cat(ranks)
