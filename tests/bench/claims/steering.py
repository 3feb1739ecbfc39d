"""Claims: steering makes a language model name a thing, at a matched price on other stories.

    python -m tests.bench.claims.steering [--seeds 3] [--quick]

1. LinEAS raises the share of stories that name a thing by more than the mean difference does.
2. It raises it by more than AUSteer does.
3. An edit of the weights by K-FADE, towards the stories that name it, does by more than LinEAS.
4. Folded into the weights, a steering costs and does what it did on the way.

The model is the Llama of 260 thousand parameters that tells TinyStories; it needs the extra `llm`.
Each seed draws stories from the model itself, and has a word. The source are stories without it,
the target stories with it, up to 32 each. AUSteer compares single positions: in a target story the
one before the word, in a story of the source the nearest one at which the same token stands.

Every method's strength is searched until the mean KL on stories drawn anew is `PRICE`, nats per
token; what stories drawn then name the word is its share. All methods draw with one key. Settings
are chosen from `GRIDS` on a seed of its own, with another word, by the share at the price; the
seeds that are reported see the chosen ones alone. Where the price is not reached, a method has no
share. Steered are the outputs of the MLPs' last matrices. These have no biases here, so shifts are
made on the way and only gains are folded.
"""

import functools
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.edits import Edit, apply_edit
from jedit.methods import Ascent, kfade
from jedit.metrics import output_kl
from jedit.models import gpt
from jedit.objectives import RetainNLL
from jedit.steering import (
    Affine,
    Sparsity,
    Steering,
    austeer,
    fold,
    identity,
    lineas,
    mean_difference,
    steered,
)
from tests.bench.claims.evidence import kept, known_interval, parser, shown, write

NAME = "steering"
WORDS = ("ball", "dog", "bird", "tree", "car")
CHOOSING = (1000, "cat")  # the seed and the word that settings are chosen by
PRICE = 0.1
NEAR = 0.01  # of the price: a cost that is nearer to it than that has reached it
ROWS, HELDOUT = 32, 64
DRAWS, TRIES = 3, 16
JUDGED = 2  # draws that a reported share is of; DRAWS where settings are chosen
STAGE = 16
PAIRS = (
    ("LinEAS", "mean difference"),
    ("LinEAS", "AUSteer"),
    ("LinEAS, gains alone", "AUSteer"),
    ("K-FADE", "LinEAS"),
)
Points = dict[str, list[dict[str, Any]]]  # by method the settings that it is run at


def _lineas_points(rates: Sequence[float], lengths: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"rate": rate, "steps": steps, "is_sparse": is_sparse}
        for rate in rates
        for steps in lengths
        for is_sparse in (True, False)
    ]


GRIDS: Points = {
    "mean difference": [{}],
    "LinEAS": _lineas_points((0.01, 0.03, 0.1), (30, 100)),
    "LinEAS, gains alone": _lineas_points((0.01, 0.03, 0.1), (100,)),
    "AUSteer": [{"units": units} for units in (1, 3, 10, 30, 100)],
    "K-FADE": [{"damping": damping} for damping in (0.001, 0.01, 0.1, 1.0)],
}
QUICK_GRIDS: Points = {
    "mean difference": [{}],
    "LinEAS": _lineas_points((0.1,), (3,)),
    "LinEAS, gains alone": _lineas_points((0.1,), (3,))[:1],
    "AUSteer": [{"units": units} for units in (1, 3)],
    "K-FADE": [{"damping": damping} for damping in (0.1, 1.0)],
}


class Scene(NamedTuple):
    """A model, its sites, and what says whether stories name the word.

    Attributes:
        apply: the model.
        params: its parameters.
        sites: those that are steered.
        begins: `(word, tokens) -> (n,)` the token of each story in which the word begins, or -1.
        length: tokens of a story.
        num: stories drawn at a time.
        select: the matrices that K-FADE edits.
    """

    apply: Callable
    params: PyTree
    sites: tuple[str, ...]
    begins: Callable[[str, np.ndarray], np.ndarray]
    length: int
    num: int
    select: str


@dataclass(frozen=True)
class Lower:
    """The loss of the rows in the forget set's place, which is lowered: they are to be told."""

    def __call__(self, apply, params, forget, retain=None, reference=None):
        """Return the loss."""
        del retain, reference
        return RetainNLL()(apply, params, None, forget)


def make_scene(*, is_quick: bool) -> Scene:
    """Load the model, or make a toy that has learned nothing."""
    if is_quick:
        apply, params = gpt(
            key=jax.random.key(0), vocab=12, width=8, num_layers=2, num_heads=2, max_len=8
        )
        sites = tuple(f"blocks/{i}/mlp/down/kernel" for i in range(2))

        def is_there(word: str, tokens: np.ndarray) -> np.ndarray:
            found = tokens == 3 + (*WORDS, CHOOSING[1]).index(word)
            return np.where(found.any(axis=1), found.argmax(axis=1), -1)

        return Scene(apply, params, sites, is_there, 8, 32, r"blocks/.*/kernel")
    import tokenizers

    from jedit.models import convert_llama2c, load_model
    from jedit.recipes.folders.places import SELECT, written_layers

    data = Path(os.environ.get("JEDIT_SHARED_DATA", Path.cwd().parent / "shared" / "data"))
    files = data / "tinystories260k"
    with tempfile.TemporaryDirectory() as made:
        folder = convert_llama2c(
            files / "checkpoint_legacy.bin", files / "tokenizer.bin", Path(made) / "hf"
        )
        apply, params, _ = load_model(folder)
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def begins(word: str, tokens: np.ndarray) -> np.ndarray:
        found = np.full(len(tokens), -1)
        for i, text in enumerate(tokenizer.decode_batch(tokens.tolist())):
            if there := re.search(rf"\b{word}s?\b", text.lower()):
                starts = [tokens[i, :k].tolist() for k in range(len(tokens[i]))]
                found[i] = sum(len(tokenizer.decode(x)) <= there.start() for x in starts) - 1
        return found

    return Scene(apply, params, written_layers(params), begins, 48, 256, SELECT)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _drawn(moved: Callable, num: int, length: int, given: Any, key: Any) -> Any:
    def step(tokens, at):
        logits = moved(given, tokens)[:, at].astype(jnp.float32)
        token = jax.random.categorical(jax.random.fold_in(key, at), logits)
        return tokens.at[:, at + 1].set(token.astype(tokens.dtype)), None

    tokens = jnp.ones((num, 1), jnp.int32)  # the beginning of a text
    # What is not told yet costs as much as what is: stories grow in stages.
    for last in (*range(STAGE, length, STAGE), length):
        told = tokens.shape[1]
        tokens = jnp.pad(tokens, ((0, 0), (0, last - told)))
        tokens = jax.lax.scan(step, tokens, jnp.arange(told - 1, last - 1))[0]
    return tokens


def drawn(scene: Scene, moved: Callable, given: Any, *, key: Any, draws: int = DRAWS) -> np.ndarray:
    """Return `draws` times `num` stories of a function `(given, tokens) -> logits`."""
    keys = jax.random.split(key, draws)
    parts = [_drawn(moved, scene.num, scene.length, given, one) for one in keys]
    return np.concatenate([np.asarray(part) for part in parts])


def rows_of(tokens: np.ndarray) -> Batch:
    """Return stories as rows, each token the target of what stands before it."""
    targets = np.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    mask = np.ones(tokens.shape, np.float32)
    mask[:, -1] = 0
    return Batch(jnp.asarray(tokens), jnp.asarray(targets), jnp.asarray(mask))


def positions(tokens: np.ndarray, at: np.ndarray) -> Batch:
    """Return stories of which one position counts each."""
    rows = rows_of(tokens)
    return rows._replace(mask=jnp.asarray(np.eye(tokens.shape[1], dtype=np.float32)[at]))


def contrasted(target: np.ndarray, begins: np.ndarray, source: np.ndarray) -> tuple[Batch, Batch]:
    """Return pairs of positions: before the word, and where the same token stands without it.

    Of the source's stories each is used once, the one that has the token nearest to where it is in
    the target; a story of the target for which none is left has no pair.
    """
    good, bad, left = [], [], list(range(len(source)))
    for i, at in enumerate(begins - 1):
        there = {j: np.flatnonzero(source[j] == target[i, at]) for j in left}
        same = [(abs(q - at), j, q) for j, found in there.items() for q in found]
        if same:
            _, j, q = min(same)
            good.append((i, at))
            bad.append((j, q))
            left.remove(j)
    if not good:
        raise RuntimeError("no token before the word stands in a story without it")
    (i, at), (j, q) = np.array(good).T, np.array(bad).T
    return positions(target[i], at), positions(source[j], q)


class Material(NamedTuple):
    """What a seed's methods are made of.

    Attributes:
        source: stories without the word.
        target: stories with it.
        pairs: positions before the word, and others.
        retain: stories as they come, for K-FADE's curvature.
        key: of the curvature.
    """

    source: Batch
    target: Batch
    pairs: tuple[Batch, Batch]
    retain: Batch
    key: Any


def makers(scene: Scene, material: Material) -> dict[str, Callable[..., Steering | Edit]]:
    """Return by name what makes a steering, or an edit, of strength one at given settings."""
    apply, params, sites = scene.apply, scene.params, scene.sites
    source, target, retain = material.source, material.target, material.retain
    start = identity(apply, params, source.inputs, sites)
    gains = Steering({name: Affine(gain=one.gain) for name, one in start.maps.items()})
    estimator = kfac(apply, Categorical(), select=scene.select)
    curvature = estimate(estimator, params, [retain], key=material.key)

    def learnt(start: Steering, rate: float, steps: int, is_sparse: bool) -> Steering:
        sparsity = Sparsity() if is_sparse else Sparsity(0, 0)
        how = {"start": start, "steps": steps, "learning_rate": rate, "sparsity": sparsity}
        return lineas(apply, params, source, target, **how)[0]

    def edited(damping: float) -> Edit:
        how = {"budget": PRICE, "damping": damping, "ascent": Ascent(steps=1, objective=Lower())}
        return kfade(apply, params, curvature, target, retain, **how)[0]

    return {
        "mean difference": lambda: mean_difference(apply, params, source, target, sites=sites),
        "LinEAS": functools.partial(learnt, start),
        "LinEAS, gains alone": functools.partial(learnt, gains),
        "AUSteer": lambda units: austeer(
            apply, params, *material.pairs, sites=sites, units=units, alpha=1.0
        )[0],
        "K-FADE": edited,
    }


class Moved(NamedTuple):
    """Functions `(what is given, tokens) -> logits`, made once so that each is compiled once."""

    plain: Callable
    steered: Callable


def moved_by(scene: Scene) -> Moved:
    """Return the model as a function of its parameters, and of these with a steering."""

    def on_the_way(given: Any, tokens: Any) -> Any:
        params, steering, strength = given
        return steered(scene.apply, steering, strength)(params, tokens)

    return Moved(scene.apply, on_the_way)


def matched(
    scene: Scene, moved: Moved, one: Steering | Edit, heldout: Batch
) -> tuple[Callable, Any, float]:
    """Return a function of `(what is given, tokens)`, what it is given at the price, and the KL."""
    if isinstance(one, Edit):
        function = moved.plain
        give = lambda s: apply_edit(scene.params, one, s)  # noqa: E731
    else:
        function = moved.steered
        give = lambda s: (scene.params, one, jnp.asarray(s, jnp.float32))  # noqa: E731
    kl = lambda given: output_kl(function, give(0.0), given, heldout)  # noqa: E731
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(TRIES):
        middle = (low + high) / 2
        cost = kl(give(math.exp(middle)))
        low, high = (middle, high) if cost <= PRICE else (low, middle)  # NaN is beyond it
    given = give(math.exp(low))
    return function, given, kl(given)


def measured(
    seed: int, word: str, points: Points, *, judged_by: int, is_quick: bool
) -> dict[str, Any]:
    """Draw a seed's stories, steer by every method at its points, and measure each at the price."""
    scene = make_scene(is_quick=is_quick)
    moved = moved_by(scene)
    for_stories, for_price, for_share, for_curvature = jax.random.split(jax.random.key(seed), 4)
    stories = drawn(scene, moved.plain, scene.params, key=for_stories)
    begins = scene.begins(word, stories)
    target, source = stories[begins >= 0][:ROWS], stories[begins < 0][:ROWS]
    # Stories for the price, and for K-FADE's curvature, are as they come, whatever they name.
    others = drawn(scene, moved.plain, scene.params, key=for_price, draws=1)
    heldout, retain = rows_of(others[0::2][:HELDOUT]), rows_of(others[1::2][:HELDOUT])
    pairs = contrasted(target, begins[begins >= 0][:ROWS], source)
    made = makers(scene, Material(rows_of(source), rows_of(target), pairs, retain, for_curvature))

    def share(function: Callable, given: Any) -> float:
        tokens = drawn(scene, function, given, key=jax.random.clone(for_share), draws=judged_by)
        return float(np.mean(scene.begins(word, tokens) >= 0))

    def judged(name: str, point: dict[str, Any]) -> dict[str, Any]:
        try:
            one = made[name](**point)
        except FloatingPointError:  # LinEAS at a rate too high
            return {"point": point, "kl": math.nan, "is_reached": False, "share": math.nan}
        function, given, kl = matched(scene, moved, one, heldout)
        print(name, point, kl, file=sys.stderr, flush=True)  # noqa: T201
        found = {"point": point, "kl": kl, "is_reached": abs(kl / PRICE - 1) <= NEAR}
        found["share"] = share(function, given) if found["is_reached"] else math.nan
        if isinstance(one, Steering) and all(x.shift is None for x in one.maps.values()):
            edit = fold(scene.apply, scene.params, heldout.inputs, one)
            there = scene.apply(apply_edit(scene.params, edit, given[2]), heldout.inputs)
            found["fold"] = float(jnp.max(jnp.abs(there - function(given, heldout.inputs))))
        return found

    return {
        "word": word,
        "targets": len(target),
        "pairs": len(pairs[0].inputs),
        "untouched": share(moved.plain, scene.params),
        "methods": {name: [judged(name, point) for point in points[name]] for name in points},
    }


def chosen(record: dict[str, Any]) -> Points:
    """Return by method the one point whose share is highest of those that reached the price."""

    def best(points: list[dict[str, Any]]) -> dict[str, Any]:
        reached = [one for one in points if one["is_reached"]]
        return max(reached or points[:1], key=lambda one: one["share"])["point"]

    return {name: [best(points)] for name, points in record["methods"].items()}


def grid_table(record: dict[str, Any]) -> str:
    """Return what every point did on the seed that settings are chosen by."""
    lines = ["| method | settings | share less untouched | KL |", "|---|---|---|---|"]
    for name, points in record["methods"].items():
        for one in points:
            at = ", ".join(f"{key} {value}" for key, value in one["point"].items())
            more = one["share"] - record["untouched"]
            lines.append(f"| {name} | {at} | {more:.3f} | {one['kl']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Choose settings, measure every seed, and print the tables and the differences."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    args = options.parse_args()
    if args.seeds > len(WORDS):
        options.error(f"there are {len(WORDS)} words, one for a seed: got --seeds {args.seeds}")

    def record_of(name: str, given: tuple[int, str, Points], judged_by: int) -> dict[str, Any]:
        path = args.out / f"{NAME}{'-quick' if args.quick else ''}-{name}.json"
        how = {"judged_by": judged_by, "is_quick": args.quick}
        return kept(path, settings(*given, **how), functools.partial(measured, *given, **how))

    grid = record_of("grid", (*CHOOSING, QUICK_GRIDS if args.quick else GRIDS), DRAWS)
    print(grid_table(grid), flush=True)  # noqa: T201
    points = chosen(grid)
    seeds = [record_of(str(i), (i, WORDS[i], points), JUDGED) for i in range(args.seeds)]
    first = {name: [seed["methods"][name][0] for seed in seeds] for name in points}
    untouched = np.array([seed["untouched"] for seed in seeds])
    shares = {name: np.array([x["share"] for x in found]) for name, found in first.items()}
    lines = [
        "",
        "| method | settings | share named, less the untouched model's | at the price | KL |",
        "|---|---|---|---|---|",
    ]
    for name, found in first.items():
        more = known_interval((shares[name] - untouched).tolist())
        kl = known_interval([one["kl"] for one in found])
        count = sum(one["is_reached"] for one in found)
        lines.append(
            f"| {name} | {points[name][0]} | {shown(more)} | {count} of {len(seeds)} "
            f"| {shown(kl)} |"
        )
    lines += ["", "| difference | share | seeds |", "|---|---|---|"]
    differences = {}
    for one, other in PAIRS:
        gap = known_interval((shares[one] - shares[other]).tolist())
        differences[f"{one} - {other}"] = gap
        lines.append(f"| {one} less {other} | {shown(gap)} | {gap['seeds']} |")
    print("\n".join(lines))  # noqa: T201
    words = [(seed["word"], round(seed["untouched"], 3), seed["targets"]) for seed in seeds]
    print(f"\nwords, their shares untouched, and targets: {words}")  # noqa: T201
    folds = [one["fold"] for found in first.values() for one in found if "fold" in one]
    print(f"folds differ by at most {max(folds):.2g}")  # noqa: T201
    write(NAME, args.out, {"grid": grid, "seeds": seeds, "differences": differences})


def settings(
    seed: int, word: str, points: Points, *, judged_by: int, is_quick: bool
) -> dict[str, Any]:
    """Return everything that the numbers of one seed hang on."""
    return {
        "seed": seed, "word": word, "points": points, "price": PRICE, "near": NEAR, "rows": ROWS,
        "heldout": HELDOUT, "draws": DRAWS, "judged": judged_by, "tries": TRIES, "quick": is_quick,
        "contrast": "the same token, nearest",
    }  # fmt: skip


if __name__ == "__main__":
    main()
