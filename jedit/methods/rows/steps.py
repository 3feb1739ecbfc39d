"""Rows of the methods whose steps are their own: projected, masked, perturbed, natural."""

from jedit.methods import _making
from jedit.methods.row import ByDraws, BySteps, Need, Pace, Row, Spectrum
from jedit.methods.trained.l1_sparse import l1_sparse
from jedit.methods.trained.ofmu import ofmu
from jedit.methods.trained.rosu import rosu, uam
from jedit.methods.trained.sam import sam
from jedit.methods.trained.ssiuu import ssiuu

NATURAL = "strong forgetting with much of the rest kept; `jedit.forget` stops it by itself (ours)"

ROWS: tuple[Row, ...] = (
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
        spectrum=Spectrum.SOLVES,
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
        spectrum=Spectrum.SOLVES,
        settings={"beta": 0.04, "damping": 0.01, "predicted_kl": 1e-4},
        pace=Pace.PREDICTED_KL,
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
        name="KUDA",
        description="Turns the forget rows' hidden state away, in the relaxed null space of the"
        " retain rows' inputs, with the retain loss; every layer before it, untraced.",
        when="knowledge of a whole field, with other inputs held by projection",
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
        name="MCU",
        description="RMU of what a layer answers to the forget rows, without the mean and the 8"
        " directions in which that varies most, with the retain loss.",
        when="an attacker will fine-tune, by its paper",
        papers=("2605.11685",),
        make=_making.by_mcu,
        needs=frozenset({Need.LAYERS, Need.TARGET_MOMENTS}),
        spectrum=Spectrum.MATRICES,
        settings={"rank": 8},  # arbitrary
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="REGLU",
        description="Trains adapters alone, which begin where the forget answers' outputs stand out"
        " and are kept off the retain answers', on the inverted hinge loss with the retain loss.",
        when="language models by adapters, whose edits are thin",
        papers=("2604.17396",),
        make=_making.by_reglu,
        needs=frozenset({Need.TARGET_MOMENTS, Need.REST_MOMENTS}),
        spectrum=Spectrum.MATRICES,
        settings={  # the code's, on phi-1.5
            "rank": 32,
            "retain_rank": 128,
            "balance": 0.7,
            "scale": 2.0,
            "weight": 0.5,
        },
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="CURE",
        description="Ascends the forget loss in modules that serve it alone, descends the retain"
        " loss in those that serve that alone, and does both in the others, without conflict.",
        when="recommenders, in the paper; a few modules serve the forget rows alone",
        papers=("2604.04982",),
        make=_making.by_cure,
        needs=frozenset({Need.RETAIN}),
        settings={"threshold": 0.1},  # arbitrary
        pace=Pace.UNBOUNDED,
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
        name="Ssiuu",
        description="GradDiff, with a penalty on every change of what holds the forget answers"
        " down: negative attributions of parameters are held where they were a step before.",
        when="relearning is to bring back less than after GradDiff",
        papers=("2509.22263",),
        make=lambda material, **settings: _making.around(ssiuu, material.optimizer, **settings),
        settings={"strength": 0.01, "score": "probability"},  # the strength is ours
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="Ssiuu (log)",
        is_ours=True,
        variant_of="Ssiuu",
        description="The same with attributions of the answer's log-probability, which do not"
        " vanish with the answer (ours).",
        when="the same; of the two, less came back after it in our test",
        papers=(),
        make=lambda material, **settings: _making.around(ssiuu, material.optimizer, **settings),
        settings={"strength": 0.01, "score": "log_probability"},
        pace=Pace.UNBOUNDED,
    ),
    BySteps(
        name="OFMU",
        description="Rounds of five steps up a bounded forget loss, off the retain gradient, and"
        " one down the retain loss that is held where the ascent ended.",
        when="a baseline: in our test its repair kept no more than gradient ascent",
        papers=("2509.22483",),
        make=lambda material, **settings: _making.around(ofmu, material.optimizer, **settings),
        settings={"beta": 0.1, "inner_steps": 5, "penalty": 0.1},  # T: the paper's least
        pace=Pace.BOUNDED,
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
    ByDraws(
        name="RULE",
        description="Learns to refuse some of the forget questions, then by GRPO which to refuse.",
        when="questions that are to be refused, which the model learns by trying",
        papers=("2506.07171",),
        make=_making.by_rule,
        needs=frozenset({Need.DIALOGUE}),
        settings={"tuning_steps": 40},  # arbitrary
    ),
)
