"""An audit from end to end: two folders or three, three sets of rows, five questions."""

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jedit import metrics
from jedit.recipes.audit import comeback, cost, depth, forgotten, hiding, membership, nearby
from jedit.recipes.audit.folders import Models, difference, hashed, open_models, same_weights
from jedit.recipes.audit.parts import FAILURES, Asked, OfModel, Settings, described
from jedit.recipes.audit.rows import Rows, RowSets, check_sets, encode
from jedit.recipes.audit.rules import overall
from jedit.recipes.audit.sections import NO_ATTACKS, DepthFound, sections_of
from jedit.recipes.environment import machine, versions
from jedit.recipes.progress import Say
from jedit.report.audit_results import Audit

SAME = (
    "The two folders have weight files of the same bytes: nothing was edited, and what follows is "
    "the original model compared with itself."
)
EQUAL = "The edited weights are the original ones: nothing was edited."


def audit(
    folders: Mapping[str, Path],
    sets: RowSets,
    settings: Settings,
    *,
    tokenizer: Path | None = None,
    salt: bytes,
    command: str = "",
    say: Say,
) -> Audit:
    """Audit an edited folder beside the one that it came from.

    Parameters of two models are held at a time, of three for the depth score alone, and the
    optimizer's state of one while it is attacked.

    Args:
        folders: paths by role: "base", "edited" and perhaps "retrained".
        sets: the rows.
        settings: how the audit is made.
        tokenizer: folder of the tokenizer; None: the base's.
        salt: salt of the rows' hashes.
        command: the command line, for the report.
        say: a watcher, told of each stage.

    Raises:
        ValueError: folders that do not hold one model, rows that do not fit it, sets that share
            rows, or a group that no row has.
    """
    start, date = time.perf_counter(), datetime.now().astimezone().isoformat(timespec="seconds")
    check_sets(sets)
    say(f"reading {folders['base']}")
    models = open_models(folders, tokenizer, settings.max_len, settings.batch_size)
    given = {"most": settings.most, "salt": salt}
    asked = Asked(
        encode(models.model, "forget", sets.forget, **given),
        encode(models.model, "retain", sets.retain, **given),
        encode(models.model, "unseen", sets.unseen, **given) if sets.unseen else None,
    )
    if settings.group is not None:  # refused now, not after the work
        cost.check_group(asked.retain, settings.group)
    say("hashing the folders")
    hashes = {role: hashed(role, folder, models.description) for role, folder in folders.items()}
    key, attack_key = jax.random.split(jax.random.key(settings.seed))
    found, kept, apart, depth_found = _measured(models, asked, settings.group, key=key, say=say)
    comebacks = NO_ATTACKS
    if settings.attacks:
        comebacks = _attacked_or_why(models, asked, settings, key=attack_key, say=say)
    say("judging")
    sections = sections_of(asked, found, kept, depth_found, comebacks, settings)
    notes = []
    if same_weights(hashes["base"], hashes["edited"]):
        notes.append(SAME)
    elif apart[0] == 0:
        notes.append(EQUAL)
    findings = [finding for section in sections for finding in section.findings]
    return Audit(
        overall=overall(findings, notes),
        sections=sections,
        folders=list(hashes.values()),
        difference=apart[1],
        rows=[part.about for part in asked if part is not None],
        settings=_told(settings, tokenizer),
        command=command,
        date=date,
        seconds=time.perf_counter() - start,
        versions=versions(),
        machine=machine(),
        per_row=_per_row(found, kept),
    )


def _measured(
    models: Models, asked: Asked, group: str | None, *, key: Array, say: Say
) -> tuple[dict[str, OfModel], cost.Kept, tuple[float, str], DepthFound | None]:
    """Measure each model, and what takes two or three of them together."""
    model = models.model
    found: dict[str, OfModel] = {}
    reference = None
    depth_found = retrained_kl = None
    base = models.load("base")
    if "retrained" in models.folders:
        say(f"reading and measuring {models.folders['retrained']}")
        retrained = models.load("retrained")
        found["retrained"] = _of_model(model, retrained, asked, None, key=key)
        reference = found["retrained"].said
        retrained_kl = metrics.output_kl_per_row(model.apply, base, retrained, asked.retain.answers)
        say("comparing the layers of all three models")
        edited = models.load("edited")
        depth_found = depth.depth_finding(model, base, edited, retrained, asked.forget)
        del retrained, edited
    say(f"measuring {models.folders['base']}")
    found["base"] = _of_model(model, base, asked, reference, key=key)
    near = None
    if group is not None:
        near = nearby.nearness_of(model, base, asked.forget, asked.retain, group)
    say(f"reading and measuring {models.folders['edited']}")
    edited = models.load("edited")
    kl = metrics.output_kl_per_row(model.apply, base, edited, asked.retain.answers)
    apart = difference(base, edited)
    del base
    found["edited"] = _of_model(model, edited, asked, reference, key=key)
    kept = cost.Kept(
        {role: one.said["retain"] for role, one in found.items()},
        np.nan_to_num(kl, nan=np.inf, posinf=np.inf),
        retrained_kl,
        near,
    )
    return found, kept, apart, depth_found


def _of_model(
    model: Any,
    params: PyTree,
    asked: Asked,
    reference: dict[str, forgotten.Said] | None,
    *,
    key: Array,
) -> OfModel:
    sets = {name: part for name, part in asked._asdict().items() if part is not None}
    # The same draws for every model.
    said = {
        name: forgotten.said_of(
            model,
            params,
            part,
            key=jax.random.clone(key),
            draws=0 if name == "retain" else forgotten.NUM_DRAWS,
        )
        for name, part in sets.items()
    }
    private = {name: part for name, part in sets.items() if name != "retain"}
    seen = None
    if asked.unseen is not None:
        scores = {
            name: membership.scores_of(
                model,
                params,
                part,
                said[name].loss,
                None if reference is None else reference[name].loss,
            )
            for name, part in private.items()
        }
        seen = membership.Seen(scores["forget"], scores["unseen"])
    lens = {name: depth.lens_probabilities(model, params, part) for name, part in private.items()}
    states = {}
    if asked.unseen is not None:
        states = {name: depth.states_of(model, params, part) for name, part in private.items()}
    ratios = membership.truth_ratios_of(model, params, asked.forget)
    influence = hiding.influence_of(model, params, asked.forget)
    return OfModel(said, seen, ratios, lens, states, influence)


def _attacked_or_why(
    models: Models, asked: Asked, settings: Settings, *, key: Array, say: Say
) -> comeback.Comebacks | str:
    """Attack, or return why that failed: what was measured before is not to be lost by it."""
    try:
        return _attacked(models, asked, settings, key=key, say=say)
    except FAILURES as error:
        return f"the attacks failed: {described(error)}"


def _attacked(
    models: Models, asked: Asked, settings: Settings, *, key: Array, say: Say
) -> comeback.Comebacks:
    """Attack the edited model, and what stands for one that never knew, each with the same.

    Of sets that are compared as many rows are taught, and by one training on others all are asked
    about.
    """
    model, spending = models.model, settings.spending
    # The shortest, which leaves most room for the questions behind it.
    example = min(asked.retain.rows, key=lambda row: len(row.question) + len(row.answer))
    found = comeback.Comebacks({}, {}, {})

    counts = comeback.counts_of(spending, len(asked.forget.rows))
    if asked.unseen is not None and "retrained" not in models.folders:
        # They are the control. Too few to teach any are none, and the others then stand alone.
        fewer = min(len(asked.forget.rows), len(asked.unseen.rows))
        counts = comeback.counts_of(spending, fewer) or counts

    def attack(params: PyTree, sets: dict[str, Rows]) -> None:
        for role, rows in sets.items():
            say(f"attacking the {_name(role)}: rounding, prefixes, other words")
            found.attacked[role] = comeback.attacked(model, params, rows, example)
            say(f"attacking the {_name(role)}: teaching rows again")
            found.relearned[role] = comeback.relearned(
                model, params, rows, spending, key=jax.random.clone(key), counts=counts
            )
        say(f"attacking the {_name(next(iter(sets)))}: training on rows to keep")
        benign = comeback.retrained_on_others(
            model, params, sets, asked.retain, spending, key=jax.random.clone(key)
        )
        found.benign.update(benign)

    unseen = {} if asked.unseen is None else {"unseen": asked.unseen}
    attack(models.load("edited"), {"edited": asked.forget, **unseen})
    if "retrained" in models.folders:
        attack(models.load("retrained"), {"retrained": asked.forget})
    return found


def _name(role: str) -> str:
    return {"unseen": "edited model, on unseen rows"}.get(role, f"{role} model")


def _told(settings: Settings, tokenizer: Path | None) -> dict[str, Any]:
    told = settings._asdict() | {"spending": settings.spending._asdict()}
    return {**told, "tokenizer": None if tokenizer is None else str(tokenizer)}


def _per_row(found: dict[str, OfModel], kept: cost.Kept) -> dict[str, dict[str, Any]]:
    sets = ("forget", "retain", "unseen")
    losses = {
        f"{name}_loss": {role: one.said[name].loss for role, one in found.items()}
        for name in sets
        if name in found["base"].said
    }
    return {**losses, "retain_kl": {"edited": kept.kl}}
