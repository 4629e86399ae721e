"""A baseline of stage I in two steps, as SEARLE's (arXiv 2303.15247): words found picture by picture, then distilled.

    accelerate launch train/searle_style.py --model_name_or_path CLIP --dataset_name CAPTIONS --output_dir runs/searle

First, for some of the pictures, the pseudo-word is sought by gradient descent that makes "a photo of S*" read as the
picture, and the picture's caption with S* for its content words read as the caption, where the paper has phrases of a
language model. Then a mapper learns to give these words, by contrast. Written from the paper's description.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from arguments import DataArguments, LoopArguments, parse_arguments, run_as_script
from gradients import Objective, gather_with_gradient
from lincir_style import masked, most_runs, plain_start
from loop import make_accelerator, train
from rows import RowBatches, load_rows
from tqdm.auto import tqdm

from modeling_tscir import TSCIRModel, TSCIRProcessor
from modeling_tscir.embedding import embed_images, embed_texts
from modeling_tscir.losses import info_nce_loss


@dataclass
class SearleArguments:
    """Columns, and choices of the method."""

    image_column: str = field(default="image", metadata={"help": "Column of pictures."})
    caption_column: str = field(default="caption", metadata={"help": "Column of captions."})
    num_pseudo_words: int = field(default=1, metadata={"help": "M, pseudo-words an image."})
    inverted_images: int = field(default=1000, metadata={"help": "Pictures whose words are sought."})
    inversion_steps: int = field(default=20, metadata={"help": "Steps of the search, of all these pictures."})
    inversion_learning_rate: float = field(default=0.02, metadata={"help": "AdamW's, in the search."})
    caption_weight: float = field(default=0.5, metadata={"help": "Of the caption's loss beside the picture's."})
    distillation_scale: float = field(default=4.0, metadata={"help": "1 / temperature of the distillation."})

    def __post_init__(self):
        for name in ("num_pseudo_words", "inverted_images", "inversion_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")


def invert(
    model: TSCIRModel,
    processor: TSCIRProcessor,
    image_embeds: torch.Tensor,
    captions: list[str],
    args: SearleArguments,
    batch_size: int = 256,
) -> torch.Tensor:
    """Pseudo-words [N, M, d_t] of images [N, D] and their captions, by gradient descent on the words alone.

    `processor` composes bare contents, without words of its own.
    """
    model.requires_grad_(False)
    caption_embeds = embed_texts(model, processor, captions)
    table = model.clip.text_model.embeddings.token_embedding.weight
    generator = torch.Generator().manual_seed(0)
    shape = len(captions), args.num_pseudo_words, table.shape[1]
    start = table.mean(0).cpu() + table.std().item() * torch.randn(shape, generator=generator)
    found = []
    for rows in tqdm(torch.arange(len(captions)).split(batch_size), desc="inversion", unit="batch"):
        words = start[rows].to(model.device).requires_grad_()
        optimizer = torch.optim.AdamW([words], lr=args.inversion_learning_rate, weight_decay=0.01)
        wanted = [embeds[rows].to(model.device) for embeds in (image_embeds, caption_embeds)]
        prompts = [
            processor.compose_contents([["a photo of", None] for _ in rows]),
            processor.compose_contents([masked(captions[i], most_runs(processor)) for i in rows]),
        ]
        for _ in range(args.inversion_steps):
            image_loss, caption_loss = (
                (1 - (read(model, prompt, words) * target).sum(-1)).sum()
                for prompt, target in zip(prompts, wanted, strict=True)
            )
            (image_loss + args.caption_weight * caption_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(words.detach().cpu())
    return torch.cat(found)


def read(model: TSCIRModel, prompt: dict[str, torch.Tensor], words: torch.Tensor) -> torch.Tensor:
    """Sentences [B, D] with each row's words [B, M, d_t] at every one of its places."""
    ids, mask = (prompt[name].to(words.device) for name in ("input_ids", "pseudo_mask"))
    repeated = words.repeat_interleave(mask.sum(1) // words.shape[1], dim=0).flatten(0, 1).unsqueeze(0)
    return model.encode_with_pseudo_words(ids, mask, repeated)


class InvertedImages(torch.utils.data.Dataset):
    """{"image_embeds" [B, D], "words" [B, M * d_t]}."""

    def __init__(self, image_embeds: torch.Tensor, words: torch.Tensor):
        self.image_embeds, self.words = image_embeds, words.flatten(1)

    def __len__(self) -> int:
        return len(self.words)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        index = torch.tensor(rows)
        return {"image_embeds": self.image_embeds[index], "words": self.words[index]}


class DistillationObjective(Objective):
    """Symmetric InfoNCE between the words that the mapper gives and those that were found."""

    target, reference = "words", "image_embeds"

    def __init__(self, model: TSCIRModel, scale: float):
        super().__init__(model)
        self.scale = scale

    def frozen(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model.get_pseudo_words(features["image_embeds"].to(self.model.dtype)).flatten(1).float()

    def loss(self, queries: torch.Tensor, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given, found = gather_with_gradient(queries), gather_with_gradient(features["words"].float())
        directions = F.normalize(given, dim=-1), F.normalize(found, dim=-1)
        contrast = info_nce_loss(*directions, self.scale)
        # Contrast leaves their length open, and the text tower reads it.
        length = (given.norm(dim=-1) - found.norm(dim=-1)).square().mean()
        similarity = (directions[0] * directions[1]).sum(-1).mean()
        return {"loss": contrast + length, "length_loss": length, "similarity": similarity}


def main() -> None:
    loop, data, args = parse_arguments(
        LoopArguments,
        DataArguments,
        SearleArguments,
        description=__doc__,
        required=("model_name_or_path", "dataset_name", "output_dir"),
    )
    accelerator: Accelerator = make_accelerator(loop, data, args)
    model, processor, bare = plain_start(data, args.num_pseudo_words)
    columns = {args.image_column: "the picture", args.caption_column: "its caption"}
    rows, skipped = load_rows(data, columns, images=[args.image_column])
    rows = rows.shuffle(seed=loop.seed).select(range(min(args.inverted_images, len(rows))))
    model.to(accelerator.device)
    embeds = embed_images(model, processor, rows[args.image_column], data.feature_batch_size, progress="images")
    captions = list(rows[args.caption_column])
    words = invert(model, bare, embeds, captions, args)
    model.add_mapper()
    batches = RowBatches(accelerator, InvertedImages(embeds, words), loop, skipped=skipped, content=captions)
    objective = DistillationObjective(model, args.distillation_scale)
    train(accelerator, objective, model, processor, batches, loop, vars(data) | vars(args))


if __name__ == "__main__":
    run_as_script(main)
