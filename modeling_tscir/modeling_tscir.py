"""TSCIRModel: a frozen CLIP, the pseudo-word mapper of stage I and the composing adapters of stage II."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput, logging

from .adapters import (
    ADAPTER_NAME,
    AdapterMixin,
    add_composing_adapters,
    composing,
    of_adapter,
    reset_to_identity,
    uninitialised_lora_layers,
)
from .checkpoint import CheckpointMixin
from .configuration_tscir import TSCIRConfig
from .losses import composing_loss
from .mapper import PseudoWordMapper, initialise_mapper_weights


logger = logging.get_logger(__name__)


@dataclass
class TSCIROutput(ModelOutput):
    """What [`TSCIRModel.forward`] returns; embeddings are L2-normalised.

    Args:
        loss (`torch.Tensor`, *optional*): composing loss against the targets, where they were given.
        logits_per_query (`torch.Tensor` [B, B], *optional*): cosines of queries and targets times CLIP's logit scale.
        query_embeds (`torch.Tensor` [B, D]): composed queries.
        image_embeds (`torch.Tensor` [B, D]): reference images.
        pseudo_words (`torch.Tensor` [B, M, d_t], *optional*): what the mapper made of them; None at stage 0.
        target_embeds (`torch.Tensor` [B, D], *optional*): target images.
    """

    loss: torch.Tensor | None = None
    logits_per_query: torch.Tensor | None = None
    query_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    pseudo_words: torch.Tensor | None = None
    target_embeds: torch.Tensor | None = None


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
        given = default * single if default else 0.0
    if not isinstance(given, torch.Tensor):
        given = torch.full(single.shape, float(given), device=single.device) if given else None
    return None if given is None else given.to(single.device, dtype)[:, None]


class TSCIRModel(CheckpointMixin, AdapterMixin, PreTrainedModel):
    """Composed image retrieval on a frozen CLIP (arXiv 2504.17990, as design choices of the README declare).

    Made from a CLIP by [`~TSCIRModel.from_clip_pretrained`] and from a trained folder by
    [`~TSCIRModel.from_pretrained`]. Without a mapper (stage 0) it still answers, training-free, by slerp.
    """

    config_class = TSCIRConfig
    config: TSCIRConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CLIPEncoderLayer", "CLIPTextEmbeddings", "CLIPVisionEmbeddings"]

    def __init__(self, config: TSCIRConfig, backbone: CLIPModel | None = None):
        super().__init__(config)
        self._active: str | None = ADAPTER_NAME
        self._merged: dict[str, nn.Module] = {}  # text towers for serving, by their adapter; none of the parameters
        self.clip = backbone if backbone is not None else CLIPModel._from_config(config.clip_config)
        self.mapper = new_mapper(config) if config.stage >= 1 else None
        if config.stage >= 2:
            self._inject_adapters()
        self.post_init()

    def _inject_adapters(self) -> None:
        c = self.config
        add_composing_adapters(self.clip.text_model, c.lora_rank, c.lora_alpha, c.lora_dropout, c.lora_target_modules)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PseudoWordMapper):
            initialise_mapper_weights(module, init)

    def initialize_weights(self):
        # The generic initialisation would fill the adapters' zero matrices, and stage II would not start at stage I.
        fresh = uninitialised_lora_layers(self)
        super().initialize_weights()
        reset_to_identity(fresh)

    # ----- stages

    def add_mapper(self) -> None:
        """Begin stage I: a fresh mapper on the plain CLIP. Raises `ValueError` if there is one already."""
        if self.mapper is not None:
            raise ValueError("this model already has a mapper; stage I starts from a plain CLIP")
        self.config.stage = 1
        self.mapper = new_mapper(self.config).to(self.device, self.dtype)
        initialise_mapper_weights(self.mapper, init)

    def add_adapters(self) -> None:
        """Begin stage II: composing adapters that do nothing yet. Raises `ValueError` unless at stage I."""
        if self.config.stage == 0:
            raise ValueError(
                "this is a plain CLIP without a mapper; train stage I first: "
                "accelerate launch train/stage1.py --model_name_or_path CLIP --dataset_name DATA --output_dir STAGE1"
            )
        if self.config.stage == 2:
            raise ValueError("this model already has composing adapters; stage II starts from a stage I folder")
        self.config.stage = 2
        self._inject_adapters()
        self.to(self.device, self.dtype)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Freeze everything but what the current stage trains, and give that by name."""
        belongs = {1: lambda name: name.startswith("mapper."), 2: lambda name: of_adapter(name, ADAPTER_NAME)}
        trained = {}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.config.stage in belongs and belongs[self.config.stage](name))
            if parameter.requires_grad:
                trained[name] = parameter
        return trained

    @property
    def logit_scale(self) -> float:
        """1 / tau: CLIP's own frozen logit scale, not its logarithm."""
        return self.clip.logit_scale.exp().item()

    # ----- features

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """Projected image features [B, D], CLIPModel's own to the bit (not normalised)."""
        return self.clip.get_image_features(pixel_values=pixel_values, **kwargs).pooler_output

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """Projected text features [B, D], CLIPModel's own to the bit (not normalised), whatever adapters there are."""
        with composing(self.clip.text_model, None):
            return self.clip.get_text_features(
                input_ids=input_ids, attention_mask=attention_mask, **kwargs
            ).pooler_output

    def encode_image(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """v(x) [B, D], L2-normalised, and P(x) [B, N, d_v], the last hidden states without CLS, in one pass."""
        features, patch_states = self._project(pixel_values)
        return F.normalize(features, dim=-1), patch_states

    def _project(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.clip.vision_model(pixel_values=pixel_values)
        return self.clip.visual_projection(output.pooler_output), output.last_hidden_state[:, 1:]

    def get_pseudo_words(self, image_embeds: torch.Tensor, patch_states: torch.Tensor | None = None) -> torch.Tensor:
        """Pseudo-words [B, M, d_t] of images given by `encode_image`'s two outputs.

        Raises:
            ValueError: without a mapper, or with one that reads raw features, which `encode_reference` alone has.
        """
        if self.mapper is None:
            raise ValueError("this is a plain CLIP without a mapper; train stage I first (train/stage1.py)")
        if self.config.mapper_input == "raw":
            raise ValueError(
                'this mapper reads features before L2-normalisation (mapper_input "raw"); give pixel_values'
            )
        return self.mapper(image_embeds, patch_states)

    def encode_reference(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """v(x) [B, D], L2-normalised, and the images' pseudo-words [B, M, d_t], None without a mapper."""
        features, patch_states = self._project(pixel_values)
        image_embeds = F.normalize(features, dim=-1)
        if self.mapper is None:
            return image_embeds, None
        return image_embeds, self.mapper(features if self.config.mapper_input == "raw" else image_embeds, patch_states)

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
        hidden = self._text_states(input_ids, pseudo_mask, pseudo_words, name)
        return self._sentence(hidden, self._first_eos(input_ids))

    def encode_with_pictures_alone(
        self,
        input_ids: torch.Tensor,
        pseudo_mask: torch.Tensor,
        pseudo_words: torch.Tensor,
        adapter: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `encode_with_pseudo_words` gives, and q(x), prompts that end behind their pseudo-words: [B, D] each.

        In one pass, as the beginnings are the same: each row has a second EOS behind its pseudo-words, which nothing
        after it sees or is moved by.
        """
        name = self.active_adapter if adapter is None else self.known_adapter(adapter)
        end_id, places = self.config.text_eos_token_id, torch.arange(input_ids.shape[1] + 1, device=input_ids.device)
        ends = 1 + (pseudo_mask * places[:-1]).amax(-1, keepdim=True)  # [B, 1]: where the second EOS goes
        if self.clip.text_model.config._attn_implementation not in ("eager", "sdpa"):  # others take no mask of ours
            longest = int(ends.max()) + 1
            alone_ids = input_ids.where(places[:-1] < ends, end_id)[:, :longest]
            return tuple(
                self._sentence(self._text_states(ids, mask, pseudo_words, name), self._first_eos(ids))
                for ids, mask in ((input_ids, pseudo_mask), (alone_ids, pseudo_mask[:, :longest]))
            )
        positions = places - (places > ends).long()  # [B, L + 1]
        ids = input_ids.gather(1, positions).masked_fill(places == ends, end_id)
        mask = pseudo_mask.gather(1, positions) & (places < ends)
        hidden_end = (places == ends)[:, None, :] & (places > ends)[:, :, None]  # [B, L + 1, L + 1]
        visible = (places[None, :] <= places[:, None]) & ~hidden_end
        hidden = self._text_states(ids, mask, pseudo_words, name, positions, visible)
        return self._sentence(hidden, self._first_eos(input_ids) + 1), self._sentence(hidden, ends.squeeze(-1))

    def _text_states(
        self,
        input_ids: torch.Tensor,
        pseudo_mask: torch.Tensor,
        pseudo_words: torch.Tensor,
        adapter: str | None,
        positions: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last states [B, L, d_t]; `visible` [B, L, L] in place of what causal attention sees."""
        countable = not (torch.compiler.is_compiling() or pseudo_mask.is_meta)
        if countable and int(pseudo_mask.sum()) != pseudo_words.shape[:2].numel():
            raise ValueError(
                f"pseudo_mask has {int(pseudo_mask.sum())} places for {pseudo_words.shape[:2].numel()} pseudo-words; "
                f"make the processor with num_pseudo_words={pseudo_words.shape[1]}"
            )
        text_model = self._merged.get(adapter, self.clip.text_model)
        words = text_model.embeddings.token_embedding(input_ids)  # [B, L, d_t]
        words = words.masked_scatter(pseudo_mask.unsqueeze(-1), pseudo_words.to(words.dtype))
        if visible is None:
            hidden = text_model.embeddings(inputs_embeds=words)  # adds positions
            # Attention is causal and padding is on the right, so the state at EOS does not see it: no padding mask.
            mask = create_causal_mask(
                config=text_model.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
            )
        else:
            hidden = words + text_model.embeddings.position_embedding(positions)
            mask = hidden.new_zeros(visible.shape).masked_fill(~visible, torch.finfo(hidden.dtype).min)[:, None]
        with nullcontext() if adapter in self._merged else composing(text_model, adapter):
            hidden = text_model.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True).last_hidden_state
        return text_model.final_layer_norm(hidden)

    def _sentence(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, D], L2-normalised, of sentences that end at `places` [B]."""
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), places]
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    def _first_eos(self, input_ids: torch.Tensor) -> torch.Tensor:
        return (input_ids == self.config.text_eos_token_id).int().argmax(-1)  # [B]

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
            input_ids, pseudo_mask, attention_mask (`torch.Tensor` [B, L]): the prompt with its pseudo-words' places.
            modification_ids, modification_mask (`torch.Tensor` [B, L'], *optional*): the modification alone; needed
                where there is no mapper or `weight` > 0.
            weight (`float` or `torch.Tensor` [B], *optional*): -1 to 1. Moves the query along the great circle towards
                the reference image (negative) or the modification text (positive); 0 leaves it. Unless told it is
                `config.composed_weight`, but 0 for queries of several references or without a text.
            residual (`float` or `torch.Tensor` [B], *optional*): how much of what pseudo-words leave out of their
                picture, v(x) - q(x), is added to the query, before `weight` moves it; 0 is nothing, and
                `config.residual` what is taken unless told. q(x) is the query's own prompt up to its pseudo-words,
                "a photo of S*". Queries of several references have none.
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
        lean = self.config.composed_weight if weight is None else weight
        to_image, to_text = (bool(x.any()) if isinstance(x, torch.Tensor) else x for x in (lean < 0, lean > 0))
        residual = per_query(residual, self.config.residual, single, self.dtype)
        weight = per_query(weight, self.config.composed_weight, single, self.dtype)
        if image_embeds is None and (residual is not None or to_image):
            raise ValueError("image_embeds or pixel_values are needed; residual=0 and weight=0 do without")
        if modification_ids is None and to_text:
            raise ValueError("modification_ids are needed; weight=0 does without")
        if residual is None:
            query = self.encode_with_pseudo_words(input_ids, pseudo_mask, pseudo_words, adapter=adapter)
        else:
            query, alone = self.encode_with_pictures_alone(input_ids, pseudo_mask, pseudo_words, adapter)
            query = F.normalize(query + residual * (image_embeds - alone), dim=-1)
        if to_image:
            query = slerp(query, image_embeds, -weight).where(weight < 0, query)
        if to_text:
            text_embeds = F.normalize(self.get_text_features(modification_ids, modification_mask), dim=-1)
            moved = (weight > 0) & (self._first_eos(modification_ids) > 1)[:, None]  # EOS comes second in empty texts
            query = slerp(query, text_embeds, weight).where(moved, query)
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

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        pseudo_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        modification_ids: torch.Tensor | None = None,
        modification_mask: torch.Tensor | None = None,
        target_pixel_values: torch.Tensor | None = None,
        weight: float | None = None,
        return_dict: bool | None = None,
    ) -> TSCIROutput | tuple:
        """Compose references [B, 3, H, W] and modifications [B, L]; with targets [B, 3, H, W], score them too."""
        image_embeds, pseudo_words = self.encode_reference(pixel_values)
        query_embeds = self.get_composed_features(
            input_ids=input_ids,
            pseudo_mask=pseudo_mask,
            modification_ids=modification_ids,
            modification_mask=modification_mask,
            image_embeds=image_embeds,
            pseudo_words=pseudo_words,
            weight=weight,
        )
        output = TSCIROutput(query_embeds=query_embeds, image_embeds=image_embeds, pseudo_words=pseudo_words)
        if target_pixel_values is not None:
            output.target_embeds = self.encode_image(target_pixel_values)[0]
            output.logits_per_query = self.logit_scale * query_embeds @ output.target_embeds.T
            output.loss = composing_loss(
                query_embeds,
                output.target_embeds,
                self.logit_scale,
                reference_embeds=image_embeds,
                reference_weight=self.config.reference_negative_weight,
            )
        return output if return_dict is not False else output.to_tuple()


def new_mapper(config: TSCIRConfig) -> PseudoWordMapper:
    clip = config.clip_config
    return PseudoWordMapper(
        embed_dim=clip.projection_dim,
        patch_dim=clip.vision_config.hidden_size,
        word_dim=clip.text_config.hidden_size,
        num_pseudo_words=config.num_pseudo_words,
        hidden_size=config.mapper_hidden_size or 2 * clip.projection_dim,
        num_blocks=config.num_injection_blocks,
        num_heads=config.num_injection_heads or clip.text_config.num_attention_heads,
        dropout=config.mapper_dropout,
        activation=config.mapper_activation,
        input_scale=clip.projection_dim**0.5 if config.mapper_input == "scaled" else 1.0,
    )


def _shipped():
    # Names the modules that a checkpoint's folder must carry beside this one; transformers reads the imports as text.
    from .pipeline_tscir import ComposedImageRetrievalPipeline  # noqa: F401
    from .processing_tscir import TSCIRProcessor  # noqa: F401
