"""Claims: does narrow refusing, or forgetting, spread to the domains around it?

    python -m tests.bench.claims.narrow_refusal [--seeds 3] [--quick]

A GPT of a quarter of a million parameters knows invented authors of eight lands by heart, eight
rows each; those of one land it has learnt to refuse to speak of. Two authors of another land are to
be refused, or forgotten. The domains are the lands: the nearest is the rest of the land of those
two, who share surnames and towns with them. Half of the other rows of each land are seen by the
methods; the rest judges.

    refusal     Refusing the two raises refusals in their own land more than in the other lands
                (the land that is refused already is left out).
    utility     The probability of true answers falls more in their own land than in the others.
    nearer      Over the lands, what is lost and what is refused rises with the nearness of hidden
                states: the rank correlations are above 0.
    answers     The other way round: taught to answer for two of the refused authors, the model
                refuses the rest of that land less often, and no other land differently. Whether
                what it then says is true is told beside it.

Methods are compared where half of the probability of the two authors' answers is gone (of
"answers": where that of their true answers is a half), each at the point, out of as many, that
costs the *seen* rows least KL.

Each seed's numbers are kept in `out`, and a second run takes them from there.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

import jedit
from jedit import metrics
from jedit.core.batch import Batch
from jedit.curvature import choose_temperature, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import QaRow, encode_rows, generate_authors, text_of, train_tokenizer
from jedit.data.invented.author_values import REGIONS
from jedit.edits import apply_edit
from jedit.methods import CATALOGUE, Material
from jedit.methods.row import ADAM, BySteps
from jedit.models import gpt_stepper
from jedit.objectives import RandomLabel
from jedit.recipes.comparison.trajectories import ascend
from jedit.recipes.dialogue import Speaker, refusal_to
from jedit.recipes.fitting import train
from jedit.recipes.neighbours import effects_by_domain, likeliest_answers
from jedit.recipes.scenes.authors import MODEL, RECIPE
from jedit.recipes.scenes.question_answer import ANSWER_TOKENS, SELECT
from jedit.recipes.tokenization import OwnWords
from jedit.report import domain_figure, save_png
from jedit.tracing import Entering
from jedit.training import TrainingMethod, run_method
from tests.bench.claims.evidence import kept, known_interval, parser, shown, write
from tests.bench.claims.refusal import region_of

SITE = f"blocks/{MODEL.layers - 1}/attn/query/kernel"
STEPPER = gpt_stepper(num_layers=MODEL.layers, num_heads=MODEL.heads)
REFUSED, NARROW = 0, 1  # the land that is refused from the start, and that of the two authors
NUM_NARROW = 2
FACTS = 8
BATCH = 16
FORGOTTEN = 0.5  # of the two authors' probability
ANSWERED = 0.5  # probability of the true answers of the two that are opened
TEMPERATURES = (1.0, 4.0)
NATURAL, KFADE, DPO = "NPO (natural)", "K-FADE (K-FAC)", "IdkDPO"
METHODS = ("tuning on refusals", DPO, "NPO", NATURAL, KFADE)
ANSWERS = "tuning on answers"
SCORES = ("refusal", "probability", "rouge")
# Of "answers": what is said of the rest of the refused land, against what is true of it.
TRUE = ("true recall before", "true recall")


class Plan(NamedTuple):
    """What is tried: `FULL`, or `QUICK` for a test."""

    authors: int = 32
    epochs: int = 25
    looks: tuple[int, ...] = (2, 4, 8, 16, 32)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    steps_of_kl: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    budgets: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    dampings: tuple[float, ...] = (0.01, 0.1, 1.0)


FULL = Plan()
QUICK = Plan(24, 2, (1, 2), (1e-3,), (1e-3,), (0.1,), (0.1,))


def named(number: int) -> str:
    """The name of a land."""
    return f"land {number}"


def land(row: QaRow) -> str:
    """The name of a row's domain."""
    return named(region_of(str(row.fields["author"])))


class Scene:
    """One seed's authors, the model that refuses one land, and the sets."""

    def __init__(self, seed: int, plan: Plan):
        self.plan = plan
        initial, order, cut, self.key = jax.random.split(jax.random.key(seed), 4)
        rows = generate_authors(seed, plan.authors, FACTS)
        self.truth = {row.question: row.answer for row in rows}
        is_refused = [region_of(str(row.fields["author"])) == REFUSED for row in rows]
        taught = [
            row._replace(answer=refusal_to(row, i)) if refused else row
            for i, (row, refused) in enumerate(zip(rows, is_refused, strict=True))
        ]
        texts = text_of([*rows, *taught])
        self.tokenizer = train_tokenizer(texts, MODEL.vocab)
        self.words = OwnWords(self.tokenizer)
        vocab = self.tokenizer.get_vocab_size()
        self.apply, start = MODEL.make(vocab, MODEL.max_len, key=initial)
        recipe = RECIPE._replace(epochs=(plan.epochs,))
        self.params = train(self.apply, start, self.encode(taught), recipe, key=order)[0].params
        narrow, refused = (self._authors(rows, n)[:NUM_NARROW] for n in (NARROW, REFUSED))
        self.forget = [row for row in taught if row.fields["author"] in narrow]
        # Of the other direction: refused authors whose true answers are taught.
        self.opened = [row for row in rows if row.fields["author"] in refused]
        gone = {*narrow, *refused}
        self.seen, self.heldout = [], []
        for number in range(len(REGIONS)):
            mine = [
                r for r in taught if r.fields["author"] not in gone and land(r) == named(number)
            ]
            order = np.asarray(jax.random.permutation(jax.random.fold_in(cut, number), len(mine)))
            for i, place in enumerate(order):
                (self.seen if i % 2 else self.heldout).append(mine[place])
        # What is refused can be asked for every row: none of it is what a method is given.
        steps = MODEL.max_len + 1 - self.words.prompts(pairs(rows)).tokens.shape[1]
        self.speaker = Speaker(STEPPER, self.words, self.encode, min(ANSWER_TOKENS, steps))

    def _authors(self, rows: Sequence[QaRow], region: int) -> list[str]:
        names = dict.fromkeys(str(row.fields["author"]) for row in rows)
        return [name for name in names if region_of(name) == region]

    def encode(self, rows: Sequence[QaRow | tuple[str, str]]) -> Batch:
        """Rows of one width."""
        return encode_rows(self.tokenizer, rows, MODEL.max_len, truncate=True)

    def probability(self, params: PyTree, rows: Sequence[QaRow]) -> float:
        """Mean probability of the rows' answers; 0 of a model that is destroyed."""
        loss = metrics.answer_nll_per_row(self.apply, params, self.encode(rows))
        return float(np.nan_to_num(metrics.answer_probability(loss)).mean())

    def true_recall(self, params: PyTree) -> float:
        """ROUGE-L recall of the true answers of the refused land's held-out rows."""
        rows = [row for row in self.heldout if land(row) == named(REFUSED)]
        said = likeliest_answers(self.speaker, params, rows)
        found = metrics.rouge([self.truth[row.question] for row in rows], said)
        return float(found.rougeL_recall.mean())

    def models(self, name: str) -> Iterator[tuple[str, PyTree]]:
        """Every model that a method makes, with its setting."""
        plan, retain, forget = self.plan, self.encode(self.seen), self.encode(self.forget)
        refusals = self.encode([(r.question, refusal_to(r, i)) for i, r in enumerate(self.forget)])
        tuned = {"tuning on refusals": refusals, ANSWERS: self.encode(self.opened)}
        if name in tuned:  # on other answers, and nothing protects what is kept
            method = TrainingMethod(RandomLabel(), ADAM)
            yield from self._ascended(method, tuned[name], retain, plan.rates)
            return
        row = CATALOGUE[name]
        material = Material(self.apply, self.params, forget, refusals=refusals, retain=retain)
        if "curvature" in {need.field for need in row.needs}:
            material = dataclasses.replace(material, curvature=self._curvature)
        if isinstance(row, BySteps):
            rates = plan.steps_of_kl if name == NATURAL else plan.rates
            yield from self._ascended(row.of(material), row.forget_rows(material), retain, rates)
            return
        for damping in plan.dampings:
            for budget in plan.budgets:
                method = row.of(material, budget=budget, damping=damping)
                edit, _ = run_method(method, self.apply, self.params, forget, retain)
                yield f"{damping:g}, {budget:g}", apply_edit(self.params, edit)

    @functools.cached_property
    def _curvature(self) -> jedit.Curvature:
        retain = self.encode(self.seen)
        temperature = choose_temperature(self.apply, self.params, retain, among=TEMPERATURES)
        estimator = kfac(self.apply, Categorical(temperature), select=SELECT)
        return jedit.estimate(estimator, self.params, [retain], key=jax.random.fold_in(self.key, 0))

    def _ascended(
        self, method: TrainingMethod, rows: Any, retain: Batch, rates: tuple[float, ...]
    ) -> Iterator[tuple[str, PyTree]]:
        found = ascend(
            method._replace(batch_size=BATCH),
            self.apply,
            self.params,
            rows,
            retain,
            learning_rates=rates,
            looks=self.plan.looks,
            key=jax.random.fold_in(self.key, 1),
        )
        for rate, looks in zip(rates, found, strict=True):
            for steps, _, params in looks:
                yield f"{rate:g}, {steps} steps", params

    def chosen(self, name: str) -> tuple[str, float, PyTree] | None:
        """The setting, the KL of seen rows and the model of the point that is compared."""
        seen, best = self.encode(self.seen), None
        before = self.probability(self.params, self.forget)
        for at, params in self.models(name):
            if name == ANSWERS:
                is_far_enough = self.probability(params, self.opened) >= ANSWERED
            else:
                is_far_enough = self.probability(params, self.forget) <= FORGOTTEN * before
            if not is_far_enough:
                continue
            kl = metrics.output_kl(self.apply, self.params, params, seen)
            if np.isfinite(kl) and (best is None or kl < best[1]):
                best = at, kl, params
        return best


def pairs(rows: Sequence[QaRow]) -> list[tuple[str, str]]:
    """Questions with answers."""
    return [(row.question, row.answer) for row in rows]


def of_seed(seed: int, plan: Plan, out: Any) -> dict[str, Any]:
    """All numbers of one seed."""
    scene, found = Scene(seed, plan), {}
    for name in (*METHODS, ANSWERS):
        best = scene.chosen(name)
        if best is None:
            print(seed, name, "does not arrive", flush=True)
            found[name] = None
            continue
        at, kl, params = best
        domains = effects_by_domain(
            scene.apply,
            (scene.params, params),
            scene.opened if name == ANSWERS else scene.forget,
            scene.heldout,
            domain_of=land,
            speaker=scene.speaker,
            hidden=Entering(SITE),
        )
        if seed == 0:
            out.mkdir(parents=True, exist_ok=True)
            save_png(domain_figure(domains), out / f"narrow_refusal-{name}.png".replace(" ", "-"))
            print(name, *domains, sep="\n", flush=True)
        heldout_kl = metrics.output_kl(
            scene.apply, scene.params, params, scene.encode(scene.heldout)
        )
        found[name] = {
            "at": at,
            "seen KL": kl,
            "held-out KL": heldout_kl,
            "forget probability": scene.probability(params, scene.forget),
            "domains": {
                domain.name: {"nearness": domain.nearness}
                | {k: getattr(domain, k)._asdict() for k in SCORES}
                for domain in domains
            },
        }
        if name == ANSWERS:
            recalls = map(scene.true_recall, (scene.params, params))
            found[name] |= dict(zip(TRUE, recalls, strict=True))
        print(seed, name, at, numbers_of(name, found[name]), flush=True)
    return found


def numbers_of(name: str, found: dict[str, Any]) -> dict[str, float]:
    """A method's numbers of one seed: its own land against the others, and rank correlations."""
    domains = found["domains"]
    own, refused = named(NARROW), named(REFUSED)
    told = {k: found[k] for k in ("seen KL", "held-out KL", "forget probability")}
    if name == ANSWERS:
        own = refused
        told |= {what: found[what] for what in TRUE}
    apart = {n: x for n, x in domains.items() if n not in (own, refused)}
    for score in SCORES:
        change = {n: x[score]["change"] for n, x in domains.items()}
        mean = float(np.mean([change[n] for n in apart]))
        told |= {f"{score}, own": change[own], f"{score}, others": mean}
        told[f"{score}, own less others"] = change[own] - mean
        if name != ANSWERS:
            told[f"{score}, refused land"] = change[refused]
            alive = [n for n in domains if n != refused]
            told[f"{score} with nearness"] = metrics.rank_correlation(
                [domains[n]["nearness"] for n in alive], [change[n] for n in alive]
            )
    return told


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds and write what came out."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    given = options.parse_args(arguments)
    plan = QUICK if given.quick else FULL
    settings = {"plan": str(plan), "recipe": str(RECIPE), "batch": BATCH, "methods": METHODS}
    settings |= {"model": str(MODEL), "site": SITE, "select": SELECT, "temperatures": TEMPERATURES}
    settings |= {"forgotten": FORGOTTEN, "answered": ANSWERED, "facts": FACTS, "narrow": NUM_NARROW}
    settings |= {"of methods": {n: dict(CATALOGUE[n].settings) for n in METHODS if n in CATALOGUE}}
    runs = []
    for seed in range(given.seeds):
        path = given.out / f"narrow_refusal-{'quick-' * given.quick}{seed}.json"
        runs.append(kept(path, settings, functools.partial(of_seed, seed, plan, given.out)))
    summary: dict[str, Any] = {}
    for name in (*METHODS, ANSWERS):
        told = [numbers_of(name, run[name]) for run in runs if run[name] is not None]
        summary[name] = {"seeds that arrive": len(told)}
        for column in told[0] if told else ():
            found = known_interval([one[column] for one in told])
            if found["seeds"]:  # a rank correlation there is only where something changed
                summary[name][column] = found
                print(f"{name}: {column}: {shown(found)} ({found['seeds']} seeds)")
        print(f"{name}: {len(told)} of {len(runs)} seeds arrive")
    write("narrow_refusal", given.out, {"summary": summary})


if __name__ == "__main__":
    main()
