"""Cosines of what enters a site with the columns of its matrix: a head's logits by angle."""

import dataclasses
import re
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.paths import leaves_with_paths
from jedit.core.precision import wide
from jedit.tracing.discover import find_sites
from jedit.tracing.intervene import intervene


@dataclasses.dataclass(frozen=True)
class Cosines:
    """The cosine of each output of a dense site, ⟨h, w_c⟩ / (|h| |w_c|), without its bias.

        cosines = Cosines("head/kernel")(apply, params, inputs)

    Attributes:
        site: the site's name, as `find_sites` prints it.
    """

    site: str

    def __call__(
        self, apply: Callable, params: PyTree, inputs: PyTree
    ) -> Float[Array, "batch *lead d_out"]:
        """Return the cosines, in float32 or wider; 0 where a length is. Costs one forward pass.

        Raises:
            ValueError: the function has no such site, or it is not one matrix whose features stand
                on the last axis of what enters and leaves; as in `find_sites`.
        """
        path = re.sub(r"#\d+$", "", self.site)  # the parameter's further sites are "path#1", ...
        select = f"^{re.escape(path)}$"
        sites = find_sites(apply, params, inputs, select)
        if self.site not in sites:
            raise ValueError(f"{self.site!r} is no site; those of this parameter: {list(sites)}")
        site = sites[self.site]
        states = wide(intervene(apply, params, inputs, select=select).activations[self.site])
        weight = site.weight.kernel
        is_last = states.shape[-1] == weight.d_in and site.output_shape == (
            *states.shape[:-1],
            weight.d_out,
        )
        if site.kind != "dense" or weight.layers != 1 or not is_last:
            raise ValueError(
                f"{self.site!r} is no head: it must be one dense matrix with the features on the "
                f"last axis; got {site.kind}, {weight.layers} of {weight.d_in} -> {weight.d_out}, "
                f"{states.shape} -> {site.output_shape}"
            )
        leaves = {name: leaf for name, leaf in leaves_with_paths(params) if name == path}
        matrix = wide(weight.gather(leaves))[0]
        dtype = jnp.promote_types(states.dtype, matrix.dtype)
        return _unit(states.astype(dtype), -1) @ _unit(matrix.astype(dtype), 0)


def _unit(x: Array, axis: int) -> Array:
    # Divided by the largest entry first: squares of small entries would be nothing.
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    square = jnp.sum(x**2, axis=axis, keepdims=True)
    return x / jnp.sqrt(jnp.where(square > 0, square, 1))
