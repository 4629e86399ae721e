"""A [`Gallery`]'s add, remove and search on Milvus: a folder of `milvus-lite`'s, or a cluster by its address.

    MilvusGallery.open_or_create("photos.db", model, processor)
    MilvusGallery.open_or_create("http://milvus:19530#shop", model, processor)

What follows "#" names the collection. Vectors, ids, paths and metadata live in Milvus; pictures stay files.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import quote_from_bytes, unquote_to_bytes

import torch
from transformers.utils import logging

from .files import File
from .gallery import FORMAT, Gallery, fingerprint_of
from .gallery_search import check_search
from .images import load_image
from .metadata import Where, as_text, conditions_of, kinds_of, values_of, with_texts
from .milvus import among, as_filter, connect, holds_gallery, is_milvus, parts_of, quoted, told
from .shards import GalleryError


logger = logging.get_logger(__name__)
ROWS_AT_A_TIME = 500
MAX_ID_BYTES, MAX_PATH_BYTES = 4096, 16384
MAX_FOUND = 16384  # Milvus gives no more to one search


class MilvusGallery:
    """A gallery in Milvus: add, remove and search, with the arguments and results of [`Gallery`].

    Args:
        uri (`str`): a name that ends in .db, or a server's address; "#name" after it names the collection.

    Raises:
        GalleryError: if pymilvus is not installed, the server does not answer, or it holds no such gallery.
    """

    def __init__(self, uri: str):
        self.uri = os.fspath(uri)
        address, self.collection = parts_of(uri)
        if not holds_gallery(self.uri):
            raise GalleryError(f"{self.uri} holds no gallery; make one with: tscir index PHOTOS --output {self.uri}")
        self.client = connect(address)
        for name in (self.collection, f"{self.collection}_info"):
            self.client.load_collection(name)
        rows = self.client.get(f"{self.collection}_info", ids=["info"], output_fields=["content"])
        if rows[0]["content"].get("format") != FORMAT:
            raise GalleryError(f"{self.uri} is no gallery of this package's; name another collection: {address}#NAME")
        self.info: dict = rows[0]["content"]

    @classmethod
    def create(cls, uri: str, model, processor) -> "MilvusGallery":
        """An empty gallery, of float32, as Milvus's exact index has it."""
        from . import __version__

        uri = os.fspath(uri)
        address, collection = parts_of(uri)
        if holds_gallery(uri):
            raise GalleryError(f"{uri} is there already")
        client = connect(address)
        from pymilvus import DataType, MilvusClient

        for name in (collection, f"{collection}_info"):  # of one that was interrupted before it was a gallery
            client.drop_collection(name)
        size = model.config.clip_config.projection_dim
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, max_length=MAX_ID_BYTES, is_primary=True)
        schema.add_field("path", DataType.VARCHAR, max_length=MAX_PATH_BYTES)
        for name in ("size", "mtime_ns"):
            schema.add_field(name, DataType.INT64)
        schema.add_field("content", DataType.VARCHAR, max_length=64)
        schema.add_field("metadata", DataType.JSON)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=size)
        index = client.prepare_index_params()
        index.add_index("embedding", index_type="FLAT", metric_type="IP")
        told = {"consistency_level": "Strong"}  # what is written is read back at once
        client.create_collection(collection, schema=schema, index_params=index, **told)
        # Milvus wants a vector in every collection.
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, max_length=MAX_ID_BYTES, is_primary=True)
        schema.add_field("content", DataType.JSON)
        schema.add_field("unused", DataType.FLOAT_VECTOR, dim=2)
        index = client.prepare_index_params()
        index.add_index("unused", index_type="FLAT", metric_type="IP")
        client.create_collection(f"{collection}_info", schema=schema, index_params=index, **told)
        info = {
            "format": FORMAT,
            "fingerprint": fingerprint_of(model, processor),
            "dimensions": size,
            "dtype": "float32",
            "backbone": model.config.backbone_name_or_path or str(model.name_or_path),
            "tscir_version": __version__,
        }
        client.upsert(f"{collection}_info", [{"id": "info", "content": info, "unused": [0.0, 0.0]}])
        client.close()
        return cls(uri)

    @classmethod
    def open_or_create(cls, uri: str, model, processor) -> "MilvusGallery":
        """The gallery at `uri`, checked against the model, or an empty one."""
        from .indexing import Processes

        def create_if_missing() -> None:
            if not holds_gallery(uri):
                cls.create(uri, model, processor).client.close()

        Processes().same(create_if_missing)
        return cls.load(uri, model, processor)

    @classmethod
    def from_folder(cls, images, uri: str, model, processor, **options) -> "MilvusGallery":
        """The gallery at `uri`, made if need be, brought up to date with a folder."""
        gallery = cls.open_or_create(uri, model, processor)
        gallery.add(images, model, processor, **options)
        return gallery

    load = classmethod(Gallery.load.__func__)
    check = Gallery.check
    folder = property(lambda self: self.uri)

    def __str__(self) -> str:
        return self.uri

    def __len__(self) -> int:
        return int(self._query(filter="", output_fields=["count(*)"])[0]["count(*)"])

    def __contains__(self, name: str) -> bool:
        return bool(self._get([name], ["id"]))

    def _query(self, **options) -> list[dict]:
        with told(self.uri):
            return self.client.query(self.collection, **options)

    def _get(self, ids: Sequence[str], fields: Sequence[str]) -> list[dict]:
        rows = []
        for start in range(0, len(ids), ROWS_AT_A_TIME):
            some = among(ids[start : start + ROWS_AT_A_TIME])
            rows += self._query(filter=some, output_fields=list(fields))
        return rows

    def _rows(self, fields: Sequence[str], filter: str = "") -> Iterator[dict]:
        """All rows by their ids, some at a time. The client's own iterator does not bear a quote in an id."""
        after = ""
        while True:
            rows = self._query(
                filter=" and ".join(f"({part})" for part in (after, filter) if part),
                output_fields=["id", *fields],
                limit=ROWS_AT_A_TIME,
                iterator="True",  # the first by their ids, as the client's iterator asks for
                reduce_stop_for_best="False",
            )
            yield from rows
            if len(rows) < ROWS_AT_A_TIME:
                return
            after = f"id > {quoted(rows[-1]['id'])}"

    @property
    def ids(self) -> list[str]:
        """Ids of the pictures, sorted."""
        return sorted(row["id"] for row in self._rows(["id"]))

    def files(self) -> Iterator[File]:
        """Each row's file."""
        for row in self._rows(File._fields):
            yield File(row["id"], unquote_to_bytes(row["path"]), row["size"], row["mtime_ns"])

    def content(self, name: str) -> str | None:
        """The digest of an id's picture, None for an unknown id."""
        rows = self._get([name], ["content"])
        return rows[0]["content"] if rows else None

    def unknown(self, ids: Sequence[str]) -> list[str]:
        """Those of some ids that are not there."""
        known = {row["id"] for row in self._get(ids, ["id"])}
        return [name for name in ids if name not in known]

    def source(self, name: str) -> str:
        """The file of an id. Raises `KeyError` for unknown ids."""
        rows = self._get([name], ["path"])
        if not rows:
            raise KeyError(f"{self} holds no picture {name!r}")
        return os.fsdecode(unquote_to_bytes(rows[0]["path"]))

    def picture(self, name: str):
        """The picture of an id, a PIL image. Raises `ValueError` if its file is gone or broken by now."""
        return load_image(self.source(name))

    def duplicates(self) -> list[list[str]]:
        """Groups of ids whose files have the same bytes."""
        groups: dict[str, list[str]] = {}
        for row in self._rows(["id", "content"]):
            groups.setdefault(row["content"], []).append(row["id"])
        return sorted(sorted(group) for group in groups.values() if len(group) > 1)

    @property
    def columns(self) -> dict[str, str]:
        """As [`Gallery.columns`]."""
        return self.info.get("columns", {})

    # ----- search

    def search(
        self,
        queries: torch.Tensor,
        top_k: int = 10,
        where: Where | None = None,
        exclude: Sequence[str] = (),
        exact: bool = False,
    ) -> list[list[dict]]:
        """As [`Gallery.search`], for at most MAX_FOUND results; which index answers is Milvus's affair, so `exact`
        changes nothing."""
        check_search(queries, top_k, exclude, self.info["dimensions"])
        if top_k > MAX_FOUND:
            raise ValueError(f"top_k is {top_k}, and Milvus gives at most {MAX_FOUND} results to one search")
        top_k = int(top_k)
        if not len(queries):
            return []
        asked = conditions_of(where, self.columns, self.uri)
        if any(condition.operator == "in" and not condition.value for condition in asked):
            return [[] for _ in queries]
        filters = [as_filter(condition) for condition in asked]
        with told(self.uri):
            hidden = sorted({row["content"] for row in self._get(list(exclude), ["content"])})
            if hidden:
                filters.append(f"content not in {quoted(hidden)}")
            limit = min(MAX_FOUND, top_k + 20)
            while True:
                found = self.client.search(
                    self.collection,
                    data=queries.float().cpu().tolist(),
                    limit=limit,
                    filter=" and ".join(filters),
                    output_fields=["path", "content", "metadata"],
                )
                rows = [self._distinct(hits, top_k) for hits in found]
                # Pictures of the same bytes count once, so that more may be needed.
                short = any(len(r) < top_k and len(f) == limit for r, f in zip(rows, found, strict=True))
                if not short or limit == MAX_FOUND:
                    break
                limit = min(MAX_FOUND, 4 * limit)
            if short:
                problem = f"Milvus gives {limit} pictures to one search, of which fewer than {top_k} differ"
                logger.warning(f"{self.uri}: {problem}; more may be there")
            contents = sorted({hit["entity"]["content"] for hits in rows for hit in hits})
            same: dict[str, list[str]] = {}
            if contents:
                filters.append(f"content in {quoted(contents)}")
                for row in self._rows(["id", "content"], " and ".join(filters)):
                    same.setdefault(row["content"], []).append(row["id"])
        return [[self._result(hit, same) for hit in hits] for hits in rows]

    def _result(self, hit: dict, same: dict[str, list[str]]) -> dict:
        entity = hit["entity"]
        return {
            "score": float(hit["distance"]),
            "id": hit["id"],
            "path": os.fsdecode(unquote_to_bytes(entity["path"])),
            "duplicates": sorted(name for name in same[entity["content"]] if name != hit["id"]),
            "metadata": dict.fromkeys(self.columns) | dict(entity["metadata"]),
        }

    @staticmethod
    def _distinct(hits: Sequence[dict], top_k: int) -> list[dict]:
        """The first of each content, in order of scores; of equal scores the lower id first."""
        first: dict[str, dict] = {}
        for hit in sorted(hits, key=lambda hit: (-hit["distance"], hit["id"])):
            first.setdefault(hit["entity"]["content"], hit)
        return list(first.values())[:top_k]

    # ----- writing, as `indexing` calls it

    def add(self, images, model, processor, **options):
        """Bring it up to date with a folder; see [`Gallery.add`]. A dataset has no files to go back to: not taken."""
        from .indexing import add_images

        if not isinstance(images, (str, os.PathLike)):
            raise GalleryError("Milvus keeps no pictures, so a dataset cannot be added; index a folder of files")
        self.check(model, processor)
        return add_images(self, images, model, processor, **options)

    def remove(self, ids: Sequence[str]) -> None:
        """Forget pictures, as [`Gallery.remove`] does."""
        if isinstance(ids, str):
            raise ValueError(f"remove takes a list of ids, not {ids!r}")
        ids = list(ids)
        unknown = self.unknown(ids)
        if unknown:
            raise KeyError(f"{self.uri} holds no {', '.join(map(repr, unknown[:5]))} ({len(unknown)} unknown ids)")
        self.forget(set(ids))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Milvus takes several writers; rows are replaced by their ids."""
        yield

    def next_shard(self) -> int:
        """Milvus has no shards of ours."""
        return 0

    def remember(self, **entries) -> None:
        """Keep further entries in `info`."""
        self.info |= entries
        content = {"id": "info", "content": self.info, "unused": [0.0, 0.0]}
        self.client.upsert(f"{self.collection}_info", [content])

    def write_rows(self, number: int, rows: list[dict], embeds: torch.Tensor) -> None:
        """Keep rows, in place of those of the same ids."""
        old = {row["id"]: row["metadata"] for row in self._get([row["id"] for row in rows], ["metadata"])}
        content = [
            {
                "id": row["id"],
                "path": quote_from_bytes(row["path"]),
                "size": row["size"],
                "mtime_ns": row["mtime_ns"],
                "content": row["content"],
                "metadata": old.get(row["id"], {}),
                "embedding": vector,
            }
            for row, vector in zip(rows, embeds.float().tolist(), strict=True)
        ]
        self._upsert(content)

    def _upsert(self, rows: list[dict]) -> None:
        with told(f"{self.uri} did not take the rows; what was indexed before is kept"):
            for start in range(0, len(rows), ROWS_AT_A_TIME):
                self.client.upsert(self.collection, rows[start : start + ROWS_AT_A_TIME])

    def reload(self) -> None:
        """Milvus answers with what it holds now."""

    def forget(self, ids: set[str]) -> None:
        """Delete the rows of `ids`."""
        names = sorted(ids)
        for start in range(0, len(names), ROWS_AT_A_TIME):
            with told(self.uri):
                self.client.delete(self.collection, filter=among(names[start : start + ROWS_AT_A_TIME]))

    def set_paths(self, paths: dict[str, bytes]) -> None:
        """Where pictures, by their ids, lie now."""
        self._change(list(paths), lambda row: {"path": quote_from_bytes(paths[row["id"]])})

    def set_metadata(self, frame=None, replaced: set[str] = frozenset()) -> None:
        """Put `frame`'s rows, by id, in place of those of its ids and of `replaced`; keep that of other pictures."""
        if frame is None:
            return
        columns, kinds = self.columns, kinds_of(frame)
        kinds = {name: kind for name, kind in kinds.items() if name not in columns or frame[name].notna().any()}
        ids = sorted(replaced | set(frame.index))
        if other := {name for name, kind in kinds.items() if columns.get(name, kind) != kind}:
            kept = {row["id"]: row["metadata"].keys() & other for row in self._rows(["metadata"])}
            kept = {name: held for name, held in kept.items() if held and name not in set(ids)}
            mixed = set().union(*kept.values())  # are texts, for every picture
            frame = frame.assign(**{name: frame[name].map(as_text).astype("string") for name in mixed})
            kinds |= dict.fromkeys(mixed, "text")
            self._change(sorted(kept), lambda row: {"metadata": with_texts(row["metadata"], mixed)})
        self.remember(columns=columns | kinds)
        values = {name: {k: v for k, v in values_of(frame, name).items() if v is not None} for name in ids}
        self._change(ids, lambda row: {"metadata": values[row["id"]]})
        empty, rows = columns.keys() - set(frame.columns), self._rows(["metadata"])
        while empty and (row := next(rows, None)):
            empty -= row["metadata"].keys()
        if empty:  # they went with the rows that had them
            self.remember(columns={name: kind for name, kind in self.info["columns"].items() if name not in empty})

    def _change(self, ids: Sequence[str], change: Callable[[dict], dict]) -> None:
        for start in range(0, len(ids), ROWS_AT_A_TIME):
            rows = self._get(ids[start : start + ROWS_AT_A_TIME], ["*"])
            self._upsert([dict(row) | change(row) for row in rows])

    @property
    def unreadable(self) -> list[dict[str, str]]:
        """{"id", "reason"} of what the last indexing could not use."""
        name = f"{self.collection}_info"
        rows = self.client.query(name, filter='id != "info"', output_fields=["content"], limit=MAX_FOUND)
        return sorted((row["content"] for row in rows), key=lambda bad: bad["id"])

    def set_unreadable(self, unreadable: list[dict[str, str]]) -> None:
        """Keep what the last indexing could not use."""
        name = f"{self.collection}_info"
        self.client.delete(name, filter='id != "info"')
        for start in range(0, len(unreadable), ROWS_AT_A_TIME):
            numbered = enumerate(unreadable[start : start + ROWS_AT_A_TIME], start)
            self.client.upsert(name, [{"id": f"bad {i}", "content": bad, "unused": [0.0, 0.0]} for i, bad in numbered])

    def index_is_old(self) -> bool:
        """Never: Milvus keeps its own."""
        return False

    def rebuild_index(self) -> None:
        """Milvus keeps its own."""


def open_gallery(name: str | os.PathLike) -> Gallery | MilvusGallery:
    """A gallery by its folder or by its address on Milvus."""
    return MilvusGallery(os.fspath(name)) if is_milvus(name) else Gallery(name)
