"""The size of a mixture of experts, and how its router weighs them.

    s = x R                              scores of all experts, one row a token
    g_e = softmax(s over the chosen)_e   for the `chosen` largest scores, else 0

so that the weights of a token's experts sum to one: Mixtral's rule, and that of Qwen 3 with
`norm_topk_prob`, where a softmax over all experts comes first and the chosen ones are divided by
their sum, which is the same number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jedit.core.checks import COUNT, check_numbers
from jedit.core.precision import wide


class Experts(NamedTuple):
    """The size of the mixture that stands in each block of a `gpt`.

    Attributes:
        number: number of experts in a block.
        chosen: number of experts that a token is sent to.
        width: width of an expert's hidden layer.
    """

    number: int
    chosen: int
    width: int


def check_experts(experts: Experts) -> None:
    """Refuse a mixture that cannot be.

    Raises:
        ValueError: a number is no count, or more experts are chosen than there are.
    """
    check_numbers(COUNT, **{f"experts.{name}": x for name, x in experts._asdict().items()})
    if experts.chosen > experts.number:
        raise ValueError(
            f"{experts.chosen} experts cannot be chosen of {experts.number}; give experts.chosen "
            "at most experts.number."
        )


def routed(scores: Float[Array, "*lead experts"], chosen: int) -> Float[Array, "*lead experts"]:
    """Return each expert's weight for each token, 0 for those that are not chosen.

    Args:
        scores: the router's outputs, in any float; the softmax is taken in float32 or wider.
        chosen: number of experts that a token is sent to; of equal scores the first ones.

    Returns:
        The weights, in the scores' dtype; those of a token sum to one.

    Raises:
        ValueError: `chosen` is no count.
    """
    check_numbers(COUNT, chosen=chosen)
    best, index = jax.lax.top_k(wide(scores), chosen)
    weights = jax.nn.softmax(best, axis=-1)
    places = jax.nn.one_hot(index, scores.shape[-1], dtype=weights.dtype)
    return jnp.sum(places * weights[..., None], axis=-2).astype(scores.dtype)
