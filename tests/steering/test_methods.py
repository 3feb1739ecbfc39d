"""How steerings are made, against SciPy, plain NumPy, and what they are to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.stats

from jedit.core.batch import Batch
from jedit.core.paths import parameter_paths
from jedit.edits import apply_edit
from jedit.models import gpt
from jedit.steering import (
    Affine,
    Gate,
    Sparsity,
    Steering,
    austeer,
    fold,
    identity,
    lineas,
    mean_difference,
    pooled_outputs,
    proximal_map,
    proximal_step,
    steered,
    transport_cost,
)
from jedit.tracing import intervene

SITES = ["blocks/0/mlp/down/kernel", "blocks/1/mlp/down/kernel"]
NOTHING = Sparsity(0.0, 0.0)


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax's own steps mix Python floats in."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def scene():
    """A small language model, no bias zero, and rows that are of tokens of either of two kinds."""
    apply, params = gpt(
        key=jax.random.key(0), vocab=11, width=8, num_layers=2, num_heads=2, max_len=6
    )
    dtype = jnp.zeros(()).dtype
    keys = iter(jax.random.split(jax.random.key(1), 100))
    draw = lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape, x.dtype)  # noqa: E731
    params = jax.tree.map(lambda leaf: draw(leaf.astype(dtype)), params)
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 7, size=12)
    valid = jnp.asarray((np.arange(6)[None] < lengths[:, None]).astype(float))
    source = Batch(jnp.asarray(rng.integers(0, 5, size=(12, 6))), valid=valid)
    target = Batch(jnp.asarray(rng.integers(5, 11, size=(9, 6))), valid=valid[:9])
    return apply, params, source, target


def filled(rows, count=3):
    """The rows and some that count nothing, as `data.batches` fills its last batch with."""
    return jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:count])]), rows)


def by_loops(apply, params, rows, site, pool="mean"):
    """What `intervene` reads at a site, its bias added, pooled row by row: (rows, units).

    Rows that count nothing are left out.
    """
    outputs = np.asarray(intervene(apply, params, rows.inputs).site_outputs[site], np.float64)
    outputs = outputs + np.asarray(dict(parameter_paths(params))[site.replace("kernel", "bias")])
    found = []
    for i, row in enumerate(outputs):
        given = [np.asarray(x[i]) for x in (rows.mask, rows.valid) if x is not None]
        read = [j for j in range(len(row)) if all(x[j] for x in given)]
        if read:
            found.append(row[read[-1]] if pool == "last" else row[read].mean(axis=0))
    return np.stack(found)


def cost_by_assignment(x, y, unit):
    """W₂² of each unit of 12 and 9 rows over c, by the best assignment of copies."""
    total = 0.0
    for j in range(x.shape[1]):
        costs = (np.repeat(x[:, j], 3)[:, None] - np.repeat(y[:, j], 4)[None]) ** 2
        total += costs[scipy.optimize.linear_sum_assignment(costs)].mean() / unit[j]
    return total


@pytest.mark.parametrize(("n", "m"), [(7, 7), (6, 4), (5, 3), (1, 4)])
def test_the_cost_is_scipys_distance(n, m, tolerance):
    rng = np.random.default_rng(n * m)
    x, y = rng.normal(size=(2, n)), 1.5 * rng.normal(size=(2, m)) + 0.4
    expected = [scipy.stats.wasserstein_distance(*pair) for pair in zip(x, y, strict=True)]
    found = transport_cost(jnp.asarray(x), jnp.asarray(y), power=1)
    tolerance.check(found, jnp.asarray(expected))
    # Of squares, the best assignment of as many copies of each.
    many, others = np.repeat(x[0], m), np.repeat(y[0], n)
    costs = (many[:, None] - others[None]) ** 2
    rows, columns = scipy.optimize.linear_sum_assignment(costs)
    tolerance.check(
        transport_cost(jnp.asarray(x), jnp.asarray(y))[0], jnp.asarray(costs[rows, columns].mean())
    )


def test_the_proximal_map_is_the_minimum(tolerance):
    """Found by a method that knows no gradient, from the definition alone."""
    del tolerance  # the other search is what is not exact
    x, rate, sparsity = np.array([1.3, -0.6, 0.15, 0.02]), 0.4, Sparsity(0.5, 0.7)

    def value(z):
        penalty = sparsity.l1 * abs(z).sum() + sparsity.group * 2 * np.linalg.norm(z)
        return 0.5 * ((z - x) ** 2).sum() + rate * penalty

    best = min(
        (
            scipy.optimize.minimize(
                value, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13}
            )
            for start in (x, 0.5 * x, [0.7, -0.1, 0.0, 0.0])
        ),
        key=lambda found: found.fun,
    )
    found = np.asarray(proximal_map(jnp.asarray(x), step_size=rate, sparsity=sparsity))
    assert value(found) <= best.fun + 1e-6
    assert np.allclose(found, best.x, atol=1e-4)
    assert np.array_equal(found == 0, [False, False, True, True])
    gone = proximal_map(jnp.asarray(x), step_size=rate, sparsity=Sparsity(0.5, 3.0))
    assert not np.asarray(gone).any()


def test_a_chain_ends_at_the_proximal_map(tolerance):
    params = {"w": jnp.asarray([[1.0, -0.2], [0.01, 0.02]])}
    gradient = {"w": jnp.asarray([[0.5, 0.1], [-0.3, 0.0]])}
    optimizer = optax.chain(optax.sgd(0.1), proximal_step(0.1, Sparsity()))
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    expected = proximal_map(params["w"] - 0.1 * gradient["w"], step_size=0.1, sparsity=Sparsity())
    tolerance.check(optax.apply_updates(params, updates)["w"], expected)
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(gradient, optimizer.init(params))


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_what_is_pooled_is_the_mean_or_the_last_of_what_is_in_mask_and_valid(
    scene, tolerance, pool
):
    apply, params, source, _ = scene
    mask = jnp.asarray(np.random.default_rng(1).integers(0, 2, (12, 6)).astype(float))
    still = identity(apply, params, source.inputs, SITES)
    for given in (mask, None):
        rows = source._replace(mask=given)
        is_empty = np.zeros(12, bool) if given is None else ~(mask * source.valid).any(axis=1)
        found = pooled_outputs(apply, params, rows, still, pool=pool)[SITES[1]][0]
        tolerance.check(found[~is_empty], by_loops(apply, params, rows, SITES[1], pool))
        assert not np.asarray(found[is_empty]).any()
    assert is_empty.sum() == 0
    assert not np.asarray(mask * source.valid).any(axis=1).all()  # some row was empty


def test_blocks_run_one_program(scene, monkeypatch):
    apply, params, source, target = scene
    calls = []

    def counted(params, tokens):
        calls.append(1)
        return apply(params, tokens)

    found = []
    for rows in (6, 2):  # of a block
        calls.clear()
        monkeypatch.setattr("jedit.core.row_blocks.MOST_BYTES", 4 * 11 * 6 * rows)
        one = lambda p, x: counted(p, x)  # noqa: E731
        mean_difference(one, params, source, target, sites=SITES)
        found.append(len(calls))
    assert found[0] == found[1]


def test_blocks_of_rows_keep_pairs_together(scene, monkeypatch, tolerance):
    """The two sets are wider and narrower, so that they are cut into unequal numbers of blocks."""
    apply, params, source, _ = scene
    wide, narrow = source, jax.tree.map(lambda x: x[:, :3], source)
    narrow = narrow._replace(inputs=narrow.inputs + 5)  # other tokens: no difference is 0
    whole = austeer(apply, params, wide, narrow, sites=SITES)[1].scores
    shift = mean_difference(apply, params, wide, narrow, sites=SITES)
    monkeypatch.setattr("jedit.core.row_blocks.MOST_BYTES", 4 * 11 * 6 * 3)
    cut = austeer(apply, params, wide, narrow, sites=SITES)[1].scores
    for site in SITES:
        np.testing.assert_array_equal(cut[site], whole[site])
    tolerance.check(
        mean_difference(apply, params, wide, narrow, sites=SITES).maps[SITES[0]].shift,
        shift.maps[SITES[0]].shift,
    )


def test_rows_that_count_nothing_are_left_out(scene, tolerance):
    apply, params, source, target = scene
    for make in (
        lambda rows: mean_difference(apply, params, rows, target, sites=SITES).maps,
        lambda rows: (
            lineas(
                apply,
                params,
                rows,
                target,
                start=identity(apply, params, rows.inputs, SITES),
                steps=2,
                sparsity=NOTHING,
            )[0].maps
        ),
    ):
        tolerance.check(make(filled(source))[SITES[0]].shift, make(source)[SITES[0]].shift)
    pair = (filled(source), jax.tree.map(lambda x: jnp.concatenate([x, x[:6]]), target))
    _, info = austeer(apply, params, *pair, sites=SITES)
    assert info.num_pairs == 12
    empty = source._replace(valid=jnp.zeros_like(source.valid))
    with pytest.raises(ValueError, match="no row counts"):
        mean_difference(apply, params, empty, target, sites=SITES)


def test_the_mean_difference_moves_a_mean_onto_the_other(scene, tolerance):
    """At the first site: the next one sees what the first has moved."""
    apply, params, source, target = scene
    steering = mean_difference(apply, params, source, target, sites=SITES)
    assert steering.maps[SITES[0]].gain is None
    moved, there = (
        pooled_outputs(apply, params, rows, one)[SITES[0]].mean(axis=1)
        for rows, one in (
            (source, steering),
            (target, identity(apply, params, target.inputs, SITES)),
        )
    )
    tolerance.check(moved, there)


def test_austeers_scores_and_units_are_those_counted(scene, tolerance):
    apply, params, source, target = scene
    good, bad = target, jax.tree.map(lambda leaf: leaf[:9], source)
    steering, info = austeer(
        apply, params, filled(good), filled(bad), sites=SITES, units=5, alpha=2.0
    )
    expected = []
    for site in SITES:
        up, down = (by_loops(apply, params, rows, site, "last") for rows in (good, bad))
        for unit in range(8):
            delta = up[:, unit] - down[:, unit]
            more, fewer = int((delta > 0).sum()), int((delta < 0).sum())
            expected.append((-1 if more < fewer else 1) * max(more, fewer) / 9)
    found = np.concatenate([np.asarray(info.scores[site]).ravel() for site in SITES])
    assert np.allclose(found, expected, atol=1e-6)
    order = sorted(range(16), key=lambda i: -abs(expected[i]))[:5]
    gains = np.concatenate([np.asarray(steering.maps[site].gain).ravel() for site in SITES])
    assert sorted(np.flatnonzero(gains != 1)) == sorted(order)
    assert np.allclose(gains[order], [1 + 2.0 * expected[i] for i in order], atol=1e-6)
    # Its strength adapts to the input and it is linear all the same: it folds.
    edited = apply_edit(params, fold(apply, params, source.inputs, steering), 0.3)
    there = steered(apply, steering, 0.3)(params, source.inputs)
    tolerance.check(apply(edited, source.inputs), there, "contraction")


def test_lineas_brings_every_layer_nearer_through_the_network(scene, tolerance):
    apply, params, source, target = scene
    start = identity(apply, params, source.inputs, SITES, is_foldable=True)
    given = (apply, params, filled(source), target)
    learnt, info = lineas(*given, start=start, steps=60, sparsity=NOTHING)
    for site in SITES:
        assert float(info.after[site][0]) < 0.35 * float(info.before[site][0])
    assert float(info.losses[0]) == pytest.approx(sum(float(x[0]) for x in info.before.values()))
    # Near its end a constant rate goes to and fro about the kinks of sorting.
    assert (np.diff(np.asarray(info.losses[:6])) < 0).all()
    assert float(info.losses[-1]) < 0.4 * float(info.losses[0])
    # The distance that it says is what SciPy finds of the steered network.
    moved = steered(apply, learnt)
    for site in SITES:
        y, first = (by_loops(apply, params, rows, site) for rows in (target, source))
        # Traced, the steered function shows a site's output before it is moved itself.
        one = learnt.maps[site]
        x = by_loops(moved, params, source, site) * np.asarray(one.gain) + np.asarray(one.shift)
        unit = ((first**2).mean(axis=0) + (y**2).mean(axis=0)) / 2
        expected = cost_by_assignment(x, y, unit)
        assert float(info.after[site][0]) == pytest.approx(expected, rel=1e-3)
    edited = apply_edit(params, fold(apply, params, source.inputs, learnt))
    there = steered(apply, learnt)(params, source.inputs)
    tolerance.check(apply(edited, source.inputs), there, "contraction")


def test_the_gradient_of_lineas_goes_through_the_layers_before(scene):
    """One step without penalties is the gradient of the cost, by differences of two runs."""
    apply, params, source, target = scene
    start = identity(apply, params, source.inputs, SITES)
    rate, eps = 1e-3, 1e-4
    given = (apply, params, filled(source), target)
    learnt, _ = lineas(*given, start=start, steps=1, learning_rate=rate, sparsity=NOTHING)
    before, wanted = (
        {site: by_loops(apply, params, rows, site) for site in SITES} for rows in (source, target)
    )
    units = {s: ((before[s] ** 2).mean(0) + (wanted[s] ** 2).mean(0)) / 2 for s in SITES}

    def cost(change):
        gain = jnp.ones(8).at[3].add(change)
        moved = steered(apply, Steering({SITES[0]: Affine(gain)}))
        found = [by_loops(moved, params, source, site) for site in SITES]
        found[0] = found[0] * np.asarray(gain)
        return sum(
            cost_by_assignment(x, wanted[s], units[s]) for x, s in zip(found, SITES, strict=True)
        )

    slope = (cost(eps) - cost(-eps)) / (2 * eps)
    step = float(learnt.maps[SITES[0]].gain[0, 3]) - 1
    assert step == pytest.approx(-rate * slope, rel=2e-2)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (1, 3, 4), (3, 2, 2)])
def test_a_start_may_have_any_shape_of_a_map(shape, tolerance):
    """Three layers of a scan: each is a group of its own, whichever shape it was given in."""

    def layers(params, x):
        step = lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"][None]), None)  # noqa: E731
        return jax.lax.scan(step, x, params)[0]

    draw = lambda i, *shape: jnp.asarray(np.random.default_rng(i).normal(size=shape))  # noqa: E731
    params = {"w": draw(0, 3, 4, 4), "b": draw(1, 3, 4)}
    source, target = Batch(draw(2, 6, 4)), Batch(2 + draw(3, 6, 4))

    def learnt(start):
        steering = Steering({"w": Affine(gain=jnp.full(start, 1.5))})
        given = (layers, params, source, target)
        return lineas(*given, start=steering, steps=5, sparsity=Sparsity(0.0, 0.3))[0].maps["w"]

    found, expected = learnt(shape), learnt((3, 4))
    assert found.shift is None
    assert found.gain.shape == (3, 4)
    tolerance.check(found.gain, expected.gain)


def test_sparsity_leaves_units_alone(scene):
    apply, params, source, target = scene
    start = identity(apply, params, source.inputs, SITES)
    how = {"start": start, "steps": 40}
    _, dense = lineas(apply, params, source, target, **how, sparsity=NOTHING)
    some, sparse = lineas(apply, params, source, target, **how, sparsity=Sparsity(1.5, 0.0))
    none, _ = lineas(apply, params, source, target, **how, sparsity=Sparsity(0.0, 1e3))
    assert float(dense.moved) == 1
    assert 0 < float(sparse.moved) < 0.8
    kept = some.maps[SITES[0]].gain == 1
    assert bool(jnp.any(kept))
    assert all(bool(jnp.all(one.gain == 1) & jnp.all(one.shift == 0)) for one in none.maps.values())


def test_parts_that_no_parameter_holds_are_left_out():
    def network(params, x):
        return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"] + jnp.sin(x)

    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "v": jnp.ones((4, 3))}
    x = jnp.ones((2, 3))
    maps = identity(network, params, x, ["w", "v"], is_foldable=True).maps
    assert maps["w"].shift is not None
    assert maps["v"].shift is None
    assert maps["v"].gain.shape == (1, 3)
    assert not fold(network, params, x, Steering(maps)).blocks["w"].any()

    def tied(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"].T

    identity(tied, {"w": params["w"]}, x, ["w"])  # which may be steered
    with pytest.raises(ValueError, match="^w does not fold .* used at several sites"):
        identity(tied, {"w": params["w"]}, x, ["w"], is_foldable=True)


def test_mistakes_get_a_sentence(scene):
    apply, params, source, target = scene
    with pytest.raises(ValueError, match="12 good answers and 9 bad ones are no pairs"):
        austeer(apply, params, source, target, sites=SITES)
    with pytest.raises(ValueError, match="no site is named"):
        identity(apply, params, source.inputs, [])
    start = Steering({SITES[0]: Affine(gate=Gate(jnp.ones(8), jnp.zeros(()), jnp.ones(())))})
    with pytest.raises(ValueError, match="have gates"):
        lineas(apply, params, source, target, start=start)

    with pytest.raises(ValueError, match="nothing to be learnt"):
        lineas(apply, params, source, target, start=Steering({SITES[0]: Affine()}))
    start = Steering({SITES[0]: Affine(gain=jnp.ones(7))})
    with pytest.raises(ValueError, match=r"the gain has shape \(7,\)"):
        lineas(apply, params, source, target, start=start)

    def time_first(params, x):
        return jnp.swapaxes(jnp.swapaxes(x, 0, 1) @ params["w"], 0, 1)

    rows = Batch(jnp.ones((4, 3, 2)))
    with pytest.raises(ValueError, match="are not the outputs'"):
        mean_difference(time_first, {"w": jnp.ones((2, 2))}, rows, rows, sites=["w"])
