"""A FAISS index beside a gallery's shards: approximate, measured against exact search when it is built."""

import contextlib
from pathlib import Path

import numpy as np
import torch

from .shards import GalleryError


TRAINING_ROWS = 200_000


def import_faiss():
    """The module. Raises `GalleryError` if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise GalleryError("this needs FAISS: pip install 'tscir[faiss]'") from error
    return faiss


def empty(factory: str, size: int):
    """An index of vectors of `size` numbers. Raises `GalleryError` if FAISS is missing or does not know the string."""
    faiss = import_faiss()
    try:
        return faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise GalleryError(f"FAISS does not understand {factory!r} for {size} dimensions: {reason}") from error


def build(factory: str, shards: list[torch.Tensor], sample: np.ndarray):
    """An index by its factory string over all rows of `shards` [n, D], numbered in order, trained on `sample` [m, D].

    Raises:
        GalleryError: if FAISS is missing, does not know the string, or has too few rows to train on.
    """
    index = empty(factory, sample.shape[1])
    if not index.is_trained:
        try:
            index.train(sample)
        except RuntimeError as error:
            raise GalleryError(
                f"{len(sample)} pictures do not train a {factory} index; choose fewer cells, or leave the index out: "
                "exact search is fast up to millions"
            ) from error
    for embeds in shards:
        index.add(embeds.float().numpy())
    return index


def read(path: Path):
    """Raises `RuntimeError`, as FAISS does, if there is none."""
    return import_faiss().read_index(str(path))


def write(index, path: Path) -> None:
    import_faiss().write_index(index, str(path))


def candidates(index, queries: torch.Tensor, k: int, wanted: np.ndarray) -> list[np.ndarray]:
    """For each query the first k wanted rows that the index finds, or as many as it has.

    Args:
        queries (`torch.Tensor` [Q, D]).
        wanted (`np.ndarray` [N]): False for rows that do not take part; the index is asked for more in their place.
    """
    with contextlib.suppress(RuntimeError):  # an index without cells has nothing to probe
        cells = import_faiss().extract_index_ivf(index)
        cells.nprobe = min(cells.nlist, max(8, cells.nlist // 32))
    asked = min(k, len(wanted))
    while True:
        _, rows = index.search(queries.numpy(), asked)
        good = (rows >= 0) & wanted[rows]
        enough = (good.sum(1) >= k) | (rows < 0).any(1)
        if enough.all() or asked == len(wanted):
            return [row[keep][:k] for row, keep in zip(rows, good, strict=True)]
        asked = min(4 * asked, len(wanted))
