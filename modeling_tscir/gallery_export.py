"""A gallery as a `datasets.Dataset` and as a Parquet file with vectors, which other engines read; and back."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from .gallery import DTYPES, FORMAT, Gallery
from .gallery_writing import write_metadata
from .metadata import from_arrow, to_arrow
from .shards import SCHEMA, GalleryError, write_json, write_shard


KEPT = ("fingerprint", "dimensions", "dtype", "backbone", "model")


def to_dataset(gallery: Gallery):
    """id, path, content, the metadata, and "embedding"."""
    import datasets

    rows = np.flatnonzero(gallery.rows.live)
    # A name that is no UTF-8 cannot stand in a column of text.
    paths = [path and path.encode("utf-8", "backslashreplace").decode() for path in map(gallery.path, rows)]
    paths = pa.array(paths, pa.string())
    table = gallery.table.select(["id", "content"]).take(rows).append_column("path", paths)
    return datasets.Dataset(with_more(table, gallery, gallery.vectors(rows)))


def with_more(table: pa.Table, gallery: Gallery, embeds: torch.Tensor) -> pa.Table:
    """`table` and its pictures' metadata and embeddings [n, D], in fp32."""
    more = to_arrow(gallery.metadata, table["id"].to_pylist())
    for name in more.column_names:
        table = table.append_column(name, more[name])
    values = pa.array(embeds.float().numpy().reshape(-1))
    return table.append_column("embedding", pa.FixedSizeListArray.from_arrays(values, embeds.shape[1]))


def to_parquet(gallery: Gallery, path: str | os.PathLike) -> None:
    """Write everything to one file, a shard at a time."""
    import pyarrow.parquet as pq

    if not len(gallery):
        raise GalleryError(f"{gallery} is empty")
    part = Path(f"{path}.part")
    kept = {name: gallery.info[name] for name in KEPT if name in gallery.info}
    empty = with_more(SCHEMA.empty_table(), gallery, torch.empty(0, gallery.info["dimensions"]))
    start = 0
    with pq.ParquetWriter(part, empty.schema.with_metadata({"tscir": json.dumps(kept)})) as writer:
        for embeds in gallery.embeds:
            rows = np.flatnonzero(gallery.rows.live[start : start + len(embeds)])
            table = gallery.table.slice(start, len(embeds)).take(rows)
            writer.write_table(with_more(table, gallery, embeds[torch.from_numpy(rows)]).cast(writer.schema))
            start += len(embeds)
    os.replace(part, path)


def from_parquet(path: str | os.PathLike, folder: str | os.PathLike) -> Gallery:
    """A gallery in a new folder from what `to_parquet` wrote."""
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
        values = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, kept["dimensions"])
        embeds = torch.from_numpy(values.copy()).to(DTYPES[kept["dtype"]])
        write_shard(folder / "shards" / f"{number:06d}", table.select(SCHEMA.names).cast(SCHEMA), embeds)
    others = [name for name in file.schema_arrow.names if name not in (*SCHEMA.names, "embedding")]
    if others:
        write_metadata(from_arrow(file.read(["id", *others]), str(path)), folder)
    # Last, so that what is interrupted is no gallery.
    write_json(folder / "gallery.json", {"format": FORMAT, **kept, "tscir_version": __version__})
    return Gallery(folder)
