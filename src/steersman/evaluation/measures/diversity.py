"""How different texts are: distinct n-grams, and the Vendi score on n-grams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def n_grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n words is there."""
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of the texts, pooled (Li et al., arXiv 1510.03055); NaN for none."""
    pooled: Counter[tuple[str, ...]] = sum((n_grams(words, n) for words in texts), Counter())
    return len(pooled) / pooled.total() if pooled else float("nan")


def vendi(texts: Sequence[Sequence[str]], longest: int = 2) -> float:
    """exp of the entropy of the eigenvalues of K/m: how many different texts the m are worth, from 1 to m.

    Friedman and Dieng, arXiv 2210.02410. K is the mean over n = 1 … `longest` of the cosine between counts of
    n-grams; a text that has none is like another without, and unlike any other.
    """
    kernel = np.mean(
        [_cosines([n_grams(words, n) for words in texts]) for n in range(1, longest + 1)], axis=0
    )
    values = np.linalg.eigvalsh(kernel / len(texts))
    positive = values[values > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def _cosines(counts: Sequence[Counter[tuple[str, ...]]]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Cosines between all pairs, float64 [m, m]."""
    places = {gram: place for place, gram in enumerate(dict.fromkeys(g for count in counts for g in count))}
    table = np.zeros((len(counts), len(places) + 1))
    for row, count in enumerate(counts):
        for gram, times in count.items():
            table[row, places[gram]] = times
        table[row, -1] = not count  # texts without n-grams are alike
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    found: np.ndarray[tuple[int, int], np.dtype[np.float64]] = table @ table.T
    return found
