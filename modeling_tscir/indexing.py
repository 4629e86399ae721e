"""Filling a gallery: finding pictures, reading each file once, embedding them shard by shard, in any number of
processes, with every file that could not be used named and explained."""

import contextlib
import functools
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers.utils import logging

from .embedding import prefetched
from .gallery import DTYPES, Gallery, GalleryError
from .images import EXTENSIONS, load_image
from .metadata import own_file, read_metadata, tidy


logger = logging.get_logger(__name__)
SHARD_SIZE = 2048
MAX_FILE_BYTES = 256 * 2**20


class File(NamedTuple):
    """A picture's file as it was found."""

    id: str
    path: bytes
    size: int
    mtime_ns: int


@dataclass
class Report:
    """What an indexing did.

    Args:
        added, changed, unchanged, removed: numbers of pictures.
        moved: pictures found unchanged at another path.
        unreadable: {"id", "reason"} of every file or folder that could not be used.
        linked: folders that links lead to again; their pictures are in once.
        other_files: files that are no pictures by their names, by extension.
        metadata_rows: rows of metadata that were read.
        metadata_without_picture: ids of metadata rows whose picture is not in the gallery.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    moved: int = 0
    unreadable: list[dict[str, str]] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    other_files: dict[str, int] = field(default_factory=dict)
    metadata_rows: int | None = None
    metadata_without_picture: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """The report for people, a line each."""
        lines = [
            f"{self.added} pictures added, {self.changed} changed, {self.unchanged} as they were, {self.removed} gone."
        ]
        if self.moved:
            lines.append(f"{self.moved} of them lie elsewhere now.")
        if self.linked:
            lines.append(
                f"Links lead to {len(self.linked)} folders again: {', '.join(map(printable, self.linked[:5]))}."
            )
        if self.metadata_rows is not None:
            lines.append(f"{self.metadata_rows} rows of metadata.")
        if self.other_files:
            kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in self.other_files.items())
            lines.append(f"{sum(self.other_files.values())} other files were not looked at: {kinds}.")
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} could not be used:")
            lines += [f"  {printable(bad['id'])}: {bad['reason']}" for bad in self.unreadable]
        if self.metadata_without_picture:
            names = ", ".join(map(printable, self.metadata_without_picture[:5]))
            more = ", ..." if len(self.metadata_without_picture) > 5 else ""
            lines.append(f"{len(self.metadata_without_picture)} rows of metadata have no picture here: {names}{more}")
        return lines


def printable(name: str) -> str:
    """A name on one line of a terminal, whatever characters it is made of."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


class Found(NamedTuple):
    """A folder's pictures and all else that was met on the way."""

    files: list[File]
    unreadable: list[dict[str, str]]
    linked: list[str]
    other: Counter
    closed_folders: list[str]


def find_files(root: str | os.PathLike, prefix: str = "") -> Found:
    """Every picture in `root` and below, in order of their names, each file's name and state only.

    Folders are followed through symbolic links, each once, so that a loop ends.

    Raises:
        GalleryError: if `root` is no folder or cannot be read.
    """
    top = os.fsencode(os.path.abspath(root))
    if not os.path.isdir(top):
        raise GalleryError(f"{root} is not a folder")
    found = Found([], [], [], Counter(), [])
    seen: set[tuple[int, int]] = set()
    names: dict[str, bytes] = {}

    def note(path: bytes, reason: str) -> None:
        found.unreadable.append({"id": name_of(path, top, prefix), "reason": reason})

    waiting, linked = [top], []
    while waiting or linked:
        folder = waiting.pop() if waiting else linked.pop(0)  # links last, so that a folder goes by its own name
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                found.linked.append(name_of(folder, top, prefix))
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == top:
                raise GalleryError(f"{root} cannot be read: {error.strerror}") from error
            note(folder, f"a folder that cannot be read: {error.strerror}")
            found.closed_folders.append(name_of(folder, top, prefix))
            continue
        folders = []
        for entry in entries:
            try:
                status = entry.stat()
            except OSError as error:
                note(entry.path, f"cannot be reached: {error.strerror}")
                found.closed_folders.append(name_of(entry.path, top, prefix))  # it may have been one
                continue
            if stat.S_ISDIR(status.st_mode):
                (linked if entry.is_symlink() else folders).append(entry.path)
                continue
            extension = os.path.splitext(entry.name)[1].lower().decode("utf-8", "backslashreplace")
            if extension not in EXTENSIONS:
                found.other[extension] += 1
            elif not stat.S_ISREG(status.st_mode):
                note(entry.path, "no regular file")
            else:
                name = name_of(entry.path, top, prefix)
                if name in names:
                    note(entry.path, f"another file has the same id, {os.fsdecode(names[name])!r}")
                    continue
                names[name] = entry.path
                found.files.append(File(name, entry.path, status.st_size, status.st_mtime_ns))
        waiting += reversed(folders)
    return found


def name_of(path: bytes, top: bytes, prefix: str) -> str:
    """A file's id: its path within the indexed folder; bytes that are not UTF-8 are written as \\xNN."""
    relative = os.path.relpath(path, top).replace(os.fsencode(os.sep), b"/")
    return prefix + relative.decode("utf-8", "backslashreplace")


def read_file(path: bytes) -> tuple[bytes, os.stat_result]:
    """A file's bytes and its state, the same before and after. Raises `ValueError` with the reason."""
    for _ in range(2):
        try:
            with open(path, "rb") as file:
                before = os.fstat(file.fileno())
                if before.st_size > MAX_FILE_BYTES:
                    raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
                content = file.read(MAX_FILE_BYTES + 1)
            after = os.stat(path)
        except FileNotFoundError as error:
            raise ValueError("it went away while the folder was indexed") from error
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from error
        if (
            (before.st_size, before.st_mtime_ns)
            == (after.st_size, after.st_mtime_ns)
            == (
                len(content),
                before.st_mtime_ns,
            )
        ):
            return content, before
    raise ValueError("it changed while it was read; index again when it is whole")


def content_digest(content: bytes) -> str:
    """Thirty-two hexadecimal digits; equal for files of equal bytes."""
    return hashlib.sha256(content).hexdigest()[:32]


class Chunk:
    """The coming rows of one shard, read and decoded in threads, batch by batch.

    Args:
        items: files, or rows of a dataset as (id, {"bytes", "path"}).
        contents: by id, of the pictures that the gallery has; those of a dataset that are the same are passed over.
    """

    def __init__(
        self, items: Sequence, contents: dict[str, str], processor, batch_size: int, pool: ThreadPoolExecutor
    ):
        self.items, self.contents, self.processor = items, contents, processor
        self.batch_size, self.pool = batch_size, pool
        self.rows: list[dict] = []
        self.same: list[str] = []
        self.unreadable: list[dict[str, str]] = []

    def pixel_values(self) -> Iterator[torch.Tensor]:
        """[<= batch_size, 3, H, W] of the pictures that can be used; `rows` has a row for each."""

        def prepare(start: int) -> list:
            return list(self.pool.map(self._one, self.items[start : start + self.batch_size]))

        for results in prefetched(prepare, range(0, len(self.items), self.batch_size)):
            good = [result for result in results if isinstance(result, tuple)]
            self.unreadable += [result for result in results if isinstance(result, dict)]
            self.same += [result for result in results if isinstance(result, str)]
            if good:
                self.rows += [row for row, _ in good]
                yield torch.cat([pixels for _, pixels in good])

    def _one(self, item) -> tuple[dict, torch.Tensor] | dict[str, str] | str:
        """A row and its pixels; or the id and the reason why there are none; or the id of what is there already."""
        try:
            row, content = self._file(item) if isinstance(item, File) else self._dataset_row(item)
            if not content:
                raise ValueError("empty")
            if self.contents.get(row["id"]) == row["content"]:
                return row["id"]
            return row, self.processor.pixel_values([load_image(content)])
        except ValueError as error:
            return {"id": item[0], "reason": str(error)}

    @staticmethod
    def _file(file: File) -> tuple[dict, bytes]:
        content, status = read_file(file.path)
        row = {"id": file.id, "path": file.path, "size": len(content), "mtime_ns": status.st_mtime_ns}
        return row | {"content": content_digest(content), "picture": None}, content

    @staticmethod
    def _dataset_row(item: tuple) -> tuple[dict, bytes]:
        name, picture = item
        content = picture.get("bytes") if picture else None
        if content is None and picture and picture.get("path"):
            content, _ = read_file(os.fsencode(picture["path"]))
        if content is None:
            raise ValueError("no picture given")
        row = {"id": name, "path": None, "size": len(content), "mtime_ns": 0}
        return row | {"content": content_digest(content), "picture": content}, content


@torch.no_grad()
def embed_chunk(chunk: Chunk, model, dtype: torch.dtype, bar: tqdm) -> torch.Tensor:
    """Embeddings [rows, D] of a chunk, as they are stored."""
    parts = [torch.empty(0, model.config.clip_config.projection_dim, dtype=dtype)]
    for pixels in chunk.pixel_values():
        features = model.get_image_features(pixels.to(model.device, model.dtype))
        parts.append(F.normalize(features.float(), dim=-1).to("cpu", dtype))
        if not torch.isfinite(parts[-1]).all():  # such a row would stand before all others in every search
            names = ", ".join(row["id"] for row in chunk.rows[-len(pixels) :][:3])
            raise GalleryError(
                f"the model gives NaN or infinite values for pictures such as {names}; are its weights whole?"
            )
        bar.update(len(pixels))
    return torch.cat(parts)


def add_images(
    gallery: Gallery,
    images,
    model,
    processor,
    *,
    prefix: str = "",
    metadata: str | os.PathLike | None = None,
    image_column: str = "image",
    id_column: str = "id",
    batch_size: int = 32,
    shard_size: int = SHARD_SIZE,
    progress: bool = True,
) -> Report:
    """Bring a gallery up to date with a folder, or add the rows of a dataset to it.

    Of a folder, files of a known size and time of change are left as they are; what is gone from it goes from the
    gallery; files below a folder that cannot be read just now stay. Under `accelerate launch` or `torchrun` the
    processes share the work. Memory holds one shard.

    Args:
        images: a folder, searched below as well, or a `datasets.Dataset`, whose pictures are kept in the gallery.
        prefix (`str`): put before each id, so that several folders go into one gallery.
        metadata: a CSV, JSON Lines or Parquet file with a column `file_name` (path within the folder, as
            `datasets` has it); metadata.csv, .jsonl or .parquet in the folder is found by itself.
        image_column, id_column (`str`): of a dataset; other columns become metadata. Without ids rows are numbered.
        batch_size (`int`): pictures a forward pass.
        shard_size (`int`): pictures a shard: what an interruption may cost, and what memory holds.

    Raises:
        GalleryError: if the folder holds no picture, metadata does not fit, or the disk is full.
    """
    if batch_size < 1 or shard_size < 1:
        raise GalleryError(f"batch_size {batch_size} and shard_size {shard_size}: both must be at least 1")
    processes = Processes()
    with gallery.locked() if processes.main else contextlib.nullcontext():
        if isinstance(images, (str, os.PathLike)):
            plan = processes.same(lambda: plan_folder(gallery, images, prefix, metadata))
        else:
            plan = plan_dataset(gallery, images, prefix, image_column, id_column)
        processes.wait()  # all have seen the gallery as it was
        same, unreadable = embed_todo(gallery, plan, model, processor, processes, batch_size, shard_size, progress)
        report = plan.report(gallery, processes.together(same), processes.together(unreadable))
        processes.wait()
        if processes.main:
            finish(gallery, plan, report)
        processes.wait()
        if not processes.main:
            gallery.reload()
        return report


class Processes:
    """The processes that share an indexing: one, or those of `accelerate launch` or `torchrun`."""

    def __init__(self):
        self.state = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self.state = PartialState(cpu=not torch.cuda.is_available())
        self.rank = self.state.process_index if self.state else 0
        self.count = self.state.num_processes if self.state else 1
        self.main = self.rank == 0

    def wait(self) -> None:
        if self.state:
            self.state.wait_for_everyone()

    def together(self, values: list) -> list:
        """The lists of all processes, one after the other."""
        if not self.state:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)

    def same(self, make: Callable):
        """What the main process makes, or the `ValueError` it raises, in all of them."""
        if not self.state:
            return make()
        from accelerate.utils import broadcast_object_list

        made: list = [None]
        if self.main:
            try:
                made = [make()]
            except ValueError as error:
                made = [error]
        (result,) = broadcast_object_list(made)
        if isinstance(result, ValueError):
            raise result
        return result


class DatasetRows(Sequence):
    """(id, {"bytes", "path"}) of a dataset's rows, fetched when asked for."""

    def __init__(self, rows, image_column: str, ids: list[str]):
        self.rows, self.image_column, self.names = rows, image_column, ids

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, chosen: slice) -> list[tuple]:
        return list(zip(self.names[chosen], self.rows[chosen][self.image_column], strict=True))

    def ids(self) -> set[str]:
        return set(self.names)


class Files(list):
    """Files to be read."""

    def ids(self) -> set[str]:
        return {file.id for file in self}


@dataclass
class Plan:
    """What an indexing is to do.

    Args:
        todo: files, or rows of a dataset, to read and, unless they are there, to embed.
        contents: by id, of a dataset's pictures that are there.
        gone: ids whose files are no longer there.
        moved: ids whose files are unchanged at another path.
        metadata: by id, or None; it replaces that of `described`.
        unchanged: how many files are as they were.
        found: what was met in the folder.
    """

    todo: Files | DatasetRows
    contents: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    moved: dict[str, bytes] = field(default_factory=dict)
    metadata: pd.DataFrame | None = None
    described: set[str] = field(default_factory=set)
    unchanged: int = 0
    found: Found = field(default_factory=lambda: Found([], [], [], Counter(), []))

    def report(self, gallery: Gallery, same: list[str], unreadable: list[dict[str, str]]) -> Report:
        """`gallery` as it was before; `same` and `unreadable` as they were met while reading."""
        done = self.todo.ids() - {bad["id"] for bad in unreadable} - set(same)
        changed = sum(name in gallery for name in done)
        return Report(
            added=len(done) - changed,
            changed=changed,
            unchanged=self.unchanged + len(same),
            removed=len(self.gone),
            moved=len(self.moved),
            unreadable=sorted(self.found.unreadable + unreadable, key=lambda bad: bad["id"]),
            linked=self.found.linked,
            other_files=dict(self.found.other.most_common()),
            metadata_rows=None if self.metadata is None else len(self.metadata),
        )


def plan_folder(gallery: Gallery, root: str | os.PathLike, prefix: str, metadata: str | os.PathLike | None) -> Plan:
    """What a folder's pictures ask for.

    Raises:
        GalleryError: if the folder cannot be read, holds no picture, or has an id that another file has.
        MetadataError: if its metadata cannot be used.
    """
    frame = read_metadata(root, metadata, prefix)
    found = find_files(root, prefix)
    if not found.files and not found.unreadable:
        raise GalleryError(f"{root} holds no picture ({', '.join(sorted(EXTENSIONS))})")
    own = own_file(root)
    if metadata is None and own is not None:
        found.other[own.suffix] -= 1
        if not found.other[own.suffix]:
            del found.other[own.suffix]
    known = gallery.known()
    todo, moved = Files(), {}
    for file in found.files:
        path, *state = known.get(file.id, (file.path, None, None))
        same = state[:2] == [file.size, file.mtime_ns]
        if path != file.path and (path is None or not same_file(path, file.path)):
            if path is None or os.path.lexists(path):
                other = "a dataset" if path is None else os.fsdecode(path)
                raise GalleryError(f"{gallery} holds {file.id!r} already, of {other}; use another prefix")
            if same:
                moved[file.id] = file.path
        if not same:
            todo.append(file)
    unchanged = len(found.files) - len(todo)
    here = {file.id for file in found.files}
    found.files.clear()  # a folder's may be many, and memory is wanted for what comes
    top = os.path.join(os.path.realpath(os.fsencode(root)), b"")
    closed = tuple(f"{name}/" for name in found.closed_folders)
    real = functools.cache(os.path.realpath)  # of folders, of which there are few
    below = {
        name: path
        for name, (path, *_) in known.items()
        if path and os.path.join(real(os.path.dirname(path)), b"").startswith(top)
    }
    gone = {
        name
        for name in below.keys() - here
        if not name.startswith(closed) and name not in found.closed_folders and not os.path.lexists(below[name])
    }
    described = here | below.keys() if frame is not None else set()
    return Plan(todo, {}, gone, moved, frame, described, unchanged, found)


def same_file(path: bytes, other: bytes) -> bool:
    """Whether two names lead to one file."""
    return os.path.realpath(path) == os.path.realpath(other)


def plan_dataset(gallery: Gallery, rows, prefix: str, image_column: str, id_column: str) -> Plan:
    """What a dataset's rows ask for.

    Raises:
        GalleryError: for a missing column, or ids that are not unique or that a file has.
        MetadataError: for columns that cannot be metadata.
    """
    from datasets import Image as ImageFeature

    if image_column not in rows.column_names:
        raise GalleryError(f"the dataset has no column {image_column!r}; its columns are {rows.column_names}")
    named = id_column in rows.column_names
    ids = [f"{prefix}{name}" for name in (rows[id_column] if named else range(len(rows)))]
    if len(set(ids)) != len(ids):
        twice = next(name for name, count in Counter(ids).items() if count > 1)
        raise GalleryError(f"column {id_column!r} holds {twice!r} more than once; ids must differ")
    known = gallery.known()
    files = [name for name in ids if name in known and known[name][0] is not None]
    if files:
        raise GalleryError(f"{gallery} holds {files[0]!r} already ({len(files)} ids of files); use another prefix")
    others = [c for c in rows.column_names if c not in (image_column, id_column)]
    frame = tidy(rows.select_columns(others).to_pandas().set_axis(ids), "the dataset") if others else None
    pictures = rows.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
    contents = {name: known[name][3] for name in ids if name in known}
    return Plan(DatasetRows(pictures, image_column, ids), contents, metadata=frame)


def embed_todo(
    gallery: Gallery, plan: Plan, model, processor, processes: Processes, batch_size: int, shard_size: int,
    progress: bool,
) -> tuple[list[str], list[dict[str, str]]]:  # fmt: skip
    """Write this process's shards. Returns ids that were there already, and what could not be used."""
    starts = range(0, len(plan.todo), shard_size)[processes.rank :: processes.count]
    first = gallery.next_shard()
    dtype = DTYPES[gallery.info["dtype"]]
    same: list[str] = []
    unreadable: list[dict[str, str]] = []
    total = sum(min(shard_size, len(plan.todo) - start) for start in starts)
    shown = progress and processes.main and total > 0
    with (
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
        tqdm(total=total, disable=not shown, unit="picture", desc="index", smoothing=0) as bar,
    ):
        for start in starts:
            items = plan.todo[start : start + shard_size]
            chunk = Chunk(items, plan.contents, processor, batch_size, pool)
            embeds = embed_chunk(chunk, model, dtype, bar)
            same += chunk.same
            unreadable += chunk.unreadable
            bar.update(len(chunk.unreadable) + len(chunk.same))
            if chunk.rows:
                gallery.write_rows(first + start // shard_size, chunk.rows, embeds)
    return same, unreadable


def finish(gallery: Gallery, plan: Plan, report: Report) -> None:
    """Read the new shards, forget what is gone, changed or not readable any more, and write the rest."""
    gallery.reload()
    old = {name for name in plan.gone | {bad["id"] for bad in report.unreadable} if name in gallery}
    gallery.forget(old)
    if plan.moved:
        gallery.set_paths(plan.moved)
    gallery.set_unreadable(report.unreadable)
    if plan.metadata is not None:
        report.metadata_without_picture = [name for name in plan.metadata.index if name not in gallery]
    if plan.metadata is not None or old:
        gallery.set_metadata(plan.metadata, plan.described)
    if len(plan.todo) or old:
        gallery.rebuild_index()
