"""Claim: unlearning hides answers (D- >> D+) where Ssiuu erases them, and so Ssiuu's do not return.

    python -m tests.bench.claims.hiding [--seeds 3] [--quick]
    python -m tests.bench.claims.hiding --tune       rates and strengths, on seed 100

A GPT of 0.3 million parameters learns 300 facts about invented authors; three authors, 30 rows, are
to be forgotten.  Each method takes steps until the mean probability of the forget answers is that
of a retrained model, to which the last step is cut: so forgetting is matched exactly, and what is
compared is how it was done.  Of each model:

    kept              probability of retain answers that no method saw
    D+, D-            `metrics.influence_shift` on the forget rows: of P, and of log P
    .1, .3            what an attacker who teaches that share of the forget rows again gets of the
                      others: the best of two rates and two numbers of updates by Adam
    benign            the same, of rows about authors that nobody has heard of

The retrained model is attacked alike, and its D+ and D- are those of a model that never knew.
A seed's numbers are kept in `--out` and not made again.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import jedit
from jedit import metrics
from jedit.attacks import Attacker, relearn
from jedit.attacks.relearning_curve import taught_by_share
from jedit.core.batch import Batch
from jedit.data import encode_rows, generate_authors
from jedit.methods import CATALOGUE, Material, ssiuu
from jedit.methods.row import ADAM
from jedit.objectives import NPO, with_retain
from jedit.recipes.comparison.trajectories import start_at
from jedit.recipes.scenes.authors import MODEL
from jedit.training import LoopState, TrainingMethod, Watch
from tests.bench.claims.scenes import Authors, authors_model

EPOCHS, MOST_STEPS, BATCH = 12, 200, 16
RATES = (1e-4, 3e-4, 1e-3)
ATTACK_RATES, LOOKS, SHARES = (3e-4, 1e-3), (5, 20), (0.1, 0.3)
TUNING_SEED = 100


@dataclasses.dataclass(frozen=True)
class Tried:
    """A method, and the rate that kept most of the retain rows on the tuning seed."""

    make: Callable[[Material], TrainingMethod]
    rate: float


def _row(name: str) -> Callable[[Material], TrainingMethod]:
    return lambda material: CATALOGUE[name].of(material)


def _ssiuu(strength: float, **more: Any) -> Callable[[Material], TrainingMethod]:
    method = ssiuu(ADAM, strength=strength, **more)
    return lambda _: method


METHODS = {
    "gradient ascent": Tried(_row("gradient ascent"), 1e-4),
    "GradDiff": Tried(_row("GradDiff"), 3e-4),
    "NPO": Tried(_row("NPO"), 3e-4),
    "RMU": Tried(_row("RMU"), 1e-3),
    "OFMU": Tried(_row("OFMU"), 3e-4),
    "Ssiuu (0.1)": Tried(_ssiuu(0.1), 3e-4),
    "Ssiuu (1)": Tried(_ssiuu(1.0), 3e-4),
    "Ssiuu (10)": Tried(_ssiuu(10.0), 3e-4),
    "Ssiuu (1, log P)": Tried(_ssiuu(1.0, score="log_probability"), 3e-4),
    "Ssiuu of NPO": Tried(_ssiuu(1.0, objective=with_retain(NPO())), 3e-4),
}


class Setup:
    """One seed's models and rows."""

    def __init__(self, seed: int, *, made: Authors | None = None):
        self.seed = seed
        self.made = authors_model(seed, epochs=EPOCHS) if made is None else made
        gone, seen, held = self.made.parts
        self.forget, self.retain, self.held = map(self.made.take, (gone, seen, held))
        self.apply = self.made.apply
        self.original = self.made.fit(np.arange(len(self.made.rows)))
        self.retrained = self.made.fit(np.setdiff1d(np.arange(len(self.made.rows)), gone))
        names = {row.fields["author"] for row in self.made.rows}
        others = [r for r in generate_authors(seed + 1, 8, 10) if r.fields["author"] not in names]
        self.others = encode_rows(
            self.made.tokenizer, others[: len(gone)], MODEL.max_len, truncate=True
        )
        self.others = jax.tree.map(
            lambda x, y: jnp.zeros((len(x), y.shape[1]), x.dtype).at[:, : x.shape[1]].set(x),
            jax.tree.map(lambda x: jnp.asarray(x)[:, : self.forget.inputs.shape[1]], self.others),
            self.forget,
        )
        self.target = self.known(self.retrained)
        self.before = {
            score: metrics.influence(self.apply, self.original, self.forget, score=score)
            for score in ("probability", "log_probability")
        }

    def known(self, params: PyTree, rows: Batch | None = None) -> float:
        """The mean probability of answers."""
        rows = self.forget if rows is None else rows
        loss = metrics.answer_nll_per_row(self.apply, params, rows)
        return float(np.mean(metrics.answer_probability(loss)))

    @property
    def material(self) -> Material:
        """What the catalogue's rows are made of."""
        site = f"blocks/{MODEL.layers - 1}/attn/query/kernel"
        return Material(self.apply, self.original, self.forget, optimizer=ADAM, hidden_site=site)

    def unlearned(self, method: TrainingMethod, rate: float) -> tuple[int, PyTree]:
        """The steps that a method takes until the target, and the model cut to it."""
        kept: list[PyTree] = [self.original]

        def is_reached(state: LoopState, history: Any) -> bool:
            del history
            kept.append(jax.tree.map(jnp.copy, state.params))
            return self.known(kept[-1]) <= self.target

        jedit.unlearn(
            method._replace(batch_size=BATCH),
            self.apply,
            start_at(method, self.original, rate),
            self.forget,
            self.retain,
            steps=MOST_STEPS,
            key=jax.random.fold_in(jax.random.key(self.seed), 1),
            watch=Watch(is_reached, every=1),
        )
        return len(kept) - 1, self._cut(kept[-2], kept[-1])

    def _cut(self, first: PyTree, last: PyTree) -> PyTree:
        """Between two models, by bisection, the one at the target."""
        low, high = 0.0, 1.0
        between = lambda a: jax.tree.map(lambda x, y: x + a * (y - x), first, last)  # noqa: E731
        if self.known(last) > self.target:
            return last  # not reached
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (
                (low, middle) if self.known(between(middle)) <= self.target else (middle, high)
            )
        return between(high)

    def measured(self, params: PyTree) -> dict[str, float]:
        """Every number of one model."""
        found = {"known": self.known(params), "kept": self.known(params, self.held)}
        for score, before in self.before.items():
            after = metrics.influence(self.apply, params, self.forget, score=score)
            shift = metrics.influence_shift(before, after)
            log = "log " if score == "log_probability" else ""
            found[f"{log}D+"], found[f"{log}D-"] = shift.erased.mean(), shift.hidden.mean()
        key = jax.random.fold_in(jax.random.key(self.seed), 2)
        curve = taught_by_share(
            self.apply,
            params,
            self.forget,
            attacker=Attacker(_adam, ATTACK_RATES, LOOKS, SHARES),
            measure=self.known,
            key=key,
        )
        best = np.nanmax(curve.values[:, :, 1:], axis=(1, 2))
        found |= dict(zip((".1", ".3"), best, strict=True))
        benign = [
            relearn(
                self.apply,
                params,
                self.others,
                optimizer=_adam(rate),
                looks=LOOKS,
                measure=self.known,
                key=jax.random.clone(key),
            ).values[1:]
            for rate in ATTACK_RATES
        ]
        found["benign"] = np.max(benign)
        return {name: float(value) for name, value in found.items()}


def _adam(rate: float):
    return OPTIMIZERS[rate]


OPTIMIZERS = {rate: __import__("optax").adam(rate) for rate in ATTACK_RATES}


def of_seed(setup: Setup, methods: dict[str, Tried]) -> dict[str, dict[str, float]]:
    """Every method's numbers, and those of the two models that no method made."""
    found = {
        "untouched": setup.measured(setup.original),
        "retrained": setup.measured(setup.retrained),
    }
    for name, tried in methods.items():
        steps, params = setup.unlearned(tried.make(setup.material), tried.rate)
        found[name] = {"steps": float(steps), **setup.measured(params)}
        print(setup.seed, name, json.dumps(found[name]), flush=True)
    return found
