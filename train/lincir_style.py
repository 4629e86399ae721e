"""A baseline of stage I that sees no picture: a mapper trained on captions alone, as LinCIR's (arXiv 2312.01998).

    accelerate launch train/lincir_style.py --model_name_or_path CLIP --dataset_name CAPTIONS --output_dir runs/lincir

A caption's embedding, with noise, is mapped to a pseudo-word; in the caption it takes the place of every run of
content words; what is then read should be the caption again. Pictures' embeddings take the captions' place afterwards.
Written from the paper's description; content words are those that are no function words, where it has a tagger.
"""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from arguments import DataArguments, LoopArguments, parse_arguments, run_as_script
from caption_pairs import WORD
from gradients import Objective
from loop import make_accelerator, train
from rows import RowBatches, load_rows
from synthesize import FUNCTION_WORDS

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_texts


@dataclass
class LincirArguments:
    """Columns, and choices of the method."""

    caption_column: str = field(default="caption", metadata={"help": "Column of captions."})
    num_pseudo_words: int = field(default=1, metadata={"help": "M, pseudo-words an image."})
    noise_scale: float = field(
        default=1.0, metadata={"help": "Noise is uniform times Gaussian, times this, per entry of unit size."}
    )

    def __post_init__(self):
        if self.noise_scale < 0:
            raise ValueError(f"--noise_scale must not be negative, but is {self.noise_scale}")


def masked(caption: str, most: int) -> list[str | None]:
    """The caption with None for each run of content words, of the first `most` of them; at least one."""
    content: list[str | None] = []
    end = 0
    for word in WORD.finditer(caption):
        between = caption[end : word.start()]
        end = word.end()
        is_content = word.group().lower() not in FUNCTION_WORDS
        if is_content and content and content[-1] is None and not between.strip():
            continue
        is_content = is_content and content.count(None) < most
        if is_content:
            content += [between, None] if between.strip() else [None]
        elif content and content[-1] is not None:
            content[-1] += between + word.group()
        else:
            content.append(between + word.group())
    if caption[end:].strip():
        content.append(caption[end:])
    return content if None in content else [None, *content]


def most_runs(processor: TSCIRProcessor) -> int:
    """How many times pseudo-words fit into what the text tower reads, where prompts have no words of their own."""
    return (processor.max_length - 2) // processor.num_pseudo_words


class Captions(torch.utils.data.Dataset):
    """Captions as embeddings [B, D] and as prompts: {"caption_embeds", "input_ids" and "pseudo_mask" [B, L]}."""

    def __init__(self, captions: list[str], model: TSCIRModel, processor: TSCIRProcessor):
        self.contents = [masked(caption, most_runs(processor)) for caption in captions]
        self.embeds = embed_texts(model, processor, captions, progress="captions")
        self.processor = processor

    def __len__(self) -> int:
        return len(self.contents)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        prompts = self.processor.compose_contents([self.contents[i] for i in rows])
        batch = {name: prompts[name] for name in ("input_ids", "pseudo_mask")}
        return {"caption_embeds": self.embeds[torch.tensor(rows)], **batch}


class LincirObjective(Objective):
    """Squared distance between a caption's embedding and that of the caption with pseudo-words in it."""

    target = reference = "caption_embeds"

    def __init__(self, model: TSCIRModel, noise_scale: float):
        super().__init__(model)
        self.noise_scale = noise_scale

    def frozen(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        captions, mask = features["caption_embeds"].to(self.model.dtype), features["pseudo_mask"]
        strength = torch.rand(len(captions), 1, device=captions.device) * self.noise_scale
        # Entries of an L2-normalised vector are of size 1 / sqrt(D).
        noise = strength * torch.randn_like(captions) / captions.shape[-1] ** 0.5
        words = self.model.get_pseudo_words(captions + noise)  # [B, M, d_t]
        times = mask.sum(1) // words.shape[1]
        repeated = words.repeat_interleave(times, dim=0).flatten(0, 1).unsqueeze(0)  # every place, row by row
        return self.model.encode_with_pseudo_words(features["input_ids"], mask, repeated).float()

    def loss(self, queries: torch.Tensor, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        similarity = (queries * features["caption_embeds"].float()).sum(-1)
        return {"loss": (2 - 2 * similarity).mean(), "caption_similarity": similarity.mean()}


def plain_start(data: DataArguments, num_pseudo_words: int) -> tuple[TSCIRModel, TSCIRProcessor, TSCIRProcessor]:
    """A model whose mapper will be a plain MLP, its processor, and one whose prompts have no words of their own.

    Raises:
        ValueError: for `validation_rows`, which these baselines hold out none of.
    """
    if data.validation_rows:
        raise ValueError("--validation_rows is for train/stage1.py and stage2.py; this baseline is not validated")
    clip = data.model_name_or_path
    choices = {"num_pseudo_words": num_pseudo_words, "num_injection_blocks": 0, "soft_alignment_weight": 0.0}
    choices |= {"residual": 0.0, "composed_weight": 0.0}  # queries as published
    model = TSCIRModel.from_clip_pretrained(clip, **choices)
    words = {"image_template": "a photo of {image}", "prompt_template": "a photo of {image} that {text}"}
    processor, bare = (TSCIRProcessor.from_clip_pretrained(clip, num_pseudo_words, **kept) for kept in (words, {}))
    return model, processor, bare


def main() -> None:
    loop, data, args = parse_arguments(
        LoopArguments,
        DataArguments,
        LincirArguments,
        description=__doc__,
        required=("model_name_or_path", "dataset_name", "output_dir"),
    )
    accelerator: Accelerator = make_accelerator(loop, data, args)
    model, processor, bare = plain_start(data, args.num_pseudo_words)
    rows, skipped = load_rows(data, {args.caption_column: "the caption"}, images=[])
    model.add_mapper()
    model.to(accelerator.device)
    captions = list(rows[args.caption_column])
    batches = RowBatches(accelerator, Captions(captions, model, bare), loop, skipped=skipped, content=captions)
    objective = LincirObjective(model, args.noise_scale)
    train(accelerator, objective, model, processor, batches, loop, vars(data) | vars(args))


if __name__ == "__main__":
    run_as_script(main)
