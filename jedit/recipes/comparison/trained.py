"""The methods that train, as a comparison runs them: each an objective and an optimizer.

Learning rates stand in the optimizers' states, so that a grid of them compiles once; the optimizers
are made once here, so that a second comparison compiles nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jedit.core.batch import Batch
from jedit.curvature import Curvature
from jedit.curvature.memory import exactly
from jedit.geometry import Projector
from jedit.methods import gu, kuda, rosu, sam, uam
from jedit.objectives import (
    CEU,
    DPO,
    GA,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    RandomLabel,
    RepresentationDeviation,
    RetainStates,
    SatImp,
    SimNPO,
    relabel,
    with_retain,
)
from jedit.tracing import Entering
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
GRADDIFF = with_retain(GA())


class Trainer(NamedTuple):
    """A method that trains.

    Attributes:
        description: one sentence: what it does.
        method: with its learning rate in the optimizer's state.
        prepare: of the forget rows and refusals, the forget set it trains on; None: the rows.
    """

    description: str
    method: TrainingMethod
    prepare: Callable[[Batch, Batch | None], Batch | tuple[Batch, Batch]] | None = None


ADAM = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))(
    learning_rate=0.0
)


def _gu(scope: str) -> TrainingMethod:
    made = gu(GRADDIFF, learning_rate=1.0, scope=scope)
    rate = optax.inject_hyperparams(lambda learning_rate: optax.scale(learning_rate))
    return made._replace(optimizer=optax.chain(made.optimizer, rate(learning_rate=0.0)))


def _by_adam(objective, description: str) -> Trainer:
    return Trainer(description, TrainingMethod(objective, ADAM))


def _ahead(method: TrainingMethod, more: str = "") -> Trainer:
    return Trainer(
        "Descends the retain loss as it is where a step of length "
        f"{RADIUS:g} has raised the forget loss{more}.",
        method,
    )


def _by_gu(scope: str, basis: str) -> Trainer:
    return Trainer(
        f"GradDiff's gradient off the last 8 retain gradients, in Adam's metric; {basis}.",
        _gu(scope),
    )


TRAINERS = {
    "gradient ascent": _by_adam(GA(), "Ascends the forget loss; nothing protects the retain rows."),
    "GradDiff": _by_adam(
        GRADDIFF, "Ascends the forget loss and descends the retain loss, equally weighted."
    ),
    "NPO": _by_adam(
        with_retain(NPO()),
        "Negative preference optimisation, beta 0.1, with the retain loss at weight 1.",
    ),
    f"NPO (beta {SOFT:g})": _by_adam(
        with_retain(NPO(beta=SOFT)),
        f"The same at beta {SOFT:g}, which goes on where 0.1 has stopped.",
    ),
    "SimNPO": _by_adam(
        with_retain(SimNPO()),
        "NPO without a reference, loss per token, beta 4.5; with the retain loss.",
    ),
    "WGA": _by_adam(with_retain(WGA()), "Ascent weighted by p, with the retain loss."),
    "SatImp": _by_adam(
        with_retain(SatImp()), "Ascent weighted by p^5 (1-p), with the retain loss."
    ),
    "UNDIAL": _by_adam(
        with_retain(UNDIAL()),
        "Distils the model with its label's logit lowered by 10, with the retain loss.",
    ),
    "CE-U": _by_adam(
        with_retain(CEU()),
        "Distils the model with its label's logit taken out, with the retain loss.",
    ),
    "IdkDPO": _by_adam(
        with_retain(DPO()),
        "Prefers a refusal to the answer (DPO, beta 0.1), with the retain loss.",
    )._replace(
        prepare=lambda forget, refusals: (forget, refusals) if refusals is not None else forget
    ),
    "UAM": _ahead(uam(ADAM, radius=RADIUS)),
    "ROSU": _ahead(rosu(ADAM, radius=RADIUS), CONSTRAINED),
    "ROSU (push)": _ahead(
        rosu(ADAM, radius=RADIUS, outer="push"),
        f"{CONSTRAINED}, and takes a step that way (ours)",
    ),
    "SAM": Trainer(
        "Sharpness-aware GradDiff: its forget gradient is taken a step of length 0.01 back.",
        sam(ADAM),
    ),
    "GU (leaf)": _by_gu("leaf", "a basis for each parameter"),
    "GU (global)": _by_gu("global", "one basis"),
}


def trainers(hidden_site: str, classes: int) -> dict[str, Trainer]:
    """Every method that trains and needs no curvature, by name.

    Args:
        hidden_site: what enters this site is RMU's hidden state; see `find_sites`.
        classes: of the logits.
    """
    hidden = Entering(hidden_site)
    relabelled = _by_adam(
        with_retain(RandomLabel()),
        "Learns a wrong label for every forget row, drawn once, with the retain loss.",
    )
    rmu = _by_adam(
        with_retain(RMU(hidden, seed=SEED), RetainStates(hidden)),
        f"Sends the forget rows' input of {hidden_site} to a random direction of length 2 and "
        "holds that of the retain rows.",
    )
    return TRAINERS | {
        "random label": relabelled._replace(
            prepare=functools.partial(_relabelled, classes=classes)
        ),
        "RMU": rmu,
    }


def kuda_before(curvature: Curvature, hidden_site: str, earlier: Sequence[str]) -> Trainer:
    """KUDA on the parameters of the sites before the one whose input is turned away."""
    objective = with_retain(RepresentationDeviation(Entering(hidden_site), seed=SEED))
    return Trainer(
        f"Turns the forget rows' input of {hidden_site} away, in the relaxed null space of the "
        "retain rows' inputs, with the retain loss; every layer before it, untraced.",
        kuda(curvature, objective, ADAM, select=exactly(earlier)),
    )


def projected_ascent(projector: Projector) -> Trainer:
    """GradDiff by Adam, its steps projected on the null space of the retain rows' inputs."""
    return Trainer(
        "GradDiff by Adam, each step projected on the null space of the retain rows' inputs.",
        TrainingMethod(GRADDIFF, optax.chain(ADAM, project_to_null_space(projector))),
    )


def natural_npo(curvature: Curvature, *, damping: float = 0.1, beta: float = 0.1) -> Trainer:
    """NPO by plain steps in a metric, each of a predicted KL of at most its "learning rate"."""
    clip = optax.inject_hyperparams(
        lambda learning_rate: clip_by_curvature_norm(curvature, max_kl=learning_rate)
    )
    optimizer = optax.chain(
        scale_by_curvature(curvature, damping=damping), optax.scale(-1.0), clip(learning_rate=0.0)
    )
    return Trainer(
        f"NPO, beta {beta:g}, with the retain loss, by steps in the metric of the retain outputs "
        f"at the highest temperature (ours), damping {damping:g}; its rate is a step's predicted "
        "KL, at most.",
        TrainingMethod(with_retain(NPO(beta=beta)), optimizer),
    )


def _relabelled(forget: Batch, refusals: Batch | None, *, classes: int) -> Batch:
    del refusals
    forget = jax.tree.map(jnp.asarray, forget)
    return relabel(forget, classes, key=jax.random.key(SEED))
