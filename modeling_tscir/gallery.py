"""A gallery on disk: pictures' embeddings with ids, paths and metadata, searched exactly or through a FAISS index.

    G/gallery.json                  what the embeddings were made by, and how they are stored
    G/shards/000000/rows.arrow      ids, paths and contents of some thousand pictures; `datasets` reads it
    G/shards/000000/embeds.safetensors
    G/metadata.arrow                further columns, where there are any
    G/unreadable.json               what the last indexing could not use, and why
    G/faiss-TOKEN.index             where one was asked for

A shard is written aside and moved into place whole, and rewritten under a new name (000000-1) before the old one goes,
so that a gallery is valid after any interruption. Where two rows have one id the later one holds.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from transformers.utils import logging

from .backbone import backbone_fingerprint
from .feature_cache import MADE_BY, architecture_of, digest, preprocessing_of
from .files import File
from .gallery_index import IndexMixin
from .gallery_rows import Rows
from .gallery_search import SearchMixin
from .gallery_writing import WritingMixin
from .images import load_image
from .metadata import from_arrow, kinds_of
from .shards import (
    SCHEMA,
    GalleryError,
    newest_shards,
    read_shard,
    read_stream,
    write_json,
)


logger = logging.get_logger(__name__)
FORMAT = 1
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def fingerprint_of(model, processor) -> dict[str, str]:
    """What must agree for embeddings to be comparable. Mapper and composing adapters do not count: a picture's
    embedding is frozen CLIP's own."""
    return {
        "backbone": model.config.backbone_fingerprint or backbone_fingerprint(model.clip),
        "architecture": digest(architecture_of(model)),
        "preprocessing": digest(preprocessing_of(processor)),
        "embedding_code": str(MADE_BY[0]),
    }


class Gallery(SearchMixin, WritingMixin, IndexMixin):
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
        self.folder = Path(os.path.abspath(folder))
        self._writer: int | None = None  # the thread that holds the lock
        path = self.folder / "gallery.json"
        try:
            self.info: dict = json.loads(path.read_text(encoding="utf-8"))
            if self.info["format"] != FORMAT:
                raise GalleryError(f"{path} has format {self.info['format']}; this package reads {FORMAT}")
            self.info["fingerprint"], self.info["dimensions"], DTYPES[self.info["dtype"]]
        except FileNotFoundError as error:
            of_pictures = self.folder.is_dir() and any(self.folder.iterdir())
            place = f"{folder} --output {folder}.gallery" if of_pictures else f"PHOTOS --output {folder}"
            remedy = f"make one with: tscir index {place}"
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
        begun = {".lock", "gallery.json.part", "shards"}  # what an interruption leaves here
        if folder.exists() and not (
            folder.is_dir()
            and begun.issuperset(path.name for path in folder.iterdir())
            and not any((folder / "shards").glob("*"))
        ):
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
        cls,
        images: str | os.PathLike,
        folder: str | os.PathLike,
        model,
        processor,
        dtype: str | None = None,
        **options,
    ) -> "Gallery":
        """The gallery in `folder`, made if need be, brought up to date with the pictures in `images` and below.

        Interrupted, it goes on from the last whole shard when called again. `dtype` is [`~Gallery.open_or_create`]'s,
        options are those of [`~Gallery.add`].
        """
        if not os.path.isdir(images):
            raise GalleryError(f"{images} is not a folder")
        gallery = cls.open_or_create(folder, model, processor, dtype)
        gallery.add(images, model, processor, **options)
        return gallery

    @classmethod
    def open_or_create(cls, folder: str | os.PathLike, model, processor, dtype: str | None = None) -> "Gallery":
        """The gallery in `folder`, checked against the model, or an empty one, whose embeddings are stored in `dtype`,
        float16 unless told.

        Raises:
            GalleryError: as [`~Gallery.load`] does, and for a gallery that stores its embeddings in another `dtype`.
        """
        from .indexing import Processes

        def create_if_missing() -> None:
            made = Path(folder) / "gallery.json"
            if not made.is_file():
                try:
                    cls.create(folder, model, processor, dtype or "float16")
                except (GalleryError, FileNotFoundError):
                    if not made.is_file():  # else another process made it meanwhile
                        raise

        Processes().same(create_if_missing)
        gallery = cls.load(folder, model, processor)
        if dtype not in (None, gallery.info["dtype"]):
            raise GalleryError(f"{folder} stores {gallery.info['dtype']}, not {dtype}; name a new one")
        return gallery

    @classmethod
    def load(cls, folder: str | os.PathLike, model=None, processor=None) -> "Gallery":
        """Open a gallery; with model and processor, make sure that its embeddings are theirs.

        Raises:
            GalleryError: if it is missing, damaged, or of another backbone or preprocessing.
            ValueError: for a model without its processor.
        """
        if (model is None) != (processor is None):
            raise ValueError("a gallery is checked against a model and its processor: give both, or neither")
        gallery = cls(folder)
        if model is not None:
            gallery.check(model, processor)
        return gallery

    def check(self, model, processor) -> None:
        """Raise `GalleryError` unless the gallery's embeddings are comparable with what this model would make."""
        theirs = fingerprint_of(model, processor)
        mine = {"architecture": theirs["architecture"], **self.info["fingerprint"]}  # older galleries do not tell it
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
        later = "gallery.json"  # last, so that a copy that is interrupted is no gallery of fewer pictures
        unneeded = shutil.ignore_patterns(".lock", "*.part", "*.gone", "faiss-*", later)
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=unneeded)
        shutil.copy2(self.folder / later, folder / later)
        copy = Gallery(folder)
        copy.drop_index()
        return copy

    def add(self, images, model, processor, **options):
        """Embed new and changed pictures, forget those that are gone; see [`indexing.add_images`] for the options.

        Returns:
            An [`indexing_plan.Report`] of what was done and what could not be used.
        """
        from .indexing import add_images

        self.check(model, processor)
        return add_images(self, images, model, processor, **options)

    def remove(self, ids: Sequence[str]) -> None:
        """Forget pictures; their files are not touched, and indexing their folder again brings them back.

        Raises:
            KeyError: with the ids that are not there.
            ValueError: for a single text, whose letters may be ids.
        """
        if isinstance(ids, str):
            raise ValueError(f"remove takes a list of ids, not {ids!r}")
        with self.locked():
            ids = list(ids)
            unknown = self.unknown(ids)
            if unknown:
                raise KeyError(f"{self.folder} holds no {', '.join(map(repr, unknown[:5]))} ({len(unknown)} unknown)")
            self.forget(set(ids))
            self.set_metadata()
            self.rebuild_index()

    # ----- rows

    def reload(self) -> None:
        """Read what the folder holds now."""
        for attempt in range(5):
            shards = newest_shards(self.folder / "shards")
            try:
                read = [read_shard(path) for path in shards]
                break
            except GalleryError:
                # Another process may have replaced a shard since its name was read.
                if attempt == 4 or all(path.is_dir() for path in shards):
                    raise
        for path, (table, embeds) in zip(shards, read, strict=True):
            if embeds.shape != (len(table), self.info["dimensions"]):
                raise GalleryError(f"{path} has {len(table)} rows, but embeddings {tuple(embeds.shape)}; remove it")
        table = pa.concat_tables([table for table, _ in read]) if read else SCHEMA.empty_table()
        rows = Rows(table)  # of many it takes a while, in which other threads search what was there before
        self.shards, self.embeds, self.table, self.rows = shards, [embeds for _, embeds in read], table, rows
        self._metadata = self._index = self._everything = None

    def __contains__(self, name: str) -> bool:
        return self.row(name) is not None

    def __str__(self) -> str:
        return str(self.folder)

    def row(self, name: str) -> int | None:
        """The row of an id, None for an unknown one."""
        row = int(self.rows.of([name])[0])
        return None if row < 0 else row

    def unknown(self, ids: Sequence[str]) -> list[str]:
        """Those of some ids that are not there."""
        return [name for name, row in zip(ids, self.rows.of(ids), strict=True) if row < 0]

    def files(self) -> Iterator[File]:
        """Each row's file, shard by shard; of equal ids the last holds."""
        for batch in self.table.select(list(File._fields)).to_batches():
            yield from map(File._make, zip(*(batch.column(name).to_pylist() for name in File._fields), strict=True))

    def content(self, name: str) -> str | None:
        """The digest of an id's picture, None for an unknown id."""
        row = self.row(name)
        return None if row is None else self.table["content"][row].as_py()

    def __len__(self) -> int:
        return int(self.rows.live.sum())

    @property
    def ids(self) -> list[str]:
        """Ids of the pictures, in the gallery's order."""
        return self.table["id"].take(np.flatnonzero(self.rows.live)).to_pylist()

    @property
    def metadata(self) -> pd.DataFrame:
        """Further columns by id; without columns where the gallery has none."""
        if self._metadata is None:
            path = self.folder / "metadata.arrow"
            try:
                self._metadata = from_arrow(read_stream(path), str(path))
            except FileNotFoundError:
                self._metadata = pd.DataFrame(index=pd.Index([], name="id"))
            except (OSError, KeyError, pa.ArrowInvalid) as error:
                raise GalleryError(f"{path} cannot be read ({error}); remove it and index again") from error
        return self._metadata

    @property
    def columns(self) -> dict[str, str]:
        """The metadata's columns and their kinds, by name."""
        return kinds_of(self.metadata)

    def dataset(self):
        """The gallery as a `datasets.Dataset`: id, path, content, the metadata, and "embedding"."""
        from .gallery_export import to_dataset

        return to_dataset(self)

    def to_parquet(self, path: str | os.PathLike) -> None:
        """Write everything to one Parquet file that other engines read, a shard at a time: id, path, size, mtime_ns,
        content, picture, the metadata's columns, and "embedding", a list of fp32 numbers of length 1.

        Raises:
            GalleryError: if the gallery is empty.
        """
        from .gallery_export import to_parquet

        to_parquet(self, path)

    @staticmethod
    def from_parquet(path: str | os.PathLike, folder: str | os.PathLike) -> "Gallery":
        """A gallery in a new folder from what `to_parquet` wrote.

        Raises:
            GalleryError: if the file is no such file, or the folder is not new.
        """
        from .gallery_export import from_parquet

        return from_parquet(path, folder)

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
        """The file of a row, None for a dataset's."""
        stored = self.table["path"][int(row)].as_py()
        return None if stored is None else os.fsdecode(stored)

    def picture(self, name: str):
        """The picture of an id, a PIL image. Raises `ValueError` if its file is gone or broken by now."""
        return load_image(self.source(name))

    def source(self, name: str) -> str | bytes:
        """Where the picture of an id is: its file's path, or its encoded bytes. Raises `KeyError` for unknown ids."""
        row = self.row(name)
        if row is None:
            raise KeyError(f"{self} holds no picture {name!r}")
        path = self.path(row)
        return self.table["picture"][row].as_py() if path is None else path

    @property
    def unreadable(self) -> list[dict[str, str]]:
        """{"id", "reason"} of what the last indexing could not use."""
        path = self.folder / "unreadable.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        except ValueError as error:
            raise GalleryError(f"{path} cannot be read ({error}); remove it and index again") from error

    def duplicates(self) -> list[list[str]]:
        """Groups of ids whose files have the same bytes."""
        rows = np.flatnonzero(self.rows.live)
        order = rows[np.argsort(self.rows.content[rows], kind="stable")]
        groups = np.split(order, np.flatnonzero(np.diff(self.rows.content[order])) + 1) if len(order) else []
        return [self.table["id"].take(group).to_pylist() for group in groups if len(group) > 1]
