"""What changes a gallery's folder: one writer at a time, whole shards alone."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from transformers.utils import logging

from .metadata import merged, to_arrow
from .shards import (
    SCHEMA,
    GalleryError,
    clear_leavings,
    place_of,
    rewrite_shard,
    write_json,
    write_shard,
    write_stream,
)


logger = logging.get_logger(__name__)


class WritingMixin:
    """What changes a [`Gallery`]; a base class of it."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second writer out, and begins with what the last one left.

        Raises:
            GalleryError: if there is one, or the folder cannot be written to.
        """
        if self._writer == threading.get_ident():  # by this one already
            yield
            return
        try:
            file = open(self.folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            remedy = "index into another gallery, or have it changed by whom it belongs to"
            raise GalleryError(f"{self.folder} cannot be written to ({error.strerror}); {remedy}") from error
        with file:
            with contextlib.suppress(ImportError):  # Windows has no fcntl
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError) as error:  # the second is what SMB says
                    problem = f"{self.folder} is being written by another process or thread; wait for it to end"
                    raise GalleryError(problem) from error
                except OSError as error:  # as some network file systems have no locks
                    logger.warning(
                        f"{self.folder} cannot be locked ({error.strerror}); let one process write at a time"
                    )
            clear_leavings(self.folder / "shards")
            self.info = json.loads((self.folder / "gallery.json").read_text(encoding="utf-8"))
            self.clear_indexes()
            self.reload()
            self._writer = threading.get_ident()
            try:
                yield
            finally:
                self._writer = None

    def next_shard(self) -> int:
        """A number that no shard has or had."""
        return 1 + max([self.info.get("last_shard", -1), *(place_of(path)[0] for path in self.shards)])

    def remember(self, **entries) -> None:
        """Keep further entries in `info`."""
        with self.locked():
            self.info |= entries
            write_json(self.folder / "gallery.json", self.info)

    def write_rows(self, number: int, rows: list[dict], embeds: torch.Tensor) -> None:
        """Keep a shard of rows, read back by `reload`. Raises `GalleryError` if the disk does not take it."""
        write_shard(self.folder / "shards" / f"{number:06d}", pa.Table.from_pylist(rows, SCHEMA), embeds)

    def forget(self, ids: set[str]) -> None:
        """Rewrite the shards that hold dead rows, or rows of `ids`, without them."""
        if not ids and self.rows.live.all():
            return
        self.remember(last_shard=self.next_shard() - 1)
        self.rows.live[self.rows.of(list(ids))] = False
        start = 0
        for path, embeds in zip(self.shards, self.embeds, strict=True):
            live = self.rows.live[start : start + len(embeds)]
            if not live.all():
                rows = np.flatnonzero(live)
                table = self.table.slice(start, len(embeds)).take(rows)
                rewrite_shard(path, table, embeds[torch.from_numpy(rows)])
            start += len(embeds)
        self.reload()

    def set_paths(self, paths: dict[str, bytes]) -> None:
        """Where pictures, by their ids, lie now."""
        rows = dict(zip(self.rows.of(list(paths)).tolist(), paths.values(), strict=True))
        start = 0
        for shard, embeds in zip(self.shards, self.embeds, strict=True):
            places = range(start, start + len(embeds))
            if any(row in rows for row in places):
                table = self.table.slice(start, len(embeds)).combine_chunks()
                old = table["path"].to_pylist()
                new = pa.array([rows.get(row, path) for row, path in zip(places, old, strict=True)], pa.binary())
                place = SCHEMA.get_field_index("path")
                rewrite_shard(shard, table.set_column(place, SCHEMA.field("path"), new), embeds)
            start += len(embeds)
        self.reload()

    def set_metadata(self, frame: pd.DataFrame | None = None, replaced: set[str] = frozenset()) -> None:
        """Put `frame`'s rows, by id, in place of those of its ids and of `replaced`; keep that of other pictures."""
        old = self.metadata[self.rows.of(self.metadata.index) >= 0]  # of others, too, if an interruption left them
        new = old if frame is None else merged(old, frame, replaced)
        new = new[self.rows.of(new.index) >= 0]
        write_metadata(new, self.folder)
        self._metadata = None

    def set_unreadable(self, unreadable: list[dict[str, str]]) -> None:
        """Keep what the last indexing could not use."""
        write_json(self.folder / "unreadable.json", unreadable)


def write_metadata(frame: pd.DataFrame, folder: Path) -> None:
    """Keep metadata by id in a gallery's folder; no file where there are no columns."""
    path = folder / "metadata.arrow"
    if len(frame.columns):
        write_stream(to_arrow(frame).add_column(0, "id", pa.array(frame.index, pa.string())), path)
    else:
        path.unlink(missing_ok=True)
