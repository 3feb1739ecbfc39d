"""Target values: what a site should put out for the new answer (ROME, eq. 4; MEMIT, eq. 16).

    δ = argmin NLL(answer | v + δ) + κ KL(p_δ ‖ p_0) + ω ‖δ‖/‖v‖²,   ‖δ‖ <= c ‖v‖
    v* = v + δ

    v   value at the subject's last token: the hidden state, or else the site's output
    p   outputs at other prompts with the subject, δ added there too              `essence`
    κ   0.0625       `kl_weight`            c   0.75, 4 in ROME     `max_norm`
    ω   0.5          `weight_decay`         24 steps of Adam, 19 in ROME, rate 0.5 (GPT), 0.1
                                            (Llama-3); a fact stops when its loss is below 0.05

The decay's unit is that of 1/v: with values of norm below one ω = 0.5 holds δ at nothing.

Differences. All defaults are those of MEMIT's code, whose loop of 25 (ROME's of 20) looks at the
loss once more than it steps: it leaves before its last step. It averages the NLL over random
prefixes; here a fact is one row. Rows do not see one another: one program searches for all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_kind
from jedit.core.batch import Batch
from jedit.core.checks import (
    COUNT_OR_ZERO,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    check_numbers,
    culprit,
    rows_not_finite,
)
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.outputs import check_contents, counted_outputs
from jedit.methods.associations._write import (
    Associations,
    at_subject,
    check_subject,
    site_of,
    value_at,
)
from jedit.objectives.token_nll import token_kl, token_nll
from jedit.tracing import Site, intervene


class TargetInfo(NamedTuple):
    """Results of the search for target values, one for each fact, arrays of shape (n,).

    Attributes:
        nll_before: mean NLL of the new answer over its outputs that count, without δ.
        nll: mean NLL of the new answer over its outputs that count, with δ.
        kl: KL(p_δ ‖ p_0) over the outputs of `essence` that count; 0 without it.
        relative_norm: ‖δ‖ / ‖v‖.
    """

    nll_before: Array
    nll: Array
    kl: Array
    relative_norm: Array

    __repr__ = short_repr


@dataclasses.dataclass(frozen=True)
class Search:
    """Settings of the search for a target value; the figures are those of MEMIT's code for GPT-J.

    Attributes:
        steps: number of Adam's steps; 24, one less than `v_num_grad_steps` of MEMIT's code.
        learning_rate: Adam's learning rate, in units of the value; 0.5, MEMIT's code.
        weight_decay: ω; 0.5, MEMIT's code.
        kl_weight: κ; 0.0625, MEMIT's code.
        max_norm: c; 0.75, MEMIT's code.
        stop: a fact whose loss, all three terms, is below this moves no further; 0.05, MEMIT's
            code.
    """

    steps: int = 24
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_weight: float = 0.0625
    max_norm: float = 0.75
    stop: float = 0.05

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT_OR_ZERO, steps=self.steps)
        check_numbers(POSITIVE, learning_rate=self.learning_rate, max_norm=self.max_norm)
        check_numbers(NOT_NEGATIVE, weight_decay=self.weight_decay, kl_weight=self.kl_weight)
        check_numbers(FINITE, stop=self.stop)


@on_auto_axes
def target_values(
    apply: Callable,
    params: PyTree,
    associations: Associations,
    *,
    layer: str,
    hidden: Callable | None = None,
    essence: Associations | None = None,
    search: Search = Search(),  # noqa: B008 - frozen and hashable
) -> tuple[Float[Array, "n d"], TargetInfo]:
    """Search for values that make the model give the new answers.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the model's parameters.
        associations: the facts, with the new answers as targets.
        layer: path of the last edited matrix, at whose output δ is added.
        hidden: `(params, inputs) -> (n, seq, d)`, the residual stream to which that output is
            added; needed where several layers are edited. None: the output itself.
        essence: other prompts with the same subjects, row by row, whose counted outputs shall stay.
        search: how long, and what holds δ back.

    Returns:
        v* in float32 or wider, and what was found. A step costs one forward and one backward pass.

    Raises:
        TypeError: a search that is no `Search`.
        ValueError: no targets, no dense site of the layer, or another number of essence rows.
        FloatingPointError: values are not finite; their facts are named.
    """
    check_kind(search, Search, "search", "such as Search(steps=24)")
    check_subject(apply, params, associations)
    if associations.batch.targets is None:
        raise ValueError("associations.batch.targets are the new answers; got None")
    rows = [
        len(jax.tree.leaves(a.batch.inputs)[0]) for a in (associations, essence) if a is not None
    ]
    if len(set(rows)) > 1:
        raise ValueError(f"essence has {rows[1]} rows, expected one a fact, {rows[0]}")
    check_contents(associations.batch, "associations.batch", limits=(0, math.inf))
    static = (apply, layer, hidden, search.steps)
    # Numbers that are traced, so that another search of as many steps compiles nothing.
    numbers = {name: value for name, value in vars(search).items() if name != "steps"}
    values, info = _search(static, params, associations, essence, numbers)
    if numbers := rows_not_finite(values):
        why = culprit(params, {"the associations": associations.batch.inputs})
        raise FloatingPointError(f"the values of facts {numbers[:8]} are not finite: {why}")
    return values, info


@functools.partial(jax.jit, static_argnums=0)
def _search(static, params, associations, essence, numbers):
    apply, layer, hidden, steps = static
    site = site_of(apply, params, associations, layer)
    _, v = value_at(apply, hidden, site, params, associations)
    norm = jnp.linalg.norm(v, axis=1)
    if essence is not None:
        essence_site = site_of(apply, params, essence, layer)
        untouched = apply(params, essence.batch.inputs)

    def parts(delta):
        logits = _with_added(apply, site, params, associations, delta)
        nll = _row_mean(token_nll(logits, associations.batch.targets), associations.batch)
        if essence is None:
            return nll, jnp.zeros_like(nll)
        moved = _with_added(apply, essence_site, params, essence, delta)
        return nll, _row_mean(token_kl(moved, untouched), essence.batch)

    def loss(delta):
        nll, kl = parts(delta)
        decay = numbers["weight_decay"] * _norm(delta) / norm**2
        rows = nll + numbers["kl_weight"] * kl + decay
        # The sum over rows, not their mean: a row's gradient is then its own, whatever the batch's
        # size.
        return jnp.sum(rows), rows

    adam = optax.scale_by_adam()

    def step(carry, _):
        delta, state = carry
        gradient, rows = jax.grad(loss, has_aux=True)(delta)
        update, state = adam.update(gradient, state)
        moved = delta - numbers["learning_rate"] * update
        size, most = _norm(moved), numbers["max_norm"] * norm
        shrink = jnp.where(size > most, most / jnp.where(size > 0, size, 1), 1)
        # A fact that is done stays where it is; the loop cannot end early, since others still move.
        is_done = (rows < numbers["stop"])[:, None]
        return (jnp.where(is_done, delta, moved * shrink[:, None]), state), None

    zero = jnp.zeros_like(v)
    (delta, _), _ = jax.lax.scan(step, (zero, adam.init(zero)), length=steps)
    nll, kl = parts(delta)
    relative_norm = _norm(delta) / jnp.where(norm > 0, norm, 1)
    return v + delta, TargetInfo(parts(zero)[0], nll, kl, relative_norm)


def _with_added(
    apply: Callable, site: Site, params: PyTree, associations: Associations, delta: Array
) -> Array:
    """Return the model's outputs with δ added to the site's output at the subjects."""
    output = jax.ShapeDtypeStruct(site.output_shape, delta.dtype)
    # Placing is the adjoint of reading: δ lands where `at_subject` reads, in any layout.
    (placed,) = jax.linear_transpose(
        lambda out: at_subject(site.canonical_gradients(out)[0], associations), output
    )(delta)
    inputs = associations.batch.inputs
    return intervene(apply, params, inputs, add={site.name: placed}).outputs


def _row_mean(values: Array, batch: Batch) -> Array:
    """Return each row's mean over its outputs that count."""
    counted = counted_outputs(batch, values.shape)
    values = jnp.where(counted, values, 0).reshape(len(values), -1)
    number = jnp.maximum(jnp.sum(counted.reshape(len(values), -1), axis=1), 1)
    return jnp.sum(values, axis=1) / number.astype(values.dtype)


def _norm(delta: Array) -> Array:
    """Return the norms of rows, with gradient zero at zero."""
    # The search starts at δ = 0, where the norm's own gradient is 0/0. Both `where` are needed: the
    # gradient of a branch that is not taken is multiplied by zero, and 0 · NaN is NaN.
    squares = jnp.sum(delta**2, axis=1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
