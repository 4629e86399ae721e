"""Pairs of similar pictures that the caption of one of them tells apart."""

from collections import Counter
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from modeling_tscir.ranking import top_k


NEIGHBOURS = 128
# What a caption that tells two pictures apart by a cosine of 1 is worth in cosines of the two pictures.
GAIN_SHARE = 0.3
ROWS_AT_A_TIME = 256


def told_apart(
    images: torch.Tensor,
    texts: torch.Tensor,
    ids: Sequence,
    count: int,
    max_similarity: float,
    min_gain: float,
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """About `count` pairs (reference row, target row), or fewer, and why other neighbours are none.

    Pictures with near captions may differ in all that captions leave out. So the nearest pictures are paired, those
    whose own caption fits them better than it fits the reference: the caption then says what differs, and the rest
    stays. Pairs stand best first, but every reference's best before any one's second.

    Args:
        images, texts (`torch.Tensor` [n, D]): embeddings of every row's picture and caption, L2-normalised.
        ids: the picture of every row; a picture with several captions has a row for each.
        max_similarity: cosine of two pictures above which they are taken for the same.
        min_gain: by how much at least a caption must fit the target better than the reference, in cosines.
    """
    first = {str(name): row for row, name in reversed(list(enumerate(ids)))}
    references = torch.tensor(sorted(first.values()), device=images.device)
    picture_of = [first[str(name)] for name in ids]
    picture = torch.tensor(picture_of, device=images.device)  # [n]
    per_reference = max(1, -(-count // len(references)))
    found, dropped = [], Counter()
    for block in tqdm(references.split(ROWS_AT_A_TIME), desc="nearest pictures", unit="block", mininterval=2):
        similarity, near = top_k(images[block], images, min(NEIGHBOURS, len(images)))  # [block, k]
        gain = ((images[near] - images[block, None]) * texts[near]).sum(-1)
        other = picture[near] != block[:, None]
        alike = other & (similarity > max_similarity)
        untold = other & ~alike & (gain < min_gain)
        dropped["pictures nearly identical"] += int(alike.sum())
        dropped["caption does not tell them apart"] += int(untold.sum())
        score = (similarity + GAIN_SHARE * gain).masked_fill(~other | alike | untold, -torch.inf)
        for reference, targets, scores in zip(block.tolist(), near.tolist(), score.tolist(), strict=True):
            best: dict[int, tuple] = {}  # of each target picture the caption that tells most
            for value, target in sorted(zip(scores, targets, strict=True), reverse=True):
                if value > -torch.inf:
                    best.setdefault(picture_of[target], (-value, reference, target))
            found += list(enumerate(best.values()))[:per_reference]
    return [(i, j) for _, (_, i, j) in sorted(found)], dict(dropped)
