"""What a call of the pipeline may be given: a gallery's pictures, and queries of pictures and texts."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image
from transformers.utils import logging

from .images import EXTENSIONS, ImageSource, dataset_pictures, is_url, list_images


logger = logging.get_logger(__name__)


def gallery_of(images, image_column: str, id_column: str) -> tuple[Sequence[ImageSource], list[str | int]]:
    """Pictures, fetched when asked for, and an id for each: relative path, given path or URL, or row number."""
    if hasattr(images, "column_names"):
        pictures, images = dataset_pictures(images, image_column), images.with_format(None)
        ids = list(images[id_column]) if id_column in images.column_names else list(range(len(images)))
        return pictures[image_column], ids
    if isinstance(images, (str, os.PathLike)) and not is_url(images):
        if os.path.splitext(images)[1].lower() in EXTENSIONS and not os.path.isdir(images):
            raise ValueError(f"{images} is one picture; index a folder or a list")
        if os.path.isfile(os.path.join(images, "gallery.json")):
            raise ValueError(f"{images} is a gallery; open it: index(Gallery.load({os.fspath(images)!r}))")
        ids = list_images(images)
        return [os.path.join(images, name) for name in ids], ids
    if isinstance(images, (str, bytes, Image.Image)) or not hasattr(images, "__len__") or len(images) == 0:
        raise ValueError(
            f"index takes a folder, a list that is not empty, or a datasets.Dataset; not a {type(images).__name__}"
        )
    named = (str, os.PathLike)
    return list(images), [os.fspath(x) if isinstance(x, named) else i for i, x in enumerate(images)]


class Picture(NamedTuple):
    """A picture in a query, which a string there would not be, and that query's number."""

    source: ImageSource
    query: int


def kind_of(query: list) -> str:
    """ "text" or "image" for a query of texts alone or of one picture alone, else "composed"."""
    if all(isinstance(part, str) for part in query):
        return "text"
    return "image" if len(query) == 1 else "composed"


def as_queries(inputs, image, text, content) -> tuple[list[list], bool]:
    """Each query as a list of texts and pictures, and whether the caller gave one query and no list."""
    if inputs is not None:
        if any(x is not None for x in (image, text, content)):
            raise ValueError("give queries either as inputs or as image=, text= and content=, not both")
        if isinstance(inputs, str) or not hasattr(inputs, "__iter__"):
            raise ValueError(f'a query is {{"image": ..., "text": ...}} or a list of such, not {inputs!r}')
        single = isinstance(inputs, dict)
        queries = [inputs] if single else list(inputs)
    elif content is not None:
        if image is not None or text is not None:
            raise ValueError("content= holds a query's pictures and texts; give no image= or text= beside it")
        single, queries = True, [{"content": content}]
    else:
        lists = [list(x) for x in (image, text) if isinstance(x, (list, tuple))]
        single, count = not lists, len(lists[0]) if lists else 1
        pictures, texts = (list(x) if isinstance(x, (list, tuple)) else [x] * count for x in (image, text))
        if len(pictures) != len(texts):
            raise ValueError(f"{len(pictures)} pictures and {len(texts)} texts; a query needs one of each")
        queries = [{"image": i, "text": t} for i, t in zip(pictures, texts, strict=True)]
    return [as_content(query, number) for number, query in enumerate(queries)], single


def as_content(query: dict, number: int) -> list[str | Picture]:
    """A query's texts and pictures in order. Raises `ValueError` if it has none, or is no query."""
    if not isinstance(query, dict):
        raise ValueError(f'query {number} is {query!r}; write {{"image": ..., "text": ...}} or {{"content": [...]}}')
    known = {"content"} if query.get("content") is not None else {"image", "text", "content"}
    unknown = [name for name, value in query.items() if name not in known and value is not None]
    if unknown:
        raise ValueError(
            f"query {number} has {', '.join(map(repr, unknown))}; a query is an image and a text, or a content list; "
            "top_k, weight and the like are given for the whole call"
        )
    if query.get("content") is not None:
        if not isinstance(query["content"], (list, tuple)):
            raise ValueError(f"query {number}: content is a list of pictures and texts")
        given = list(query["content"])
        for part in given:
            if isinstance(part, str) and (is_url(part) or os.path.isfile(part)):
                # Whoever types on a page must not learn from an error which files are there.
                logger.warning(f'query {number}: {part!r} is read as a text; a picture is {{"image": {part!r}}}')
    else:
        picture, text = query.get("image"), query.get("text")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"query {number}: a text is a string, not {text!r}")
        given = ([] if picture is None else [{"image": picture}]) + ([] if text is None else [text])
    parts = [part if isinstance(part, str) else Picture(picture_of(part), number) for part in given]
    pictures = [part.source for part in parts if isinstance(part, Picture)]
    if any(picture is None for picture in pictures) or not (pictures or any(part.strip() for part in parts)):
        raise ValueError(f"query {number} lacks its picture or text; it needs one of them at least")
    return parts


def picture_of(part):
    """The picture of {"image": picture} or of an earlier result, which may stand in another's place."""
    while isinstance(part, dict) and "image" in part:
        part = part["image"]
    if isinstance(part, dict) and not {"bytes", "path"} & set(part):
        raise ValueError(f"{part!r} has no picture; a result found with return_images=False is given by its file")
    return part
