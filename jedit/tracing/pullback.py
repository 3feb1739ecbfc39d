"""Capture activations and output gradients of any pure function; form no weight gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.devices import on_auto_axes
from jedit.core.paths import parameter_paths
from jedit.tracing.discover import Program, trace_program
from jedit.tracing.interpreter import Records, evaluate
from jedit.tracing.sites import Site, Sites, cut


class Capture(NamedTuple):
    """A forward pass that kept what enters every site, and can pull gradients back.

    Attributes:
        sites: the sites that were captured, by name.
        outputs: what `apply` returned.
        activations: per site the array that enters it; sites that read the same activation hold the
            same array. Sites of kind "bias" have none.
        ran: per branch of a `cond` that holds sites, 1 where it ran and 0 where it did not.
        pullback: maps a cotangent of the outputs to the gradients at the sites' outputs.
        program: the traced `apply`, with its plan.
    """

    sites: Sites
    outputs: Array
    activations: dict[str, Array]
    ran: dict[int, Array]
    pullback: Callable[[Array], dict[str, Array]]
    program: Program


@on_auto_axes
def capture(
    apply: Callable, params: PyTree, inputs: PyTree, select: str | Sequence[str] | None = None
) -> tuple[Array, dict[str, Array], Callable[[Array], dict[str, Array]]]:
    """Run `apply` once, keeping what enters every site, and return how to pull gradients back.

    Costs one forward pass; each call of the pullback costs one activation-backward pass (no weight
    gradient is formed: 2/3 of a training step in all). Compose with `jax.jit`.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of floating-point arrays.
        inputs: pytree of arrays that lead with the examples.
        select: regular expression, or several, searched in the parameter paths; None selects all.

    Returns:
        The outputs; the activations `{site: array}`; and `pullback(cotangent) -> {site: gradient}`,
        the gradient of <cotangent, outputs> at the output of every site, shaped like that output
        (axes of scans in front).

    A mistake raises `ValueError` before anything is computed, as in `find_sites`.
    """
    captured = run_capture(apply, params, inputs, select)
    return captured.outputs, captured.activations, on_auto_axes(captured.pullback)


def run_capture(apply, params, inputs, select=None) -> Capture:
    """Run `capture` for a curvature, which needs the sites and the branch indicators too."""
    program = trace_program(apply, params, inputs, select)
    sites, jaxpr = program.sites, program.jaxpr
    leaves = argument_leaves(params, inputs)

    # Differentiated in the probes, which are added to the sites' outputs: their gradients are the
    # output gradients, and no weight is differentiated at all.
    def tapped(probes):
        records = Records()
        outs = evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, program.plan, probes, records)
        return outs[0], records.tree

    outputs, vjp, (kept, ran, _) = jax.vjp(tapped, program.plan.probes(), has_aux=True)

    def pullback(cotangent: Array) -> dict[str, Array]:
        gradients = vjp(cotangent)[0]
        return {n: cut(gradients[site.probe], site.window_out) for n, site in sites.items()}

    activations = {
        name: cut(kept[site.record], site.window_in)
        for name, site in sites.items()
        if site.record is not None
    }
    return Capture(sites, outputs, activations, ran, pullback, program)


def argument_leaves(params: PyTree, inputs: PyTree) -> list[Array]:
    """Return the leaves of params and inputs, as arrays, on which a traced `apply` is evaluated."""
    leaves = jax.tree.leaves((params, inputs))
    return [leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in leaves]


def weight_gradients(
    sites: Mapping[str, Site], activations: Mapping[str, Array], cotangents: Mapping[str, Array]
) -> dict[str, Array]:
    """Contract activations with output gradients: the gradient of every covered parameter.

    This is what `jax.grad` computes by another way, hence the oracle of capture. Costs one
    weight-gradient pass.

    Args:
        sites: the sites, as `find_sites` finds them.
        activations: what entered each site, as captured: `{site: array}`.
        cotangents: what the pullback returned, `{site: array}`.

    Returns:
        `{parameter path: array of that parameter's shape}`, summed over a parameter's sites.
    """
    total: dict[str, Array] = {}
    for name, site in sites.items():
        matrix = site_gradient(site, activations.get(name), cotangents[name])
        for path, part in site.weight.scatter(matrix).items():
            total[path] = total[path] + part if path in total else part
    return total


def site_gradient(site: Site, activation: Array | None, cotangent: Array) -> Array:
    """Return one site's gradient as its matrix (layers, rows, d_out), summed over all positions."""
    g = _flat(site.canonical_gradients(cotangent))
    # A bias's input is its constant factor at every position: its gradient is a sum.
    bias = site.bias_scale * g.sum(axis=1, keepdims=True)
    if activation is None:
        return site.scale * g.sum(axis=1, keepdims=True)
    a = site.canonical_inputs(activation)
    if site.kind == "embedding":
        matrix = jax.vmap(lambda i, x: scatter_rows(site, i, x))(a.reshape(len(a), -1), g)
    elif site.kind == "scale":
        matrix = (_flat(a).astype(g.dtype) * g).sum(axis=1, keepdims=True)
    else:
        a = _flat(a).astype(g.dtype)
        matrix = jnp.einsum("lni,lno->lio", a, g, precision=jax.lax.Precision.HIGHEST)
    matrix = site.scale * matrix
    return matrix if site.weight.bias_path is None else jnp.concatenate([matrix, bias], axis=1)


def scatter_rows(site: Site, indices: Array, values: Array) -> Array:
    """Sum (n, d) `values` into rows (d_in, d) by index, as the site's gather reads out of range."""
    if indices.dtype.itemsize < 4:  # a small integer cannot say "one past the last row"
        indices = indices.astype(jnp.int32)
    if site.index_mode == "CLIP":
        indices = jnp.clip(indices, 0, site.weight.d_in - 1)
    else:  # a negative index that is still negative here was out of range: it read nothing
        indices = jnp.where(indices < 0, site.weight.d_in, indices)
    rows = jnp.zeros((site.weight.d_in, values.shape[-1]), values.dtype)
    return rows.at[indices].add(values, mode="drop")


def _flat(canonical: Array) -> Array:
    """Merge the axes of positions: return (layers, positions, features)."""
    return canonical.reshape(canonical.shape[0], -1, canonical.shape[-1])


def parameter_leaves(params: PyTree) -> dict[str, Any]:
    """Return the parameters' leaves by path."""
    return dict(parameter_paths(params))
