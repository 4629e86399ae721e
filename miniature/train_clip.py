"""Train the small CLIP that stands in for OpenAI's, on captions of drawn scenes and garments.

Three passes, about 90 minutes on two CPU cores: pictures and captions; then captions that tell of changes as well,
since the language of modifications must be learned somewhere; then the text tower alone, on the same.

    train="python -m miniature.train_clip"
    $train --output_dir runs/clip/1 --change_share 0 --bf16
    again="--learning_rate 5e-4 --warmup_steps 50 --bf16"
    $train --output_dir runs/clip/2 --init_from runs/clip/1 $again --max_steps 1300 --seed 1
    $train --output_dir modeling_tscir/miniature_clip --init_from runs/clip/2 $again --max_steps 2500 --seed 2 \
        --freeze_vision

The weights are rounded to fp16 and stored once, in the package; the random draws have changed since. The val world's
caption oracle (a picture's full caption finds it among the val gallery) is logged on the way, by kind of edit.

A second CLIP, for comparison, comes from the stored one in an hour more, or six minutes on a GPU, on sets of pictures
that differ in nothing but shapes and places, which the stored one hardly sees; `python -m miniature.demo --clip` and
`eval/ablation.py --clip` take it.

    $train --output_dir runs/sharp_clip --init_from modeling_tscir/miniature_clip --num_groups 9000 --num_sets 4500 \
        --num_garments 5000 --change_share 0.4 --learning_rate 8e-4 --warmup_steps 100 --max_steps 2400 --seed 7
"""

import argparse
import itertools
import math
import random
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from miniature.garment_language import garment_caption
from miniature.garments import Garment
from miniature.language import change_caption, full_caption, modification, scene_caption
from miniature.render import IMAGE_SIZE, render
from miniature.scenes import Edit, Scene
from miniature.worlds import FURTHER, lookalike_sets, scene_worlds, training_garments, training_groups
from modeling_tscir.losses import info_nce_loss


GROUP_SIZE, LOOKALIKES = 4, 8
VOCAB_SIZE = 800


class Composition(NamedTuple):
    """How many of each make a batch: groups of near-duplicates, sets of look-alikes, loose scenes, garments."""

    groups: int
    lookalike_sets: int
    loose: int
    garments: int


EDITS = Composition(groups=32, lookalike_sets=0, loose=96, garments=32)
SHAPES_AND_PLACES = Composition(groups=12, lookalike_sets=12, loose=32, garments=16)


def small_tokenizer() -> CLIPTokenizer:
    """CLIP's kind of byte-level BPE, its merges learned from the training world's captions and modifications."""
    rng = random.Random("vocabulary")
    groups = itertools.islice(training_groups("vocabulary", for_triplets=True), 3000)
    texts = [modification(g.reference, e, "train", rng) for g in groups for e in g.edits]
    scenes = (s for g in itertools.islice(training_groups("vocabulary", for_triplets=False), 3000) for s in g.scenes)
    texts += [scene_caption(s, rng) for s in scenes]
    texts += [garment_caption(g, rng) for g in itertools.islice(training_garments("vocabulary"), 5000)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2 - len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    learned = bpe.get_vocab()
    merges = sorted(_merges(bpe), key=lambda pair: learned["".join(pair)])
    # Every byte, alone and at a word's end, so that any text has tokens; then the merges; then start and end.
    pieces = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet)])
    pieces |= dict.fromkeys("".join(pair) for pair in merges)
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def small_clip(vocab_size: int, attention: str) -> CLIPModel:
    tower = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    ends = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
    config = CLIPConfig(
        text_config={**tower, **ends, "vocab_size": vocab_size, "max_position_embeddings": 77},
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 8},
        projection_dim=192,
    )
    return CLIPModel._from_config(config, attn_implementation=attention)


def small_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


class Batches:
    """Batches in which half of the pictures or more are nearly alike, so that details have to be read.

    Args:
        num_groups: of a reference and three of its near-duplicates.
        num_sets: of eight pictures that differ in nothing but which shapes they show and where.
        change_share: of edited near-duplicates, told as a change.
    """

    def __init__(self, num_groups: int, num_sets: int, num_garments: int, change_share: float, seed: int):
        self.change_share = change_share
        self.composition = SHAPES_AND_PLACES if num_sets else EDITS
        self.rng = random.Random(seed)
        self.things: list[Scene | Garment] = []
        self.changes: dict[int, tuple[Scene, Edit]] = {}  # how a picture came from another scene, by its place
        groups = training_groups(f"clip {seed}", for_triplets=False, further=tuple(FURTHER))
        for group in itertools.islice(groups, num_groups):
            self.things.append(group.reference)
            for scene in self.rng.sample(group.scenes[1:], GROUP_SIZE - 1):
                if scene in group.targets:
                    edit = group.edits[group.targets.index(scene)]
                    self.changes[len(self.things)] = (group.reference, edit)
                self.things.append(scene)
        self.num_grouped = len(self.things)
        for scenes in itertools.islice(lookalike_sets(f"clip {seed}", further=tuple(FURTHER)), num_sets):
            self.things += scenes
        self.num_scenes = len(self.things)
        self.things += itertools.islice(training_garments(f"clip {seed}"), num_garments)
        self.pixels = np.stack([render(thing, f"clip {seed} {i}") for i, thing in enumerate(self.things)])

    def caption(self, i: int, change_share: float, **shares) -> str:
        if change_share and i in self.changes and self.rng.random() < change_share:
            return change_caption(*self.changes[i], self.rng)
        return scene_caption(self.things[i], self.rng, **shares)

    def next(self) -> tuple[list[int], list[str]]:
        """Places of the pictures, and their captions."""
        rng, wanted = self.rng, self.composition
        firsts = rng.sample(range(0, self.num_grouped, GROUP_SIZE), wanted.groups)
        hard = [first + i for first in firsts for i in range(GROUP_SIZE)]
        firsts = rng.sample(range(self.num_grouped, self.num_scenes, LOOKALIKES), wanted.lookalike_sets)
        alike = [first + i for first in firsts for i in range(LOOKALIKES)]
        loose = rng.sample(range(self.num_scenes), wanted.loose)
        garments = rng.sample(range(self.num_scenes, len(self.things)), wanted.garments)
        texts = [self.caption(i, self.change_share, full_share=0.6, clause_share=0.15) for i in hard]
        texts += [self.caption(i, 0, full_share=0.85, clause_share=0.05) for i in alike]
        texts += [self.caption(i, 0.75 * self.change_share) for i in loose]
        texts += [garment_caption(self.things[i], rng) for i in garments]
        return [*hard, *alike, *loose, *garments], texts


def to_pixel_values(pixels: np.ndarray, processor: CLIPImageProcessorPil) -> torch.Tensor:
    """What `processor` gives for pictures that already have its size, [B, 3, H, W]."""
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return (scaled - mean) / std


@torch.no_grad()
def image_features(model: CLIPModel, pixels: np.ndarray, processor: CLIPImageProcessorPil) -> torch.Tensor:
    """L2-normalised embeddings [n, D] of pictures [n, H, W, 3]."""
    batches = (to_pixel_values(pixels[start : start + 256], processor) for start in range(0, len(pixels), 256))
    features = [model.get_image_features(pixel_values=batch.to(model.device)).pooler_output for batch in batches]
    return F.normalize(torch.cat(features).float(), dim=-1)


def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str], rows: int = 96) -> torch.Tensor:
    """L2-normalised embeddings [n, D], run with others of about their length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    for start in range(0, len(order), rows):
        encoded = tokenizer([texts[i] for i in order[start : start + rows]], padding=True, return_tensors="pt")
        ids = encoded.input_ids.to(model.device)
        parts.append(model.get_text_features(input_ids=ids).pooler_output.float())
    return F.normalize(torch.cat(parts)[torch.tensor(order).argsort()], dim=-1)


@torch.no_grad()
def caption_oracle(model, tokenizer, processor, world: str) -> dict[str, float]:
    """R@1 of the full captions of `world`'s edited pictures among all of its pictures; and by kind of edit."""
    groups, fillers = scene_worlds()[world]
    gallery = [s for g in groups for s in g.scenes] + list(fillers)
    wanted = [full_caption(s) for g in groups for s in g.targets]
    truth = [i * 9 + 1 + j for i in range(len(groups)) for j in range(4)]
    images = image_features(model, np.stack([render(s, f"{world} {i}") for i, s in enumerate(gallery)]), processor)
    texts = text_features(model, tokenizer, wanted)
    right = ((texts @ images.T).argmax(1).cpu() == torch.tensor(truth)).float()
    kinds = np.array([edit.kind for group in groups for edit in group.edits])
    return {"all": right.mean().item()} | {kind: right[kinds == kind].mean().item() for kind in sorted(set(kinds))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_steps", type=int, default=2600)
    parser.add_argument("--num_groups", type=int, default=16_000)
    parser.add_argument("--num_sets", type=int, default=0, help="of look-alikes, which make half of each batch if any")
    parser.add_argument("--num_garments", type=int, default=12_000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warmup_steps", type=int, default=150)
    parser.add_argument("--change_share", type=float, default=0.8, help="of edited near-duplicates, told as a change")
    parser.add_argument("--bf16", action="store_true", help="faster with AMX or AVX512_BF16, slower without")
    parser.add_argument("--freeze_vision", action="store_true", help="train the text tower alone")
    parser.add_argument("--init_from", help="a folder of this script's to start from, instead of random weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer, processor = small_tokenizer(), small_image_processor()
    # Eager attention is about twice as fast as sdpa at this size under bf16 autocast, and slower in fp32.
    attention = "eager" if args.bf16 else "sdpa"
    model = small_clip(len(tokenizer), attention)
    if args.init_from:
        model = CLIPModel.from_pretrained(args.init_from, dtype=torch.float32, attn_implementation=attention)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    model.vision_model.requires_grad_(not args.freeze_vision)
    model.visual_projection.requires_grad_(not args.freeze_vision)
    batches = Batches(args.num_groups, args.num_sets, args.num_garments, args.change_share, args.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    rest = [p for p in trained if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )

    def rate(step: int) -> float:
        if step < args.warmup_steps:
            return (step + 1) / args.warmup_steps
        done = (step - args.warmup_steps) / (args.max_steps - args.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = time.time()
    frozen_images = image_features(model, batches.pixels, processor) if args.freeze_vision else None
    for step in range(1, args.max_steps + 1):
        places, texts = batches.next()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            if frozen_images is None:
                pixels = to_pixel_values(batches.pixels[places], processor).to(model.device)
                images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
            else:
                images = frozen_images[places]
            texts = text_features(model, tokenizer, texts)
        loss = info_nce_loss(texts, images, model.logit_scale.exp())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % 50 == 0:
            line = f"step {step} loss {loss.item():.3f} scale {model.logit_scale.exp().item():.1f}"
            print(f"{line} seconds {time.time() - start:.0f}", flush=True)
        if step % 400 == 0 or step == args.max_steps:
            found = caption_oracle(model, tokenizer, processor, "val")
            figures = ", ".join(f"{name} {100 * share:.1f}" for name, share in found.items())
            print(f"step {step} val caption oracle R@1: {figures}", flush=True)
            model.save_pretrained(args.output_dir)
    model.half().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
