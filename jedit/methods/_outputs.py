"""Second moments of matrices' outputs on two sets, out of those of their inputs: Wᵀ A W."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import refuse_tracers
from jedit.core.devices import fetched
from jedit.core.precision import HIGHEST
from jedit.curvature import Curvature
from jedit.curvature.checks import check_counted, check_covers, check_layers_finite
from jedit.curvature.types import Kronecker
from jedit.tracing.sites import Weight


class Served(NamedTuple):
    """One matrix, and the moments of what enters it in the target and in the rest.

    Attributes:
        weight: how its parameters form it; the bias, where there is one, is its last row.
        matrix: W (layers, rows, d_out), in the moments' dtype.
        target: A (layers, rows, rows) of the target's inputs.
        rest: A of the rest's.
    """

    weight: Weight
    matrix: Array
    target: Array
    rest: Array

    def outputs(self, inputs: Array) -> Float[Array, "layers d_out d_out"]:
        """Return the second moment of the outputs, bias and all, of inputs with this moment."""
        found = jnp.einsum("lio,lij,ljp->lop", self.matrix, inputs, self.matrix, precision=HIGHEST)
        return (found + jnp.swapaxes(found, 1, 2)) / 2  # rounding is not symmetric


def served_matrices(
    params: PyTree, target: Curvature, rest: Curvature, method: str
) -> dict[str, Served]:
    """Return the matrices with dense input moments of two sets, by block.

    Tables that are looked up in, vectors, and inputs too long for a dense factor are left out.

    Args:
        params: the parameters.
        target: curvature of the rows to be forgotten.
        rest: curvature of the rows to be kept, of the same sites.
        method: name of the method, for messages.

    Raises:
        TypeError: an argument that holds no parameters or curvature.
        ValueError: curvatures of different sites or of no outputs, a parameter that is used at
            several sites, no such matrix, or a trace.
        FloatingPointError: a moment is not finite.
    """
    refuse_tracers(method, (params, target, rest), "make it outside")
    for curvature, name in ((target, "target"), (rest, "rest")):
        leaves = check_covers(curvature, params)
        check_counted(curvature.num_outputs, f"the curvature of {name}")
    if set(target.blocks) != set(rest.blocks):
        raise ValueError("target and rest must be curvatures of the same sites")
    found = {}
    for name, block in target.blocks.items():
        if not isinstance(block, Kronecker):
            continue
        other = rest.blocks[name]
        assert isinstance(other, Kronecker)
        if block.is_merged:
            raise ValueError(
                f"{name} is used at several sites, whose input moments a curvature merges with "
                "weights of their own; leave it out by `select`"
            )
        moments = target.factors[block.input].matrix, rest.factors[other.input].matrix
        if moments[0].ndim == 2:  # a table's, or too long a one's: a diagonal
            continue
        moments = tuple(map(fetched, moments))
        for moment in moments:
            check_layers_finite(moment, name)
        dtype = moments[0].dtype
        matrix = block.weight.gather({p: leaves[p].astype(dtype) for p in block.weight.paths})
        found[name] = Served(block.weight, matrix, *moments)
    if not found:
        raise ValueError(f"{method} needs a matrix whose inputs have a dense moment; there is none")
    return found


def kernel_of(served: Served) -> tuple[Weight, Array]:
    """Return the matrix without its bias's row, and how it stands in its parameter."""
    weight = served.weight.kernel
    return weight, served.matrix[:, : weight.d_in]
