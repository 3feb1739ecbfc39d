"""Attribution: a closed form, finite differences, a gate on hidden units, and what is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jedit.core.batch import Batch
from jedit.metrics import Influence, attribution, influence, influence_shift

WIDTH, SEQ, CLASSES, ROWS = 4, 3, 5, 6


def linear(params, inputs):
    return inputs @ params["w"]


def network(params, inputs):
    hidden = jnp.tanh(inputs @ params["in"]["w"] + params["in"]["b"][None, None])
    # Stored the other way round: an axis taken for another one would show.
    return jnp.einsum("bsh,ch->bsc", hidden, params["out"])


def rows(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(SEQ)[None] < rng.integers(1, SEQ + 1, (ROWS, 1))
    mask[2] = False  # a row that counts nothing
    targets = np.where(mask, rng.integers(0, CLASSES, (ROWS, SEQ)), -100)
    return Batch(*map(jnp.asarray, (rng.normal(size=(ROWS, SEQ, WIDTH)), targets, mask)))


def weights(seed=1):
    rng = np.random.default_rng(seed)
    shapes = {"in": {"w": (WIDTH, 7), "b": (7,)}, "out": (CLASSES, 7)}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def numpy_score(logits, row, score):
    log_p = scipy.special.log_softmax(logits, axis=-1)
    counted = np.asarray(row.mask)
    loss = -log_p[counted, np.asarray(row.targets)[counted]].mean()
    return np.exp(-loss) if score == "probability" else -loss


@pytest.mark.parametrize("score", ["probability", "log_probability"])
def test_of_a_linear_softmax_model_it_is_the_closed_form(score, tolerance):
    """A_ij = W_ij P mean_t x_ti (1[j = y_t] - p_tj)."""
    batch, w = rows(), np.random.default_rng(3).normal(size=(WIDTH, CLASSES))
    expected = []
    for x, y, m in zip(*map(np.asarray, batch[:3]), strict=True):
        if not m.any():
            continue
        x, y = x[m], y[m]
        p = scipy.special.softmax(x @ w, axis=-1)
        gradient = np.einsum("ti,tj->ij", x, np.eye(CLASSES)[y] - p) / len(y)
        chance = np.exp(np.log(p[np.arange(len(y)), y]).mean())
        expected.append(w * gradient * (chance if score == "probability" else 1))
    params = {"w": jnp.asarray(w)}
    # The batch split does not matter, nor does what fills the last one up.
    found = attribution(linear, params, split_rows(batch), score=score)
    tolerance.check(found["w"], np.mean(expected, axis=0))
    sums = influence(linear, params, batch, score=score)
    assert sums.parts == ("w",)
    tolerance.check(sums.positive[:, 0], np.maximum(expected, 0).sum(axis=(1, 2)))
    tolerance.check(sums.negative[:, 0], -np.minimum(expected, 0).sum(axis=(1, 2)))


def split_rows(batch):
    for start in (0, 4):
        part = jax.tree.map(lambda x, start=start: x[start : start + 4], batch)
        room = ((0, 4 - len(part.targets)), (0, 0))
        yield Batch(
            jnp.pad(part.inputs, (*room, (0, 0)), constant_values=3),
            jnp.pad(part.targets, room, constant_values=-100),
            jnp.pad(part.mask, room),
        )


def test_it_is_what_a_relative_change_of_one_parameter_does():
    """Central differences of a NumPy model in float64."""
    batch, params = rows(), weights()
    found = attribution(network, params, batch)
    inputs = np.asarray(batch.inputs, np.float64)

    def mean_score(bias, w, out):
        logits = np.tanh(inputs @ w + bias) @ out.T
        known = [n for n in range(ROWS) if batch.mask[n].any()]
        each = [
            numpy_score(logits[n], jax.tree.map(lambda x, n=n: x[n], batch), "probability")
            for n in known
        ]
        return np.mean(each)

    names = ("in/b", "in/w", "out")
    start = [np.asarray(x, np.float64) for x in (params["in"]["b"], params["in"]["w"])]
    start.append(np.asarray(params["out"], np.float64))
    for k, place in ((0, 2), (0, 6), (1, (0, 3)), (1, (3, 1)), (2, (4, 0)), (2, (1, 5))):
        sides = []
        for sign in (1, -1):
            moved = [x.copy() for x in start]
            moved[k][place] *= 1 + sign * 1e-5
            sides.append(mean_score(*moved))
        slope = (sides[0] - sides[1]) / 2e-5
        scale = np.abs(found[names[k]]).max()
        assert found[names[k]][place] == pytest.approx(slope, rel=1e-5, abs=1e-6 * scale)


def test_a_hidden_unit_is_what_a_gate_on_it_does(tolerance):
    """The gate is 1; the derivative along it is h dP/dh, summed over positions."""
    batch, params = rows(), weights()

    def gated(gate, row):
        hidden = jnp.tanh(row.inputs @ params["in"]["w"] + params["in"]["b"][None]) * gate[None]
        log_p = jax.nn.log_softmax(jnp.einsum("sh,ch->sc", hidden, params["out"]))
        picked = jnp.take_along_axis(log_p, jnp.maximum(row.targets, 0)[:, None], axis=1)[:, 0]
        return jnp.exp(jnp.sum(jnp.where(row.mask, picked, 0)) / max(int(row.mask.sum()), 1))

    ones = jnp.ones(7)
    each = jnp.stack([
        jax.grad(gated)(ones, jax.tree.map(lambda x, n=n: x[n], batch))
        for n in range(ROWS)
        if batch.mask[n].any()
    ])  # fmt: skip
    found = attribution(network, params, batch, sites=["out"])
    tolerance.check(found["out"], np.asarray(each).mean(axis=0))
    sums = influence(network, params, batch, sites=["out"])
    tolerance.check(sums.positive[:, 0], np.maximum(each, 0).sum(axis=1))
    with pytest.raises(ValueError, match="'nothing' is no site"):
        influence(network, params, batch, sites=["nothing"])
    tied = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]  # noqa: E731
    square = {"w": jnp.eye(WIDTH)}
    with pytest.raises(ValueError, match="shares its parameter"):
        influence(tied, square, batch._replace(targets=batch.targets % WIDTH), sites=["w"])


def test_the_two_shifts_part_the_fall_of_the_whole(tolerance):
    batch, before, after = rows(), weights(1), weights(2)
    shift = influence_shift(*(influence(network, p, batch) for p in (before, after)))
    sums = [attribution(network, p, batch) for p in (before, after)]
    first = influence(network, before, batch)
    unit = (first.positive + first.negative).sum(axis=1).mean()
    for k, part in enumerate(shift.parts):
        fall = (sums[0][part].sum() - sums[1][part].sum()) / unit
        tolerance.check(shift.erased_by_part[k] + shift.hidden_by_part[k], fall)
    tolerance.check(shift.erased_by_part.sum(), shift.erased.mean())
    tolerance.check(shift.hidden_by_part.sum(), shift.hidden.mean())
    assert len(shift.erased) == ROWS - 1


def test_a_unit_that_turns_against_the_answer_hides_it_and_one_that_is_gone_erased_it(tolerance):
    """Of class 0 against 1 by two inputs: by hand, the one weight away or the other one turned."""
    batch = Batch(jnp.ones((2, 2)), jnp.zeros(2, int))
    start = {"w": jnp.array([[2.0, 0.0], [0.5, 0.0]])}
    away, turned = ({"w": start["w"].at[0, 0].set(x)} for x in (0.0, -2.0))

    def shift(params):
        both = (influence(linear, p, batch, score="log_probability") for p in (start, params))
        return influence_shift(*both)

    erased, hidden = shift(away), shift(turned)
    # A = w (1 - p): the weight that held the answer up is gone, and nothing speaks against it.
    chance = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    whole = 2.5 * (1 - chance(2.5))
    tolerance.check(erased.erased.mean(), 1 - 0.5 * (1 - chance(0.5)) / whole)
    assert erased.hidden.mean() == 0
    tolerance.check(hidden.hidden.mean(), 2 * (1 - chance(-1.5)) / whole)
    assert hidden.hidden.mean() > hidden.erased.mean()


def test_mistakes_get_a_sentence():
    batch, params = rows(), weights()
    with pytest.raises(ValueError, match="score must be 'probability'"):
        influence(network, params, batch, score="odds")
    nothing = batch._replace(mask=jnp.zeros_like(batch.mask))
    for metric in (influence, attribution):
        with pytest.raises(ValueError, match="no row counts"):
            metric(network, params, nothing)
    one, other = (Influence(np.ones((n, 1)), np.ones((n, 1)), ("w",)) for n in (2, 3))
    with pytest.raises(ValueError, match="the same rows and units"):
        influence_shift(one, other)
