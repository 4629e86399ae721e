import pytest
import torch
import torch.nn.functional as F

from modeling_tscir.metrics import ranks_of_truths
from modeling_tscir.ranking import rank_candidates, rank_gallery, top_k


def reference(queries, gallery, k, exclude):
    """Sort by score, then by index, one query at a time."""
    rows = []
    for q, query in enumerate(queries):
        scores = (gallery @ query).tolist()
        allowed = [i for i in range(len(gallery)) if i not in exclude[q]]
        order = sorted(allowed, key=lambda i: (-scores[i], i))[:k]
        rows.append(order + [-1] * (k - len(order)))
    return torch.tensor(rows)


def test_scores_are_exact_in_the_middle_of_training_in_bf16():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (F.normalize(torch.randn(n, 24, generator=generator), dim=-1) for n in (6, 50))
    truths, candidates = [[i] for i in range(6)], [[0, 1, 2, 3, 4, 5]] * 6
    expected = rank_gallery(queries, gallery, 9, truths), rank_candidates(queries, gallery, candidates, truths)
    with torch.autocast("cpu", torch.bfloat16):
        assert (queries @ gallery.T).dtype == torch.bfloat16
        found = rank_gallery(queries, gallery, 9, truths), rank_candidates(queries, gallery, candidates, truths)
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("scores_at_a_time", [1, 100, 10_000])
@pytest.mark.parametrize("k", [1, 4, 40])
def test_equals_a_full_sort_with_ties_and_exclusions(k, scores_at_a_time):
    generator = torch.Generator().manual_seed(k * 10_000 + scores_at_a_time)
    for _ in range(20):
        # Few distinct values of exact arithmetic, so that ties are common.
        queries = torch.randint(-1, 2, (5, 4), generator=generator).float()
        gallery = torch.randint(-1, 2, (40, 4), generator=generator).float()
        exclude = [torch.randperm(40, generator=generator)[: int(n)].tolist() for n in (0, 1, 5, 39, 40)]
        _, indices, _ = rank_gallery(queries, gallery, k, exclude=exclude, scores_at_a_time=scores_at_a_time)
        assert torch.equal(indices, reference(queries, gallery, k, exclude))


def test_scores_are_cosines():
    queries, gallery = F.normalize(torch.randn(3, 8), dim=-1), F.normalize(torch.randn(20, 8), dim=-1)
    scores, indices = top_k(queries, gallery, 20)
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
        rank_candidates(good, bad, [[0], [0]])
    with pytest.raises(ValueError, match="excluded"):
        rank_gallery(good, good, 1, truths=[[0], [1]], exclude=[[1], [1]])
    with pytest.raises(ValueError, match=r"query 1 has truths \[1\]"):
        rank_candidates(good, good, [[0], [0]], truths=[[0], [1]])


def test_ranks_count_equal_scores_against_the_truth():
    queries, gallery = torch.ones(1, 1), torch.tensor([[3.0], [2.0], [2.0], [2.0], [1.0]])
    assert rank_gallery(queries, gallery, 1, truths=[[1]]).truth_ranks.tolist() == [[4]]
    assert rank_gallery(queries, gallery, 1, truths=[[2]], exclude=[[0, 1]]).truth_ranks.tolist() == [[2]]
    assert rank_gallery(queries, gallery, 1, truths=[[3, 1, 4]]).truth_ranks.tolist() == [[4, 3, 5]]


def slow_ranks(scores, truths, exclude):
    """Walk down the ranking: at each score the wrong pictures come first, then the truths, last given first."""
    allowed = [i for i in range(len(scores)) if i not in exclude]
    order = sorted(allowed, key=lambda i: (-scores[i], i in truths, -truths.index(i) if i in truths else 0))
    return [order.index(t) + 1 for t in truths]


@pytest.mark.parametrize("width", [192, 768])
def test_a_truth_stands_behind_its_copies_whoever_asks_beside_it(width):
    """A product of few rows may score equal columns unequally."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gallery = F.normalize(torch.randn(2297, width, generator=generator), dim=-1)
        gallery[[-1, -2]] = gallery[0].clone()
        query = F.normalize(gallery[:1] + 0.3 * torch.randn(1, width, generator=generator) / width**0.5, dim=-1)
        for number in (1, 2, 3, 17):
            ranks = rank_gallery(query.repeat(number, 1), gallery, 50, [[0]] * number).truth_ranks[:, 0]
            assert ranks.tolist() == [3] * number


@pytest.mark.parametrize("length", [5, 10, 15])
@pytest.mark.parametrize("width", [192, 768])
def test_a_candidate_stands_behind_its_copy_in_the_list_of_a_lone_query(length, width):
    """GeneCIS has such lists, and a block of queries may end with one."""
    generator = torch.Generator().manual_seed(0)
    for copy in (1, length - 1) * 10:
        gallery = F.normalize(torch.randn(length, width, generator=generator), dim=-1)
        gallery[copy] = gallery[0].clone()
        query = F.normalize(gallery[:1] + 0.3 * torch.randn(1, width, generator=generator) / width**0.5, dim=-1)
        for number in (1, 2):
            ranks = rank_candidates(query.repeat(number, 1), gallery, [list(range(length))] * number, [[0]] * number)
            assert ranks.truth_ranks.tolist() == [[2]] * number


def test_ranks_equal_a_slow_reference_on_rankings_with_ties():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (1200, 3), generator=generator).float()
    gallery = torch.randint(-1, 2, (40, 3), generator=generator).float()
    picks = [torch.randperm(40, generator=generator).tolist() for _ in queries]
    truths = [p[: 1 + q % 5] for q, p in enumerate(picks)]
    exclude = [p[5 : 5 + q % 3] for q, p in enumerate(picks)]
    candidates = [p[:12] for p in picks]
    found = rank_gallery(queries, gallery, 40, truths, exclude, scores_at_a_time=1000)
    among = rank_candidates(queries, gallery, candidates, truths)
    for q in range(len(queries)):
        scores = (gallery @ queries[q]).tolist()
        expected = slow_ranks(scores, truths[q], exclude[q])
        assert found.truth_ranks[q].tolist() == expected + [0] * (5 - len(expected))
        assert ranks_of_truths(scores, truths[q], exclude[q]).tolist() == expected
        others = [i for i in range(40) if i not in candidates[q]]
        assert among.truth_ranks[q][: len(truths[q])].tolist() == slow_ranks(scores, truths[q], others)
        ranked = sorted(candidates[q], key=lambda i: (-scores[i], candidates[q].index(i)))
        assert among.indices[q].tolist() == ranked


def test_candidate_lists_may_differ_in_length():
    queries, gallery = torch.randn(2, 8), torch.randn(30, 8)
    ranking = rank_candidates(queries, gallery, [[3, 4, 5], [9]], truths=[[5], [9]])
    assert ranking.indices[1].tolist() == [9, -1, -1] and ranking.truth_ranks[1].tolist() == [1]


def test_ranks_agree_with_top_k():
    queries, gallery = torch.randn(50, 8), torch.randn(30, 8)
    targets, exclude = torch.arange(50) % 30, [[(i + 1) % 30] for i in range(50)]
    ranking = rank_gallery(queries, gallery, 30, targets[:, None].tolist(), exclude)
    expected = (ranking.indices == targets[:, None]).int().argmax(1) + 1
    assert torch.equal(ranking.truth_ranks[:, 0], expected)
