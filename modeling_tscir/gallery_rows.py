"""Which row of a gallery an id has, and which rows have the same content: some twenty bytes a picture in memory, while
the names themselves stay in the Arrow files."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa


class Rows:
    """Rows of a table with columns "id" and "content", of which the last of each id is live.

    Args:
        table: as `shards.SCHEMA` has it.
    """

    def __init__(self, table: pa.Table):
        self.ids: pa.ChunkedArray = table["id"]
        hashes = [hashed(chunk.to_pylist()) for chunk in self.ids.chunks]
        unordered = np.concatenate([np.empty(0, np.uint64), *hashes])
        self._order = np.argsort(unordered, kind="stable")  # of equal ids the last comes last
        self._hashes = unordered[self._order]
        self.live = np.ones(len(table), dtype=bool)
        for start, end in self._groups_of_equal_hashes():
            rows = self._order[start:end]
            last = dict(zip(self.ids.take(rows).to_pylist(), rows, strict=True))
            self.live[rows] = np.isin(rows, list(last.values()))
        self.content = numbered([chunk.to_pylist() for chunk in table["content"].chunks])

    def _groups_of_equal_hashes(self) -> list[tuple[int, int]]:
        equal = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        starts = equal[np.diff(equal, prepend=-2) > 1]
        ends = equal[np.diff(equal, append=len(self._hashes) + 1) > 1] + 2
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def of(self, names: Sequence[str]) -> np.ndarray:
        """The row [n] of each name, -1 for those that are not there."""
        names = list(names)
        rows = np.full(len(names), -1, dtype=np.int64)
        wanted = hashed(names)
        places = np.searchsorted(self._hashes, wanted, side="right") - 1
        # Names that share a hash lie side by side: go back among them.
        asked = np.flatnonzero((places >= 0) & (self._hashes[places] == wanted)) if len(self._hashes) else places[:0]
        while len(asked):
            candidates = self._order[places[asked]]
            # Arrow takes from a column in chunks by copying all of it, which many names are worth.
            few = len(asked) < 100
            found = [self.ids[row].as_py() for row in candidates] if few else self.ids.take(candidates).to_pylist()
            right = np.array([name == names[i] for name, i in zip(found, asked, strict=True)], dtype=bool)
            rows[asked[right]] = candidates[right]
            asked = asked[~right]
            places[asked] -= 1
            asked = asked[(places[asked] >= 0) & (self._hashes[places[asked]] == wanted[asked])]
        return rows


def hashed(names: list[str]) -> np.ndarray:
    """Sixty-four bits of each name."""
    try:
        return pd.util.hash_array(np.array(names, dtype=object), categorize=False)
    except UnicodeEncodeError:  # half a character, which no id has
        return hashed([name.encode("utf-8", "backslashreplace").decode() for name in names])


def numbered(contents: list[list[str]]) -> np.ndarray:
    """A number [n] for each digest of 32 hexadecimal digits, in chunks; equal for equal ones."""
    packed = b"".join(bytes.fromhex("".join(chunk)) for chunk in contents)
    halves = np.frombuffer(packed, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 0], halves[:, 1]))
    new = np.any(np.diff(halves[order], axis=0, prepend=halves[order[:1]]) != 0, axis=1)
    numbers = np.empty(len(halves), dtype=np.int32)
    numbers[order] = np.cumsum(new)
    return numbers
