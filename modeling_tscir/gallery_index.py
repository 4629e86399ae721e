"""A FAISS index beside a gallery's shards: approximate, measured against exact search when it is built."""

import contextlib
import uuid
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from .exact_search import search_exactly
from .shards import GalleryError


logger = logging.get_logger(__name__)
TRAINING_ROWS = 200_000


class IndexMixin:
    """A FAISS index of a [`Gallery`]; a base class of it."""

    def build_index(self, factory: str, num_queries: int = 256) -> dict:
        """Build a FAISS index by its factory string ("IVF4096,PQ64", "HNSW32", ...) and measure it.

        Returns:
            {"factory", "recall_at_10", "queries", ...}, kept in gallery.json: the share of the exact ten best that the
            index finds, for queries halfway between two pictures, as composed queries lie.

        Raises:
            GalleryError: if FAISS is not installed, does not know the string, or has too few pictures to train it.
        """
        with self.locked():
            rng = np.random.default_rng(0)
            rows = np.flatnonzero(self.rows.live)
            if not len(rows):
                raise GalleryError(f"{self.folder} is empty; index some pictures first")
            sample = np.sort(rng.choice(rows, min(len(rows), TRAINING_ROWS), replace=False))
            # Over dead rows, too, so that FAISS numbers rows as we do.
            index = build(factory, self.embeds, self.vectors(sample).float().numpy())
            pairs = rng.choice(rows, (num_queries, 2))
            between = self.vectors(pairs[:, 0]).float() + self.vectors(pairs[:, 1]).float()
            queries = torch.nn.functional.normalize(between, dim=-1)
            wanted = self._wanted(None)[0]
            k = min(10, int(wanted.sum()))
            _, exact = search_exactly(self.embeds, queries, k, wanted)
            _, found = self._search_index(index, queries, k, wanted)
            hits = [len(set(a) & set(b)) / k for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
            # A name of its own, so that a process which opened the gallery earlier never reads another's index.
            token = uuid.uuid4().hex
            write(index, self.folder / f"faiss-{token}.index")
            built = {"factory": factory, "recall_at_10": float(np.mean(hits)), "queries": num_queries}
            self.remember(index=built | {"token": token, "shards": self._shard_sizes()})
            self.clear_indexes()
            self._index = index
        return self.info["index"]

    def _shard_sizes(self) -> dict[str, int]:
        return {path.name: len(embeds) for path, embeds in zip(self.shards, self.embeds, strict=True)}

    def drop_index(self) -> None:
        """Search exactly from now on."""
        with self.locked():
            self.info.pop("index", None)
            self.remember()
            self.clear_indexes()

    def clear_indexes(self) -> None:
        """Remove all but the one that is known, such as what an interruption left."""
        kept = f"faiss-{self.info['index']['token']}.index" if "index" in self.info else None
        for path in self.folder.glob(f"faiss-{'[0-9a-f]' * 32}.index"):
            if path.name != kept:
                path.unlink(missing_ok=True)

    def index_is_old(self) -> bool:
        """Whether there is an index of other rows than these, which searches do without."""
        return "index" in self.info and self.info["index"]["shards"] != self._shard_sizes()

    def rebuild_index(self) -> None:
        """Build the index anew, if there is one, after pictures came or went; drop one that cannot be built."""
        if "index" not in self.info:
            return
        try:
            self.build_index(self.info["index"]["factory"])
        except GalleryError as error:
            logger.warning(f"{self.folder}: its index is dropped, and search is exact: {error}")
            self.drop_index()

    def _faiss(self):
        """The index, if it is of these very rows and can be read."""
        if "index" not in self.info:
            return None
        if self._index is None:
            try:
                if self.index_is_old():
                    raise RuntimeError("it is older or newer than the pictures")
                self._index = read(self.folder / f"faiss-{self.info['index']['token']}.index")
            except (RuntimeError, GalleryError) as error:
                reason = str(error).strip().splitlines()[-1]
                logger.warning_once(f"{self.folder}: its index cannot be used, searching exactly ({reason})")
        return self._index

    def _search_index(self, index, queries: torch.Tensor, k: int, wanted: np.ndarray):
        """As `search_exactly`, among what the index finds; exactly so for queries that it finds fewer than k for."""
        scores, rows = queries.new_empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
        all_found = candidates(index, queries, k, wanted) if k else []
        short = [number for number, found in enumerate(all_found) if len(found) < k]  # its cells hold no more
        if short:
            scores[short], rows[short] = search_exactly(self.embeds, queries[short], k, wanted)
        for number in sorted(set(range(len(all_found))) - set(short)):
            # The index's own scores may be of compressed vectors.
            found = torch.from_numpy(np.sort(all_found[number]))
            exact = self.vectors(found.numpy()).float() @ queries[number]
            order = exact.argsort(descending=True, stable=True)
            scores[number], rows[number] = exact[order], found[order]
        return scores, rows


def import_faiss():
    """The module. Raises `GalleryError` if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise GalleryError("this needs FAISS: pip install faiss-cpu") from error
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
    try:
        if not index.is_trained:
            index.train(sample)
        for embeds in shards:
            index.add(embeds.float().numpy())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("failed: ")[2]  # behind the place in FAISS's code
        raise GalleryError(
            f"{len(sample)} pictures do not make a {factory} index ({reason}); choose another, such as one of fewer "
            "cells, or leave the index out: exact search is fast up to millions"
        ) from error
    return index


def read(path: Path):
    """Raises `RuntimeError`, as FAISS does, if there is none."""
    return import_faiss().read_index(str(path))


def write(index, path: Path) -> None:
    import_faiss().write_index(index, str(path))


def candidates(index, queries: torch.Tensor, k: int, wanted: np.ndarray) -> list[np.ndarray]:
    """For each query the first k wanted rows that the index finds, or fewer.

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
