"""Rows of the methods that make one edit: solved at once, or by a budget."""

from jedit.methods import _making
from jedit.methods.engrams.curvature_engram import curvature_engram
from jedit.methods.engrams.engram import engram
from jedit.methods.row import ByBudget, ByScale, Need, Reach, Row, Spectrum

ROWS: tuple[Row, ...] = (
    ByBudget(
        name="K-FADE (K-FAC)",
        description="Ascends the forget loss in the K-FAC metric of the retain outputs, in one or a"
        " few steps whose length a line search on the true retain KL sets.",
        when="one edit in seconds, at a price in retain KL that is kept in truth",
        papers=("2602.10568",),
        make=_making.by_kfade(Need.CURVATURE),
        needs=frozenset({Need.CURVATURE}),
        spectrum=Spectrum.SOLVES,
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
        spectrum=Spectrum.LEADING,
        settings={"damping": 0.1, "steps": 4},
    ),
    ByScale(
        name="engram",
        description="Takes out of every weight the part that serves the forget rows' inputs.",
        when="many sets whose edits are to be added and taken away in any order",
        papers=("2606.14997",),
        make=_making.by_engram(engram),
        needs=frozenset({Need.TARGET_MOMENTS, Need.REST_MOMENTS}),
        spectrum=Spectrum.MATRICES,
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
        spectrum=Spectrum.MATRICES,
    ),
    ByScale(
        name="memorised subspace",
        description="Sets to zero the weights, one in a hundred of each matrix, that score highest"
        " by Wanda on the forget rows, where they score higher than on the retain rows.",
        when="what was learnt by heart, by a diffusion model in the paper; nothing is trained",
        papers=("2406.18566",),
        make=_making.by_memorised_subspace,
        needs=frozenset({Need.TARGET_MOMENTS, Need.REST_MOMENTS}),
        spectrum=Spectrum.MATRICES,
        settings={"share": 0.01},  # ours
        reach=Reach.SHARE,
    ),
    ByBudget(
        name="curvature pruning",
        description="Keeps of every weight what holds most of the retain outputs' curvature: how"
        " much, a search on the true retain KL says; the forget rows are not looked at.",
        when="what was learnt by heart, and is nowhere listed",
        papers=("2510.24256",),
        make=_making.by_curvature_pruning,
        needs=frozenset({Need.CURVATURE}),
        settings={"keep": "product"},  # the share kept is ours to search: the code's is 0.8
    ),
    ByScale(
        name="U-CAN",
        description="Turns down every matrix's outputs that forget rows drive harder than retain"
        " rows, smoothly, and less the more retain rows use them.",
        when="one edit from moments alone; recommenders with adapters, in the paper",
        papers=("2602.23400",),
        make=_making.by_ucan,
        needs=frozenset({Need.TARGET_MOMENTS, Need.REST_MOMENTS}),
        spectrum=Spectrum.MATRICES,
        settings={"least_risk": 0.0, "strength": 8.0},  # ours: the paper's are not known to us
    ),
    ByScale(
        name="LinEAS",
        description="Moves the outputs of layers on forget rows to where those on retain rows are,"
        " unit by unit and all layers together, by gains, and by shifts where there is a bias,"
        " folded into the weights.",
        when="a topic or a style that is to be turned down, rather than facts",
        papers=("2503.10679",),
        make=_making.by_lineas,
        needs=frozenset({Need.LAYERS}),
        # 32 rows are the paper's; the others are ours.
        settings={"rows": 32, "steps": 100, "learning_rate": 0.1, "l1": 0.1, "group": 0.1},
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
)
