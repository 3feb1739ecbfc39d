"""What holds an answer up, and what holds it down: was it erased, or hidden (arXiv 2509.22263)?

    A_i(x, y) = θ_i ∂P(y|x)/∂θ_i                    `attribution`, for one row `objectives`
    A_i(x, y) = h_i ∂P(y|x)/∂h_i, by a site          `attribution(..., sites=[...])`
    I+ = Σ_i max(A_i, 0),   I- = Σ_i max(-A_i, 0)    `influence`, row by row
    D+ = (I+ before - I+ after) / T                  `influence_shift`, "erased"
    D- = (I- after - I- before) / T                  `influence_shift`, "hidden"
    T  = mean over the rows of (I+ + I-) before

What held the answer up may be gone (D+: true erasure, by the paper), or something new holds it down
(D-: hiding, which training on anything can undo).  In the mean over the rows

    D+ + D- = (Σ A before - Σ A after) / T,      D+ - D- = 1 - (I+ + I- after) / T

so that the two say how far Σ_i A_i has fallen and how far all influence has, and nothing else.
Where a common factor of a matrix moves nothing, as before a norm, Σ_i A_i is 0 over that matrix,
and D- = -D+ there whatever was done to the model.  All A of a row carry the factor P: of an answer
that has become impossible nothing is left of either sign, D+ > 0 > D-, however it was made so.  So
neither number is a verdict, and models are to be compared at one P alone: in our test models of
which a third or nothing came back by relearning had the same two (tests/bench/claims/ssiuu.md).

Units.  θ_i is a single parameter.  A hidden unit is a coordinate of what enters a site y = h W, by
that site's own work alone: since the sum over positions of h_i Σ_j W_ij ∂P/∂y_j is Σ_j W_ij
∂P/∂W_ij, it is the sum of a row of the parameters' attributions, and costs nothing beside them.

Differences.  What D+ and D- stand for is the paper's [notes]; that they are differences of sums
over all units, each row's by itself, that T is their unit, and the geometric mean over tokens in
the place of P are ours.  With `score="log_probability"` the factor P is gone; but then each sum
grows with the row's gradient, in a model that never saw the row as well: read it beside such a
model's.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.paths import parameter_paths
from jedit.metrics.streaming import each_batch
from jedit.objectives.attribution import Score, row_attribution
from jedit.tracing import find_sites
from jedit.tracing.sites import Weight

Units = tuple[tuple[str, Weight | None], ...]  # a part's name, and the matrix whose rows are summed


class Influence(NamedTuple):
    """How much of a model holds each row's answer up, and how much holds it down.

    Attributes:
        positive: I+, the sum of the positive attributions of each row within each part.
        negative: I-, that of the negative ones, as a number from 0 up.
        parts: the parts' names: parameter paths, or sites.
    """

    positive: Float[np.ndarray, "n parts"]
    negative: Float[np.ndarray, "n parts"]
    parts: tuple[str, ...]

    __repr__ = short_repr


class InfluenceShift(NamedTuple):
    """What an edit did to the influences, in shares of all that there was before.

    Attributes:
        erased: D+ of each row; its mean is that of the set.
        hidden: D- of each row.
        erased_by_part: the mean D+ within each part; they add up to the mean of `erased`.
        hidden_by_part: the same of D-.
        parts: the parts' names.
    """

    erased: Float[np.ndarray, " n"]
    hidden: Float[np.ndarray, " n"]
    erased_by_part: Float[np.ndarray, " parts"]
    hidden_by_part: Float[np.ndarray, " parts"]
    parts: tuple[str, ...]

    __repr__ = short_repr


@on_auto_axes
def attribution(
    apply: Apply,
    params: PyTree,
    batches: Iterable[Batch] | Batch,
    *,
    sites: Sequence[str] | None = None,
    score: Score = "probability",
) -> dict[str, Float[np.ndarray, "..."]]:
    """Return each unit's attribution, the mean over the rows.

    One row is differentiated at a time: the cost is a gradient per row, the memory a gradient in
    params' dtype and two in float32 (or wider), the attributions of a row and their sum.

    Args:
        apply: `apply(params, inputs) -> logits`; no row's outputs may depend on another row.
        params: the model's parameters, all of them floating.
        batches: the rows.
        sites: names of dense sites, as `find_sites` prints them: units are the coordinates of what
            enters them, summed over positions, (d_in,) each or (layers, d_in); None: the
            parameters, in their shapes.
        score: "probability" (paper) or its logarithm.

    Returns:
        By part, in probability, or nats, per relative change of the unit; in float64.

    Raises:
        ValueError: an unknown score or site, a site that is not dense or shares its parameter with
            another, a packed batch, or no row that counts.
    """
    sums: dict[str, np.ndarray] = {}
    number, units = 0, None
    for batch in each_batch(apply, params, batches):
        units = _units(apply, params, batch, sites) if units is None else units
        found, count = jax.device_get(_sums(apply, score, units, params, batch))
        number += int(count)
        for (name, _), value in zip(units, found, strict=True):
            sums[name] = sums.get(name, 0) + np.asarray(value, np.float64)
    if not number:
        raise ValueError("no row counts: there are no batches, or mask and valid leave out all")
    return {name: value / number for name, value in sums.items()}


@on_auto_axes
def influence(
    apply: Apply,
    params: PyTree,
    batches: Iterable[Batch] | Batch,
    *,
    sites: Sequence[str] | None = None,
    score: Score = "probability",
) -> Influence:
    """Return how much of a model holds each row's answer up and down; arguments as `attribution`'s.

    Rows come in the order given; one none of whose outputs counts is left out.

    Raises:
        ValueError: what `attribution` refuses.
    """
    found, names = [], None
    for batch in each_batch(apply, params, batches):
        units = _units(apply, params, batch, sites)
        names = tuple(name for name, _ in units)
        positive, negative, counts = jax.device_get(_by_row(apply, score, units, params, batch))
        found.append([np.asarray(x, np.float64)[counts > 0] for x in (positive, negative)])
    if names is None or not sum(len(part[0]) for part in found):
        raise ValueError("no row counts: there are no batches, or mask and valid leave out all")
    positive, negative = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Influence(positive, negative, names)


def influence_shift(before: Influence, after: Influence) -> InfluenceShift:
    """Return D+ and D- of the way from one model to another, of the same rows and units.

        before, after = (influence(apply, p, forget) for p in (params, edited))
        shift = influence_shift(before, after)
        print(shift.erased.mean(), shift.hidden.mean())  # D+, D-

    Raises:
        ValueError: the two are of other rows or units.
    """
    if before.parts != after.parts or before.positive.shape != after.positive.shape:
        raise ValueError(
            f"both influences must be of the same rows and units, got {before.positive.shape} and "
            f"{after.positive.shape} (rows, parts)"
        )
    # Of a model that nothing moves there is no share.
    unit = max((before.positive + before.negative).sum(axis=1).mean(), np.finfo(float).tiny)
    erased = (before.positive - after.positive) / unit
    hidden = (after.negative - before.negative) / unit
    return InfluenceShift(
        erased.sum(axis=1), hidden.sum(axis=1), erased.mean(0), hidden.mean(0), before.parts
    )


def _units(apply: Apply, params: PyTree, batch: Batch, names: Sequence[str] | None) -> Units:
    paths = [path for path, _ in parameter_paths(params)]
    if names is None:
        return tuple((path, None) for path in paths)
    sites = find_sites(apply, params, batch.inputs)
    found = []
    for name in names:
        if name not in sites:
            raise ValueError(f"{name!r} is no site of this function; its sites are: {list(sites)}")
        site = sites[name]
        if site.kind != "dense":
            raise ValueError(f"{name!r} is of kind {site.kind!r}; hidden units enter dense sites")
        twins = [other for other, its in sites.items() if its.path == site.path and other != name]
        if twins:
            raise ValueError(f"{name!r} shares its parameter with {twins}: its work has no part")
        found.append((name, site.weight.kernel))
    return tuple(found)


def _parts(units: Units, tree: PyTree) -> list[Array]:
    """Return the attributions of each part's units, of those of the parameters."""
    leaves = dict(parameter_paths(tree))

    def entering(weight: Weight) -> Array:
        sums = jnp.sum(weight.gather(leaves), axis=-1)
        return sums if weight.is_stacked else sums[0]

    return [leaves[name] if weight is None else entering(weight) for name, weight in units]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(
    apply: Apply, score: Score, units: Units, params: PyTree, batch: Batch
) -> tuple[list[Array], Array]:
    def of_row(row: Batch) -> tuple[list[Array], Array]:
        tree, count = row_attribution(score, apply, params, row)
        return _parts(units, tree), (count > 0).astype(jnp.int32)

    def add(total: tuple, row: Batch) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, of_row(row)), None

    rows = jax.tree.map(jnp.asarray, batch)
    one = jax.eval_shape(of_row, jax.tree.map(lambda x: x[0], rows))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    return jax.lax.scan(add, zero, rows)[0]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _by_row(
    apply: Apply, score: Score, units: Units, params: PyTree, batch: Batch
) -> tuple[Float[Array, "n parts"], Float[Array, "n parts"], Array]:
    def of_row(row: Batch) -> tuple[Array, Array, Array]:
        tree, count = row_attribution(score, apply, params, row)
        parts = _parts(units, tree)
        positive, negative = (
            jnp.stack([jnp.sum(jnp.maximum(sign * part, 0)) for part in parts]) for sign in (1, -1)
        )
        return positive, negative, count

    return jax.lax.map(of_row, jax.tree.map(jnp.asarray, batch))
