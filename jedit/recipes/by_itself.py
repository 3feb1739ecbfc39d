"""`jedit.forget` in the recipes: a run of it on a task, what it found, and that as a sentence."""

import math
import time
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, PyTree

from jedit.edits import apply_edit
from jedit.recipes.comparison.judge import Judge
from jedit.recipes.comparison.task import Task
from jedit.report import Point
from jedit.report.table import number
from jedit.requests import ForgetInfo, Forgetting, Natural, Unseen, forget

ATTACK_RATE = 3e-4  # Adam's, as in TOFU's attacks
BEYOND, LOST = 1.5, 0.1  # times the budget; a share of a matrix's change; both arbitrary

WHY = {
    "unseen": "the rows cannot be told from unseen ones",
    "budget": "the budget is spent",
    "steps": "all are taken; with unseen rows they stop by themselves",
}
FELL_BACK = (
    "the rows could not be told from unseen ones before the recovery, in which some fell back"
)


class Run(NamedTuple):
    """What a run gave: the edited model's point, its parameters, and how it went."""

    point: Point
    params: PyTree
    sentence: str


def run_by_itself(task: Task, unseen: Unseen, judge: Judge, *, key: Array) -> Run:
    """Forget a task's rows by the defaults, until they cannot be told from unseen ones.

    No retrained model is looked at, and there is nothing to choose.  The point's seconds are those
    of fit, edit and attack, compiling included.
    """
    how = Forgetting(Natural(select=task.select), attack=optax.adam(ATTACK_RATE))
    start = time.perf_counter()
    edit, info = forget(
        task.apply, task.original, task.forget, task.retain, unseen=unseen, key=key, how=how
    )
    params = jax.block_until_ready(apply_edit(task.original, edit))
    seconds = time.perf_counter() - start
    kls = {"predicted_kl": info.predicted_kl, "true_kl": float(info.true_kl[-1])}
    point = judge(params, float(info.steps), seconds, **kls)
    return Run(point, params, how_it_went(found_of(info)))


def found_of(info: ForgetInfo) -> dict[str, Any]:
    """Return what JSON can hold of what was found."""
    found: dict[str, Any] = {
        "stopped": info.stopped,
        "steps": info.steps,
        "is_done": info.is_done.tolist(),
        "p_value": info.p_value.tolist(),
        "path_kl": info.true_kl.tolist(),
        "path_score": info.mean_score.tolist(),
        "predicted_kl": info.predicted_kl,
        "true_kl": float(info.true_kl[-1]),
    }
    if info.comeback is not None:
        found["comeback"] = info.comeback._asdict()
    return found


def how_it_went(found: dict[str, Any]) -> str:
    """Say why steps stopped, which rows are done, and what an attack brings back.

    Of an edit in closed form, which part of it the budget left.
    """
    text, p_value = "", found.get("p_value", [math.nan])[-1]
    if "stopped" in found:
        # The steps stop before the recovery, the last p-value is after it.
        is_told = found["stopped"] == "unseen" and p_value <= Forgetting.significance
        why = FELL_BACK if is_told else WHY[found["stopped"]]
        text = f"{found['steps']} steps in all: {why}."
    elif "share" in found:
        top = number(found["share"])
        text = f"The weights that were set to zero are among the top {top} of each matrix's."
    elif found.get("scale", 1) < 1:
        text = f"{number(found['scale'])} of the whole edit is within the budget."
    if not math.isnan(p_value) and "is_done" in found:
        done = found["is_done"]
        text += f" {sum(done)} of {len(done)} rows are done (p = {number(p_value)})."
    elif not math.isnan(p_value):
        text += f" The rows against unseen ones: p = {number(p_value)}."
    if comeback := found.get("comeback"):
        before, after = (
            f"{number(mean)} [{number(low)}, {number(high)}]"
            for mean, low, high in (comeback["before"], comeback["after"])
        )
        text += (
            " Probability of the rows to forget before and after a sixth of them is taught again: "
            f"{before} and {after}"
        )
        if comeback["unseen"]:
            text += f"; of unseen rows {number(comeback['unseen'][0])}"
        text += "."
    return text.strip()


def cautions(found: dict[str, Any], budget: float | None) -> list[str]:
    """Say what the numbers of an edited folder warn of: results of `forget_in_checkpoint`."""
    texts = []
    if left_out := found.get("ledger", {}).get("rows_left_out"):
        texts.append(
            f"{left_out} rows to keep are what earlier edits of the ledger forgot: left out."
        )
    if found.get("stopped") == "unseen" and not found["steps"]:
        texts.append(
            "The model never knew these rows, as far as the test can tell: nothing was changed."
        )
    if found.get("strength") == 0:
        texts.append(
            "The least edit of this method costs more than the budget: nothing was changed."
        )
    if "unseen" not in found["num_rows"]:
        texts.append(
            "Without --unseen rows it was not tested whether the model knew these rows at all."
        )
    moved = found["after"]["heldout_kl"]
    if budget is not None and moved > BEYOND * budget:
        texts.append(
            f"Held-out rows moved by {number(moved)} nats, more than the budget of "
            f"{number(budget)}, which was kept on other rows: give more rows to keep."
        )
    if found["rounded_away"] > LOST:
        texts.append(
            f"Rounded to the folder's numbers, one matrix loses {found['rounded_away']:.0%} of its "
            "change; what is judged above is what is left of it."
        )
    return texts
