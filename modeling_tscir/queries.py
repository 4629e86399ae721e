"""Composed queries: sentences that hold pseudo-words, and what is made of them."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .adapters import composing
from .sentences import embed_words, places_of, run_layers


logger = logging.get_logger(__name__)


def slerp(start: torch.Tensor, end: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """The point at share `weight` of the great circle from `start` to `end`, L2-normalised vectors [..., D].

    `weight` is one for all, or [..., 1].
    """
    cosine = (start * end).sum(-1, keepdim=True).clamp(-1, 1)
    angle = torch.acos(cosine)
    # Where the angle vanishes, so does the sine below, and any mixture is the point itself.
    near = angle < 1e-4
    sine = torch.where(near, torch.ones_like(angle), torch.sin(angle))
    along = (torch.sin((1 - weight) * angle) * start + torch.sin(weight * angle) * end) / sine
    return F.normalize(torch.where(near, (1 - weight) * start + weight * end, along), dim=-1)


def per_query(
    given: float | torch.Tensor | None, default: float, single: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """What is `given`, or else `default` where `single` [B] is True, for each query: [B, 1], or None for nothing."""
    if given is None:
        given = default * single.float() if default else 0.0
    if not isinstance(given, torch.Tensor):
        given = torch.full(single.shape, float(given), device=single.device, dtype=dtype) if given else None
    return None if given is None else given.to(single.device, dtype)[:, None]


class QueryMixin:
    """How [`TSCIRModel`] makes queries."""

    run_layers = staticmethod(run_layers)  # which training may compile

    def encode_with_pseudo_words(
        self,
        input_ids: torch.Tensor,
        pseudo_mask: torch.Tensor,
        pseudo_words: torch.Tensor,
        adapters: bool = True,
        adapter: str | None = None,
    ) -> torch.Tensor:
        """Sentences that hold pseudo-words, [B, D], L2-normalised.

        Args:
            input_ids (`torch.LongTensor` [B, L]): right-padded; ids under the mask do not matter.
            pseudo_mask (`torch.BoolTensor` [B, L]): True at the M places of each row that its pseudo-words take.
            pseudo_words (`torch.Tensor` [B, M, d_t]).
            adapters (`bool`): whether the composing adapters act, where the model has some.
            adapter (`str`, *optional*): which of them, rather than the active one.

        Raises:
            ValueError: if places and pseudo-words differ in number, and for an unknown adapter.
        """
        name = (self.active_adapter if adapter is None else self.known_adapter(adapter)) if adapters else None
        input_ids = input_ids.masked_fill(pseudo_mask, 0)
        places, ends = places_of(input_ids, pseudo_mask), self._first_eos(input_ids)
        return self._sentences(input_ids, pseudo_mask, pseudo_words, places, ends, name)

    def encode_query_parts(
        self,
        input_ids: torch.Tensor,
        pseudo_mask: torch.Tensor,
        pseudo_words: torch.Tensor,
        modification_ids: torch.Tensor | None = None,
        adapter: str | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The prompt, as `encode_with_pseudo_words` gives it, q(x) and the modification's embedding, [B, D] each.

        q(x) is the prompt ended behind its pseudo-words. All of them are read through the composing adapters, in one
        pass that reads the tower's weights once.
        """
        name = self.active_adapter if adapter is None else self.known_adapter(adapter)
        input_ids = input_ids.masked_fill(pseudo_mask, 0)
        ids, masks, ends = [input_ids], [pseudo_mask], [self._first_eos(input_ids)]
        if modification_ids is not None:
            longest = max(input_ids.shape[1], modification_ids.shape[1])
            ids = [F.pad(x, (0, longest - x.shape[1])) for x in (input_ids, modification_ids)]
            masks = [F.pad(pseudo_mask, (0, longest - pseudo_mask.shape[1])), torch.zeros_like(ids[1]).bool()]
            ends.append(self._first_eos(modification_ids))
        size, columns = ids[0].numel(), torch.arange(ids[0].shape[1], device=input_ids.device)
        places = [number * size + places_of(*both) for number, both in enumerate(zip(ids, masks, strict=True))]
        # q(x) has its prompt's states, and behind the pseudo-words an EOS of its own.
        stops = 1 + (masks[0] * columns).amax(-1)  # [B]
        ids.append(torch.full_like(ids[0], self.config.text_eos_token_id))
        masks.append(torch.zeros_like(masks[0]))
        ends.append(stops)
        own = len(places) * size + torch.arange(size, device=columns.device).view_as(ids[0])
        places.append(places[0].where(columns < stops[:, None], own))
        sentences = [torch.cat(x) for x in (ids, masks)]
        embeds = self._sentences(*sentences, pseudo_words, torch.cat(places), torch.cat(ends), name)
        query, *rest = embeds.split(len(input_ids))
        return query, rest[-1], *rest[:-1]

    def _sentences(
        self,
        input_ids: torch.Tensor,
        pseudo_mask: torch.Tensor,
        pseudo_words: torch.Tensor,
        places: torch.Tensor,
        ends: torch.Tensor,
        adapter: str | None,
    ) -> torch.Tensor:
        """Embeddings [S, D], L2-normalised, of sentences as `embed_words` takes them."""
        if not (torch.compiler.is_compiling() or pseudo_mask.is_meta):
            columns = torch.arange(input_ids.shape[1], device=ends.device)
            count = int((pseudo_mask & (columns < ends[:, None])).sum())
            if count != pseudo_words.shape[:2].numel():
                raise ValueError(
                    f"pseudo_mask has {count} places, before the end of a text, for "
                    f"{pseudo_words.shape[:2].numel()} pseudo-words; make the processor with "
                    f"num_pseudo_words={pseudo_words.shape[1]}"
                )
        merged = self._merged.get(adapter)
        tower = self.clip.text_model if merged is None else merged
        states = embed_words(tower, input_ids, pseudo_mask, pseudo_words, places, ends)
        with nullcontext() if merged is not None else composing(tower, adapter):
            pooled = self.run_layers(tower, *states, ends)
        return self._normalised(self.clip.text_projection(pooled))

    def _first_eos(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Places [B] where texts end. Raises `ValueError` for a text without an end, as of another tokenizer."""
        ends = input_ids == self.config.text_eos_token_id
        if not (torch.compiler.is_compiling() or ends.is_meta) and not bool(ends.any(-1).all()):
            raise ValueError(
                f"input_ids have no end of text, {self.config.text_eos_token_id} by the CLIP's configuration; if its "
                "vocabulary grew, write the tokenizer's own eos_token_id into its text_config"
            )
        return ends.int().argmax(-1)

    def _written(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which texts [B, 1] are not empty; in empty ones EOS comes second."""
        return (self._first_eos(input_ids) > 1)[:, None]

    def get_composed_features(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        pseudo_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        modification_ids: torch.Tensor | None = None,
        modification_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        patch_states: torch.Tensor | None = None,
        pseudo_words: torch.Tensor | None = None,
        weight: float | torch.Tensor | None = None,
        residual: float | torch.Tensor | None = None,
        image_counts: list[int] | None = None,
        adapter: str | None = None,
    ) -> torch.Tensor:
        """Composed queries [B, D], L2-normalised, from what [`TSCIRProcessor`] makes of images and texts.

        Args:
            pixel_values (`torch.Tensor` [B, 3, H, W], *optional*): reference images; else give what was computed from
                them: `image_embeds` [B, D] with `patch_states` [B, N, d_v], or `pseudo_words` [B, M, d_t].
            input_ids, pseudo_mask (`torch.Tensor` [B, L]): the prompt with its pseudo-words' places. `attention_mask`,
                which the processor gives with them, is not needed: texts end at their first EOS.
            modification_ids, modification_mask (`torch.Tensor` [B, L'], *optional*): the modification alone; needed
                where there is no mapper or `weight` > 0.
            weight (`float` or `torch.Tensor` [B], *optional*): -1 to 1. Moves the query along the great circle towards
                the reference image (negative) or the modification text, read through the adapters (positive); 0
                leaves it, and 1 is the text alone, as `get_text_features` gives it. Unless told it is
                `config.composed_weight`, but 0 for queries of several references or without a text.
            residual (`float` or `torch.Tensor` [B], *optional*): how much of what pseudo-words leave out of their
                picture, v(x) - q(x), is added to the query, before `weight` moves it; 0 is nothing, and
                `config.residual` what is taken unless told. q(x) is the query's own prompt up to its pseudo-words.
                Queries of several references have none.
            image_counts (`list[int]`, *optional*): how many references each query has, where it is not one each. What
                is given of references then has a row for each of them, in order; for `weight`, and without a mapper,
                a query's reference is the mean of its references.
            adapter (`str`, *optional*): the composing adapter for these queries, rather than the active one.

        Raises:
            ValueError: naming the input that is missing.
        """
        if weight is not None and not (torch.as_tensor(weight).abs() <= 1).all():
            raise ValueError(f"weight must be between -1 (image) and 1 (text), not {weight}")
        if adapter is not None:
            self.known_adapter(adapter)
        if pixel_values is not None:
            image_embeds, pseudo_words = self.encode_reference(pixel_values)
        if self.mapper is not None and pseudo_words is None and image_embeds is not None:
            pseudo_words = self.get_pseudo_words(image_embeds, patch_states)
        if image_counts is not None and image_embeds is not None:
            parts = image_embeds.split(image_counts)
            image_embeds = F.normalize(torch.stack([part.mean(0) for part in parts]), dim=-1)
        if self.mapper is None:
            return self._training_free_features(image_embeds, modification_ids, modification_mask, weight, residual)
        if pseudo_words is None:
            raise ValueError("a composed query needs pixel_values, image_embeds or pseudo_words")
        if input_ids is None or pseudo_mask is None:
            raise ValueError("input_ids and pseudo_mask are needed; TSCIRProcessor(images=..., text=...) makes both")
        single = torch.tensor([n == 1 for n in image_counts or [1] * len(input_ids)], device=input_ids.device)
        untold, lean = weight is None, self.config.composed_weight if weight is None else weight
        signs = (lean < 0, lean > 0, lean == 1)
        to_image, to_text, text_alone = (bool(x.any()) if isinstance(x, torch.Tensor) else x for x in signs)
        residual = per_query(residual, self.config.residual, single, self.dtype)
        weight = per_query(weight, self.config.composed_weight, single, self.dtype)
        if image_embeds is None and (residual is not None or to_image):
            raise ValueError("image_embeds or pixel_values are needed; residual=0 and weight=0 do without")
        if modification_ids is None and to_text:
            raise ValueError("modification_ids are needed; weight=0 does without")
        if residual is None and not to_text:
            query = self.encode_with_pseudo_words(input_ids, pseudo_mask, pseudo_words, adapter=adapter)
        else:
            asked = modification_ids if to_text else None
            query, alone, *rest = self.encode_query_parts(input_ids, pseudo_mask, pseudo_words, asked, adapter)
            if residual is not None:
                query = F.normalize(query + residual * (image_embeds - alone), dim=-1)
        if to_image:
            moved = weight < 0
            if untold and modification_ids is not None:
                moved = moved & self._written(modification_ids)
            query = slerp(query, image_embeds, -weight).where(moved, query)
        if to_text:
            moved = (weight > 0) & self._written(modification_ids)
            query = slerp(query, rest[0], weight).where(moved, query)
            if text_alone:  # nothing is composed, and it goes CLIP's own way
                plain = F.normalize(self.get_text_features(modification_ids, modification_mask), dim=-1)
                query = plain.where(moved & (weight == 1), query)
        return query

    def _training_free_features(self, image_embeds, modification_ids, modification_mask, weight, residual):
        """Composed queries [B, D] of a plain CLIP."""
        if residual is not None and torch.as_tensor(residual).any():
            raise ValueError("residual is what pseudo-words leave out of a picture; a plain CLIP has none")
        if image_embeds is None or modification_ids is None:
            raise ValueError("without a mapper pixel_values or image_embeds are needed, and modification_ids")
        logger.warning_once("No mapper: answering training-free, by slerp between image and modification text.")
        text_embeds = F.normalize(self.get_text_features(modification_ids, modification_mask), dim=-1)
        start = self.config.training_free_weight
        weight = torch.as_tensor(0.0 if weight is None else weight).to(image_embeds).reshape(-1, 1)  # [B or 1, 1]
        return slerp(image_embeds, text_embeds, start + weight * torch.where(weight > 0, 1 - start, start))
