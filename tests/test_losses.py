import math

import pytest
import torch
import torch.nn.functional as F

from modeling_tscir.losses import (
    composing_loss,
    generalized_cross_entropy,
    info_nce_loss,
    soft_alignment_loss,
)


def unit(*shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))), dim=-1)


def test_info_nce_of_equal_embeddings_is_log_batch():
    same = torch.ones(8, 4) / 2
    assert info_nce_loss(same, same, 10.0).item() == pytest.approx(math.log(8))


def test_info_nce_equals_its_definition():
    q, t = unit(5, 6), unit(5, 6).flip(0)
    logits = 3.0 * q @ t.T
    rows = -(logits.diag() - logits.logsumexp(1)).mean()
    columns = -(logits.diag() - logits.logsumexp(0)).mean()
    assert info_nce_loss(q, t, 3.0).item() == pytest.approx(((rows + columns) / 2).item())


def test_soft_alignment_equals_its_definition():
    q, v, u = unit(5, 6), unit(5, 6).flip(0), unit(5, 6).roll(1, 0)
    counts = [math.exp(float(v[i] @ u[i]) / 0.1) for i in range(5)]
    expected = sum(counts[i] / sum(counts) * (1 - float(q[i] @ u[i])) for i in range(5))
    assert soft_alignment_loss(q, v, u, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_soft_alignment_vanishes_where_pseudo_sentences_are_captions():
    u = unit(5, 6)
    assert soft_alignment_loss(u, unit(5, 6).flip(0), u, 0.1).item() == pytest.approx(0, abs=1e-6)


def test_a_caption_that_does_not_fit_its_image_is_hardly_followed():
    v, q = unit(2, 6), unit(2, 6).flip(0).requires_grad_()
    u = torch.stack([v[0], -v[1]])  # the first fits, the second says the opposite
    soft_alignment_loss(q, v, u, 0.1).backward()
    assert q.grad[1].norm() < 1e-6 < 0.1 < q.grad[0].norm()


def brute_force(q, t, scale, ids, ref, w_ref, mined, mask, w_mined):
    total = 0.0
    for i in range(len(q)):
        denominator = 0.0
        for j in range(len(t)):
            if i == j or ids[i] != ids[j]:
                denominator += math.exp(scale * float(q[i] @ t[j]))
        denominator += w_ref * math.exp(scale * float(q[i] @ ref[i]))
        for h in range(mined.shape[1]):
            if mask[i, h]:
                denominator += w_mined * math.exp(scale * float(q[i] @ mined[i, h]))
        backward = sum(math.exp(scale * float(q[j] @ t[i])) for j in range(len(q)) if i == j or ids[i] != ids[j])
        positive = math.exp(scale * float(q[i] @ t[i]))
        total += -math.log(positive / denominator) - math.log(positive / backward)
    return total / (2 * len(q))


def test_composing_loss_equals_brute_force():
    q, t, ref, mined = unit(6, 8), unit(6, 8).roll(1, 0), unit(6, 8).flip(0), unit(6, 3, 8)
    ids = torch.tensor([0, 1, 1, 2, 3, 3])
    mask = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) > 0.4
    loss = composing_loss(q, t, 5.0, ids, ref, 0.3, mined, mask, 0.7)
    assert loss.item() == pytest.approx(brute_force(q, t, 5.0, ids, ref, 0.3, mined, mask, 0.7), rel=1e-5)


def test_weight_zero_leaves_negatives_out():
    q, t = unit(6, 8), unit(6, 8).roll(1, 0)
    plain = composing_loss(q, t, 5.0)
    assert torch.equal(plain, composing_loss(q, t, 5.0, reference_embeds=t, reference_weight=0.0))
    assert torch.equal(plain, composing_loss(q, t, 5.0, mined_embeds=unit(6, 3, 8), mined_weight=0.0))
    assert torch.equal(plain, info_nce_loss(q, t, 5.0))


def test_gradients_are_finite_where_everything_is_masked():
    q = unit(4, 8).requires_grad_()
    mask = torch.zeros(4, 2, dtype=torch.bool)
    composing_loss(q, unit(4, 8), 100.0, torch.zeros(4), mined_embeds=unit(4, 2, 8), mined_mask=mask).backward()
    assert torch.isfinite(q.grad).all()


def test_generalized_cross_entropy_lies_between_cross_entropy_and_absolute_error():
    logits, labels = 3 * unit(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    p = logits.softmax(1)[torch.arange(6), labels]
    assert generalized_cross_entropy(logits, labels, 0.5).item() == pytest.approx(((1 - p**0.5) / 0.5).mean().item())
    assert generalized_cross_entropy(logits, labels, 1.0).item() == pytest.approx((1 - p).mean().item())
    near = generalized_cross_entropy(logits, labels, 1e-4).item()
    assert near == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3)
    assert torch.equal(generalized_cross_entropy(logits, labels, 0), F.cross_entropy(logits, labels))


def test_rows_that_seem_wrong_lead_less_by_their_probability():
    logits, labels = (8 * unit(6, 5)).requires_grad_(), torch.tensor([0, 1, 2, 3, 4, 0])
    p = logits.detach().softmax(1)[torch.arange(6), labels]
    (plain,) = torch.autograd.grad(generalized_cross_entropy(logits, labels, 0.0), logits)
    (robust,) = torch.autograd.grad(generalized_cross_entropy(logits, labels, 0.7), logits)
    torch.testing.assert_close(robust, plain * p[:, None] ** 0.7)


def test_the_composing_loss_is_robust_in_both_directions():
    q, t, ref, ids = unit(6, 8), unit(6, 8).roll(1, 0), unit(6, 8).flip(0), torch.arange(6)
    logits = 5.0 * q @ t.T
    own = 5.0 * (q * ref).sum(-1, keepdim=True) + math.log(0.3)
    both = torch.cat([logits, own], 1).softmax(1), logits.T.softmax(1)
    expected = sum((1 - p[torch.arange(6), ids] ** 0.6).mean() / 0.6 for p in both) / 2
    found = composing_loss(q, t, 5.0, ids, ref, 0.3, gce_q=0.6)
    assert found.item() == pytest.approx(expected.item())
