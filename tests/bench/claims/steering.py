"""Claims: steering makes a language model name a thing, at a matched price on other stories.

    python -m tests.bench.claims.steering [--seeds 3] [--quick]

1. LinEAS raises the share of stories that name a thing by more than the mean difference does.
2. It raises it by more than AUSteer does.
3. An edit of the weights by K-FADE, towards the stories that name it, does by more than LinEAS.
4. Folded into the weights, a steering costs and does what it did on the way.

The model is the Llama of 260 thousand parameters that tells TinyStories; it needs the extra `llm`.
Each seed draws stories from the model itself, and has a word. The source are stories without it,
the target stories with it, 32 each. Every method's strength is searched until the mean KL on other
stories is `PRICE`, nats per token; what stories drawn then name the word is its share. All methods
draw with one key. Steered are the outputs of the MLPs' last matrices. These have no biases here, so
shifts are made on the way and only gains are folded.
"""

import functools
import math
import os
import tempfile
from collections.abc import Callable
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
from jedit.models import gpt
from jedit.objectives import RetainNLL
from jedit.steering import (
    Sparsity,
    Steering,
    austeer,
    fold,
    identity,
    lineas,
    mean_difference,
    steered,
)
from tests.bench.claims.evidence import interval, kept, parser, shown, write

NAME = "steering"
WORDS = ("ball", "dog", "bird", "cat", "tree")
PRICE = 0.1
ROWS = 32
DRAWS, TRIES = 3, 16
PAIRS = (
    ("LinEAS", "mean difference"),
    ("LinEAS", "AUSteer, 10 units"),
    ("LinEAS", "AUSteer, 100 units"),
    ("LinEAS, gains alone", "AUSteer, 10 units"),
    ("K-FADE, damping 0.1", "LinEAS"),
    ("K-FADE, damping 0.01", "LinEAS"),
)


class Scene(NamedTuple):
    """A model, its sites, and what says whether stories name the word.

    Attributes:
        apply: the model.
        params: its parameters.
        sites: those that are steered.
        names: `(word, tokens) -> (n,)` whether each story names it.
        length: tokens of a story.
        num: stories drawn at a time.
        steps: of LinEAS.
        select: the matrices that K-FADE edits.
    """

    apply: Callable
    params: PyTree
    sites: tuple[str, ...]
    names: Callable[[str, np.ndarray], np.ndarray]
    length: int
    num: int
    steps: int
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
        names = lambda word, tokens: (tokens == 3 + WORDS.index(word)).any(axis=1)  # noqa: E731
        return Scene(apply, params, sites, names, 8, 32, 3, r"blocks/.*/kernel")
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

    def names(word: str, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(
            [word in text.lower() for text in tokenizer.decode_batch(tokens.tolist())]
        )

    return Scene(apply, params, written_layers(params), names, 48, 256, 100, SELECT)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _drawn(moved: Callable, num: int, length: int, given: Any, key: Any) -> Any:
    def step(tokens, at):
        logits = moved(given, tokens)[:, at].astype(jnp.float32)
        token = jax.random.categorical(jax.random.fold_in(key, at), logits)
        return tokens.at[:, at + 1].set(token.astype(tokens.dtype)), None

    start = jnp.zeros((num, length), jnp.int32).at[:, 0].set(1)  # the beginning of a text
    return jax.lax.scan(step, start, jnp.arange(length - 1))[0]


def drawn(scene: Scene, moved: Callable, given: Any, *, key: Any) -> np.ndarray:
    """Return `DRAWS` times `num` stories of a function `(given, tokens) -> logits`."""
    keys = jax.random.split(key, DRAWS)
    parts = [_drawn(moved, scene.num, scene.length, given, one) for one in keys]
    return np.concatenate([np.asarray(part) for part in parts])


def rows_of(tokens: np.ndarray) -> Batch:
    """Return stories as rows, each token the target of what stands before it."""
    targets = np.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    mask = np.ones(tokens.shape, np.float32)
    mask[:, -1] = 0
    return jax.tree.map(jnp.asarray, Batch(tokens, targets, mask))


def contenders(scene: Scene, source: Batch, target: Batch, retain: Batch, seed: int) -> dict:
    """Return by name a steering, or an edit, each of strength one."""
    given = (scene.apply, scene.params, source, target)
    start = identity(scene.apply, scene.params, source.inputs, scene.sites)
    gains = Steering({name: one.__class__(gain=one.gain) for name, one in start.maps.items()})
    found: dict[str, Steering | Edit] = {
        "mean difference": mean_difference(*given, sites=scene.sites)
    }
    how = {"steps": scene.steps}
    found["LinEAS"] = lineas(*given, start=start, **how)[0]
    found["LinEAS, not sparse"] = lineas(*given, start=start, sparsity=Sparsity(0, 0), **how)[0]
    found["LinEAS, gains alone"] = lineas(*given, start=gains, **how)[0]
    num = min(len(source.inputs), len(target.inputs))
    good, bad = (jax.tree.map(lambda x: x[:num], rows) for rows in (target, source))
    for units in (10, 100):
        steering, _ = austeer(
            scene.apply, scene.params, good, bad, sites=scene.sites, units=units, alpha=1.0
        )
        found[f"AUSteer, {units} units"] = steering
    estimator = kfac(scene.apply, Categorical(), select=scene.select)
    curvature = estimate(estimator, scene.params, [retain], key=jax.random.key(seed))
    for damping in (0.01, 0.1):
        ascent = Ascent(steps=1, objective=Lower())
        edit, _ = kfade(
            *(scene.apply, scene.params, curvature, target, retain),
            budget=PRICE,
            damping=damping,
            ascent=ascent,
        )
        found[f"K-FADE, damping {damping:g}"] = edit
    return found


def matched(scene: Scene, one: Steering | Edit, heldout: Batch) -> tuple[Callable, Any, float]:
    """Return a function of `(what is given, tokens)`, what it is given at the price, and the KL."""
    if isinstance(one, Edit):
        give = lambda s: (apply_edit(scene.params, one, s),)  # noqa: E731
        moved = lambda given, tokens: scene.apply(given[0], tokens)  # noqa: E731
    else:
        give = lambda s: (scene.params, one, jnp.asarray(s))  # noqa: E731

        def moved(given: Any, tokens: Any) -> Any:
            return steered(scene.apply, given[1], given[2])(given[0], tokens)

    @jax.jit
    def kl(given: Any) -> Any:
        logs, there = (
            jax.nn.log_softmax(x.astype(jnp.float32))
            for x in (scene.apply(scene.params, heldout.inputs), moved(given, heldout.inputs))
        )
        each = jnp.sum(jnp.exp(logs) * (logs - there), axis=-1) * heldout.mask
        return jnp.sum(each) / jnp.sum(heldout.mask)

    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(TRIES):
        middle = (low + high) / 2
        cost = float(kl(give(math.exp(middle))))
        low, high = (middle, high) if cost <= PRICE else (low, middle)  # NaN is beyond it
    given = give(math.exp(low))
    return moved, given, float(kl(given))


def measured(seed: int, *, is_quick: bool) -> dict[str, Any]:
    """Draw a seed's stories, steer by every method, and measure each at the price."""
    scene, word = make_scene(is_quick=is_quick), WORDS[seed % len(WORDS)]
    keys = jax.random.split(jax.random.key(seed), 2)
    plain = lambda given, tokens: scene.apply(given, tokens)  # noqa: E731
    stories = drawn(scene, plain, scene.params, key=keys[0])
    named = scene.names(word, stories)
    target, source = stories[named][:ROWS], stories[~named][:ROWS]
    # Stories for the price are as they come, whatever they name, and none of them was seen.
    rest = np.concatenate([stories[named][ROWS:], stories[~named][ROWS:]])
    rest = rest[np.random.default_rng(seed).permutation(len(rest))]
    retain, heldout = rows_of(rest[0::2][:64]), rows_of(rest[1::2][:64])
    found: dict[str, Any] = {"word": word, "targets": len(target), "untouched": {}, "folded": {}}
    untouched = drawn(scene, plain, scene.params, key=jax.random.clone(keys[1]))
    found["untouched"] = {"share": float(np.mean(scene.names(word, untouched))), "kl": 0.0}
    made = contenders(scene, rows_of(source), rows_of(target), retain, seed)
    found["methods"] = {}
    for name, one in made.items():
        moved, given, kl = matched(scene, one, heldout)
        tokens = drawn(scene, moved, given, key=jax.random.clone(keys[1]))
        share = float(np.mean(scene.names(word, tokens)))
        found["methods"][name] = {"share": share, "kl": kl}
        if isinstance(one, Steering) and all(x.shift is None for x in one.maps.values()):
            edit = fold(scene.apply, scene.params, heldout.inputs, one)
            there = scene.apply(apply_edit(scene.params, edit, given[2]), heldout.inputs)
            gap = jnp.max(jnp.abs(there - moved(given, heldout.inputs)))
            found["folded"][name] = float(gap)
    return found


def main() -> None:
    """Measure every seed, and print the table and the differences."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    args = options.parse_args()
    kind = "-quick" if args.quick else ""
    settings = {
        "price": PRICE, "rows": ROWS, "draws": DRAWS, "tries": TRIES, "quick": args.quick,
    }  # fmt: skip
    seeds = [
        kept(
            args.out / f"{NAME}{kind}-{seed}.json",
            settings,
            functools.partial(measured, seed, is_quick=args.quick),
        )
        for seed in range(args.seeds)
    ]
    names = list(seeds[0]["methods"])
    shares = {
        name: [seed["methods"][name]["share"] - seed["untouched"]["share"] for seed in seeds]
        for name in names
    }
    lines = ["| method | share named, less the untouched model's | KL |", "|---|---|---|"]
    for name in names:
        kl = interval([seed["methods"][name]["kl"] for seed in seeds])
        lines.append(f"| {name} | {shown(interval(shares[name]))} | {shown(kl)} |")
    lines += ["", "| difference | share |", "|---|---|"]
    differences = {}
    for one, other in PAIRS:
        gaps = np.subtract(shares[one], shares[other]).tolist()
        differences[f"{one} - {other}"] = interval(gaps)
        lines.append(f"| {one} less {other} | {shown(differences[f'{one} - {other}'])} |")
    print("\n".join(lines))  # noqa: T201
    words = [(seed["word"], round(seed["untouched"]["share"], 3)) for seed in seeds]
    print(f"\nwords and their shares untouched: {words}")  # noqa: T201
    print(f"folds differ by at most {max(max(s['folded'].values()) for s in seeds):.2g}")  # noqa: T201
    write(NAME, args.out, {"seeds": seeds, "differences": differences})


if __name__ == "__main__":
    main()
