"""Causal tracing against the three runs written out, and where the answer's place is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.methods import Corruption, Restoration, causal_trace
from jedit.models import gpt

VOCAB, WIDTH, NUM_LAYERS, BATCH, SEQ = 7, 5, 4, 3, 6
NAMES = [f"layers/{i}" for i in range(NUM_LAYERS)]


def apply(params, tokens):
    h = params["embed"][tokens]
    for i in range(NUM_LAYERS):
        h = h + jnp.tanh(jnp.cumsum(h, axis=1) @ params["layers"][str(i)])
    return h @ params["head"]


def stacked_apply(params, tokens):
    def layer(h, w):
        return h + jnp.tanh(jnp.cumsum(h, axis=1) @ w), None

    return jax.lax.scan(layer, params["embed"][tokens], params["layers"])[0] @ params["head"]


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    layers = {str(i): 0.5 * draw(WIDTH, WIDTH) for i in range(NUM_LAYERS)}
    params = {"embed": draw(VOCAB, WIDTH), "layers": layers, "head": draw(WIDTH, VOCAB)}
    tokens, targets = (jnp.asarray(rng.integers(0, VOCAB, (BATCH, SEQ))) for _ in range(2))
    mask = jnp.asarray([[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]], float)
    subject = jnp.asarray([[0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]], bool)
    return params, Batch(tokens, targets, mask), subject


def by_hand(params, batch, added, put_back, clean=None):
    """The model in NumPy: outputs of its layers, and the answers' probabilities."""
    f64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
    h = f64(params["embed"])[np.asarray(batch.inputs)] + added
    outputs = []
    for i in range(NUM_LAYERS):
        out = np.cumsum(h, axis=1) @ f64(params["layers"][str(i)])
        if clean is not None:
            out = np.where(put_back[i][..., None], clean[i], out)
        outputs.append(out)
        h = h + np.tanh(out)
    logits = h @ f64(params["head"])
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    picked = np.take_along_axis(p, np.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    counted = np.asarray(batch.mask) > 0
    rows = zip(picked, counted, strict=True)
    return outputs, np.array([np.prod(x[c]) ** (1 / c.sum()) for x, c in rows])


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_it_is_the_three_runs_by_hand(scene, key, is_elsewhere, tolerance):
    params, batch, subject = scene
    positions = jnp.roll(subject, 1, axis=1) if is_elsewhere else None
    found = causal_trace(
        apply,
        params,
        batch,
        corruption=Corruption("embed", subject, noise=0.7, samples=2),
        restoration=Restoration(NAMES, window=3, positions=positions),
        key=key,
        chunk=4,
    )
    embedded = np.asarray(params["embed"], np.float64)[np.asarray(batch.inputs)]
    sigma = embedded[np.asarray(subject)].std()
    clean_outputs, clean = by_hand(params, batch, 0.0, None)
    corrupted, restored = [], []
    for sample in range(2):
        draws = [
            jax.random.normal(
                jax.random.fold_in(jax.random.fold_in(jax.random.clone(key), sample), n),
                (SEQ, WIDTH),
            )
            for n in range(BATCH)
        ]
        noise = 0.7 * sigma * np.asarray(jnp.stack(draws), np.float64)
        noise = np.where(np.asarray(subject)[..., None], noise, 0)
        corrupted.append(by_hand(params, batch, noise, None)[1])
        restored.append([])
        for layer in range(NUM_LAYERS):
            is_in = [abs(i - layer) <= 1 for i in range(NUM_LAYERS)]
            where = np.asarray(subject if positions is None else positions)
            put_back = [where & inside for inside in is_in]
            args = (params, batch, noise, put_back, clean_outputs)
            restored[-1].append(by_hand(*args)[1])
    tolerance.check(found.clean, clean)
    tolerance.check(found.corrupted, np.mean(corrupted, axis=0))
    tolerance.check(found.restored, np.mean(restored, axis=0))
    effect = np.mean(restored, axis=0) - np.mean(corrupted, axis=0)
    np.testing.assert_allclose(found.indirect_effect, effect, atol=tolerance.contraction)
    assert np.abs(effect).max() > 0.01


@pytest.mark.parametrize(
    ("window", "row"), [(1, [0, 1, 0, 0]), (2, [1, 1, 0, 0]), (4, [1, 1, 1, 0]), (10, [1] * 4)]
)
def test_windows(scene, key, window, row):
    params, batch, subject = scene
    names = {
        "corruption": Corruption("embed", subject, samples=1),
        "restoration": Restoration(NAMES, window),
    }
    found = causal_trace(apply, params, batch, **names, key=key)
    np.testing.assert_array_equal(found.windows[1], np.array(row, bool))
    assert found.windows.shape == (NUM_LAYERS, NUM_LAYERS)


def test_a_scanned_stack_is_the_layers_one_by_one(scene, key, tolerance):
    params, batch, subject = scene
    stack = params | {"layers": jnp.stack([params["layers"][str(i)] for i in range(NUM_LAYERS)])}
    noisy = {"corruption": Corruption("embed", subject, samples=3)}
    each = {"restoration": Restoration(NAMES, 2), "key": key, "chunk": 1}
    apart = causal_trace(apply, params, batch, **noisy, **each)
    stacked = {"restoration": Restoration("layers", 2), "key": jax.random.clone(key), "chunk": 5}
    whole = causal_trace(stacked_apply, stack, batch, **noisy, **stacked)
    tolerance.check(whole._replace(windows=0), apart._replace(windows=0))


def test_the_layer_that_looks_the_answer_up_is_found(key):
    """Only layer 2 reads the subject; what it writes is all the answer hangs on."""
    rng = np.random.default_rng(1)
    names = [f"layer{i}" for i in range(NUM_LAYERS)]
    params = {name: jnp.asarray(rng.normal(size=(WIDTH, WIDTH))) for name in names}
    params |= {"embed": jnp.asarray(rng.normal(size=(VOCAB, WIDTH)))}
    params |= {"head": jnp.asarray(3 * rng.normal(size=(WIDTH, VOCAB)))}

    def lookup(params, tokens):
        h = params["embed"][tokens]
        other = jnp.broadcast_to(h[:, :1], h.shape)  # the first token is not of the subject
        for i in (0, 1, 3):
            other = other + jnp.tanh(other @ params[names[i]])
        return (jnp.tanh(h @ params["layer2"]) + 0 * other) @ params["head"]

    tokens = jnp.asarray([[1, 2, 3], [4, 5, 6]])
    subject = jnp.asarray([[False, True, True]] * 2)
    mask = subject.astype(jnp.float32)
    batch = Batch(tokens, jnp.argmax(lookup(params, tokens), axis=-1), mask)
    options = {
        "corruption": Corruption("embed", subject),
        "restoration": Restoration(names, window=1),
    }
    found = causal_trace(lookup, params, batch, key=key, **options)
    effect = np.asarray(found.indirect_effect)
    np.testing.assert_allclose(effect[[0, 1, 3]], 0, atol=1e-6)
    np.testing.assert_allclose(found.restored[2], found.clean, rtol=1e-5)
    assert np.all(effect[2] > 0.05)


def test_on_the_transformer_with_padding(key):
    apply, params = gpt(
        key=key, vocab=VOCAB, width=8, num_layers=2, num_heads=2, max_len=SEQ, dtype=jnp.float32
    )
    tokens = jnp.asarray([[1, 2, 3, 4, 0, 0], [1, 5, 6, 2, 3, 4]])
    mask = jnp.asarray([[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]], jnp.float32)
    subject = jnp.asarray([[0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]], bool)
    options = {
        "corruption": Corruption("embed/embedding", subject),
        "restoration": Restoration([f"blocks/{i}/mlp/down/kernel" for i in range(2)], window=1),
    }
    batch = Batch(tokens, tokens, mask)
    found = causal_trace(apply, params, batch, key=jax.random.key(1), **options)
    garbage = jnp.where(jnp.arange(SEQ)[None] < jnp.asarray([[4], [6]]), tokens, 6)
    again = causal_trace(
        apply,
        params,
        Batch(garbage, garbage, mask),
        key=jax.random.key(1),
        **options,
    )
    jax.tree.map(np.testing.assert_array_equal, found, again)
    assert found.restored.shape == (2, 2)


def test_mistakes_get_a_sentence(scene, key):
    params, batch, subject = scene
    noisy, each = Corruption("embed", subject), Restoration(NAMES)
    for mistake in (
        lambda: Restoration([]),
        lambda: Restoration(NAMES, window=0),
        lambda: Corruption("embed", subject, samples=0),
        lambda: causal_trace(
            apply, params, batch, corruption=noisy, restoration=each, key=key, chunk=0
        ),
    ):
        with pytest.raises(ValueError, match="must be at least 1, got 0|needs a layer at least"):
            mistake()
    wrong = Restoration(["layers/9", "layers/0"])
    with pytest.raises(ValueError, match=r"\['layers/9'\] are no sites of this function"):
        causal_trace(apply, params, batch, corruption=noisy, restoration=wrong, key=key)
    square_noisy = dataclasses.replace(noisy, subject=square(subject))
    with pytest.raises(ValueError, match=r"site 'layers/0' does not begin with the axes"):
        causal_trace(
            time_first, params, square(batch), corruption=square_noisy, restoration=each, key=key
        )


def time_first(params, tokens):
    """As `apply`, the layers with time in front."""
    h = params["embed"][tokens].swapaxes(0, 1)
    for i in range(NUM_LAYERS):
        h = h + jnp.tanh(jnp.cumsum(h, axis=0) @ params["layers"][str(i)])
    return h.swapaxes(0, 1) @ params["head"]


def square(batch):
    """As many examples as positions, so that lengths tell nothing."""
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
