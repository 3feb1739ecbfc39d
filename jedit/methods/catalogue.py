"""All methods, one row each: what a method is called, what it needs, how it is made, and its paper.

    row = jedit.methods.CATALOGUE["NPO"]
    material = Material(apply, params, forget, optimizer=optax.adam(1e-4))
    method = row.of(material)
    edit, info = jedit.run_method(method, apply, params, row.forget_rows(material), retain,
                             steps=100, key=key)

The command line, the comparisons of the demo and of TOFU, the tests and the README's table of
methods read these rows. A new method is its file, its test, and its row here.
"""

from types import MappingProxyType

from jedit.methods import _making
from jedit.methods.engrams.curvature_engram import curvature_engram
from jedit.methods.engrams.engram import engram
from jedit.methods.row import (
    ByBudget,
    ByScale,
    BySteps,
    Need,
    Pace,
    Reach,
    Row,
)
from jedit.methods.trained.l1_sparse import l1_sparse
from jedit.methods.trained.pdu import pdu
from jedit.methods.trained.rosu import rosu, uam
from jedit.methods.trained.sam import sam
from jedit.objectives import (
    CEU,
    DPO,
    GA,
    UNDIAL,
    WGA,
    RetainNLL,
    SatImp,
    SimNPO,
    with_retain,
)

TOFU = "2401.06121"  # the benchmark's paper is where GradDiff and IdkDPO are usually taken from
NATURAL = "strong forgetting with much of the rest kept; `jedit.forget` stops it by itself (ours)"
ROWS: tuple[Row, ...] = (
    ByBudget(
        name="K-FADE (K-FAC)",
        description="Ascends the forget loss in the K-FAC metric of the retain outputs, in one or a"
        " few steps whose length a line search on the true retain KL sets.",
        when="one edit in seconds, at a price in retain KL that is kept in truth",
        papers=("2602.10568",),
        make=_making.by_kfade(Need.CURVATURE),
        needs=frozenset({Need.CURVATURE}),
        settings={"damping": 0.1, "steps": 4},
    ),
    ByBudget(
        name="K-FADE (EK-FAC)",
        variant_of="K-FADE (K-FAC)",
        description="The same in the EK-FAC metric, whose eigenvalues one more pass corrects.",
        when="the same, where one more pass over the retain rows is cheap",
        papers=("2602.10568",),
        make=_making.by_kfade(Need.CORRECTED),
        needs=frozenset({Need.CORRECTED}),
        settings={"damping": 0.1, "steps": 4},
    ),
    ByScale(
        name="engram",
        description="Takes out of every weight the part that serves the forget rows' inputs.",
        when="many sets whose edits are to be added and taken away in any order",
        papers=("2606.14997",),
        make=_making.by_engram(engram),
        needs=frozenset({Need.TARGET_MOMENTS, Need.REST_MOMENTS}),
    ),
    ByScale(
        name="engram (output metric)",
        is_ours=True,
        variant_of="engram",
        description="The same with errors weighed by the Fisher matrix of the outputs (ours).",
        when="the same, with what the outputs need weighed in",
        papers=(),
        make=_making.by_engram(curvature_engram),
        needs=frozenset({Need.TARGET_MOMENTS, Need.REST_MOMENTS}),
    ),
    ByScale(
        name="AlphaEdit",
        description="Removes what the layers answer to the forget rows' prompts, in the null space"
        " of the retain rows' inputs.",
        when="single facts, many in a row, other inputs untouched",
        papers=("2410.02355",),
        make=_making.by_alphaedit,
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
        make=_making.by_memit,
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
        make=_making.by_rome,
        needs=frozenset({Need.CURVATURE, Need.LAYERS, Need.SUBJECTS}),
        reach=Reach.FACTS,
    ),
    BySteps(
        name="gradient ascent",
        variant_of="GradDiff",
        description="Ascends the forget loss; nothing protects the retain rows.",
        when="a baseline",
        papers=(TOFU,),
        make=_making.lowered(GA()),
        pace=Pace.PLAIN_ASCENT,
    ),
    BySteps(
        name="GradDiff",
        description="Ascends the forget loss and descends the retain loss, equally weighted.",
        when="a baseline",
        papers=(TOFU,),
        make=_making.lowered(_making.GRADDIFF),
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="NPO",
        description="Negative preference optimisation, beta 0.1, with the retain loss at weight 1.",
        when="the usual choice for language models where there is no curvature",
        papers=("2404.05868",),
        make=_making.npo,
        settings={"beta": 0.1},
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="NPO (beta 0.04)",
        variant_of="NPO",
        description="The same at beta 0.04, which goes on where 0.1 has stopped.",
        when="the same, until the answers are as unlikely as unseen ones",
        papers=("2404.05868",),
        make=_making.npo,
        settings={"beta": 0.04},  # pushes an answer of 60 tokens seven nats a token down, not two
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="NPO (natural)",
        is_ours=True,
        variant_of="NPO (natural, beta 0.04)",
        description="NPO, beta 0.1, with the retain loss, by natural steps in the metric of the"
        " retain outputs (ours); its rate is a step's predicted KL, at most.",
        when=NATURAL,
        papers=(),
        make=_making.natural_npo,
        needs=frozenset({Need.CURVATURE}),
        settings={"beta": 0.1, "damping": 0.01, "predicted_kl": 1e-4},
        pace=Pace.PREDICTED_KL,
    ),
    BySteps(
        name="NPO (natural, beta 0.04)",
        is_ours=True,
        description="The same at beta 0.04, which goes on where 0.1 has stopped.",
        when=NATURAL,
        papers=(),
        make=_making.natural_npo,
        needs=frozenset({Need.CURVATURE}),
        settings={"beta": 0.04, "damping": 0.01, "predicted_kl": 1e-4},
        pace=Pace.PREDICTED_KL,
    ),
    BySteps(
        name="SimNPO",
        description="NPO without a reference, loss per token, beta 4.5; with the retain loss.",
        when="NPO, where no second model fits",
        papers=("2410.07163",),
        make=_making.lowered(with_retain(SimNPO())),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="WGA",
        variant_of="GradDiff",
        description="Ascent weighted by p, with the retain loss.",
        when="a baseline",
        papers=("2502.19301",),
        make=_making.lowered(with_retain(WGA())),
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="SatImp",
        variant_of="GradDiff",
        description="Ascent weighted by p^5 (1-p), with the retain loss.",
        when="a baseline",
        papers=("2505.11953",),
        make=_making.lowered(with_retain(SatImp())),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="PDU",
        description="Flattens the forget outputs' logits, subject to a retain loss of at most 0.3"
        " nats: the retain loss's weight, 100 at first, grows while it is higher.",
        when="answers that are to become uniform, at a retain loss that is stated",
        papers=("2506.05314",),
        make=lambda material, **settings: _making.around(pdu, material.optimizer, **settings),
        settings={"tolerance": 0.3, "dual": 100.0, "dual_rate": 5.0, "delay": 0},  # TOFU's runs
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="UNDIAL",
        description="Distils the model with its label's logit lowered by 10, with the retain loss.",
        when="answers that are to stay fluent",
        papers=("2402.10052",),
        make=_making.lowered(with_retain(UNDIAL())),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="CE-U",
        variant_of="UNDIAL",
        description="Distils the model with its label's logit taken out, with the retain loss.",
        when="answers that are to stay fluent",
        papers=("2503.01224",),
        make=_making.lowered(with_retain(CEU())),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="IdkDPO",
        description="Prefers a refusal to the answer (DPO, beta 0.1), with the retain loss.",
        when="questions that are to be refused",
        papers=(TOFU, "2305.18290"),
        make=_making.lowered(with_retain(DPO())),
        needs=frozenset({Need.REFUSALS}),
        prepare=lambda material: (material.forget, material.take(Need.REFUSALS)),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="AltPO",
        description="Prefers an alternate answer, sampled from the model, to the answer (DPO, beta"
        " 0.1), with the retain loss.",
        when="questions that are to be answered, wrongly",
        papers=("2409.13474",),
        make=_making.altpo,
        needs=frozenset({Need.ALTERNATES}),
        settings={"beta": 0.1},
        prepare=_making.with_alternates,
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="random label",
        description="Learns a wrong label for every forget row, drawn once, with the retain loss.",
        when="a baseline for classifiers",
        papers=("2010.10981",),
        make=_making.random_label,
        needs=frozenset({Need.NUM_CLASSES}),
        settings={"forget_weight": 1.0},
        prepare=_making.relabelled,
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="SalUn",
        description="Random labels, but for half of the parameters: those with the smallest forget"
        " gradients stay as they are.",
        when="classifiers and image generators",
        papers=("2310.12508",),
        make=_making.by_salun,
        needs=frozenset({Need.NUM_CLASSES}),
        settings={"fraction": 0.5, "forget_weight": 1.0},
        prepare=_making.relabelled,
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="RMU",
        description="Sends the forget rows' hidden state to a random direction of length 2 and"
        " holds that of the retain rows.",
        when="knowledge of a whole field, without answers to point at",
        papers=("2403.03218",),
        make=_making.rmu,
        needs=frozenset({Need.HIDDEN_SITE}),
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="KUDA",
        description="Turns the forget rows' hidden state away, in the relaxed null space of the"
        " retain rows' inputs, with the retain loss; every layer before it, untraced.",
        when="the same, with other inputs held by projection",
        papers=("2602.19275",),
        make=_making.by_kuda,
        needs=frozenset({Need.HIDDEN_SITE, Need.CURVATURE}),
        settings={"threshold": 0.02},  # arbitrary
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="RepSelect",
        description="NPO by steps of one length, shrunk along the directions that hold most of the"
        " forget answers' inputs and output gradients, an eighth of all.",
        when="an attacker will fine-tune, and there are no retain rows",
        papers=("2606.17168",),
        make=_making.by_repselect,
        needs=frozenset({Need.TARGET_MOMENTS}),
        settings={"beta": 0.1, "rank": 512, "share": 0.125},  # the share is ours: 512 of 4096
        pace=Pace.STEP_LENGTH,
    ),
    BySteps(
        name="null-space GradDiff",
        description="GradDiff by the optimizer, each step projected on the null space of the retain"
        " rows' inputs.",
        when="any objective, with other inputs held by projection",
        papers=("2410.02355",),
        make=_making.in_null_space,
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
        make=_making.by_gu,
        settings={"scope": "leaf", "objective": _making.GRADDIFF},
        pace=Pace.ADAM_METRIC,
    ),
    BySteps(
        name="GU (global)",
        variant_of="GU (leaf)",
        description="GradDiff's gradient off the last 8 retain gradients, in Adam's metric; one"
        " basis.",
        when="the same, with one basis for all parameters",
        papers=("2511.17100",),
        make=_making.by_gu,
        settings={"scope": "global", "objective": _making.GRADDIFF},
        pace=Pace.ADAM_METRIC,
    ),
    BySteps(
        name="SAM",
        description="Sharpness-aware GradDiff: its forget gradient is taken a step of length 0.01"
        " back.",
        when="an attacker will fine-tune",
        papers=("2502.05374",),
        make=lambda material: _making.around(sam, material.optimizer),
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="UAM",
        variant_of="ROSU",
        description="Descends the retain loss as it is where a step of length 0.1 has raised the"
        " forget loss.",
        when="classifiers",
        papers=("2605.05871",),
        make=lambda material, *, radius: _making.around(uam, material.optimizer, radius=radius),
        settings={"radius": 0.1},  # arbitrary
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="ROSU",
        description="Descends the retain loss as it is where a step of length 0.1 has raised the"
        " forget loss at no first-order retain cost.",
        when="classifiers whose forget and retain gradients are alike",
        papers=("2605.05871",),
        make=lambda material, *, radius: _making.around(rosu, material.optimizer, radius=radius),
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
        make=lambda material, *, radius: _making.around(
            rosu, material.optimizer, radius=radius, outer="push"
        ),
        settings={"radius": 0.1},
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="l1-sparse",
        description="Lowers the retain loss under an l1 penalty that falls to zero; the forget rows"
        " are not looked at.",
        when="a baseline for classifiers",
        papers=("2304.04934",),
        make=lambda material, *, strength: _making.around(
            l1_sparse, material.optimizer, strength=strength, steps=material.take(Need.STEPS)
        ),
        needs=frozenset({Need.STEPS}),
        settings={"strength": 1e-3},  # arbitrary; the code's 0.2 fits no model of ours
        pace=Pace.DESCENT,
    ),
    BySteps(
        name="fine-tune",
        variant_of="GradDiff",
        description="Lowers the retain loss; the forget rows are not looked at.",
        when="a baseline",
        papers=(),
        make=_making.lowered(RetainNLL()),
        pace=Pace.DESCENT,
    ),
)
CATALOGUE = MappingProxyType({row.name: row for row in ROWS})
