"""TSCIRConfig: one CLIP configuration and every open choice of the method."""

import copy
import math

from transformers import CLIPConfig, PreTrainedConfig


TASK = "composed-image-retrieval"
CUSTOM_PIPELINES = {
    TASK: {"impl": "pipeline_tscir.ComposedImageRetrievalPipeline", "pt": ["AutoModel"], "type": "multimodal"}
}


class TSCIRConfig(PreTrainedConfig):
    """Configuration of a [`TSCIRModel`].

    Args:
        clip_config (`CLIPConfig` or `dict`): the frozen backbone's configuration.
        backbone_name_or_path (`str`, *optional*): where the backbone's weights are found: a Hub name, an absolute
            folder, or a folder relative to the checkpoint's own.
        backbone_revision (`str`, *optional*): commit of the backbone on the Hub.
        backbone_fingerprint (`str`, *optional*): digest of the backbone's weights; another backbone is refused.
        stage (`int`): 0 a plain CLIP that answers training-free, 1 with a mapper, 2 with composing adapters as well.
        num_pseudo_words (`int`): M, the number of pseudo-words that stand for an image.
        mapper_hidden_size (`int`, *optional*): width of the mapper's hidden layers; twice the projection if `None`.
        mapper_dropout (`float`): dropout in the mapper while it is trained.
        mapper_activation (`str`): "gelu", or "relu" (Pic2Word).
        mapper_input (`str`): which image features the mapper reads: "scaled", L2-normalised times the root of their
            width; "normalized", L2-normalised; or "raw", as CLIP projects them (Pic2Word, SEARLE, LinCIR).
        num_injection_blocks (`int`): K, cross-attention blocks of visual semantic injection; 0 switches it off.
        num_injection_heads (`int`, *optional*): their attention heads; the text tower's number if `None`.
        soft_alignment_weight (`float`): lambda_soft of stage I; 0 switches soft text alignment off.
        soft_alignment_temperature (`float`): tau_s; the smaller, the more the best-fitting captions count.
        lora_rank, lora_alpha, lora_dropout, lora_target_modules: the composing adapters, in PEFT's terms.
        adapters (`list[str]`): names of further composing adapters, each in PEFT's format in adapters/NAME.
        reference_negative_weight (`float`): weight of a query's own reference image among its negatives; 0 is off.
        mined_negative_weight (`float`): weight of each mined hard negative; 0 is off.
        num_mined_negatives (`int`): mined negatives a query.
        mined_negative_ceiling (`float`): images more similar than this (cosine) to the target are not mined, as
            they are likely to be right answers.
        gce_q (`float`): 0 to 1, q of stage II's generalized cross-entropy; with 0 it is InfoNCE, and the larger it is,
            the more wrong targets training bears.
        residual (`float`): how much of what pseudo-words leave out of their picture, v(x) - q(x), a composed query is
            given unless told; nothing is trained for it.
        composed_weight (`float`): -1 to 1, how far a composed query is then moved towards its picture (negative) or
            its text (positive), which is read through the adapters, too, unless told. With both 0 the query is that of
            arXiv 2504.17990.
        training_free_weight (`float`): at stage 0, where on the great circle from image (0) to text (1) the query is.
    """

    model_type = "tscir"
    sub_configs = {"clip_config": CLIPConfig}

    clip_config: dict | CLIPConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None
    stage: int = 0
    num_pseudo_words: int = 4
    mapper_hidden_size: int | None = None
    mapper_dropout: float = 0.1
    mapper_activation: str = "gelu"
    mapper_input: str = "scaled"
    num_injection_blocks: int = 2
    num_injection_heads: int | None = None
    soft_alignment_weight: float = 1.0
    soft_alignment_temperature: float = 0.03
    lora_rank: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    adapters: list[str] | tuple[str, ...] = ()
    reference_negative_weight: float = 0.3
    mined_negative_weight: float = 0.3
    num_mined_negatives: int = 4
    mined_negative_ceiling: float = 0.99
    gce_q: float = 0.7
    residual: float = 0.75
    composed_weight: float = 0.2
    training_free_weight: float = 0.5

    def __post_init__(self, **kwargs):
        if isinstance(self.clip_config, CLIPConfig):
            # A live configuration would be shared with the backbone and have its attention implementation reset.
            self.clip_config = self.clip_config.to_dict()
        self.clip_config = CLIPConfig(**(self.clip_config or {}))
        for name in ("lora_target_modules", "adapters"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is a list of names, not {getattr(self, name)!r}")
        self.lora_target_modules = list(self.lora_target_modules)
        self.adapters = list(self.adapters or ())
        # Written by `to_dict` always, but kept as an attribute only by remote code: with the package installed the
        # task is registered, and the attribute would make `pipeline()` ask for `trust_remote_code`.
        custom_pipelines = kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        if type(self).__module__.startswith("transformers_modules"):
            self.custom_pipelines = custom_pipelines or copy.deepcopy(CUSTOM_PIPELINES)
        self.validate_choices()

    def validate_choices(self) -> None:
        """Raise `ValueError` for values that no model can have."""
        if self.stage not in (0, 1, 2):
            raise ValueError(f"stage must be 0, 1 or 2, not {self.stage!r}")
        for name in ("num_pseudo_words", "mapper_hidden_size", "num_injection_heads", "lora_rank",
                     "num_injection_blocks", "num_mined_negatives"):  # fmt: skip
            if not isinstance(getattr(self, name), int | None):
                raise ValueError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        for name in ("num_pseudo_words", "mapper_hidden_size", "num_injection_heads", "lora_rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        heads, width = self.num_injection_heads, self.clip_config.text_config.hidden_size
        if heads and self.num_injection_blocks and width % heads:
            raise ValueError(f"num_injection_heads must divide the text tower's width, {width}, and {heads} does not")
        for name in ("num_injection_blocks", "soft_alignment_weight", "reference_negative_weight",
                     "mined_negative_weight", "num_mined_negatives"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name, known in (
            ("mapper_activation", ("gelu", "relu")),
            ("mapper_input", ("scaled", "normalized", "raw")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        if not -1 <= self.composed_weight <= 1:
            raise ValueError(f"composed_weight must be between -1 and 1, but is {self.composed_weight}")
        if not math.isfinite(self.residual):
            raise ValueError(f"residual must be a number, not {self.residual}")
        for name in ("training_free_weight", "gce_q"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, but is {getattr(self, name)}")
        for name in ("soft_alignment_temperature", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, but is {getattr(self, name)}")

    def to_dict(self) -> dict:
        return {**super().to_dict(), "custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES)}

    @property
    def text_eos_token_id(self) -> int:
        """The id at whose first position a text is pooled. OpenAI's configurations say 2, but mean the last id."""
        text = self.clip_config.text_config
        return text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
