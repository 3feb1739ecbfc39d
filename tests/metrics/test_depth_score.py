"""UDS against two layers written out in NumPy, and a GPT's patched stream against two GPTs in one.

Every example's prompt is not patched, and neither is what stands behind its answer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jedit.core.batch import Batch
from jedit.metrics import depth_score
from jedit.models import gpt

VOCAB, WIDTH, ROWS, SEQ = 5, 4, 6, 5
LAYERS = (("embed", "mix/0", "down/0"), ("mix/1", "shift/1", "down/1"))
# The answers' places differ in number, and do not all reach the end.
COUNTED = np.arange(SEQ)[None] < np.array([5, 4, 3, 5, 4, 5])[:, None]
COUNTED &= np.arange(SEQ)[None] >= np.array([1, 2, 2, 4, 1, 0])[:, None]


def network(params, tokens):
    x = params["embed"][tokens]
    seen = jnp.tril(jnp.ones((SEQ, SEQ), x.dtype)) / jnp.arange(1, SEQ + 1).astype(x.dtype)[:, None]
    for i in "01":
        mixed, shift = (seen @ x) @ params["mix"][i], params["shift"][i]
        # The bias of a site, and one that the stream gets by itself.
        x = x + (mixed + shift) if i == "0" else x + mixed + shift
        x = x + jnp.tanh(x @ params["up"][i]) @ params["down"][i]
    return x @ params["head"]


def make(rng, scale=1.0):
    shapes = {"mix": (WIDTH, WIDTH), "shift": (1, 1, WIDTH), "up": (WIDTH, 7), "down": (7, WIDTH)}
    params = {k: {i: scale * rng.normal(size=v) for i in "01"} for k, v in shapes.items()}
    params |= {"embed": rng.normal(size=(VOCAB, WIDTH)), "head": rng.normal(size=(WIDTH, VOCAB))}
    return params


def numpy_run(params, tokens, put=None, layer=None):
    """Logits of one row, and the states behind both layers; `put` stands in layer's at places."""
    x, states = params["embed"][tokens], []
    for i in range(2):
        past = np.array([x[: t + 1].mean(axis=0) for t in range(SEQ)])
        x = x + past @ params["mix"][str(i)] + params["shift"][str(i)][0, 0]
        x = x + np.tanh(x @ params["up"][str(i)]) @ params["down"][str(i)]
        if i == layer:
            places, values = put
            x = np.where(places[:, None], values, x)
        states.append(x)
    return x @ params["head"], states


def numpy_uds(models, tokens, targets, threshold):
    original, *sources = models
    rows, gaps = [], []
    for x, y, places in zip(tokens, targets, COUNTED, strict=True):
        mean = lambda logits, y=y, places=places: np.mean(  # noqa: E731
            scipy.special.log_softmax(logits, axis=-1)[np.arange(SEQ), y][places]
        )
        before = mean(numpy_run(original, x)[0])
        gap = np.zeros((2, 2))
        for m, source in enumerate(sources):
            states = numpy_run(source, x)[1]
            for layer in range(2):
                put = (places, states[layer])
                gap[m, layer] = before - mean(numpy_run(original, x, put, layer)[0])
        over = [layer for layer in range(2) if gap[1, layer] > threshold]
        erased = [gap[1, k] * np.clip(gap[0, k] / gap[1, k], 0, 1) for k in over]
        rows.append(sum(erased) / sum(gap[1, k] for k in over) if over else np.nan)
        gaps.append(gap)
    return np.array(rows), np.array(gaps)


def shown(values):
    """The values with a number in the place of NaN: with it any comparison would hold."""
    return np.nan_to_num(values, nan=-9)


@pytest.fixture
def scene():
    rng = np.random.default_rng(3)
    original, retrained = make(rng, 0.6), make(rng, 0.6)
    edited = jax.tree.map(lambda a, b: 0.6 * a + 0.4 * b, original, retrained)
    models = [original, edited, retrained]
    tokens = rng.integers(0, VOCAB, (ROWS, SEQ))
    # What the original says itself is what it knows; of the last row it knows nothing.
    targets = np.array([numpy_run(original, row)[0].argmax(axis=-1) for row in tokens])
    targets[-1] = numpy_run(original, tokens[-1])[0].argmin(axis=-1)
    batch = Batch(jnp.asarray(tokens), jnp.asarray(targets), jnp.asarray(COUNTED))
    return models, [jax.tree.map(jnp.asarray, x) for x in models], batch


@pytest.mark.parametrize("is_swapped", [False, True])
def test_two_layers_by_hand(scene, tolerance, is_swapped):
    """Swapped, the edited model has forgotten more than the retrained one: the ratio is clipped."""
    models, params, batch = scene
    order = (0, 2, 1) if is_swapped else (0, 1, 2)
    models, params = ([x[i] for i in order] for x in (models, params))
    scores, gaps = numpy_uds(models, np.asarray(batch.inputs), np.asarray(batch.targets), 1.0)
    found = depth_score(network, *params, batch, layers=LAYERS, threshold=1.0)
    tolerance.check(found.edited_gaps, gaps[:, 0])
    tolerance.check(found.retrained_gaps, gaps[:, 1])
    tolerance.check(shown(found.scores), shown(scores))
    tolerance.check(found.mean, np.nanmean(scores))
    # The threshold leaves out a layer, and a row; a gap is negative, or beyond the retrained one.
    is_in = gaps[:, 1] > 1.0
    assert np.isnan(scores[-1])
    assert (is_in.sum(axis=1) == 1).any()
    ours, theirs = gaps[:, 0][is_in], gaps[:, 1][is_in]
    assert (ours > theirs).any() if is_swapped else (ours < 0).any()


def test_rows_do_not_depend_on_their_batch(scene, tolerance):
    _, params, batch = scene
    whole = depth_score(network, *params, batch, layers=LAYERS)
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 4], batch) for i in (0, 2)]
    # The second half's first two rows are filling: they count nothing.
    kept = jnp.arange(4)[:, None] >= 2
    halves[1] = halves[1]._replace(mask=halves[1].mask & kept)
    for one, other in zip(whole, depth_score(network, *params, halves, layers=LAYERS), strict=True):
        tolerance.check(shown(other), shown(one))


def test_the_original_has_zero_and_the_retrained_one(scene):
    _, (original, _, retrained), batch = scene
    run = lambda edited: depth_score(  # noqa: E731
        network, original, edited, retrained, batch, layers=LAYERS
    )
    known = ~np.isnan(run(original).scores)
    assert known.any()
    np.testing.assert_array_equal(run(original).scores[known], 0)
    np.testing.assert_array_equal(run(original).edited_gaps, 0)
    np.testing.assert_array_equal(run(retrained).scores[known], 1)
    nothing = depth_score(network, original, original, original, batch, layers=LAYERS)
    assert np.isnan(nothing.scores).all()
    assert np.isnan(nothing.mean)


def test_a_gpt_patched_everywhere_is_two_gpts_in_one(key, tolerance):
    """Positions, norms and biases included: up to a layer the source's, behind it the other's."""
    sizes = dict(vocab=VOCAB, width=8, num_layers=2, num_heads=2, max_len=SEQ)
    keys = jax.random.split(key, 4)
    apply, original = gpt(key=keys[0], dtype=jnp.zeros(()).dtype, **sizes)
    grown = lambda k: jax.tree.map(  # noqa: E731
        lambda x: x + 0.5 * jax.random.normal(jax.random.fold_in(k, x.size), x.shape, x.dtype),
        original,
    )
    original, edited, retrained = (grown(k) for k in keys[1:])
    tokens = jnp.arange(ROWS * SEQ).reshape(ROWS, SEQ) % VOCAB
    batch = Batch(tokens, (tokens * 3 + 1) % VOCAB)
    writes = [[f"blocks/{i}/attn/out/kernel", f"blocks/{i}/mlp/down/kernel"] for i in range(2)]
    writes[0] = ["positions", *writes[0]]
    found = depth_score(apply, original, edited, retrained, batch, layers=writes)

    @jax.jit
    def loss(params):
        log_p = jax.nn.log_softmax(apply(params, tokens), axis=-1)
        return -jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0].mean(axis=1)

    for layer in range(2):
        for source, gaps in ((edited, found.edited_gaps), (retrained, found.retrained_gaps)):
            blocks = {i: (source if int(i) <= layer else original)["blocks"][i] for i in ("0", "1")}
            both = {**source, "norm": original["norm"], "head": original["head"], "blocks": blocks}
            tolerance.check(gaps[:, layer], loss(both) - loss(original))


def test_refusals(scene):
    _, params, batch = scene
    for layers, message in (
        ((), "one at least in each"),
        ((("embed",), ()), "one at least in each"),
        ((("embed",), ("embed",)), "different sites"),
        ((("embed",), ("nothing",)), r"\['nothing'\] are no sites"),
        ((("embed", "up/0"),), "as the residual stream"),
    ):
        with pytest.raises(ValueError, match=message):
            depth_score(network, *params, batch, layers=layers)
    with pytest.raises(ValueError, match="threshold"):
        depth_score(network, *params, batch, layers=LAYERS, threshold=-1.0)
