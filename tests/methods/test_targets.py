"""The search for target values against the same loop written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.edits import apply_edit
from jedit.methods import Associations, Search, rome, target_values
from jedit.tracing import intervene
from tests.methods.test_associations import BOTH, ONE, VOCAB, facts, fit, network, params, stream

__all__ = ["facts", "params"]  # fixtures

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def essence():
    """Other prompts with the subjects at other places, two outputs of each to stay."""
    tokens = jnp.asarray([[1, 2, 0, 6], [4, 1, 3, 3], [6, 6, 5, 2]])
    mask = jnp.zeros((3, 4), bool).at[:, 2:].set(True)
    return Associations(Batch(tokens, None, mask), jnp.asarray([1, 1, 2]))


def value(params, facts, hidden):
    rows = jnp.arange(3), facts.subject
    x = stream(params, facts.batch.inputs, 1)
    return x[rows] if hidden else (x - params["embed"][facts.batch.inputs])[rows]


def with_delta(params, facts, delta):
    """The net with δ added behind its first block."""
    at = jax.nn.one_hot(facts.subject, 4, dtype=delta.dtype)[:, :, None] * delta[:, None]
    x = stream(params, facts.batch.inputs, 1) + at
    seen = jnp.cumsum(x, axis=1) / jnp.arange(1, 5, dtype=x.dtype)[None, :, None]
    block = params["1"]
    h = jnp.tanh(seen @ block["up"])
    x = x + (h @ block["down"]["kernel"] + block["down"]["bias"][None, None])
    return jax.nn.log_softmax(x @ params["head"])


def by_hand(params, facts, essence, hidden, iterations, rate, decay, kl_weight, max_norm, stop):
    v = value(params, facts, hidden)
    norm = jnp.sqrt(jnp.sum(v**2, axis=1))
    answers = facts.batch.targets[:, -1]
    untouched = jax.nn.log_softmax(network(params, essence.batch.inputs))

    def loss(delta):
        nll = -with_delta(params, facts, delta)[jnp.arange(3), -1, answers]
        log_p = with_delta(params, essence, delta)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - untouched), axis=-1)[:, 2:].mean(axis=1)
        # The square root's derivative at zero is taken as zero.
        size = jnp.sqrt(jnp.sum(delta**2, axis=1) + 1e-30)
        rows = nll + kl_weight * kl + decay * size / norm**2
        return jnp.sum(rows), rows

    delta = jnp.zeros_like(v)
    first = second = delta
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    for k in range(1, iterations + 1):
        g, rows = gradient(delta)
        if k == iterations:  # as in the code of ROME and MEMIT, whose last pass takes no step
            break
        before = delta
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        delta = delta - rate * (first / (1 - 0.9**k)) / (jnp.sqrt(second / (1 - 0.999**k)) + 1e-8)
        size = jnp.sqrt(jnp.sum(delta**2, axis=1))
        delta = delta * jnp.minimum(1, max_norm * norm / size)[:, None]
        delta = jnp.where((rows < stop)[:, None], before, delta)
    return v + delta, delta


@pytest.mark.parametrize("hidden", [None, lambda p, t: stream(p, t, 1)])
@pytest.mark.parametrize(("max_norm", "stop"), [(0.4, 0.05), (10.0, 2.2)])
def test_the_search_is_the_loop_by_hand(params, facts, essence, hidden, max_norm, stop, tolerance):
    found, info = target_values(
        network,
        params,
        facts,
        layer=ONE,
        hidden=hidden,
        essence=essence,
        search=Search(7, 0.07, 0.3, 0.6, max_norm, stop),
    )
    args = (hidden, 8, 0.07, 0.3, 0.6, max_norm, stop)
    expected, delta = by_hand(params, facts, essence, *args)
    tolerance.check(found, expected, "factorization")
    log_p = with_delta(params, facts, delta)
    nll = -log_p[jnp.arange(3), -1, facts.batch.targets[:, -1]]
    tolerance.check(info.nll, nll, "factorization")
    if stop < 1:
        assert bool(jnp.all(info.nll < info.nll_before))
    size = jnp.linalg.norm(delta, axis=1) / jnp.linalg.norm(value(params, facts, hidden), axis=1)
    tolerance.check(info.relative_norm, size, "factorization")
    assert float(info.relative_norm.max()) <= max_norm * (1 + 1e-5)


def test_the_defaults_are_those_of_memits_code(params, facts, essence, tolerance):
    """Its `v_num_grad_steps` of 25 and the other figures of its settings for GPT-J."""
    wide = jax.tree.map(lambda x: 3 * x, params)  # where the decay leaves something to search for
    found, _ = target_values(network, wide, facts, layer=ONE, essence=essence)
    code = (None, 25, 0.5, 0.5, 0.0625, 0.75, 0.05)
    expected, delta = by_hand(wide, facts, essence, *code)
    tolerance.check(found, expected, "factorization")
    one_more, _ = by_hand(wide, facts, essence, None, 26, *code[2:])
    assert float(jnp.max(jnp.abs(one_more - expected))) > 1e-3 * float(jnp.max(jnp.abs(delta)))


def test_what_is_found_is_written(params, facts, key, tolerance):
    targets, info = target_values(
        network,
        params,
        facts,
        layer=ONE,
        search=Search(steps=100, weight_decay=0.0, max_norm=100.0),
    )
    assert float(jnp.min(info.nll_before - info.nll)) > 0.8
    assert not np.any(info.kl)
    last = jax.tree.map(lambda x: x[2:], facts)
    edit, _ = rome(network, params, fit(params, key), last, targets[2:], layer=ONE)
    found = value(apply_edit(params, edit), facts, None)[2:]
    tolerance.check(found, targets[2:], "factorization")


def test_essence_keeps_other_answers(params, facts, essence):
    run = lambda k: target_values(  # noqa: E731
        network,
        params,
        facts,
        layer=ONE,
        essence=essence,
        search=Search(weight_decay=0.01, kl_weight=k, max_norm=20.0),
    )[1]
    assert float(run(5.0).kl.mean()) < 0.5 * float(run(0.0).kl.mean())


def test_each_fact_is_searched_for_by_itself(params, facts, essence, tolerance):
    whole, _ = target_values(network, params, facts, layer=BOTH[1], essence=essence)
    row = lambda a, i: jax.tree.map(lambda x: x[i : i + 1], a)  # noqa: E731
    for i in range(3):
        one, _ = target_values(
            network, params, row(facts, i), layer=BOTH[1], essence=row(essence, i)
        )
        tolerance.check(one, whole[i : i + 1], "factorization")


def test_a_value_is_what_the_site_puts_out(params, facts, tolerance):
    """With no step taken, v itself: the site's output and its bias."""
    found, _ = target_values(network, params, facts, layer=ONE, search=Search(steps=0))
    outputs = intervene(network, params, facts.batch.inputs).site_outputs[ONE]
    expected = outputs[jnp.arange(3), facts.subject] + params["0"]["down"]["bias"][None]
    tolerance.check(found, expected)


def test_it_searches_in_float32_for_a_bfloat16_model(params, facts):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    found, info = target_values(network, narrow, facts, layer=ONE, search=Search(max_norm=4.0))
    assert found.dtype == jnp.float32
    assert float(info.nll.mean()) < float(info.nll_before.mean())


def test_mistakes_get_a_sentence(params, facts, essence):
    with pytest.raises(ValueError, match="are the new answers; got None"):
        target_values(network, params, Associations(Batch(facts.batch.inputs)), layer=ONE)
    fewer = jax.tree.map(lambda x: x[:2], essence)
    with pytest.raises(ValueError, match="essence has 2 rows, expected one a fact, 3"):
        target_values(network, params, facts, layer=ONE, essence=fewer)
    with pytest.raises(ValueError, match="must be the matrix of one dense site"):
        target_values(network, params, facts, layer="1/down/bias")
    assert int(facts.batch.inputs.max()) < VOCAB
