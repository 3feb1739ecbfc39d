"""A mixture of experts in the place of a block's perceptron, as a Flax NNX module.

It stands apart from `jedit.models.experts` for the reason that `_networks` does: Flax takes a third
of a second to import.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jedit.models.experts import Experts, routed


class Mixture(nnx.Module):
    """Perceptrons without biases, of which a router chooses a few for each token.

    All experts compute all tokens; one that was not chosen is given zeros and weighed by zero. So
    the experts' matrices have a leading axis in every product, shapes are fixed, and a site of
    theirs sees of each expert the tokens that it was chosen for and nothing else. Computing what is
    not used costs `number / chosen` times the arithmetic, which a small model can afford.
    """

    def __init__(self, width: int, experts: Experts, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.chosen = experts.chosen
        self.router = nnx.Linear(
            width, experts.number, use_bias=False, param_dtype=param_dtype, rngs=rngs
        )
        init = jax.nn.initializers.lecun_normal(batch_axis=(0,))
        inner = (experts.number, width, experts.width)
        outer = (experts.number, experts.width, width)
        self.up = nnx.Param(init(rngs.params(), inner, param_dtype))
        self.down = nnx.Param(init(rngs.params(), outer, param_dtype))

    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        gates = jnp.moveaxis(routed(self.router(x), self.chosen), -1, 0)
        sent = jnp.where((gates > 0)[..., None], x[None], jnp.zeros((), x.dtype))
        hidden = jax.nn.gelu(jnp.einsum("ebsd,edf->ebsf", sent, self.up[...]))
        found = jnp.einsum("ebsf,efd->ebsd", hidden, self.down[...])
        return jnp.einsum("ebs,ebsd->bsd", gates, found)
