"""Associations written into linear maps: their keys and values, and one layer after another.

    k   what enters the matrix at the subject's last token, as a row of its factor A has it
    v   k W, what leaves it there; with `hidden`, the hidden state there
    v*  what shall be there, `targets`
    R   (v* - v) / (layers still to come), v computed anew after each layer (MEMIT)
    Kₚ  the keys of earlier batches, kept as KₚᵀKₚ in a `KeyState`

Each method is one regression, in a metric S Sᵀ of its own:

    Δ = S (Sᵀ(KᵀK + KₚᵀKₚ)S + ρ)⁻¹ SᵀKᵀR,   of Δ = S Y the least ‖KΔ - R‖² + ‖KₚΔ‖² + ρ‖Y‖²
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jedit.core.arguments import check_batch, check_function, check_kind, check_params, nearest
from jedit.core.batch import Batch
from jedit.core.checks import check_finite, culprit
from jedit.core.display import short_repr
from jedit.core.precision import HIGHEST, wide_dtype
from jedit.curvature.checks import eigenbasis_of
from jedit.curvature.positions import align
from jedit.curvature.types import Curvature, Kronecker
from jedit.edits import Edit, apply_edit
from jedit.tracing import Site, Weight, intervene
from jedit.tracing.discover import trace_program
from jedit.tracing.pullback import parameter_leaves


class Associations(NamedTuple):
    """Facts to be written, one a row, each met at one position of its row.

    Attributes:
        batch: prompts as inputs and the new answers as targets, of which the mask counts some.
        subject: position of the subject's last token in each row; None: the model has no positions.
    """

    batch: Batch
    subject: Int[Array, " n"] | None = None

    __repr__ = short_repr


class KeyState(NamedTuple):
    """The sum over the keys of all batches written so far, by which later batches keep them.

    Attributes:
        moments: KₚᵀKₚ, a sum, by parameter path.
        num_keys: number of keys in the sums, int32.
    """

    moments: dict[str, Array]
    num_keys: Array

    __repr__ = short_repr


class Layers(NamedTuple):
    """The layers that associations are written into, with what has been written there before.

    Attributes:
        paths: paths of the edited matrices, by depth; one, or several.
        hidden: `(params, inputs) -> (n, seq, d)`, the residual stream behind the last layer; needed
            for several layers, and then by `target_values` too.
        state: the `info.state` of the batches before, which are kept by it; None: there were none.
    """

    paths: str | Sequence[str]
    hidden: Callable | None = None
    state: KeyState | None = None


class AssociationInfo(NamedTuple):
    """Measurements of one writing of associations, with the state for the next.

    Attributes:
        residual: ‖v* - v‖ of every fact before each layer and after the last, (layers + 1, n).
        keys: K of each parameter, (n, rows), by its path.
        state: the state for the `Layers` of the next batch; it holds this batch's keys too.
    """

    residual: Array
    keys: dict[str, Array]
    state: KeyState

    __repr__ = short_repr


def regress(
    S: Float[Array, "d r"],
    K: Float[Array, "n d"],
    M: Float[Array, "d d"] | None,
    R: Float[Array, "n d_out"],
    ridge: Float[Array, ""],
) -> Float[Array, "d d_out"]:
    """Solve for Δ of the header with M = KₚᵀKₚ, or without an M in the dual form.

    Without M it is S Xᵀ(XXᵀ + ρ)⁻¹ R with X = KS, n by n; with M the form of the header, r by r.

    By Cholesky, r³/3 flops, or n³/3; where that fails Δ is not finite.
    """
    dot = functools.partial(jnp.matmul, precision=HIGHEST)
    X = dot(K, S)
    # Without M the n x n dual is exact and small (few facts); M couples all d directions, so only
    # the r x r primal form can hold it.
    gram = dot(X, X.T) if M is None else dot(X.T, X) + dot(S.T, dot(M, S))
    factor = jax.scipy.linalg.cho_factor(gram + ridge * jnp.eye(len(gram), dtype=K.dtype))
    if M is None:
        return dot(S, dot(X.T, jax.scipy.linalg.cho_solve(factor, R)))
    return dot(S, jax.scipy.linalg.cho_solve(factor, dot(X.T, R)))


def write(
    solve: Callable[[str, Array, Array | None, Array], Array],
    weights: Mapping[str, Weight],
    apply: Callable,
    params: PyTree,
    associations: Associations,
    targets: Array | None,
    layers: Layers,
) -> tuple[Edit, AssociationInfo]:
    """Edit layer after layer, sharing out what is still missing among those to come.

    Args:
        solve: the method's regression, `(path, K, KₚᵀKₚ or None, R) -> Δ`.
        weights: the matrices that can be edited, by path.
        apply: `apply(params, inputs) -> outputs`.
        params: the parameters W before the edit.
        associations: the facts.
        targets: v*; None: zero at every layer, R = -K W whole.
        layers: which of the weights are edited, by depth, and the batches written before.

    Returns:
        The edit, in float32 or wider, and what was found.

    Raises:
        TypeError: layers that are none.
        ValueError: paths that are not among the weights, several and no `hidden`, no rows, targets
            not of the values' shape, or a state of other layers.
        FloatingPointError: an edit is not finite: its Cholesky factor is none, or what went in is.
    """
    check_kind(layers, Layers, "layers", 'such as Layers("mlp/kernel")')
    weights = chosen(layers.paths, weights)
    hidden, state = layers.hidden, layers.state
    if len(weights) > 1 and hidden is None and targets is not None:
        raise ValueError(
            f"{len(weights)} layers share one target, so `hidden` is needed: "
            "Layers(paths, hidden), hidden(params, inputs) -> (n, seq, d), the residual stream "
            "behind the last of them"
        )
    check_subject(apply, params, associations)
    if not len(jax.tree.leaves(associations.batch.inputs)[0]):
        raise ValueError("there are no associations to write: the batch has no rows")
    sets = {"the associations": associations.batch.inputs, "the targets": targets}
    hidden = hidden if targets is not None else None
    edit, keys, residuals = Edit({}), {}, []
    for i, (path, weight) in enumerate(weights.items()):
        current = apply_edit(params, edit)
        K, V = _keys_and_values(apply, hidden, weight, current, associations)
        if targets is not None and targets.shape != V.shape:
            raise ValueError(f"targets have shape {targets.shape}, the values are {V.shape}")
        # v is measured on the model with all earlier layers' edits in it: each layer takes its
        # share of what they left, not of what was missing at first.
        missing = -V if targets is None else targets.astype(V.dtype) - V
        # Removal is whole at each layer: R = -KW is the layer's own output, which no other layer
        # shares.
        share = 1 if targets is None else len(weights) - i
        moment = None if state is None else _moment(state, path, weight.rows)
        delta = solve(path, K, moment, missing / share)
        # A failed Cholesky gives NaN instead of raising under JAX: this is where it is noticed.
        check_finite(f"the edit of {path!r}", delta, lambda: culprit(params, sets))
        edit = edit + Edit(weight.scatter(delta[None]))
        keys[path] = K
        residuals.append(missing)
    path, weight = list(weights.items())[-1]
    _, V = _keys_and_values(apply, hidden, weight, apply_edit(params, edit), associations)
    residuals.append(-V if targets is None else targets.astype(V.dtype) - V)
    norms = jnp.stack([jnp.linalg.norm(r, axis=1) for r in residuals])
    return edit, AssociationInfo(norms, keys, _remember(state, keys))


def _moment(state: KeyState, path: str, rows: int) -> Array:
    found = state.moments.get(path)
    if found is None or found.shape != (rows, rows):
        got = {name: m.shape for name, m in state.moments.items()}
        raise ValueError(
            f"the state holds key moments {got}, expected {(rows, rows)} for {path!r}; hand on the "
            "state of an edit of the same layers, or None"
        )
    return found


def _remember(state: KeyState | None, keys: dict[str, Array]) -> KeyState:
    moments = {path: jnp.matmul(K.T, K, precision=HIGHEST) for path, K in keys.items()}
    number = jnp.asarray(len(next(iter(keys.values()))), jnp.int32)
    if state is None:
        return KeyState(moments, number)
    moments = {path: state.moments[path] + m for path, m in moments.items()}
    return KeyState({**state.moments, **moments}, state.num_keys + number)


class InputMoment(NamedTuple):
    """The moment C = Q diag(c) Qᵀ of the inputs that one matrix meets.

    `basis` holds Q, (rows, rows), and `eigenvalues` c, (rows,).
    """

    weight: Weight
    basis: Array
    eigenvalues: Array

    def damped(self, damping: float, dtype: DTypeLike) -> tuple[Array, Array]:
        """Return Q, and c + ε with ε in units of the mean of c."""
        c = self.eigenvalues.astype(dtype)
        return self.basis.astype(dtype), c + damping * jnp.mean(c)


def input_moments(curvature: Curvature) -> dict[str, InputMoment]:
    """Return the dense input moments of a curvature, by path."""
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    found = {}
    for name, block in curvature.blocks.items():
        factor = curvature.factors[block.input] if isinstance(block, Kronecker) else None
        if factor is None:
            continue
        basis, eigenvalues = eigenbasis_of(factor, name)
        if basis is not None:
            found[name] = InputMoment(block.weight, basis[0], eigenvalues[0])
    return found


def chosen(paths: str | Sequence[str], weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Return the matrices of the named layers, in the order of their names.

    Args:
        paths: paths of the parameters, by depth.
        weights: the weights that have a dense factor A, by path.

    Returns:
        The named weights, by path.

    Raises:
        ValueError: a path that is not among the weights or is named twice, no path, or a stacked
            matrix.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths or len(set(paths)) < len(paths):
        raise ValueError(f"layers must name parameters, by depth and each once; got {paths}")
    if unknown := [path for path in paths if path not in weights]:
        raise ValueError(
            f"{unknown} have no dense input moment; of those that have, "
            f"{nearest(unknown[0], weights)}"
        )
    if stacked := [path for path in paths if weights[path].layers > 1]:
        raise ValueError(f"{stacked} are stacks of matrices; keys are those of a single one")
    return {path: weights[path] for path in paths}


def check_subject(apply: Callable, params: PyTree, associations: Associations) -> None:
    """Refuse subjects that are no positions of the model's outputs, where they are known already.

    Raises:
        TypeError: an argument of another type.
        ValueError: rows whose subject is no position, by number.
    """
    check_function(apply)
    check_params(params)
    check_kind(associations, Associations, "associations", "Associations(batch, subject)")
    check_batch(associations.batch, "associations.batch")
    subject = associations.subject
    shape = jax.eval_shape(apply, params, associations.batch.inputs).shape
    if subject is None or len(shape) < 3 or isinstance(subject, Tracer):
        return
    place = np.asarray(subject)
    if wrong := np.flatnonzero((place < 0) | (place >= shape[1])).tolist():
        raise ValueError(
            f"subject of rows {wrong[:8]} is none of the {shape[1]} positions, counted from 0"
        )


def site_of(apply: Callable, params: PyTree, associations: Associations, path: str) -> Site:
    """Return the one dense site at which a parameter meets activations.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: the model's parameters.
        associations: the facts.
        path: path of the parameter.

    Returns:
        The site, including its bias.

    Raises:
        ValueError: the parameter has no dense site, or several; or `subject` is not one position a
            row.
    """
    subject = associations.subject
    num_rows = len(jax.tree.leaves(associations.batch.inputs)[0])
    if subject is not None and subject.shape != (num_rows,):
        raise ValueError(
            f"subject has shape {subject.shape}, expected one position a row, ({num_rows},)"
        )
    program = trace_program(apply, params, associations.batch.inputs)
    sites = program.sites
    uses = [site for site in sites.values() if site.path == path]
    if len(uses) != 1 or uses[0].kind != "dense" or uses[0].weight.layers > 1:
        unknown = f"no such parameter; {nearest(path, parameter_leaves(params))}"
        kinds = [site.kind for site in uses] or sites.uncovered.get(path, unknown)
        raise ValueError(f"{path!r} must be the matrix of one dense site; its sites are: {kinds}")
    (site,) = uses
    positions = math.prod(site.output_shape) // (num_rows * site.num_uses * site.weight.d_out)
    if site.num_uses > 1 and positions > 1:
        raise ValueError(
            f"{path!r} is used {site.num_uses} times at each of {positions} positions, in a scan "
            "for instance; a key is that of a single use"
        )
    # `subject` counts positions of the outputs; at a site that flattens or permutes them the same
    # number would silently read another token.
    lead = program.jaxpr.jaxpr.outvars[0].aval.shape[:-1]
    if not align(program, lead)[site.name].is_in_order:
        raise ValueError(
            f"the positions of {path!r} ({site.source}) are not those of the outputs {lead}, one "
            "row after the other, so that a subject's cannot be found; edit another layer, or lay "
            "activations out as (rows, positions, features)"
        )
    return site


def at_subject(values: Array, associations: Associations) -> Array:
    """Read the values at the subjects: (n, d) out of (n, seq, d), or what flattens to it.

    Raises:
        ValueError: rows have several positions, and no subject is named.
    """
    num_rows = len(jax.tree.leaves(associations.batch.inputs)[0])
    values = values.reshape(num_rows, -1, values.shape[-1])
    if associations.subject is not None:
        return jnp.take_along_axis(values, associations.subject[:, None, None], axis=1)[:, 0]
    if values.shape[1] != 1:
        raise ValueError(
            f"each row has {values.shape[1]} positions: say in `subject` which one is the subject's"
        )
    return values[:, 0]


def value_at(
    apply: Callable, hidden: Callable | None, site: Site, params: PyTree, associations: Associations
) -> tuple[Array, Array]:
    """Return the keys with the bias's coordinate, (n, rows), and the values, (n, d)."""
    found = intervene(apply, params, associations.batch.inputs)
    k = at_subject(site.canonical_inputs(found.activations[site.name])[0], associations)
    # The key in units in which output = k W exactly: a site's scale and its bias's coordinate
    # belong to the input side, as in the factor A.
    k = site.scale * k.astype(wide_dtype(k.dtype))
    if site.weight.bias_path is not None:
        k = jnp.concatenate([k, jnp.full((len(k), 1), site.bias_scale, k.dtype)], axis=1)
    if hidden is None:
        leaves = parameter_leaves(params)
        W = site.weight.gather({p: leaves[p].astype(k.dtype) for p in site.weight.paths})[0]
        return k, jnp.matmul(k, W, precision=HIGHEST)
    return k, at_subject(hidden(params, associations.batch.inputs), associations).astype(k.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _keys_and_values(
    apply: Any, hidden: Any, weight: Weight, params: PyTree, associations: Associations
) -> tuple[Array, Array]:
    """Return K with the rows that the weight's factor A has, and V."""
    site = site_of(apply, params, associations, weight.path)
    k, v = value_at(apply, hidden, site, params, associations)
    # A curvature may have left out the bias, and its factor A then has no row for it.
    return k[:, : weight.rows], v
