"""The five questions of an audit, each with its measures, findings, curves, and words for all."""

import numpy as np

from jedit.recipes.audit import comeback, cost, depth, forgotten, hiding, membership
from jedit.recipes.audit.estimates import BOOTSTRAP, Compared
from jedit.recipes.audit.parts import Asked, OfModel, Settings
from jedit.recipes.audit.rows import Rows
from jedit.recipes.audit.rules import TABLE, judge
from jedit.report.audit_results import Estimate, Finding, Measure, Section

PROBE_NOTE = (
    "A probe also tells rows apart by what they are about: it counts only by how far it is above "
    "the retrained model's."
)
NO_ATTACKS = "attacks were left out (--no-attacks)"
DepthFound = tuple[Finding, Estimate | None]


def sections_of(
    asked: Asked,
    found: dict[str, OfModel],
    kept: cost.Kept,
    depth_found: DepthFound | None,
    comebacks: comeback.Comebacks | str,
    settings: Settings,
) -> list[Section]:
    """Answer the five questions; in place of attacks there may be the reason why there are none."""
    said = {role: one.said["forget"] for role, one in found.items()}
    if asked.unseen is not None:
        said["unseen_base"] = found["base"].said["unseen"]
        said["unseen"] = found["edited"].said["unseen"]
    known = forgotten.compared(said)
    if asked.forget.is_marked:
        known = {name: one for name, one in known.items() if name not in forgotten.WHOLE}
    return [
        _forgotten(asked, said, known),
        _membership(asked, found, said),
        _depth(found, depth_found),
        _comeback(known["probability"], comebacks),
        _cost(asked, kept, settings),
    ]


def _forgotten(
    asked: Asked, said: dict[str, forgotten.Said], known: dict[str, Compared]
) -> Section:
    return Section(
        "forgotten",
        "What is forgotten?",
        "The models are given the questions, and it is measured how likely they hold the true "
        "answers, how much of them they say by themselves, and how little of an answer brings the "
        "rest. Every number is higher the better the rows are known. A good value is not 0 but "
        "what a model has that never saw them.",
        forgotten.measures_of(known),
        (),
        _notes_of(asked.forget, "to forget"),
        forgotten.findings_of(known, asked.forget.rows),
        {"losses": {role: one.loss for role, one in said.items()}},
    )


def _membership(
    asked: Asked, found: dict[str, OfModel], said: dict[str, forgotten.Said]
) -> Section:
    seen = {role: one.seen for role, one in found.items() if one.seen is not None}
    ratios = {role: one.ratios for role, one in found.items()}
    notes = []
    if asked.unseen is not None:
        notes.append(
            "An attack is only as good as its unseen rows: they must be of the same kind as those "
            "to forget. If the retrained model's areas are not near 0.5, they are not."
        )
    return Section(
        "membership",
        "Can it be told from never having seen it?",
        "An attacker who has the model guesses whether it was trained on a row. The area is how "
        "often he ranks a row to forget before one that nobody trained on: 0.5 is chance, 1 "
        "certainty. Below 0.5 the rows look less known than unseen ones, which gives the edit away "
        "as well.",
        membership.measures_of(seen) if seen else [],
        (),
        notes,
        membership.findings_of(seen, said, ratios),
        {},
    )


def _depth(found: dict[str, OfModel], depth_found: DepthFound | None) -> Section:
    lens = {role: one.lens["forget"] for role, one in found.items()}
    probe = {}
    if "unseen" in found["base"].lens:
        lens["unseen_base"] = found["base"].lens["unseen"]
        lens["unseen"] = found["edited"].lens["unseen"]
        probe = {
            role: depth.probed(one.states["forget"], one.states["unseen"])
            for role, one in found.items()
            if min(x.shape[1] for x in one.states.values()) >= 4
            and all(np.isfinite(x).all() for x in one.states.values())
        }
    layers = depth.Layers(lens, probe)
    findings = [depth.lens_finding(layers)]
    measures = []
    if depth_found is None:
        findings.append(judge("depth_score", None, reason=depth.NEEDS_RETRAINED))
    else:
        findings.append(depth_found[0])
        if depth_found[1] is not None:
            text = "Unlearning Depth Score: 0 all still there, 1 gone as far as by retraining"
            models = {"edited": depth_found[1]}
            measures.append(Measure("depth_score", text, BOOTSTRAP, models))
    influences, note = hiding.measures_of({role: one.influence for role, one in found.items()})
    measures += influences
    return Section(
        "depth",
        "Where is it still?",
        "A model computes layer by layer. The lens asks what it would say if it stopped behind "
        "each; the probe, whether the rows to forget can be told from unseen ones inside. What is "
        "only unsaid at the end is still there before it.",
        measures,
        (),
        [note, *([PROBE_NOTE] if probe else [])],
        findings,
        depth.curves_of(layers),
    )


def _comeback(known: Compared, comebacks: comeback.Comebacks | str) -> Section:
    lead = (
        "What is gone cannot be brought back. Some of the rows are taught again and the others "
        "asked about; the model is trained on rows that have nothing to do with it, its weights "
        "are rounded as for a cheaper machine, and the questions are asked in other ways. Training "
        "helps a model that never knew as well, so that is taken off."
    )
    findings, measures, curves, notes = [], [], {}, []
    if isinstance(comebacks, str):
        notes = [f"Not measured: {comebacks}."]
        names = [rule.name for rule in TABLE if rule.section == "comeback"]
        findings = [judge(name, None, reason=comebacks) for name in names]
    else:
        measures = comeback.measures_of(comebacks)
        findings = comeback.findings_of(known, comebacks)
        curves = comeback.curves_of(comebacks)
        notes = [
            "The attacker trains all weights by Adam and takes, at each point, the learning rate "
            "that is best for him. He is judged by the point at which most comes back, which errs "
            "against the edit. A stronger attacker may bring back more."
        ]
    return Section("comeback", "What brings it back?", lead, measures, (), notes, findings, curves)


def _cost(asked: Asked, kept: cost.Kept, settings: Settings) -> Section:
    groups, notes = cost.groups_of(kept, asked.retain, settings.group)
    named = [measure.name for measure in groups]
    neighbours = cost.neighbours_of(kept, asked.retain, settings.group, named)
    notes += _notes_of(asked.retain, "to keep")
    notes.append(
        "If whoever made the edit used these rows to hold the rest in place, it may have cost more "
        "on rows that he did not use."
    )
    return Section(
        "cost",
        "What did it cost?",
        "The rows to keep are put to both models. KL is how far the edited model's words moved "
        "from the original one's, in nats per token: 0 is not at all. Perplexity is how surprised "
        "a model is by the true answers: lower is better.",
        cost.measures_of(kept),
        groups,
        notes,
        cost.findings_of(kept, settings.budget),
        {"neighbours": neighbours} if neighbours else {},
    )


def _notes_of(rows: Rows, what: str) -> list[str]:
    notes = []
    if rows.about.given > len(rows.rows):
        notes.append(
            f"Of {rows.about.given} rows {what}, {len(rows.rows)} were asked about, spread evenly."
        )
    if rows.about.cut_off:
        notes.append(f"{rows.about.cut_off} rows {what} are too long, and were cut off.")
    return notes
