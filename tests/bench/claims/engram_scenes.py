"""The models whose engrams are measured: digits without a hand or a class, authors without some."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import jedit
from jedit.data import (
    encode_pairs,
    encode_rows,
    facts_to_rows,
    forget_class,
    forget_cluster,
    generate_authors,
    load_digits,
    split_digits,
    text_of,
    train_tokenizer,
)
from jedit.models import cnn, gpt
from jedit.recipes import authors, digits
from jedit.recipes.question_answer import SELECT
from jedit.recipes.training import Recipe, train

SHARE_SEEN = 0.7


class Scene(NamedTuple):
    """A model, the same retrained without the forget rows, and the sets.

    Attributes:
        retain: rows that statistics and edits see; `heldout`, rows of the training set that they do
            not; `test`, rows that no model was trained on.
        probe: retain rows of K-FADE's line search.
        chunk: rows of one pass of the statistics.
        select: parameters that are edited, or None for all.
        fisher: of the curvature's labels.
        kl_budget: held-out KL within which a best point is chosen, as in the demo.
        budgets: of K-FADE.
    """

    name: str
    apply: Callable
    original: PyTree
    retrained: PyTree
    forget: jedit.Batch
    retain: jedit.Batch
    heldout: jedit.Batch
    test: jedit.Batch
    probe: int
    chunk: int
    select: str | None
    fisher: str
    kl_budget: float
    budgets: tuple[float, ...]


CNN = cnn(key=jax.random.key(0))[0]  # one function, so that seeds share what is compiled


def digits_model(seed: int):
    """The rows, the test images and the model trained on the rows; the key of the row order."""
    initial, order, cut = jax.random.split(jax.random.key(seed), 3)
    rows, test = split_digits(load_digits(), seed=seed)

    def fit(part):
        start = cnn(key=jax.random.clone(initial))[1]
        return train(CNN, start, part.as_batch(), digits.RECIPE, key=order)[0].params

    return rows, test, fit, cut


def digits_scenes(seed: int) -> Iterator[Scene]:
    """One hand, then one class."""
    rows, test, fit, cut = digits_model(seed)
    original, label = fit(rows), digits.LABEL
    parts = {
        "digits, one hand": (forget_cluster(rows, label, seed=seed), test),
        "digits, one class": (
            forget_class(rows, label),
            test.take(np.flatnonzero(test.labels != label)),
        ),
    }
    for name, ((chosen, others), tested) in parts.items():
        retrained = fit(rows.take(others))
        others = others[np.asarray(jax.random.permutation(jax.random.clone(cut), len(others)))]
        seen, heldout = np.split(others, [round(SHARE_SEEN * len(others))])
        yield Scene(
            name,
            CNN,
            original,
            retrained,
            *(rows.take(part).as_batch() for part in (chosen, seen, heldout)),
            tested.as_batch(),
            512,
            256,
            None,
            "exact",
            digits.GRID.kl_budget,
            digits.GRID.budgets,
        )


@functools.cache
def _gpt_of(vocab: int):
    """One function for all seeds, as `CNN` is."""
    return _gpt(vocab, key=jax.random.key(0))[0]


def _gpt(vocab: int, *, key):
    size = authors.MODEL
    return gpt(
        key=key,
        vocab=vocab,
        width=size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        max_len=size.max_len,
    )


def authors_scenes(seed: int) -> Iterator[Scene]:
    """The demo's authors, after 7 epochs: 30 of 300 rows are to be forgotten."""
    initial, order, cut = jax.random.split(jax.random.key(seed), 3)
    rows = facts_to_rows(generate_authors(seed, 30, 10))
    tokenizer = train_tokenizer(text_of(rows), authors.MODEL.vocab)
    max_len, kept, chosen = authors.MODEL.max_len, np.arange(270), np.arange(270, 300)
    data = jedit.Batch(*map(jnp.asarray, encode_rows(tokenizer, rows, max_len, truncate=True)))
    others = kept[np.asarray(jax.random.permutation(cut, len(kept)))]
    seen, heldout = np.split(others, [round(SHARE_SEEN * len(others))])
    words = [(rows[i].paraphrased_question or "", rows[i].answer) for i in heldout]
    tested = encode_pairs(tokenizer, words, max_len, truncate=True)
    apply = _gpt_of(tokenizer.get_vocab_size())
    params = _gpt(tokenizer.get_vocab_size(), key=initial)[1]
    take = lambda ids: jax.tree.map(lambda x: x[ids], data)  # noqa: E731
    recipe = Recipe((7,), authors.RECIPE.batch_size, authors.RECIPE.learning_rate)
    fit = lambda ids: train(apply, params, take(ids), recipe, key=order)[0].params  # noqa: E731
    yield Scene(
        "authors, 7 epochs",
        apply,
        fit(np.arange(300)),
        fit(kept),
        *(take(part) for part in (chosen, seen, heldout)),
        jedit.Batch(*map(jnp.asarray, tested)),
        32,
        32,
        SELECT,
        "sampled",
        authors.GRID.kl_budget,
        authors.GRID.budgets,
    )
