"""FIT's filter, importance and choice of layers, each by another way; and its training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core import row_blocks
from jedit.core.batch import Batch
from jedit.methods import (
    distinct_requests,
    fit_unlearning,
    graded_rows,
    gradient_importance,
    influential_layers,
)
from jedit.methods.trained.fit import _masked_loss
from jedit.models import gpt
from jedit.objectives import Importance
from jedit.training import unlearn
from tests.objectives.references import numpy_counted

VOCAB, SEQ = 11, 6


# What a layer is worth is compared with a shorter model's loss.
pytestmark = pytest.mark.float64


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def model():
    key = jax.random.key(3)
    sizes = {"vocab": VOCAB, "width": 8, "num_layers": 3, "num_heads": 2, "max_len": SEQ}
    apply, params = gpt(key=key, **sizes, dtype=jnp.float64)

    def shaken(p):
        return p + 0.3 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape)

    return apply, jax.tree.map(shaken, params)


def rows(seed, count=7):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, SEQ + 1, count)
    valid = np.arange(SEQ)[None] < lengths[:, None]
    mask = valid & (np.arange(SEQ)[None] > 0)
    tokens, targets = rng.integers(0, VOCAB, (2, count, SEQ))
    return Batch(*map(jnp.asarray, (tokens, targets, mask, valid)))


def mean_loss(outputs, batch):
    """Per row, by NumPy's order of things: no shared code with the method."""
    log_p = jax.nn.log_softmax(outputs)
    nll = -jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
    counted = jnp.asarray(numpy_counted(batch)).astype(float)
    return jnp.sum(nll * counted, axis=1) / jnp.sum(counted, axis=1)


def test_importance_is_the_gradient_where_a_row_has_been_embedded(model, tolerance):
    """A table of the row's own for every position: its gradient is that of the embeddings."""
    apply, params = model
    batch = rows(0)
    expected = []
    for i in range(len(batch.targets)):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)

        def loss(table, one=one):
            # Position s reads row s of a table made for it alone.
            own = params | {"embed": {"embedding": table}}
            numbers = jnp.arange(SEQ)[None]
            return mean_loss(apply(own, numbers), one)[0]

        table = jnp.zeros((VOCAB, 8)).at[:SEQ].set(params["embed"]["embedding"][one.inputs[0]])
        expected.append(np.linalg.norm(np.asarray(jax.grad(loss)(table))))
    tolerance.check(gradient_importance(apply, params, batch), np.array(expected))
    # Where positions have a table too, it is the tokens' that counts.
    small = {"table": params["embed"]["embedding"], "places": jnp.ones((SEQ, 8))}
    small["out"] = jax.random.normal(jax.random.key(4), (8, VOCAB))

    def twice(p, tokens):
        places = jnp.broadcast_to(jnp.arange(SEQ), tokens.shape)
        return jnp.tanh(p["table"][tokens] + 2 * p["places"][places]) @ p["out"]

    def by_hand(embedded, one):
        outputs = jnp.tanh(embedded + 2 * small["places"][None]) @ small["out"]
        return mean_loss(outputs, one)[0]

    expected = []
    for i in range(len(batch.targets)):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        slope = jax.grad(by_hand)(small["table"][one.inputs], one)
        expected.append(np.linalg.norm(np.asarray(slope)))
    tolerance.check(gradient_importance(twice, small, batch), np.array(expected))
    # Of inputs that are no tokens, the gradient at them.
    linear = lambda p, x: x @ p["w"]  # noqa: E731
    x = jax.random.normal(jax.random.key(1), (4, 3))
    w = {"w": jax.random.normal(jax.random.key(2), (3, 5))}
    plain = Batch(x, jnp.array([0, 2, 4, 1]))
    slope = (jax.nn.softmax(x @ w["w"]) - jax.nn.one_hot(plain.targets, 5)) @ w["w"].T
    tolerance.check(
        gradient_importance(linear, w, plain), np.linalg.norm(np.asarray(slope), axis=1)
    )


def test_rows_are_graded_by_thirds_and_the_rest_is_data(model, key):
    apply, params = model
    batch = rows(1, 9)
    graded = graded_rows(apply, params, batch, key=key)
    order = np.argsort(np.asarray(gradient_importance(apply, params, batch)))
    found = np.asarray(graded.importance)
    np.testing.assert_array_equal(found[order], np.repeat(list(Importance), 3))
    counted = numpy_counted(batch)
    assert np.all((graded.labels != batch.targets)[counted])


def test_rows_that_count_nothing_and_lone_rows_move_no_third(model, key, monkeypatch):
    apply, params = model
    batch = rows(1, 9)
    # Three more that count nothing.
    empty = jax.tree.map(lambda x: x[:3], batch)._replace(mask=jnp.zeros((3, SEQ), bool))
    more = jax.tree.map(lambda *x: jnp.concatenate(x), batch, empty)
    graded = graded_rows(apply, params, batch, key=key)
    found = graded_rows(apply, params, more, key=jax.random.clone(key))
    np.testing.assert_array_equal(found.importance[:9], graded.importance)
    np.testing.assert_array_equal(found.importance[9:], Importance.MIDDLE)
    one = graded_rows(apply, params, jax.tree.map(lambda x: x[:1], batch), key=key)
    assert one.importance.tolist() == [Importance.MIDDLE]
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(ValueError, match="importance"):
        graded_rows(apply, broken, batch, key=key)
    with pytest.raises(ValueError, match="loss"):
        influential_layers(apply, broken, batch)
    # In blocks of three rows, as of a large vocabulary.
    whole = gradient_importance(apply, params, batch)
    monkeypatch.setattr(row_blocks, "MOST_BYTES", 4 * 3 * SEQ * VOCAB)
    np.testing.assert_allclose(gradient_importance(apply, params, batch), whole, rtol=1e-9)


def test_importance_is_summed_wide(model):
    apply, params = model
    batch = rows(0)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert gradient_importance(apply, narrow, batch).dtype == jnp.float32


def test_layers_are_chosen_by_the_loss_without_them(model, tolerance):
    """A block is skipped by leaving it out of the stack, renumbered, not by zeros."""
    apply, params = model
    batch = rows(2)
    counted = numpy_counted(batch)

    def loss(outputs):
        log_p = jax.nn.log_softmax(outputs)
        nll = -jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
        return float(jnp.sum(jnp.where(counted, nll, 0)) / counted.sum())

    sizes = {"vocab": VOCAB, "width": 8, "num_heads": 2, "max_len": SEQ, "dtype": jnp.float64}
    shorter, _ = gpt(key=jax.random.key(0), num_layers=2, **sizes)
    whole, effects = loss(apply(params, batch.inputs)), []
    blocks = params["blocks"]
    names = sorted(blocks)
    for gone in names:
        left = [blocks[name] for name in names if name != gone]
        kept = params | {"blocks": dict(zip(names[:2], left, strict=True))}
        without = loss(shorter(kept, batch.inputs))
        number = {
            name: jax.tree.map(lambda _, name=name, gone=gone: int(name == gone), block)
            for name, block in blocks.items()
        }
        numbers = jax.tree.map(lambda _: 0, params) | {"blocks": number}
        tolerance.check(_masked_loss(apply, params, batch, numbers, 1), without)
        effects.append(abs(without - whole))
    order = np.argsort(effects)[::-1]
    assert len(set(np.round(effects, 6))) == 3
    expected = tuple(f"blocks/{names[i]}" for i in order)
    assert influential_layers(apply, params, batch) == expected
    assert influential_layers(apply, params, batch, layers=2) == expected[:2]


def test_only_the_chosen_layers_are_trained_and_rows_fare_by_their_grade(model, key):
    apply, params = model
    batch, retain = rows(3, 9), rows(4, 12)
    method = fit_unlearning(apply, params, batch, optax.adam(1e-2), layers=1)
    graded = graded_rows(apply, params, batch, key=key)
    given = (method, apply, params, graded, retain)
    after, history = unlearn(*given, steps=30, key=jax.random.clone(key))
    (name,) = influential_layers(apply, params, batch, layers=1)
    number = name.split("/")[1]
    for other, block in after["blocks"].items():
        same = all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(block), jax.tree.leaves(params["blocks"][other]), strict=True
            )
        )
        assert same == (str(other) != number)
    for rest in ("embed", "positions", "norm", "head"):
        jax.tree.map(np.testing.assert_array_equal, after[rest], params[rest])
    assert history["forget_nll"][-1] > history["forget_nll"][0] + 1
    assert history["relabelled_nll"][-1] < history["relabelled_nll"][0]


def test_what_repeats_a_kept_request_is_left_out_unless_the_loss_says_otherwise():
    embeddings = np.array([[1, 0], [2, 0.1], [0, 1], [1, 0.05], [0, 3.0], [-1, 0.0]])
    losses = np.array([0.5, 0.52, 0.5, 3.0, 0.51, 0.5])
    found = distinct_requests(embeddings, losses, similarity=0.9, tolerance=0.1)
    # 1 and 4 repeat 0 and 2; 3 looks like 0, but the mean loss of both would be 1.25 above it.
    np.testing.assert_array_equal(found, [True, False, True, True, False, True])
    assert distinct_requests(embeddings, losses, tolerance=0.0).all()
    np.testing.assert_array_equal(
        distinct_requests(embeddings, losses, tolerance=9.0),
        [True, False, True, False, False, True],
    )
    with pytest.raises(ValueError, match=r"got \(6,\) and \(6,\)"):
        distinct_requests(losses, losses)
