"""A language model's attention as one array, and its outputs with a token out of everyone's sight.

Both are found in the traced program (`attention`), so that nothing need be known of the model.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jedit.tracing.attention import Attention, Attentions, attention_weights, find_attention


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """All attention of a model whose inputs and outputs are positions.

        maps = AttentionMaps()
        weights = maps(apply, params, tokens)
        outputs = maps.without(apply, params, tokens, 3)

    Equal by value, and hashable, as objectives want it.
    """

    def __call__(
        self, apply: Callable, params: PyTree, inputs: PyTree
    ) -> Float[Array, "maps batch seq keys"]:
        """Return every head of every layer; along the keys they sum to one.

        Raises:
            ValueError: the program attends nowhere, some of it forms no weights, or it cannot be
                told which axes are examples and positions.
        """
        found = _checked(find_attention(apply, params, inputs))
        run = attention_weights(apply, params, inputs)
        maps = [_relaid(run.weights[name], one) for name, one in found.items()]
        if len({x.shape[1:] for x in maps}) > 1:
            shapes = ", ".join(str(one.shape) for one in found.values())
            raise ValueError(f"attention of several lengths is not one array; got {shapes}")
        return jnp.concatenate(maps)

    def without(
        self, apply: Callable, params: PyTree, inputs: PyTree, position: int | Int[Array, ""]
    ) -> Array:
        """Return the outputs where no other position attends to this one, in any layer.

        The weights on the others are divided by their sum, where some was taken away; a position
        of -1 hides nothing. The position itself goes on attending to
        itself: what it says of its own token, nobody hears.

        Raises:
            ValueError: as by the maps themselves.
        """
        found = _checked(find_attention(apply, params, inputs))

        def hidden_from(one: Attention) -> Callable[[Array], Array]:
            queries, keys = (axis - one.num_scans for axis in _axes(one)[1:])

            def change(weights: Array) -> Array:
                index = [
                    jnp.arange(n).reshape([-1 if i == axis else 1 for i in range(weights.ndim)])
                    for axis, n in ((axis, weights.shape[axis]) for axis in (queries, keys))
                ]
                is_kept = (index[1] != position) | (index[0] == position)
                kept = jnp.where(is_kept, weights, 0)
                total = jnp.sum(kept, axis=keys, keepdims=True)
                # A row that never saw the position stays what it is, to the bit.
                is_touched = jnp.any(jnp.where(is_kept, 0, weights) != 0, axis=keys, keepdims=True)
                divided = kept / jnp.maximum(total, jnp.finfo(weights.dtype).tiny)
                return jnp.where(is_touched, divided, weights)

            return change

        replace = {name: hidden_from(one) for name, one in found.items()}
        return attention_weights(apply, params, inputs, replace=replace).outputs


def attention_of(apply: Callable, params: PyTree, inputs: PyTree) -> AttentionMaps | None:
    """Return how a model's attention is read; None where it attends nowhere."""
    return AttentionMaps() if find_attention(apply, params, inputs) else None


def _checked(found: Attentions) -> Attentions:
    if not found or found.unseen:
        why = f": {'; '.join(found.unseen)}" if found.unseen else ""
        some = "some of this model's attention" if found else "this model"
        raise ValueError(
            f"{some} forms no attention weights, so none can be read{why}; a model that has "
            "attention must compute it as a softmax of products (no fused kernel)"
        )
    for one in found.values():
        _axes(one)
    return found


def _axes(one: Attention) -> tuple[int, int, int]:
    """Return the axes of examples, queries and keys.

    Raises:
        ValueError: it cannot be told which axes are examples or queries.
    """
    if one.examples is None or one.queries is None:
        lacking = "examples" if one.examples is None else "positions"
        raise ValueError(
            f"{one.name} ({one.source}) has shape {one.shape}, and it cannot be told which of its "
            f"axes are the outputs' {lacking}"
        )
    return one.examples, one.queries, one.keys


def _relaid(weights: Array, one: Attention) -> Float[Array, "maps batch seq keys"]:
    axes = _axes(one)
    weights = jnp.moveaxis(weights, axes, (-3, -2, -1))
    return weights.reshape(-1, *weights.shape[-3:])
