"""RepSelect: its collapse by the released formula in NumPy, and a step token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.curvature import Diagonal, estimate, factors, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.methods import CATALOGUE, repselect
from jedit.training import unlearn
from jedit.transforms import shrink_top_directions

D_IN, WIDTH, CLASSES, ROWS = 9, 7, 3, 40


@pytest.fixture(autouse=True)
def _standard_promotion():
    """What optax's optimizers mix, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


ESTIMATOR = kfac(network, Categorical(), select="w|b")


def scene(num_rows=ROWS):
    rng = np.random.default_rng(2)
    shapes = {"w": (D_IN, WIDTH), "b": (WIDTH,), "v": (WIDTH, CLASSES)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x = rng.normal(size=(num_rows, D_IN)) * np.geomspace(3.0, 0.1, D_IN)
    forget = Batch(jnp.asarray(x), jnp.asarray(rng.integers(0, CLASSES, num_rows)))
    return params, forget, estimate(ESTIMATOR, params, [forget], key=jax.random.key(1))


def collapse(moment, k):
    """I - P (I - λ_k S⁻¹) Pᵀ over the top k directions, of those that hold anything."""
    values, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
    least = len(values) * np.finfo(np.asarray(moment).dtype).eps  # of what rounding leaves
    k = min(k, int(np.sum(values > least * values[-1])))
    s, p = values[-k:], vectors[:, -k:]
    return np.eye(len(values)) - p @ np.diag(1 - s[0] / s) @ p.T


@pytest.mark.parametrize(
    ("rank", "share", "k_in", "k_out"),
    [(3, 1.0, 3, 3), (512, 0.5, 5, 3), (512, 0.125, 1, 1), (512, 1.0, D_IN + 1, WIDTH)],
)
def test_updates_are_collapsed_on_both_sides(rank, share, k_in, k_out, tolerance):
    params, _, curvature = scene()
    rng = np.random.default_rng(3)
    u = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    transform = shrink_top_directions(curvature, rank=rank, share=share)
    found, _ = jax.jit(transform.update)(u, transform.init(params), params)
    a, g = factors(curvature, "w")
    matrix = np.concatenate([u["w"], u["b"][None]])
    expected = collapse(a, k_in) @ matrix @ collapse(g, k_out)
    want = {"w": expected[:-1], "b": expected[-1], "v": np.zeros((WIDTH, CLASSES))}
    tolerance.check(found, want, "factorization")
    options = {"rank": rank, "share": share, "uncovered": "identity"}
    transform = shrink_top_directions(curvature, **options)
    tolerance.check(transform.update(u, transform.init(params))[0]["v"], u["v"], "rounding")


def test_directions_that_no_token_has_are_no_floor(tolerance):
    """Of three rows the inputs span three directions; the fourth eigenvalue is rounding."""
    params, forget, curvature = scene(3)
    u = jax.tree.map(jnp.ones_like, params)
    transform = shrink_top_directions(curvature, rank=6, share=1.0)
    found, _ = transform.update(u, transform.init(params), params)
    inputs = np.concatenate([forget.inputs, np.ones((3, 1))], axis=1)
    a, g = (np.asarray(m) for m in factors(curvature, "w"))
    np.testing.assert_allclose(a, inputs.T @ inputs / 3, atol=1e-6)
    expected = collapse(a, 3) @ np.ones((D_IN + 1, WIDTH)) @ collapse(g, 6)
    tolerance.check(found["w"], expected[:-1], "factorization")
    dead = jax.tree.map(jnp.zeros_like, curvature)
    transform = shrink_top_directions(dead)
    alive, _ = transform.update(u, transform.init(params), params)
    assert not np.any(np.isnan(alive["w"]))


@pytest.mark.parametrize(("rate", "share"), [(0.3, 0.5), (0.05, 0.4)])
def test_a_step_is_the_sum_over_tokens_of_collapsed_pairs(rate, share, key, tolerance):
    """Σ (C_A a)(C_G g)ᵀ to unit length, with NPO's gradient where it is that of plain ascent."""
    params, forget, curvature = scene()
    method = repselect(curvature, learning_rate=rate, share=share)._replace(batch_size=ROWS)
    moved, _ = unlearn(method, network, params, forget, forget, steps=1, key=key)
    w, b, v, x = (np.asarray(t, np.float64) for t in (*map(params.get, "wbv"), forget.inputs))
    hidden = np.tanh(x @ w + b)
    p = np.exp(hidden @ v)
    p /= p.sum(axis=1, keepdims=True)
    labels = np.eye(CLASSES)[np.asarray(forget.targets)]
    gradients = -((p - labels) @ v.T) * (1 - hidden**2) / ROWS
    inputs = np.concatenate([x, np.ones((ROWS, 1))], axis=1)
    a, g = factors(curvature, "w")
    c_a, c_g = collapse(a, int(share * (D_IN + 1))), collapse(g, int(share * WIDTH))
    total = sum(np.outer(c_a @ i, c_g @ o) for i, o in zip(inputs, gradients, strict=True))
    step = rate * total / np.linalg.norm(total)
    tolerance.check(moved, {"w": w - step[:-1], "b": b - step[-1], "v": v}, "factorization")


def test_the_rate_is_a_steps_length_however_small_the_gradient(key):
    params, forget, curvature = scene()

    def tiny(apply, params, forget, *_):
        return 1e-30 * jnp.sum(apply(params, forget.inputs) ** 2), {}

    method = repselect(curvature, objective=tiny)
    rate = optax.tree_utils.tree_get(method.optimizer.init(params), "learning_rate")
    assert float(rate) == pytest.approx(0.2)
    for steps, objective in ((1, tiny), (1, lambda _, p, *rest: (0.0 * jnp.sum(p["w"]), {}))):  # noqa: ARG005
        run = method._replace(objective=objective)
        moved, _ = unlearn(
            run, network, params, forget, forget, steps=steps, key=jax.random.clone(key)
        )
        change = [np.asarray(moved[n] - params[n], np.float64).ravel() for n in params]
        length = np.linalg.norm(np.concatenate(change))
        assert length == pytest.approx(0.2 if objective is tiny else 0.0, rel=1e-5)


def test_the_row_has_the_published_figures_and_mistakes_get_a_sentence():
    row = CATALOGUE["RepSelect"]
    assert row.settings == {"beta": 0.1, "rank": 512, "share": 0.125}
    _, _, curvature = scene()
    with pytest.raises(ValueError, match="rank must be at least 1"):
        repselect(curvature, rank=0)
    with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
        repselect(curvature, share=0.0)
    with pytest.raises(ValueError, match="learning_rate must not be negative"):
        repselect(curvature, learning_rate=-1.0)
    blocks = {n: Diagonal(b.weight, jnp.ones((1, 1, 1))) for n, b in curvature.blocks.items()}
    with pytest.raises(ValueError, match="no Kronecker block"):
        shrink_top_directions(type(curvature)(blocks, {}, curvature.num_outputs))
