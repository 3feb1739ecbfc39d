"""Fluency of generated text as the entropy of its n-grams (ROME, arXiv 2202.05262, section 3.4).

    GE_n = 1/2 ( 2/3 H_2 + 4/3 H_3 ),   H_m = -Σ_g f(g) log2 f(g)

in bits, f(g) the relative frequency of the m-gram g of words in the text.  Higher: less repetition.
A text of one word over and over has 0; m-grams that are all different have log2 of their number, so
that it grows with the text's length: compare it only at the same number of new tokens (ROME: 100).
It does not see nonsense: words drawn at random are very "fluent".

Differences.  ROME counts words by `nltk.word_tokenize`, whose sentence splitter needs data that has
to be downloaded; the default here is runs of letters, digits and underscores, and every other sign
by itself, and `words=nltk.word_tokenize` is ROME's.  A text shorter than m words has no m-gram and
H_m = 0, here as there.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # ROME's code; their mean over the two is 1


def split_words(text: str) -> list[str]:
    """Return the runs of letters, digits and underscores, and every other visible sign alone."""
    return re.findall(r"\w+|[^\w\s]", text)


def ngram_entropy(
    texts: Sequence[str], *, words: Callable[[str], list[str]] = split_words
) -> Float[np.ndarray, " n"]:
    """Return each text's weighted entropy of 2- and 3-grams, in bits; ROME reports the mean.

    Raises:
        ValueError: if `texts` is one string.
    """
    if isinstance(texts, str):
        raise ValueError("expected a sequence of texts, got a string; put it in a list")
    rows = [words(text) for text in texts]
    weighted = [[w * _entropy(row, m) for m, w in WEIGHTS.items()] for row in rows]
    return np.array(weighted, np.float64).reshape(-1, len(WEIGHTS)).mean(axis=1)


def _entropy(words: list[str], m: int) -> float:
    grams = Counter(zip(*(words[start:] for start in range(m)), strict=False))
    frequencies = np.array(list(grams.values()), np.float64) / max(grams.total(), 1)
    return float(-np.sum(frequencies * np.log2(frequencies)))
