"""Losses of both stages: tensors in, scalar out. No model and no process group inside."""

import math

import torch
import torch.nn.functional as F


def info_nce_loss(query_embeds: torch.Tensor, target_embeds: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """Symmetric InfoNCE: row i of one side belongs to row i of the other; all other rows are negatives.

    Args:
        query_embeds, target_embeds (`torch.Tensor` [B, D]): L2-normalised.
        logit_scale (`float`): 1 / tau.

    Returns:
        Scalar; log B where all embeddings are equal. Source: van den Oord et al. 2018; CLIP's symmetric form.
    """
    logits = logit_scale * query_embeds @ target_embeds.T  # [B, B]
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def soft_alignment_loss(
    pseudo_embeds: torch.Tensor, image_embeds: torch.Tensor, caption_embeds: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Soft text alignment: cosine distance of pseudo-sentence and caption, sum_i w_i (1 - q_i.u_i).

    A caption describes its image only in part. So captions count as much as CLIP thinks that they fit their images,
    w_i = softmax_i(v_i.u_i / tau_s) over the batch; the others leave their pseudo-words to the image.

    Args:
        pseudo_embeds, image_embeds, caption_embeds (`torch.Tensor` [B, D]): q(x), v(x), u(c), L2-normalised.
        temperature (`float`): tau_s; with a large one all captions count alike.

    Returns:
        Scalar from 0, where all captions that count are met, to 2.
    """
    fit = (image_embeds * caption_embeds).sum(-1)  # [B]
    weights = torch.softmax(fit / temperature, dim=0)
    return (weights * (1 - (pseudo_embeds * caption_embeds).sum(-1))).sum()


def composing_loss(
    query_embeds: torch.Tensor,
    target_embeds: torch.Tensor,
    logit_scale: float,
    target_ids: torch.Tensor | None = None,
    reference_embeds: torch.Tensor | None = None,
    reference_weight: float = 1.0,
    mined_embeds: torch.Tensor | None = None,
    mined_mask: torch.Tensor | None = None,
    mined_weight: float = 1.0,
    gce_q: float = 0.0,
) -> torch.Tensor:
    """InfoNCE of composed queries against targets, with hard negatives in the denominator.

    Query i's denominator holds every target of the batch, its own reference image and its own mined negatives. A
    negative of weight w counts w times: log w is added to its logit. The loss is symmetric where the batch is its own
    gallery: targets also choose among queries.

    Args:
        query_embeds, target_embeds (`torch.Tensor` [B, D]): L2-normalised.
        logit_scale (`float`): 1 / tau.
        target_ids (`torch.Tensor` [B], *optional*): rows of equal ids share a target: no negatives of each other.
        reference_embeds (`torch.Tensor` [B, D], *optional*): each query's reference image.
        reference_weight (`float`): 0 leaves the references out.
        mined_embeds (`torch.Tensor` [B, H, D], *optional*): each query's mined negatives.
        mined_mask (`torch.Tensor` [B, H], *optional*): False where a mined negative is not to be used.
        mined_weight (`float`): 0 leaves the mined negatives out.
        gce_q (`float`): q of `generalized_cross_entropy`, in both directions; the larger, the less a row leads whose
            target is wrong.
    """
    logits = logit_scale * query_embeds @ target_embeds.T  # [B, B]
    labels = torch.arange(len(logits), device=logits.device)
    if target_ids is not None:
        same = (target_ids[:, None] == target_ids[None, :]) & ~torch.eye(len(logits), dtype=bool, device=logits.device)
        logits = logits.masked_fill(same, -math.inf)
    columns = [logits]
    if reference_embeds is not None and reference_weight > 0:
        own = logit_scale * (query_embeds * reference_embeds).sum(-1, keepdim=True)  # [B, 1]
        columns.append(own + math.log(reference_weight))
    if mined_embeds is not None and mined_weight > 0:
        mined = logit_scale * torch.einsum("bd,bhd->bh", query_embeds, mined_embeds)  # [B, H]
        if mined_mask is not None:
            mined = mined.masked_fill(~mined_mask, -math.inf)
        columns.append(mined + math.log(mined_weight))
    forward = generalized_cross_entropy(torch.cat(columns, dim=-1), labels, gce_q)
    return (forward + generalized_cross_entropy(logits.T, labels, gce_q)) / 2


def generalized_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, q: float) -> torch.Tensor:
    """Mean of (1 - p^q) / q, p being the probability of a row's label.

    With q = 0 it is the cross-entropy, with 1 the mean absolute error. A row's gradient is the cross-entropy's times
    p^q: rows that seem wrong count less. Source: Zhang and Sabuncu 2018.

    Args:
        logits (`torch.Tensor` [B, C]) and labels (`torch.LongTensor` [B]).
        q (`float`): 0 to 1.
    """
    if q == 0:
        return F.cross_entropy(logits, labels)
    return -torch.expm1(-q * F.cross_entropy(logits, labels, reduction="none")).mean() / q
