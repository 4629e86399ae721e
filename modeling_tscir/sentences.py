"""The text tower's pass over sentences that hold pseudo-words. Attention is causal: states that sentences share are
computed once, and padding, which no state sees, not at all."""

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward


def places_of(input_ids: torch.Tensor, pseudo_mask: torch.Tensor) -> torch.Tensor:
    """Where the state of each token of [B, L] is computed: at its own place, counted through all rows, or at the first
    row's, for the words that all rows begin with."""
    own = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
    alike = ((input_ids == input_ids[:1]) & ~pseudo_mask).all(0)
    return own.where(alike.long().cumprod(0) == 0, own[:1])


def embed_words(
    tower: nn.Module,
    input_ids: torch.Tensor,
    pseudo_mask: torch.Tensor,
    pseudo_words: torch.Tensor,
    places: torch.Tensor,
    ends: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the layers read.

    Args:
        input_ids (`torch.LongTensor` [S, L]).
        pseudo_mask (`torch.BoolTensor` [S, L]): where, instead, pseudo-words stand.
        pseudo_words (`torch.Tensor` [B, M, d_t]): as many as the mask has places, in their order.
        places (`torch.LongTensor` [S, L]): where each state is computed, as `places_of` counts.
        ends (`torch.LongTensor` [S]): where sentences end.

    Returns:
        The states [T, d_t] to be computed, their places [T], which of them each token's is, [S, L], and how many stand
        first that more than two tokens share.
    """
    length, limit = input_ids.shape[1], tower.config.max_position_embeddings
    if length > limit:
        raise ValueError(f"these texts are of {length} tokens, and the text tower reads at most {limit}")
    if torch.compiler.is_compiling() or input_ids.is_meta:  # where no shape may depend on values
        taken, index, shared = torch.arange(input_ids.numel(), device=input_ids.device), places, 0
    else:
        behind = torch.arange(length, device=input_ids.device) > ends[:, None]
        taken, index, counts = places.masked_fill(behind, 0).unique(return_inverse=True, return_counts=True)
        order, shared = (counts <= 2).int().argsort(stable=True), int((counts > 2).sum())
        taken, index = taken[order], order.argsort()[index]
    words = tower.embeddings.token_embedding(input_ids.flatten()[taken])
    words = words.masked_scatter(pseudo_mask.flatten()[taken, None], pseudo_words.to(words.dtype))
    return words + tower.embeddings.position_embedding(taken % length), taken, index, shared


def of_tokens(states: torch.Tensor, places: torch.Tensor, shared: int) -> torch.Tensor:
    """The state of each token, [S, L, d], of [T, d]; `places` [S, L] count the first `shared` once for every sentence,
    as copies, and then the others.

    The backward pass of taking one state for many tokens would add their gradients one by one in the states' own
    precision, and on a CPU in no order; that of copying sums them.
    """
    copies = states[:shared].expand(len(places), -1, -1).flatten(0, 1)
    taken = torch.cat([copies, states[shared:]]).index_select(0, places.flatten())
    return taken.unflatten(0, places.shape)


def run_layers(
    tower: nn.Module, hidden: torch.Tensor, taken: torch.Tensor, index: torch.Tensor, shared: int, ends: torch.Tensor
) -> torch.Tensor:
    """Last states [S, d_t] at sentences' ends, of what `embed_words` gives, as the tower itself would have them."""
    layers, config = tower.encoder.layers, tower.config
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
    mask = create_causal_mask(config, hidden.new_empty(*index.shape, 1), None, None)
    sentences = torch.arange(len(index), device=index.device)[:, None]
    places = (index + (len(index) - 1) * shared).where(index >= shared, index + sentences * shared)
    for layer in layers:
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        projected = [project(normed) for project in (attention.q_proj, attention.k_proj, attention.v_proj)]
        tokens = of_tokens(torch.cat(projected, dim=-1), places, shared).chunk(3, dim=-1)
        heads = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in tokens)  # [S, h, L, d]
        dropout = attention.dropout if attention.training else 0.0
        seen, _ = attend(attention, *heads, mask, scaling=attention.scale, dropout=dropout, is_causal=True)
        if layer is layers[-1]:  # whose other states nothing reads
            hidden = of_tokens(hidden, places.gather(1, ends[:, None]), shared)[:, 0]
            taken = ends + index.shape[1] * torch.arange(len(ends), device=ends.device)  # counted through all rows
        hidden = hidden + attention.out_proj(seen.flatten(2).flatten(0, 1).index_select(0, taken))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return tower.final_layer_norm(hidden)
