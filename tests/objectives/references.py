"""A small model with ragged batches, and the objectives' parts in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from jedit.core.batch import Batch

BATCH, SEQ, VOCAB, WIDTH = 5, 4, 7, 3


def apply(params, inputs):
    """A linear softmax model of one-hot tokens: wrong rows or axes cannot cancel out."""
    return params["embed"][inputs] @ params["out"]


def make_params(key):
    k_embed, k_out = jax.random.split(key)
    return {
        "embed": jax.random.normal(k_embed, (VOCAB, WIDTH)),
        "out": jax.random.normal(k_out, (WIDTH, VOCAB)),
    }


def make_batch(key, *, garbage=0):
    """Rows of several lengths; the last row is padding altogether."""
    k_inputs, k_targets = jax.random.split(key)
    lengths = jnp.array([4, 2, 3, 1, 0])
    valid = jnp.arange(SEQ)[None] < lengths[:, None]
    mask = (valid & (jnp.arange(SEQ)[None] > 0)) | (lengths[:, None] == 1)
    counted = mask & valid
    inputs = jax.random.randint(k_inputs, (BATCH, SEQ), 0, VOCAB)
    targets = jax.random.randint(k_targets, (BATCH, SEQ), 0, VOCAB)
    return Batch(jnp.where(valid, inputs, garbage), jnp.where(counted, targets, -100), mask, valid)


def numpy_logits(params, batch):
    embed, out = (np.asarray(params[name], np.float64) for name in ("embed", "out"))
    return embed[np.asarray(batch.inputs)] @ out


def numpy_counted(batch):
    return np.asarray(batch.mask).astype(bool) & np.asarray(batch.valid).astype(bool)


def numpy_nll(params, batch):
    """Per output, 0 where it does not count."""
    log_p = scipy.special.log_softmax(numpy_logits(params, batch), axis=-1)
    result = np.zeros((BATCH, SEQ))
    for row, position in zip(*np.nonzero(numpy_counted(batch)), strict=True):
        result[row, position] = -log_p[row, position, batch.targets[row, position]]
    return result


def numpy_mean_nll(params, batch):
    return numpy_nll(params, batch).sum() / numpy_counted(batch).sum()


def numpy_kl(reference, params, batch):
    p, q = (scipy.special.softmax(numpy_logits(x, batch), axis=-1) for x in (reference, params))
    return (p * np.log(p / q)).sum(-1)[numpy_counted(batch)].mean()


def numpy_npo(reference, params, batch, beta):
    is_example = numpy_counted(batch).any(axis=1)
    growth = (numpy_nll(params, batch) - numpy_nll(reference, batch)).sum(axis=1)[is_example]
    return np.mean(-(2 / beta) * np.log(scipy.special.expit(beta * growth)))


def make_problem():
    """Params, reference params, a forget and a retain batch."""
    keys = jax.random.split(jax.random.key(5), 4)
    return (
        make_params(keys[0]),
        make_params(keys[1]),
        make_batch(keys[2]),
        make_batch(keys[3]),
    )
