import numpy as np
from caption_pairs import Change, changes_between, diversity, near_captions, words_of


CAPTIONS = [
    "A red star on the left.",
    "a blue star on the left",
    "A red star on the left!",  # says what the first says
    "a blue star on the right",
    "Ein großer Hund",
    "",
]


def slow_near(captions, image_ids, count, floor, ceiling):
    """Cosines of all pairs, written out."""
    documents = [set(caption) for caption in captions]
    vocabulary = sorted(set().union(*documents))
    idf = {w: np.log((1 + len(captions)) / (1 + sum(w in d for d in documents))) + 1 for w in vocabulary}
    vectors = np.array([[idf[w] * (w in d) for w in vocabulary] for d in documents])
    norms = np.linalg.norm(vectors, axis=1)
    found = []
    for i in range(len(captions)):
        cosines = vectors @ vectors[i] / np.where(norms * norms[i] == 0, 1, norms * norms[i])
        order = [j for j in np.argsort(-cosines, kind="stable") if floor <= cosines[j] <= ceiling]
        best, taken = [], set()
        for j in order:
            if image_ids[j] != image_ids[i] and image_ids[j] not in taken:
                taken.add(image_ids[j])
                best.append(int(j))
        found.append(best[:count])
    return found


def test_words_are_lower_case_in_any_script():
    assert words_of("A big-eared dog's bone, 2 cafés!") == ["a", "big-eared", "dog's", "bone", "2", "cafés"]
    assert words_of("") == []


def test_near_captions_equal_all_pairs_written_out():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    captions = [list(rng.choice(words, rng.integers(0, 9))) for _ in range(120)]
    ids = (np.arange(120) // 2).tolist()
    found = list(near_captions(captions, ids, 5, 0.3, 0.9, max_word_share=1.0))
    expected = slow_near(captions, ids, 5, 0.3, 0.9)
    assert found == expected and sum(map(len, found)) > 300


def test_the_captions_that_are_asked_for_and_common_words(monkeypatch):
    rng = np.random.default_rng(1)
    captions = [["same", *rng.choice([f"w{i}" for i in range(20)], 3)] for _ in range(60)]
    whole = list(near_captions(captions, range(60), 5, 0.1, 0.9, max_word_share=1.0))
    asked = [7, 3, 59]
    assert list(near_captions(captions, range(60), 5, 0.1, 0.9, 1.0, asked)) == [whole[i] for i in asked]
    monkeypatch.setattr("caption_pairs.MAX_HOLDERS", 59)  # "same" finds nobody any more, but counts as before
    fewer = list(near_captions(captions, range(60), 60, 0.1, 0.9, max_word_share=1.0))
    others = list(near_captions(captions, range(60), 60, 0.1, 0.9, max_word_share=0.99))
    for number, found in enumerate(fewer):
        assert all(set(captions[number][1:]) & set(captions[i][1:]) for i in found)
    assert fewer == others and any(len(found) < 59 for found in fewer)


def test_captions_of_one_picture_and_captions_that_say_the_same_are_not_paired():
    captions = [words_of(c) for c in CAPTIONS]
    found = list(near_captions(captions, [0, 1, 2, 3, 4, 5], 3, 0.1, 0.95, max_word_share=1.0))
    assert 2 not in found[0] and 1 in found[0] and found[4] == found[5] == []
    found = list(near_captions(captions, [0, 0, 1, 1, 2, 3], 3, 0.1, 0.95, max_word_share=1.0))
    assert 1 not in found[0] and found[0] == [3]


def test_changes_are_phrases():
    changes = changes_between(words_of("a red star on the left"), words_of("a blue star with dots on the left"))
    assert changes == [Change(("red", "blue")), Change(("", "with dots"))]
    assert [c.kind for c in changes] == ["replace", "add"]
    assert [c.kind for c in changes_between(["a", "b"], ["a"])] == ["remove"]
    assert changes_between(["a"], ["a"]) == []


def test_diversity_counts():
    report = diversity(["red star", "red star", "no ring"], ["replace", "replace", "remove"])
    assert report == {
        "triplets": 3, "kinds": {"replace": 2, "remove": 1}, "different_texts": 2, "vocabulary": 4, "mean_words": 2.0,
    }  # fmt: skip
