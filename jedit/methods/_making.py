"""How the catalogue's rows make their methods out of a scene's material."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from jedit.core.batch import Batch
from jedit.core.paths import exactly
from jedit.geometry import null_space
from jedit.geometry.surrogate import Scope
from jedit.methods.associations._write import Associations, Layers
from jedit.methods.associations.alphaedit import alphaedit
from jedit.methods.associations.memit import memit
from jedit.methods.associations.rome import rome
from jedit.methods.curvature.kfade import Ascent, kfade
from jedit.methods.curvature.natural import natural
from jedit.methods.latents.sae_guided import sae_guided
from jedit.methods.row import (
    ClosedForm,
    Material,
    Need,
)
from jedit.methods.trained.attention_shifting import attention_shifting
from jedit.methods.trained.gu import gu
from jedit.methods.trained.kuda import kuda
from jedit.methods.trained.repselect import repselect
from jedit.methods.trained.salun import salun
from jedit.objectives import (
    DPO,
    GA,
    NPO,
    RMU,
    Objective,
    RandomLabel,
    RepresentationDeviation,
    RetainStates,
    relabel,
    with_retain,
)
from jedit.tracing import Entering, find_sites
from jedit.training import TrainingMethod
from jedit.transforms import natural_steps, project_to_null_space

SEED = 0  # of random labels and directions, which are the same for all models
GRADDIFF = with_retain(GA())


def by_kfade(curvature: Need):
    def make(material: Material, *, damping: float, steps: int) -> ClosedForm:
        metric = material.take(curvature)
        return functools.partial(kfade, curvature=metric, damping=damping, ascent=Ascent(steps))

    return make


def by_engram(method):
    def make(material: Material) -> ClosedForm:
        target, rest = material.take(Need.TARGET_MOMENTS), material.take(Need.REST_MOMENTS)

        def edit(apply, params, *, forget, retain):
            del apply, forget, retain  # the moments hold what it needs of them
            return method(params, target, rest)

        return edit

    return make


def _facts(material: Material, forget: Batch) -> Associations:
    return Associations(forget, material.subjects)


def by_alphaedit(material: Material, *, threshold: float) -> ClosedForm:
    layers = Layers(material.take(Need.LAYERS))

    def edit(apply, params, *, forget, retain):
        del retain
        # Here, so that the null space is part of what the edit costs.
        projector = null_space(material.take(Need.CURVATURE), threshold=threshold)
        return alphaedit(apply, params, projector, _facts(material, forget), None, layers=layers)

    return edit


def by_memit(material: Material) -> ClosedForm:
    def edit(apply, params, *, forget, retain):
        del retain
        facts, layers = _facts(material, forget), Layers(material.take(Need.LAYERS))
        return memit(apply, params, material.take(Need.CURVATURE), facts, None, layers=layers)

    return edit


def by_rome(material: Material) -> ClosedForm:
    def edit(apply, params, *, forget, retain):
        del retain
        facts, layer = _facts(material, forget), material.take(Need.LAYERS)[-1]
        return rome(apply, params, material.take(Need.CURVATURE), facts, None, layer=layer)

    return edit


def lowered(objective: Objective):
    return lambda material: TrainingMethod(objective, material.optimizer)


def npo(material: Material, *, beta: float) -> TrainingMethod:
    return TrainingMethod(with_retain(NPO(beta=beta)), material.optimizer)


def altpo(material: Material, *, beta: float) -> TrainingMethod:
    return TrainingMethod(with_retain(DPO(beta=beta)), material.optimizer)


def random_label(material: Material, *, forget_weight: float) -> TrainingMethod:
    objective = with_retain(RandomLabel(), forget_weight=forget_weight)
    return TrainingMethod(objective, material.optimizer)


def relabelled(material: Material) -> Batch:
    forget = jax.tree.map(jax.numpy.asarray, material.forget)
    return relabel(forget, material.take(Need.NUM_CLASSES), key=jax.random.key(SEED))


def with_alternates(material: Material) -> tuple[Batch, Batch]:
    """Return the forget rows, each as often as it has alternates, and these.

    Raises:
        ValueError: some rows have more alternates than others.
    """
    forget, alternates = material.forget, material.take(Need.ALTERNATES)
    rows, others = (len(jax.tree.leaves(batch)[0]) for batch in (forget, alternates))
    if others % rows:
        raise ValueError(f"{others} alternates are not as many for each of {rows} forget rows")
    repeated = jax.tree.map(lambda leaf: jax.numpy.concatenate([leaf] * (others // rows)), forget)
    return repeated, alternates


def by_salun(material: Material, *, fraction: float, forget_weight: float) -> TrainingMethod:
    objective = with_retain(RandomLabel(), forget_weight=forget_weight)
    given = (material.apply, material.params, material.forget, material.optimizer)
    return salun(*given, fraction=fraction, objective=objective)


def rmu(material: Material) -> TrainingMethod:
    hidden = Entering(material.take(Need.HIDDEN_SITE))
    return TrainingMethod(
        with_retain(RMU(hidden, seed=SEED), RetainStates(hidden)), material.optimizer
    )


def by_sae_guided(material: Material, *, push: float) -> TrainingMethod:
    hidden = Entering(material.take(Need.HIDDEN_SITE))
    return sae_guided(hidden, material.take(Need.LATENTS), material.optimizer, push=push)


def by_attention_shifting(material: Material, **settings: float) -> TrainingMethod:
    maps = material.take(Need.ATTENTION)
    return attention_shifting(material.optimizer, maps=maps, **settings)


# Optimizers are compared by identity: the same one for the same settings, so that a second scene
# compiles nothing.
@functools.cache
def around(method: Callable[..., TrainingMethod], *given: Any, **settings: Any) -> TrainingMethod:
    return method(*given, **settings)


@functools.cache
def _gu(scope: Scope, objective: Objective) -> TrainingMethod:
    made = gu(objective, learning_rate=1.0, scope=scope)
    rate = optax.inject_hyperparams(lambda learning_rate: optax.scale(learning_rate))
    return made._replace(optimizer=optax.chain(made.optimizer, rate(learning_rate=1e-4)))


def by_gu(material: Material, *, scope: Scope, objective: Objective) -> TrainingMethod:
    del material  # its metric is an Adam of its own
    return _gu(scope, objective)


def by_kuda(material: Material, *, threshold: float) -> TrainingMethod:
    site, curvature = material.take(Need.HIDDEN_SITE), material.take(Need.CURVATURE)
    sites = list(find_sites(material.apply, material.params, material.forget.inputs))
    earlier = [name for name in sites[: sites.index(site)] if name in curvature.blocks]
    if not earlier:
        raise ValueError(f"KUDA trains what lies before {site}, and nothing does")
    objective = with_retain(RepresentationDeviation(Entering(site), seed=SEED))
    given = (curvature, objective, material.optimizer)
    return kuda(*given, select=exactly(earlier), threshold=threshold)


def by_repselect(material: Material, *, beta: float, rank: int, share: float) -> TrainingMethod:
    moments = material.take(Need.TARGET_MOMENTS)
    return repselect(moments, rank=rank, share=share, objective=NPO(beta=beta))


def in_null_space(material: Material, *, threshold: float) -> TrainingMethod:
    projector = null_space(material.take(Need.CURVATURE), threshold=threshold)
    optimizer = optax.chain(material.optimizer, project_to_null_space(projector))
    return TrainingMethod(GRADDIFF, optimizer)


def natural_npo(
    material: Material, *, beta: float, damping: float, predicted_kl: float
) -> TrainingMethod:
    curvature = material.take(Need.CURVATURE)
    # The rate that a grid sets in the optimizer's state is a step's predicted KL.
    steps = optax.inject_hyperparams(
        lambda learning_rate: natural_steps(curvature, damping=damping, predicted_kl=learning_rate)
    )
    objective = with_retain(NPO(beta=beta))
    return natural(objective, curvature)._replace(optimizer=steps(learning_rate=predicted_kl))
