"""Pairs of captions of different pictures that say nearly the same, and the words in which they differ."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


WORD = re.compile(r"[\w'-]+")
MAX_HOLDERS = 2000  # so that the work for a caption does not grow with their number


def words_of(caption: str) -> list[str]:
    """Lower-case words, in any script, without punctuation."""
    return WORD.findall(caption.lower())


def near_captions(
    captions: Sequence[list[str]],
    image_ids: Sequence,
    count: int,
    floor: float,
    ceiling: float,
    max_word_share: float = 0.05,
    order: Iterable[int] | None = None,
) -> Iterator[list[int]]:
    """For each caption, up to `count` others, nearest first, each of another picture and of a picture not yet taken.

    Nearness is the cosine of word counts weighted by inverse document frequency, found through an inverted index: no
    matrix of all pairs.

    Args:
        captions: their words.
        image_ids: the picture of each; captions of one picture are never paired.
        floor, ceiling: cosines outside are left out: pictures with little in common, captions that say the same.
        max_word_share: words that stand in more captions than this share, or than MAX_HOLDERS, find no neighbours
            (they still count in the cosine of those that others find).
        order: numbers of the captions whose neighbours are wanted, as they are wanted; all of them unless told.
    """
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(w for caption in captions for w in caption))}
    rows = [np.unique([vocabulary[w] for w in caption]) if caption else np.empty(0, np.int64) for caption in captions]
    lengths = np.array([len(row) for row in rows])
    words = np.concatenate(rows).astype(np.int64)  # of all captions, one behind the other
    frequency = np.bincount(words, minlength=len(vocabulary))
    idf = np.log((1 + len(captions)) / (1 + frequency)) + 1
    norms = np.array([np.sqrt((idf[row] ** 2).sum()) or 1.0 for row in rows])
    owners = np.repeat(np.arange(len(rows)), lengths)
    by_word = np.split(owners[np.argsort(words, kind="stable")], np.cumsum(frequency)[:-1])
    rare = frequency <= max(2, min(MAX_HOLDERS, max_word_share * len(captions)))
    starts = np.cumsum(lengths) - lengths
    shared = np.zeros(len(vocabulary))  # what a word adds to the cosine with the caption that is looked at
    _, image_index = np.unique(np.asarray([str(i) for i in image_ids]), return_inverse=True)
    for number in range(len(rows)) if order is None else order:
        row = rows[number]
        finders = row[rare[row]]
        found = np.unique(np.concatenate([by_word[w] for w in finders])) if len(finders) else np.empty(0, np.int64)
        found = found[image_index[found] != image_index[number]]
        if not len(found):
            yield []
            continue
        shared[row] = idf[row] ** 2
        ends = np.cumsum(lengths[found])
        places = np.arange(ends[-1]) + np.repeat(starts[found] - (ends - lengths[found]), lengths[found])
        scores = np.add.reduceat(shared[words[places]], ends - lengths[found])
        shared[row] = 0
        cosines = scores / (norms[found] * norms[number])
        inside = (cosines >= floor) & (cosines <= ceiling)
        yield _first_of_each_picture(found[inside], cosines[inside], image_index, count)


def _first_of_each_picture(found: np.ndarray, cosines: np.ndarray, image_index: np.ndarray, count: int) -> list[int]:
    best, taken = [], set()
    for place in np.argsort(-cosines, kind="stable"):
        picture = image_index[found[place]]
        if picture not in taken:
            taken.add(picture)
            best.append(int(found[place]))
            if len(best) == count:
                break
    return best


class Change(tuple):
    """(removed words, added words); either may be empty."""

    @property
    def kind(self) -> str:
        removed, added = self
        return "replace" if removed and added else "add" if added else "remove"


def changes_between(reference: Sequence[str], target: Sequence[str]) -> list[Change]:
    """What must be changed to turn one caption into the other, phrase by phrase."""
    matcher = difflib.SequenceMatcher(a=reference, b=target, autojunk=False)
    return [
        Change((" ".join(reference[i:j]), " ".join(target[k:m])))
        for tag, i, j, k, m in matcher.get_opcodes()
        if tag != "equal"
    ]


def diversity(modifications: Sequence[str], kinds: Sequence[str]) -> dict:
    """What a set of modifications looks like: kinds, vocabulary, lengths, and how often texts repeat."""
    tokens = [words_of(text) for text in modifications]
    return {
        "triplets": len(modifications),
        "kinds": dict(Counter(kinds).most_common()),
        "different_texts": len(set(modifications)),
        "vocabulary": len({word for row in tokens for word in row}),
        "mean_words": float(np.mean([len(row) for row in tokens])) if tokens else 0.0,
    }
