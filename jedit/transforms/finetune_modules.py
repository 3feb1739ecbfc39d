"""Learn, and now and then fine-tune some modules alone on rows that are kept.

    steps 0 .. every - 1                 the optimizer's update of the gradient
    steps every .. every + tuning - 1    m ⊙ (the fine-tuner's update of m ⊙ g_r), and so on in turn

m marks the modules, g_r is the gradient on the kept rows.  What fine-tuning does not concern stays
bit-identical through it, weight decay and momentum included, and the optimizer's state waits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_optimizer
from jedit.core.checks import COUNT, check_numbers
from jedit.core.paths import matcher
from jedit.core.precision import cast_like


class FinetuneModulesState(NamedTuple):
    """The state of `finetune_modules`.

    Attributes:
        count: number of updates made, int32.
        optimizer: the state of what learns.
        finetuner: the state of what fine-tunes.
    """

    count: Array
    optimizer: PyTree
    finetuner: PyTree


def finetune_modules(
    optimizer: optax.GradientTransformation,
    select: str | Sequence[str],
    *,
    every: int,
    tuning_steps: int,
    finetuner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Interrupt an optimizer to fine-tune some modules on what is kept.

    It takes the place of the optimizer:

        finetune_modules(optax.sgd(0.1), "^head/", every=50, tuning_steps=10)

    Its `update` needs params and `retain_grad_fn`, the gradient on the kept rows as a function of
    params, which is asked for in fine-tuning steps alone.

    Args:
        optimizer: what learns, learning rate included.
        select: regular expression, or several, searched in the parameter paths: the modules that
            are fine-tuned.
        every: updates between two interruptions.
        tuning_steps: updates of one interruption.
        finetuner: what fine-tunes, learning rate included; its state lives on from one interruption
            to the next. None: the optimizer's rule, with a state of its own.

    Returns:
        The transform; its state is that of both.

    Raises:
        ValueError: a number out of its range, or at `init` no parameter is selected; at `update`,
            params or an extra argument are missing.
    """
    check_numbers(COUNT, every=every, tuning_steps=tuning_steps)
    check_optimizer(optimizer)
    rule = optimizer if finetuner is None else finetuner
    check_optimizer(rule)
    learning, tuning = (optax.with_extra_args_support(x) for x in (optimizer, rule))
    is_found = matcher(select, "select")

    def chosen(tree: PyTree) -> PyTree:
        """Return the tree with zeros for what is not fine-tuned."""

        def keep(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return leaf if is_found(name) else jnp.zeros_like(leaf)

        return jax.tree_util.tree_map_with_path(keep, tree)

    def init(params) -> Any:
        named = jax.tree_util.tree_leaves_with_path(params)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
        if not any(map(is_found, paths)):
            raise ValueError(f"select={select!r} matches no trained parameter; paths: {paths}")
        zero = jnp.zeros((), jnp.int32)
        return FinetuneModulesState(zero, learning.init(params), tuning.init(params))

    def update(updates, state, params=None, *, retain_grad_fn=None, **extra_args) -> Any:
        if params is None or retain_grad_fn is None:
            raise ValueError(
                "finetune_modules needs params and the extra argument retain_grad_fn (params -> "
                "the gradient on the kept rows) at update"
            )

        def learn() -> tuple[PyTree, PyTree, PyTree]:
            moved, after = learning.update(updates, state.optimizer, params, **extra_args)
            return cast_like(moved, updates), after, state.finetuner

        def tune() -> tuple[PyTree, PyTree, PyTree]:
            gradient = chosen(cast_like(retain_grad_fn(params), updates))
            moved, after = tuning.update(gradient, state.finetuner, params, **extra_args)
            return cast_like(chosen(moved), updates), state.optimizer, after

        is_tuning = state.count % (every + tuning_steps) >= every
        moved, first, second = jax.lax.cond(is_tuning, tune, learn)
        return moved, FinetuneModulesState(state.count + 1, first, second)

    return optax.GradientTransformationExtraArgs(init, update)
