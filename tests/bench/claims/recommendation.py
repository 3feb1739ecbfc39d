"""Claims, on a recommender that forgets a tenth of its users (jedit.recipes.scenes.recommendation):

    1. REGLU: at the forget loss of the retrained model, adapters that begin in the forget outputs'
       directions and are kept off the retain ones cost less retain KL than adapters of the same
       rank that begin at random, by NPO or by gradient difference.
    2. U-CAN: one soft attenuation brings the forget choices' recall@10 down to the retrained
       model's and keeps nine tenths of the other users' NDCG@10.
    3. CURE: at that forget loss, rules for groups of modules cost less retain KL than gradient
       difference on all of them by the same optimizer.

    python -m tests.bench.claims.recommendation [--seeds 3] [--quick]

Each method goes along its path (steps at each of a few rates, scales of the edit, budgets) until
the forget loss has risen to the retrained model's. There its price is read off, between the two
looks on either side, by the root of the KL, which is linear near the untouched model: KL to that
model on held-out users; rankings are those of the look behind. The rate with the least price
counts, for every method alike. What never arrives has no price, and its last look stands apart.
U-CAN's claim is read off its whole edits. A seed that is done is kept in the output folder, and is
not run again with the same settings.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import answers_only, generate_interactions
from jedit.edits import apply_edit
from jedit.methods import CATALOGUE, Directions, Material, cure, kfade, module_effects, reglu, ucan
from jedit.methods.row import ADAM
from jedit.models import with_lora
from jedit.objectives import GA, IHL, NPO, with_retain
from jedit.recipes.comparison.judge import Judge
from jedit.recipes.comparison.trajectories import ascend
from jedit.recipes.progress import ignore
from jedit.recipes.scenes import recommendation as scene
from jedit.training import TrainingMethod
from tests.bench.claims.evidence import interval, kept, parser, shown, shown_ratio, write

RATES = (3e-4, 1e-3, 3e-3)
LOOKS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96)
SCALES = tuple(np.linspace(0.1, 1.0, 10).tolist())
BUDGETS = tuple(np.geomspace(0.01, 1.0, 12).tolist())
STRENGTHS = (8.0, 32.0, 128.0, 512.0, 2048.0)  # of U-CAN's decay
RANK, SCALE = 8, 2.0
KEPT = 0.9  # of the others' NDCG@10, in U-CAN's claim
FEW = 32  # rows of each set on which CURE patches
Path = Iterator[tuple[float, Any]]  # strength and params, by rising strength


class Size(NamedTuple):
    """How large the scene is and how finely it is looked at; `--quick` is another."""

    users: int = 600
    items: int = 150
    length: int = 20
    model: Any = scene.MODEL
    recipe: Any = scene.RECIPE
    rates: tuple[float, ...] = RATES
    looks: tuple[int, ...] = LOOKS
    methods: tuple[str, ...] | None = None  # all


QUICK = Size(60, 20, 8, rates=(1e-3, 3e-3), looks=(4, 8, 16))._replace(
    model=scene.MODEL._replace(width=16, layers=1, heads=2),
    recipe=scene.RECIPE._replace(epochs=(20,), learning_rate=1e-2),
)


class Found(NamedTuple):
    """One scene: what is trained, its sets, its judge, and the moments of its answers."""

    apply: Callable
    original: Any
    retrained: Any
    sets: scene.Sets
    judge: Judge
    moments: tuple


def prepared(seed: int, size: Size) -> Found:
    """Train both models and take the moments."""
    log = generate_interactions(
        seed, num_users=size.users, num_items=size.items, length=size.length
    )
    sets = scene.split(log, "users", seed=seed, max_len=size.model.max_len)
    given = (sets, len(log.items), size.model, size.recipe)
    apply, *models = scene.trained(*given, seed=seed, say=ignore)
    original, retrained = (model.params for model in models)
    task = scene.task_of(sets, apply, original, retrained, size.model)
    task = task._replace(test=None, judged_rows=160)  # of all that is judged two numbers are read
    estimator = kfac(apply, Categorical(), select=scene.SELECT)
    moments = tuple(
        estimate(estimator, original, [answers_only(rows)], key=jax.random.key(seed))
        for rows in (sets.forget, sets.seen)
    )
    return Found(apply, original, retrained, sets, Judge(task, math.inf), moments)


def trained_paths(
    found: Found, method: TrainingMethod, size: Size, seed: int, adapted: Any = None
) -> Iterator[tuple[str, Path]]:
    """A path for each rate; of adapters, with these merged."""
    apply, params, merge = found.apply, found.original, lambda params: params
    if adapted is not None:
        apply, params, merge = adapted.apply, adapted.params, adapted.merge
    runs = ascend(
        method._replace(batch_size=16),
        apply,
        params,
        found.sets.forget,
        found.sets.seen,
        learning_rates=size.rates,
        looks=size.looks,
        key=jax.random.key(100 + seed),
    )
    for rate, run in zip(size.rates, runs, strict=True):
        yield f"{rate:g}", ((steps, merge(now)) for steps, _, now in run)


def paths(found: Found, size: Size, seed: int) -> Iterator[tuple[str, str, Path]]:
    """Every path of every method: its name, its setting, and where it goes."""
    directions = Directions(rank=RANK)
    adapted = functools.partial(
        with_lora,
        found.apply,
        found.original,
        found.sets.forget.inputs,
        rank=RANK,
        key=jax.random.key(200 + seed),
        select=scene.SELECT,
        scale=SCALE,
    )()
    few = (jax.tree.map(lambda x: x[:FEW], rows) for rows in (found.sets.forget, found.sets.seen))
    effects = module_effects(found.apply, found.original, *few)
    start = functools.partial(reglu, found.original, *found.moments, ADAM, directions=directions)
    lora = functools.partial(TrainingMethod, optimizer=ADAM, trainable="^lora/")
    graddiff, npo = with_retain(GA()), with_retain(NPO())
    material = Material(found.apply, found.original, found.sets.forget)
    methods: dict[str, tuple[TrainingMethod, Any]] = {
        "LoRA, NPO": (lora(npo), adapted),
        "LoRA, GradDiff": (lora(graddiff), adapted),
        "LoRA, IHL": (lora(with_retain(IHL())), adapted),
        "REGLU, IHL": (start(), None),
        "REGLU, GradDiff": (start(objective=graddiff), None),
        "REGLU, IHL, not kept off": (start(weight=0.0), None),
        "NPO": (CATALOGUE["NPO"].of(material), None),
        "GradDiff": (CATALOGUE["GradDiff"].of(material), None),
        "CURE": (cure(effects, ADAM), None),
        "CURE, all shared": (cure(effects, ADAM, threshold=1.0), None),
    }
    for name, (method, of) in methods.items():
        if size.methods is not None and name not in size.methods:
            continue
        for setting, path in trained_paths(found, method, size, seed, of):
            yield name, setting, path
    for strength in STRENGTHS:
        edit, _ = ucan(found.original, *found.moments, strength=strength)
        scaled = ((scale, apply_edit(found.original, edit, scale)) for scale in SCALES)
        yield "U-CAN", f"{strength:g}", scaled
    sets = (found.sets.forget, jax.tree.map(lambda x: x[:64], found.sets.seen))
    run = functools.partial(kfade, found.apply, found.original, found.moments[1], *sets)
    spent = (
        (budget, apply_edit(found.original, run(damping=0.1, budget=budget)[0]))
        for budget in BUDGETS
    )
    yield "K-FADE", "", spent


def price(path: Path, judge: Callable, rank: Callable, target: float) -> dict[str, Any]:
    """What a path costs where its forget loss reaches a target; and how far it comes else."""
    before, last = judge(None), None
    for strength, params in path:
        now = judge(params)
        if not np.isfinite([now.forget_nll, now.heldout_kl]).all():
            break
        if now.forget_nll >= target:
            share = (target - before.forget_nll) / (now.forget_nll - before.forget_nll)
            low, high = (math.sqrt(max(point.heldout_kl, 0)) for point in (before, now))
            kl = (low + share * (high - low)) ** 2
            return {"reached": True, "kl": kl, "strength": strength, **rank(params)}
        before, last = now, (strength, params, now)
    if last is None:
        return {"reached": False}
    strength, params, now = last
    found = {"reached": False, "strength": strength, "forget_nll": now.forget_nll}
    return {**found, "kl": now.heldout_kl, **rank(params)}


def one_seed(seed: int, size: Size) -> dict[str, Any]:
    """Every method's cheapest way to the retrained model's forget loss."""
    found = prepared(seed, size)

    def judge(params: Any) -> Any:
        return found.judge(found.original if params is None else params, 0.0, 0.0)

    def rank(params: Any) -> dict[str, float]:
        return scene.rankings(found.apply, params, found.sets)

    target = judge(found.retrained).forget_nll
    best: dict[str, dict[str, Any]] = {}
    for name, setting, path in paths(found, size, seed):
        new = {"setting": setting, **price(path, judge, rank, target)}
        old = best.get(name)
        if old is None or _order(new) < _order(old):
            best[name] = new
    models = {}
    for name, params in (("untouched", found.original), ("retrained", found.retrained)):
        point = judge(params)
        models[name] = {"forget_nll": point.forget_nll, "kl": point.heldout_kl, **rank(params)}
    whole = {}
    for strength in STRENGTHS:
        edit, _ = ucan(found.original, *found.moments, strength=strength)
        params = apply_edit(found.original, edit)
        point = judge(params)
        whole[f"{strength:g}"] = {"kl": point.heldout_kl, **rank(params)}
    return {"seed": seed, "target": target, "models": models, "methods": best, "ucan": whole}


def _order(one: dict[str, Any]) -> tuple[bool, float]:
    """Paths that arrive come first, by their price; of others that which came farthest."""
    is_far = one.get("reached", False)
    return not is_far, one["kl"] if is_far else -one.get("forget_nll", -math.inf)


def verdicts(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Each claim's numbers, over the seeds; a method that never arrives has no price."""

    def ratio(one: str, other: str) -> dict[str, float] | None:
        if not {one, other} <= set(seeds[0]["methods"]):
            return None
        pairs = [(s["methods"][one], s["methods"][other]) for s in seeds]
        logs = [math.log(a["kl"] / b["kl"]) for a, b in pairs if a["reached"] and b["reached"]]
        return {**interval(logs), "pairs": len(logs)} if len(logs) > 1 else None

    reglu_pairs = (
        ("REGLU, IHL", "LoRA, NPO"),
        ("REGLU, GradDiff", "LoRA, NPO"),
        ("REGLU, GradDiff", "LoRA, GradDiff"),
        ("REGLU, IHL", "LoRA, IHL"),
        ("REGLU, IHL", "REGLU, IHL, not kept off"),
    )
    cure_pairs = (("CURE", "GradDiff"), ("CURE", "CURE, all shared"), ("CURE", "NPO"))
    others = (("K-FADE", "CURE"), ("REGLU, GradDiff", "GradDiff"))
    logs = {f"{a} / {b}": ratio(a, b) for a, b in (*reglu_pairs, *cure_pairs, *others)}
    methods = {}
    for name in seeds[0]["methods"]:
        rows = [(s["methods"][name], s["models"]["untouched"]) for s in seeds]
        arrived = [(one, untouched) for one, untouched in rows if one["reached"]]
        short = [(one, untouched) for one, untouched in rows if not one["reached"] and "kl" in one]
        methods[name] = {
            "arrived": len(arrived),
            "at_target": _summary(arrived),
            "last_look_of_others": _summary(short),
        }
    return {"log_ratios": logs, "methods": methods, "ucan": [_attenuated(s) for s in seeds]}


def _summary(rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any] | None:
    """Means over those that arrived, or over those that did not."""
    if not rows:
        return None
    shares = [one["retain_next_ndcg"] / untouched["retain_next_ndcg"] for one, untouched in rows]
    values = {"kl": [one["kl"] for one, _ in rows], "ndcg_kept": shares}
    values["forget_recall"] = [one["forget_recall"] for one, _ in rows]
    is_many = len(rows) > 1
    return {
        name: interval(x) if is_many else {"mean": x[0], "half_width": math.nan}
        for name, x in values.items()
    }


def _attenuated(seed: dict[str, Any]) -> dict[str, Any]:
    """U-CAN's claim in one seed: of whole edits as low in recall as the retrained, the gentlest."""
    models, least = seed["models"], seed["models"]["retrained"]["forget_recall"]
    rows = [
        {
            "strength": strength,
            "forget_recall": one["forget_recall"],
            "ndcg_kept": one["retain_next_ndcg"] / models["untouched"]["retain_next_ndcg"],
            "kl": one["kl"],
        }
        for strength, one in seed["ucan"].items()
    ]
    low = [row for row in rows if row["forget_recall"] <= least]
    best = max(low, key=lambda row: row["ndcg_kept"]) if low else None
    holds = best is not None and best["ndcg_kept"] >= KEPT
    return {"holds": holds, "retrained_recall": least, "best": best, "all": rows}


def table(found: dict[str, Any]) -> str:
    """The methods' lines in Markdown."""
    lines = ["| method | seeds | KL | NDCG@10 kept | forget recall@10 |", "| --- " * 5 + "|"]
    for name, row in found["methods"].items():
        for label, part in (("at_target", ""), ("last_look_of_others", ", last look")):
            one = row[label]
            if one is None:
                continue
            count = row["arrived"] if not part else len(found["ucan"]) - row["arrived"]
            numbers = " | ".join(shown(one[n]) for n in ("kl", "ndcg_kept", "forget_recall"))
            lines.append(f"| {name}{part} | {count} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Run the seeds that are not there yet, and write what came out."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, in a minute")
    given = options.parse_args()
    size = QUICK if given.quick else Size()
    seeds = []
    settings = {
        "size": str(size),
        "scales": SCALES,
        "budgets": BUDGETS,
        "strengths": STRENGTHS,
        "rank": RANK,
        "scale": SCALE,
        "patched": FEW,
    }
    for seed in range(given.seeds):
        path = given.out / f"recommendation{'-quick' * given.quick}-{seed}.json"
        seeds.append(kept(path, settings, lambda seed=seed: one_seed(seed, size)))
        print(f"seed {seed} is done", flush=True)
    found = verdicts(seeds)
    print(table(found))
    for name, logs in found["log_ratios"].items():
        print(f"{name}: {'-' if logs is None else shown_ratio(logs)}")
    for seed, one in enumerate(found["ucan"]):
        print(f"U-CAN, seed {seed}: {one}")
    write("recommendation", given.out, {**found, "seeds": seeds, "size": str(size)})


if __name__ == "__main__":
    main()
