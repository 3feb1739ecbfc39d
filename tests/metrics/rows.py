"""A model that is a table of logits, and batches of rows of different lengths for it."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from jedit.core.batch import Batch

ROWS, SEQ, VOCAB = 11, 5, 6


def apply(params, inputs):
    return params[inputs]


def make_problem(key, scale=2.0):
    """Params (VOCAB, VOCAB) and one batch; lengths differ, so means of batch means would too."""
    k_params, k_inputs, k_targets, k_length = jax.random.split(key, 4)
    lengths = jax.random.randint(k_length, (ROWS,), 1, SEQ + 1)
    data = Batch(
        jax.random.randint(k_inputs, (ROWS, SEQ), 0, VOCAB),
        jax.random.randint(k_targets, (ROWS, SEQ), 0, VOCAB),
        jnp.arange(SEQ)[None] < lengths[:, None],
    )
    return scale * jax.random.normal(k_params, (VOCAB, VOCAB)), data


def split(data, size, *, left=0, right=0):
    """Batches of `size` rows; the last is filled up with rows of garbage that do not count.

    Each row gets `left` and `right` more positions of garbage, which do not count either.
    """
    for start in range(0, len(data.targets), size):
        part = jax.tree.map(lambda x, start=start: x[start : start + size], data)
        around = ((0, size - len(part.targets)), (left, right))
        yield Batch(
            jnp.pad(part.inputs, around, constant_values=3),
            jnp.pad(part.targets, around, constant_values=-100),
            jnp.pad(part.mask, around),
        )


def numpy_rows(params, data):
    """Each row's log probabilities (t, VOCAB) and targets (t,), counted positions only, float64."""
    log_p = scipy.special.log_softmax(np.asarray(params, np.float64)[np.asarray(data.inputs)], -1)
    return [
        (row[mask], target[mask])
        for row, target, mask in zip(
            log_p, np.asarray(data.targets), np.asarray(data.mask), strict=True
        )
    ]
