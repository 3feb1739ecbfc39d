"""Rows of the methods that are an objective, lowered by any optimizer."""

from jedit.methods import _making
from jedit.methods.row import BySteps, Need, Pace, Row
from jedit.methods.trained.pdu import pdu
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

ROWS: tuple[Row, ...] = (
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
        name="FIT",
        description="Random labels, NPO, or NPO with a retain KL, by how large a row's gradient is;"
        " trains the 8 layers that matter most to the rows.",
        when="requests that keep coming, after its filter (`distinct_requests`)",
        papers=("2601.21682",),
        make=_making.by_fit,
        settings={"layers": 8, "beta": 0.1, "kl_weight": 1.0},
        prepare=_making.graded,
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
        name="SAE-guided",
        description="Pulls the state where a forget row's question has been read to that of unknown"
        " entities, among the latents of a sparse autoencoder, and pushes it from that of known"
        " ones; with the retain loss.",
        when="entities that are to be met as strangers, and there are strangers to compare with",
        papers=("2509.15631",),
        make=_making.by_sae_guided,
        needs=frozenset({Need.HIDDEN_SITE, Need.LATENTS}),
        settings={"push": 1.0},  # arbitrary
        pace=Pace.BOUNDED,
    ),
    BySteps(
        name="Attention-Shifting",
        description="Turns attention away from the forget rows' important tokens, by whose absence"
        " an answer becomes uncertain, and towards the retain rows' ones.",
        when="answers that are to stay fluent, where few tokens carry the fact",
        papers=("2510.17210",),
        make=_making.by_attention_shifting,
        needs=frozenset({Need.ATTENTION}),
        # All four are arbitrary.
        settings={"forget_weight": 0.5, "suppression": 0.9, "reinforcement": 0.9, "share": 0.25},
        pace=Pace.BOUNDED,
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
