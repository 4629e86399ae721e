import torch
import torch.nn.functional as F
from picture_pairs import GAIN_SHARE, told_apart


def embeddings(*size, seed=0):
    return F.normalize(torch.randn(*size, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_pairs_equal_all_of_them_written_out():
    ids = [0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 7]
    images, texts = embeddings(8, 6)[ids], embeddings(12, 6, seed=1)
    found, dropped = told_apart(images, texts, ids, count=20, max_similarity=0.5, min_gain=0.1)
    expected, alike, untold = [], 0, 0
    for i in (ids.index(name) for name in range(8)):
        best = {}
        for j in range(len(ids)):
            similarity, gain = float(images[i] @ images[j]), float((images[j] - images[i]) @ texts[j])
            if ids[i] == ids[j]:
                continue
            if similarity > 0.5:
                alike += 1
            elif gain < 0.1:
                untold += 1
            else:
                best[ids[j]] = min(best.get(ids[j], (9, 0, 0)), (-similarity - GAIN_SHARE * gain, i, j))
        expected += enumerate(sorted(best.values())[:3])
    assert found == [(i, j) for _, (_, i, j) in sorted(expected)] and len(found) > 8
    assert dropped == {"pictures nearly identical": alike, "caption does not tell them apart": untold}
    assert min(alike, untold) > 0


def test_the_target_is_near_in_all_that_its_caption_does_not_say():
    """Of two pictures that a caption tells from the reference, the one that changes nothing else comes first."""
    what, rest = torch.eye(4)[:2], torch.eye(4)[2:]
    images = F.normalize(torch.stack([what[0] + rest[0], what[1] + rest[0], what[1] + rest[1]]), dim=-1)
    found, _ = told_apart(images, F.normalize(what[[0, 1, 1]], dim=-1), ["a", "b", "c"], 3, 0.97, 0.02)
    assert [pair for pair in found if pair[0] == 0] == [(0, 1)]
