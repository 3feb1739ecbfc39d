"""The methods that train, as a comparison runs them: each an objective and an optimizer.

Learning rates stand in the optimizers' states, so that a grid of them compiles once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jedit import objectives
from jedit.core.batch import Batch
from jedit.curvature import Curvature
from jedit.curvature.memory import exactly
from jedit.geometry import Projector
from jedit.geometry.surrogate import Scope
from jedit.methods import gu, kuda, rosu, sam, uam
from jedit.tracing import intervene
from jedit.training import TrainingMethod
from jedit.transforms import (
    clip_by_curvature_norm,
    project_to_null_space,
    scale_by_curvature,
)

CONSTRAINED = " at no first-order retain cost"
RADIUS = 0.1  # of UAM and ROSU; arbitrary
SOFT = 0.04  # NPO's other beta: pushes an answer of 60 tokens seven nats a token down, and not two
SEED = 0  # of random labels and directions, which are the same for all models


class Trainer(NamedTuple):
    """A method that trains.

    Attributes:
        description: one sentence: what it does.
        method: with `reference_params` among its objective's arguments.
        prepare: of the forget rows and refusals, the forget set it trains on; None: the rows.
    """

    description: str
    method: TrainingMethod
    prepare: Callable[[Batch, Batch | None], Batch | tuple[Batch, Batch]] | None = None


ADAM = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))(
    learning_rate=0.0
)


@functools.cache
def trainers(apply: Callable, hidden_site: str, width: int, classes: int) -> dict[str, Trainer]:
    """Every method that trains, by name.

    Args:
        apply: `apply(params, inputs) -> logits`.
        hidden_site: what enters this site is RMU's hidden state; see `find_sites`.
        width: of it.
        classes: of the logits.

    Returns:
        The same objects for the same arguments, so that a second comparison compiles nothing.
    """
    by_adam = {
        "gradient ascent": (_ascent, "Ascends the forget loss; nothing protects the retain rows."),
        "GradDiff": (
            objectives.graddiff,
            "Ascends the forget loss and descends the retain loss, equally weighted.",
        ),
        "NPO": (
            objectives.npo,
            "Negative preference optimisation, beta 0.1, with the retain loss at weight 1.",
        ),
        f"NPO (beta {SOFT:g})": (
            functools.partial(objectives.npo, beta=SOFT),
            f"The same at beta {SOFT:g}, which goes on where 0.1 has stopped.",
        ),
        "SimNPO": (
            objectives.simnpo,
            "NPO without a reference, loss per token, beta 4.5; with the retain loss.",
        ),
        "WGA": (objectives.wga, "Ascent weighted by p, with the retain loss."),
        "SatImp": (objectives.satimp, "Ascent weighted by p^5 (1-p), with the retain loss."),
        "UNDIAL": (
            objectives.undial,
            "Distils the model with its label's logit lowered by 10, with the retain loss.",
        ),
        "CE-U": (
            objectives.ce_u,
            "Distils the model with its label's logit taken out, with the retain loss.",
        ),
    }
    found = {
        name: Trainer(description, TrainingMethod(functools.partial(objective, apply=apply), ADAM))
        for name, (objective, description) in by_adam.items()
    }
    found["random label"] = Trainer(
        "Learns a wrong label for every forget row, drawn once, with the retain loss.",
        TrainingMethod(functools.partial(objectives.random_label, apply=apply), ADAM),
        functools.partial(_relabelled, classes=classes),
    )
    found["IdkDPO"] = Trainer(
        "Prefers a refusal to the answer (DPO, beta 0.1), with the retain loss.",
        TrainingMethod(functools.partial(objectives.dpo, apply=apply), ADAM),
        lambda forget, refusals: (forget, refusals) if refusals is not None else forget,
    )

    hidden, direction = entering(apply, hidden_site), _direction(width)
    rmu = functools.partial(objectives.rmu, hidden=hidden, direction=direction)
    found["RMU"] = Trainer(
        f"Sends the forget rows' input of {hidden_site} to a random direction of length 2 and "
        "holds that of the retain rows.",
        TrainingMethod(rmu, ADAM),
    )
    surrogates = {
        "UAM": (functools.partial(uam, apply, ADAM, radius=RADIUS), ""),
        "ROSU": (functools.partial(rosu, apply, ADAM, radius=RADIUS), CONSTRAINED),
        "ROSU (push)": (
            functools.partial(rosu, apply, ADAM, radius=RADIUS, outer="push"),
            f"{CONSTRAINED}, and takes a step that way (ours)",
        ),
    }
    for name, (make, more) in surrogates.items():
        found[name] = Trainer(
            "Descends the retain loss as it is where a step of length "
            f"{RADIUS:g} has raised the forget loss{more}.",
            _referring(make()),
        )
    found["SAM"] = Trainer(
        "Sharpness-aware GradDiff: its forget gradient is taken a step of length 0.01 back.",
        _referring(sam(apply, ADAM)),
    )
    for scope in ("leaf", "global"):
        found[f"GU ({scope})"] = Trainer(
            "GradDiff's gradient off the last 8 retain gradients, in Adam's metric; "
            + ("a basis for each parameter." if scope == "leaf" else "one basis."),
            _referring(_gu(apply, scope)),
        )
    return found


def entering(apply: Callable, site: str) -> Callable:
    """What enters a site, as a function `(params, inputs) -> (batch, ..., width)`."""

    def hidden(params, inputs):
        found = intervene(apply, params, inputs, select=exactly([site]))
        return found.activations[site]

    return hidden


def _direction(width: int) -> Array:
    return objectives.random_direction(width, key=jax.random.key(SEED))


def kuda_before(
    apply: Callable, hidden_site: str, width: int, curvature: Curvature, earlier: Sequence[str]
) -> Trainer:
    """KUDA on the parameters of the sites before the one whose input is turned away."""
    site = entering(apply, hidden_site)
    made = kuda(apply, site, curvature, ADAM, select=exactly(earlier))
    objective = functools.partial(made.objective, direction=_direction(width))
    return Trainer(
        f"Turns the forget rows' input of {hidden_site} away, in the relaxed null space of the "
        "retain rows' inputs, with the retain loss; every layer before it, untraced.",
        made._replace(objective=objective),
    )


def projected_ascent(apply: Callable, projector: Projector) -> Trainer:
    """GradDiff by Adam, its steps projected on the null space of the retain rows' inputs."""
    objective = functools.partial(objectives.graddiff, apply=apply)
    return Trainer(
        "GradDiff by Adam, each step projected on the null space of the retain rows' inputs.",
        TrainingMethod(objective, optax.chain(ADAM, project_to_null_space(projector))),
    )


def natural_npo(
    apply: Callable, curvature: Curvature, *, damping: float = 0.1, beta: float = 0.1
) -> Trainer:
    """NPO by plain steps in a metric, each of a predicted KL of at most its "learning rate"."""
    clip = optax.inject_hyperparams(
        lambda learning_rate: clip_by_curvature_norm(curvature, predicted_kl=learning_rate)
    )
    optimizer = optax.chain(
        scale_by_curvature(curvature, damping=damping), optax.scale(-1.0), clip(learning_rate=0.0)
    )
    return Trainer(
        f"NPO, beta {beta:g}, with the retain loss, by steps in the metric of the retain outputs "
        f"at the highest temperature (ours), damping {damping:g}; its rate is a step's predicted "
        "KL, at most.",
        TrainingMethod(functools.partial(objectives.npo, apply=apply, beta=beta), optimizer),
    )


def _gu(apply: Callable, scope: Scope) -> TrainingMethod:
    objective = functools.partial(objectives.graddiff, apply=apply)
    made = gu(apply, objective, learning_rate=1.0, scope=scope)
    rate = optax.inject_hyperparams(lambda learning_rate: optax.scale(learning_rate))
    return made._replace(optimizer=optax.chain(made.optimizer, rate(learning_rate=0.0)))


def _referring(method: TrainingMethod) -> TrainingMethod:
    """The same, but that the objective takes `reference_params` and does without."""

    def objective(params, forget, retain, *, reference_params):
        del reference_params
        return method.objective(params, forget, retain)

    return method._replace(objective=objective)


def _ascent(params, forget, retain, *, apply, reference_params):
    del reference_params
    return objectives.ga(params, forget, retain, apply=apply)


def _relabelled(forget: Batch, refusals: Batch | None, *, classes: int) -> Batch:
    del refusals
    forget = jax.tree.map(jnp.asarray, forget)
    return objectives.relabel(forget, classes, key=jax.random.key(SEED))
