"""The public repositories' way of working, written anew from what they do, with each lever to be switched by itself.

Pic2Word, SEARLE, LinCIR and CLIP4CIR compute in fp32 on a CPU, decode in a DataLoader's processes, pad every text to
CLIP's 77 tokens, and rank a gallery by sorting all of it and looking up the names of the whole ranking. Pic2Word's
training runs the frozen vision tower on every step; CLIP4CIR's fine-tuning runs it on reference and target and trains
the whole text tower; LinCIR trains on captions alone, reading each twice.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, CLIPModel


LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Levers:
    """What is done our way; all off is the peers' way.

    Args:
        short_texts: texts are padded to the longest of their batch.
        bf16: the towers compute in bf16.
        cached: frozen features of pictures were computed before.
        adapters: LoRA of the text tower is trained, not its own weights.
        partial_sort: the best are selected, not all sorted.
        few_names: names are looked up for what is returned, not for the whole ranking.
    """

    short_texts: bool = False
    bf16: bool = False
    cached: bool = False
    adapters: bool = False
    partial_sort: bool = False
    few_names: bool = False


def preprocess(path: str) -> torch.Tensor:
    """CLIP's transform [3, 224, 224]: shorter side to 224 by bicubic interpolation, the centre, mean and deviation."""
    image = Image.open(path)
    scale = 224 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    image = image.crop((left, top, left + 224, top + 224)).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class Pictures(torch.utils.data.Dataset):
    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        return preprocess(self.paths[row])


class Peer(nn.Module):
    """A CLIP, a mapper of three linear layers to one pseudo-word, and a text tower that takes it at "*"."""

    def __init__(self, clip: Path, levers: Levers):
        super().__init__()
        self.levers = levers
        self.clip = CLIPModel.from_pretrained(clip).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(clip)
        width, words = self.clip.config.projection_dim, self.clip.config.text_config.hidden_size
        self.mapper = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, words),
        )
        if levers.bf16:
            self.clip.bfloat16()

    def tokens(self, texts: list[str]) -> torch.Tensor:
        """Ids [B, 77], or [B, L] with short texts."""
        padding = True if self.levers.short_texts else "max_length"
        return self.tokenizer(texts, padding=padding, max_length=77, truncation=True, return_tensors="pt").input_ids

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.clip.get_image_features(pixel_values=pixels.to(self.clip.dtype)).pooler_output
        return F.normalize(features.float(), dim=-1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        return F.normalize(self.clip.get_text_features(input_ids=self.tokens(texts)).pooler_output.float(), dim=-1)

    def composed(self, words: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Sentences [B, D] "a photo of *, TEXT", a pseudo-word [B, d_t] in the star's place."""
        ids, tower = self.tokens([f"a photo of * {text}" for text in texts]), self.clip.text_model
        embeds = tower.embeddings.token_embedding(ids)
        embeds = torch.cat([embeds[:, :4], words[:, None].to(embeds.dtype), embeds[:, 5:]], dim=1)
        causal = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None].to(embeds.dtype)
        hidden = tower.encoder(inputs_embeds=tower.embeddings(inputs_embeds=embeds), attention_mask=causal)
        hidden = tower.final_layer_norm(hidden.last_hidden_state)
        ends = (ids == self.tokenizer.eos_token_id).int().argmax(-1)
        return F.normalize(self.clip.text_projection(hidden[torch.arange(len(ids)), ends]).float(), dim=-1)

    @torch.no_grad()
    def queries(self, paths: list[str], texts: list[str]) -> torch.Tensor:
        """Composed queries [B, D] from files and texts."""
        return self.composed(self.mapper(self.images(torch.stack([preprocess(path) for path in paths]))), texts)

    @torch.no_grad()
    def gallery(self, paths: list[str], batch_size: int) -> torch.Tensor:
        """Embeddings [N, D] of files."""
        loader = torch.utils.data.DataLoader(Pictures(paths), batch_size=batch_size, num_workers=os.cpu_count() or 1)
        return torch.cat([self.images(pixels) for pixels in loader])


def ranked(queries: torch.Tensor, gallery: torch.Tensor, names: np.ndarray, k: int, levers: Levers) -> np.ndarray:
    """Names [Q, k] of the best."""
    distances = 1 - queries @ gallery.T
    if levers.partial_sort:
        order = distances.topk(k, dim=-1, largest=False).indices
    else:
        order = torch.argsort(distances, dim=-1)
    return names[order[:, :k].numpy()] if levers.few_names else names[order.numpy()][:, :k]


def contrastive(first: torch.Tensor, second: torch.Tensor, scale: float = 100.0) -> torch.Tensor:
    """Symmetric InfoNCE of rows [B, D]."""
    logits = scale * first @ second.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Pic2WordStep:
    """Stage I: the mapper's pseudo-word in "a photo of *" should read as the picture."""

    def __init__(self, peer: Peer, pixels: torch.Tensor):
        self.peer, self.pixels = peer, pixels
        self.optimizer = torch.optim.AdamW(peer.mapper.parameters())
        with torch.no_grad():
            self.features = peer.images(pixels) if peer.levers.cached else None

    def __call__(self) -> None:
        with torch.no_grad():
            images = self.features if self.peer.levers.cached else self.peer.images(self.pixels)
        queries = self.peer.composed(self.peer.mapper(images), [""] * len(images))
        contrastive(queries, images).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class LincirStep:
    """Stage I of LinCIR: a caption's embedding, mapped, stands for the caption's content words."""

    def __init__(self, peer: Peer, captions: list[str]):
        self.peer, self.captions = peer, captions
        self.optimizer = torch.optim.AdamW(peer.mapper.parameters())

    def __call__(self) -> None:
        with torch.no_grad():
            wanted = self.peer.texts(self.captions)
        queries = self.peer.composed(self.peer.mapper(wanted), self.captions)
        (queries - wanted).square().sum(-1).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class FineTuningStep:
    """CLIP4CIR's first stage: the sum of reference and text, the text tower trained, should be the target."""

    def __init__(self, peer: Peer, references: torch.Tensor, targets: torch.Tensor, texts: list[str]):
        self.peer, self.pixels, self.modifications = peer, (references, targets), texts
        tower = peer.clip.text_model.requires_grad_(True)
        if peer.levers.adapters:
            inject_adapter_in_model(LoraConfig(r=16, lora_alpha=16, target_modules=LORA_TARGETS), tower)
        self.optimizer = torch.optim.AdamW([p for p in tower.parameters() if p.requires_grad])
        with torch.no_grad():
            self.features = [peer.images(pixels) for pixels in self.pixels] if peer.levers.cached else None

    def __call__(self) -> None:
        with torch.no_grad():
            references, targets = self.features or [self.peer.images(pixels) for pixels in self.pixels]
        queries = F.normalize(references + self.peer.texts(self.modifications), dim=-1)
        contrastive(queries, targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
