"""Claims: what RULE, FIT and MELU's sampling do on invented authors.

    python -m tests.bench.claims.refusal [--seeds 3] [--only rule fit melu] [--quick]

A GPT of a quarter of a million parameters knows 30 invented authors by heart, ten rows each; three
are to be forgotten.  70% of the other rows are seen by the methods, the rest judges them.

    rule    RULE, taught on 12% of the forget questions and 8% of the retain questions, refuses more
            of the questions it was not taught, and of these in other words, than IdkDPO of as many
            updates, at RULE's two rates, on the same forget rows, and no more of the held-out
            retain questions. The judge is the list of phrases that RULE is rewarded by, so that
            what is left of the answers (ROUGE) is shown beside it.
    fit     Three requests, an author each, and the same three in other words: FIT ends nearer to
            the retrained model than NPO with the retain loss (harmonic mean of F.D. and R.U.), and
            its filter leaves the repeated requests out.
    melu    With a neighbour and a general row beside each forget row, by its entity, the held-out
            rows of neighbours (authors of a forgotten one's region, who share surnames and towns)
            are kept better than with as many rows drawn uniformly or in turn, where forgetting is
            the same.

Each seed's numbers are kept in `out`, and a second run takes them from there.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from jedit import metrics
from jedit.core.batch import Batch
from jedit.data import (
    QaRow,
    encode_rows,
    neighbor_sets,
    pair_by_entity,
    pair_in_turn,
    pair_uniformly,
)
from jedit.data.invented.author_values import REGIONS
from jedit.edits import apply_edit
from jedit.methods import RuleStages, distinct_requests, fit_unlearning, graded_rows, rule
from jedit.methods.row import Pace
from jedit.models import cached_decode, gpt_stepper
from jedit.objectives import DPO, GA, NPO, Objective, with_retain
from jedit.recipes.dialogue import Speaker, dialogue, refusal_to
from jedit.recipes.scenes.authors import MODEL
from jedit.recipes.scenes.question_answer import ANSWER_TOKENS
from jedit.recipes.tokenization import OwnWords
from jedit.requests.unseen import spread
from jedit.tracing import Entering
from jedit.training import LoopState, TrainingMethod, Watch, unlearn
from tests.bench.claims.evidence import interval, parser, shown, write
from tests.bench.claims.scenes import Authors, authors_model

FORGOTTEN = 3
BATCH = 10
SITE = f"blocks/{MODEL.layers - 1}/attn/query/kernel"
STEPPER = gpt_stepper(num_layers=MODEL.layers, num_heads=MODEL.heads)


class Size(NamedTuple):
    """How long things last: `FULL`, or `QUICK` for a test."""

    authors: int
    epochs: int
    tuning_steps: int
    draws: int
    steps: int
    dpo_rates: tuple[float, ...] = (3e-4, 1e-3)
    fit_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)


FULL = Size(authors=30, epochs=25, tuning_steps=60, draws=20, steps=60)
QUICK = Size(
    authors=6, epochs=12, tuning_steps=2, draws=1, steps=4, dpo_rates=(3e-4,), fit_rates=(3e-4,)
)
RATES = {Pace.BOUNDED: (1e-3, 3e-4)}
RATE = 3e-4


class Scene:
    """One seed's authors, its model, and what it is asked."""

    def __init__(self, seed: int, size: Size):
        self.seed, self.size = seed, size
        made: Authors = authors_model(seed, epochs=size.epochs, num_authors=size.authors)
        self.made, self.apply = made, made.apply
        self.words = OwnWords(made.tokenizer)
        self.forget, self.seen, self.heldout = ([made.rows[i] for i in part] for part in made.parts)
        self.params = made.fit(np.arange(len(made.rows)))
        self.key = jax.random.fold_in(jax.random.key(seed), 7)

    @functools.cached_property
    def retrained(self) -> PyTree:
        """The model that never saw the forget rows."""
        return self.made.fit(np.sort(np.concatenate(self.made.parts[1:])))

    def encode(self, rows: Sequence[QaRow | tuple[str, str]]) -> Batch:
        """Rows of one width."""
        return encode_rows(self.made.tokenizer, rows, MODEL.max_len, truncate=True)

    def answers(self, params: PyTree, rows: Sequence[QaRow]) -> list[str]:
        """Greedy answers to the rows' questions."""
        prompts = self.words.prompts([(row.question, row.answer) for row in rows])
        steps = min(ANSWER_TOKENS, MODEL.max_len + 1 - prompts.tokens.shape[1])
        tokens = cached_decode(
            STEPPER, params, prompts.tokens, steps, prompt_lengths=prompts.lengths
        )
        return self.words.answers(np.asarray(tokens))

    def train(
        self, objective: Objective, rate: float, forget: Any, *, steps: int, **more: Any
    ) -> PyTree:
        """Lower an objective by Adam against the seen rows."""
        method = TrainingMethod(objective, optax.adam(rate), batch_size=BATCH)._replace(**more)
        given = (method, self.apply, self.params, forget, self.encode(self.seen))
        return unlearn(*given, steps=steps, key=self.key)[0]

    def loss(self, params: PyTree, rows: Sequence[QaRow]) -> float:
        """Mean NLL of the true answers, nats per token."""
        return float(metrics.nll(self.apply, params, self.encode(rows)))

    def scores(self, params: PyTree, rows: Sequence[QaRow]) -> tuple[float, float, float]:
        """Probability, ROUGE and accuracy: what FIT's scores are made of."""
        batch = self.encode(rows)
        losses = metrics.answer_nll_per_row(self.apply, params, batch)
        recall = metrics.rouge([r.answer for r in rows], self.answers(params, rows)).rougeL_recall
        hit = metrics.accuracy(self.apply, params, batch)
        return float(np.exp(-losses).mean()), float(recall.mean()), float(hit)


def in_other_words(rows: Sequence[QaRow]) -> list[QaRow]:
    """The rows, asked in other words."""
    return [row._replace(question=row.paraphrased_question or row.question) for row in rows]


def of_rule(scene: Scene) -> dict[str, dict[str, float]]:
    """RULE, its first stage alone, and IdkDPO on the same rows and on all."""
    size, forget = scene.size, scene.forget
    speaker = Speaker(STEPPER, scene.words, scene.encode, ANSWER_TOKENS)
    made = dialogue(speaker, forget, scene.seen, rates=RATES)
    taught = list(spread(len(forget), max(1, round(0.12 * len(forget)))))
    away = [row for i, row in enumerate(forget) if i not in taught]

    def refusals(rows: Sequence[QaRow]) -> tuple[Batch, Batch]:
        texts = [(r.question, refusal_to(r, i)) for i, r in enumerate(rows)]
        return scene.encode(rows), scene.encode(texts)

    models = {"untouched": scene.params}
    for name, draws in (("rejection tuning", 0), ("RULE", size.draws)):
        stages = RuleStages(size.tuning_steps, draws)
        edit, _ = rule(scene.apply, scene.params, made, key=scene.key, stages=stages)
        models[name] = apply_edit(scene.params, edit)
    few = [forget[i] for i in taught]
    for rate in size.dpo_rates:
        for name, rows in (("same rows", few), ("all rows", forget)):
            # As many updates as RULE's two stages make.
            updates = size.tuning_steps + RuleStages.updates * size.draws
            models[f"IdkDPO, {name}, {rate:g}"] = scene.train(
                with_retain(DPO()), rate, refusals(rows), steps=updates
            )
    return {name: judged(scene, params, away) for name, params in models.items()}


def judged(scene: Scene, params: PyTree, away: Sequence[QaRow]) -> dict[str, float]:
    """Refusals by set, what is left of the kept answers, and how natural the answers are."""
    found: dict[str, float] = {}
    sets = {
        "untaught": away,
        "paraphrased": in_other_words(away),
        "kept": scene.heldout,
    }
    for name, rows in sets.items():
        texts = scene.answers(params, rows)
        found[f"{name} refused"] = float(metrics.refuses(texts).mean())
        if name == "kept":
            found["kept ROUGE"] = float(
                metrics.rouge([r.answer for r in rows], texts).rougeL_recall.mean()
            )
        if name == "paraphrased":
            pairs = [(r.question, text or ".") for r, text in zip(rows, texts, strict=True)]
            nll = metrics.answer_nll_per_row(scene.apply, scene.params, scene.encode(pairs))
            found["nats under the original"] = float(np.mean(nll))
            found["n-gram entropy"] = float(metrics.ngram_entropy(texts).mean())
            recall = metrics.rouge([r.answer for r in rows], texts).rougeL_recall
            found["forget ROUGE"] = float(recall.mean())
    return found


def of_fit(scene: Scene) -> dict[str, dict[str, float]]:
    """Six requests, of which three repeat the others, by FIT and by NPO with the retain loss."""
    size, count = scene.size, len(scene.forget) // FORGOTTEN
    requests = [scene.forget[count * i : count * (i + 1)] for i in range(FORGOTTEN)]
    requests += [in_other_words(rows) for rows in requests]
    batches = [scene.encode(rows) for rows in requests]
    hidden, vectors = Entering(SITE), []
    retain = scene.encode(scene.seen)
    for batch in (*batches, retain):
        states = np.asarray(hidden(scene.apply, scene.params, batch.inputs))
        valid = np.asarray(batch.valid)[..., None]
        vectors.append((states * valid).sum((0, 1)) / valid.sum())
    # What all questions have in common is no likeness; later requests are not known.
    centred = np.stack(vectors[:-1]) - vectors[-1]
    losses = np.array([scene.loss(scene.params, rows) for rows in requests])
    is_new = distinct_requests(centred, losses, similarity=0.9, tolerance=1.0)
    found = {}
    for name, new in (
        ("filter", is_new),
        ("filter at its defaults", distinct_requests(centred, losses)),
    ):
        found[name] = {"new kept": new[:3].mean(), "repeats left out": 1 - new[3:].mean()}

    def stream(make: Callable[[PyTree, Batch], tuple[TrainingMethod, Any]], which) -> PyTree:
        params = scene.params
        for i in which:
            method, rows = make(params, batches[i])
            key = jax.random.fold_in(scene.key, i)
            steps = max(1, size.steps // 3)
            params, _ = unlearn(method, scene.apply, params, rows, retain, steps=steps, key=key)
        return params

    adams = {rate: optax.adam(rate) for rate in {RATE, *size.fit_rates}}

    def fit(
        params: PyTree, batch: Batch, layers: int = 8, rate: float = RATE
    ) -> tuple[TrainingMethod, Any]:
        method = fit_unlearning(scene.apply, params, batch, adams[rate], layers=layers)
        return method._replace(batch_size=BATCH), graded_rows(
            scene.apply, params, batch, key=scene.key
        )

    def npo(params: PyTree, batch: Batch, rate: float = RATE) -> tuple[TrainingMethod, Any]:
        del params
        return TrainingMethod(with_retain(NPO()), adams[rate], batch_size=BATCH), batch

    everything = range(len(batches))
    new = np.flatnonzero(is_new)
    models = {
        "untouched": scene.params,
        "FIT of one layer": stream(functools.partial(fit, layers=1), new),
        "FIT without its filter": stream(fit, everything),
        **{
            f"{name}, {rate:g}": stream(functools.partial(make, rate=rate), which)
            for rate in size.fit_rates
            for name, make, which in (
                ("FIT", fit, new),
                ("NPO", npo, everything),
                ("NPO, the three", npo, range(FORGOTTEN)),
            )
        },
    }
    theirs = [scene.scores(scene.retrained, rows) for rows in (scene.forget, scene.heldout)]
    for name, params in models.items():
        mine = [scene.scores(params, rows) for rows in (scene.forget, scene.heldout)]
        degree = metrics.fit_forget_degree(mine[0], theirs[0])
        utility = metrics.fit_retain_utility(mine[1], theirs[1])
        mean = 2 * degree * utility / max(degree + utility, 1e-12)
        found[name] = {"F.D.": degree, "R.U.": utility, "harmonic mean": mean}
    return found


def region_of(author: str) -> int:
    """Return the number of the region that an invented author's surname is of."""
    ends = [tuple(f" {surname}" for surname in region[2]) for region in REGIONS]
    return next(i for i, surnames in enumerate(ends) if author.endswith(surnames))


def _about(row: QaRow) -> dict[str, str]:
    author = str(row.fields["author"])
    return {"entity": author, "region": str(region_of(author))}


def of_melu(scene: Scene) -> dict[str, dict[str, float]]:
    """Three samplings of retain rows, two beside each forget row, at the same forgetting."""
    known = {str(row.fields["author"]) for row in scene.made.rows}
    gone = list(dict.fromkeys(str(row.fields["author"]) for row in scene.forget))
    near = {name: {o for o in known if region_of(o) == region_of(name)} for name in gone}
    near = {name: others - set(gone) for name, others in near.items()}
    is_near = lambda row: any(row.fields["author"] in found for found in near.values())  # noqa: E731
    sets = neighbor_sets(*([_about(row) for row in rows] for rows in (scene.forget, scene.seen)))
    entities = [str(row.fields["author"]) for row in scene.forget]
    n, m = len(entities), len(scene.seen)
    uniform_key = jax.random.fold_in(scene.key, 1)

    def uniform(*, epoch: int) -> np.ndarray:
        return pair_uniformly(2 * n, m, epoch=epoch, key=uniform_key).reshape(n, 2)

    def in_turn(*, epoch: int) -> np.ndarray:
        return pair_in_turn(2 * n, m, epoch=epoch).reshape(n, 2)

    samplings = {
        "uniform (1:1)": uniform,
        "in turn (cyclic)": in_turn,
        "by entity (MELU)": functools.partial(pair_by_entity, entities, sets),
    }
    parts = {
        "neighbours": [row for row in scene.heldout if is_near(row)],
        "others": [row for row in scene.heldout if not is_near(row)],
    }
    found: dict[str, dict[str, float]] = {}
    for name, pairing in samplings.items():
        looks: list[tuple[float, ...]] = []

        def look(state: LoopState, _: Any, looks=looks) -> None:
            kept = [scene.loss(state.params, rows) for rows in parts.values() if rows]
            looks.append((scene.loss(state.params, scene.forget), *kept))

        method = TrainingMethod(
            with_retain(GA()), optax.adam(RATE), batch_size=BATCH, pairing=pairing
        )
        watch = Watch(look, every=max(1, scene.size.steps // 20))
        look(LoopState(0, scene.params, None), None)
        unlearn(
            method,
            scene.apply,
            scene.params,
            scene.encode(scene.forget),
            scene.encode(scene.seen),
            steps=scene.size.steps,
            key=scene.key,
            watch=watch,
        )
        forgotten, *kept = np.array(looks).T
        for target in (2.0, 4.0):
            # Losses rise with the steps; where a look falls back, the first to reach it counts.
            rising = np.maximum.accumulate(forgotten)
            if rising[-1] < target:
                continue
            for part, losses in zip([p for p, rows in parts.items() if rows], kept, strict=True):
                price = np.interp(target, rising, losses) - losses[0]
                found.setdefault(name, {})[f"{part} at {target:g} nats"] = float(price)
    for other in list(samplings)[:2]:
        found[f"by entity less {other}"] = {
            name: value - found[other][name]
            for name, value in found.get("by entity (MELU)", {}).items()
            if name in found.get(other, {})
        }
    found["scene"] = {"neighbour authors": len(set().union(*near.values()))}
    return found


CLAIMS = {"rule": of_rule, "fit": of_fit, "melu": of_melu}


def measured(claim: str, seed: int, size: Size, out: Path, scenes: dict[int, Scene]) -> dict:
    """A seed's numbers, from the disk where they are there."""
    path = out / f"refusal-{claim}-{seed}{'-quick' if size == QUICK else ''}.json"
    # What it was measured by: another size or another text of this script is another measurement.
    made_by = [str(size), hashlib.sha256(Path(__file__).read_bytes()).hexdigest()]
    if path.exists() and (kept := json.loads(path.read_text()))["made_by"] == made_by:
        return kept["found"]
    if seed not in scenes:
        scenes[seed] = Scene(seed, size)
    found = jax.tree.map(float, CLAIMS[claim](scenes[seed]))
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"made_by": made_by, "found": found}))
    return found


def summary(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """By row and column the interval over the seeds that have it."""
    rows = dict.fromkeys(name for run in runs for name in run)
    found: dict[str, dict[str, Any]] = {}
    for name in rows:
        columns = dict.fromkeys(c for run in runs for c in run.get(name, {}))
        found[name] = {
            c: interval([run[name][c] for run in runs if c in run.get(name, {})]) for c in columns
        }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The intervals as a table in Markdown."""
    columns = list(dict.fromkeys(c for row in found.values() for c in row))
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    for name, row in found.items():
        cells = [shown(row[c]) if c in row else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds of the claims asked for and write what came out."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--only", nargs="+", choices=tuple(CLAIMS), default=tuple(CLAIMS))
    options.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    given = options.parse_args(arguments)
    size = QUICK if given.quick else FULL
    scenes: dict[int, Scene] = {}
    runs: dict[str, list[dict]] = {claim: [] for claim in given.only}
    for seed in range(given.seeds):
        for claim in given.only:
            runs[claim].append(measured(claim, seed, size, given.out, scenes))
            print(json.dumps({"seed": seed, claim: runs[claim][-1]}), flush=True)
        scenes.pop(seed, None)  # models are large
    found = {claim: summary(each) for claim, each in runs.items()}
    for claim, rows in found.items():
        print(f"\n{claim}\n\n{table(rows)}")
    write("refusal", given.out, {"runs": runs, "summary": found})


if __name__ == "__main__":
    main()
