"""The models that several claims are about, by seed: digits and authors."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jedit.data import (
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
from jedit.recipes.authors import MODEL
from jedit.recipes.authors import RECIPE as AUTHORS_RECIPE
from jedit.recipes.digits import LABEL, RECIPE
from jedit.recipes.question_answer import SELECT
from jedit.recipes.training import Recipe, train
from jedit.typing import Batch

SHARE_SEEN = 0.7


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


def digits(seed: int, *, forget: str = "class", epochs: int = RECIPE.epochs[0]) -> Scene:
    """Train on everything; to forget are all images of a "class", or the alike ones of a "hand"."""
    rows, _ = split_digits(load_digits(), seed=seed)
    apply, _ = _model()
    initial, order, cut = jax.random.split(jax.random.key(seed), 3)
    params = cnn(key=initial)[1]
    recipe = Recipe((epochs,), RECIPE.batch_size, RECIPE.learning_rate)
    trained = train(apply, params, rows.as_batch(), recipe, key=order)[0]
    chosen, others = (
        forget_class(rows, LABEL) if forget == "class" else forget_cluster(rows, LABEL, seed=seed)
    )
    others = others[np.asarray(jax.random.permutation(cut, len(others)))]
    seen, heldout = np.split(others, [round(SHARE_SEEN * len(others))])
    sets = (rows.take(part).as_batch() for part in (chosen, seen, heldout))
    return Scene(apply, trained.params, *sets)


def authors(seed: int, *, epochs: int = AUTHORS_RECIPE.epochs[0]) -> Scene:
    """Train a GPT on the rows of 30 invented authors; the last three are to be forgotten."""
    rows = facts_to_rows(generate_authors(seed, 30, 10))
    tokenizer = train_tokenizer(text_of(rows), MODEL.vocab)
    encoded = encode_rows(tokenizer, rows, MODEL.max_len, truncate=True)
    data = Batch(*(jnp.asarray(x) for x in encoded))
    initial, order, cut = jax.random.split(jax.random.key(seed), 3)
    apply, params = gpt(
        key=initial,
        vocab=tokenizer.get_vocab_size(),
        width=MODEL.width,
        num_layers=MODEL.layers,
        num_heads=MODEL.heads,
        max_len=data.inputs.shape[1],
    )
    recipe = Recipe((epochs,), AUTHORS_RECIPE.batch_size, AUTHORS_RECIPE.learning_rate)
    trained = train(apply, params, data, recipe, key=order)[0]
    others = np.asarray(jax.random.permutation(cut, len(rows) - 30))
    seen, heldout = np.split(others, [round(SHARE_SEEN * len(others))])
    parts = (np.arange(len(rows) - 30, len(rows)), seen, heldout)
    sets = (jax.tree.map(lambda x, p=part: x[p], data) for part in parts)
    return Scene(apply, trained.params, *sets, SELECT)


@functools.cache
def _model():
    return cnn(key=jax.random.key(0))
