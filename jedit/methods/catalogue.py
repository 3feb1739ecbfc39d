"""All methods, one row each: what a method is called, what it needs, how it is made, and its paper.

    row = jedit.methods.CATALOGUE["NPO"]
    method = row.of(Material(apply, params, forget, optimizer=ADAM))
    edit, info = jedit.run_method(method, apply, params, row.forget_rows(material), retain, ...)

The command line, the demo, TOFU, the vision protocol, the contract table and the README's table of
methods read these rows. A new method is its file, its test, and its row here.
"""

import functools
from types import MappingProxyType
from typing import Any

import jax
import optax

from jedit.core.batch import Batch
from jedit.core.paths import exactly
from jedit.geometry import null_space
from jedit.methods.associations._write import Associations, Layers
from jedit.methods.associations.alphaedit import alphaedit
from jedit.methods.associations.memit import memit
from jedit.methods.associations.rome import rome
from jedit.methods.curvature.kfade import Ascent, kfade
from jedit.methods.engrams.curvature_engram import curvature_engram
from jedit.methods.engrams.engram import engram
from jedit.methods.row import (
    ByBudget,
    ByScale,
    BySteps,
    ClosedForm,
    Material,
    Need,
    Pace,
    Reach,
    Row,
)
from jedit.methods.trained.gu import gu
from jedit.methods.trained.kuda import kuda
from jedit.methods.trained.l1_sparse import l1_sparse
from jedit.methods.trained.rosu import rosu, uam
from jedit.methods.trained.salun import salun
from jedit.methods.trained.sam import sam
from jedit.objectives import (
    CEU,
    DPO,
    GA,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    Objective,
    RandomLabel,
    RepresentationDeviation,
    RetainNLL,
    RetainStates,
    SatImp,
    SimNPO,
    relabel,
    with_retain,
)
from jedit.tracing import Entering, find_sites
from jedit.training import TrainingMethod
from jedit.transforms import clip_by_curvature_norm, project_to_null_space, scale_by_curvature

SEED = 0  # of random labels and directions, which are the same for all models
TOFU = "2401.06121"  # the benchmark's paper is where GradDiff and IdkDPO are usually taken from
GRADDIFF = with_retain(GA())


def _kfade(curvature: Need):
    def make(material: Material, *, damping: float, steps: int) -> ClosedForm:
        metric = material.take(curvature)
        return functools.partial(kfade, curvature=metric, damping=damping, ascent=Ascent(steps))

    return make


def _engram(method):
    def make(material: Material) -> ClosedForm:
        target, rest = material.take(Need.TARGET_MOMENTS), material.take(Need.REST_MOMENTS)

        def edit(apply, params, *, forget, retain):
            del apply, forget, retain  # the moments hold what it needs of them
            return method(params, target, rest)

        return edit

    return make


def _facts(material: Material, forget: Batch) -> Associations:
    return Associations(forget, material.subjects)


def _alphaedit(material: Material, *, threshold: float) -> ClosedForm:
    projector = null_space(material.take(Need.CURVATURE), threshold=threshold)
    layers = Layers(material.take(Need.LAYERS))

    def edit(apply, params, *, forget, retain):
        del retain
        return alphaedit(apply, params, projector, _facts(material, forget), None, layers=layers)

    return edit


def _memit(material: Material) -> ClosedForm:
    def edit(apply, params, *, forget, retain):
        del retain
        facts, layers = _facts(material, forget), Layers(material.take(Need.LAYERS))
        return memit(apply, params, material.take(Need.CURVATURE), facts, None, layers=layers)

    return edit


def _rome(material: Material) -> ClosedForm:
    def edit(apply, params, *, forget, retain):
        del retain
        facts, layer = _facts(material, forget), material.take(Need.LAYERS)[-1]
        return rome(apply, params, material.take(Need.CURVATURE), facts, None, layer=layer)

    return edit


def _lowered(objective: Objective):
    return lambda material: TrainingMethod(objective, material.optimizer)


def _npo(material: Material, *, beta: float) -> TrainingMethod:
    return TrainingMethod(with_retain(NPO(beta=beta)), material.optimizer)


def _random_label(material: Material, *, forget_weight: float) -> TrainingMethod:
    objective = with_retain(RandomLabel(), forget_weight=forget_weight)
    return TrainingMethod(objective, material.optimizer)


def _relabelled(material: Material) -> Batch:
    forget = jax.tree.map(jax.numpy.asarray, material.forget)
    return relabel(forget, material.take(Need.NUM_CLASSES), key=jax.random.key(SEED))


def _salun(material: Material, *, fraction: float, forget_weight: float) -> TrainingMethod:
    objective = with_retain(RandomLabel(), forget_weight=forget_weight)
    given = (material.apply, material.params, material.forget, material.optimizer)
    return salun(*given, fraction=fraction, objective=objective)


def _rmu(material: Material) -> TrainingMethod:
    hidden = Entering(material.take(Need.HIDDEN_SITE))
    return TrainingMethod(
        with_retain(RMU(hidden, seed=SEED), RetainStates(hidden)), material.optimizer
    )


def _gu(material: Material, *, scope: Any) -> TrainingMethod:
    del material  # its metric is an Adam of its own
    made = gu(GRADDIFF, learning_rate=1.0, scope=scope)
    rate = optax.inject_hyperparams(lambda learning_rate: optax.scale(learning_rate))
    return made._replace(optimizer=optax.chain(made.optimizer, rate(learning_rate=1e-4)))


def _kuda(material: Material, *, threshold: float) -> TrainingMethod:
    site, curvature = material.take(Need.HIDDEN_SITE), material.take(Need.CURVATURE)
    sites = list(find_sites(material.apply, material.params, material.forget.inputs))
    earlier = [name for name in sites[: sites.index(site)] if name in curvature.blocks]
    if not earlier:
        raise ValueError(f"KUDA trains what lies before {site}, and nothing does")
    objective = with_retain(RepresentationDeviation(Entering(site), seed=SEED))
    given = (curvature, objective, material.optimizer)
    return kuda(*given, select=exactly(earlier), threshold=threshold)


def _in_null_space(material: Material, *, threshold: float) -> TrainingMethod:
    projector = null_space(material.take(Need.CURVATURE), threshold=threshold)
    optimizer = optax.chain(material.optimizer, project_to_null_space(projector))
    return TrainingMethod(GRADDIFF, optimizer)


def _natural_npo(material: Material, *, beta: float, damping: float) -> TrainingMethod:
    curvature = material.take(Need.TEMPERED)
    clip = optax.inject_hyperparams(
        lambda learning_rate: clip_by_curvature_norm(curvature, predicted_kl=learning_rate)
    )
    optimizer = optax.chain(
        scale_by_curvature(curvature, damping=damping), optax.scale(-1.0), clip(learning_rate=3e-4)
    )
    return TrainingMethod(with_retain(NPO(beta=beta)), optimizer)


NATURAL = "natural steps in the retain metric: the strongest forgetting at a stated price (ours)"
ROWS: tuple[Row, ...] = (
    ByBudget(
        name="K-FADE (K-FAC)",
        description="Ascends the forget loss in the K-FAC metric of the retain outputs, in one or a"
        " few steps whose length a line search on the true retain KL sets.",
        when="one edit in seconds, at a price in retain KL that is kept in truth",
        papers=("2602.10568",),
        make=_kfade(Need.CURVATURE),
        needs=frozenset({Need.CURVATURE}),
        settings={"damping": 0.1, "steps": 4},
    ),
    ByBudget(
        name="K-FADE (EK-FAC)",
        variant_of="K-FADE (K-FAC)",
        description="The same in the EK-FAC metric, whose eigenvalues one more pass corrects.",
        when="the same, where one more pass over the retain rows is cheap",
        papers=("2602.10568",),
        make=_kfade(Need.CORRECTED),
        needs=frozenset({Need.CORRECTED}),
        settings={"damping": 0.1, "steps": 4},
    ),
    ByScale(
        name="engram",
        description="Takes out of every weight the part that serves the forget rows' inputs.",
        when="many sets whose edits are to be added and taken away in any order",
        papers=("2606.14997",),
        make=_engram(engram),
        needs=frozenset({Need.TARGET_MOMENTS, Need.REST_MOMENTS}),
    ),
    ByScale(
        name="engram (output metric)",
        is_ours=True,
        variant_of="engram",
        description="The same with errors weighed by the Fisher matrix of the outputs (ours).",
        when="the same, with what the outputs need weighed in",
        papers=(),
        make=_engram(curvature_engram),
        needs=frozenset({Need.TARGET_MOMENTS, Need.REST_MOMENTS}),
    ),
    ByScale(
        name="AlphaEdit",
        description="Removes what the layers answer to the forget rows' prompts, in the null space"
        " of the retain rows' inputs.",
        when="single facts, many in a row, other inputs untouched",
        papers=("2410.02355",),
        make=_alphaedit,
        needs=frozenset({Need.CURVATURE, Need.LAYERS, Need.SUBJECTS}),
        settings={"threshold": 0.01},  # a share of the energy, arbitrary; the paper's is absolute
        reach=Reach.FACTS,
    ),
    ByScale(
        name="MEMIT",
        description="Removes what the layers answer to the forget rows' prompts, by ridge"
        " regression against the retain rows' inputs.",
        when="single facts: thousands at once, or (ROME) one",
        papers=("2210.07229",),
        make=_memit,
        needs=frozenset({Need.CURVATURE, Need.LAYERS, Need.SUBJECTS}),
        reach=Reach.FACTS,
    ),
    ByScale(
        name="ROME",
        variant_of="MEMIT",
        description="Removes what the last layer answers to the forget rows' prompts, fact by fact,"
        " each by a change of rank one.",
        when="one fact",
        papers=("2202.05262",),
        make=_rome,
        needs=frozenset({Need.CURVATURE, Need.LAYERS, Need.SUBJECTS}),
        reach=Reach.FACTS,
    ),
    BySteps(
        name="gradient ascent",
        description="Ascends the forget loss; nothing protects the retain rows.",
        when="a baseline",
        papers=(TOFU,),
        make=_lowered(GA()),
        pace=Pace.PLAIN_ASCENT,
    ),
    BySteps(
        name="GradDiff",
        description="Ascends the forget loss and descends the retain loss, equally weighted.",
        when="a baseline",
        papers=(TOFU,),
        make=_lowered(GRADDIFF),
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="NPO",
        description="Negative preference optimisation, beta 0.1, with the retain loss at weight 1.",
        when="the usual choice for language models where there is no curvature",
        papers=("2404.05868",),
        make=_npo,
        settings={"beta": 0.1},
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="NPO (beta 0.04)",
        variant_of="NPO",
        description="The same at beta 0.04, which goes on where 0.1 has stopped.",
        when="the same, until the answers are as unlikely as unseen ones",
        papers=("2404.05868",),
        make=_npo,
        settings={"beta": 0.04},  # pushes an answer of 60 tokens seven nats a token down, not two
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="NPO (natural)",
        is_ours=True,
        variant_of="NPO (natural, beta 0.04)",
        description="NPO, beta 0.1, with the retain loss, by steps in the metric of the retain"
        " outputs at the highest temperature (ours), damping 0.1; its rate is a step's predicted"
        " KL, at most.",
        when=NATURAL,
        papers=(),
        make=_natural_npo,
        needs=frozenset({Need.TEMPERED}),
        settings={"beta": 0.1, "damping": 0.1},
        pace=Pace.PREDICTED_KL,
    ),
    BySteps(
        name="NPO (natural, beta 0.04)",
        is_ours=True,
        description="The same at beta 0.04, which goes on where 0.1 has stopped.",
        when=NATURAL,
        papers=(),
        make=_natural_npo,
        needs=frozenset({Need.TEMPERED}),
        settings={"beta": 0.04, "damping": 0.1},
        pace=Pace.PREDICTED_KL,
    ),
    BySteps(
        name="SimNPO",
        description="NPO without a reference, loss per token, beta 4.5; with the retain loss.",
        when="NPO, where no second model fits",
        papers=("2410.07163",),
        make=_lowered(with_retain(SimNPO())),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="WGA",
        variant_of="GradDiff",
        description="Ascent weighted by p, with the retain loss.",
        when="a baseline",
        papers=("2502.19301",),
        make=_lowered(with_retain(WGA())),
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="SatImp",
        variant_of="GradDiff",
        description="Ascent weighted by p^5 (1-p), with the retain loss.",
        when="a baseline",
        papers=("2505.11953",),
        make=_lowered(with_retain(SatImp())),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="UNDIAL",
        description="Distils the model with its label's logit lowered by 10, with the retain loss.",
        when="answers that are to stay fluent",
        papers=("2402.10052",),
        make=_lowered(with_retain(UNDIAL())),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="CE-U",
        variant_of="UNDIAL",
        description="Distils the model with its label's logit taken out, with the retain loss.",
        when="answers that are to stay fluent",
        papers=("2503.01224",),
        make=_lowered(with_retain(CEU())),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="IdkDPO",
        description="Prefers a refusal to the answer (DPO, beta 0.1), with the retain loss.",
        when="questions that are to be refused",
        papers=(TOFU, "2305.18290"),
        make=_lowered(with_retain(DPO())),
        needs=frozenset({Need.REFUSALS}),
        prepare=lambda material: (material.forget, material.take(Need.REFUSALS)),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="random label",
        description="Learns a wrong label for every forget row, drawn once, with the retain loss.",
        when="a baseline for classifiers",
        papers=("2010.10981",),
        make=_random_label,
        needs=frozenset({Need.NUM_CLASSES}),
        settings={"forget_weight": 1.0},
        prepare=_relabelled,
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="SalUn",
        description="Random labels, but for half of the parameters: those with the smallest forget"
        " gradients stay as they are.",
        when="classifiers and image generators",
        papers=("2310.12508",),
        make=_salun,
        needs=frozenset({Need.NUM_CLASSES}),
        settings={"fraction": 0.5, "forget_weight": 1.0},
        prepare=_relabelled,
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="RMU",
        description="Sends the forget rows' hidden state to a random direction of length 2 and"
        " holds that of the retain rows.",
        when="knowledge of a whole field, without answers to point at",
        papers=("2403.03218",),
        make=_rmu,
        needs=frozenset({Need.HIDDEN_SITE}),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="KUDA",
        description="Turns the forget rows' hidden state away, in the relaxed null space of the"
        " retain rows' inputs, with the retain loss; every layer before it, untraced.",
        when="the same, with other inputs held by projection",
        papers=("2602.19275",),
        make=_kuda,
        needs=frozenset({Need.HIDDEN_SITE, Need.CURVATURE}),
        settings={"threshold": 0.02},  # arbitrary
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="null-space GradDiff",
        description="GradDiff by the optimizer, each step projected on the null space of the retain"
        " rows' inputs.",
        when="any objective, with other inputs held by projection",
        papers=("2410.02355",),
        make=_in_null_space,
        needs=frozenset({Need.CURVATURE}),
        settings={"threshold": 0.01},  # share of the retained inputs' energy that is given up
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="GU (leaf)",
        description="GradDiff's gradient off the last 8 retain gradients, in Adam's metric; a basis"
        " for each parameter.",
        when="any objective, with retain losses held to first order",
        papers=("2511.17100",),
        make=_gu,
        settings={"scope": "leaf"},
        pace=Pace.ADAM_METRIC,
    ),
    BySteps(
        name="GU (global)",
        variant_of="GU (leaf)",
        description="GradDiff's gradient off the last 8 retain gradients, in Adam's metric; one"
        " basis.",
        when="the same, with one basis for all parameters",
        papers=("2511.17100",),
        make=_gu,
        settings={"scope": "global"},
        pace=Pace.ADAM_METRIC,
    ),
    BySteps(
        name="SAM",
        description="Sharpness-aware GradDiff: its forget gradient is taken a step of length 0.01"
        " back.",
        when="an attacker will fine-tune",
        papers=("2502.05374",),
        make=lambda material: sam(material.optimizer),
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="UAM",
        description="Descends the retain loss as it is where a step of length 0.1 has raised the"
        " forget loss.",
        when="classifiers",
        papers=("2605.05871",),
        make=lambda material, *, radius: uam(material.optimizer, radius=radius),
        settings={"radius": 0.1},  # arbitrary
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="ROSU",
        description="Descends the retain loss as it is where a step of length 0.1 has raised the"
        " forget loss at no first-order retain cost.",
        when="classifiers whose forget and retain gradients are alike",
        papers=("2605.05871",),
        make=lambda material, *, radius: rosu(material.optimizer, radius=radius),
        settings={"radius": 0.1},  # arbitrary
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="ROSU (push)",
        is_ours=True,
        variant_of="ROSU",
        description="Descends the retain loss as it is where a step of length 0.1 has raised the"
        " forget loss at no first-order retain cost, and takes a step that way (ours).",
        when="the same, where that forgets too little",
        papers=(),
        make=lambda material, *, radius: rosu(material.optimizer, radius=radius, outer="push"),
        settings={"radius": 0.1},
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="l1-sparse",
        description="Lowers the retain loss under an l1 penalty that falls to zero; the forget rows"
        " are not looked at.",
        when="a baseline for classifiers",
        papers=("2304.04934",),
        make=lambda material, *, strength: l1_sparse(
            material.optimizer, strength=strength, steps=material.take(Need.STEPS)
        ),
        needs=frozenset({Need.STEPS}),
        settings={"strength": 1e-3},  # arbitrary; the code's 0.2 fits no model of ours
        pace=Pace.DESCENT,
    ),
    BySteps(
        name="fine-tune",
        description="Lowers the retain loss; the forget rows are not looked at.",
        when="a baseline",
        papers=(),
        make=_lowered(RetainNLL()),
        pace=Pace.DESCENT,
    ),
)
CATALOGUE = MappingProxyType({row.name: row for row in ROWS})


def markdown_table() -> str:
    """Return the README's table of methods: a line a row, its variants in the same."""
    lines = ["| method | use it for | needs besides two sets | paper |", "|---|---|---|---|"]
    linked = set()
    for row in ROWS:
        if row.variant_of is not None:
            continue
        shown = [row, *(other for other in ROWS if other.variant_of == row.name)]
        papers = dict.fromkeys(number for one in shown for number in one.papers)
        links = []
        for number in papers:  # each is linked once
            is_new = number not in linked
            linked.add(number)
            links.append(f"[{number}](https://arxiv.org/abs/{number})" if is_new else number)
        whose = ["ours"] if row.is_ours else []
        names = ", ".join(one.name for one in shown)
        needs = ", ".join(need.value for need in Need if need in row.needs) or "–"
        lines.append(f"| {names} | {row.when} | {needs} | {', '.join(links + whose) or '–'} |")
    return "\n".join(lines) + "\n"
