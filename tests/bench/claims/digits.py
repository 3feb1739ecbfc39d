"""The digits model that several claims are about, by seed; one function for all of them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jedit.data import forget_class, forget_cluster, load_digits, split_digits
from jedit.models import cnn
from jedit.recipes.digits import LABEL, RECIPE
from jedit.recipes.training import Recipe, train
from jedit.typing import Batch


class Scene(NamedTuple):
    """One seed's model and sets; `retain` is what an edit sees, `heldout` what judges it."""

    apply: Callable
    params: PyTree
    forget: Batch
    retain: Batch
    heldout: Batch


def scene(seed: int, *, forget: str = "class", epochs: int = RECIPE.epochs[0]) -> Scene:
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
    seen, heldout = np.split(others, [round(0.7 * len(others))])
    sets = (rows.take(part).as_batch() for part in (chosen, seen, heldout))
    return Scene(apply, trained.params, *sets)


@functools.cache
def _model():
    return cnn(key=jax.random.key(0))
