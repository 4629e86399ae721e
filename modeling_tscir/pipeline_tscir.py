"""pipeline("composed-image-retrieval"): index pictures once, then search them by a picture and a text."""

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from transformers import Pipeline
from transformers.utils import logging

from .embedding import embed_images
from .images import ImageSource, Selected, fetch, find_bad_images, handle_bad_images, is_url, load_named
from .pipeline_inputs import Picture, as_queries, gallery_of, kind_of
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
        if getattr(self.model.config, "model_type", None) != "tscir":
            raise ValueError(
                f"{self.model.name_or_path} is a {type(self.model).__name__}, no TSCIRModel; a plain CLIP answers by "
                "ComposedImageRetrievalPipeline(model=TSCIRModel.from_clip_pretrained(NAME), "
                "processor=TSCIRProcessor.from_clip_pretrained(NAME))"
            )
        if self.processor is None:
            raise ValueError(
                "a processor is needed, too: processor=TSCIRProcessor.from_pretrained(the model's folder)"
            )
        self.gallery_embeds: torch.Tensor | None = None
        self.gallery_ids: list[str | int] = []
        self.gallery_sources: Sequence[ImageSource] = []
        self.gallery = None
        self.bad_images: list[tuple[str, str]] = []
        if os.path.basename(os.path.dirname(str(self.model.name_or_path) + "/")) == "miniature_checkpoint":
            logger.warning(
                "This is TSCIR's miniature model, which knows drawn pictures only; name another by "
                'pipeline("composed-image-retrieval", model="folder or Hub name"), or a plain CLIP by '
                "TSCIRModel.from_clip_pretrained; on the command line either by --model."
            )

    def index(
        self,
        images: str | os.PathLike | Sequence[ImageSource],
        batch_size: int | None = None,
        on_bad_image: str = "error",
        image_column: str = "image",
        id_column: str = "id",
    ) -> "ComposedImageRetrievalPipeline":
        """Embed a gallery, replacing the one before.

        Args:
            images: a folder (searched below, too), a list of paths, URLs or PIL images, a `datasets.Dataset`, or a
                [`Gallery`], which was embedded before.
            batch_size (`int`): pictures a forward pass; the pipeline's own, or else 64, unless given.
            on_bad_image (`str`): "error" names every unreadable picture before any is embedded; "skip" goes on without
                them and lists them in `.bad_images`.
            image_column, id_column (`str`): columns of a `datasets.Dataset`; without an id column rows are numbered.

        Raises:
            BadImagesError: with the id and the reason of every picture that cannot be read.
        """
        if hasattr(images, "check"):  # told by what it can do, as this file also runs where gallery.py is not
            images.check(self.model, self.processor)
            self.gallery, self.gallery_embeds = images, None
            self.gallery_ids, self.gallery_sources, self.bad_images, self._fetched = [], [], [], None
            return self
        batch_size = self._size(batch_size)
        sources, ids = gallery_of(images, image_column, id_column)
        fetched = None
        if isinstance(sources, list) and any(is_url(source) for source in sources):
            fetched = tempfile.TemporaryDirectory()
            sources = fetch(sources, fetched.name)
        reasons = dict(find_bad_images(sources, range(len(ids))))  # by row: several may have one id
        self.bad_images = [(str(ids[row]), why) for row, why in reasons.items()]
        handle_bad_images(self.bad_images, len(ids), on_bad_image)
        if reasons:
            kept = [row for row in range(len(ids)) if row not in reasons]
            sources, ids = Selected(sources, kept), [ids[i] for i in kept]
        embeds = embed_images(self.model, self.processor, sources, batch_size, progress=len(ids) > 1000 and "index")
        self.gallery, self.gallery_embeds = None, embeds.to(self.device)
        self.gallery_ids, self.gallery_sources = ids, sources
        self._fetched = fetched  # lives as long as this gallery
        return self

    def __call__(self, inputs=None, *, image=None, text=None, content=None, batch_size: int | None = None, **kwargs):
        """Search the indexed gallery.

        A query is a picture and a text that changes it; or a picture alone, for pictures like it; or a text alone; or
        a content list of pictures and texts in any order, `[image, "in the colour of", image]`.

        Args:
            image: reference picture (PIL image, path, URL, bytes, or an earlier search's result), or a list of them.
            text (`str` or a list): the modification; empty, it leaves the picture's prompt alone.
            content (`list`): one content list: a string is a text; a picture is anything that `image` may be but a
                string, or {"image": path or URL}.
            inputs: instead of these, {"image", "text"} (or one of both) or {"content"}, or a list of such queries.
            top_k (`int`): results a query; 10 unless given.
            weight (`float`): -1 to 1, towards the picture (negative) or the text (positive), where a query has both.
            residual (`float`): how much of what the pseudo-words leave out of a query's picture is added to the query,
                where that is one picture and then a text. `weight` and this are the model's own for such queries, and
                0 for others, unless told.
            adapter (`str`): the composing adapter for these queries, of those that the model has.
            return_images (`bool`): False leaves "image" out, which spares the decoding of what is found.
            where, exclude, exact: of a [`Gallery`]: conditions on its metadata, ids to leave out, and whether to leave
                its index aside; see [`Gallery.search`].
            batch_size (`int`): queries a forward pass; the pipeline's own, or else 64, unless given.

        Returns:
            For one query a list of {"score", "id", "image"}, best first; for a list of queries a list of these. Scores
            are cosine similarities, images PIL images; one whose file is gone by now is None, and "problem" says why.
            Of a [`Gallery`] also "path", "duplicates" and "metadata".

        Raises:
            ValueError: if nothing is indexed, or a query has neither picture nor text.
        """
        queries, single = as_queries(inputs, image, text, content)
        if self.gallery_embeds is None and self.gallery is None:
            raise ValueError("nothing is indexed yet; call .index(images) first")
        preprocess, forward, postprocess = self._sanitize_parameters(**kwargs)
        preprocess, forward, postprocess = (
            {**self._preprocess_params, **preprocess},
            {**self._forward_params, **forward},
            {**self._postprocess_params, **postprocess},
        )
        size = self._size(batch_size)
        results = []
        for start in range(0, len(queries), size):
            results += self.run_single(queries[start : start + size], preprocess, forward, postprocess)
        return results[0] if single else results

    def _size(self, given: int | None) -> int:
        """How many go into a forward pass."""
        size = self._batch_size if given is None else given
        size = 64 if size is None else size
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"batch_size is how many go into a forward pass, at least 1, not {size!r}")
        return size

    def push_to_hub(self, repo_id: str, **kwargs):
        """Upload model, processor and card; arguments are those of `TSCIRModel.push_to_hub`."""
        return self.model.push_to_hub(repo_id, processor=self.processor, **kwargs)

    def embed(
        self,
        inputs=None,
        *,
        image=None,
        text=None,
        content=None,
        weight: float | None = None,
        residual: float | None = None,
        adapter: str | None = None,
    ) -> torch.Tensor:
        """L2-normalised embeddings [Q, D] of queries, fp32, on the CPU; arguments, and the pipeline's own, as in a
        search."""
        queries, _ = as_queries(inputs, image, text, content)
        if not queries:
            raise ValueError("there is no query to embed")
        _, composing, _ = self._sanitize_parameters(weight=weight, residual=residual, adapter=adapter)
        composing, size = {**self._forward_params, **composing}, self._size(None)
        parts = [queries[start : start + size] for start in range(0, len(queries), size)]
        return torch.cat([self.run_single(part, {}, composing, {"embeds_only": True}).cpu() for part in parts])

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        weight: float | None = None,
        residual: float | None = None,
        adapter: str | None = None,
        **more,
    ):
        if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
            raise ValueError(f"top_k is how many results a query has, at least 1, not {top_k!r}")
        given = {"top_k": top_k, **{k: more.pop(k, None) for k in ("return_images", "where", "exclude", "exact")}}
        unknown = {k for k in more if k not in ("trust_remote_code", "use_fast")}
        if unknown:
            known = "image, text, content, top_k, weight, residual, adapter, return_images, where, exclude, exact"
            known += ", batch_size"
            raise TypeError(f"unknown arguments {sorted(unknown)}; known are {known}")
        composing = {"weight": weight, "residual": residual, "adapter": adapter}
        composing = {k: v for k, v in composing.items() if v is not None}
        return {}, composing, {k: v for k, v in given.items() if v is not None}

    def preprocess(self, queries: list[list]) -> dict:
        """The pictures of all queries in one tensor, plain texts, and prompts for those that have both."""
        pictures = [part for query in queries for part in query if isinstance(part, Picture)]
        kinds = [kind_of(query) for query in queries]
        inputs: dict = {
            "kinds": kinds,
            "image_counts": [sum(isinstance(part, Picture) for part in q) for q in queries],
            "has_text": [any(part.strip() for part in q if isinstance(part, str)) for q in queries],
        }
        if pictures:
            inputs["pixel_values"] = self._pixel_values(pictures).to(self.model.dtype)
        if kinds != ["image"] * len(kinds):
            texts = [" ".join(part for part in query if isinstance(part, str)) for query in queries]
            inputs["texts"] = self.processor.tokenize(texts)
        composed = [q for q, kind in zip(queries, kinds, strict=True) if kind == "composed"]
        if composed:
            contents = [[part if isinstance(part, str) else None for part in query] for query in composed]
            inputs["plain"] = [content[0] is None and None not in content[1:] for content in contents]
            inputs["prompts"] = self.processor.compose_contents(contents)
        return inputs

    def _pixel_values(self, pictures: list[Picture]) -> torch.Tensor:
        try:
            return self.processor.pixel_values([picture.source for picture in pictures])
        except ValueError:
            for picture in pictures:  # once more, to tell which
                try:
                    load_named(picture.source)
                except ValueError as error:
                    raise ValueError(f"query {picture.query}: {error}") from error
            raise

    def _forward(
        self, inputs: dict, weight: float | None = None, residual: float | None = None, adapter: str | None = None
    ) -> dict[str, torch.Tensor]:
        if adapter is not None:
            self.model.known_adapter(adapter)
        kinds, counts = inputs["kinds"], inputs["image_counts"]
        of_kind = {k: [i for i, kind in enumerate(kinds) if kind == k] for k in ("image", "text", "composed")}
        size, device = self.model.config.clip_config.projection_dim, self.model.device
        queries = torch.empty(len(kinds), size, device=device, dtype=torch.float32)
        if "pixel_values" in inputs:
            embeds, words = self.model.encode_reference(inputs["pixel_values"])
            owners = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
            composed = [owner == "composed" for owner in owners]
            if of_kind["image"]:
                queries[of_kind["image"]] = embeds[[not c for c in composed]].float()
        if of_kind["text"]:
            ids, mask = inputs["texts"]["input_ids"], inputs["texts"]["attention_mask"]
            features = self.model.get_text_features(ids[of_kind["text"]], mask[of_kind["text"]])
            queries[of_kind["text"]] = F.normalize(features.float(), dim=-1)
        if weight is not None and not (isinstance(weight, Real) and -1 <= weight <= 1):
            raise ValueError(f"weight must be between -1 (image) and 1 (text), not {weight!r}")
        if of_kind["composed"]:
            if residual and not all(inputs["plain"]):
                raise ValueError("residual is for queries of one picture and then a text, of no other order or number")
            if words is not None and not all(inputs["plain"]):
                plain, config = torch.tensor(inputs["plain"], device=queries.device), self.model.config
                written = [inputs["has_text"][i] for i in of_kind["composed"]]
                residual = config.residual * plain.float() if residual is None else residual
                leaning = config.composed_weight * (plain & torch.tensor(written, device=queries.device)).float()
                weight = leaning if weight is None else weight
            queries[of_kind["composed"]] = self.model.get_composed_features(
                **inputs["prompts"],
                modification_ids=inputs["texts"]["input_ids"][of_kind["composed"]],
                modification_mask=inputs["texts"]["attention_mask"][of_kind["composed"]],
                image_embeds=embeds[composed],
                pseudo_words=None if words is None else words[composed],
                weight=weight,
                residual=residual,
                image_counts=[counts[i] for i in of_kind["composed"]],
                adapter=adapter,
            ).float()
            for i in of_kind["composed"] if words is None else []:
                if not inputs["has_text"][i]:  # nothing to mix the pictures with, and no prompt to put them in
                    queries[i] = embeds[sum(counts[:i]) : sum(counts[: i + 1])].float().mean(0)
        return {"query_embeds": queries}

    def postprocess(
        self,
        outputs: dict[str, torch.Tensor],
        top_k: int = 10,
        return_images: bool = True,
        where=None,
        exclude=(),
        exact: bool = False,
        embeds_only: bool = False,
    ) -> list[list[dict]] | torch.Tensor:
        queries = F.normalize(outputs["query_embeds"].float(), dim=-1)
        if embeds_only:
            return queries
        if self.gallery is not None:
            results = self.gallery.search(queries, int(top_k), where, exclude, exact)
        elif where is not None or exclude or exact:
            raise ValueError("where, exclude and exact need a gallery on disk: index(Gallery.load(folder))")
        else:
            scores, indices = rank(queries.to(self.gallery_embeds.device), self.gallery_embeds, top_k)
            results = [
                [{"score": score, "id": self.gallery_ids[i], "row": i} for score, i in zip(*row, strict=True)]
                for row in zip(scores.tolist(), indices.tolist(), strict=True)
            ]
        if not return_images:
            return [[{k: v for k, v in result.items() if k != "row"} for result in row] for row in results]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding leaves the interpreter's lock alone
            return [list(pool.map(self._finished, row)) for row in results]

    def _finished(self, result: dict) -> dict:
        """A result with its "image", or with None and the "problem" there is."""
        row = result.pop("row", None)
        try:
            picture = self.gallery.picture(result["id"]) if row is None else load_named(self.gallery_sources[row])
            return result | {"image": picture}
        except ValueError as error:
            return result | {"image": None, "problem": str(error)}

    def save_pretrained(self, save_directory, **kwargs):
        """Model, processor and code in one folder; the indexed gallery is not saved."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
