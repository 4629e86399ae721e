"""A benchmark's split: its pictures, its queries, and what stands for each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from modeling_tscir.images import ImageSource, Selected
from modeling_tscir.ranking import Ranking


@dataclass(frozen=True)
class Split:
    """Queries and pictures of a split, or of one of its categories. References, truths and candidates index pictures.

    Args:
        image_ids: each picture's name, as rankings and submissions give it.
        sources: the pictures, in the same order.
        files: for each picture its path, and what else decides its content (a box that is cut out).
        query_ids: as the benchmark numbers its queries.
        references: each query's reference.
        texts: each query's modification in one or several wordings, whose embeddings are averaged.
        annotation_files: what was read.
        truths: each query's right answers, its target first; `None` where they are not public.
        candidates: each query's own short list (CIRR's set of six, GeneCIS's gallery), without its reference.
        ranks_gallery: whether all pictures are ranked, not a query's candidates alone.
        exclude_reference: whether a query's reference is removed from its ranking.
    """

    image_ids: list[str]
    sources: Sequence[ImageSource]
    files: list[tuple]
    query_ids: list[int | str]
    references: list[int]
    texts: list[tuple[str, ...]]
    annotation_files: tuple[Path, ...]
    truths: list[list[int]] | None = None
    candidates: list[list[int]] | None = None
    ranks_gallery: bool = True
    exclude_reference: bool = False

    def first_queries(self, count: int) -> "Split":
        """The same gallery with fewer queries."""
        return self.of_queries(range(min(count, len(self.query_ids))))

    def of_queries(self, rows: Sequence[int]) -> "Split":
        names = ("query_ids", "references", "texts", "truths", "candidates")
        columns = {name: getattr(self, name) for name in names}
        return replace(self, **{n: [c[i] for i in rows] for n, c in columns.items() if c is not None})


class Ranked(NamedTuple):
    """Rankings of a split's gallery, and of each query's candidates, where the benchmark has them."""

    gallery: Ranking | None
    candidates: Ranking | None


def without_pictures(split: Split, lost: set[str]) -> Split:
    """The split without some pictures, by name, and without the queries whose reference or target they are, or all the
    wrong ones of whose own short list, in which the target would always come first."""
    kept = [i for i, name in enumerate(split.image_ids) if name not in lost]
    new = {old: i for i, old in enumerate(kept)}
    truths, candidates = (
        None if rows is None else [[new[i] for i in row if i in new] for row in rows]
        for rows in (split.truths, split.candidates)
    )
    whole = [
        q
        for q, reference in enumerate(split.references)
        if reference in new
        and (split.truths is None or split.truths[q][0] in new)
        and (split.truths is None or split.candidates is None or set(candidates[q]) - set(truths[q]))
    ]
    smaller = replace(
        split,
        image_ids=[split.image_ids[i] for i in kept],
        sources=Selected(split.sources, kept),
        files=[split.files[i] for i in kept],
        references=[new.get(i, -1) for i in split.references],
        truths=truths,
        candidates=candidates,
    )
    return smaller.of_queries(whole)
