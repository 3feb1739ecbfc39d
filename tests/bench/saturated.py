"""The metric of a step on a memorised model: forget NLL reached at one true retain KL.

    python -m tests.bench.saturated [--data full.json] [--rows 1200] [--forget 400] [--epochs 40]
                                    [--budget 0.05] [--output out/saturated.json]

A GPT of width 128 and 4 layers learns question-answer rows by heart (the first rows of --data, else
of the built-in fictitious authors), the last of them are to be forgotten. Every row of the table
edits the attention and MLP matrices in another metric, with the same line search on the true
retain KL. Then what might do better: more steps, factors refitted before each, EK-FAC, and NPO with
its retain loss as the objective; and NPO as a training loop, by Adam and by plain steps in the
tempered metric, whose KL is what it is. The KL is measured on rows that no edit saw.
The trained parameters are kept beside the output and used again.
"""

import argparse
import dataclasses
import datetime
import json
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jedit
from jedit.curvature import Factor
from jedit.data import (
    batches,
    encode_rows,
    generate_authors,
    read_rows,
    text_of,
    train_tokenizer,
)
from jedit.methods import Ascent
from jedit.models import gpt
from jedit.objectives import NPO, RetainNLL, with_retain

SELECT = r"blocks/.*/(attn|mlp)/"
MAX_LEN = 80
FLOOR = -4.0  # log-odds at which a forget token counts as forgotten; arbitrary


def margin(apply, params, forget, retain, reference):
    """Mean log-odds of the forget tokens, down to a floor; keeps its gradient as p -> 1."""
    del retain, reference
    logits = apply(params, forget.inputs)
    is_label = jax.nn.one_hot(forget.targets, logits.shape[-1], dtype=bool)
    label = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
    rest = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    odds = jnp.maximum(label - rest, FLOOR)
    return jnp.sum(odds * forget.mask) / jnp.sum(forget.mask), {}


def inputs_only(curvature):
    """The curvature with G = I: the metric of the inputs alone."""
    factors = dict(curvature.factors)
    for block in curvature.blocks.values():
        old = factors[block.output]
        eye = jnp.broadcast_to(jnp.eye(old.matrix.shape[-1]), old.matrix.shape)
        factors[block.output] = Factor(eye, eye, jnp.ones_like(old.eigenvalues))
    return dataclasses.replace(curvature, factors=factors)


class Scene:
    """The memorised model, its rows, and how an edited model is judged."""

    def __init__(self, options):
        rows = (
            read_rows(options.data)[: options.rows]
            if options.data
            else generate_authors(0, -(-options.rows // 20), 20)[: options.rows]
        )
        tokenizer = train_tokenizer(text_of(rows), 2048)
        data = encode_rows(tokenizer, rows, MAX_LEN, truncate=True)
        self.apply, initial = gpt(
            key=jax.random.key(0),
            vocab=tokenizer.get_vocab_size(),
            width=128,
            num_layers=4,
            num_heads=4,
            max_len=MAX_LEN,
        )
        kept = len(rows) - options.forget
        order = np.random.default_rng(0).permutation(kept)
        take = lambda ids: jax.tree.map(lambda x: x[ids], data)  # noqa: E731
        self.forget_rows, self.retain_rows = (
            take(np.arange(kept, len(rows))),
            take(order[: kept // 2]),
        )
        self.forget = list(batches(self.forget_rows, 100))
        self.fit = list(batches(self.retain_rows, 32))
        self.probe = take(order[:64])
        self.heldout = list(batches(take(order[kept // 2 :][:200]), 100))
        self.params = self._trained(initial, data, options)

    def _trained(self, initial, data, options):
        file = options.output.with_suffix(f".{options.rows}x{options.epochs}.npz")
        leaves, tree = jax.tree.flatten(initial)
        if not file.exists():
            steps = options.epochs * (options.rows // 32)
            rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 50, steps, 1e-4)
            params, history = jedit.fit(
                lambda params, rows: RetainNLL()(self.apply, params, None, rows),
                optax.adamw(rate, weight_decay=0.01),
                initial,
                data,
                epochs=steps * 32 / options.rows,
                batch_size=32,
                key=jax.random.key(1),
            )
            print(f"trained: loss {float(jnp.mean(history['loss'][-50:])):.4f}", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, *(np.asarray(x) for x in jax.tree.leaves(params)))
        stored = np.load(file)
        return tree.unflatten([jnp.asarray(stored[f"arr_{i}"]) for i in range(len(leaves))])

    def judge(self, params):
        """(forget NLL, retain NLL, KL to the original), the latter two on held-out retain rows."""
        return (
            jedit.metrics.nll(self.apply, params, self.forget),
            jedit.metrics.nll(self.apply, params, self.heldout),
            jedit.metrics.output_kl(self.apply, self.params, params, self.heldout),
        )


def edits(scene, budget, select):
    """(name, damping, params, predicted KL, seconds) of every metric."""
    likelihoods = {
        "Fisher of the outputs": jedit.likelihoods.Categorical(),
        "Fisher at temperature 4": jedit.likelihoods.Categorical(4.0),
        "Gauss-Newton of the logits": jedit.likelihoods.Gaussian(),
    }

    def fit(likelihood, params=scene.params, rows=scene.fit):
        estimator = jedit.kfac(scene.apply, likelihood, select=SELECT)
        return jedit.estimate(estimator, params, rows, key=jax.random.key(2))

    def refit(params):
        return fit(hot, params, scene.fit[:8])

    curvatures = {}
    for name, likelihood in likelihoods.items():
        start = time.perf_counter()
        curvatures[name] = fit(likelihood)
        print(f"fitted {name}: {time.perf_counter() - start:.0f} s", flush=True)
    tempered = curvatures["Fisher at temperature 4"]
    hot = likelihoods["Fisher at temperature 4"]
    corrected = jedit.estimate(
        jedit.ekfac(scene.apply, hot, tempered), scene.params, scene.fit, key=jax.random.key(2)
    )
    preference = with_retain(NPO())
    rows = [("identity (plain ascent)", tempered, 1e9, Ascent(4))]
    rows += [("inputs alone (G = I)", inputs_only(tempered), 1e-3, Ascent(4))]
    rows += [(name, c, d, Ascent(4)) for name, c in curvatures.items() for d in (0.01, 0.1)]
    rows += [
        (f"temperature 4, {n} step{'s' * (n > 1)}", tempered, d, Ascent(n))
        for n in (1, 2)
        for d in (0.01, 0.1)
    ]
    rows += [(f"{name}, 1 step", c, 0.01, Ascent(1)) for name, c in curvatures.items()]
    rows += [
        ("identity, 1 step", tempered, 1e9, Ascent(1)),
        ("inputs alone, 1 step", inputs_only(tempered), 1e-3, Ascent(1)),
        ("temperature 4, 16 steps", tempered, 0.01, Ascent(16)),
        ("temperature 4, log-odds", tempered, 0.01, Ascent(4, objective=margin)),
        ("temperature 4, EK-FAC", corrected, 0.01, Ascent(4)),
        ("temperature 4, EK-FAC, 1 step", corrected, 0.01, Ascent(1)),
        ("temperature 8", fit(jedit.likelihoods.Categorical(8.0)), 0.01, Ascent(4)),
        ("temperature 8, 1 step", fit(jedit.likelihoods.Categorical(8.0)), 0.01, Ascent(1)),
        ("temperature 4, refitted, 8 steps", tempered, 0.01, Ascent(8, refit=refit)),
        ("temperature 4, refitted, 2 steps", tempered, 0.01, Ascent(2, refit=refit)),
        ("temperature 4, NPO, 2 steps", tempered, 0.01, Ascent(2, objective=preference)),
        ("temperature 4, NPO, 4 steps", tempered, 0.01, Ascent(4, objective=preference)),
    ]
    for name, curvature, damping, ascent in rows:
        if not re.search(select, name):
            continue
        start = time.perf_counter()
        edit, info = jedit.methods.kfade(
            scene.apply,
            scene.params,
            curvature,
            scene.forget,
            scene.probe,
            budget=budget,
            damping=damping,
            ascent=ascent,
        )
        params = jedit.apply_edit(scene.params, edit)
        yield name, damping, params, float(info.predicted_kl[-1]), time.perf_counter() - start
    yield from negative_preferences(scene, tempered, select)


def negative_preferences(scene, tempered, select):
    """NPO with a retain loss: by Adam, and by plain steps in the tempered metric."""
    runs = [(f"NPO, 125 steps of Adam, lr {r:g}", None, optax.adam(r), 125) for r in (2e-4, 5e-4)]
    for damping in (0.1, 0.03):
        for max_kl in (1e-5, 3e-5, 1e-4, 1e-3):
            chain = optax.chain(
                jedit.transforms.scale_by_curvature(tempered, damping=damping),
                optax.scale(-1.0),
                jedit.transforms.clip_by_curvature_norm(tempered, predicted_kl=max_kl),
            )
            name = f"NPO, 60 steps of at most {max_kl:g} nats in the tempered metric"
            runs.append((name, damping, chain, 60))
    for name, damping, optimizer, steps in runs:
        if not re.search(select, name):
            continue
        start = time.perf_counter()
        params, _ = jedit.unlearn(
            jedit.TrainingMethod(with_retain(NPO()), optimizer, batch_size=32),
            scene.apply,
            scene.params,
            scene.forget_rows,
            scene.retain_rows,
            steps=steps,
            key=jax.random.key(3),
        )
        jax.block_until_ready(params)
        yield name, damping, params, None, time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.saturated")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--forget", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--select", default="", help="regular expression on the rows' names")
    parser.add_argument("--output", type=Path, default=Path("out/saturated.json"))
    options = parser.parse_args(arguments)
    scene = Scene(options)
    forget, retain, _ = scene.judge(scene.params)
    print(f"untouched: forget NLL {forget:.4f}, held-out retain NLL {retain:.4f}", flush=True)
    table = []
    print("| metric of the step | damping | forget NLL | retain NLL | KL | predicted | s |")
    print("|---|---|---|---|---|---|---|")
    for name, damping, params, predicted, seconds in edits(scene, options.budget, options.select):
        forget, retain, kl = scene.judge(params)
        said = "" if predicted is None else f"{predicted:.4f}"
        print(
            f"| {name} | {'' if damping is None else damping} | {forget:.2f} | {retain:.3f} "
            f"| {kl:.4f} | {said} | {seconds:.0f} |",
            flush=True,
        )
        table.append([name, damping, forget, retain, kl, predicted, seconds])
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    record = {"date": date, "arguments": {k: str(v) for k, v in vars(options).items()}}
    options.output.write_text(json.dumps({**record, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
