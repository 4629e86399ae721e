"""A gallery on disk: pictures' embeddings with ids, paths and metadata, searched exactly or through a FAISS index.

    G/gallery.json                  what the embeddings were made by, and how they are stored
    G/shards/000000/rows.arrow      ids, paths and contents of some thousand pictures; `datasets` reads it
    G/shards/000000/embeds.safetensors
    G/metadata.arrow                further columns, where there are any
    G/unreadable.json               what the last indexing could not use, and why
    G/faiss.index                   where one was asked for

A shard is written aside and moved into place whole, and rewritten under a new name (000000-1) before the old one goes,
so that a gallery is valid after any interruption. Where two rows have one id the later one holds.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from .backbone import backbone_fingerprint
from .feature_cache import MADE_BY, digest, preprocessing_of
from .images import load_image


logger = logging.get_logger(__name__)
FORMAT = 1
DTYPES = {"float16": torch.float16, "float32": torch.float32}
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "path": pa.binary(),  # a file's name need not be text
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "content": pa.string(),
        "picture": pa.large_binary(),  # encoded, where there is no file to go back to
    }
)
OPERATORS = {
    "=": lambda column, value: column == value,
    "!=": lambda column, value: column.notna() & (column != value),
    "<": lambda column, value: column < value,
    "<=": lambda column, value: column <= value,
    ">": lambda column, value: column > value,
    ">=": lambda column, value: column >= value,
    "in": lambda column, values: column.isin(list(values)),
}
QUERIES_AT_A_TIME = 64
Where = Mapping[str, object]


class GalleryError(ValueError):
    """A gallery cannot be read, written or used with this model; the message says what to do."""


def fingerprint_of(model, processor) -> dict[str, str]:
    """What must agree for embeddings to be comparable. Mapper and composing adapters do not count: a picture's
    embedding is frozen CLIP's own."""
    return {
        "backbone": model.config.backbone_fingerprint or backbone_fingerprint(model.clip),
        "preprocessing": digest(preprocessing_of(processor)),
        "embedding_code": str(MADE_BY[0]),
    }


class Gallery:
    """Embeddings of pictures, with what tells them apart, in a folder.

    ```python
    >>> from modeling_tscir import Gallery, TSCIRModel, TSCIRProcessor

    >>> model = TSCIRModel.from_pretrained("path/to/folder")  # doctest: +SKIP
    >>> processor = TSCIRProcessor.from_pretrained("path/to/folder")  # doctest: +SKIP
    >>> gallery = Gallery.from_folder("photos", "photos.gallery", model, processor)  # doctest: +SKIP
    >>> gallery.search(query_embeds, top_k=5, where={"category": "dress", "price": ("<", 50)})  # doctest: +SKIP
    [[{"score": 0.31, "id": "dresses/1042.jpg", "path": "/data/photos/dresses/1042.jpg", ...}, ...]]

    ```

    Args:
        folder: an existing gallery; [`~Gallery.load`] also checks it against a model.

    Raises:
        GalleryError: if the folder holds no gallery, or one that is damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / "gallery.json"
        try:
            self.info: dict = json.loads(path.read_text(encoding="utf-8"))
            if self.info["format"] != FORMAT:
                raise GalleryError(f"{path} has format {self.info['format']}; this package reads {FORMAT}")
        except FileNotFoundError as error:
            remedy = f"make one with: tscir index PHOTOS --output {folder}"
            raise GalleryError(f"{folder} holds no gallery; {remedy}") from error
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise GalleryError(f"{path} cannot be read ({error}); index the pictures into another folder") from error
        self.reload()

    # ----- making, loading, saving

    @classmethod
    def create(cls, folder: str | os.PathLike, model, processor, dtype: str = "float16") -> "Gallery":
        """An empty gallery for embeddings of a model's frozen CLIP.

        Args:
            folder: new, or empty.
            dtype (`str`): "float16" or "float32", as stored; scores are computed in fp32.

        Raises:
            GalleryError: if the folder holds something already.
        """
        from . import __version__

        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(p.name != ".lock" for p in folder.iterdir())):
            raise GalleryError(f"{folder} is there already and holds no gallery; name a new folder")
        if dtype not in DTYPES:
            raise GalleryError(f"dtype must be one of {list(DTYPES)}, not {dtype!r}")
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        info = {
            "format": FORMAT,
            "fingerprint": fingerprint_of(model, processor),
            "dimensions": model.config.clip_config.projection_dim,
            "dtype": dtype,
            "backbone": model.config.backbone_name_or_path or str(model.name_or_path),
            "tscir_version": __version__,
        }
        write_json(folder / "gallery.json", info)
        return cls(folder)

    @classmethod
    def from_folder(
        cls, images: str | os.PathLike, folder: str | os.PathLike, model, processor, dtype: str = "float16", **options
    ) -> "Gallery":
        """The gallery in `folder`, made if need be, brought up to date with the pictures in `images` and below.

        Interrupted, it goes on from the last whole shard when called again. Options are those of [`~Gallery.add`].
        """
        gallery = cls.open_or_create(folder, model, processor, dtype)
        gallery.add(images, model, processor, **options)
        return gallery

    @classmethod
    def open_or_create(cls, folder: str | os.PathLike, model, processor, dtype: str = "float16") -> "Gallery":
        from .indexing import Processes

        def create_if_missing() -> None:
            if not (Path(folder) / "gallery.json").is_file():
                cls.create(folder, model, processor, dtype)

        Processes().same(create_if_missing)
        return cls.load(folder, model, processor)

    @classmethod
    def load(cls, folder: str | os.PathLike, model=None, processor=None) -> "Gallery":
        """Open a gallery; with model and processor, make sure that its embeddings are theirs.

        Raises:
            GalleryError: if it is missing, damaged, or of another backbone or preprocessing.
        """
        gallery = cls(folder)
        if model is not None:
            gallery.check(model, processor)
        return gallery

    def check(self, model, processor) -> None:
        """Raise `GalleryError` unless the gallery's embeddings are comparable with what this model would make."""
        mine, theirs = self.info["fingerprint"], fingerprint_of(model, processor)
        differing = [name for name in theirs if mine.get(name) != theirs[name]]
        if differing:
            raise GalleryError(
                f"{self.folder} was made with another {' and '.join(differing).replace('_', ' ')} (of "
                f"{self.info['backbone']}) than this model has; index the pictures again into a new folder, or search "
                "with the model it was made with"
            )

    def save(self, folder: str | os.PathLike) -> "Gallery":
        """Copy the gallery, without the index, to a new folder. Raises `GalleryError` if that is not empty."""
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise GalleryError(f"{folder} is not empty; name a new folder")
        shutil.copytree(
            self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock", "*.part", "faiss.index")
        )
        copy = Gallery(folder)
        copy.drop_index()
        return copy

    def add(self, images, model, processor, **options):
        """Embed new and changed pictures, forget those that are gone; see [`indexing.add_images`] for the options.

        Returns:
            An [`indexing.Report`] of what was done and what could not be used.
        """
        from .indexing import add_images

        self.check(model, processor)
        return add_images(self, images, model, processor, **options)

    def remove(self, ids: Sequence[str]) -> None:
        """Forget pictures; their files are not touched. Raises `KeyError` with the ids that are not there."""
        with self.locked():
            unknown = [i for i in ids if i not in self.row_of]
            if unknown:
                raise KeyError(f"{self.folder} holds no {', '.join(map(repr, unknown[:5]))} ({len(unknown)} unknown)")
            self.forget(set(ids))
            self.set_metadata()
            self.rebuild_index()

    # ----- rows

    def reload(self) -> None:
        """Read what the folder holds now."""
        for attempt in range(5):
            self.shards = self._newest_shards()
            try:
                read = [read_shard(path) for path in self.shards]
                break
            except GalleryError:
                # Another process may have replaced a shard since its name was read.
                if attempt == 4 or all(path.is_dir() for path in self.shards):
                    raise
        tables, self.embeds = [table for table, _ in read], [embeds for _, embeds in read]
        for path, (table, embeds) in zip(self.shards, read, strict=True):
            if embeds.shape != (len(table), self.info["dimensions"]):
                raise GalleryError(f"{path}: {len(table)} rows, but embeddings {tuple(embeds.shape)}; {REMEDY}")
        self.table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        ids = self.table["id"].to_pylist()
        self.row_of = {name: row for row, name in enumerate(ids)}  # of equal ids the last
        self.live = np.zeros(len(ids), dtype=bool)
        self.live[list(self.row_of.values())] = True
        contents = self.table["content"].combine_chunks().dictionary_encode()
        self.content = np.asarray(contents.indices) if len(ids) else np.empty(0, dtype=np.int32)
        self._metadata = None
        self._index = None
        self._everything = None

    def __contains__(self, name: str) -> bool:
        return name in self.row_of

    def __str__(self) -> str:
        return str(self.folder)

    def known(self) -> dict[str, tuple[bytes | None, int, int]]:
        """Path, size in bytes and time of change in nanoseconds of each id's file."""
        columns = (self.table[name].to_pylist() for name in ("path", "size", "mtime_ns"))
        rows = list(zip(*columns, strict=True))
        return {name: rows[row] for name, row in self.row_of.items()}

    def __len__(self) -> int:
        return int(self.live.sum())

    @property
    def ids(self) -> list[str]:
        """Ids of the pictures, in the gallery's order."""
        names = self.table["id"]
        return [names[row].as_py() for row in np.flatnonzero(self.live)]

    @property
    def metadata(self):
        """Further columns, a `pandas.DataFrame` by id; without columns where the gallery has none."""
        import pandas as pd

        if self._metadata is None:
            path = self.folder / "metadata.arrow"
            if path.is_file():
                with pa.memory_map(str(path)) as source:
                    self._metadata = pa.ipc.open_stream(source).read_all().to_pandas().set_index("id")
            else:
                self._metadata = pd.DataFrame(index=pd.Index([], name="id"))
        return self._metadata

    def set_metadata(self, frame=None) -> None:
        """Replace the metadata of the ids in `frame` (a `pandas.DataFrame` by id); keep that of other pictures."""
        import pandas as pd

        merged = self.metadata
        if frame is not None:
            kept = merged[~merged.index.isin(frame.index)]
            merged = pd.concat([kept, frame]) if len(kept) else frame
        merged = merged[merged.index.isin(self.row_of.keys())]
        if not len(merged.columns):
            return
        table = pa.Table.from_pandas(merged.rename_axis("id").reset_index(), preserve_index=False)
        write_stream(table, self.folder / "metadata.arrow")
        self._metadata = None

    def dataset(self):
        """The gallery as a `datasets.Dataset`: id, path, content, the metadata, and "embedding"."""
        import datasets

        rows = np.flatnonzero(self.live)
        columns = {
            "id": self.ids,
            "path": [self.path(row) for row in rows],
            "content": self.table["content"].take(rows).to_pylist(),
        }
        metadata = self.metadata.reindex(columns["id"]).to_dict("list")
        table = pa.table(columns | metadata)
        embeds = self.vectors(rows).float().numpy()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeds.reshape(-1)), self.info["dimensions"])
        return datasets.Dataset(table.append_column("embedding", vectors))

    def to_parquet(self, path: str | os.PathLike) -> None:
        """Write everything to one Parquet file that other engines read, a shard at a time: id, path, size, mtime_ns,
        content, picture, the metadata's columns, and "embedding", a list of fp32 numbers of length 1."""
        import pyarrow.parquet as pq

        part = Path(f"{path}.part")
        writer, start = None, 0
        kept = {k: self.info[k] for k in ("fingerprint", "dimensions", "dtype", "backbone", "model") if k in self.info}
        for embeds in self.embeds:
            rows = np.flatnonzero(self.live[start : start + len(embeds)])
            table = self.table.slice(start, len(embeds)).take(rows)
            more = pa.Table.from_pandas(self.metadata.reindex(table["id"].to_pylist()), preserve_index=False)
            for name in more.column_names:
                table = table.append_column(name, more[name])
            values = pa.array(embeds[torch.from_numpy(rows)].float().numpy().reshape(-1))
            table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(values, embeds.shape[1]))
            if writer is None:
                schema = table.schema.with_metadata({"tscir": json.dumps(kept)})
                writer = pq.ParquetWriter(part, schema)
            writer.write_table(table.cast(schema))
            start += len(embeds)
        if writer is None:
            raise GalleryError(f"{self.folder} is empty")
        writer.close()
        os.replace(part, path)

    @classmethod
    def from_parquet(cls, path: str | os.PathLike, folder: str | os.PathLike) -> "Gallery":
        """A gallery in a new folder from what `to_parquet` wrote.

        Raises:
            GalleryError: if the file is no such file, or the folder is not new.
        """
        import pyarrow.parquet as pq

        from . import __version__

        try:
            file = pq.ParquetFile(path)
            kept = json.loads(file.schema_arrow.metadata[b"tscir"])
        except (OSError, KeyError, TypeError, pa.ArrowInvalid) as error:
            raise GalleryError(f"{path} is no Parquet file of a gallery's: {error!r}") from error
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise GalleryError(f"{folder} is not empty; name a new folder")
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            values = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
            embeds = torch.from_numpy(values.copy()).to(DTYPES[kept["dtype"]])
            write_shard(folder / "shards" / f"{number:06d}", table.select(SCHEMA.names).cast(SCHEMA), embeds)
        write_json(folder / "gallery.json", {"format": FORMAT, **kept, "tscir_version": __version__})
        gallery = cls(folder)
        others = [name for name in file.schema_arrow.names if name not in (*SCHEMA.names, "embedding")]
        if others:
            gallery.set_metadata(file.read(["id", *others]).to_pandas().set_index("id"))
        return gallery

    def vectors(self, rows: np.ndarray) -> torch.Tensor:
        """Embeddings [n, D] of rows, as stored."""
        starts = np.cumsum([0, *map(len, self.embeds)])
        out = torch.empty(len(rows), self.info["dimensions"], dtype=DTYPES[self.info["dtype"]])
        shard = np.searchsorted(starts, rows, side="right") - 1
        for number in np.unique(shard):
            places = np.flatnonzero(shard == number)
            out[torch.from_numpy(places)] = self.embeds[number][torch.from_numpy(rows[places] - starts[number])]
        return out

    def path(self, row: int) -> str | None:
        stored = self.table["path"][int(row)].as_py()
        return None if stored is None else os.fsdecode(stored)

    def picture(self, name: str):
        """The picture of an id, a PIL image. Raises `ValueError` if its file is gone or broken by now."""
        return load_image(self.source(name))

    def source(self, name: str) -> str | bytes:
        """Where the picture of an id is: its file's path, or its encoded bytes. Raises `KeyError` for unknown ids."""
        row = self.row_of[name]
        path = self.path(row)
        return self.table["picture"][row].as_py() if path is None else path

    def set_unreadable(self, unreadable: list[dict[str, str]]) -> None:
        write_json(self.folder / "unreadable.json", unreadable)

    @property
    def unreadable(self) -> list[dict[str, str]]:
        """{"id", "reason"} of what the last indexing could not use."""
        path = self.folder / "unreadable.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def duplicates(self) -> list[list[str]]:
        """Groups of ids whose files have the same bytes."""
        rows = np.flatnonzero(self.live)
        order = rows[np.argsort(self.content[rows], kind="stable")]
        groups = np.split(order, np.flatnonzero(np.diff(self.content[order])) + 1) if len(order) else []
        names = self.table["id"]
        return [[names[int(row)].as_py() for row in group] for group in groups if len(group) > 1]

    # ----- search

    def search(
        self,
        queries: torch.Tensor,
        top_k: int = 10,
        where: Where | None = None,
        exclude: Sequence[str] = (),
        exact: bool = False,
    ) -> list[list[dict]]:
        """The most similar pictures for each query, best first.

        Args:
            queries (`torch.Tensor` [Q, D]): L2-normalised embeddings, as `TSCIRModel.get_composed_features` gives.
            top_k (`int`): how many.
            where: conditions on metadata columns, all of which must hold: {column: value}, {column: [value, ...]} or
                {column: (operator, value)} with =, !=, <, <=, >, >=. A picture without a value meets none.
            exclude: ids that are not wanted, such as the reference's own; pictures of the same bytes go with them.
            exact (`bool`): leave a FAISS index aside.

        Returns:
            For each query a list of {"score", "id", "path", "duplicates", "metadata"}. Of pictures with the same bytes
            the first is given and the others are named in its "duplicates". Scores are cosine similarities.

        Raises:
            ValueError: for queries of another size or that are not finite, and for unknown columns and operators.
        """
        if queries.ndim != 2 or queries.shape[1] != self.info["dimensions"]:
            raise ValueError(f"queries are {tuple(queries.shape)}; this gallery wants [Q, {self.info['dimensions']}]")
        if top_k < 1 or not torch.isfinite(queries).all():
            raise ValueError("top_k must be at least 1, and queries hold no NaN or infinite values")
        first, others = self._wanted(where)
        hidden = [self.content[self.row_of[name]] for name in exclude if name in self.row_of]
        if hidden:
            first = first & ~np.isin(self.content, hidden)
        queries = queries.float().cpu()
        index = None if exact or where else self._faiss()
        if index is None:
            scores, rows = self._search_exactly(queries, min(top_k, int(first.sum())), first)
        else:
            scores, rows = self._search_index(index, queries, top_k, first)
        names, columns = self.table["id"], self.metadata
        results = []
        for row_scores, found in zip(scores.tolist(), rows.tolist(), strict=True):
            results.append([])
            for score, row in zip(row_scores, found, strict=True):
                if row < 0 or score == -np.inf:
                    continue
                name = names[row].as_py()
                more = columns.loc[name].to_dict() if name in columns.index else {}
                same = others.get(int(self.content[row]), [])
                results[-1].append(
                    {
                        "score": score,
                        "id": name,
                        "path": self.path(row),
                        "duplicates": [names[int(r)].as_py() for r in same if r != row],
                        "metadata": more,
                    }
                )
        return results

    def _wanted(self, where: Where | None) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Which rows take part, the first of each content, and all rows of those contents that several have."""
        if not where and self._everything is not None:
            return self._everything
        allowed = self.live
        if where:
            allowed = np.zeros(len(self.live), dtype=bool)
            allowed[[self.row_of[name] for name in self._matching(where)]] = True
        rows = np.flatnonzero(allowed)
        _, firsts, counts = np.unique(self.content[rows], return_index=True, return_counts=True)
        first = np.zeros(len(allowed), dtype=bool)
        first[rows[firsts]] = True
        several = set(self.content[rows[firsts[counts > 1]]].tolist())
        others = {}
        for row in rows[np.isin(self.content[rows], list(several))] if several else []:
            others.setdefault(int(self.content[row]), []).append(row)
        if not where:
            self._everything = first, others
        return first, others

    def _matching(self, where: Where) -> list[str]:
        columns = self.metadata
        chosen = np.ones(len(columns), dtype=bool)
        for column, condition in where.items():
            if column not in columns.columns:
                known = ", ".join(columns.columns) or "none"
                raise ValueError(f"no column {column!r} in {self.folder}; it has {known}")
            operator, value = condition if isinstance(condition, tuple) and len(condition) == 2 else ("=", condition)
            if isinstance(value, (list, set)):
                operator = "in"
            if operator not in OPERATORS:
                raise ValueError(f"unknown operator {operator!r}; known are {' '.join(OPERATORS)}")
            try:
                chosen &= OPERATORS[operator](columns[column], value).fillna(False).to_numpy(dtype=bool)
            except TypeError as error:
                raise ValueError(f"column {column!r} cannot be compared with {value!r}: {error}") from error
        return [name for name in columns.index[chosen] if name in self.row_of]

    def _search_exactly(self, queries: torch.Tensor, k: int, wanted: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and rows [Q, k]; shard by shard, so that memory holds one shard in fp32 beside the best so far."""
        found = [
            self._best_of_shards(queries[start : start + QUERIES_AT_A_TIME], k, wanted)
            for start in range(0, len(queries), QUERIES_AT_A_TIME)
        ]
        if not found or k == 0:
            return torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
        scores, rows = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(rows)

    def _best_of_shards(self, queries: torch.Tensor, k: int, wanted: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = None if wanted.all() else torch.from_numpy(~wanted)
        scores = torch.empty(len(queries), len(wanted))
        start = 0
        for embeds in self.embeds:
            end = start + len(embeds)
            scores[:, start:end] = queries @ embeds.float().T
            start = end
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        return best(scores, k)

    # ----- FAISS

    def build_index(self, factory: str, num_queries: int = 256, k: int = 10) -> dict:
        """Build a FAISS index by its factory string ("IVF4096,PQ64", "HNSW32", ...) and measure it.

        Returns:
            {"factory", "rows", "recall_at_10", "queries"}: the share of the exact ten best that the index finds, for
            queries halfway between two pictures, as composed queries lie. It is also kept in gallery.json.

        Raises:
            GalleryError: if FAISS is not installed, does not know the string, or has too few pictures to train it.
        """
        faiss = import_faiss()
        size = self.info["dimensions"]
        try:
            index = faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise GalleryError(f"FAISS does not understand {factory!r} for {size} dimensions: {error}") from error
        rng = np.random.default_rng(0)
        rows = np.flatnonzero(self.live)
        if not len(rows):
            raise GalleryError(f"{self.folder} is empty; index some pictures first")
        if not index.is_trained:
            sample = np.sort(rng.choice(rows, min(len(rows), 200_000), replace=False))
            try:
                index.train(self.vectors(sample).float().numpy())
            except RuntimeError as error:
                raise GalleryError(
                    f"{len(rows)} pictures do not train a {factory} index ({str(error).splitlines()[-1]}); choose "
                    "fewer cells, or leave the index out: exact search is fast up to millions"
                ) from error
        for embeds in self.embeds:
            index.add(embeds.float().numpy())  # dead rows, too, so that FAISS numbers them as we do
        pairs = rng.choice(rows, (num_queries, 2))
        queries = torch.nn.functional.normalize(
            self.vectors(pairs[:, 0]).float() + self.vectors(pairs[:, 1]).float(), dim=-1
        )
        wanted = self._wanted(None)[0]
        k = min(k, int(wanted.sum()))
        _, exact = self._search_exactly(queries, k, wanted)
        self.info["index"] = {"factory": factory, "rows": len(self.live), "shards": [p.name for p in self.shards]}
        _, found = self._search_index(index, queries, k, wanted)
        hits = [len(set(a) & set(b)) / k for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
        self.info["index"] |= {"recall_at_10": float(np.mean(hits)), "queries": num_queries}
        part = self.folder / "faiss.part"
        faiss.write_index(index, str(part))
        os.replace(part, self.folder / "faiss.index")
        write_json(self.folder / "gallery.json", self.info)
        self._index = index
        return self.info["index"]

    def drop_index(self) -> None:
        """Search exactly from now on."""
        if self.info.pop("index", None) is not None:
            write_json(self.folder / "gallery.json", self.info)
            (self.folder / "faiss.index").unlink(missing_ok=True)

    def rebuild_index(self) -> None:
        """Build the index anew, if there is one, after pictures came or went."""
        if "index" in self.info:
            self.build_index(self.info["index"]["factory"])

    def _faiss(self):
        if "index" not in self.info:
            return None
        known = self.info["index"]["shards"], self.info["index"]["rows"]
        if known != ([path.name for path in self.shards], len(self.live)):
            logger.warning_once(f"{self.folder}: its index is older than its pictures; searching exactly")
            return None
        if self._index is None:
            try:
                self._index = import_faiss().read_index(str(self.folder / "faiss.index"))
            except RuntimeError as error:
                logger.warning_once(f"{self.folder}: its index cannot be read ({error}); searching exactly")
        return self._index

    def _search_index(self, index, queries: torch.Tensor, k: int, wanted: np.ndarray):
        """As `_search_exactly`; asks for more where rows that do not take part were among the best."""
        faiss = import_faiss()
        with contextlib.suppress(RuntimeError):  # an index without cells has nothing to probe
            cells = faiss.extract_index_ivf(index)
            cells.nprobe = min(cells.nlist, max(8, cells.nlist // 32))
        asked = min(len(wanted), k if wanted.all() else 4 * k + 100)
        scores, rows = index.search(queries.numpy(), asked)
        unwanted = (rows < 0) | ~wanted[rows]
        scores = torch.from_numpy(np.where(unwanted, -np.inf, scores))
        scores, places = best(scores, min(k, scores.shape[1]))
        rows = torch.from_numpy(rows).gather(1, places)
        # The index's own scores are of compressed vectors.
        exact = torch.einsum(
            "qkd,qd->qk", self.vectors(rows.clamp(min=0).reshape(-1).numpy()).float().view(*rows.shape, -1), queries
        )
        exact.masked_fill_(scores == -torch.inf, -torch.inf)
        order = exact.argsort(dim=1, descending=True, stable=True)
        return exact.gather(1, order), rows.gather(1, order)

    # ----- writing

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second writer out, and begins with what the last one left. Raises `GalleryError` if there is one."""
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with open(self.folder / ".lock", "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise GalleryError(f"{self.folder} is being written by another process; wait for it to end") from error
            kept = set(self._newest_shards())
            for path in (self.folder / "shards").iterdir():
                if path not in kept:  # left by a process that died
                    shutil.rmtree(path)
            self.info = json.loads((self.folder / "gallery.json").read_text(encoding="utf-8"))
            self.reload()
            yield

    def next_shard(self) -> int:
        return 1 + max((place_of(path)[0] for path in self.shards), default=-1)

    def remember(self, **entries) -> None:
        """Keep further entries in `info`."""
        self.info |= entries
        write_json(self.folder / "gallery.json", self.info)

    def write_rows(self, number: int, rows: list[dict], embeds: torch.Tensor) -> None:
        """Keep a shard of rows, read back by `reload`. Raises `GalleryError` if the disk does not take it."""
        write_shard(self.folder / "shards" / f"{number:06d}", pa.Table.from_pylist(rows, SCHEMA), embeds)

    def forget(self, ids: set[str]) -> None:
        """Rewrite the shards that hold dead rows, or rows of `ids`, without them."""
        if not ids and self.live.all():
            return
        for name in ids:
            self.live[self.row_of[name]] = False
        start = 0
        for path, embeds in zip(self.shards, self.embeds, strict=True):
            end = start + len(embeds)
            live = self.live[start:end]
            if not live.all():
                rows = np.flatnonzero(live)
                number, version = place_of(path)
                if len(rows):
                    table = self.table.slice(start, len(embeds)).take(rows)
                    newer = path.with_name(f"{number:06d}-{version + 1}")
                    write_shard(newer, table, embeds[torch.from_numpy(rows)])
                discard(path)
            start = end
        self.reload()

    def _newest_shards(self) -> list[Path]:
        """The newest version of each shard, in order."""
        newest: dict[int, Path] = {}
        found = [path for path in (self.folder / "shards").iterdir() if SHARD_NAME.fullmatch(path.name)]
        for path in sorted(found, key=place_of):
            newest[place_of(path)[0]] = path
        return list(newest.values())


SHARD_NAME = re.compile(r"(\d{6,})(?:-(\d+))?")
REMEDY = "index the pictures again into another folder, or remove this shard's folder and index again"


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


def import_faiss():
    try:
        import faiss
    except ImportError as error:
        raise GalleryError("this needs FAISS: pip install 'tscir[faiss]'") from error
    return faiss


def place_of(shard: Path) -> tuple[int, int]:
    """A shard's number, and how often it was rewritten."""
    number, version = SHARD_NAME.fullmatch(shard.name).groups(default="0")
    return int(number), int(version)


def discard(shard: Path) -> None:
    """Remove a shard; a process that dies over it leaves no half of one under its name."""
    aside = shard.with_suffix(".gone")
    shard.rename(aside)
    shutil.rmtree(aside)


def read_shard(path: Path) -> tuple[pa.Table, torch.Tensor]:
    """Rows and embeddings [n, D] of a shard, both mapped from disk rather than read."""
    try:
        with pa.memory_map(str(path / "rows.arrow")) as source:
            table = pa.ipc.open_stream(source).read_all()
        if table.schema != SCHEMA:
            raise GalleryError(f"{path / 'rows.arrow'} has columns {table.schema.names}; {REMEDY}")
        return table, load_file(path / "embeds.safetensors")["embeds"]
    except (OSError, KeyError, pa.ArrowInvalid, SafetensorError) as error:
        raise GalleryError(f"{path} cannot be read ({error}); {REMEDY}") from error


def write_shard(path: Path, table: pa.Table, embeds: torch.Tensor) -> None:
    """Write a shard aside and move it into place. Raises `GalleryError` if the disk does not take it."""
    part = path.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        write_stream(table, part / "rows.arrow")
        save_file({"embeds": embeds.contiguous()}, part / "embeds.safetensors")
        part.rename(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise GalleryError(
            f"{path} cannot be written ({error}); what was indexed before is kept. Make room and run the same again."
        ) from error


def write_stream(table: pa.Table, path: Path) -> None:
    """An Arrow stream, as `datasets.Dataset.from_file` reads it; never half a file under its name."""
    part = path.with_name(path.name + ".part")
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(part, path)


def write_json(path: Path, content) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=True), encoding="utf-8")
    os.replace(part, path)
