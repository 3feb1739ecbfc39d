"""What it cost: how far the rows to keep moved, whether they are still answered, group by group."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jedit.data import DataError
from jedit.recipes.audit.estimates import BOOTSTRAP, bootstrapped, mean_of, ratio_of
from jedit.recipes.audit.forgotten import Said
from jedit.recipes.audit.rows import Rows
from jedit.recipes.audit.rules import judge
from jedit.recipes.neighbours import domains_of
from jedit.report.audit_results import Estimate, Finding, Measure
from jedit.report.domains import Domain
from jedit.report.table import number
from jedit.report.verdict import wilson

Values = Float[np.ndarray, " _"]  # sets of rows have sizes of their own
LEAST_ROUGE = 0.05  # of the original model, below which its rows are not answered at all; arbitrary
MOST_GROUPS = 20  # shown, the dearest ones


class Kept(NamedTuple):
    """What the models hold of the rows to keep.

    Attributes:
        said: what they say, by role.
        kl: KL(original || edited) of each row, nats per token of its answer.
        retrained_kl: the same of the retrained model, if there is one.
        near: by group how near it is to the rows to forget; the reason why that is not known, or
            None where no groups are asked for.
    """

    said: dict[str, Said]
    kl: Values
    retrained_kl: Values | None
    near: Mapping[str, float] | str | None = None


def measures_of(kept: Kept) -> list[Measure]:
    """Return the measures of the rows to keep by model."""
    kls = {"edited": mean_of(kept.kl, is_share=False)}
    if kept.retrained_kl is not None:
        kls["retrained"] = mean_of(kept.retrained_kl, is_share=False)
    measures = [
        Measure("kl", "KL to the original model, nats per token", BOOTSTRAP, kls),
        Measure(
            "perplexity",
            "perplexity of the answers",
            BOOTSTRAP,
            {role: perplexity_of(said.loss) for role, said in kept.said.items()},
        ),
    ]
    texts = {
        "probability": "probability of the answers",
        "rouge_greedy": "ROUGE-L recall of the model's likeliest answer",
        "exact_memorization": "share of tokens that come by themselves",
        "refused": "share of questions that are refused, by a list of phrases",
    }
    for name, text in texts.items():
        found = {
            role: mean_of(said.values[name])
            for role, said in kept.said.items()
            if name in said.values
        }
        if found:
            measures.append(Measure(f"retain_{name}", text, BOOTSTRAP, found))
    return measures


def perplexity_of(loss: Values) -> Estimate:
    """Return exp of the mean loss per token, every row alike."""
    return bootstrapped(lambda x: np.exp(x[0].mean(axis=-1)), [loss[None]])


def check_group(asked: Rows, field: str) -> None:
    """Refuse a field that no row has.

    Raises:
        DataError: no row has the field.
    """
    names = sorted({name for row in asked.rows for name in row.fields})
    if field not in names:
        raise DataError(
            f'--group: no row to keep has the field "{field}"; there are '
            f"{', '.join(names) or 'none'}."
        )


def labels_of(asked: Rows, field: str) -> list[str]:
    """Return the name of each row's group."""
    labels = [row.fields.get(field) for row in asked.rows]
    return ["(none)" if label is None else str(label) for label in labels]


def groups_of(kept: Kept, asked: Rows, field: str | None) -> tuple[list[Measure], list[str]]:
    """Return KL, nearness, perplexities and refusals by group, the dearest first, and notes."""
    if field is None:
        return [], []
    places: dict[str, list[int]] = {}
    for i, label in enumerate(labels_of(asked, field)):
        places.setdefault(label, []).append(i)
    near = {} if kept.near is None or isinstance(kept.near, str) else kept.near
    order = sorted(places, key=lambda name: -float(kept.kl[places[name]].mean()))
    measures = []
    for name in order[:MOST_GROUPS]:
        chosen = np.asarray(places[name])
        found = {"kl": mean_of(kept.kl[chosen], is_share=False)}
        if name in near:
            found["near"] = Estimate(near[name], math.nan, math.nan, len(chosen))
        for role in ("base", "edited"):
            found[role] = perplexity_of(kept.said[role].loss[chosen])
            if (refused := kept.said[role].values.get("refused")) is not None:
                found[f"refused_{role}"] = mean_of(refused[chosen])
        measures.append(Measure(name, f"{field}: {name}", BOOTSTRAP, found))
    most = number(measures[0].models["kl"].value)
    notes = [
        f"Of {len(places)} groups by {field}, {order[0]} paid most: {most} nats per token, on "
        f"{len(places[order[0]])} rows."
    ]
    if len(places) > MOST_GROUPS:
        notes.append(f"The {MOST_GROUPS} that paid most are shown.")
    if near:
        notes.append(
            "Near says how like the rows to forget a group looks to the original model where a "
            "question ends: a cosine around the mean of all groups. Groups that ask in other words "
            "than one another differ by that as well."
        )
    elif isinstance(kept.near, str):
        notes.append(f"How near the groups are to the rows to forget is not known: {kept.near}.")
    return measures, notes


def neighbours_of(
    kept: Kept, asked: Rows, field: str | None, names: Sequence[str]
) -> tuple[Domain, ...]:
    """Return what became of the named groups beside their nearness; empty where it is not known."""
    if field is None or kept.near is None or isinstance(kept.near, str):
        return ()
    labels = labels_of(asked, field)
    chosen = [i for i, label in enumerate(labels) if label in names]
    values = [kept.said[role].values for role in ("base", "edited")]
    fields = {"refusal": "refused", "probability": "probability", "rouge": "rouge_greedy"}
    scores = {k: [said[name][chosen] for said in values] for k, name in fields.items()}
    return domains_of(scores, [labels[i] for i in chosen], kept.near)


def findings_of(kept: Kept, budget: float) -> list[Finding]:
    """Judge by the rules of this section."""
    findings = [judge("retain_kl", mean_of(kept.kl, is_share=False), limit=budget)]
    before, after = (kept.said[role].values.get("rouge_greedy") for role in ("base", "edited"))
    if before is None or after is None:
        return findings
    if not before.mean() > LEAST_ROUGE:
        reason = f"the original model's own answers have a ROUGE-L of {number(before.mean())} only"
        return [*findings, judge("retain_rouge", None, reason=reason)]
    ratio = ratio_of(after, before)
    if np.ptp(after - before) == 0 and math.isfinite(ratio.value):
        # Not one row changed; how many others would is a share of none among so many.
        reach = wilson(0.0, ratio.num_rows).high
        ratio = ratio._replace(low=ratio.value - reach, high=ratio.value + reach)
    return [*findings, judge("retain_rouge", ratio)]
