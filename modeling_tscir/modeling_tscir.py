"""TSCIRModel: a frozen CLIP, the pseudo-word mapper of stage I and the composing adapters of stage II."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .adapters import (
    ADAPTER_NAME,
    AdapterMixin,
    add_composing_adapters,
    composing,
    lora_layers,
    of_adapter,
    reset_to_identity,
    uninitialised_lora_layers,
)
from .checkpoint import CheckpointMixin
from .configuration_tscir import TSCIRConfig
from .losses import composing_loss
from .mapper import PseudoWordMapper, initialise_mapper_weights
from .queries import QueryMixin


TOKENS_AT_A_TIME = 1024  # patches of pictures, or tokens of texts, in a frozen tower on a CPU


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


class TSCIRModel(CheckpointMixin, AdapterMixin, QueryMixin, PreTrainedModel):
    """Composed image retrieval on a frozen CLIP (arXiv 2504.17990, as design choices of the README declare).

    Made from a CLIP by [`~TSCIRModel.from_clip_pretrained`] and from a trained folder by
    [`~TSCIRModel.from_pretrained`]. Without a mapper (stage 0) it still answers, training-free, by slerp.
    """

    config_class = TSCIRConfig
    config: TSCIRConfig
    hub_commit: str | None = None  # of the Hub repository that it was loaded from
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = False  # layers computed anew, outside `composing`, would lack their adapters
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CLIPEncoderLayer", "CLIPTextEmbeddings", "CLIPVisionEmbeddings"]

    def __init__(self, config: TSCIRConfig, backbone: CLIPModel | None = None):
        super().__init__(config)
        self._active: str | None = ADAPTER_NAME
        self._merged: dict[str, nn.Module] = {}  # text towers for serving, by their adapter; none of the parameters
        # In one precision with the mapper, whichever the backbone was stored in.
        self.clip = backbone or CLIPModel._from_config(config.clip_config, dtype=torch.get_default_dtype())
        self.mapper = new_mapper(config) if config.stage >= 1 else None
        if config.stage >= 2:
            self._inject_adapters()
        self.post_init()

    def _inject_adapters(self) -> None:
        c = self.config
        add_composing_adapters(self.clip.text_model, c.lora_rank, c.lora_alpha, c.lora_dropout, c.lora_target_modules)

    def _init_weights(self, module: nn.Module) -> None:
        pass  # the CLIP's are its own affair, the mapper's begin whole in `initialize_weights`

    def initialize_weights(self):
        # The generic initialisation would fill the adapters' zero matrices, and stage II would not start at stage I.
        fresh = uninitialised_lora_layers(self)
        super().initialize_weights()
        if self.mapper is not None:  # which transformers passes over, as it has no parameters but in its parts
            with torch.random.fork_rng(devices=[]):  # so that what is drawn next is what a seed has always given
                initialise_mapper_weights(self.mapper, init)
        reset_to_identity(fresh)

    # ----- stages

    def add_mapper(self) -> None:
        """Begin stage I: a fresh mapper on the plain CLIP. Raises `ValueError` if there is one already."""
        if self.mapper is not None:
            raise ValueError("this model already has a mapper; stage I starts from a plain CLIP")
        self.config.stage = 1
        self.mapper = new_mapper(self.config).to(self.device, self.dtype).train(self.training)
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
        for layer in lora_layers(self.clip.text_model):
            layer.train(self.training)
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
        """Projected image features [B, D], CLIPModel's own (not normalised): to the bit, but for large batches on
        CPUs, which are read in parts, within 1e-5 in fp32."""
        seen = self._seen(pixel_values, **kwargs)
        return self.clip.visual_projection(joined([output.pooler_output for output in seen]))

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """Projected text features [B, D], CLIPModel's own (not normalised), whatever adapters there are: as near to
        them as `get_image_features`."""
        one = attention_mask is not None and len(attention_mask) != len(input_ids)  # for all rows
        parts = 1 if kwargs or one else self._parts(input_ids, input_ids.numel())
        masks = [None] * parts if attention_mask is None else attention_mask.tensor_split(parts)
        kwargs["return_dict"] = True
        with composing(self.clip.text_model, None):
            read = [
                self.clip.text_model(input_ids=ids, attention_mask=mask, **kwargs).pooler_output
                for ids, mask in zip(input_ids.tensor_split(parts), masks, strict=True)
            ]
        return self.clip.text_projection(joined(read))

    def encode_image(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """v(x) [B, D], L2-normalised, and P(x) [B, N, d_v], the last hidden states without CLS, in one pass."""
        features, patch_states = self._project(pixel_values)
        return self._normalised(features), patch_states

    def _normalised(self, features: torch.Tensor) -> torch.Tensor:
        """L2-normalised in fp32, whatever precision they were computed in: a norm that is rounded to bf16 moves every
        similarity of its row."""
        return F.normalize(features.float(), dim=-1).to(self.dtype)

    def _project(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self._seen(pixel_values)
        features = self.clip.visual_projection(joined([output.pooler_output for output in seen]))
        return features, joined([output.last_hidden_state[:, 1:] for output in seen])

    def _seen(self, pixel_values: torch.Tensor, **kwargs) -> list[BaseModelOutputWithPooling]:
        """The vision tower's outputs of a batch's parts."""
        patches = pixel_values[:, 0].numel() / self.config.clip_config.vision_config.patch_size**2
        parts = pixel_values.tensor_split(self._parts(pixel_values, patches))
        kwargs["return_dict"] = True
        return [self.clip.vision_model(pixel_values=part, **kwargs) for part in parts]

    def _parts(self, batch: torch.Tensor, tokens: float) -> int:
        """In how many parts a tower reads a batch: on a CPU of about a thousand tokens each, as more of them take
        longer for each, their memory being fetched anew in every layer; elsewhere, and where weights may lie on a
        disk, in one."""
        if batch.device.type != "cpu" or torch.compiler.is_compiling() or hasattr(self, "hf_device_map"):
            return 1
        return min(len(batch), math.ceil(tokens / TOKENS_AT_A_TIME)) or 1

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
        image_embeds = self._normalised(features)
        if self.mapper is None:
            return image_embeds, None
        return image_embeds, self.mapper(features if self.config.mapper_input == "raw" else image_embeds, patch_states)

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
                gce_q=self.config.gce_q,
            )
        return output if return_dict is not False else output.to_tuple()


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """All rows in one tensor; of a single part no copy is made."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def new_mapper(config: TSCIRConfig) -> PseudoWordMapper:
    clip = config.clip_config
    return PseudoWordMapper(
        embed_dim=clip.projection_dim,
        patch_dim=clip.vision_config.hidden_size,
        word_dim=clip.text_config.hidden_size,
        num_pseudo_words=config.num_pseudo_words,
        hidden_size=2 * clip.projection_dim if config.mapper_hidden_size is None else config.mapper_hidden_size,
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
