"""Edits of the diffusion scene's denoiser: pruned, or by methods that know no diffusion.

Each yields `(strength, params)`. The forget rows are noised memorised images under their prompts,
the retain rows noised images of the digits under theirs, each with a few draws of the noise.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, Batch
from jedit.curvature import Curvature, estimate, kfac
from jedit.curvature.likelihoods import Gaussian
from jedit.data import batches
from jedit.edits import apply_edit
from jedit.methods import Ascent, kfade, memorised_subspace
from jedit.methods.pruning.memorised_subspace import Agreement
from jedit.models import noised
from jedit.objectives import with_retain
from jedit.recipes.scenes.diffusion import FEED_FORWARD, FIRST, Room, mean_error, moments
from jedit.training import TrainingMethod, unlearn
from jedit.transforms import mask_to_salient

DRAWS = {"forget": 32, "retain": 2}
CHUNK = 512
Made = Iterator[tuple[float, PyTree]]  # strengths, and the edited parameters


@dataclasses.dataclass(frozen=True)
class ForgetError:
    """The mean squared error of the forget rows' noise, times a sign: -1 raises it."""

    sign: float = 1.0

    def __call__(self, apply: Apply, params: PyTree, forget: Batch, *rest) -> tuple[Array, dict]:
        """Return the signed error, and the error itself."""
        del rest
        error = mean_error(apply, params, forget)
        return self.sign * error, {"forget_error": error}


@dataclasses.dataclass(frozen=True)
class RetainError:
    """The mean squared error of the retain rows' noise."""

    def __call__(
        self, apply: Apply, params: PyTree, forget: PyTree, retain: Batch, *rest
    ) -> tuple[Array, dict]:
        """Return the error; the forget rows are not looked at."""
        del forget, rest
        error = mean_error(apply, params, retain)
        return error, {"retain_error": error}


def forget_rows(found: Room, *, key: Array) -> Batch:
    """Return the memorised images with their prompts, noised."""
    number = len(found.memorised)
    which = jnp.repeat(jnp.arange(number), DRAWS["forget"])
    return noised(found.memorised[which], which + FIRST, found.schedule, key=key)


def retain_rows(found: Room, *, key: Array) -> Batch:
    """Return the digits' images with their prompts, noised, in random order."""
    order_key, noise_key = jax.random.split(key)
    which = jax.random.permutation(
        order_key, jnp.repeat(jnp.arange(len(found.images)), DRAWS["retain"])
    )
    prompts = jnp.asarray(found.labels, jnp.int32)[which] + 1
    return noised(found.images[which], prompts, found.schedule, key=noise_key)


def prune(
    found: Room,
    shares: Sequence[float],
    *,
    key: Array,
    sets: Sequence[Sequence[int]] | None = None,
    agreement: Agreement = "any",
) -> Made:
    """Prune the feed-forward blocks at several shares; `sets` are of memorised prompts, from 0.

    The digits' prompts are -10 to -1, for a control that is located on them.
    """
    memorised, rest = both_moments(found, key=key, sets=sets)

    def at(share: float) -> tuple[float, PyTree]:
        edit, _ = memorised_subspace(
            found.original, memorised, rest, share=share, agreement=agreement
        )
        return share, apply_edit(found.original, edit)

    return map(at, shares)


def both_moments(
    found: Room, *, key: Array, sets: Sequence[Sequence[int]] | None = None
) -> tuple[list[Curvature], Curvature]:
    """Return the moments of the sets of memorised prompts, a list, and of the empty prompt."""
    every = range(len(found.memorised))
    sets = [every] if sets is None else sets
    keys = jax.random.split(key, 1 + len(sets))
    memorised = [
        moments(found, np.asarray(list(s)) + FIRST, key=k)
        for s, k in zip(sets, keys[1:], strict=True)
    ]
    return memorised, moments(found, np.zeros(len(every)), key=keys[0])


def prune_at_random(found: Room, like: PyTree, *, key: Array) -> PyTree:
    """Set as many weights of every matrix to zero as `like` has set, but drawn at random."""
    leaves, treedef = jax.tree.flatten(found.original)
    pruned = [
        _without(leaf, int(jnp.sum((leaf != 0) & (other == 0))), jax.random.fold_in(key, i))
        for i, (leaf, other) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(treedef, pruned)


def prune_top(found: Room, shares: Sequence[float], *, key: Array) -> Made:
    """Prune the top share of Wanda's score without the comparison with the empty prompt."""
    memorised, rest = both_moments(found, key=key)
    zero = jax.tree.map(jnp.zeros_like, rest)
    nothing = dataclasses.replace(zero, num_outputs=rest.num_outputs)

    def at(share: float) -> tuple[float, PyTree]:
        edit, _ = memorised_subspace(found.original, memorised, nothing, share=share)
        return share, apply_edit(found.original, edit)

    return map(at, shares)


def by_kfade(found: Room, budgets: Sequence[float], *, key: Array, damping: float = 0.1) -> Made:
    """Raise the error of the forget rows in the metric of the retain outputs; budgets are KL."""
    forget_key, retain_key, label_key = jax.random.split(key, 3)
    retain = list(batches(retain_rows(found, key=retain_key), CHUNK))
    forget = list(batches(forget_rows(found, key=forget_key), CHUNK))
    curvature = estimate(_kfac(found.apply), found.original, retain, key=label_key)
    ascent = Ascent(4, objective=ForgetError(-1.0), likelihood=Gaussian())

    def at(budget: float) -> tuple[float, PyTree]:
        edit, _ = kfade(
            found.apply,
            found.original,
            curvature,
            forget,
            retain[:1],
            budget=budget,
            damping=damping,
            ascent=ascent,
        )
        return budget, apply_edit(found.original, edit)

    return map(at, budgets)


def by_graddiff(found: Room, steps: Sequence[int], *, rate: float, key: Array) -> Made:
    """Raise the forget rows' error and lower the retain rows', by Adam."""
    method = TrainingMethod(with_retain(ForgetError(-1.0), RetainError()), optax.adam(rate))
    return _trained(found, method, None, steps, key=key)


def by_salun(found: Room, steps: Sequence[int], *, rate: float, key: Array) -> Made:
    """Teach the memorised prompts other images, half of the parameters held: those less salient.

    SalUn (arXiv 2310.12508) for a generator: what stands for wrong labels is images of digits at
    random.
    """
    forget_key, other_key, key = jax.random.split(key, 3)
    forget = forget_rows(found, key=forget_key)
    saliency = jax.grad(functools.partial(mean_error, found.apply))(found.original, forget)
    optimizer = optax.chain(optax.adam(rate), mask_to_salient(saliency, 0.5))
    other = retain_rows(found, key=other_key)
    number, others = (len(rows.inputs.prompts) for rows in (forget, other))
    first = jax.tree.map(lambda x: x[jnp.arange(number) % others], other)
    wrong = first._replace(inputs=first.inputs._replace(prompts=forget.inputs.prompts))
    method = TrainingMethod(with_retain(ForgetError(), RetainError()), optimizer)
    return _trained(found, method, wrong, steps, key=key)


def _trained(found: Room, method, forget, steps, *, key: Array) -> Made:
    forget_key, retain_key, order_key = jax.random.split(key, 3)
    forget = forget_rows(found, key=forget_key) if forget is None else forget
    retain = retain_rows(found, key=retain_key)

    def after(number: int) -> tuple[float, PyTree]:
        params, _ = unlearn(
            method._replace(batch_size=64),
            found.apply,
            found.original,
            forget,
            retain,
            steps=number,
            key=order_key,
        )
        return float(number), params

    return map(after, steps)


@functools.cache
def _kfac(apply: Callable):
    return kfac(apply, Gaussian(), select=FEED_FORWARD)


def _without(leaf: Array, number: int, key: Array) -> Array:
    chosen = jax.random.permutation(key, leaf.size)[:number]
    return leaf.ravel().at[chosen].set(0).reshape(leaf.shape)
