import pytest
import torch

from modeling_tscir import exact_search


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 100])
def test_the_best_of_wanted_rows_are_found_however_the_work_is_cut(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(exact_search, "ROWS_AT_A_TIME", rows_at_a_time)
    monkeypatch.setattr(exact_search, "QUERIES_AT_A_TIME", 2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        # Of few distinct values, so that many scores are equal.
        embeds, queries = (torch.randint(-1, 2, (n, 4), generator=generator).float() for n in (30, 5))
        wanted = torch.rand(30, generator=generator) < 0.5
        wanted[:6] = True
        shards = embeds.half().split([3, 1, 9, 7, 10])
        scores, rows = exact_search.search_exactly(shards, queries, 6, wanted.numpy())
        for query, found, worth in zip(queries, rows.tolist(), scores.tolist(), strict=True):
            every = (embeds @ query).tolist()
            best = sorted(wanted.nonzero().flatten().tolist(), key=lambda row: (-every[row], row))[:6]
            assert found == best and worth == [every[row] for row in best]
