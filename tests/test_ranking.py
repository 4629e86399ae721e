import pytest
import torch
import torch.nn.functional as F

from modeling_tscir.ranking import target_ranks, top_k


def reference(queries, gallery, k, exclude):
    """Sort by score, then by index, one query at a time."""
    rows = []
    for q, query in enumerate(queries):
        scores = (gallery @ query).tolist()
        allowed = [i for i in range(len(gallery)) if i not in exclude[q]]
        order = sorted(allowed, key=lambda i: (-scores[i], i))[:k]
        rows.append(order + [-1] * (k - len(order)))
    return torch.tensor(rows)


@pytest.mark.parametrize("block_size", [3, 7, 1000])
@pytest.mark.parametrize("k", [1, 4, 40])
def test_equals_a_full_sort_with_ties_and_exclusions(k, block_size):
    generator = torch.Generator().manual_seed(k * 10_000 + block_size)
    for _ in range(20):
        # Few distinct values of exact arithmetic, so that ties are common.
        queries = torch.randint(-1, 2, (5, 4), generator=generator).float()
        gallery = torch.randint(-1, 2, (40, 4), generator=generator).float()
        exclude = [torch.randperm(40, generator=generator)[: int(n)].tolist() for n in (0, 1, 5, 39, 40)]
        _, indices = top_k(queries, gallery, k, exclude, block_size)
        assert torch.equal(indices, reference(queries, gallery, k, exclude))


def test_scores_are_cosines():
    queries, gallery = F.normalize(torch.randn(3, 8), dim=-1), F.normalize(torch.randn(20, 8), dim=-1)
    scores, indices = top_k(queries, gallery, 20, block_size=6)
    assert torch.allclose(scores, (queries @ gallery.T).gather(1, indices), atol=1e-6)


def test_what_cannot_be_ranked_is_refused():
    good, bad = torch.ones(2, 3), torch.tensor([[1.0, 2, float("nan")]])
    with pytest.raises(ValueError, match="query embeddings"):
        top_k(bad, good, 1)
    with pytest.raises(ValueError, match="gallery embeddings"):
        top_k(good, bad, 1)
    with pytest.raises(ValueError, match="at least 1"):
        top_k(good, good[:0], 1)
    with pytest.raises(ValueError, match="NaN"):
        target_ranks(good, bad, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="excluded"):
        target_ranks(good, good, torch.tensor([0, 1]), exclude=[[1], [1]])


def test_ranks_count_equal_scores_against_the_target():
    queries, gallery = torch.ones(1, 1), torch.tensor([[3.0], [2.0], [2.0], [2.0], [1.0]])
    assert target_ranks(queries, gallery, torch.tensor([2])).tolist() == [4]
    assert target_ranks(queries, gallery, torch.tensor([2]), exclude=[[0, 1]]).tolist() == [2]


def test_ranks_agree_with_top_k():
    queries, gallery = torch.randn(50, 8), torch.randn(30, 8)
    targets, exclude = torch.arange(50) % 30, [[(i + 1) % 30] for i in range(50)]
    _, order = top_k(queries, gallery, 30, exclude)
    expected = (order == targets[:, None]).int().argmax(1) + 1
    assert torch.equal(target_ranks(queries, gallery, targets, exclude, block_size=7), expected)
