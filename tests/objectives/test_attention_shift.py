"""The losses on attention and on latents against NumPy, written out token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.objectives import LatentMeans, RetainAttention, SAEGuided, SuppressAttention

BATCH, SEQ, WIDTH = 3, 4, 5


def states(apply, params, x):
    del apply
    return x @ params["w"]


def maps(apply, params, x):
    """Two heads, causal."""
    h = states(apply, params, x)
    scores = jnp.stack([h @ jnp.swapaxes(h, -1, -2), -h @ jnp.swapaxes(x, -1, -2)])
    seen = jnp.tril(jnp.ones((SEQ, SEQ), bool))[None, None]
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    params, reference = ({"w": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)))} for _ in range(2))
    x = jnp.asarray(rng.normal(size=(BATCH, SEQ, WIDTH)))
    mask = jnp.asarray([[0, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]])
    valid = jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    marks = jnp.asarray(rng.random((BATCH, SEQ)) < 0.5)
    return params, reference, Batch(x, mask=mask, valid=valid), marks


def by_hand(params, reference, batch, marks, change):
    now, before = (np.asarray(maps(len, p, batch.inputs)) for p in (params, reference))
    total, number = 0.0, 0
    for n in range(BATCH):
        for i in range(SEQ):
            if not (batch.mask[n, i] and batch.valid[n, i]):
                continue
            for head in range(2):
                target = before[head, n, i] * (1 + change * np.asarray(marks[n], float))
                target = target / target.sum()
                for j in range(i + 1):
                    a = now[head, n, i, j]
                    total += a * np.log(a / target[j])
                number += 1
    return total / number


@pytest.mark.float64  # narrower, some weights are zero, and by hand they are divided by
@pytest.mark.parametrize("strength", [0.9, 0.3])
def test_attention_is_held_against_what_is_shifted(scene, tolerance, strength):
    params, reference, batch, marks = scene
    given = (len, params, (batch, marks))
    loss, aux = SuppressAttention(maps, strength)(*given, None, reference)
    tolerance.check(loss, by_hand(params, reference, batch, marks, -strength))
    assert list(aux) == ["forget_attention_kl"]
    loss, _ = RetainAttention(maps, 2 * strength)(len, params, batch, (batch, marks), reference)
    tolerance.check(loss, by_hand(params, reference, batch, marks, 2 * strength))
    # No gradient reaches the reference; and where nothing is shifted there is nothing to do.
    suppress = lambda r: SuppressAttention(maps, strength)(*given, None, r)[0]  # noqa: E731
    assert not np.any(jax.grad(suppress)(reference)["w"])
    still = RetainAttention(maps, 0.0)(len, params, None, (batch, marks), params)[0]
    np.testing.assert_allclose(still, 0, atol=1e-7)


def test_latents_are_pulled_to_the_unknown_and_pushed_from_the_known(scene, tolerance):
    params, _, batch, _ = scene
    rng = np.random.default_rng(1)
    unknown, known = rng.normal(size=(2, WIDTH))
    means = LatentMeans(jax.nn.relu, jnp.asarray(unknown), jnp.asarray(known), jnp.asarray(5.0))
    z = np.maximum(np.asarray(batch.inputs) @ np.asarray(params["w"]), 0)
    apart = np.sum((unknown - known) ** 2)
    for tokens, rows in (
        ("counted", [(0, 1), (0, 2), (0, 3), (1, 2), (2, 0)]),
        ("first", [(0, 1), (1, 2), (2, 0)]),
    ):
        pull = np.mean([np.sum((z[at] - unknown) ** 2) for at in rows]) / 5
        way = [(z[at] - known) @ (unknown - known) / apart for at in rows]
        push = np.mean([max(0, 1 - s) for s in way])
        loss, aux = SAEGuided(states, means, 0.7, tokens)(len, params, batch)
        tolerance.check(loss, pull + 0.7 * push)
        tolerance.check(aux, {"unknown_distance": pull, "known_nearness": push})
    alone = batch._replace(mask=jnp.zeros_like(batch.mask).at[0, 1].set(1))
    for at, (far, near) in (("known", (1.0, 1.0)), ("unknown", (0.0, 0.0))):
        ends = {"unknown": jnp.asarray(unknown), "known": jnp.asarray(known), at: z[0, 1]}
        distance = jnp.sum((ends["unknown"] - ends["known"]) ** 2)
        _, aux = SAEGuided(states, LatentMeans(jax.nn.relu, distance=distance, **ends))(
            len, params, alone
        )
        tolerance.check(aux, {"unknown_distance": np.array(far), "known_nearness": np.array(near)})


def test_mistakes_get_a_sentence(scene):
    params, reference, batch, marks = scene
    suppress = SuppressAttention(maps)
    with pytest.raises(TypeError, match=r"forget must be \(rows, marks\).*got Batch"):
        suppress(len, params, batch, None, reference)
    with pytest.raises(ValueError, match="needs `reference`"):
        suppress(len, params, (batch, marks))
    with pytest.raises(ValueError, match=r"marks have shape \(3, 2\), expected one a token"):
        suppress(len, params, (batch, marks[:, :2]), None, reference)
    with pytest.raises(ValueError, match="strength must be from 0 to 0.999"):
        SuppressAttention(maps, 1.0)
