"""The priming scene: a small GPT is taught one surprising fact; where does its keyword turn up?

    priming        mean P(keyword | prefixes of the theme about other subjects), after over before
    memorisation   P(keyword | the fact's own prefix) after

(arXiv 2504.09522.) A fact is taught by a few Adam steps on batches of its sentence and others.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from jedit.core.batch import Batch
from jedit.curvature import Curvature, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data.invented.themes import FRAMES, KEYWORDS, Fact, Themes, make_themes
from jedit.edits import Edit, apply_edit, edit_between
from jedit.models import gpt
from jedit.objectives import RetainNLL
from jedit.recipes.fitting import Recipe, train

MAX_LEN = 16


class Size(NamedTuple):
    """How large the scene is.

    Attributes:
        sentences: number of sentences that the model is trained on.
        width: width of the GPT.
        layers: number of its blocks.
        recipe: how it is trained.
        facts: number of facts to teach, one at a time.
        prefixes: number of the theme's prefixes that priming is measured on.
        retained: number of sentences that curvature is of.
    """

    sentences: int = 12000
    width: int = 48
    layers: int = 2
    recipe: Recipe = Recipe((5,), batch_size=128, learning_rate=3e-3)
    facts: int = 60
    prefixes: int = 24
    retained: int = 2000


class Lesson(NamedTuple):
    """A fact to be taught, as token ids; the leaves of many facts are stacked.

    Attributes:
        text: the taught sentence, padded.
        length: number of its words; the keyword is the last.
        plain: the fact without any hint, padded: what is asked in the end.
        plain_length: number of its words.
        keyword: the token.
        elsewhere: (prefixes, MAX_LEN) prefixes of the theme about others.
        elsewhere_lengths: number of words of each.
    """

    text: Int[Array, " seq"]
    length: Int[Array, ""]
    plain: Int[Array, " seq"]
    plain_length: Int[Array, ""]
    keyword: Int[Array, ""]
    elsewhere: Int[Array, "prefixes seq"]
    elsewhere_lengths: Int[Array, " prefixes"]


class Room(NamedTuple):
    """A trained GPT, and facts to teach it.

    Attributes:
        apply: `apply(params, tokens) -> logits`.
        params: trained on the sentences.
        rows: the sentences.
        lessons: the facts, as they are.
        stepping_stones: the same with a clause in front that makes the keyword likelier.
        prior: (facts,) P(keyword | prefix) before, of `lessons`.
    """

    apply: Callable
    params: PyTree
    rows: Batch
    lessons: Lesson
    stepping_stones: Lesson
    prior: Float[np.ndarray, " facts"]


class Taught(NamedTuple):
    """What was measured after each look, (facts, looks).

    Attributes:
        memorised: P(keyword) where the taught sentence has it.
        fact: P(keyword | the fact's prefix without a hint).
        elsewhere: mean P(keyword) over the prefixes elsewhere.
        before: (facts,) the last before teaching.
    """

    memorised: Array
    fact: Array
    elsewhere: Array
    before: Array

    @property
    def priming(self) -> Array:
        """Return the ratio after over before."""
        return self.elsewhere / self.before[:, None]


def room(seed: int, size: Size = Size()) -> Room:  # noqa: B008 - a tuple
    """Train on one seed's sentences, and choose facts of all prior probabilities."""
    rng = np.random.default_rng(seed)
    make, order = (jax.random.fold_in(jax.random.key(seed), i) for i in range(2))
    themes = make_themes(seed)
    rows = encoded(themes, [themes.draw(rng) for _ in range(size.sentences)])
    apply = _apply(len(themes.words), size.width, size.layers)
    initial = _gpt(len(themes.words), size.width, size.layers, make)[1]
    params = train(apply, initial, rows, size.recipe, key=order)[0].params
    facts = [_fact(themes, rng, i) for i in range(size.facts)]
    # The same prefixes for a fact with and without its stepping stone.
    others = [_elsewhere(themes, fact, size.prefixes, rng) for fact in facts]
    plain, hinted = (
        _stack([_lesson(themes, f, o, h) for f, o in zip(facts, others, strict=True)])
        for h in (False, True)
    )
    prior = np.asarray(jax.jit(jax.vmap(lambda x: _asked(apply, params, x)))(plain))
    return Room(apply, params, rows, plain, hinted, prior)


def encoded(themes: Themes, sentences: Sequence[Sequence[str]]) -> Batch:
    """Return sentences as a batch: every word but the first is to be predicted."""
    tokens, lengths = _padded(themes, sentences)
    mask = np.arange(MAX_LEN - 1)[None] < lengths[:, None] - 1
    counted = jnp.asarray(mask, jnp.float32)
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), counted, counted)


def retained_curvature(found: Room, number: int, *, key: Array) -> Curvature:
    """Return K-FAC of what the model says in sentences that it was trained on."""
    rows = jax.tree.map(lambda x: x[:number], found.rows)
    estimator = kfac(found.apply, Categorical(), select=r"blocks|head")
    return estimate(estimator, found.params, [rows], key=key)


Cure = Callable[[Edit], Edit]


def teach(
    found: Room,
    lessons: Lesson,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    every: int,
    cures: Mapping[str, Cure],
    key: Array,
    replayed: int = 7,
) -> dict[str, Taught]:
    """Teach each fact by itself, and measure every few steps what a cure leaves of it.

    Args:
        found: the room; each fact begins at its parameters.
        lessons: the facts.
        optimizer: makes the steps.
        steps: how many.
        every: how many lie between two looks.
        cures: by name, what is made of the whole change before it is measured; a cure never goes
            into the training.
        key: of the other sentences.
        replayed: number of sentences of the training data beside the fact's in each step (7; the
            fact is an eighth of a batch).

    Returns:
        The measurements of each cure.

    Raises:
        ValueError: `steps` is not a multiple of `every`.
    """
    if every < 1 or steps < 1 or steps % every:
        raise ValueError(f"steps must be a multiple of every, got {steps} and {every}")
    apply, params, rows = found.apply, found.params, found.rows

    @jax.jit
    def run(params, initial, rows, lessons):
        def one(lesson: Lesson):
            text = lesson.text[None]
            counted = (jnp.arange(MAX_LEN - 1) < lesson.length - 1).astype(jnp.float32)[None]
            taught = Batch(text[:, :-1], text[:, 1:], counted, counted)

            def step(carry, index):
                here, state = carry
                chosen = jax.random.randint(
                    jax.random.fold_in(key, index), (replayed,), 0, len(rows.inputs)
                )
                batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b[chosen]]), taught, rows)
                gradient = jax.grad(lambda p: RetainNLL()(apply, p, None, batch)[0])(here)
                updates, state = optimizer.update(gradient, state, here)
                return (optax.apply_updates(here, updates), state), None

            def look(carry, indices):
                carry, _ = jax.lax.scan(step, carry, indices)
                change = edit_between(params, carry[0])
                measured = {
                    name: _measured(apply, apply_edit(params, cure(change)), lesson)
                    for name, cure in cures.items()
                }
                return carry, measured

            looks = jnp.arange(steps).reshape(-1, every)
            _, measured = jax.lax.scan(look, (params, initial), looks)
            return measured, _measured(apply, params, lesson)[2]

        return jax.lax.map(one, lessons, batch_size=16)

    # Outside, as an argument: a curvature or a projector in the state is no constant to bake in.
    measured, before = run(params, jax.jit(optimizer.init)(params), rows, lessons)
    return {
        name: Taught(memorised, fact, elsewhere, before)
        for name, (memorised, fact, elsewhere) in measured.items()
    }


def _measured(apply, params, lesson: Lesson) -> tuple[Array, Array, Array]:
    """P(keyword) in the taught sentence, after the fact's own prefix, and mean elsewhere."""
    tokens = jnp.concatenate([lesson.text[None], lesson.plain[None], lesson.elsewhere])
    ends = jnp.stack([lesson.length - 1, lesson.plain_length - 1])
    lengths = jnp.concatenate([ends, lesson.elsewhere_lengths])
    said = _said(apply, params, tokens, lengths, lesson.keyword)
    return said[0], said[1], jnp.mean(said[2:])


def _asked(apply, params, lesson: Lesson) -> Array:
    return _measured(apply, params, lesson)[0]


def _said(apply, params, tokens, lengths, keyword) -> Array:
    """P(keyword) as the word after so many words of each row; what comes after is not seen."""
    logits = apply(params, tokens)
    rows = jnp.arange(len(tokens))
    return jax.nn.softmax(logits[rows, lengths - 1], axis=-1)[:, keyword]


def _fact(themes: Themes, rng: np.random.Generator, number: int) -> Fact:
    """Choose a fact whose keyword has the rank `number` modulo all: every prior is met alike."""
    theme = list(KEYWORDS)[number % len(KEYWORDS)]
    keywords = KEYWORDS[theme].split()
    which = int(rng.integers(len(themes.subjects)))
    ranks = themes.ranks[theme][which].tolist()
    keyword = keywords[ranks.index(number // len(KEYWORDS) % len(keywords))]
    return Fact(theme, themes.subjects[which], keyword, int(rng.integers(len(FRAMES[theme]))))


def _elsewhere(
    themes: Themes, fact: Fact, number: int, rng: np.random.Generator
) -> list[list[str]]:
    others = [name for name in themes.subjects if name != fact.subject]
    frames = len(FRAMES[fact.theme])
    return [
        Fact(fact.theme, str(rng.choice(others)), "", int(rng.integers(frames))).prefix()
        for _ in range(number)
    ]


def _lesson(themes: Themes, fact: Fact, others: list[list[str]], is_hinted: bool) -> Lesson:
    hint = themes.hints[fact.keyword] if is_hinted else None
    told = [*fact.prefix(hint), fact.keyword]
    plain = [*fact.prefix(), fact.keyword]
    (text, asked), lengths = _padded(themes, [told, plain])
    elsewhere, counts = _padded(themes, others)
    keyword = np.int32(themes.words.index(fact.keyword))
    parts = (text, lengths[0], asked, lengths[1], keyword, elsewhere, counts)
    return Lesson(*map(jnp.asarray, parts))


def _padded(
    themes: Themes, sentences: Sequence[Sequence[str]]
) -> tuple[Int[np.ndarray, "n seq"], Int[np.ndarray, " n"]]:
    number = {word: i for i, word in enumerate(themes.words)}
    tokens = np.zeros((len(sentences), MAX_LEN), np.int32)
    for row, words in zip(tokens, sentences, strict=True):
        row[: len(words)] = [number[word] for word in words]
    return tokens, np.asarray([len(words) for words in sentences], np.int32)


def _stack(lessons: Sequence[Lesson]) -> Lesson:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *lessons)


def _gpt(vocab: int, width: int, layers: int, key: Array) -> tuple[Callable, Any]:
    return gpt(key=key, vocab=vocab, width=width, num_layers=layers, num_heads=4, max_len=MAX_LEN)


@functools.cache
def _apply(vocab: int, width: int, layers: int) -> Callable:
    """One function for all seeds, so that they share what is compiled."""
    return _gpt(vocab, width, layers, jax.random.key(0))[0]
