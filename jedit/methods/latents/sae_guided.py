"""SAE-guided unlearning: train the autoencoder, take the means, step (arXiv 2509.15631).

    1. z = SAE(h), trained on the states of known and of unknown entities' rows    `fit_latents`
    2. μ_u, μ_k: mean z at the entities' tokens, unknown and known                 `fit_latents`
    3. L = pull to μ_u, push from μ_k, and a retain term             `objectives.SAEGuided`

Differences. The paper takes autoencoders that others trained on large corpora, and chooses a layer;
ours are trained here, on the rows that are given [ours], at the site that is given.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.methods.latents._autoencoder import AutoencoderInfo, fit_autoencoder
from jedit.objectives.held import RetainNLL, with_retain
from jedit.objectives.hidden_states import Hidden
from jedit.objectives.objective import Objective
from jedit.objectives.sae_guided import LatentMeans, SAEGuided, Tokens, entity_states
from jedit.training.method import TrainingMethod

ROWS = 32  # that go through the model at once; arbitrary


def sae_guided(
    hidden: Hidden,
    latents: LatentMeans,
    optimizer: optax.GradientTransformation,
    *,
    push: float = 1.0,
    tokens: Tokens = "first",
    held: Objective = RetainNLL(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make SAE-guided unlearning around any optimizer.

        hidden = Entering("blocks/3/attn/query/kernel")
        latents, info = fit_latents(apply, params, hidden, retain, unknown, key=key)
        method = sae_guided(hidden, latents, optax.adam(1e-4))
        params, history = jedit.unlearn(method, apply, params, forget, retain, steps=100, key=key)

    Args:
        hidden: the states that the autoencoder was trained on.
        latents: the autoencoder with both means.
        optimizer: learning rate included.
        push: ν, weight of the push from known entities; 1 is arbitrary.
        tokens: where a row's entity is looked at, "first" unless `fit_latents` was told otherwise.
        held: the retain term, at a weight of one.

    Raises:
        ValueError: `push` is negative, or not finite.
    """
    return TrainingMethod(with_retain(SAEGuided(hidden, latents, push, tokens), held), optimizer)


@on_auto_axes
def fit_latents(
    apply: Apply,
    params: PyTree,
    hidden: Hidden,
    known: Batch,
    unknown: Batch,
    *,
    key: Key[Array, ""],
    active: int = 16,
    tokens: Tokens = "first",
) -> tuple[LatentMeans, AutoencoderInfo]:
    """Train an autoencoder on the states of both sets, and take the means of its latents.

    The states of all positions of both sets are held at once, in float32 or wider. The autoencoder
    has four latents for each of the states' features (arbitrary).

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: the params before unlearning.
        hidden: `(apply, params, inputs) -> states`.
        known: rows about entities that the model knows, of which some or none are to be forgotten.
        unknown: rows of the same kind about entities that it has never seen.
        key: of the autoencoder.
        active: k, how many are on at once; 16 is arbitrary.
        tokens: where a row's entity is looked at, "first" or "counted", as `SAEGuided` says it.

    Raises:
        ValueError: a number is out of its range, a set has no such token, or the means of known and
            unknown entities are equal.
    """
    check_numbers(COUNT, active=active)
    gathered, found = [], []
    run = jax.jit(hidden, static_argnums=0)
    for name, rows in (("known", known), ("unknown", unknown)):
        check_batch(rows, name)
        every, marked = [], []
        for i in range(0, jax.tree.leaves(rows)[0].shape[0], ROWS):
            part = jax.tree.map(lambda x, i=i: x[i : i + ROWS], rows)
            states = run(apply, params, part.inputs)
            # Every position that is data: the latents are to be those of all a row's words.
            valid = counted_outputs(Batch(part.inputs, valid=part.valid), states.shape[:-1])
            every.append(wide(states[valid]))
            at_entity, is_counted = entity_states(states, part, tokens)
            marked.append(at_entity[is_counted])
        if not sum(map(len, marked)):
            raise ValueError(f"{name} counts no output, so it marks no entity's token")
        gathered += every
        found.append(jnp.concatenate(marked))
    all_states = jnp.concatenate(gathered)
    made, info = fit_autoencoder(
        all_states, latents=4 * all_states.shape[-1], active=active, key=key
    )
    known_latents, unknown_latents = (made.encode(states) for states in found)
    known_mean, unknown_mean = (jnp.mean(z, axis=0) for z in (known_latents, unknown_latents))
    distance = jnp.mean(jnp.sum((known_latents - unknown_mean[None]) ** 2, axis=-1))
    if not bool(jnp.any(known_mean != unknown_mean)):
        raise ValueError(
            "known and unknown entities have the same latents on the mean, so nothing tells one "
            "from the other; give other rows, or another site"
        )
    return LatentMeans(made.encode, unknown_mean, known_mean, distance), info
