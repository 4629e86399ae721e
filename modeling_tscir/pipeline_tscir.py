"""pipeline("composed-image-retrieval"): index pictures once, then search them by a picture and a text."""

import os
import tempfile
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Pipeline
from transformers.utils import logging

from .embedding import embed_images, query_inputs
from .images import (
    EXTENSIONS,
    ImageSource,
    Selected,
    fetch,
    find_bad_images,
    handle_bad_images,
    is_url,
    list_images,
    load_image,
)
from .ranking import top_k as rank


logger = logging.get_logger(__name__)


class ComposedImageRetrievalPipeline(Pipeline):
    """Search a gallery of pictures by a reference picture and a modification text.

    ```python
    >>> import modeling_tscir
    >>> from transformers import pipeline

    >>> cir = pipeline("composed-image-retrieval", model="path/to/folder")  # doctest: +SKIP
    >>> cir.index("path/to/pictures")  # doctest: +SKIP
    >>> cir(image="red_dress.jpg", text="with long sleeves", top_k=5)  # doctest: +SKIP
    [{"score": 0.31, "id": "dresses/1042.jpg", "image": <PIL.Image.Image>}, ...]

    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _load_video_processor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gallery_embeds: torch.Tensor | None = None
        self.gallery_ids: list[str | int] = []
        self.gallery_sources: Sequence[ImageSource] = []
        self.bad_images: list[tuple[str, str]] = []
        if os.path.basename(os.path.dirname(str(self.model.name_or_path) + "/")) == "miniature_checkpoint":
            logger.warning(
                "This is TSCIR's miniature model, which knows drawn pictures only; name another by "
                'pipeline("composed-image-retrieval", model="folder, Hub name, or plain CLIP").'
            )

    def index(
        self,
        images: str | os.PathLike | Sequence[ImageSource],
        batch_size: int = 64,
        on_bad_image: str = "error",
        image_column: str = "image",
        id_column: str = "id",
    ) -> "ComposedImageRetrievalPipeline":
        """Embed a gallery, replacing the one before.

        Args:
            images: a folder (searched below, too), a list of paths, URLs or PIL images, or a `datasets.Dataset`.
            batch_size (`int`): pictures a forward pass.
            on_bad_image (`str`): "error" names every unreadable picture before any is embedded; "skip" goes on without
                them and lists them in `.bad_images`.
            image_column, id_column (`str`): columns of a `datasets.Dataset`; without an id column rows are numbered.

        Raises:
            BadImagesError: with the id and the reason of every picture that cannot be read.
        """
        sources, ids = gallery_of(images, image_column, id_column)
        if isinstance(sources, list) and any(is_url(source) for source in sources):
            self._fetched = tempfile.TemporaryDirectory()  # lives as long as this gallery
            sources = fetch(sources, self._fetched.name)
        bad = find_bad_images(sources, [str(i) for i in ids])
        handle_bad_images(bad, len(ids), on_bad_image)
        self.bad_images = bad
        if bad:
            names = {name for name, _ in bad}
            kept = [i for i, name in enumerate(ids) if str(name) not in names]
            sources, ids = Selected(sources, kept), [ids[i] for i in kept]
        embeds = embed_images(self.model, self.processor, sources, batch_size, progress=len(ids) > 1000 and "index")
        self.gallery_embeds = embeds.to(self.device)
        self.gallery_ids, self.gallery_sources = ids, sources
        return self

    def __call__(self, inputs=None, *, image=None, text=None, batch_size: int | None = None, **kwargs):
        """Search the indexed gallery.

        Args:
            image: reference picture (PIL image, path, URL or bytes), or a list of them.
            text (`str` or a list): the modification; may be empty.
            inputs: instead of both, {"image": ..., "text": ...} or a list of such queries.
            top_k (`int`): results a query; 10 unless given.
            weight (`float`): -1 to 1, towards the picture (negative) or the text (positive).
            batch_size (`int`): queries a forward pass; 64 unless given.

        Returns:
            For one query a list of {"score", "id", "image"}, best first; for a list of queries a list of these. Scores
            are cosine similarities, images PIL images.

        Raises:
            ValueError: if nothing is indexed, or a query lacks its picture or text.
        """
        queries, single = as_queries(inputs, image, text)
        if self.gallery_embeds is None:
            raise ValueError("nothing is indexed yet; call .index(images) first")
        preprocess, forward, postprocess = self._sanitize_parameters(**kwargs)
        preprocess, forward, postprocess = (
            {**self._preprocess_params, **preprocess},
            {**self._forward_params, **forward},
            {**self._postprocess_params, **postprocess},
        )
        size = batch_size or self._batch_size or 64
        results = []
        for start in range(0, len(queries), size):
            results += self.run_single(queries[start : start + size], preprocess, forward, postprocess)
        return results[0] if single else results

    def _sanitize_parameters(self, top_k: int | None = None, weight: float | None = None, **unknown):
        unknown = {k for k in unknown if k not in ("trust_remote_code", "use_fast")}
        if unknown:
            raise TypeError(f"unknown arguments {sorted(unknown)}; known are image, text, top_k, weight, batch_size")
        return {}, {} if weight is None else {"weight": weight}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, queries: list[dict]) -> dict[str, torch.Tensor]:
        pixels = self.processor.pixel_values([query["image"] for query in queries])
        inputs = query_inputs(self.processor, [query["text"] for query in queries])
        return {"pixel_values": pixels.to(self.model.dtype), **inputs}

    def _forward(self, inputs: dict[str, torch.Tensor], weight: float = 0.0) -> dict[str, torch.Tensor]:
        return {"query_embeds": self.model.get_composed_features(**inputs, weight=weight)}

    def postprocess(self, outputs: dict[str, torch.Tensor], top_k: int = 10) -> list[list[dict]]:
        queries = F.normalize(outputs["query_embeds"].float(), dim=-1).to(self.gallery_embeds.device)
        scores, indices = rank(queries, self.gallery_embeds, top_k)
        return [
            [
                {"score": score, "id": self.gallery_ids[i], "image": load_image(self.gallery_sources[i])}
                for score, i in zip(*row, strict=True)
            ]
            for row in zip(scores.tolist(), indices.tolist(), strict=True)
        ]

    def save_pretrained(self, save_directory, **kwargs):
        """Model, processor and code in one folder; the indexed gallery is not saved."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def gallery_of(images, image_column: str, id_column: str) -> tuple[Sequence[ImageSource], list[str | int]]:
    """Pictures, fetched when asked for, and an id for each: relative path, given path or URL, or row number."""
    if hasattr(images, "column_names"):
        from datasets import Image as ImageFeature  # only a Dataset brings us here, so datasets is there

        if image_column not in images.column_names:
            raise ValueError(f"the dataset has no column {image_column!r}; its columns are {images.column_names}")
        ids = list(images[id_column]) if id_column in images.column_names else list(range(len(images)))
        return images.cast_column(image_column, ImageFeature(decode=False))[image_column], ids
    if isinstance(images, (str, os.PathLike)) and not is_url(images):
        if os.path.splitext(images)[1].lower() in EXTENSIONS and not os.path.isdir(images):
            raise ValueError(f"{images} is one picture; index a folder or a list")
        ids = list_images(images)
        return [os.path.join(images, name) for name in ids], ids
    if isinstance(images, (str, bytes, Image.Image)) or len(images) == 0:
        raise ValueError("index takes a folder, a list that is not empty, or a datasets.Dataset")
    named = (str, os.PathLike)
    return list(images), [os.fspath(x) if isinstance(x, named) else i for i, x in enumerate(images)]


def as_queries(inputs, image, text) -> tuple[list[dict], bool]:
    """A list of {"image", "text"}, and whether the caller gave one query and no list."""
    if inputs is not None:
        if image is not None or text is not None:
            raise ValueError("give queries either as inputs or as image= and text=, not both")
        single = isinstance(inputs, dict)
        queries = [inputs] if single else list(inputs)
    else:
        single = not isinstance(image, (list, tuple))
        pictures = [image] if single else list(image)
        texts = [text] * len(pictures) if isinstance(text, str) else [text] if single else list(text or [])
        if len(pictures) != len(texts):
            raise ValueError(f"{len(pictures)} pictures and {len(texts)} texts; a query needs one of each")
        queries = [{"image": i, "text": t} for i, t in zip(pictures, texts, strict=True)]
    for number, query in enumerate(queries):
        missing = [k for k in ("image", "text") if query.get(k) is None]
        if missing:
            raise ValueError(f"query {number} lacks its {' and '.join(missing)} (an empty text is allowed)")
    return queries, single
