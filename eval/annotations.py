"""Reading benchmarks from disk: their records and pictures, every gap named."""

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


WHERE = "docs/benchmarks.md says where it is had"


def first_existing(candidates: Sequence[Path], what: str) -> Path:
    """The first candidate that exists, or a `ValueError` that names all of them."""
    for path in candidates:
        if path.exists():
            return path
    looked = ", ".join(str(path) for path in candidates)
    raise ValueError(f"{what} not found; looked for {looked}; {WHERE}")


def load_each(categories: Iterable[str], load: Callable[[str], Any]) -> dict[str, Any]:
    """What `load` gives for every category, or one `ValueError` that names what any of them misses."""
    loaded, problems = {}, []
    for category in categories:
        try:
            loaded[category] = load(category)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return loaded


def read_json(path: Path) -> Any:
    """A file's content; `ValueError` naming it if it is missing, no JSON, or holds the same key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError(f"{path} holds {_twice(key for key, _ in pairs)[:3]} more than once")
        return content

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {WHERE}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; {WHERE}") from error


def read_records(path: Path) -> list[dict]:
    """A file that holds a list of records."""
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content) or not content:
        raise ValueError(f"{path} should hold a list of records, and at least one; {WHERE}")
    return content


def read_mapping(path: Path) -> dict:
    """A file that holds one object."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} should hold an object that is not empty; {WHERE}")
    return content


def field(record: dict, key: str, kind: type, where: str) -> Any:
    """`record[key]`, or a `ValueError` that names file and record if it is absent or of another kind."""
    if key not in record:
        raise ValueError(f"{where} lacks {key!r}")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where} has {key!r} = {shown(value)}, which is no {kind.__name__}")
    return value


def list_of(record: dict, key: str, kind: type, where: str) -> list:
    """`record[key]`, a list of `kind`; errors are as `field`'s."""
    values = field(record, key, list, where)
    if wrong := [value for value in values if not isinstance(value, kind) or isinstance(value, bool)]:
        raise ValueError(
            f"{where} has {key!r} = {shown(values)}, which is no list of {kind.__name__}: {shown(wrong[0])} is none"
        )
    return values


def shown(value) -> str:
    """A value as an error shows it: CIRCO's list of pictures has millions of letters."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def index_of(ids: Sequence, path: Path, what: str = "pictures") -> dict:
    """Place of every id; `ValueError` if one stands twice and would be counted twice."""
    places = {name: i for i, name in enumerate(ids)}
    if len(places) < len(ids):
        twice = _twice(ids)
        raise ValueError(f"{path} lists {len(ids) - len(places)} {what} more than once, first {twice[:3]}")
    return places


def _twice(values: Iterable) -> list:
    seen: set = set()
    return [value for value in values if value in seen or seen.add(value)]


def lookup(places: dict, name, where: str, path: Path) -> int:
    """Place of a picture that a record names, or a `ValueError`: it must be one of `path`'s."""
    if name not in places:
        raise ValueError(f"{where} names {name!r}, which is not in {path.name}")
    return places[name]


def find_pictures(folders: Sequence[Path], names: Sequence[str], suffixes: Sequence[str] = ("",)) -> list[Path]:
    """A file for every name: the first folder, and in it the first suffix, under which it exists.

    A name that is nowhere, where others are found, has its place in the first folder: whoever reads it learns that it
    is missing.

    Raises:
        ValueError: if there is none of them, and where was looked.
    """

    @functools.cache
    def listing(folder: str) -> frozenset[str]:
        return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()

    bases = [(f"{folder}/", suffix) for folder in folders for suffix in suffixes]
    found, missing = [], 0
    for name in names:
        inner, _, own = name.removeprefix("./").rpartition("/")
        inner = f"{inner}/" if inner else ""
        there = (f"{base}{inner}{own}{end}" for base, end in bases if f"{own}{end}" in listing(base + inner))
        path = next(there, None)
        missing += path is None
        found.append(Path(path or f"{folders[0]}/{inner}{own}{suffixes[0]}"))
    if missing == len(names):
        looked = ", ".join(f"{base}*{end}" for base, end in bases)
        raise ValueError(
            f"{missing} of {len(names)} pictures are missing, first {list(names[:5])}; looked for {looked}. "
            "docs/benchmarks.md says how they must lie"
        )
    return found
