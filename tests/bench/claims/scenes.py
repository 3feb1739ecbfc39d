"""The models that several claims are about, by seed: digits and authors."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from tokenizers import Tokenizer

from jedit.core.batch import Batch
from jedit.data import (
    QaRow,
    encode_rows,
    forget_class,
    forget_cluster,
    generate_authors,
    load_digits,
    split_digits,
    text_of,
    train_tokenizer,
)
from jedit.models import cnn
from jedit.recipes.fitting import Recipe, train
from jedit.recipes.scenes.authors import MODEL
from jedit.recipes.scenes.authors import RECIPE as AUTHORS_RECIPE
from jedit.recipes.scenes.digits import LABEL, RECIPE
from jedit.recipes.scenes.question_answer import SELECT

SHARE_SEEN = 0.7
CNN = cnn(key=jax.random.key(0))[0]  # one function, so that seeds share what is compiled


class Scene(NamedTuple):
    """One seed's model and sets.

    Attributes:
        apply: `apply(params, inputs) -> logits`.
        params: trained on everything.
        forget: rows to forget.
        retain: rows that an edit sees.
        heldout: other retain rows, which judge it.
        select: which parameters K-FADE edits; None: all.
    """

    apply: Callable
    params: PyTree
    forget: Batch
    retain: Batch
    heldout: Batch
    select: str | None = None


def parted(others: np.ndarray, cut) -> tuple[np.ndarray, np.ndarray]:
    """Retain rows in random order, those that edits see and those held out."""
    order = np.asarray(jax.random.permutation(jax.random.clone(cut), len(others)))
    seen, heldout = np.split(others[order], [round(SHARE_SEEN * len(others))])
    return seen, heldout


def digits_model(seed: int, recipe: Recipe = RECIPE):
    """The rows, the test images, what trains on rows, and the key of the cut."""
    initial, order, cut = jax.random.split(jax.random.key(seed), 3)
    rows, test = split_digits(load_digits(), seed=seed)

    def fit(part) -> PyTree:
        start = cnn(key=jax.random.clone(initial))[1]
        return train(CNN, start, part.as_batch(), recipe, key=order)[0].params

    return rows, test, fit, cut


def digits(seed: int, *, forget: str = "class", epochs: int = RECIPE.epochs[0]) -> Scene:
    """Train on everything; to forget are all images of a "class", or the alike ones of a "hand"."""
    rows, _, fit, cut = digits_model(seed, RECIPE._replace(epochs=(epochs,)))
    chosen, others = (
        forget_class(rows, LABEL) if forget == "class" else forget_cluster(rows, LABEL, seed=seed)
    )
    sets = (rows.take(part).as_batch() for part in (chosen, *parted(others, cut)))
    return Scene(CNN, fit(rows), *sets)


class Authors(NamedTuple):
    """The rows of invented authors, ten each, of whom the last three are to be forgotten.

    Attributes:
        rows: with their questions in other words.
        tokenizer: trained on them.
        data: all of them, encoded.
        apply: of a GPT of the demo's size.
        fit: trains it on the rows of given numbers.
        parts: numbers of the rows to forget, those that edits see, and those held out.
    """

    rows: list[QaRow]
    tokenizer: Tokenizer
    data: Batch
    apply: Callable
    fit: Callable[[np.ndarray], PyTree]
    parts: tuple[np.ndarray, np.ndarray, np.ndarray]

    def take(self, numbers: np.ndarray) -> Batch:
        """The rows of these numbers."""
        return jax.tree.map(lambda x: x[numbers], self.data)


def authors_model(
    seed: int, *, epochs: int = AUTHORS_RECIPE.epochs[0], num_authors: int = 30
) -> Authors:
    """Make the rows and the untrained model."""
    initial, order, cut = jax.random.split(jax.random.key(seed), 3)
    rows = generate_authors(seed, num_authors, 10)
    tokenizer = train_tokenizer(text_of(rows), MODEL.vocab)
    data = encode_rows(tokenizer, rows, MODEL.max_len, truncate=True)
    vocab = tokenizer.get_vocab_size()
    apply, params = _gpt_of(vocab), MODEL.make(vocab, MODEL.max_len, key=initial)[1]
    recipe = AUTHORS_RECIPE._replace(epochs=(epochs,))

    def fit(numbers: np.ndarray) -> PyTree:
        part = jax.tree.map(lambda x: x[numbers], data)
        return train(apply, params, part, recipe, key=order)[0].params

    num_kept = len(rows) - 30
    parts = (np.arange(num_kept, len(rows)), *parted(np.arange(num_kept), cut))
    return Authors(rows, tokenizer, data, apply, fit, parts)


def authors(seed: int) -> Scene:
    """Train a GPT on all of them."""
    made = authors_model(seed)
    sets = (made.take(part) for part in made.parts)
    return Scene(made.apply, made.fit(np.arange(300)), *sets, SELECT)


@functools.cache
def _gpt_of(vocab: int):
    """One function for all seeds, as `CNN` is."""
    return MODEL.make(vocab, MODEL.max_len, key=jax.random.key(0))[0]
