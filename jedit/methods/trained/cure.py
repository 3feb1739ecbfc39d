"""CURE: every module is trained for what it does, forgetting, keeping or both (arXiv 2604.04982).

    e_f(m), e_r(m)   rise of L_f and of L_r where module m's output is set to zero, at least 0,
                     over the sum of all modules' rises                    `module_effects`
    s(m) = (e_f - e_r) / (e_f + e_r)                                       in [-1, 1]

    s >  τ           forget-specific   step along ∇L                       `threshold`
    s < -τ           retain-specific   step along ∇L_r
    otherwise        shared            step along ∇L_r + ∇L, or where these conflict along
                                       ∇L_r + ∇L - (⟨∇L, ∇L_r⟩/‖∇L_r‖²) ∇L_r

    L_f, L_r         the NLL of the forget and of the retain rows
    L                what is lowered to forget, GA: -L_f                   `objective`

Differences. Confirmed [paper: abstract and notes] are the circuit's causal reading, the three
groups, and that each has an update rule of its own which keeps the two gradients from conflict. A
module here is a place where a parameter acts by a product or a look-up (a matrix with its bias, a
gain, a table), and the patch is zero: ours. What has no such place is shared (positions that are
added, a norm's bias), as is a module of a hundredth of the mean effect or less, where s would be
rounding. Ours as well are the score, τ, GA, and that the conflict of all shared parameters together
is taken off the forget gradient alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import (
    check_batch,
    check_function,
    check_kind,
    check_optimizer,
    check_params,
)
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, SHARE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.paths import parameter_paths
from jedit.geometry import retain_orthogonal
from jedit.objectives import GA, Objective, RetainNLL
from jedit.objectives.token_nll import counted_nll, masked_mean
from jedit.tracing import find_sites, intervene
from jedit.training.method import TrainingMethod

Group = Literal["forget", "retain", "shared"]
LEAST_EFFECT = 0.01  # of the mean module's; a module that does less is shared; arbitrary


class ModuleEffects(NamedTuple):
    """What the loss of either set owes to each module.

    Attributes:
        names: the modules: sites, as `find_sites` names them.
        paths: the parameters of each.
        forget: rise of the forget rows' mean NLL where its output is zero, (modules,).
        retain: rise of the retain rows', (modules,).
    """

    names: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]
    forget: Float[Array, " modules"]
    retain: Float[Array, " modules"]

    __repr__ = short_repr

    @property
    def specificity(self) -> Float[Array, " modules"]:
        """Return s of each module: 1 serves forget rows alone, -1 retain rows alone."""
        return self._contrast(_shares(self.forget), _shares(self.retain))

    def groups(self, threshold: float) -> dict[str, Group]:
        """Return each parameter's group; of one that stands in several modules, by their sums."""
        total: dict[str, tuple[Array, Array]] = {}
        modules = zip(self.paths, _shares(self.forget), _shares(self.retain), strict=True)
        for paths, e_f, e_r in modules:
            for path in paths:
                f, r = total.get(path, (0, 0))
                total[path] = f + e_f, r + e_r
        found: dict[str, Group] = {}
        for path, effects in total.items():
            s = float(self._contrast(*effects))
            found[path] = "forget" if s > threshold else "retain" if s < -threshold else "shared"
        return found

    def _contrast(self, e_f: Array, e_r: Array) -> Array:
        # Where both effects are rounding, their contrast would be the sign of noise.
        both = e_f + e_r
        is_there = both > 2 * LEAST_EFFECT / len(self.names)
        return jnp.where(is_there, (e_f - e_r) / jnp.where(is_there, both, 1), 0)


def _shares(rises: Float[Array, " modules"]) -> Float[Array, " modules"]:
    rises = jnp.maximum(rises, 0)
    total = jnp.sum(rises)
    return rises / jnp.where(total > 0, total, 1)


@on_auto_axes
def module_effects(
    apply: Apply, params: PyTree, forget: Batch, retain: Batch, *, chunk: int = 8
) -> ModuleEffects:
    """Measure by how much either loss rises where one module's output is zero, for every module.

    Costs a forward pass of both sets for each module, and one more; compiled once a set.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the trained parameters.
        forget: rows to be forgotten, of which a few dozen do.
        retain: rows to be kept, likewise.
        chunk: passes made at a time; 8 is arbitrary.

    Returns:
        The effects.

    Raises:
        TypeError: an argument is something else.
        ValueError: a chunk below one, or the function has no site.
        FloatingPointError: a loss is not finite without one of the modules, which is named.
    """
    check_numbers(COUNT, chunk=chunk)
    check_function(apply)
    check_params(params)
    for rows, name in ((forget, "forget"), (retain, "retain")):
        check_batch(rows, name)
    sites = find_sites(apply, params, forget.inputs)
    # What is added to a stream has no output of its own: zero there wipes the stream out.
    names = tuple(name for name, site in sites.items() if site.kind != "bias")
    if not names:
        raise ValueError(f"the function has no module to be patched:\n{sites}")
    f, r = (_rises(apply, names, chunk, params, rows) for rows in (forget, retain))
    for i in np.flatnonzero(~np.isfinite(np.asarray(f) + np.asarray(r))):
        raise FloatingPointError(f"a loss is not finite without {names[i]}")
    return ModuleEffects(names, tuple(sites[name].weight.paths for name in names), f, r)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rises(apply: Apply, names: tuple[str, ...], chunk: int, params: PyTree, rows: Batch) -> Array:
    def loss(is_off: Array) -> Array:
        # One program for all modules: masks say which is off.
        replace = {name: (is_off[i], jnp.zeros(())) for i, name in enumerate(names)}

        def patched(params: PyTree, inputs: Array) -> Array:
            return intervene(apply, params, inputs, replace=replace).outputs

        return masked_mean(*counted_nll(patched, params, rows))

    cases = jnp.concatenate([jnp.zeros((1, len(names)), bool), jnp.eye(len(names), dtype=bool)])
    losses = jax.lax.map(loss, cases, batch_size=chunk)
    return losses[1:] - losses[0]


def cure(
    effects: ModuleEffects,
    optimizer: optax.GradientTransformation,
    *,
    threshold: float = 0.1,
    objective: Objective = GA(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make CURE around any optimizer.

        effects = module_effects(apply, params, few_forget_rows, few_retain_rows)
        method = cure(effects, optax.adam(1e-4))
        edit, info = jedit.run_method(method, apply, params, forget, retain, steps=100, key=key)

    Args:
        effects: what each module does for either loss.
        optimizer: the optimizer, which takes the gradients that the groups' rules make.
        threshold: τ, how lopsided a module's effects are that is specific; 0.1 is arbitrary.
        objective: L, what is lowered to forget; it is to have no retain term of its own.

    Returns:
        A method for `jedit.unlearn`, whose history shows the retain loss. A step costs two
        gradients.

    Raises:
        ValueError: a threshold outside 0 to 1.
    """
    check_numbers(SHARE, threshold=threshold)
    check_kind(effects, ModuleEffects, "effects", "as `module_effects` returns them")
    check_optimizer(optimizer)
    chain = optax.chain(_by_group(effects.groups(threshold)), optimizer)
    return TrainingMethod(RetainNLL(), chain, _ForgetGradients(objective))


@dataclasses.dataclass(frozen=True)
class _ForgetGradients:
    """The gradient of what is lowered to forget; the loop's own is the retain loss's."""

    objective: Objective

    def __call__(
        self, apply: Callable, params: PyTree, forget: PyTree, retain: PyTree, reference: PyTree
    ) -> dict[str, PyTree]:
        def loss(params: PyTree) -> Array:
            return self.objective(apply, params, forget, retain, reference)[0]

        return {"forget_grads": jax.grad(loss, allow_int=True)(params)}


def _by_group(groups: dict[str, Group]) -> optax.GradientTransformationExtraArgs:
    """Turn retain gradients into those of the groups; needs `forget_grads`."""

    def init(params) -> Any:
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, forget_grads=None, **extra_args) -> Any:
        del params, extra_args
        if forget_grads is None:
            raise ValueError("CURE's rules need the extra argument forget_grads")
        held, gone = (dict(parameter_paths(tree)) for tree in (updates, forget_grads))
        shared = [path for path in held if groups.get(path, "shared") == "shared"]
        both = {}
        if shared:
            f, r = ({path: tree[path] for path in shared} for tree in (gone, held))
            off, info = retain_orthogonal(f, r)
            for path in shared:
                both[path] = held[path] + jnp.where(info.cos < 0, off[path], f[path])
        rules = {"forget": gone, "retain": held, "shared": both}
        made = [rules[groups.get(path, "shared")][path] for path in held]
        return jax.tree.unflatten(jax.tree.structure(updates), made), state

    return optax.GradientTransformationExtraArgs(init, update)
