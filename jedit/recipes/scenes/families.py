"""The family scene: a small GPT learns families by heart, and perhaps what follows from what.

Trained with much weight decay, such models answer facts of which they have only seen the reverse,
and edits of them carry over to what is entailed; without, neither (Kim et al., 2509.21993).

The model reads who and relation and says who. AdamW as in the paper's code: betas 0.9 and 0.95,
gradients clipped at norm 1, a warm-up of a hundredth and then a cosine, no decay of the norms'
parameters. The decay is optax's, in units of the learning rate.

Differences. The paper's model has 206M parameters, 1,000 families and 97,000 steps, at a rate of
3e-4; rate, steps and sizes here are ours: what takes a minute.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from jedit.core.batch import Batch
from jedit.core.paths import parameter_paths
from jedit.data.invented.families import (
    COMPOSITIONS,
    RELATIONS,
    Facts,
    Families,
    backwards,
    fact_rows,
    make_families,
)
from jedit.metrics import RelationalStructure, accuracy, relational_probe, relational_structure
from jedit.models import gpt
from jedit.objectives import RetainNLL
from jedit.tracing import Entering
from jedit.training import fit

# What enters them is the residual stream behind the embedding, behind each block but the last, and
# behind the last, normalised.
LAYERS = (r"blocks/{}/attn/query/kernel", "head/kernel")
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of probes, in units of the states; arbitrary


class Size(NamedTuple):
    """How large the scene is.

    Attributes:
        families: number of families of ten people, of half of which fathers and mothers are
            withheld.
        width: width of the GPT.
        layers: number of its blocks.
        steps: number of training steps.
        batch_size: number of facts in a step.
    """

    families: int = 100
    width: int = 64
    layers: int = 2
    steps: int = 5000
    batch_size: int = 256


class Training(NamedTuple):
    """How a model of the families is trained.

    Attributes:
        weight_decay: AdamW's, in units of the learning rate; the paper needs 1 or more.
        learning_rate: the highest, after the warm-up; 6e-3 (ours).
        both_ways: whether every fact is also read from its end, with a relation of its own.
    """

    weight_decay: float
    learning_rate: float = 6e-3
    both_ways: bool = False


class Room(NamedTuple):
    """A model that has learned families.

    Attributes:
        families: the families.
        apply: `apply(params, tokens (n, 2)) -> logits`, equal for rooms of one size.
        params: the trained parameters.
    """

    families: Families
    apply: Callable
    params: PyTree

    def said(self, facts: Facts) -> float:
        """Return the share of facts whose object is the model's first answer."""
        return accuracy(self.apply, self.params, fact_rows(facts))


class Probed(NamedTuple):
    """What the best probe finds, chosen on families that it is not judged by.

    Attributes:
        layer: the site whose entering states it reads.
        ridge: its ridge, in units of the states.
        structure: what it answers of further families.
    """

    layer: str
    ridge: float
    structure: RelationalStructure


def room(seed: int, training: Training, size: Size = Size()) -> Room:  # noqa: B008 - a tuple
    """Train on the facts of one seed's families that are not withheld."""
    families = make_families(seed, size.families)
    key = jax.random.key(seed)
    make, order = (jax.random.fold_in(key, i) for i in range(2))
    vocab = len(families.words)
    apply = _apply(vocab, size.width, size.layers)
    initial = _gpt(vocab, size.width, size.layers, make)[1]
    facts = families.facts[~families.is_withheld]
    if training.both_ways:
        facts = np.concatenate([facts, backwards(facts)])
    rows = fact_rows(facts)
    params, _ = fit(
        _Loss(apply),
        _adamw(training, size.steps),
        initial,
        rows,
        epochs=size.steps * min(size.batch_size, len(facts)) / len(facts),
        key=order,
        batch_size=size.batch_size,
    )
    return Room(families, apply, params)


def states_of(found: Room, people: Int[np.ndarray, " n"], layer: str) -> Float[Array, "n d"]:
    """Return what enters a site when the model has read no more than who, a row for each."""
    return Entering(layer)(found.apply, found.params, jnp.asarray(people)[:, None])[:, 0]


def probed(found: Room, *, ridges: tuple[float, ...] = RIDGES) -> Probed:
    """Fit relational probes and judge the best one.

    Of the families without withheld facts, half are what probes are fitted to; on a quarter the
    layer and the ridge are chosen, by the mean over relations of the right answers, and on the last
    quarter the chosen one is judged.

    Raises:
        ValueError: fewer than three families without withheld facts.
    """
    families = found.families
    lost = np.unique(families.family[families.is_withheld])
    whole = np.setdiff1d(np.unique(families.family), lost)
    if len(whole) < 3:
        raise ValueError(
            f"probes are fitted, chosen and judged on families of their own, and {len(whole)} of "
            f"{len(whole) + len(lost)} have no withheld facts; give more families"
        )
    half, quarter = len(whole) // 2, 3 * len(whole) // 4
    fitted, chosen, judged = np.split(whole, [half, quarter])
    best: tuple[float, Any] = (-1.0, None)
    for layer in _layers(found):
        people, facts = _people(families, fitted)
        states = states_of(found, people, layer)
        for ridge in ridges:
            operators = relational_probe(states, facts, num_relations=len(RELATIONS), ridge=ridge)
            direct = _structure(found, operators, layer, chosen).direct.mean()
            if direct > best[0]:
                best = direct, (layer, ridge, operators)
    layer, ridge, operators = best[1]
    return Probed(layer, ridge, _structure(found, operators, layer, judged))


def _structure(found: Room, operators: Any, layer: str, numbers: np.ndarray) -> RelationalStructure:
    people, facts = _people(found.families, numbers)
    states = states_of(found, people, layer)
    return relational_structure(operators, states, facts, compositions=COMPOSITIONS)


def _people(families: Families, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the people of families, and their facts with people counted from 0."""
    facts = families.of(numbers.tolist())
    people, places = np.unique(facts[:, [0, 2]], return_inverse=True)
    places = places.reshape(-1, 2)
    return people, np.stack([places[:, 0], facts[:, 1], places[:, 1]], axis=1)


def _layers(found: Room) -> list[str]:
    number = len(found.params["blocks"])
    return [LAYERS[0].format(i) for i in range(number)] + [LAYERS[1]]


def _gpt(vocab: int, width: int, layers: int, key: Array) -> tuple[Callable, Any]:
    return gpt(key=key, vocab=vocab, width=width, num_layers=layers, num_heads=4, max_len=2)


@functools.cache
def _apply(vocab: int, width: int, layers: int) -> Callable:
    """Return one function a shape, so that the models of several seeds are compiled once."""
    return _gpt(vocab, width, layers, jax.random.key(0))[0]


@functools.cache
def _adamw(training: Training, steps: int) -> optax.GradientTransformation:
    warm_up = max(1, steps // 100)
    rate = optax.warmup_cosine_decay_schedule(0, training.learning_rate, warm_up, steps)
    adamw = optax.adamw(rate, b2=0.95, weight_decay=training.weight_decay, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def _decayed(params: PyTree) -> PyTree:
    names = iter(name for name, _ in parameter_paths(params))
    return jax.tree.map(lambda _: "norm/" not in next(names), params)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The loss of one model, equal by value, so that a second training compiles nothing anew."""

    apply: Callable

    def __call__(self, params: PyTree, rows: Batch) -> tuple[Array, dict[str, Array]]:
        return RetainNLL()(self.apply, params, None, rows)
