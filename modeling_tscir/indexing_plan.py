"""What an indexing is to do, found out before the first picture is read, and the report of what it did."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from .files import (
    FileList,
    Found,
    content_digest,
    find_files,
    gone_from,
    named_by,
    printable,
    read_file,
    same_file,
)
from .gallery import Gallery, GalleryError
from .images import EXTENSIONS, NOT_READ, dataset_pictures
from .metadata import MetadataError, own_file, read_metadata, tidy


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
        columns_left_out: those of a dataset that hold pictures, sound or bytes, and so are no metadata.
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
    columns_left_out: list[str] = field(default_factory=list)

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
        if self.columns_left_out:
            lines.append(f"Not metadata, as they hold pictures, sound or bytes: {', '.join(self.columns_left_out)}.")
        pictures = {kind: count for kind, count in self.other_files.items() if kind in NOT_READ}
        others = {kind: count for kind, count in self.other_files.items() if kind not in NOT_READ}
        for found, what, remedy in (
            (pictures, "pictures of formats that are not read", " Store them as JPEG or PNG."),
            (others, "other files were not looked at", ""),
        ):
            if found:
                kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in found.items())
                lines.append(f"{sum(found.values())} {what}: {kinds}.{remedy}")
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} could not be used:")
            lines += [f"  {printable(bad['id'])}: {bad['reason']}" for bad in self.unreadable]
        if self.metadata_without_picture:
            names = ", ".join(map(printable, self.metadata_without_picture[:5]))
            more = ", ..." if len(self.metadata_without_picture) > 5 else ""
            lines.append(f"{len(self.metadata_without_picture)} rows of metadata have no picture here: {names}{more}")
        return lines


class DatasetRows(Sequence):
    """(id, {"bytes", "path"}) of a dataset's rows, fetched when asked for."""

    def __init__(self, rows, image_column: str, ids: list[str]):
        self.rows, self.image_column, self.names = rows, image_column, ids

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, chosen: slice) -> list[tuple]:
        return list(zip(self.names[chosen], self.rows[chosen][self.image_column], strict=True))


@dataclass
class Plan:
    """What an indexing is to do.

    Args:
        todo: files, or rows of a dataset, to read and, unless they are there, to embed.
        replacing: how many of them have an id that is there already.
        gone: ids whose files are no longer there.
        moved: ids whose files are unchanged at another path.
        metadata: by id, or None; it replaces that of `described`.
        unchanged: how many files are as they were.
        unreadable, linked, other_files, columns_left_out: as in `Report`, of what was met.
    """

    todo: FileList | DatasetRows
    replacing: int = 0
    gone: set[str] = field(default_factory=set)
    moved: dict[str, bytes] = field(default_factory=dict)
    metadata: pd.DataFrame | None = None
    described: set[str] = field(default_factory=set)
    unchanged: int = 0
    unreadable: list[dict[str, str]] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    other_files: dict[str, int] = field(default_factory=dict)
    columns_left_out: list[str] = field(default_factory=list)

    def report(self, gallery: Gallery, same: list[str], unreadable: list[dict[str, str]]) -> Report:
        """`gallery` as it was before; `same` and `unreadable` as they were met while reading."""
        lost = sum(bad["id"] in gallery for bad in unreadable)
        changed = self.replacing - len(same) - lost
        return Report(
            added=len(self.todo) - len(same) - len(unreadable) - changed,
            changed=changed,
            unchanged=self.unchanged + len(same),
            removed=len(self.gone) + lost,
            moved=len(self.moved),
            unreadable=sorted(self.unreadable + unreadable, key=lambda bad: bad["id"]),
            linked=self.linked,
            other_files=self.other_files,
            columns_left_out=self.columns_left_out,
            metadata_rows=None if self.metadata is None else len(self.metadata),
        )


def plan_folder(gallery: Gallery, root: str | os.PathLike, prefix: str, metadata: str | os.PathLike | None) -> Plan:
    """What a folder's pictures ask for.

    Raises:
        GalleryError: if the folder cannot be read, holds no picture, or has an id that another file has.
        MetadataError: if its metadata cannot be used.
    """
    frame = read_metadata(root, metadata, checked_prefix(prefix))
    found = find_files(root, prefix)
    if not found.files and not found.unreadable:
        raise GalleryError(f"{root} holds no picture ({', '.join(sorted(EXTENSIONS))})")
    own = own_file(root)
    if metadata is None and own is not None:
        found.other[own.suffix] -= 1
        if not found.other[own.suffix]:
            del found.other[own.suffix]
    found.files.compare(gallery.files())
    moved, left = moved_from(gallery, found.files, prefix)
    todo, replacing = found.files.new_or_changed()
    described = set()
    if frame is not None:
        refuse_other_names(frame.index, found, gallery, root, prefix, own if metadata is None else metadata)
        named = named_by(root, prefix)
        described = found.files.ids() | {name for name, path in found.files.before() if named(name, path)}
    return Plan(
        todo,
        replacing,
        gone_from([root, *left], found),
        moved,
        frame,
        described,
        unchanged=len(found.files) - len(todo),
        unreadable=found.unreadable,
        linked=found.linked,
        other_files=dict(found.other.most_common()),
    )


def checked_prefix(prefix: str) -> str:
    """A prefix of ids, or a `GalleryError` for one that is no text."""
    try:
        prefix.encode()
    except UnicodeEncodeError as error:
        raise GalleryError(f"prefix {prefix!r} is no text: {error}") from error
    return prefix


def refuse_other_names(
    names: Sequence[str],
    found: Found,
    gallery: Gallery,
    root: str | os.PathLike,
    prefix: str,
    source: str | os.PathLike,
) -> None:
    """Raise `MetadataError` for metadata of which not one row has a picture, which would replace all there are."""
    known = found.files.ids() | {bad["id"] for bad in found.unreadable}
    if len(names) == 0 or not known.isdisjoint(names) or len(gallery.unknown(names)) < len(names):
        return
    given, there = (
        ", ".join(repr(printable(name.removeprefix(prefix))) for name in sorted(some)[:3]) for some in (names, known)
    )
    raise MetadataError(
        f"{source} names no picture of {root}: {given}; file_name is a path within the folder, such as {there}"
    )


def moved_from(gallery: Gallery, files: FileList, prefix: str) -> tuple[dict[str, bytes], set[bytes]]:
    """Paths of files that are unchanged at another place than before, by id, and the folders that they came from.

    What is gone from a folder that moved was gone from there. Only a file that is the same tells of a move: a name
    alone may be that of another folder's picture, on a disk that is not there just now.

    Raises:
        GalleryError: for an id that another file has, or a file of a folder that nothing here came from.
    """
    moved, left, others = {}, set(), []
    for file, old in files.elsewhere():
        if old.path is not None and same_file(old.path, file.path):
            continue
        if old.path is None or os.path.lexists(old.path):
            other = "a dataset" if old.path is None else os.fsdecode(old.path)
            raise GalleryError(f"{gallery} holds {file.id!r} already, of {other}; use another prefix")
        end = os.sep.encode() + file.id.removeprefix(prefix).encode()
        root = old.path[: -len(end)] if old.path.endswith(end) else b""
        if file[2:] == old[2:]:
            moved[file.id] = file.path
            left.add(root)
        else:
            others.append((file, old, root))
    left.discard(b"")  # where the id did not end the path
    strange = []
    for file, old, root in others:
        if root in left:
            continue
        if file.size == old.size and holds(gallery, file.id, lambda path=file.path: read_file(path)[0]):
            left |= {root} if root else set()
        else:
            strange.append((old, root))
    for old, root in strange:
        if root not in left:
            raise GalleryError(
                f"{gallery} holds {old.id!r} already, of {os.fsdecode(old.path)}, which is another picture and not "
                "there just now; use another prefix, or another gallery"
            )
    return moved, left


def holds(gallery: Gallery, name: str, read: Callable[[], bytes]) -> bool:
    """Whether the gallery's picture of an id has the bytes that `read` gives; no, where it raises `ValueError`."""
    with contextlib.suppress(ValueError):
        return content_digest(read()) == gallery.content(name)
    return False


def bytes_of(picture: dict | None) -> bytes:
    """The encoded picture of a dataset's row. Raises `ValueError` where there is none."""
    content = picture.get("bytes") if picture else None
    if content is None and picture and picture.get("path"):
        content, _ = read_file(os.fsencode(picture["path"]))
    if content is None:
        raise ValueError("no picture given")
    return content


def plan_dataset(gallery: Gallery, rows, prefix: str, image_column: str, id_column: str) -> Plan:
    """What a dataset's rows ask for.

    Raises:
        GalleryError: for ids that are missing, not unique or that a file has.
        ValueError: for what is no dataset of pictures, as `dataset_pictures` does.
        MetadataError: for columns that cannot be metadata.
    """
    if not hasattr(rows, "column_names"):
        raise GalleryError(f"add takes a folder or a datasets.Dataset, not a {type(rows).__name__}")
    pictures, rows = dataset_pictures(rows, image_column), rows.with_format(None)
    named = id_column in rows.column_names
    given = rows[id_column] if named else range(len(rows))
    if none := [row for row, name in enumerate(given) if name is None]:
        raise GalleryError(f"column {id_column!r} is empty in row {none[0]} ({len(none)} rows); every row needs an id")
    ids = [f"{prefix}{name}" for name in given]
    if len(set(ids)) != len(ids):
        twice = next(name for name, count in Counter(ids).items() if count > 1)
        raise GalleryError(f"column {id_column!r} holds {twice!r} more than once; ids must differ")
    known = gallery.rows.of(ids)
    there = np.flatnonzero(known >= 0).tolist()
    files = [ids[number] for number in there if gallery.path(known[number]) is not None]
    if files:
        raise GalleryError(f"{gallery} holds {files[0]!r} already ({len(files)} ids of files); use another prefix")
    others = [c for c in rows.column_names if c not in (image_column, id_column)]
    left_out = [c for c in others if holds_bytes(rows.features[c])]
    described = [c for c in others if c not in left_out]
    frame = None
    if described:
        table = rows.select_columns(described).with_format("arrow")[:]
        frame = tidy(table.to_pandas(integer_object_nulls=True).set_axis(ids), "the dataset")
    rows = DatasetRows(pictures, image_column, ids)
    if there and not named:
        items = (rows[number : number + 1][0] for number in there)
        if not any(holds(gallery, name, lambda picture=picture: bytes_of(picture)) for name, picture in items):
            raise GalleryError(
                f"{gallery} holds {ids[there[0]]!r} already, of another dataset; use another prefix, or name a column "
                "of ids that differ (id_column)"
            )
    return Plan(rows, len(there), metadata=frame, columns_left_out=left_out)


def holds_bytes(feature) -> bool:
    """Whether a dataset's column holds pictures, sound, videos or bytes, or lists of them."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return hasattr(feature, "decode") or "binary" in str(getattr(feature, "dtype", ""))
