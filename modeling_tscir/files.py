"""Pictures' files: finding them below a folder, telling which are new or changed, reading each whole.

Lists of files lie on disk, in temporary tables of SQLite, so that memory does not grow with their number.
"""

import functools
import hashlib
import os
import sqlite3
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .images import EXTENSIONS
from .shards import GalleryError


MAX_FILE_BYTES = 256 * 2**20


class File(NamedTuple):
    """A picture's file as it was found; without path the picture of a dataset's row."""

    id: str
    path: bytes | None
    size: int
    mtime_ns: int


class FileList(Sequence):
    """Files of different ids, in the order in which they were added."""

    def __init__(self, files: Iterable[File] = ()):
        # An empty name is a file of SQLite's own that goes with the connection.
        self.tables = sqlite3.connect("", isolation_level=None)
        columns = "(place INTEGER PRIMARY KEY, id TEXT UNIQUE, path BLOB, size INTEGER, mtime_ns INTEGER)"
        self.tables.execute("PRAGMA journal_mode = OFF")
        self.tables.execute(f"CREATE TABLE files {columns}")
        self.tables.execute(f"CREATE TABLE others {columns}")
        self.tables.execute("BEGIN")
        self._fill("files", files)

    def _fill(self, table: str, files: Iterable[File]) -> None:
        try:
            command = f"INSERT OR REPLACE INTO {table} (id, path, size, mtime_ns) VALUES (?, ?, ?, ?)"
            self.tables.executemany(command, files)
        except sqlite3.OperationalError as error:
            raise GalleryError(f"the list of files cannot be kept in a temporary file: {error}") from error

    def add(self, file: File) -> None:
        self._fill("files", [file])

    def path_of(self, name: str) -> bytes | None:
        """The path of an id, None where there is none of it."""
        row = self.tables.execute("SELECT path FROM files WHERE id = ?", [name]).fetchone()
        return None if row is None else row[0]

    def __len__(self) -> int:
        return self.tables.execute("SELECT count(*) FROM files").fetchone()[0]

    def __getitem__(self, chosen: slice) -> list[File]:
        start, stop, _ = chosen.indices(len(self))
        command = "SELECT id, path, size, mtime_ns FROM files WHERE place > ? AND place <= ? ORDER BY place"
        return [File(*row) for row in self.tables.execute(command, [start, stop])]

    def __reduce__(self):
        return FileList, (self[:],)

    def ids(self) -> set[str]:
        return {name for (name,) in self.tables.execute("SELECT id FROM files")}

    # ----- beside those that were there before

    def compare(self, known: Iterable[File]) -> None:
        """Keep the files that were there before, of equal ids the last; the following methods speak of them."""
        self._fill("others", known)

    def elsewhere(self) -> Iterator[tuple[File, File]]:
        """Files whose id had another path before, and what they were then."""
        command = (
            "SELECT f.id, f.path, f.size, f.mtime_ns, o.id, o.path, o.size, o.mtime_ns "
            "FROM files f JOIN others o USING (id) WHERE o.path IS NOT f.path ORDER BY f.place"
        )
        for row in self.tables.execute(command):
            yield File(*row[:4]), File(*row[4:])

    def new_or_changed(self) -> tuple["FileList", int]:
        """Those that were not there with this size and time, and how many of them were there with another."""
        differing = "(f.size, f.mtime_ns) != (o.size, o.mtime_ns)"
        command = (
            "SELECT f.id, f.path, f.size, f.mtime_ns FROM files f LEFT JOIN others o USING (id) "
            f"WHERE o.id IS NULL OR {differing} ORDER BY f.place"
        )
        changed = f"SELECT count(*) FROM files f JOIN others o USING (id) WHERE {differing}"
        return FileList(File(*row) for row in self.tables.execute(command)), self.tables.execute(changed).fetchone()[0]

    def missing(self) -> Iterator[tuple[str, bytes]]:
        """Ids and paths of files that were there before and are not among these."""
        return self.tables.execute(
            "SELECT o.id, o.path FROM others o LEFT JOIN files f USING (id) WHERE f.id IS NULL AND o.path IS NOT NULL"
        )

    def before(self) -> Iterator[tuple[str, bytes]]:
        """Ids and paths of the files that were there before."""
        return self.tables.execute("SELECT id, path FROM others WHERE path IS NOT NULL")


class Found(NamedTuple):
    """A folder's pictures and all else that was met on the way; `closed` are paths of what cannot be read, by id."""

    files: FileList
    unreadable: list[dict[str, str]]
    linked: list[str]
    other: Counter
    closed: dict[str, bytes]


def find_files(root: str | os.PathLike, prefix: str = "") -> Found:
    """Every picture in `root` and below, in order of their names, each file's name and state only.

    Folders are followed through symbolic links, each once, so that a loop ends.

    Raises:
        GalleryError: if `root` is no folder or cannot be read.
    """
    top = os.fsencode(os.path.abspath(root))
    if not os.path.isdir(top):
        raise GalleryError(f"{root} is not a folder")
    found = Found(FileList(), [], [], Counter(), {})
    seen: set[tuple[int, int]] = set()

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
            found.closed[name_of(folder, top, prefix)] = folder
            continue
        folders = []
        for entry in entries:
            try:
                status = entry.stat()
            except OSError as error:
                note(entry.path, f"cannot be reached: {error.strerror}")
                found.closed[name_of(entry.path, top, prefix)] = entry.path  # it may have been a folder
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
                other = found.files.path_of(name)
                if other is not None:
                    # Under another id, as the file that came first keeps this one.
                    reason = f"another file has the same id, {os.fsdecode(other)!r}"
                    found.unreadable.append({"id": f"{name} (a second file)", "reason": reason})
                    continue
                found.files.add(File(name, entry.path, status.st_size, time_of(status)))
        waiting += reversed(folders)
    return found


def time_of(status: os.stat_result) -> int:
    """Time of change in nanoseconds, as far as 64 bits go."""
    return max(-(2**63), min(2**63 - 1, status.st_mtime_ns))


def name_of(path: bytes, top: bytes, prefix: str) -> str:
    """A file's id: its path within the indexed folder; bytes that are not UTF-8 are written as \\xNN."""
    relative = os.path.relpath(path, top).replace(os.fsencode(os.sep), b"/")
    return prefix + relative.decode("utf-8", "backslashreplace")


def same_file(path: bytes, other: bytes) -> bool:
    """Whether two names lead to one file."""
    return os.path.realpath(path) == os.path.realpath(other)


def gone_from(roots: Sequence[str | bytes | os.PathLike], found: Found) -> set[str]:
    """Ids of files that were in one of `roots` or below and are no longer there; those of folders that cannot be read
    stay, whatever prefix they have, or wherever they were before all of it moved."""
    below_one, below_closed = ([below_of(folder) for folder in some] for some in (roots, found.closed.values()))
    names, paths = tuple(f"{name}/" for name in found.closed), set(found.closed.values())
    return {
        name
        for name, path in found.files.missing()
        if any(below(path) for below in below_one)
        and not (name.startswith(names) or name in found.closed)
        and not (path in paths or any(below(path) for below in below_closed))
        and not os.path.isfile(path)
    }


def below_of(root: str | os.PathLike):
    """Whether a path lies in `root` or below, by its name or by where links lead."""
    named, top = (os.path.join(where(os.fsencode(root)), b"") for where in (os.path.abspath, os.path.realpath))
    real = functools.lru_cache(1024)(os.path.realpath)  # of folders, which come one after the other
    return lambda path: path.startswith(named) or os.path.join(real(os.path.dirname(path)), b"").startswith(top)


def named_by(root: str | os.PathLike, prefix: str):
    """Whether an id is the one that a path has in `root` under `prefix`, by its name or by where links lead."""
    top, real = os.path.realpath(os.fsencode(root)), functools.lru_cache(1024)(os.path.realpath)

    def named(name: str, path: bytes) -> bool:
        end = os.sep.encode() + name.removeprefix(prefix).encode()
        return name.startswith(prefix) and path.endswith(end) and real(path[: -len(end)]) == top

    return named


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
        times = {before.st_mtime_ns, after.st_mtime_ns}
        if len(times) == 1 and before.st_size == after.st_size == len(content):
            return content, before
    raise ValueError("it changed while it was read; index again when it is whole")


def content_digest(content: bytes) -> str:
    """Thirty-two hexadecimal digits; equal for files of equal bytes."""
    return hashlib.sha256(content).hexdigest()[:32]


def printable(name: str) -> str:
    """A name on one line of a terminal, whatever characters it is made of."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()
