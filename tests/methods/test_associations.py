"""ROME, MEMIT and AlphaEdit against NumPy, against their own objectives, and on a residual net."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, factors, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.edits import apply_edit
from jedit.geometry import null_space
from jedit.methods import Associations, Layers, alphaedit, memit, rome
from jedit.methods.associations._write import regress
from jedit.methods.associations.memit import solve as memit_solve
from jedit.methods.associations.rome import solve as rome_solve

WIDTH, D_FF, SEQ, VOCAB = 5, 9, 4, 7
ONE, BOTH = "0/down/kernel", ["0/down/kernel", "1/down/kernel"]


def stream(params, tokens, layers=2):
    """The residual stream of a net whose positions see those left of them by their mean."""
    x = params["embed"][tokens]
    for i in range(layers):
        block = params[str(i)]
        seen = jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
        h = jnp.tanh(seen @ block["up"])
        x = x + (h @ block["down"]["kernel"] + block["down"]["bias"][None, None])
    return x


def network(params, tokens):
    return stream(params, tokens) @ params["head"]


@pytest.fixture
def params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]))

    def block():
        down = {"kernel": normal(D_FF, WIDTH), "bias": normal(WIDTH)}
        return {"up": normal(WIDTH, D_FF), "down": down}

    return {
        "embed": 2 * normal(VOCAB, WIDTH),
        "0": block(),
        "1": block(),
        "head": normal(WIDTH, VOCAB),
    }


@pytest.fixture
def facts():
    """Three facts, whose subjects end at positions 1, 2 and 1."""
    tokens = jnp.asarray([[0, 1, 2, 3], [3, 1, 4, 5], [6, 6, 0, 1]])
    targets = jnp.zeros((3, SEQ), int).at[:, -1].set(jnp.asarray([4, 6, 2]))
    mask = jnp.zeros((3, SEQ), bool).at[:, -1].set(True)
    return Associations(Batch(tokens, targets, mask), jnp.asarray([1, 2, 1]))


KEPT = np.array([[5, 2, 5, 2], [2, 2, 5, 5]])


def fit(params, key, tokens=None, select="down"):
    tokens = np.random.default_rng(1).integers(0, VOCAB, (40, SEQ)) if tokens is None else tokens
    estimator = kfac(network, Categorical(), select=select)
    return estimate(estimator, params, [Batch(jnp.asarray(tokens))], key=key)


def key_rows(params, tokens, layer, subject=None):
    """K of a layer with the bias's one, by hand; of every position without a subject."""
    x = np.asarray(stream(params, jnp.asarray(tokens), layer))
    seen = np.cumsum(x, axis=1) / np.arange(1, SEQ + 1)[None, :, None]
    h = np.tanh(seen @ np.asarray(params[str(layer)]["up"]))
    h = h.reshape(-1, D_FF) if subject is None else h[np.arange(len(h)), np.asarray(subject)]
    return np.concatenate([h, np.ones((len(h), 1))], axis=1)


def matrix(tree, layer, prefix=""):
    if prefix == "edit":
        kernel, bias = (tree.blocks[f"{layer}/down/{name}"] for name in ("kernel", "bias"))
    else:
        kernel, bias = (tree[str(layer)]["down"][name] for name in ("kernel", "bias"))
    return np.concatenate([np.asarray(kernel), np.asarray(bias)[None]], axis=0)


def moment(curvature, path):
    return np.asarray(factors(curvature, path)[0], np.float64)


def wanted(seed=2, n=3, width=WIDTH):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, width)))


def lstsq(*pairs):
    """The minimiser of a sum of squares, by NumPy, from (matrix, right-hand side) pairs."""
    rows, right = (
        np.concatenate([np.asarray(x) for x in side]) for side in zip(*pairs, strict=True)
    )
    return np.linalg.lstsq(rows, right, rcond=None)[0]


def root(moment):
    """B with BᵀB the moment."""
    values, basis = np.linalg.eigh(moment)
    return np.sqrt(np.maximum(values, 0))[:, None] * basis.T


def test_memit_is_the_least_squares_solution(params, facts, key, tolerance):
    curvature, targets = fit(params, key), wanted()
    edit, info = memit(
        network,
        params,
        curvature,
        facts,
        targets,
        layers=Layers(ONE),
        preservation=30.0,
        damping=1e-2,
    )
    K = key_rows(params, facts.batch.inputs, 0, facts.subject)
    C = moment(curvature, ONE)
    C = C + 1e-2 * np.trace(C) / len(C) * np.eye(len(C))
    R = np.asarray(targets) - K @ matrix(params, 0)
    zero = np.zeros((D_FF + 1, WIDTH))
    expected = lstsq((K, R), (np.sqrt(30) * root(C), zero))
    found = matrix(edit, 0, "edit")
    np.testing.assert_allclose(found, expected, atol=10 * tolerance.factorization)
    tolerance.check(info.keys[ONE], jnp.asarray(K))

    def objective(delta):
        away = jnp.asarray(K) @ delta - jnp.asarray(R)
        return 30 * jnp.trace(delta.T @ jnp.asarray(C) @ delta) + jnp.sum(away**2)

    gradient = jax.grad(objective)(jnp.asarray(found))
    assert float(jnp.abs(gradient).max()) < 1e3 * tolerance.factorization


def test_memit_with_a_state_minds_the_keys_of_all_batches_before(params, facts, key, tolerance):
    curvature, state = fit(params, key), None
    given, before = params, []
    for seed in (3, 4, 5):
        first = given
        tokens = (facts.batch.inputs + seed) % VOCAB
        batch = Associations(Batch(tokens), facts.subject)
        targets = wanted(seed)
        edit, info = memit(
            network,
            given,
            curvature,
            batch,
            targets,
            layers=Layers(ONE, state=state),
            preservation=4.0,
            damping=1e-3,
        )
        given, state = apply_edit(given, edit), info.state
        K = key_rows(first, tokens, 0, facts.subject)
        R = np.asarray(targets) - K @ matrix(first, 0)
        C = moment(curvature, ONE)
        C = C + 1e-3 * np.trace(C) / len(C) * np.eye(len(C))
        zero = np.zeros((D_FF + 1, WIDTH))
        earlier = [(k, np.zeros((len(k), WIDTH))) for k in before]
        expected = lstsq((K, R), (2 * root(C), zero), *earlier)
        np.testing.assert_allclose(
            matrix(edit, 0, "edit"), expected, atol=10 * tolerance.factorization
        )
        before.append(K)
    assert int(state.num_keys) == 9


def test_both_ways_to_solve_agree(tolerance):
    rng = np.random.default_rng(0)
    S, K, R = (jnp.asarray(rng.normal(size=s)) for s in ((8, 6), (4, 8), (4, 3)))
    with_state = regress(S, K, jnp.zeros((8, 8)), R, jnp.asarray(0.3))
    tolerance.check(regress(S, K, None, R, jnp.asarray(0.3)), with_state, "factorization")


def test_alphaedit_with_all_directions_free_is_ridge_regression(params, facts, key, tolerance):
    curvature, targets = fit(params, key), wanted()
    everything = null_space(curvature, threshold=D_FF + 1, by="rank")
    edit, info = alphaedit(
        network, params, everything, facts, targets, layers=Layers(ONE), ridge=0.7
    )
    K = key_rows(params, facts.batch.inputs, 0, facts.subject)
    R = np.asarray(targets) - K @ matrix(params, 0)
    zero = np.zeros((D_FF + 1, WIDTH))
    expected = lstsq((K, R), (np.sqrt(0.7) * np.eye(D_FF + 1), zero))
    found = matrix(edit, 0, "edit")
    np.testing.assert_allclose(found, expected, atol=10 * tolerance.factorization)
    residual = np.linalg.norm(R - K @ found, axis=1)
    tolerance.check(info.residual[1], jnp.asarray(residual), "factorization")
    tolerance.check(info.residual[0], jnp.asarray(np.linalg.norm(R, axis=1)), "factorization")


def test_the_ridge_in_units_of_the_mean_eigenvalue(params, facts, key, tolerance):
    curvature, targets = fit(params, key), wanted()
    projector = null_space(curvature, threshold=6, by="rank")
    mean = float(np.trace(moment(curvature, ONE)) / (D_FF + 1))
    args = (network, params, projector, facts, targets)
    relative, _ = alphaedit(*args, layers=Layers(ONE), ridge=3.0, absolute=False)
    absolute, _ = alphaedit(*args, layers=Layers(ONE), ridge=3.0 * mean)
    tolerance.check(relative, absolute, "factorization")
    assert abs(mean - 1) > 0.1


@pytest.mark.parametrize("relaxation", [0.0, 0.5])
def test_the_symmetric_form_is_the_published_one(params, facts, key, relaxation, tolerance):
    curvature = fit(params, key)
    projector = null_space(curvature, threshold=6, by="rank", relaxation=relaxation)
    given, state, K_p = params, None, np.zeros((0, D_FF + 1))
    factor = dict((name, factor) for name, _, factor in projector.blocks)[ONE]
    U, w = (np.asarray(x[factor][0], np.float64) for x in (projector.bases, projector.weights))
    P = U * w @ U.T
    for seed in (3, 4):
        batch = Associations(Batch((facts.batch.inputs + seed) % VOCAB), facts.subject)
        targets = wanted(seed)
        edit, info = alphaedit(
            network, given, projector, batch, targets, layers=Layers(ONE, state=state), ridge=0.2
        )
        K = key_rows(given, batch.batch.inputs, 0, facts.subject)
        R = np.asarray(targets) - K @ matrix(given, 0)
        M = K.T @ K @ P + K_p.T @ K_p @ P + 0.2 * np.eye(D_FF + 1)
        expected = P @ np.linalg.solve(M, K.T @ R)
        np.testing.assert_allclose(
            matrix(edit, 0, "edit"), expected, atol=20 * tolerance.factorization
        )
        given, state, K_p = apply_edit(given, edit), info.state, np.concatenate([K_p, K])


def test_protected_inputs_do_not_see_an_edit(params, facts, key, tolerance):
    """Eight kept positions span fewer than the ten dimensions; the rest is free."""
    curvature = fit(params, key, KEPT)
    rank = D_FF + 1 - np.linalg.matrix_rank(key_rows(params, KEPT, 0), tol=1e-5)
    assert rank > 1
    projector = null_space(curvature, threshold=int(rank), by="rank")
    edit, info = alphaedit(
        network, params, projector, facts, 3 * wanted(), layers=Layers(ONE), ridge=1e-3
    )
    edited = apply_edit(params, edit)
    kept = jnp.asarray(KEPT)
    tolerance.check(network(edited, kept), network(params, kept), "factorization")
    assert float(jnp.max(info.residual[1] / info.residual[0])) < 1
    moved = network(edited, facts.batch.inputs) - network(params, facts.batch.inputs)
    assert float(jnp.abs(moved).max()) > 0.1


def test_the_hard_threshold_decides_what_is_free(params, facts, key):
    curvature, targets = fit(params, key), wanted()
    norms = []
    for rank in (2, 5, 10):
        projector = null_space(curvature, threshold=rank, by="rank")
        edit, _ = alphaedit(
            network, params, projector, facts, targets, layers=Layers(ONE), ridge=0.1
        )
        delta = matrix(edit, 0, "edit")
        assert np.linalg.matrix_rank(delta, tol=1e-4) <= min(rank, 3)
        norms.append(np.linalg.norm(delta))
    assert norms[0] < norms[1] < norms[2]


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_rome_is_exact_and_the_constrained_minimiser(params, facts, key, damping, tolerance):
    one = Associations(Batch(facts.batch.inputs[:1]), facts.subject[:1])
    curvature, targets = fit(params, key), wanted(n=1)
    edit, info = rome(network, params, curvature, one, targets, layer=ONE, damping=damping)
    k = key_rows(params, one.batch.inputs, 0, one.subject)
    found, W = matrix(edit, 0, "edit"), matrix(params, 0)
    tolerance.check(jnp.asarray(k @ (W + found)), targets, "factorization")
    assert float(info.residual[1, 0]) < 10 * tolerance.factorization
    assert np.linalg.matrix_rank(found, tol=1e-5) == 1
    # The same constrained minimum by its optimality conditions: 2CΔ = kᵀμ, kΔ = r.
    C = moment(curvature, ONE)
    C = C + damping * np.trace(C) / len(C) * np.eye(len(C))
    system = np.block([[2 * C, -k.T], [k, np.zeros((1, 1))]])
    right = np.concatenate([np.zeros((D_FF + 1, WIDTH)), np.asarray(targets) - k @ W])
    expected = np.linalg.solve(system, right)[: D_FF + 1]
    np.testing.assert_allclose(found, expected, atol=20 * tolerance.factorization)


def test_rome_on_several_is_one_after_another(params, facts, key, tolerance):
    curvature, targets = fit(params, key), wanted()
    edit, info = rome(network, params, curvature, facts, targets, layer=ONE)
    given = params
    for i in range(3):
        one = Associations(Batch(facts.batch.inputs[i : i + 1]), facts.subject[i : i + 1])
        step, _ = rome(network, given, curvature, one, targets[i : i + 1], layer=ONE)
        given = apply_edit(given, step)
    tolerance.check(apply_edit(params, edit), given, "factorization")
    assert float(info.residual[1, 2]) < 10 * tolerance.factorization
    assert float(info.residual[1, 0]) > 0.01


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_what_is_missing_is_shared_by_the_layers_to_come(params, facts, key, method, tolerance):
    """Two layers by hand: half of R at the first, all that is then missing at the second."""
    curvature, targets = fit(params, key), wanted()
    args = dict(layers=Layers(BOTH, stream))
    if method == "memit":
        edit, info = memit(network, params, curvature, facts, targets, preservation=5.0, **args)
    else:
        projector = null_space(curvature, threshold=6, by="rank")
        edit, info = alphaedit(network, params, projector, facts, targets, ridge=0.2, **args)
    rows = np.arange(3), np.asarray(facts.subject)
    given, norms = params, []
    for i, path in enumerate(BOTH):
        K = key_rows(given, facts.batch.inputs, i, facts.subject)
        missing = np.asarray(targets) - np.asarray(stream(given, facts.batch.inputs))[rows]
        norms.append(np.linalg.norm(missing, axis=1))
        R = missing / (2 - i)
        if method == "memit":
            C = moment(curvature, path)
            C = C + 1e-4 * np.trace(C) / len(C) * np.eye(len(C))
            S, ridge = np.linalg.inv(np.linalg.cholesky(5 * C)).T, 1.0
        else:
            factor = dict((name, factor) for name, _, factor in projector.blocks)[path]
            S, ridge = np.asarray(projector.bases[factor][0])[:, :6], 0.2
        X = K @ S
        delta = S @ np.linalg.solve(X.T @ X + ridge * np.eye(X.shape[1]), X.T @ R)
        np.testing.assert_allclose(
            matrix(edit, i, "edit"), delta, atol=30 * tolerance.factorization
        )
        block = {name: edit.blocks[f"{i}/down/{name}"] for name in ("kernel", "bias")}
        down = jax.tree.map(jnp.add, given[str(i)]["down"], block)
        given = {**given, str(i): {**given[str(i)], "down": down}}
    missing = np.asarray(targets) - np.asarray(stream(given, facts.batch.inputs))[rows]
    norms.append(np.linalg.norm(missing, axis=1))
    tolerance.check(info.residual, jnp.asarray(np.stack(norms)), "factorization")
    assert set(info.state.moments) == set(BOTH)


def test_without_targets_the_layers_output_is_removed(params, facts, key):
    everything = null_space(fit(params, key), threshold=D_FF + 1, by="rank")
    edit, info = alphaedit(
        network, params, everything, facts, None, layers=Layers(BOTH), ridge=1e-6
    )
    edited = apply_edit(params, edit)
    for i in range(2):
        K = key_rows(edited, facts.batch.inputs, i, facts.subject)
        assert np.abs(K @ matrix(edited, i)).max() < 1e-3
        assert np.abs(K @ matrix(params, i)).max() > 0.1
    assert float(info.residual[-1].max()) < 1e-3


def test_the_bias_is_edited_where_the_curvature_covers_it(params, facts, key, tolerance):
    curvature, targets = fit(params, key, select="down/kernel"), wanted()
    edit, info = memit(
        network,
        params,
        curvature,
        facts,
        targets,
        layers=Layers(ONE),
        preservation=2.0,
        damping=0.05,
    )
    assert set(edit.blocks) == {ONE}
    K = key_rows(params, facts.batch.inputs, 0, facts.subject)
    R = np.asarray(targets) - K @ matrix(params, 0)
    C = moment(curvature, ONE)
    C = C + 0.05 * np.trace(C) / len(C) * np.eye(len(C))
    expected = lstsq((K[:, :-1], R), (np.sqrt(2) * root(C), np.zeros((D_FF, WIDTH))))
    np.testing.assert_allclose(edit.blocks[ONE], expected, atol=10 * tolerance.factorization)
    assert info.keys[ONE].shape == (3, D_FF)


def test_a_constant_factor_of_the_weight_is_in_the_key(key, tolerance):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)))}
    x = jnp.asarray(rng.normal(size=(12, 4)))
    scaled = lambda p, x: x @ (0.25 * p["w"])  # noqa: E731
    curvature = estimate(kfac(scaled, Categorical()), params, [Batch(x)], key=key)
    facts, targets = Associations(Batch(x[:1])), wanted(n=1, width=3)
    edit, _ = rome(scaled, params, curvature, facts, targets, layer="w")
    tolerance.check(scaled(apply_edit(params, edit), x[:1]), targets, "factorization")


def test_in_bfloat16_the_edit_is_wide(params, facts, key):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    curvature = fit(narrow, key)
    tokens = facts.batch.inputs
    edit, info = memit(
        lambda p, t: network(p, t),
        narrow,
        curvature,
        facts,
        wanted().astype(jnp.float32),
        layers=Layers(ONE),
        preservation=1.0,
    )
    assert {x.dtype for x in edit.blocks.values()} == {jnp.dtype(jnp.float32)}
    assert bool(jnp.all(info.residual[1] < info.residual[0]))
    assert network(apply_edit(narrow, edit), tokens).dtype == jnp.bfloat16


def test_the_solver_traces_once_and_vmaps(tolerance):
    rng = np.random.default_rng(0)
    Q = jnp.asarray(np.linalg.qr(rng.normal(size=(6, 6)))[0])
    c = jnp.asarray(rng.uniform(0.1, 2, 6))
    K, R = jnp.asarray(rng.normal(size=(5, 3, 6))), jnp.asarray(rng.normal(size=(5, 3, 4)))
    stacked = jax.vmap(lambda k, r: memit_solve(Q, c, k, None, r, 3.0))(K, R)
    for i in range(5):
        one = memit_solve(Q, c, K[i], None, R[i], 3.0)
        tolerance.check(stacked[i], one, "factorization")


def test_mistakes_get_a_sentence(params, facts, key):
    curvature, targets = fit(params, key), wanted()
    projector = null_space(curvature, threshold=0.1)
    run = lambda **kw: memit(network, params, curvature, facts, targets, **kw)  # noqa: E731
    with pytest.raises(ValueError, match="preservation must be positive"):
        run(layers=Layers(ONE), preservation=0.0)
    with pytest.raises(ValueError, match="damping must not be negative"):
        rome(network, params, curvature, facts, targets, layer=ONE, damping=-1.0)
    with pytest.raises(ValueError, match="ridge must be positive"):
        alphaedit(network, params, projector, facts, targets, layers=Layers(ONE), ridge=0.0)
    with pytest.raises(ValueError, match="2 layers share one target, so `hidden` is needed"):
        run(layers=Layers(BOTH))
    with pytest.raises(ValueError, match="by depth and each once"):
        run(layers=Layers([ONE, ONE]))
    with pytest.raises(ValueError, match=r"\['head'\] have no dense input moment; of those that"):
        run(layers=Layers("head"))
    with pytest.raises(ValueError, match=r"targets have shape \(2, 5\), the values are \(3, 5\)"):
        memit(network, params, curvature, facts, targets[:2], layers=Layers(ONE))
    with pytest.raises(ValueError, match="each row has 4 positions: say in `subject`"):
        memit(network, params, curvature, Associations(facts.batch), targets, layers=Layers(ONE))
    wrong = Associations(facts.batch, facts.subject[:2])
    with pytest.raises(ValueError, match=r"subject has shape \(2,\), expected one position a row"):
        memit(network, params, curvature, wrong, targets, layers=Layers(ONE))
    _, info = run(layers=Layers(ONE))
    with pytest.raises(ValueError, match="hand on the state of an edit of the same layers"):
        run(layers=Layers(BOTH[1], state=info.state))


def test_a_matrix_that_is_used_twice_is_refused(key):
    def tied(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    params = {"w": jnp.eye(3)}
    x = jnp.ones((4, 3))
    curvature = estimate(kfac(tied, Categorical()), params, [Batch(x)], key=key)
    with pytest.raises(ValueError, match="must be the matrix of one dense site"):
        memit(tied, params, curvature, Associations(Batch(x)), jnp.ones((4, 3)), layers=Layers("w"))


def test_a_weight_that_a_scan_uses_at_every_position_is_refused(key):
    def deep(params, x):
        step = lambda h, _: (jnp.tanh(h @ params["w"]), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=3)[0]

    params = {"w": jnp.eye(4)}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)))
    curvature = estimate(kfac(deep, Categorical()), params, [Batch(x)], key=key)
    facts = Associations(Batch(x), jnp.asarray([0, 2]))
    with pytest.raises(ValueError, match="used 3 times at each of 5 positions"):
        memit(deep, params, curvature, facts, None, layers=Layers("w"))


def test_positions_in_another_order_than_the_outputs_are_refused(key):
    """Time first, with as many rows as positions: a subject's key would be another row's."""

    def time_first(params, x):
        return (x.swapaxes(0, 1) @ params["w"]).swapaxes(0, 1)

    params, batch = {"w": jnp.eye(4)}, Batch(jnp.ones((4, 4, 4)))
    curvature = estimate(kfac(time_first, Categorical()), params, [batch], key=key)
    facts = Associations(batch, jnp.asarray([0, 2, 1, 0]))
    with pytest.raises(ValueError, match=r"positions of 'w' \(.*\) are not those of the outputs"):
        memit(time_first, params, curvature, facts, None, layers=Layers("w"))


def test_a_subject_outside_the_row_is_named(params, facts, key):
    curvature = fit(params, key)
    far = facts._replace(subject=jnp.asarray([1, SEQ, -1]))
    with pytest.raises(ValueError, match=r"subject of rows \[1, 2\] is none of the 4 positions"):
        memit(network, params, curvature, far, None, layers=Layers(ONE))


def test_a_key_of_zero_writes_nothing_and_spoils_nothing(tolerance):
    rng = np.random.default_rng(0)
    K, R = jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(rng.normal(size=(3, 2)))
    found = rome_solve(jnp.eye(5), jnp.ones(5), K.at[1].set(0), R)
    tolerance.check(found, rome_solve(jnp.eye(5), jnp.ones(5), K[::2], R[::2]))
