"""Attention-Shifting and SAE-guided unlearning on small models with attention."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jedit.core.batch import Batch
from jedit.methods import (
    attention_shifting,
    fit_latents,
    important_tokens,
    sae_guided,
    token_importance,
)
from jedit.models import gpt
from jedit.objectives.attention_shift import shifted
from jedit.tracing import AttentionMaps, Entering
from jedit.training import unlearn

VOCAB, SEQ, WIDTH = 11, 6, 8


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """Optax mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def attend(params, tokens, hidden=None):
    """One block of attention; nobody but itself sees the hidden position."""
    x = params["embed"][tokens] + params["place"][None]
    q, k, v = (x @ params[n] for n in "qkv")
    scores = q @ jnp.swapaxes(k, -1, -2)
    i = jnp.arange(SEQ)
    seen = i[:, None] >= i[None]
    if hidden is not None:
        seen = seen & ((i[None] != hidden) | (i[:, None] == i[None]))
    weights = jax.nn.softmax(jnp.where(seen[None], scores, -jnp.inf), axis=-1)
    return (x + weights @ v) @ params["embed"].T


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 2) for n in "qkv"}
    params["embed"] = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)))
    params["place"] = jnp.asarray(rng.normal(size=(SEQ, WIDTH)))
    tokens = jnp.asarray(rng.integers(0, VOCAB, (5, SEQ)))
    mask = jnp.asarray(np.arange(SEQ)[None] >= np.array([2, 3, 2, 4, 3])[:, None], int)
    valid = jnp.asarray(np.arange(SEQ)[None] < np.array([6, 5, 6, 6, 4])[:, None], int)
    return params, Batch(tokens, jnp.roll(tokens, -1, axis=1), mask, valid)


def test_importance_is_what_a_hidden_token_adds_to_the_entropy(scene, tolerance):
    params, rows = scene

    def entropy(hidden):
        logits = np.asarray(attend(params, rows.inputs, hidden))
        log_p = scipy.special.log_softmax(logits, axis=-1)
        each = -np.sum(np.exp(log_p) * log_p, axis=-1)
        counted = np.asarray(rows.mask * rows.valid).astype(bool)
        return np.array([e[c].mean() for e, c in zip(each, counted, strict=True)])

    expected = np.stack([entropy(j) - entropy(None) for j in range(SEQ)], axis=1)
    # What is asked, but for the first token; not what is answered.
    is_asked = np.array([0 < j < f for f in (2, 3, 2, 4, 3) for j in range(SEQ)]).reshape(5, SEQ)
    expected[~is_asked] = 0
    plain = lambda p, t: attend(p, t)  # noqa: E731
    found = token_importance(plain, params, rows, chunk=2)
    tolerance.check(found, expected)
    # A row without a question is all text; what no counted output sees adds nothing, to the bit.
    text = rows._replace(mask=jnp.asarray(np.arange(SEQ) < 3, int)[None].repeat(5, 0))
    found_in_text = np.asarray(token_importance(plain, params, text))
    is_heard = np.arange(SEQ) == 1
    assert np.all(found_in_text[:, ~is_heard] == 0)
    assert np.sum(found_in_text[:, is_heard] != 0) >= 4  # one row's is below float32's rounding
    marks = np.asarray(important_tokens(found, rows, share=0.5))
    for values, marked, length in zip(expected, marks, [1, 2, 1, 3, 2], strict=True):
        allowed = int(np.ceil(0.5 * length))  # of the tokens that may be hidden
        wanted = [j for j in np.argsort(-values)[:allowed] if values[j] > 1e-12]
        assert sorted(np.flatnonzero(marked)) == sorted(wanted)


def test_attention_turns_away_where_the_facts_are(scene):
    params, rows = scene
    rows = rows._replace(mask=jnp.asarray(np.arange(SEQ)[None] >= [[3], [3], [4], [5], [3]], int))
    forget, retain = (jax.tree.map(lambda x, s=s: x[s], rows) for s in (slice(2), slice(2, 5)))
    plain = lambda p, t: attend(p, t)  # noqa: E731
    method = attention_shifting(optax.adam(0.003), share=0.3)
    after, history = unlearn(
        method, plain, params, forget, retain, steps=200, key=jax.random.key(0)
    )
    assert history["loss"][-1] < 0.3 * history["loss"][0]

    marks = important_tokens(token_importance(plain, params, rows), rows, share=0.3)
    before, now = (AttentionMaps()(plain, p, rows.inputs)[0] for p in (params, after))

    def share(weights, which):
        counted = np.asarray(rows.mask * rows.valid)[which].astype(bool)
        paid = np.sum(np.asarray(weights)[which] * np.asarray(marks)[which][:, None], axis=-1)
        return paid[counted].mean()

    # Nearly all attention on marked tokens cannot be turned away: it is as good as shifted.
    for which, change in ((slice(2), -0.9), (slice(2, 5), 0.9)):
        target = shifted(before, jnp.broadcast_to(marks[:, None], before.shape), change)
        way = share(target, which) - share(before, which)
        assert (way > 0) == (change > 0)
        assert (share(now, which) - share(before, which)) / way > 0.6


def test_a_model_without_attention_is_refused(scene):
    _, rows = scene
    params = {"embed": jnp.ones((VOCAB, 3)), "out": jnp.ones((3, VOCAB))}
    apply = lambda p, t: p["embed"][t] @ p["out"]  # noqa: E731
    method = attention_shifting(optax.sgd(0.1))
    with pytest.raises(ValueError, match="this model forms no attention weights"):
        unlearn(method, apply, params, rows, rows, steps=1, key=jax.random.key(0))


def test_known_entities_come_to_look_unknown():
    apply, params = gpt(
        key=jax.random.key(0), vocab=VOCAB, width=WIDTH, num_layers=2, num_heads=2, max_len=SEQ
    )
    rng = np.random.default_rng(1)

    def rows(first):
        tokens = rng.integers(0, VOCAB, (40, SEQ))
        tokens[:, 1] = first
        mask = np.tile([0, 0, 1, 1, 1, 0], (40, 1))
        return Batch(*map(jnp.asarray, (tokens, np.roll(tokens, -1, axis=1), mask)))

    forget, retain, unknown = rows(2), rows(3), rows(7)
    hidden = Entering("blocks/1/attn/query/kernel")
    latents, info = fit_latents(
        apply, params, hidden, retain, unknown, key=jax.random.key(2), active=4
    )
    assert info.explained_variance > 0.7
    assert info.active <= 4

    def edited(push):
        method = sae_guided(hidden, latents, optax.adam(0.01), push=push)
        given = apply, params, forget, retain
        return unlearn(method, *given, steps=60, key=jax.random.key(3))[0]

    # At the position where the answer is read off: how far from known (0) to unknown (1).
    known, unknown_mean = np.asarray(latents.known), np.asarray(latents.unknown)
    way = (unknown_mean - known) / np.sum((unknown_mean - known) ** 2)

    def come(params):
        z = np.asarray(latents.encode(hidden(apply, params, forget.inputs)))[:, 2]
        return (z - known) @ way, np.linalg.norm(z - unknown_mean, axis=-1).mean()

    places, far = zip(come(params), *(come(edited(push)) for push in (0.0, 1.0)), strict=True)
    # The push is there from the start: single codes lie far from either mean.
    assert np.mean(places[0] < 1) > 0.5
    assert max(far[1:]) < far[0]
    # The pull alone makes codes alike, wherever they are; what is pushed becomes strange.
    assert places[2].mean() > 0.8
    assert places[2].mean() > places[1].mean() + 0.1
    with pytest.raises(ValueError, match="active=33 latents cannot be on of latents=32"):
        fit_latents(apply, params, hidden, retain, unknown, key=jax.random.key(2), active=33)
    with pytest.raises(ValueError, match="known and unknown entities have the same latents"):
        fit_latents(apply, params, hidden, retain, retain, key=jax.random.key(2))
