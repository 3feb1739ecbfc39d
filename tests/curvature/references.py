"""What the curvature should be, by NumPy in float64 out of `jax.jacrev`: small and slow."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.flatten_util import ravel_pytree

from jedit.curvature.likelihoods import Bernoulli, Categorical, Gaussian


def counted(batch, lead):
    """Which outputs count, as NumPy booleans."""
    parts = [np.ones(lead, bool)]
    parts += [np.asarray(m).astype(bool) for m in (batch.mask, batch.valid) if m is not None]
    return np.logical_and.reduce(parts)


def label_scores(likelihood, outputs):
    """For all labels k, sqrt(p_k) times the score of label k: (k, ..., event), by NumPy."""
    z = np.asarray(outputs, np.float64)
    eye = np.eye(z.shape[-1]).reshape(z.shape[-1], *(1,) * (z.ndim - 1), z.shape[-1])
    if isinstance(likelihood, Categorical):
        p = scipy.special.softmax(z / likelihood.temperature, axis=-1)
        weights = np.moveaxis(np.sqrt(p), -1, 0)[..., None]
        return weights * (p - eye) / likelihood.temperature
    if isinstance(likelihood, Gaussian):
        return np.broadcast_to(eye / likelihood.scale, (z.shape[-1], *z.shape))
    assert isinstance(likelihood, Bernoulli)
    p = scipy.special.expit(z / likelihood.temperature)
    return eye * np.sqrt(p * (1 - p)) / likelihood.temperature


def score_rows(apply, likelihood, params, batch):
    """All gradients whose outer products sum to M F: (rows, number of parameters).

    One row for each counted output and label; labels of different outputs have no cross terms.
    """
    flat, unravel = ravel_pytree(params)
    outputs = apply(params, batch.inputs)
    jacobian = jax.jit(jax.jacrev(lambda x: apply(unravel(x), batch.inputs)))(flat)
    is_counted = counted(batch, outputs.shape[:-1])
    scores = label_scores(likelihood, outputs)[:, is_counted]
    rows = np.einsum("knc,ncp->knp", scores, np.asarray(jacobian, np.float64)[is_counted])
    return rows.reshape(-1, flat.size), is_counted.sum()


def dense_fisher(apply, likelihood, params, batch):
    """F = (1/M) Σ ∇ℓ ∇ℓᵀ with exact labels, over the flattened parameters."""
    rows, number = score_rows(apply, likelihood, params, batch)
    return rows.T @ rows / number


def rows_as_trees(rows, params):
    """Rows of flat gradients as a tree of NumPy arrays (rows, *shape)."""
    flat, unravel = ravel_pytree(params)
    return jax.tree.map(np.asarray, jax.vmap(unravel)(jnp.asarray(rows, flat.dtype)))


def factors_by_hand(program, params, batch, likelihood, sharing="expand"):
    """{block: (A, G)} with exact labels, from a program's taps.

    Returns:
        The factors of every tapped block; layers are stacked, and several sites merged by the
        partial traces of the dense sum of their Kronecker products.
    """
    sites = {}

    def look(path, a, y, site=0, use=0, is_flipped=False, ran=True):
        sites.setdefault((path, site), {})[use] = (a, y, is_flipped, ran)
        return y

    outputs = program.model(params, batch.inputs, look)
    probes = {s: {u: jnp.zeros(t[1].shape) for u, t in uses.items()} for s, uses in sites.items()}

    def probed(probes):
        def add(path, a, y, site=0, use=0, **_):
            del a
            return y + probes[path, site][use]

        return program.model(params, batch.inputs, add)

    jacobians = jax.jit(jax.jacrev(probed))(probes)
    scores = label_scores(likelihood, outputs)
    lead = outputs.shape[:-1]
    is_counted = counted(batch, lead)
    valid = np.ones(lead) if batch.valid is None else np.asarray(batch.valid, np.float64)
    found = {}
    for (path, site), uses in sites.items():
        a, g, v = [], [], []
        for use, (activation, y, _, ran) in uses.items():
            a.append(np.asarray(activation, np.float64).reshape(len(y), -1, activation.shape[-1]))
            jacobian = np.asarray(jacobians[path, site][use], np.float64)
            jacobian = jacobian.reshape(*outputs.shape, len(y), -1, y.shape[-1])
            scored = np.einsum("k...c,...cnsd->k...nsd", scores, jacobian)[:, is_counted]
            g.append(scored.reshape(-1, *scored.shape[2:]))  # (labels · outputs, n, s, d_out)
            here = valid[:, use : use + 1] if len(uses) > 1 else valid
            repeats = a[-1].shape[1] // here[0].size
            v.append(np.repeat(here.reshape(len(here), -1), repeats, axis=1) * np.asarray(ran))
        a, g, v = np.concatenate(a, 1), np.concatenate(g, 2), np.concatenate(v, 1)
        g = g * v[None, :, :, None]
        if sharing == "reduce":
            number = v.sum(1, keepdims=True)
            a = (a * v[..., None]).sum(1, keepdims=True) / np.maximum(number, 1)[..., None]
            g, v = g.sum(2, keepdims=True), np.minimum(number, 1)
        moment = np.einsum("nsi,nsj,ns->ij", a, a, v) / max(v.sum(), 1)
        output = np.einsum("rnsi,rnsj->ij", g, g) / is_counted.sum()
        is_flipped = uses[0][2]
        pair = (output, moment) if is_flipped else (moment, output)
        found.setdefault(path, []).append(pair)
    merged = {path: merge_by_traces(pairs) for path, pairs in found.items()}
    out = {}
    for path in dict.fromkeys(name.partition("@")[0] for name in merged):
        layers = [pair for name, pair in merged.items() if name.partition("@")[0] == path]
        is_stacked = path in program.stacked
        out[path] = (
            tuple(np.stack(side) for side in zip(*layers, strict=True)) if is_stacked else layers[0]
        )
    return out


def merge_by_traces(pairs):
    """(A, G) with tr = 1 for A, whose product has the partial traces of Σ A_k ⊗ G_k."""
    if len(pairs) == 1:
        return pairs[0]
    d_in, d_out = len(pairs[0][0]), len(pairs[0][1])
    whole = sum(np.kron(a, g) for a, g in pairs).reshape(d_in, d_out, d_in, d_out)
    a, g = np.einsum("iojo->ij", whole), np.einsum("ioip->op", whole)
    return a / np.trace(a), g
