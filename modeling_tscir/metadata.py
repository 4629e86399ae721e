"""Metadata of a gallery's pictures: columns of numbers, truth values or texts, and conditions on them."""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from numbers import Number
from operator import or_
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa


FILE_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
RESERVED = frozenset(
    ("id", "path", "size", "mtime_ns", "content", "picture", "embedding", "score", "duplicates", "metadata", "image")
)
OPERATORS = ("=", "!=", "<", "<=", ">", ">=", "in", "not in")
PLAIN = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
# As floats, which pandas makes of whole numbers that lack one, long ones would be others.
NULLABLE = {pa.int64(): pd.Int64Dtype(), pa.uint64(): pd.UInt64Dtype(), pa.string(): pd.StringDtype()}
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
Where = Mapping[str, object] | Sequence[tuple[str, str, object]]


class MetadataError(ValueError):
    """Metadata cannot be used; the message names file and column."""


class Condition(NamedTuple):
    """One of OPERATORS between a column and a value of the column's kind; a list of them with "in" and "not in"."""

    column: str
    operator: str
    value: object


def read_metadata(root: str | os.PathLike, given: str | os.PathLike | None, prefix: str) -> pd.DataFrame | None:
    """Metadata by id from the given file, or from `root`'s own; None where there is none.

    Raises:
        MetadataError: naming the file, if it cannot be read, lacks `file_name`, or names a picture twice.
    """
    path = own_file(root) if given is None else Path(given)
    if path is None:
        return None
    read = {
        ".csv": read_csv,
        ".parquet": lambda p: pd.read_parquet(p, dtype_backend="numpy_nullable"),
        ".jsonl": read_json_lines,
    }
    if path.suffix not in read:
        raise MetadataError(f"{path}: metadata is read from {', '.join(read)}")
    try:
        frame = read[path.suffix](path)
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise MetadataError(f"{path} cannot be read: {error}") from error
    if "file_name" not in frame.columns:
        raise MetadataError(f"{path} has no column file_name; it has {', '.join(map(str, frame.columns))}")
    names = frame.pop("file_name")
    if names.isna().any():
        raise MetadataError(f"{path}: row {int(names.isna().argmax())} has no file_name")
    names = prefix + names.astype(str)
    twice = names[names.duplicated()]
    if len(twice):
        raise MetadataError(f"{path} names {twice.iloc[0]!r} more than once")
    return tidy(frame.set_axis(names), str(path))


def read_csv(path: Path) -> pd.DataFrame:
    """A column is of one kind in all of a long file, and whole numbers beside missing ones stay whole.

    Numbers as codes have them, with leading zeros, a plus or an E ("0049", "+49", "12E3"), stay texts.

    Raises:
        ValueError: for rows of more cells than there are columns.
    """
    options = {"keep_default_na": False, "na_values": [""], "dtype_backend": "numpy_nullable", "low_memory": False}
    options["skipinitialspace"] = True  # of "a, b", whose second column is "b"
    texts = pd.read_csv(path, dtype="string", **options)
    if not isinstance(texts.index, pd.RangeIndex):  # rows are longer than the header, and the first cells were taken
        if texts.iloc[:, -1].notna().any():
            raise ValueError(f"rows have more cells than there are columns, {', '.join(texts.columns)}")
        options["index_col"] = False  # as each row ends with a comma
        texts = pd.read_csv(path, dtype="string", **options)
    frame = pd.read_csv(path, **options)
    for name, kind in frame.dtypes.items():
        if not pd.api.types.is_numeric_dtype(kind):
            frame[name] = texts[name]  # pandas makes texts of missing cells, too, where numbers need all 64 bits
            if texts[name].str.fullmatch("0|[1-9][0-9]{0,19}").all():
                frame[name] = texts[name].astype(object).map(int, na_action="ignore")
        elif texts[name].str.match(r"\s*(0\d|\+|\d+[eE]\d)").any():
            frame[name] = texts[name]
    return frame


def read_json_lines(path: Path) -> pd.DataFrame:
    """Values as they are written, with dates as texts. Raises `ValueError` naming the line."""
    rows = []
    with open(path, encoding="utf-8-sig") as file:  # as Windows writes it
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                    if "\\ud" in line.lower():  # half a character, as emoji cut in two leave it
                        whole = json.dumps(rows[-1], ensure_ascii=False).encode("utf-8", "replace")
                        rows[-1] = json.loads(whole)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}: {error}") from error
                if not isinstance(rows[-1], dict):
                    raise ValueError(f"line {number} is no JSON object")
    return pd.DataFrame(rows, dtype=object)


def own_file(root: str | os.PathLike) -> Path | None:
    """The file of metadata that a folder brings along."""
    return next((path for name in FILE_NAMES if (path := Path(root) / name).is_file()), None)


def tidy(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """Columns of one kind each, with missing and infinite values as missing; a column of mixed values becomes text.

    Raises:
        MetadataError: for a column whose name a result has already.
    """
    taken = [str(name) for name in frame.columns if str(name) in RESERVED]
    if taken:
        raise MetadataError(f"{source}: a column may not be called {taken[0]!r}, as results have that; rename it")
    columns = {}
    for name in frame.columns:
        column = frame[name]
        values = numbers_or_truths(column)
        if values is None:
            values = pa.array([as_text(value) for value in column.astype(object)], pa.string())
        values = values.to_pandas(types_mapper=NULLABLE.get)
        if pd.api.types.is_float_dtype(values):
            values = values.replace([np.inf, -np.inf], np.nan)
        columns[str(name)] = values.convert_dtypes().set_axis(frame.index)
    return pd.DataFrame(columns, index=frame.index).rename_axis("id")


def numbers_or_truths(column: pd.Series) -> pa.Array | None:
    """None for a column that holds others, and for numbers that no column holds."""
    try:
        values = pa.array(column, from_pandas=True)
    except OverflowError:  # whole numbers that need all 64 bits, or more
        try:
            values = pa.array(column, pa.uint64(), from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            return None
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # long whole numbers beside fractions, or no numbers
        if not all(isinstance(value, Number) and not isinstance(value, bool) for value in column.dropna()):
            return None
        values = pa.array(column.astype(float), from_pandas=True)
    return values if any(is_kind(values.type) for is_kind in PLAIN) else None


def as_text(value) -> str | None:
    """None for what is missing; the parts of a list, with commas between."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(map(str, value))
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)


def merged(old: pd.DataFrame, new: pd.DataFrame, replaced: set[str]) -> pd.DataFrame:
    """`new` and those rows of `old` that it does not replace, without columns that none of them has a value in."""
    kept = old[~old.index.isin(replaced | set(new.index))].dropna(axis="columns", how="all")
    empty = [name for name in new if name in kept and new[name].isna().all()]  # whose kind is the other part's
    parts = [part for part in (kept, new.drop(columns=empty)) if len(part)]
    return tidy(pd.concat(parts), "metadata") if parts else new.iloc[:0]


def kinds_of(frame: pd.DataFrame) -> dict[str, str]:
    """ "truth", "number" or "text" for each column."""
    types = pd.api.types
    return {
        name: "truth" if types.is_bool_dtype(kind) else "number" if types.is_numeric_dtype(kind) else "text"
        for name, kind in frame.dtypes.items()
    }


def with_texts(metadata: dict, columns: set[str]) -> dict:
    """A picture's metadata with the values of some columns as texts."""
    return {name: as_text(value) if name in columns else value for name, value in metadata.items()}


def conditions_of(where: Where | None, kinds: dict[str, str], gallery: str) -> list[Condition]:
    """What a caller asks for, checked and with values of the columns' kinds.

    Args:
        where: {column: value}, {column: [value, ...]}, {column: (operator, value)}, or a list of (column, operator,
            value).
        kinds: of the columns, as `kinds_of` gives them.

    Raises:
        ValueError: for unknown columns and operators, and values that a column cannot be compared with.
    """
    found = []
    for item in where.items() if isinstance(where, Mapping) else where or ():
        if isinstance(where, str) or isinstance(item, str) or len(item) not in (2, 3):
            raise ValueError(f"condition {where!r}: write {{column: value}} or [(column, operator, value), ...]")
        column, operator, value = item if len(item) == 3 else (item[0], None, item[1])
        if operator is None:
            operator = "in" if isinstance(value, (list, set)) else "="
            if isinstance(value, tuple):
                if len(value) != 2:
                    raise ValueError(f"condition {value!r} on {column!r}: write (operator, value)")
                operator, value = value
        operator = "=" if operator == "==" else operator
        if column not in kinds:
            raise ValueError(f"no column {column!r} in {gallery}; it has {', '.join(kinds) or 'none'}")
        if operator not in OPERATORS:
            raise ValueError(f"unknown operator {operator!r}; known are {' '.join(OPERATORS)}")
        if (operator in ("in", "not in")) != isinstance(value, (list, set, tuple)):
            raise ValueError(f"condition {operator!r} on {column!r}: a list goes with in and not in, they with a list")
        if kinds[column] == "text" and operator in ("<", "<=", ">", ">=") and reads_as_number(value):
            raise ValueError(
                f"column {column!r} holds texts and cannot be compared with {value!r} as a number; it holds numbers "
                "where every cell of the metadata is one or empty"
            )
        if operator in ("in", "not in"):
            value = [of_kind(one, kinds[column], column) for one in value]
        else:
            value = of_kind(value, kinds[column], column)
        found.append(Condition(column, operator, value))
    return found


def reads_as_number(value) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        return math.isfinite(float(value))
    return False


def is_finite(number: Number) -> bool:
    return isinstance(number, int) or math.isfinite(number)


def of_kind(value, kind: str, column: str):
    if kind == "truth" and str(value).lower() in TRUTH:
        return TRUTH[str(value).lower()]
    if kind == "number" and not isinstance(value, bool):
        if isinstance(value, Number) and is_finite(value):
            return value
        for read in (int, float) if isinstance(value, str) else ():  # a float does not hold every long whole number
            with contextlib.suppress(ValueError):
                if is_finite(number := read(value)):
                    return number
    if kind == "text" and value is not None:
        return str(value)
    raise ValueError(f"column {column!r} holds {kind}s and cannot be compared with {value!r}")


def matching(frame: pd.DataFrame, conditions: Sequence[Condition]) -> list[str]:
    """Ids that meet all conditions; a picture without a value meets none."""
    chosen = pd.Series(True, index=frame.index)

    def among(values: pd.Series, many) -> pd.Series:
        if pd.api.types.is_numeric_dtype(values):  # as "=" compares, where isin would bring all to one kind
            return reduce(or_, map(values.eq, many), pd.Series(False, index=values.index, dtype="boolean"))
        return values.isin(many)

    for column, operator, value in conditions:
        values = frame[column]
        compare = {
            "=": values.eq,
            "!=": values.ne,
            "<": values.lt,
            "<=": values.le,
            ">": values.gt,
            ">=": values.ge,
            "in": partial(among, values),
            "not in": lambda many, values=values: ~among(values, many),
        }
        chosen &= compare[operator](value).fillna(False).astype(bool) & values.notna()
    return chosen.index[chosen].tolist()


def values_of(frame: pd.DataFrame, name: str) -> dict:
    """A picture's values, None where it has none; {} for a gallery without columns."""
    if name not in frame.index:
        return dict.fromkeys(frame.columns)
    values = {column: frame.at[name, column] for column in frame.columns}
    return {k: None if pd.isna(v) else v.item() if hasattr(v, "item") else v for k, v in values.items()}


def from_arrow(table: pa.Table, source: str) -> pd.DataFrame:
    """The columns of a table, whose "id" becomes the index; see `tidy`."""
    return tidy(table.to_pandas(integer_object_nulls=True).set_index("id"), source)


def to_arrow(frame: pd.DataFrame, ids: Sequence[str] | None = None) -> pa.Table:
    """The frame, or its rows of `ids` with missing ones as nulls; a column's type is the whole frame's."""
    schema = pa.Schema.from_pandas(frame, preserve_index=False).remove_metadata()
    rows = frame if ids is None else frame.reindex(list(ids))
    return pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
