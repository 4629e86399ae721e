"""A gallery's shards on disk: written aside, moved into place whole, rewritten under a new name."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


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
NAME = re.compile(r"(\d{6,})(?:-(\d+))?")
OWN = re.compile(NAME.pattern + r"(\.part|\.gone)?")  # what else lies there is others'
REMEDY = "index the pictures again into another folder, or remove this shard's folder and index again"


class GalleryError(ValueError):
    """A gallery cannot be read, written or used with this model; the message says what to do."""


def newest_shards(folder: Path) -> list[Path]:
    """The newest version of each shard, in order."""
    try:
        found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    except OSError as error:
        remedy = "index the pictures into another folder"
        raise GalleryError(f"{folder} cannot be read: {error.strerror}; {remedy}") from error
    newest: dict[int, Path] = {}
    for path in sorted(found, key=place_of):
        newest[place_of(path)[0]] = path
    return list(newest.values())


def place_of(shard: Path) -> tuple[int, int]:
    """A shard's number, and how often it was rewritten."""
    number, version = NAME.fullmatch(shard.name).groups(default="0")
    return int(number), int(version)


def read_shard(path: Path) -> tuple[pa.Table, torch.Tensor]:
    """Rows and embeddings [n, D] of a shard, both mapped from disk rather than read."""
    try:
        table = read_stream(path / "rows.arrow")
        if table.schema != SCHEMA:
            raise GalleryError(f"{path / 'rows.arrow'} has columns {table.schema.names}; {REMEDY}")
        return table, load_file(path / "embeds.safetensors")["embeds"]
    except (OSError, KeyError, pa.ArrowInvalid, SafetensorError) as error:
        raise GalleryError(f"{path} cannot be read ({error}); {REMEDY}") from error


def write_shard(path: Path, table: pa.Table, embeds: torch.Tensor) -> None:
    """Write a shard of rows and embeddings [n, D]. Raises `GalleryError` if the disk does not take it."""
    part = path.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        write_stream(table, part / "rows.arrow")
        save_file({"embeds": embeds.contiguous()}, part / "embeds.safetensors")
        shutil.copymode(part / "rows.arrow", part / "embeds.safetensors")  # safetensors lets its owner alone read it
        part.rename(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise GalleryError(
            f"{path} cannot be written ({error}); what was indexed before is kept. Mend that and run the same again."
        ) from error


def rewrite_shard(path: Path, table: pa.Table, embeds: torch.Tensor) -> None:
    """Replace a shard; with no rows, remove it. At every moment the old or the new one is whole."""
    number, version = place_of(path)
    if len(table):
        write_shard(path.with_name(f"{number:06d}-{version + 1}"), table, embeds)
    aside = path.with_suffix(".gone")
    path.rename(aside)
    shutil.rmtree(aside)


def clear_leavings(folder: Path) -> None:
    """Remove what processes left that died: halves of shards, and versions that a newer one replaces."""
    kept = set(newest_shards(folder))
    for path in folder.iterdir():
        if path not in kept and OWN.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)


def read_stream(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def write_stream(table: pa.Table, path: Path) -> None:
    """An Arrow stream, as `datasets.Dataset.from_file` reads it; never half a file under its name."""
    part = path.with_name(path.name + ".part")
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(part, path)


def write_json(path: Path, content) -> None:
    """JSON in ASCII; never half a file under its name."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(part, path)
