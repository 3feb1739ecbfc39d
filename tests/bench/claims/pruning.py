"""Claim: what is learnt by heart is lost before general ability, as the kept curvature falls.

    python -m tests.bench.claims.pruning [--seeds 3] [--scene digits gpt] [--quick]

Two models that have learnt some rows by heart and others in general:

    digits   a perceptron, 64-256-128-10, on 1,347 images of which 15% bear a random label; by
             heart: these labels; general: 450 test images
    gpt      a GPT of the demo's size on 24 invented authors' answers and 16 random strings that
             are seen three times an epoch; by heart: the strings, from their tenth token on;
             general: what is alike in the answers about eight authors that nobody has seen

Each is edited more and more strongly by curvature pruning (in its three forms: products a_i g_j,
EK-FAC's eigenvalues, factors), by setting the smallest weights of each matrix to zero, and, which
are told the rows learnt by heart, by K-FADE. Pruning sees training rows without their labels, in
which those learnt by heart are among the others on the digits, and the authors' rows alone on the
GPT. Accuracies are of images, and of tokens after the right ones before. The number is the general
accuracy, as a share of the untouched model's, at the strength at which half of what was learnt by
heart is left, and a quarter, interpolated between the two strengths tried around it; a method that
leaves more at every strength tried has no number.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jedit.core.batch import Batch
from jedit.core.paths import matcher, parameter_paths
from jedit.curvature import Curvature, ekfac, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import (
    batches,
    encode_rows,
    generate_authors,
    load_digits,
    split_digits,
    text_of,
    train_tokenizer,
)
from jedit.edits import apply_edit
from jedit.methods import Ascent, curvature_pruning, kfade
from jedit.models import mlp
from jedit.recipes.fitting import Recipe, train
from jedit.recipes.scenes.authors import MODEL
from tests.bench.claims.evidence import interval, kept, parser, shown, write

MASSES = (0.9999, 0.999, 0.997, 0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SHARES = tuple(round(0.05 * i, 2) for i in range(1, 20))
BUDGETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
NOISE = 0.15
LEFT = {"half": 0.5, "quarter": 0.25}  # of what was learnt by heart
SIZES = (64, 256, 128, 10)
PREFIX = 8


class Memorised(NamedTuple):
    """A model with rows that it knows by heart.

    Attributes:
        apply: `apply(params, inputs) -> logits`.
        params: trained on all rows.
        seen: rows whose curvature pruning takes.
        by_heart: rows learnt by heart, with the labels learnt.
        rest: rows that K-FADE is to keep.
        tests: sets of rows by name, the first "general".
        select: pattern of the matrices that are edited.
    """

    apply: Callable
    params: PyTree
    seen: Batch
    by_heart: Batch
    rest: Batch
    tests: dict[str, Batch]
    select: str


@functools.cache
def _mlp() -> Callable:
    return mlp(key=jax.random.key(0), sizes=SIZES)[0]


def digits(seed: int, *, epochs: int = 150) -> Memorised:
    """Train on labels of which some are random."""
    rows, test = split_digits(load_digits(), seed=seed)
    rng = np.random.default_rng(seed)
    is_noisy = rng.permutation(len(rows.labels)) < NOISE * len(rows.labels)
    # Never the true one: what is right of them is learnt by heart.
    wrong = (rows.labels + rng.integers(1, 10, len(rows.labels))) % 10
    labels = np.where(is_noisy, wrong, rows.labels).astype(np.int32)
    learnt = rows._replace(labels=labels)
    initial, order = jax.random.split(jax.random.key(seed))
    start = mlp(key=initial, sizes=SIZES)[1]
    recipe = Recipe((epochs,), batch_size=64, learning_rate=1e-3)
    params = train(_mlp(), start, learnt.as_batch(), recipe, key=order)[0].params
    noisy, clean = np.flatnonzero(is_noisy), np.flatnonzero(~is_noisy)
    tests = {
        "general": test.as_batch(),
        "true labels": rows.take(noisy).as_batch(),
        "trained on": rows.take(clean).as_batch(),
    }
    by_heart, rest = (learnt.take(part).as_batch() for part in (noisy, clean))
    return Memorised(_mlp(), params, learnt.as_batch(), by_heart, rest, tests, "kernel|bias")


@functools.cache
def _gpt(vocab: int) -> Callable:
    return MODEL.make(vocab, MODEL.max_len, key=jax.random.key(0))[0]


def gpt(seed: int, *, epochs: int = 25, authors: int = 24, strings: int = 16) -> Memorised:
    """Train on authors' answers and on random strings."""
    known = generate_authors(seed, authors, 10)
    names = {row.fields["author"] for row in known}
    strangers = [
        row for row in generate_authors(seed + 100, 8, 10) if row.fields["author"] not in names
    ]
    tokenizer = train_tokenizer(text_of(known), MODEL.vocab)
    vocab = tokenizer.get_vocab_size()
    encode = functools.partial(encode_rows, tokenizer, max_len=MODEL.max_len, truncate=True)
    rows, unseen = (jax.tree.map(np.asarray, encode(part)) for part in (known, strangers))
    rng = np.random.default_rng(seed)
    tokens = np.zeros((strings, rows.inputs.shape[1] + 1), rows.inputs.dtype)
    tokens[:, : PREFIX + 25] = rng.integers(4, vocab, (strings, PREFIX + 25))
    at = np.broadcast_to(np.arange(rows.inputs.shape[1]), rows.inputs[:strings].shape)
    is_string = (at < PREFIX + 24).astype(rows.mask.dtype)
    drilled = Batch(
        tokens[:, :-1],
        tokens[:, 1:].astype(rows.targets.dtype),
        (is_string * (at >= PREFIX)).astype(rows.mask.dtype),
        is_string.astype(rows.valid.dtype),
    )
    three = [drilled] * 3
    data = jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts)), rows, *three)
    initial, order = jax.random.split(jax.random.key(seed))
    start = MODEL.make(vocab, MODEL.max_len, key=initial)[1]
    recipe = Recipe((epochs,), batch_size=16, learning_rate=2e-3)
    params = train(_gpt(vocab), start, data, recipe, key=order)[0].params
    rows, unseen, drilled = (jax.tree.map(jnp.asarray, x) for x in (rows, unseen, drilled))
    tests = {"general": unseen, "trained on": rows}
    return Memorised(_gpt(vocab), params, rows, drilled, rows, tests, "mlp")


SCENES = {"digits": digits, "gpt": gpt}
TOYS = {
    "digits": functools.partial(digits, epochs=40),
    "gpt": functools.partial(gpt, epochs=2, authors=2, strings=2),
}


def accuracy(scene: Memorised, params: PyTree, rows: Batch) -> float:
    """The share of counted outputs whose label is the most probable."""
    logits = _logits(scene.apply, params, rows.inputs)
    is_right = np.asarray(jnp.argmax(logits, -1) == rows.targets)
    return float(is_right[np.asarray(rows.mask) > 0].mean())


_logits = jax.jit(lambda apply, params, inputs: apply(params, inputs), static_argnums=0)


def smallest_zero(params: PyTree, share: float, select: str) -> PyTree:
    """Set the smallest of each matrix's weights to zero."""
    is_edited = matcher(select, "select")

    def cut(path: str, leaf):
        if leaf.ndim < 2 or not is_edited(path):
            return leaf
        return jnp.where(jnp.abs(leaf) <= jnp.quantile(jnp.abs(leaf), share), 0, leaf)

    leaves = [cut(path, leaf) for path, leaf in parameter_paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def edited(scene: Memorised, seed: int, *, quick: bool) -> Iterator[tuple[str, float, PyTree]]:
    """Every method at every strength, gentlest first."""
    key = jax.random.key(seed)
    some = slice(None, None, 7) if quick else slice(None)
    estimator = kfac(scene.apply, Categorical(), select=scene.select, samples=4)
    # The same rows in the same order for all three.
    take = lambda rows: list(batches(rows, min(128, len(rows.targets))))  # noqa: E731
    plain = estimate(estimator, scene.params, take(scene.seen), key=key)
    corrector = ekfac(scene.apply, Categorical(), plain)
    corrected = estimate(corrector, scene.params, take(scene.seen), key=jax.random.clone(key))
    forms: dict[str, tuple[Curvature, Any]] = {
        "pruning, products": (plain, "product"),
        "pruning, EK-FAC": (corrected, "product"),
        "pruning, factors": (plain, "factors"),
    }
    for name, (curvature, keep) in forms.items():
        for mass in MASSES[some]:
            edit, _ = curvature_pruning(scene.params, curvature, mass=mass, keep=keep)
            yield name, mass, apply_edit(scene.params, edit)
    for share in SHARES[some]:
        yield "smallest weights", share, smallest_zero(scene.params, share, scene.select)
    rest = estimate(estimator, scene.params, take(scene.rest), key=jax.random.clone(key))
    for budget in BUDGETS[some]:
        edit, _ = kfade(
            scene.apply,
            scene.params,
            rest,
            scene.by_heart,
            scene.rest,
            budget=budget,
            damping=0.1,
            ascent=Ascent(4),
        )
        yield "K-FADE (told)", budget, apply_edit(scene.params, edit)


Points = dict[str, list[dict[str, float]]]


def measured(scene: Memorised, seed: int, *, quick: bool = False) -> Points:
    """The accuracies of every point; the untouched model's as a method of one."""
    sets = {"by heart": scene.by_heart, **scene.tests}
    judge = lambda params: {n: accuracy(scene, params, rows) for n, rows in sets.items()}  # noqa: E731
    found: Points = {"untouched": [{"strength": 0.0, **judge(scene.params)}]}
    for name, strength, params in edited(scene, seed, quick=quick):
        found.setdefault(name, []).append({"strength": strength, **judge(params)})
    return found


def kept_at(points: Points, name: str, left: float) -> float | None:
    """The general accuracy kept where so much of what was by heart is left; None where never.

    Between two strengths, of which the harsher one first has no more left, by straight line.
    """
    (begin,) = points["untouched"]
    share = lambda point, part: point[part] / max(begin[part], 1e-9)  # noqa: E731
    before = begin
    for point in points[name]:
        high, low = share(before, "by heart"), share(point, "by heart")
        if low <= left:
            way = (high - left) / max(high - low, 1e-9)
            kept = share(before, "general"), share(point, "general")
            return float(kept[0] + way * (kept[1] - kept[0]))
        before = point
    return None


def summary(runs: list[Points]) -> dict[str, dict[str, Any]]:
    """Intervals over the seeds that got there, and how many did, by method; None where none."""
    found: dict[str, dict[str, Any]] = {}
    for name in (name for name in runs[0] if name != "untouched"):
        found[name] = {}
        for word, left in LEFT.items():
            kept = [kept_at(run, name, left) for run in runs]
            arrived = [x for x in kept if x is not None]
            found[name][word] = {
                "arrived": len(arrived),
                "kept": interval(arrived) if arrived else None,
                "values": kept,
            }
    return found


def cell(found: dict[str, Any], seeds: int) -> str:
    """What the table says of it."""
    text = "never" if found["kept"] is None else shown(found["kept"])
    return text if found["arrived"] in (0, seeds) else f"{text} ({found['arrived']} of {seeds})"


def run(name: str, given: argparse.Namespace) -> list[Points]:
    """The seeds of a scene; those measured before are read, not run again."""

    def one_seed(seed: int) -> dict[str, Any]:
        scene = (TOYS if given.quick else SCENES)[name](seed)
        return {"points": measured(scene, seed, quick=given.quick)}

    quick = "-quick" if given.quick else ""
    settings = {"tried": [MASSES, SHARES, BUDGETS], "is_quick": given.quick}
    paths = [given.out / f"pruning-{name}{quick}-{seed}.json" for seed in range(given.seeds)]
    return [
        kept(path, settings, lambda seed=seed: one_seed(seed))["points"]
        for seed, path in enumerate(paths)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds of the scenes and write what came out."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--scene", nargs="+", choices=SCENES, default=list(SCENES))
    options.add_argument("--quick", action="store_true", help="small models, a few strengths")
    given = options.parse_args(arguments)
    numbers: dict[str, Any] = {}
    for name in given.scene:
        runs = run(name, given)
        begin = {
            part: interval([r["untouched"][0][part] for r in runs])
            for part in runs[0]["untouched"][0]
            if part != "strength"
        }
        found = summary(runs)
        numbers[name] = {"untouched": begin, "summary": found, "runs": runs}
        print(f"\n{name}: " + ", ".join(f"{n} {shown(v)}" for n, v in begin.items()))
        print("| method | general kept, half by heart left | a quarter left |")
        print("| --- | --- | --- |")
        for method, by in found.items():
            print(f"| {method} | " + " | ".join(cell(by[word], len(runs)) for word in LEFT) + " |")
    write("pruning", given.out, numbers)


if __name__ == "__main__":
    main()
