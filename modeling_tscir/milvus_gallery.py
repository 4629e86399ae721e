"""The calls of a [`Gallery`] on Milvus: a file with `milvus-lite`, or a cluster by its address.

    MilvusGallery.open_or_create("photos.db", model, processor)
    MilvusGallery.open_or_create("http://milvus:19530#shop", model, processor)

What follows "#" names the collection. Vectors, ids, paths and metadata live in Milvus; pictures stay files.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from urllib.parse import quote_from_bytes, unquote_to_bytes

import torch

from .gallery import FORMAT, OPERATORS, Gallery, GalleryError, Where, fingerprint_of
from .images import load_image


ROWS_AT_A_TIME = 500
MAX_ID_BYTES, MAX_PATH_BYTES = 4096, 16384
MAX_FOUND = 16384  # Milvus gives no more to one search


def is_milvus(name: str | os.PathLike) -> bool:
    """Whether a gallery's name is an address of Milvus rather than a folder."""
    name = os.fspath(name)
    return name.startswith(("http://", "https://", "tcp://", "unix:")) or name.partition("#")[0].endswith(".db")


class MilvusGallery:
    """A gallery in Milvus, with the calls and results of [`Gallery`].

    Args:
        uri (`str`): a file that ends in .db, or a server's address; "#name" after it names the collection.

    Raises:
        GalleryError: if pymilvus is not installed, the server does not answer, or it holds no such gallery.
    """

    def __init__(self, uri: str):
        self.uri = os.fspath(uri)
        address, _, collection = self.uri.partition("#")
        self.collection = collection or "gallery"
        self.client = connect(address)
        if not self.client.has_collection(self.collection):
            raise GalleryError(f"{self.uri} holds no gallery; make one with: tscir index PHOTOS --output {self.uri}")
        rows = self.client.get(f"{self.collection}_info", ids=["info"], output_fields=["content"])
        if not rows or rows[0]["content"].get("format") != FORMAT:
            raise GalleryError(f"{self.uri} is no gallery of this package's; name another collection: {address}#NAME")
        self.info: dict = rows[0]["content"]

    @classmethod
    def create(cls, uri: str, model, processor, dtype: str = "float32") -> "MilvusGallery":
        """An empty gallery. `dtype` is float32, as Milvus's exact index has it."""
        from pymilvus import DataType, MilvusClient

        from . import __version__

        uri = os.fspath(uri)
        address, _, collection = uri.partition("#")
        collection = collection or "gallery"
        client = connect(address)
        if client.has_collection(collection):
            raise GalleryError(f"{uri} is there already")
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
        client.create_collection(collection, schema=schema, index_params=index)
        # Milvus wants a vector in every collection.
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, max_length=MAX_ID_BYTES, is_primary=True)
        schema.add_field("content", DataType.JSON)
        schema.add_field("unused", DataType.FLOAT_VECTOR, dim=2)
        index = client.prepare_index_params()
        index.add_index("unused", index_type="FLAT", metric_type="IP")
        client.create_collection(f"{collection}_info", schema=schema, index_params=index)
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
    def open_or_create(cls, uri: str, model, processor, dtype: str = "float32") -> "MilvusGallery":
        from .indexing import Processes

        def create_if_missing() -> None:
            address, _, collection = os.fspath(uri).partition("#")
            client = connect(address)
            found = client.has_collection(collection or "gallery")
            client.close()
            if not found:
                cls.create(uri, model, processor).client.close()

        Processes().same(create_if_missing)
        return cls.load(uri, model, processor)

    @classmethod
    def from_folder(cls, images, uri: str, model, processor, **options) -> "MilvusGallery":
        """The gallery at `uri`, made if need be, brought up to date with a folder."""
        gallery = cls.open_or_create(uri, model, processor)
        gallery.add(images, model, processor, **options)
        return gallery

    @classmethod
    def load(cls, uri: str, model=None, processor=None) -> "MilvusGallery":
        gallery = cls(uri)
        if model is not None:
            gallery.check(model, processor)
        return gallery

    check = Gallery.check
    folder = property(lambda self: self.uri)

    def __str__(self) -> str:
        return self.uri

    def __len__(self) -> int:
        return int(self.client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def __contains__(self, name: str) -> bool:
        return bool(self._get([name], ["id"]))

    def _get(self, ids: Sequence[str], fields: Sequence[str]) -> list[dict]:
        rows = []
        for start in range(0, len(ids), ROWS_AT_A_TIME):
            some = list(ids[start : start + ROWS_AT_A_TIME])
            rows += self.client.get(self.collection, ids=some, output_fields=list(fields))
        return rows

    def _rows(self, fields: Sequence[str], filter: str = "") -> Iterator[dict]:
        rows = self.client.query_iterator(
            self.collection, batch_size=ROWS_AT_A_TIME, filter=filter, output_fields=list(fields)
        )
        while batch := rows.next():
            yield from batch
        rows.close()

    @property
    def ids(self) -> list[str]:
        return sorted(row["id"] for row in self._rows(["id"]))

    def known(self) -> dict[str, tuple[bytes, int, int]]:
        rows = self._rows(["id", "path", "size", "mtime_ns"])
        return {row["id"]: (unquote_to_bytes(row["path"]), row["size"], row["mtime_ns"]) for row in rows}

    def source(self, name: str) -> str:
        rows = self._get([name], ["path"])
        if not rows:
            raise KeyError(name)
        return os.fsdecode(unquote_to_bytes(rows[0]["path"]))

    def picture(self, name: str):
        return load_image(self.source(name))

    def duplicates(self) -> list[list[str]]:
        groups: dict[str, list[str]] = {}
        for row in self._rows(["id", "content"]):
            groups.setdefault(row["content"], []).append(row["id"])
        return sorted(sorted(group) for group in groups.values() if len(group) > 1)

    # ----- search

    def search(
        self,
        queries: torch.Tensor,
        top_k: int = 10,
        where: Where | None = None,
        exclude: Sequence[str] = (),
        exact: bool = False,
    ) -> list[list[dict]]:
        """As [`Gallery.search`]; which index answers is Milvus's affair, so `exact` changes nothing."""
        if queries.ndim != 2 or queries.shape[1] != self.info["dimensions"]:
            raise ValueError(f"queries are {tuple(queries.shape)}; this gallery wants [Q, {self.info['dimensions']}]")
        if top_k < 1 or not torch.isfinite(queries).all():
            raise ValueError("top_k must be at least 1, and queries hold no NaN or infinite values")
        if not len(queries):
            return []
        hidden = sorted({row["content"] for row in self._get(list(exclude), ["content"])})
        conditions = [condition(column, given) for column, given in (where or {}).items()]
        if hidden:
            conditions.append(f"content not in {json.dumps(hidden)}")
        found = self.client.search(
            self.collection,
            data=queries.float().cpu().tolist(),
            limit=min(MAX_FOUND, 4 * top_k + 20),  # room for pictures of the same bytes, which count once
            filter=" and ".join(conditions),
            output_fields=["path", "content", "metadata"],
        )
        rows = [self._distinct(hits, top_k) for hits in found]
        contents = sorted({hit["entity"]["content"] for hits in rows for hit in hits})
        same: dict[str, list[str]] = {}
        if contents:
            for row in self._rows(
                ["id", "content"], " and ".join([f"content in {json.dumps(contents)}", *conditions])
            ):
                same.setdefault(row["content"], []).append(row["id"])
        return [
            [
                {
                    "score": float(hit["distance"]),
                    "id": hit["id"],
                    "path": os.fsdecode(unquote_to_bytes(hit["entity"]["path"])),
                    "duplicates": sorted(n for n in same[hit["entity"]["content"]] if n != hit["id"]),
                    "metadata": dict(hit["entity"]["metadata"]),
                }
                for hit in hits
            ]
            for hits in rows
        ]

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
        known = {row["id"] for row in self._get(ids, ["id"])}
        unknown = [name for name in ids if name not in known]
        if unknown:
            raise KeyError(f"{self.uri} holds no {', '.join(map(repr, unknown[:5]))} ({len(unknown)} unknown ids)")
        self.forget(set(ids))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Milvus takes several writers; rows are replaced by their ids."""
        yield

    def next_shard(self) -> int:
        return 0

    def remember(self, **entries) -> None:
        """Keep further entries in `info`."""
        self.info |= entries
        content = {"id": "info", "content": self.info, "unused": [0.0, 0.0]}
        self.client.upsert(f"{self.collection}_info", [content])

    def write_rows(self, number: int, rows: list[dict], embeds: torch.Tensor) -> None:
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
        from pymilvus import MilvusException

        try:
            for start in range(0, len(rows), ROWS_AT_A_TIME):
                self.client.upsert(self.collection, rows[start : start + ROWS_AT_A_TIME])
        except MilvusException as error:
            raise GalleryError(
                f"{self.uri} did not take the rows ({error}); what was indexed before is kept. Run the same again."
            ) from error

    def reload(self) -> None:
        """Milvus answers with what it holds now."""

    def forget(self, ids: set[str]) -> None:
        names = sorted(ids)
        for start in range(0, len(names), ROWS_AT_A_TIME):
            self.client.delete(self.collection, ids=names[start : start + ROWS_AT_A_TIME])

    def set_metadata(self, frame=None) -> None:
        if frame is None:
            return
        content = json.loads(frame.to_json(orient="index"))
        ids = [str(name) for name in frame.index]
        for start in range(0, len(ids), ROWS_AT_A_TIME):
            rows = self._get(ids[start : start + ROWS_AT_A_TIME], ["*"])
            self._upsert([dict(row) | {"metadata": content[row["id"]]} for row in rows])

    @property
    def unreadable(self) -> list[dict[str, str]]:
        name = f"{self.collection}_info"
        rows = self.client.query(name, filter='id != "info"', output_fields=["content"], limit=MAX_FOUND)
        return sorted((row["content"] for row in rows), key=lambda bad: bad["id"])

    def set_unreadable(self, unreadable: list[dict[str, str]]) -> None:
        name = f"{self.collection}_info"
        self.client.delete(name, filter='id != "info"')
        for start in range(0, len(unreadable), ROWS_AT_A_TIME):
            numbered = enumerate(unreadable[start : start + ROWS_AT_A_TIME], start)
            self.client.upsert(name, [{"id": f"bad {i}", "content": bad, "unused": [0.0, 0.0]} for i, bad in numbered])

    def rebuild_index(self) -> None:
        """Milvus keeps its own."""


def condition(column: str, given) -> str:
    """A condition of [`Gallery.search`] in Milvus's language, every value quoted."""
    operator, value = given if isinstance(given, tuple) and len(given) == 2 else ("=", given)
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; known are {' '.join(OPERATORS)}")
    field = f"metadata[{json.dumps(column)}]"
    if isinstance(value, (list, set)):
        return "(" + " or ".join(f"{field} == {json.dumps(v)}" for v in value) + ")"
    return f"{field} {'==' if operator == '=' else operator} {json.dumps(value)}"


def connect(address: str):
    """A client. Raises `GalleryError` if pymilvus is missing or the server does not answer."""
    try:
        from pymilvus import MilvusClient, MilvusException
    except ImportError as error:
        raise GalleryError("this needs pymilvus: pip install 'tscir[milvus]'") from error
    try:
        return MilvusClient(address, timeout=20)
    except (MilvusException, OSError, ValueError) as error:
        raise GalleryError(f"{address} cannot be opened: {error}") from error


def open_gallery(name: str | os.PathLike) -> Gallery | MilvusGallery:
    """A gallery by its folder or by its address on Milvus."""
    return MilvusGallery(os.fspath(name)) if is_milvus(name) else Gallery(name)
