"""What every evaluation server asks of a submission's rows."""

from collections.abc import Collection, Iterable


def check_rows(rows: dict[str, list], query_ids: Iterable, known: Collection | None, length: int) -> None:
    """Raise a `ValueError` that says which row breaks a rule.

    Args:
        rows: query ids, as strings, to names of pictures, best first.
        query_ids: those of the split; each must have a row, and no other may.
        known: the gallery's names; `None` leaves unchecked that pictures exist.
        length: how many different names each row must have; all there are where the gallery is smaller.
    """
    wanted = {str(query) for query in query_ids}
    if rows.keys() != wanted:
        missing, extra = sorted(wanted - rows.keys(), key=str), sorted(rows.keys() - wanted)
        raise ValueError(f"{len(missing)} queries are missing, first {missing[:3]}; unknown queries: {extra[:3]}")
    known = None if known is None else frozenset(known)
    for query, row in rows.items():
        if len(row) != length:
            raise ValueError(f"query {query} has {len(row)} pictures, not {length}")
        if len(set(row)) < len(row):
            raise ValueError(f"query {query} names a picture more than once")
        if known is not None and not known.issuperset(row):
            raise ValueError(f"query {query} names {[n for n in row if n not in known][:3]}, not in the gallery")
