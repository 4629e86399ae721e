"""Stage I: train the pseudo-word mapper on captioned images, with CLIP frozen.

    accelerate launch train/stage1.py --model_name_or_path openai/clip-vit-large-patch14 \\
        --dataset_name user/captions --output_dir runs/stage1

Rows need a picture and a caption. `--num_injection_blocks 0 --soft_alignment_weight 0` trains the plain MLP baseline.
"""

import functools
from dataclasses import dataclass, field

import shared
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from arguments import DataArguments, LoopArguments, parse_arguments, run_as_script
from datasets import Dataset
from gradients import Objective, bf16_where_fast, gather_with_gradient, precision
from loop import make_accelerator, train
from rows import RowBatches, first_of_each, hold_out, in_batches, load_rows, text_problem
from stream import Examples, StreamBatches, hold_out_shard, load_stream, shard_batches
from validation import Validation

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import TEXTS_A_BATCH, embed_images, embed_images_with_patches, embed_texts
from modeling_tscir.feature_cache import feature_key, picture_name, pictures_digest, tokenizer_of
from modeling_tscir.images import load_image
from modeling_tscir.losses import info_nce_loss, soft_alignment_loss
from modeling_tscir.processing_tscir import IMAGE_TEMPLATE, PROMPT_TEMPLATE


TEMPLATES = "image_template", "prompt_template"  # the processor's, not the model's


@dataclass
class Stage1Arguments:
    """Columns, and choices of the method; None takes TSCIRConfig's default."""

    image_column: str = field(default="image", metadata={"help": "Column of pictures."})
    caption_column: str = field(default="caption", metadata={"help": "Column of captions."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the data as it comes, without storing any of it; needs --max_steps."}
    )
    shuffle_buffer_size: int = field(
        default=4096, metadata={"help": "Rows that a worker of a stream holds, encoded, and shuffles together."}
    )
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
    residual: float | None = field(
        default=None, metadata={"help": "How much of v(x) - q(x) the trained model's queries have."}
    )
    composed_weight: float | None = field(
        default=None, metadata={"help": "How far the trained model's queries stand towards the text."}
    )
    image_template: str = field(
        default=IMAGE_TEMPLATE, metadata={"help": "The sentence that pseudo-words are trained in."}
    )
    prompt_template: str = field(
        default=PROMPT_TEMPLATE,
        metadata={"help": "Of the trained model's composed queries, and of stage II unless it is told another."},
    )

    def choices(self) -> dict:
        others = {"image_column", "caption_column", "streaming", "shuffle_buffer_size", *TEMPLATES}
        return {k: v for k, v in vars(self).items() if k not in others and v is not None}


class Stage1Data(torch.utils.data.Dataset):
    """Rows as frozen features: u(c) always, v(x) and P(x) unless patch states are needed and exceed their budget.

    A batch of B rows is {"caption_embeds" [B, D]} and either {"image_embeds" [B, D]}, with "patch_states"
    [B, N, d_v] (bf16) if the mapper needs them, or {"pixel_values" [B, 3, H, W]}, from which `Stage1Objective.frozen`
    computes both.
    """

    def __init__(
        self, rows: Dataset, model: TSCIRModel, processor: TSCIRProcessor, data: DataArguments, args: Stage1Arguments
    ):
        self.images, self.processor = rows[args.image_column], processor
        vision = model.config.clip_config.vision_config
        num_patches = (vision.image_size // vision.patch_size) ** 2
        needed_gb = len(rows) * num_patches * vision.hidden_size * 2 / 2**30
        self.image_embeds = self.patch_states = None
        folder, size = data.feature_cache_dir, data.feature_batch_size
        captions, keys = list(rows[args.caption_column]), ["", ""]
        if folder is not None:
            contents = [[pictures_digest(self.images)], ["texts", tokenizer_of(processor), captions]]
            keys = [feature_key(model, processor, [*content, precision(model)]) for content in contents]
        if not model.mapper.needs_patches:
            self.image_embeds = shared.cached(
                folder, keys[0], lambda: shared.features(embed_images, model, processor, self.images, size, "images")
            )
        elif needed_gb <= data.feature_cache_gb:
            both = functools.cache(
                lambda: shared.features(embed_images_with_patches, model, processor, self.images, size, "images")
            )
            self.image_embeds = shared.cached(folder, keys[0], lambda: both()[0])
            self.patch_states = shared.cached(folder, f"{keys[0]}-patches", lambda: both()[1])
        self.caption_embeds = shared.cached(
            folder,
            keys[1],
            lambda: shared.features(embed_texts, model, processor, captions, TEXTS_A_BATCH, "captions"),
        )

    def __len__(self) -> int:
        return len(self.caption_embeds)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        index = torch.tensor(rows)
        batch = {"caption_embeds": self.caption_embeds[index]}
        if self.image_embeds is None:
            return batch | {"pixel_values": self.processor.pixel_values([self.images[i] for i in rows])}
        batch["image_embeds"] = self.image_embeds[index]
        if self.patch_states is not None:
            batch["patch_states"] = self.patch_states[index]
        return batch


class CaptionedImages(Examples):
    """How a stream's examples become a batch: {"pixel_values" [B, 3, H, W], "input_ids", "attention_mask" [B, L]}."""

    def __init__(self, processor: TSCIRProcessor, args: Stage1Arguments):
        self.processor, self.image, self.caption = processor, args.image_column, args.caption_column

    def decode(self, example: dict) -> str | None:
        """Decode the picture in place; why the example cannot be used, or None."""
        if problem := text_problem(example[self.caption], self.caption):
            return problem
        if example[self.image] is None:
            return f"nothing in column {self.image}; has the shard another name for it?"
        try:
            example[self.image] = load_image(example[self.image])
        except ValueError as error:
            return str(error)
        return None

    def make_batch(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        texts = self.processor.tokenize([example[self.caption] for example in examples])
        return {"pixel_values": self.processor.pixel_values([example[self.image] for example in examples]), **texts}


class Stage1Objective(Objective):
    """L = L_img + lambda_soft L_soft, over the batch of all processes."""

    target = reference = "image_embeds"

    def __init__(self, model: TSCIRModel, processor: TSCIRProcessor):
        super().__init__(model)
        self.prompt = processor.compose([""])

    @torch.no_grad()
    def frozen(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """v(x) [B, D], P(x) [B, N, d_v] (bf16) where the mapper needs them, and u(c) [B, D]."""
        features = {k: v for k, v in batch.items() if k in ("image_embeds", "patch_states", "caption_embeds")}
        if "pixel_values" in batch:
            features["image_embeds"], patches = self.model.encode_image(batch["pixel_values"].to(self.model.dtype))
            if self.model.mapper.needs_patches:
                features["patch_states"] = patches.bfloat16()
        if "input_ids" in batch:
            texts = self.model.get_text_features(batch["input_ids"], batch["attention_mask"])
            features["caption_embeds"] = F.normalize(texts.float(), dim=-1)
        return features

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        images, patches = features["image_embeds"].to(self.model.dtype), features.get("patch_states")
        words = self.model.get_pseudo_words(images, None if patches is None else patches.to(self.model.dtype))
        ids, mask = (self.prompt[k].to(images.device).expand(len(images), -1) for k in ("input_ids", "pseudo_mask"))
        return self.model.encode_with_pseudo_words(ids, mask, words).float()  # q(x): [B, D]

    def loss(self, queries: torch.Tensor, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        config = self.model.config
        pseudo, images, captions = (
            gather_with_gradient(x.float()) for x in (queries, features["image_embeds"], features["caption_embeds"])
        )
        terms = {"image_loss": info_nce_loss(pseudo, images, self.logit_scale)}
        loss = terms["image_loss"]
        if config.soft_alignment_weight > 0:
            terms["soft_alignment_loss"] = soft_alignment_loss(
                pseudo, images, captions, config.soft_alignment_temperature
            )
            loss = loss + config.soft_alignment_weight * terms["soft_alignment_loss"]
        terms["image_similarity"] = (pseudo * images).sum(-1).mean()
        terms["caption_similarity"] = (pseudo * captions).sum(-1).mean()
        return {"loss": loss, **terms}


def main() -> None:
    loop, data, args = parse_arguments(
        LoopArguments,
        DataArguments,
        Stage1Arguments,
        description=__doc__,
        required=("model_name_or_path", "dataset_name", "output_dir"),
    )
    if args.shuffle_buffer_size < 1:
        raise ValueError(f"--shuffle_buffer_size must be at least 1, not {args.shuffle_buffer_size}")
    if args.streaming and loop.max_steps <= 0:
        raise ValueError("a stream has no known length: say how long to train, --max_steps")
    accelerator = make_accelerator(loop, data, args)
    model = TSCIRModel.from_clip_pretrained(data.model_name_or_path, **args.choices())
    processor = TSCIRProcessor.from_clip_pretrained(
        data.model_name_or_path, model.config.num_pseudo_words, **{name: getattr(args, name) for name in TEMPLATES}
    )
    model.add_mapper()
    model.to(accelerator.device)
    objective = Stage1Objective(model, processor)
    prepare = stream_data if args.streaming else row_data
    with bf16_where_fast(model.device, asked=loop.mixed_precision == "bf16"):
        batches, held_out = prepare(accelerator, model, processor, loop, data, args)
        validation = Validation(objective, *held_out) if held_out and accelerator.is_main_process else None
    train(accelerator, objective, model, processor, batches, loop, vars(data) | vars(args), validation)


def row_data(
    accelerator: Accelerator,
    model: TSCIRModel,
    processor: TSCIRProcessor,
    loop: LoopArguments,
    data: DataArguments,
    args: Stage1Arguments,
) -> tuple[RowBatches, tuple | None]:
    """Batches of a dataset of known size, and what `Validation` takes of the rows held out."""
    columns = {args.image_column: "the picture", args.caption_column: "its caption"}
    rows, skipped = load_rows(data, columns, images=[args.image_column])
    names = [picture_name(picture) for picture in rows[args.image_column]] if data.validation_rows else None
    rows, held_out = hold_out(rows, data.validation_rows, loop.seed, names)
    dataset = Stage1Data(rows, model, processor, data, args)
    batches = RowBatches(accelerator, dataset, loop, skipped=skipped, content=list(rows[args.caption_column]))
    if held_out is None:
        return batches, None
    watched = Stage1Data(held_out, model, processor, data, args)  # in all processes, which share the work
    pictures = first_of_each([picture_name(picture) for picture in held_out[args.image_column]])
    return batches, (in_batches(watched, data.feature_batch_size), pictures * 2)


def stream_data(
    accelerator: Accelerator,
    model: TSCIRModel,
    processor: TSCIRProcessor,
    loop: LoopArguments,
    data: DataArguments,
    args: Stage1Arguments,
) -> tuple[StreamBatches, tuple | None]:
    """Batches of a stream, and what `Validation` takes of the shard held out."""
    columns = {args.image_column: "the picture", args.caption_column: "its caption"}
    rows, examples = load_stream(data, columns, images=[args.image_column]), CaptionedImages(processor, args)
    shards, held_out = list(range(rows.num_shards)), None
    if data.validation_rows > 0:
        held_out = hold_out_shard(rows, loop.seed)
        shards.remove(held_out)
    batches = StreamBatches(accelerator, rows, shards, examples, loop, args.shuffle_buffer_size, data.on_bad_image)
    if held_out is None or not accelerator.is_main_process:
        return batches, None
    watched = shard_batches(rows, held_out, data.validation_rows, examples, data.feature_batch_size, data.on_bad_image)
    return batches, (watched,)


if __name__ == "__main__":
    run_as_script(main)
