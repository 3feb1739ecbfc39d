"""A small network with a forget and a retain set, and the loop by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jedit.core.batch import Batch
from jedit.objectives import GA, RetainNLL, with_retain
from jedit.training import TrainingMethod

CLASSES, FEATURES = 4, 6


def apply(params, inputs):
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"])
    return hidden @ params["out"]


def make_problem():
    keys = jax.random.split(jax.random.key(5), 6)
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (FEATURES, 5))},
        "out": jax.random.normal(keys[1], (5, CLASSES)),
    }

    def rows(k_x, k_y, count):
        x = jax.random.normal(k_x, (count, FEATURES))
        return Batch(x, jax.random.randint(k_y, (count,), 0, CLASSES))

    return params, rows(keys[2], keys[3], 7), rows(keys[4], keys[5], 19)


MOMENTUM = optax.sgd(0.05, momentum=0.9)
GRADDIFF = with_retain(GA())
METHOD = TrainingMethod(GRADDIFF, MOMENTUM, batch_size=4)


def retain_loss(params, rows):
    return RetainNLL()(apply, params, None, rows)


def by_hand(objective, optimizer, params, forget, retain, *, steps, key, batch_size):
    """A Python loop over explicit permutations."""
    numbers = []
    for rows, set_key in zip((forget, retain), jax.random.split(key), strict=True):
        count = len(rows.targets)
        stream = [
            np.asarray(jax.random.permutation(jax.random.fold_in(set_key, e), count))
            for e in range(steps * batch_size // count + 1)
        ]
        size = min(batch_size, count)
        numbers.append(np.concatenate(stream)[: steps * size].reshape(steps, size))
    differentiate = jax.jit(jax.value_and_grad(lambda p, drawn: objective(apply, p, *drawn)[0]))
    update = jax.jit(optimizer.update)
    state, losses = optimizer.init(params), []
    for drawn_rows in zip(*numbers, strict=True):
        drawn = [
            jax.tree.map(lambda x, i=i: x[i], rows)
            for rows, i in zip((forget, retain), drawn_rows, strict=True)
        ]
        loss, gradient = differentiate(params, drawn)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    return params, jnp.stack(losses)
