"""How the catalogue's rows make their methods out of a scene's material."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from jedit.core.batch import Batch
from jedit.core.checks import POSITIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.paths import exactly
from jedit.curvature.likelihoods import Categorical
from jedit.geometry import RetainKl, null_space
from jedit.geometry.surrogate import Scope
from jedit.methods._within_budget import strongest_within
from jedit.methods.associations._write import Associations, Layers
from jedit.methods.associations.alphaedit import alphaedit
from jedit.methods.associations.memit import memit
from jedit.methods.associations.rome import rome
from jedit.methods.curvature.curvature_pruning import Keep, curvature_pruning
from jedit.methods.curvature.kfade import Ascent, kfade
from jedit.methods.curvature.natural import natural
from jedit.methods.curvature.ucan import ucan
from jedit.methods.latents.sae_guided import sae_guided
from jedit.methods.pruning.memorised_subspace import memorised_subspace
from jedit.methods.row import (
    ClosedForm,
    Drawing,
    Material,
    Need,
)
from jedit.methods.trained.attention_shifting import attention_shifting
from jedit.methods.trained.cure import cure, module_effects
from jedit.methods.trained.fit import fit_unlearning, graded_rows
from jedit.methods.trained.gu import gu
from jedit.methods.trained.kuda import kuda
from jedit.methods.trained.mcu import mcu
from jedit.methods.trained.reglu import Directions, reglu
from jedit.methods.trained.repselect import repselect
from jedit.methods.trained.rule import RuleStages, rule
from jedit.methods.trained.salun import salun
from jedit.objectives import (
    DPO,
    FIT,
    GA,
    NPO,
    RMU,
    GradedRows,
    Objective,
    RandomLabel,
    RepresentationDeviation,
    RetainStates,
    relabel,
    with_retain,
)
from jedit.steering import Sparsity, fold, identity, lineas
from jedit.tracing import Entering, find_sites
from jedit.training import TrainingMethod
from jedit.transforms import natural_steps, project_to_null_space

SEED = 0  # of random labels and directions, which are the same for all models
GRADDIFF = with_retain(GA())
PATCHED = 16  # rows of each set on which CURE patches modules; arbitrary


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


def by_memorised_subspace(material: Material, *, share: float) -> ClosedForm:
    sets = material.take(Need.TARGET_MOMENTS), material.take(Need.REST_MOMENTS)

    def edit(apply, params, *, forget, retain):
        del apply, forget, retain  # the moments hold what it needs of them
        return memorised_subspace(params, *sets, share=share)

    return edit


def by_curvature_pruning(material: Material, *, keep: Keep):
    curvature = material.take(Need.CURVATURE)

    def edit(apply, params, *, forget, retain, budget: float):
        del forget  # no forget row is named
        check_numbers(POSITIVE, budget=budget)
        price = RetainKl(apply, params, retain, likelihood=Categorical())
        # Of the strength, what share of the curvature is not kept.
        at = lambda lost: curvature_pruning(params, curvature, mass=1 - lost, keep=keep)  # noqa: E731
        return strongest_within(at, price, budget=budget, least=1e-6, most=0.99)

    return edit


def by_ucan(material: Material, *, least_risk: float, strength: float) -> ClosedForm:
    target, rest = material.take(Need.TARGET_MOMENTS), material.take(Need.REST_MOMENTS)

    def edit(apply, params, *, forget, retain):
        del apply, forget, retain  # as an engram's, the moments hold what it needs of them
        return ucan(params, target, rest, least_risk=least_risk, strength=strength)

    return edit


def by_lineas(
    material: Material, *, rows: int, steps: int, learning_rate: float, l1: float, group: float
) -> ClosedForm:
    sites = material.take(Need.LAYERS)

    def edit(apply, params, *, forget, retain):
        source, target = _spread(forget, rows), _spread(retain, rows)
        # What is learnt is what the weights can hold, as an edit is what is wanted of it.
        start = identity(apply, params, source.inputs, sites, is_foldable=True)
        how = {"steps": steps, "learning_rate": learning_rate, "sparsity": Sparsity(l1, group)}
        learnt, info = lineas(apply, params, source, target, start=start, **how)
        return fold(apply, params, source.inputs, learnt), info

    return edit


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


def by_fit(material: Material, *, layers: int, beta: float, kl_weight: float) -> TrainingMethod:
    given = (material.apply, material.params, material.forget, material.optimizer)
    return fit_unlearning(*given, layers=layers, objective=FIT(beta=beta, kl_weight=kl_weight))


def graded(material: Material) -> GradedRows:
    given = (material.apply, material.params, material.forget)
    return graded_rows(*given, key=jax.random.key(SEED))


def by_rule(material: Material, *, tuning_steps: int) -> Drawing:
    dialogue = material.take(Need.DIALOGUE)

    def learn(apply, params, *, steps, key, batch_size=RuleStages.batch_size, **how):
        stages = RuleStages(tuning_steps, steps, batch_size=batch_size)
        return rule(apply, params, dialogue, key=key, stages=stages, **how)

    return learn


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


def by_attention_shifting(material: Material, **settings: Any) -> TrainingMethod:
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


def by_mcu(material: Material, *, rank: int) -> TrainingMethod:
    site, moments = material.take(Need.LAYERS)[-1], material.take(Need.TARGET_MOMENTS)
    block = moments.blocks.get(site)
    if block is not None:  # a model narrower than that keeps half of its directions
        rank = max(1, min(rank, block.weight.d_out // 2 - 1))
    minor = functools.partial(RMU, seed=SEED)
    return mcu(material.params, moments, material.optimizer, site=site, rank=rank, objective=minor)


def by_repselect(material: Material, *, beta: float, rank: int, share: float) -> TrainingMethod:
    moments = material.take(Need.TARGET_MOMENTS)
    return repselect(moments, rank=rank, share=share, objective=NPO(beta=beta))


def by_reglu(
    material: Material,
    *,
    rank: int,
    retain_rank: int,
    balance: float,
    scale: float,
    weight: float,
) -> TrainingMethod:
    moments = material.take(Need.TARGET_MOMENTS), material.take(Need.REST_MOMENTS)
    return reglu(
        material.params,
        *moments,
        material.optimizer,
        directions=Directions(rank, retain_rank, balance=balance),
        scale=scale,
        weight=weight,
    )


@on_auto_axes
def _spread(rows: Batch, most: int) -> Batch:
    """Return a few rows from all over the set: the first may be all of one author."""
    count = len(jax.tree.leaves(rows)[0])
    which = np.linspace(0, count - 1, min(most, count)).round().astype(int)
    return jax.tree.map(lambda x: jax.numpy.asarray(x)[which], rows)


def by_cure(material: Material, *, threshold: float) -> TrainingMethod:
    few = (_spread(rows, PATCHED) for rows in (material.forget, material.take(Need.RETAIN)))
    effects = module_effects(material.apply, material.params, *few, chunk=1)
    return cure(effects, material.optimizer, threshold=threshold)


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
