"""InTAct: updates that keep what layers do inside the intervals of earlier tasks' activations.

    ΔW = W - W*,  D⁺ = relu(ΔW),  D⁻ = relu(-ΔW)
    lo = D⁺ l - D⁻ u + Δb,  hi = D⁺ u - D⁻ l + Δb        what ΔW can do to the output in [l, u]

    L = L_t + .01 V + H + D + C
    V = Σ_s mean_d var(a_s)             the batch's features lie close together
    H = Σ_s mean(lo²) + mean(hi²)       layers keep their function in the box
    D = mean (a_1 - a_1*)²              features stay, over those with l <= a_1 <= u
    C = Σ_s ‖c_s - c_s*‖ / mean radius  the batch comes back, over features that have left the box

    a_s     what enters site s, s = 1 the first; a* the same of the frozen parameters   `sites`
    l, u    5th and 95th percentiles of a_s over all earlier tasks       `activation_intervals`
    c, c*   centres, (max + min)/2 of the batch and (l + u)/2

Krukowski et al., arXiv 2511.17439; formula and weights of V, H, D, C (.01, 1, 1, 1) [code read].
lo and hi are exact bounds of ΔWᵀa + Δb over the box: each output's worst corner.

Differences. In the code features are what a LeakyReLU layer gives out, ours what enters a site, the
same array; an activation's positions are rows here, for a sequence those of outputs that count.
The code leaves the head out of H for class-incremental streams, where it masks the old classes'
logits: name the head in `unheld` for that; masking is the model's own affair.  The intervals are
the elementwise smallest l and largest u of all tasks [code].
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jedit.core.arguments import batch_list, check_batch, check_params
from jedit.core.batch import Apply, Batch
from jedit.core.checks import NOT_NEGATIVE, Range, check_numbers
from jedit.core.display import short_repr
from jedit.core.outputs import counted_outputs
from jedit.core.paths import exactly, parameter_paths
from jedit.core.precision import HIGHEST, wide
from jedit.core.precision import total as total_of
from jedit.objectives.objective import Value
from jedit.objectives.token_nll import masked_mean
from jedit.tracing import find_sites
from jedit.tracing.intervene import intervene
from jedit.tracing.sites import Site

TINY = 1e-8  # the code's, beside a count and a mean radius


class Intervals(NamedTuple):
    """The boxes in which earlier tasks' activations lie, and the parameters that made them.

    Attributes:
        params: W*, the parameters after the last task.
        lower: by site l, (d_in,).
        upper: by site u, (d_in,).
    """

    params: PyTree
    lower: dict[str, Array]
    upper: dict[str, Array]

    __repr__ = short_repr


def activation_intervals(
    apply: Apply,
    params: PyTree,
    batches: Iterable[Batch] | Batch,
    sites: Sequence[str],
    *,
    share: float = 0.05,
    before: Intervals | None = None,
) -> Intervals:
    """Return the intervals of a task that has been learnt, joined with those of the tasks before.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: the parameters now.
        batches: rows of the task.
        sites: names of dense or convolutional sites, as `find_sites` prints them.
        share: the share of the activations that lies below an interval, and as much above; 0.05 is
            the code's.
        before: the intervals of the tasks before; None: there are none.

    Raises:
        ValueError: a name that is no such site, or a share that is not from 0 to 0.5.
    """
    check_numbers(Range(0, 0.5), share=share)
    check_params(params)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in sites}
    for batch in batch_list(batches, "batches"):
        found, _ = _entering(apply, params, batch, tuple(sites))
        for name, (values, counted) in found.items():
            rows[name].append(np.asarray(values)[np.asarray(counted)])
    lower, upper = {}, {}
    for name, parts in rows.items():
        values = np.sort(np.concatenate(parts), axis=0)
        if not len(values):
            raise ValueError("the batches count no output, so there is no activation to bound")
        last = len(values) - 1
        lower[name] = jnp.asarray(values[int(share * last)])
        upper[name] = jnp.asarray(values[last - int(share * last)])
    if before is not None:
        lower = {name: jnp.minimum(low, before.lower[name]) for name, low in lower.items()}
        upper = {name: jnp.maximum(high, before.upper[name]) for name, high in upper.items()}
    return Intervals(jax.tree.map(jnp.copy, params), lower, upper)


@dataclasses.dataclass(frozen=True)
class InTAct:
    """The penalties of InTAct, to be added to the loss of the rows to be learnt.

        sites = ("layers/1/kernel", "layers/2/kernel")
        with_retain(LearnNLL(), InTAct(sites))           # reference: activation_intervals(...)

    The first task, which has no intervals yet, is learnt with `InTAct(sites, **VARIANCE_ALONE)`:
    where the other three weights are 0, the reference is not looked at.

    Attributes:
        sites: names of the sites whose inputs have intervals, the first one first.
        unheld: those of them whose weights are free.
        variance_weight: of V; 0.01 is the code's.
        held_weight: of H; 1 is the code's.
        drift_weight: of D; 1 is the code's.
        align_weight: of C; 1 is the code's.
    """

    sites: tuple[str, ...]
    unheld: tuple[str, ...] = ()
    variance_weight: float = 0.01
    held_weight: float = 1.0
    drift_weight: float = 1.0
    align_weight: float = 1.0

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in WEIGHTS}
        check_numbers(NOT_NEGATIVE, **weights)
        if not self.sites or (extra := set(self.unheld) - set(self.sites)):
            got = f"unheld={sorted(extra)}" if self.sites else "no site"
            raise ValueError(f"InTAct needs at least one site, and unheld among them; got {got}")

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: PyTree = None,
        reference: Intervals | PyTree | None = None,
    ) -> Value:
        """Return the penalty; costs one forward pass, and one of the frozen parameters.

        Raises:
            TypeError: the reference is no `Intervals`, though a weight asks for them.
        """
        check_batch(forget, "forget")
        del retain
        found, places = _entering(apply, params, forget, self.sites)
        variance = total_of([_variance(*found[name]) for name in self.sites])
        total = self.variance_weight * variance
        aux = {"variance": variance}
        if self.held_weight == self.drift_weight == self.align_weight == 0:
            return total, aux
        if not isinstance(reference, Intervals):
            raise TypeError(
                "InTAct needs as its reference what `activation_intervals` returns, unless held, "
                f"drift and align have no weight; got {type(reference).__name__}"
            )
        fixed = jax.lax.stop_gradient(reference)
        first = self.sites[0]
        before = _entering(apply, fixed.params, forget, (first,))[0][first][0]
        boxes = {name: (fixed.lower[name], fixed.upper[name]) for name in self.sites}
        drift = _drift(*found[first], jax.lax.stop_gradient(before), *boxes[first])
        held = jnp.zeros((), drift.dtype)
        for name in (name for name in self.sites if name not in self.unheld):
            move = _moved(places[name], params, fixed.params)
            lo, hi = interval_bounds(move, *boxes[name], has_bias=_has_bias(places[name]))
            held = held + jnp.mean(lo**2) + jnp.mean(hi**2)
        align = total_of([_align(*found[name], *boxes[name]) for name in self.sites])
        total += self.held_weight * held + self.drift_weight * drift + self.align_weight * align
        return total, {**aux, "held": held, "drift": drift, "align": align}


WEIGHTS = ("variance_weight", "held_weight", "drift_weight", "align_weight")
VARIANCE_ALONE = dict.fromkeys(WEIGHTS[1:], 0.0)


def interval_bounds(
    move: Float[Array, "rows d_out"],
    lower: Float[Array, " d_in"],
    upper: Float[Array, " d_in"],
    *,
    has_bias: bool,
) -> tuple[Float[Array, " d_out"], Float[Array, " d_out"]]:
    """Return the least and the most that a change of a layer can add to its outputs in a box.

    Args:
        move: ΔW, (d_in, d_out), with Δb as its last row if there is a bias.
        lower: l.
        upper: u.
        has_bias: the last row is the bias's.
    """
    weight = move[:-1] if has_bias else move
    bias = move[-1] if has_bias else jnp.zeros_like(move[0])
    up, down = jax.nn.relu(weight), jax.nn.relu(-weight)

    def at(x: Array, y: Array) -> Array:
        return jnp.matmul(x, up, precision=HIGHEST) - jnp.matmul(y, down, precision=HIGHEST) + bias

    return at(lower, upper), at(upper, lower)


Entered = tuple[Float[Array, "rows d_in"], Bool[Array, " rows"]]


def _entering(
    apply: Apply, params: PyTree, batch: Batch, names: tuple[str, ...]
) -> tuple[dict[str, Entered], dict[str, Site]]:
    """Return what enters each site, a position a row, in float32 or wider, and which rows count.

    Raises:
        ValueError: a name is no dense or convolutional site of one layer.
    """
    # Of all parameters: a bias that is not selected is no part of its site.
    sites = find_sites(apply, params, batch.inputs)
    for name in names:
        site = sites.get(name)
        if site is None or site.kind not in ("dense", "conv") or site.weight.layers > 1:
            got = (
                "none of that name" if site is None else f"{site.kind}, {site.weight.layers} layers"
            )
            raise ValueError(
                f"{name!r} must be a dense or convolutional site of one layer, got {got}; "
                "`find_sites` prints those there are"
            )
    # A parameter's further sites are "path#1", ...
    parameters = [re.sub(r"#\d+$", "", name) for name in names]
    seen = intervene(apply, params, batch.inputs, select=exactly(parameters))
    counted = counted_outputs(batch, seen.outputs.shape[:-1])
    found = {}
    for name in names:
        values = wide(sites[name].canonical_inputs(seen.activations[name])[0])
        found[name] = _rows(values, counted)
    return found, {name: sites[name] for name in names}


def _rows(values: Array, counted: Array) -> Entered:
    """Return positions as rows; where there is not one output a position, the example's count."""
    positions = values.shape[:-1]
    if positions != counted.shape:
        examples = jnp.any(counted.reshape(counted.shape[0], -1), axis=1)
        shape = (len(examples), *(1,) * (len(positions) - 1))
        counted = jnp.broadcast_to(examples.reshape(shape), positions)
    return values.reshape(-1, values.shape[-1]), counted.reshape(-1)


def _moved(site: Site, params: PyTree, before: PyTree) -> Array:
    """Return ΔW (rows, d_out) as the site uses it, the bias's row last."""

    def matrix(tree: PyTree) -> Array:
        paths = site.weight.paths
        rows = site.weight.gather({p: wide(x) for p, x in parameter_paths(tree) if p in paths})[0]
        if not _has_bias(site):
            return site.scale * rows
        return jnp.concatenate([site.scale * rows[:-1], site.bias_scale * rows[-1:]])

    return matrix(params) - matrix(before)


def _has_bias(site: Site) -> bool:
    return site.weight.bias_path is not None


def _variance(values: Array, counted: Array) -> Array:
    rows = counted[:, None].astype(values.dtype)
    number = jnp.maximum(jnp.sum(rows), 1)
    mean = jnp.sum(rows * values, axis=0) / number
    return jnp.mean(jnp.sum(rows * (values - mean[None]) ** 2, axis=0) / number)


def _drift(values: Array, counted: Array, before: Array, lower: Array, upper: Array) -> Array:
    is_inside = (values >= lower[None]) & (values <= upper[None]) & counted[:, None]
    return masked_mean((before - values) ** 2, is_inside)


def _align(values: Array, counted: Array, lower: Array, upper: Array) -> Array:
    """Return how far the batch's centre is from the box's, in radii, where they do not overlap."""
    rows = counted[:, None]
    most = jnp.finfo(values.dtype).max
    low = jnp.min(jnp.where(rows, values, most), axis=0)
    high = jnp.max(jnp.where(rows, values, -most), axis=0)
    is_apart = ((low > upper) | (high < lower)) & jnp.any(counted)
    gap = jnp.where(is_apart, (high + low) / 2 - (upper + lower) / 2, 0)
    square = jnp.sum(gap**2)
    # 1 under the root where it is 0: the gradient of a root at 0 is infinite.
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return length / (jnp.mean((upper - lower) / 2) + TINY)
