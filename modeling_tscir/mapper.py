"""Stage I: an image becomes pseudo-words, by an MLP with visual semantic injection."""

import torch
import torch.nn.functional as F
from torch import nn


class InjectionAttention(nn.MultiheadAttention):
    """Multi-head attention of few queries to many patches, which makes no keys and values of every patch.

    Each head's queries go through its matrix of keys, and its weighted mean of patches through that of values. The
    keys' bias adds the same to all scores of a query, and thus nothing.
    """

    def forward(self, queries: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """What `nn.MultiheadAttention` gives of queries [B, M, d_t], and of patches [B, N, d_t] as keys and values."""
        heads = self.num_heads, -1
        to_queries, to_keys, to_values = self.in_proj_weight.chunk(3)  # [d_t, d_t] each
        query_bias, _, value_bias = self.in_proj_bias.chunk(3)
        projected = F.linear(queries, to_queries, query_bias).unflatten(-1, heads)  # [B, M, H, d]
        asked = torch.einsum("bmhd,hde->bhme", projected, to_keys.unflatten(0, heads))
        scores = asked.flatten(1, 2) @ patches.transpose(1, 2) * self.head_dim**-0.5  # [B, H * M, N]
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        means = (weights @ patches).unflatten(1, (heads[0], -1))  # [B, H, M, d_t]
        found = torch.einsum("bhme,hde->bmhd", means, to_values.unflatten(0, heads)).flatten(2)
        # Dropped weights do not sum to one.
        totals = weights.sum(-1).unflatten(1, (heads[0], -1)).transpose(1, 2)  # [B, M, H]
        found = found + totals.repeat_interleave(self.head_dim, dim=-1) * value_bias
        return self.out_proj(found)


class InjectionBlock(nn.Module):
    """Pre-norm cross-attention from pseudo-word states to patch states, then a feed-forward."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.query_norm = nn.LayerNorm(hidden_size)
        self.attention = InjectionAttention(hidden_size, num_heads, dropout=dropout, batch_first=True)
        self.feed_forward_norm = nn.LayerNorm(hidden_size)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        states = states + self.dropout(self.attention(self.query_norm(states), patches))  # [B, M, d_t]
        return states + self.dropout(self.feed_forward(self.feed_forward_norm(states)))


class PseudoWordMapper(nn.Module):
    """Map images to pseudo-words (design: stage I, parts 1 and 2; arXiv 2504.17990, visual semantic injection).

    Args:
        embed_dim (`int`): D, width of CLIP's projected embeddings.
        patch_dim (`int`): d_v, width of the vision tower.
        word_dim (`int`): d_t, width of the text tower.
        num_pseudo_words (`int`): M.
        hidden_size (`int`): width of the MLP's two hidden layers.
        num_blocks (`int`): K injection blocks; with 0 this is a plain MLP, and patch states are not needed.
        num_heads (`int`): attention heads of each block.
        dropout (`float`): dropout while training.
        activation (`str`): "gelu" or "relu", between the MLP's layers.
        input_scale (`float`): what inputs are multiplied by. An L2-normalised vector's entries shrink with its width,
            while the layers expect entries of about one; hence sqrt(D) unless the mapper was trained otherwise.

    At initialisation the injection adds exactly nothing, so that every mapper starts as its plain MLP.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_dim: int,
        word_dim: int,
        num_pseudo_words: int,
        hidden_size: int,
        num_blocks: int,
        num_heads: int,
        dropout: float,
        activation: str,
        input_scale: float,
    ):
        super().__init__()
        self.num_pseudo_words, self.input_scale = num_pseudo_words, input_scale
        new_activation = {"gelu": nn.GELU, "relu": nn.ReLU}[activation]
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_size),
            new_activation(),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size),
            new_activation(),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, num_pseudo_words * word_dim),
        )
        if num_blocks:
            self.patch_projection = nn.Sequential(nn.LayerNorm(patch_dim), nn.Linear(patch_dim, word_dim))
        self.blocks = nn.ModuleList(InjectionBlock(word_dim, num_heads, dropout) for _ in range(num_blocks))
        if num_blocks:
            self.output_norm = nn.LayerNorm(word_dim)
            self.output_projection = nn.Linear(word_dim, word_dim)

    @property
    def needs_patches(self) -> bool:
        return len(self.blocks) > 0

    def forward(self, image_embeds: torch.Tensor, patch_states: torch.Tensor | None = None) -> torch.Tensor:
        """Pseudo-words of images.

        Args:
            image_embeds (`torch.Tensor` [B, D]): global embeddings v(x), L2-normalised unless `mapper_input` is "raw".
            patch_states (`torch.Tensor` [B, N, d_v], *optional*): P(x), last hidden states but CLS; needed if K > 0.

        Returns:
            `torch.Tensor` [B, M, d_t].

        Raises:
            ValueError: if the mapper has injection blocks and `patch_states` is missing.
        """
        words = self.mlp(image_embeds * self.input_scale)  # [B, M * d_t]
        words = words.unflatten(-1, (self.num_pseudo_words, -1))  # [B, M, d_t]
        if not self.needs_patches:
            return words
        if patch_states is None:
            raise ValueError("this mapper has injection blocks (num_injection_blocks > 0) and needs patch_states")
        patches = self.patch_projection(patch_states)  # [B, N, d_t]
        states = words
        for block in self.blocks:
            states = block(states, patches)
        return words + self.output_projection(self.output_norm(states))


def initialise_mapper_weights(mapper: PseudoWordMapper, init) -> None:
    """Fresh weights, through transformers' `initialization` functions `init`, which leave loaded weights alone."""
    for module in mapper.modules():
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
    # Pseudo-words start at the size of word embeddings, whose standard deviation is a few hundredths.
    init.normal_(mapper.mlp[-1].weight, std=0.02)
    if mapper.needs_patches:
        init.zeros_(mapper.output_projection.weight)
