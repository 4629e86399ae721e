"""Addresses, clients, filters and errors of Milvus."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence

from .metadata import Condition
from .shards import GalleryError


REMOTE = ("http://", "https://", "tcp://", "unix:")
ESCAPES = str.maketrans({'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def is_milvus(name: str | os.PathLike) -> bool:
    """Whether a gallery's name is an address of Milvus rather than a folder."""
    return os.fspath(name).startswith(REMOTE) or parts_of(name)[0].endswith(".db")


def parts_of(uri: str | os.PathLike) -> tuple[str, str]:
    """Address and collection. Shells complete a folder's name, which milvus-lite's is, with a slash."""
    address, _, collection = os.fspath(uri).partition("#")
    return address.rstrip("/\\"), collection or "gallery"


def quoted(value) -> str:
    """A value in Milvus's language, which takes characters as they are and knows few of JSON's escapes."""
    if isinstance(value, list):
        return f"[{', '.join(map(quoted, value))}]"
    if isinstance(value, str):
        return f'"{value.translate(ESCAPES)}"'
    return json.dumps(value, default=lambda number: number.item())  # of numpy


def as_filter(condition: Condition) -> str:
    """A condition in Milvus's language, every name and value quoted."""
    field, value = f"metadata[{quoted(condition.column)}]", condition.value
    if condition.operator in ("in", "not in"):
        sign, link = ("==", " or ") if condition.operator == "in" else ("!=", " and ")
        return "(" + link.join(f"{field} {sign} {quoted(one)}" for one in value) + ")" if value else f"exists {field}"
    sign = {"=": "=="}.get(condition.operator, condition.operator)
    return f"{field} {sign} {quoted(value)}"


def among(ids: Sequence[str]) -> str:
    """A filter for rows by their ids. The client's own `ids=` puts them between single quotes as they are."""
    return f"id in {quoted(list(ids))}"


@contextlib.contextmanager
def told(problem: str) -> Iterator[None]:
    """Milvus's errors as a `GalleryError`."""
    from pymilvus import MilvusException

    try:
        yield
    except MilvusException as error:
        raise GalleryError(f"{problem}: {str(error).splitlines()[0]}") from error


def holds_gallery(uri: str) -> bool:
    """Whether there is a whole gallery; one whose making was interrupted is none. Nothing is made by looking."""
    address, collection = parts_of(uri)
    name = f"{collection}_info"
    if not address.startswith(REMOTE) and not os.path.exists(address):
        return False
    client = connect(address)
    with told(uri):
        found = client.has_collection(name)
        if found:
            client.load_collection(name)  # a file's collections lie released when the process that wrote them is gone
            found = client.get(name, ids=["info"], output_fields=["id"])
    client.close()
    return bool(found)


def connect(address: str):
    """A client. Raises `GalleryError` if pymilvus is missing or the server does not answer."""
    try:
        from pymilvus import MilvusClient, MilvusException
    except ImportError as error:
        raise GalleryError("this needs pymilvus: pip install pymilvus milvus-lite") from error
    try:
        return MilvusClient(address, timeout=20)
    except (MilvusException, OSError, ValueError) as error:
        raise GalleryError(f"{address} cannot be opened: {error}") from error
