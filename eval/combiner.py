"""A supervised baseline: a combiner of image and text embeddings, as CLIP4CIR's (Baldrati et al. 2022).

Frozen CLIP gives both embeddings; what is trained reads them, and mixes them with what it adds. Written from the
paper's description.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from modeling_tscir.losses import info_nce_loss


class Combiner(nn.Module):
    """(v [B, D], u [B, D]) to a query [B, D], L2-normalised: l u + (1 - l) v + f, l and f read from both.

    Args:
        width: D. Each side is projected to four times that, and both together are read by eight times that.
        dropout: after every activation.
    """

    def __init__(self, width: int, dropout: float = 0.5):
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout))

        self.image, self.text = block(width, 4 * width), block(width, 4 * width)
        self.residual = nn.Sequential(block(8 * width, 8 * width), nn.Linear(8 * width, width))
        self.share = nn.Sequential(block(8 * width, 8 * width), nn.Linear(8 * width, 1), nn.Sigmoid())

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.image(images), self.text(texts)], dim=-1)
        share = self.share(both)
        return F.normalize(share * texts + (1 - share) * images + self.residual(both), dim=-1)


def fit_combiner(
    references: torch.Tensor,
    texts: torch.Tensor,
    targets: torch.Tensor,
    logit_scale: float,
    seed: int,
    epochs: int = 30,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
) -> Iterator[Combiner]:
    """A combiner, trained by InfoNCE on embeddings [N, D] of triplets, all L2-normalised; given after each epoch."""
    torch.manual_seed(seed)
    combiner = Combiner(references.shape[1])
    steps = max(1, len(texts) // batch_size) * epochs
    optimizer = torch.optim.AdamW(combiner.parameters(), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        combiner.train()
        order = torch.randperm(len(texts), generator=generator)
        for rows in order[: len(order) // batch_size * batch_size or None].split(batch_size):
            loss = info_nce_loss(combiner(references[rows], texts[rows]), targets[rows], logit_scale)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        yield combiner.eval()
