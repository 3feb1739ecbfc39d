"""RepSelect: its collapse by the released formula in NumPy, and a step token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core import row_blocks
from jedit.core.batch import Batch
from jedit.curvature import Diagonal, estimate, factors, kfac, solve
from jedit.curvature.likelihoods import Categorical
from jedit.data import batches
from jedit.methods import CATALOGUE, repselect, repselect_moments
from jedit.objectives import GA, NPO, RetainNLL
from jedit.requests import Refit, unlearn_refitted
from jedit.training import LoopState, unlearn
from jedit.training.freezing import which_are_trained
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


@pytest.mark.parametrize("k", [1, 3, 6])
def test_it_is_the_inverse_of_kfac_with_its_eigenvalues_floored(k, tolerance):
    """C_A U C_G = λ_k(A) λ_k(G) (max(A, λ_k) ⊗ max(G, λ_k))⁻¹ U: by `solve`, dense, by C."""
    params, _, curvature = scene()
    rng = np.random.default_rng(7)
    u = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    transform = shrink_top_directions(curvature, rank=k, share=1.0)
    found, _ = transform.update(u, transform.init(params), params)
    floors, floored = {}, {}
    for name, factor in curvature.factors.items():
        least = jnp.sort(factor.eigenvalues, axis=1)[:, -k]
        floors[name] = float(least[0])
        values = jnp.maximum(factor.eigenvalues, least[:, None])
        floored[name] = dataclasses.replace(factor, eigenvalues=values)
    block = curvature.blocks["w"]
    scale = floors[block.input] * floors[block.output]
    inverse = solve(dataclasses.replace(curvature, factors=floored), u, damping=0.0, absolute=True)
    for name in ("w", "b"):
        tolerance.check(found[name], scale * np.asarray(inverse[name]), "factorization")
    dense = []
    for m in factors(curvature, "w"):
        values, q = np.linalg.eigh(np.asarray(m, np.float64))
        dense.append(q @ np.diag(np.maximum(values, values[-k])) @ q.T)
    matrix = np.concatenate([u["w"], u["b"][None]]).ravel()
    expected = scale * np.linalg.solve(np.kron(*dense), matrix).reshape(D_IN + 1, WIDTH)
    tolerance.check(found["w"], expected[:-1], "factorization")
    a, g = factors(curvature, "w")
    formula = collapse(a, k) @ matrix.reshape(D_IN + 1, WIDTH) @ collapse(g, k)
    tolerance.check(found["w"], formula[:-1], "factorization")


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


def by_hand(params, forget, weights):
    """Inputs and output gradients of the first matrix, token by token, of Σ weights NLL."""
    w, b, v, x = (np.asarray(t, np.float64) for t in (*map(params.get, "wbv"), forget.inputs))
    hidden = np.tanh(x @ w + b)
    p = np.exp(hidden @ v)
    p /= p.sum(axis=1, keepdims=True)
    labels = np.eye(CLASSES)[np.asarray(forget.targets)]
    return x, weights[:, None] * ((p - labels) @ v.T) * (1 - hidden**2), p


@pytest.mark.parametrize("cut", [(40,), (25, 15), "batches", "blocks"])
def test_the_trainers_moments_are_centred_and_of_the_objective(cut, key, tolerance, monkeypatch):
    """NPO's, away from its reference, where each row has a weight of its own; any cut of rows.

    `batches` fills the last one up with empty rows; and of large outputs NPO sees blocks of rows.
    """
    params, forget, curvature = scene()
    reference = jax.tree.map(lambda p: 0.7 * p, params)
    fresh = lambda params, x: network(params, x)  # noqa: E731 - so that it is traced anew
    nll = lambda p: -np.log(by_hand(p, forget, np.ones(ROWS))[2][range(ROWS), forget.targets])  # noqa: E731
    beta = 0.9
    weights = 2 / (1 + np.exp(beta * (nll(params) - nll(reference))))
    assert weights.max() > 1.2 * weights.min()
    x, g, _ = by_hand(params, forget, weights)
    if isinstance(cut, str):
        rows = list(batches(forget, 32))
        assert len(rows[-1].targets) == 32
        if cut == "blocks":
            monkeypatch.setattr(row_blocks, "MOST_BYTES", 100)
    else:
        ends = np.cumsum([0, *cut])
        slices = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
        rows = [jax.tree.map(lambda t, part=part: t[part], forget) for part in slices]
    given = {"objective": NPO(beta=beta), "reference": reference, "select": "w|b"}
    found = repselect_moments(fresh, params, rows, key=key, **given)
    a, outer = (np.asarray(m, np.float64) for m in factors(found, "w"))
    tolerance.check(a[:-1, :-1], np.cov(x.T, bias=True), "factorization")
    assert not np.any(a[-1]), "a constant does not vary"
    assert not np.any(a[:, -1])
    tolerance.check(outer, np.cov(g.T, bias=True), "factorization")
    assert found.blocks.keys() == curvature.blocks.keys()


def test_at_the_reference_they_are_the_given_labels_centred(key, tolerance):
    params, forget, _ = scene()
    found = repselect_moments(network, params, [forget], key=key, select="w|b")
    estimator = kfac(network, Categorical(), select="w|b", fisher="empirical", centred=True)
    expected = estimate(estimator, params, [forget], key=jax.random.clone(key))
    tolerance.check(factors(found, "w"), factors(expected, "w"), "factorization")
    sampled = kfac(network, Categorical(), select="w|b", samples=2, centred=True)
    drawn = estimate(sampled, params, [forget], key=jax.random.clone(key))
    plain = kfac(network, Categorical(), select="w|b", samples=2)
    about_zero = estimate(plain, params, [forget], key=jax.random.clone(key))
    less = np.linalg.eigvalsh(np.asarray(factors(about_zero, "w")[1] - factors(drawn, "w")[1]))
    assert less[-1] > 0  # the mean's square, of rank one
    assert np.abs(less[:-1]).max() < 1e-5 * less[-1]
    with pytest.raises(ValueError, match="centred moments are of labels that are drawn or given"):
        kfac(network, Categorical(), fisher="exact", centred=True)


def test_refitted_moments_are_those_of_the_params_reached(key):
    """In two parts by hand; and with moments that stay it is `unlearn` itself."""
    params, forget, curvature = scene()
    make = lambda c: repselect(c, learning_rate=0.4, share=0.5)  # noqa: E731

    def moments(params, reference):
        given = {"reference": reference, "select": "w|b", "key": jax.random.key(0)}
        return repselect_moments(network, params, [forget], **given)

    run = {"steps": 5, "key": key}
    found, history = unlearn_refitted(make, network, params, forget, refit=Refit(moments, 3), **run)
    assert history["loss"].shape == (5,)
    begin = make(moments(params, params))
    once, _ = unlearn(begin, network, params, forget, steps=5, key=jax.random.clone(key))
    part, _ = unlearn(begin, network, params, forget, steps=3, key=jax.random.clone(key))
    assert np.abs(found["w"] - once["w"]).max() > 1e-4, "the moments were not taken anew"
    last, first = moments(part, params), moments(params, params)
    assert np.abs(factors(last, "w")[1] - factors(first, "w")[1]).max() > 0
    # The fourth step by a method of the moments at the third: its optimizer has no other state.
    then = make(last)
    start = LoopState(3, part, then.optimizer.init({**part, "v": None}), params)
    by_hand_end, _ = unlearn(then, network, start, forget, steps=5, key=jax.random.clone(key))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, by_hand_end)
    none, _ = unlearn_refitted(
        make, network, params, forget, refit=Refit(moments, 3), steps=0, key=jax.random.clone(key)
    )
    jax.tree.map(np.testing.assert_array_equal, none, params)
    fixed = Refit(lambda *_: curvature, 2)
    whole, _ = unlearn_refitted(
        make, network, params, forget, refit=fixed, steps=5, key=jax.random.clone(key)
    )
    plain, _ = unlearn(make(curvature), network, params, forget, steps=5, key=jax.random.clone(key))
    jax.tree.map(np.testing.assert_array_equal, whole, plain)


def test_steps_leave_the_retain_loss_to_first_order(key):
    params, forget, curvature = scene()
    rng = np.random.default_rng(11)
    x = jnp.asarray(rng.normal(size=(ROWS, D_IN)))
    retain = Batch(x, jnp.asarray(rng.integers(0, CLASSES, ROWS)))
    loss = lambda p: RetainNLL()(network, p, None, retain)[0]  # noqa: E731
    gradient = np.asarray(jax.grad(loss)(params)["w"], np.float64)
    cosines = []
    for rank in (0, 1):
        method = repselect(curvature, share=0.5, objective=GA(), retain_rank=rank)
        method = method._replace(batch_size=ROWS)
        moved, _ = unlearn(
            method, network, params, forget, retain, steps=1, key=jax.random.clone(key)
        )
        step = np.asarray(moved["w"] - params["w"], np.float64)
        cosines.append(
            abs(np.sum(step * gradient)) / np.linalg.norm(step) / np.linalg.norm(gradient)
        )
    assert cosines[0] > 1e-2
    assert cosines[1] < 1e-5
    assert np.array_equal(moved["v"], params["v"])
    state = method.optimizer.init({**params, "v": None})
    kept = sum(leaf.size for leaf in jax.tree.leaves(state))
    more = sum(p.size for p in (params["w"], params["b"]))
    alone = repselect(curvature, share=0.5, objective=GA()).optimizer.init({**params, "v": None})
    before = sum(leaf.size for leaf in jax.tree.leaves(alone))
    assert kept - before <= 2 * more, "gradients of what is not trained are kept"
    assert which_are_trained(params, method.trainable) == (True, False, True)


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
