"""Stage I: train the pseudo-word mapper on captioned images, with CLIP frozen.

    accelerate launch train/stage1.py --model_name_or_path openai/clip-vit-large-patch14 \\
        --dataset_name user/captions --output_dir runs/stage1

Rows need a picture and a caption. `--num_injection_blocks 0 --soft_alignment_weight 0` trains the plain MLP baseline.
"""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from loop import (
    DataArguments,
    LoopArguments,
    gather_with_gradient,
    load_rows,
    make_accelerator,
    parse_arguments,
    train,
)
from torch import nn

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_images, embed_images_with_patches, embed_texts
from modeling_tscir.feature_cache import cached, feature_key
from modeling_tscir.losses import info_nce_loss, soft_alignment_loss


@dataclass
class Stage1Arguments:
    """Columns, and choices of the method; None takes TSCIRConfig's default."""

    image_column: str = field(default="image", metadata={"help": "Column of pictures."})
    caption_column: str = field(default="caption", metadata={"help": "Column of captions."})
    num_pseudo_words: int | None = field(default=None, metadata={"help": "M, pseudo-words an image."})
    num_injection_blocks: int | None = field(
        default=None, metadata={"help": "K, blocks of injection; 0 switches it off."}
    )
    mapper_hidden_size: int | None = field(default=None, metadata={"help": "Width of the MLP's hidden layers."})
    mapper_dropout: float | None = field(default=None, metadata={"help": "Dropout in the mapper."})
    soft_alignment_weight: float | None = field(default=None, metadata={"help": "lambda_soft; 0 switches it off."})
    soft_alignment_temperature: float | None = field(
        default=None, metadata={"help": "tau_s: the smaller, the more the best-fitting captions count."}
    )

    def choices(self) -> dict:
        given = {k: v for k, v in vars(self).items() if not k.endswith("_column")}
        return {k: v for k, v in given.items() if v is not None}


class Stage1Data(torch.utils.data.Dataset):
    """Rows as frozen features: v(x) and u(c) always, P(x) where it fits the budget, else pixel values.

    A batch of B rows is {"image_embeds" [B, D], "caption_embeds" [B, D]} and, where the mapper needs patches, either
    "patch_states" [B, N, d_v] (bf16) or "pixel_values" [B, 3, H, W].
    """

    def __init__(
        self, rows: Dataset, model: TSCIRModel, processor: TSCIRProcessor, data: DataArguments, args: Stage1Arguments
    ):
        self.images, self.processor = rows[args.image_column], processor
        vision = model.config.clip_config.vision_config
        num_patches = (vision.image_size // vision.patch_size) ** 2
        needed_gb = len(rows) * num_patches * vision.hidden_size * 2 / 2**30
        self.patch_states = None
        self.pixels_needed = model.mapper.needs_patches and needed_gb > data.feature_cache_gb
        if model.mapper.needs_patches and not self.pixels_needed:
            self.image_embeds, self.patch_states = embed_images_with_patches(
                model, processor, self.images, data.feature_batch_size, progress="images"
            )

        def image_embeds() -> torch.Tensor:
            if self.patch_states is not None:
                return self.image_embeds
            return embed_images(model, processor, self.images, data.feature_batch_size, progress="images")

        def caption_embeds() -> torch.Tensor:
            return embed_texts(model, processor, list(rows[args.caption_column]), progress="captions")

        # The fingerprint of datasets changes with the files and with everything done to the rows.
        content = [rows._fingerprint, len(rows)]
        keys = [feature_key(model, processor, [*content, c]) for c in (args.image_column, args.caption_column)]
        self.image_embeds = cached(data.feature_cache_dir, keys[0], image_embeds)
        self.caption_embeds = cached(data.feature_cache_dir, keys[1], caption_embeds)

    def __len__(self) -> int:
        return len(self.image_embeds)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        index = torch.tensor(rows)
        batch = {"image_embeds": self.image_embeds[index], "caption_embeds": self.caption_embeds[index]}
        if self.patch_states is not None:
            batch["patch_states"] = self.patch_states[index]
        elif self.pixels_needed:
            batch["pixel_values"] = self.processor.pixel_values([self.images[i] for i in rows])
        return batch


class Stage1Objective(nn.Module):
    """L = L_img + lambda_soft L_soft, over the batch of all processes."""

    def __init__(self, model: TSCIRModel, processor: TSCIRProcessor):
        super().__init__()
        self.model, self.logit_scale = model, model.logit_scale
        self.prompt = processor.compose([""])

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        config = self.model.config
        images, captions = batch["image_embeds"], batch["caption_embeds"]  # v(x), u(c): [B, D]
        words = self.model.get_pseudo_words(images, self.patches(batch, images.device))  # [B, M, d_t]
        ids, mask = (self.prompt[k].to(images.device).expand(len(images), -1) for k in ("input_ids", "pseudo_mask"))
        pseudo = self.model.encode_with_pseudo_words(ids, mask, words)  # q(x): [B, D]
        pseudo, images, captions = (gather_with_gradient(x.float()) for x in (pseudo, images, captions))
        terms = {"image_loss": info_nce_loss(pseudo, images, self.logit_scale)}
        loss = terms["image_loss"]
        if config.soft_alignment_weight > 0:
            terms["soft_alignment_loss"] = soft_alignment_loss(
                pseudo, images, captions, config.soft_alignment_temperature
            )
            loss = loss + config.soft_alignment_weight * terms["soft_alignment_loss"]
        return {"loss": loss, **terms}

    def patches(self, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor | None:
        if "patch_states" in batch:
            return batch["patch_states"].to(self.model.dtype)
        if "pixel_values" not in batch:
            return None
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return self.model.encode_image(batch["pixel_values"])[1].to(self.model.dtype)


def main() -> None:
    loop, data, args = parse_arguments(
        LoopArguments,
        DataArguments,
        Stage1Arguments,
        description=__doc__,
        required=("model_name_or_path", "dataset_name", "output_dir"),
    )
    accelerator = make_accelerator(loop)
    model = TSCIRModel.from_clip_pretrained(data.model_name_or_path, **args.choices())
    processor = TSCIRProcessor.from_clip_pretrained(data.model_name_or_path, model.config.num_pseudo_words)
    model.add_mapper()
    model.to(accelerator.device)
    columns = {args.image_column: "the picture", args.caption_column: "its caption"}
    rows, skipped = load_rows(data, columns, images=[args.image_column])
    dataset = Stage1Data(rows, model, processor, data, args)
    train(accelerator, Stage1Objective(model, processor), model, processor, dataset, loop, skipped)


if __name__ == "__main__":
    main()
