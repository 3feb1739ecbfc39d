"""What must not matter: the cut into batches, shards, padding rows, order, jit, vmap, scan."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jedit.core import row_blocks
from jedit.core.batch import Batch
from jedit.curvature import diagonal, ekfac, estimate, factors, kfac
from jedit.curvature.likelihoods import Categorical
from tests.curvature.programs import BY_NAME, exact_kfac

KINDS = ("kfac", "reduced", "ekfac", "diagonal")
each_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def make(kind, name="perceptron", fisher="sampled"):
    """Params, a batch, the estimator and its compiled update: once for all tests."""
    program = BY_NAME[name]
    params, batch, curvature = exact_kfac(program)
    if kind == "ekfac":
        estimator = ekfac(program.run, Categorical(), curvature, fisher=fisher)
    elif kind == "diagonal":
        estimator = diagonal(program.run, Categorical(), fisher=fisher)
    else:
        sharing = "reduce" if kind == "reduced" else "expand"
        estimator = kfac(program.run, Categorical(), fisher=fisher, sharing=sharing)
    return params, batch, estimator, jax.jit(estimator.update)


def problem(name="perceptron"):
    program = BY_NAME[name]
    params, batch, _ = exact_kfac(program)
    return program, params, batch


def take(batch, index):
    return jax.tree.map(lambda x: x[index], batch)


def close(found, expected, tolerance):
    """States or curvatures agree, leaf by leaf."""
    jax.tree.map(lambda a, b: tolerance.check(a, b), found, expected)


@each_kind
def test_the_cut_into_batches_does_not_matter(kind, key, tolerance):
    params, batch, estimator, update = make(kind)
    start = estimator.init(params, batch)
    state = start
    for part in (slice(0, 1), slice(1, 3)):
        state = update(state, params, take(batch, part), key)
    close(state, update(start, params, batch, key), tolerance)
    assert state.next_example == 3


@each_kind
@pytest.mark.parametrize("at_a_time", [1, 3])
def test_blocks_of_rows_do_not_matter(kind, at_a_time, key, tolerance, monkeypatch):
    """Outputs that are too large for all rows at once: every row draws its own labels still."""
    params, few, _, _ = make(kind)
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x, x]), few)
    estimator = make.__wrapped__(kind)[2]  # whose update JAX has not compiled
    start = estimator.init(params, batch)
    whole = make(kind)[3](start, params, batch, key)
    outputs = jax.eval_shape(BY_NAME["perceptron"].run, params, batch.inputs)
    one = 4 * outputs.size // 9
    monkeypatch.setattr(row_blocks, "MOST_BYTES", one * at_a_time)
    update = jax.jit(lambda *given: estimator.update(*given))
    assert "scan" in str(jax.make_jaxpr(update)(start, params, batch, key))
    state = update(start, params, batch, key)
    close(state, whole, tolerance)
    assert state.next_example == 9


@each_kind
def test_shards_add_up(kind, key, tolerance):
    """Each begins at its own example number; the sum of the states is the state of the whole."""
    params, batch, estimator, update = make(kind)
    whole = update(estimator.init(params, batch), params, batch, key)
    states = []
    for first, part in ((0, slice(0, 1)), (1, slice(1, 3))):
        shard = take(batch, part)
        state = estimator.init(params, shard, first_example=first)
        states.append(update(state, params, shard, key))
    merged = jax.tree.map(jnp.add, *states)
    assert merged.next_example >= whole.next_example
    close(renumbered(merged, whole), whole, tolerance)
    if kind == "kfac":
        found, expected = (estimator.finalize(state).factors for state in (merged, whole))
        for name, factor in expected.items():
            tolerance.check(found[name].matrix, factor.matrix)
            tolerance.check(found[name].eigenvalues, factor.eigenvalues, "factorization")


def renumbered(state, other):
    """The state, with the other's running number."""
    return dataclasses.replace(state, next_example=other.next_example)


def test_labels_belong_to_the_example_number(key):
    """A shard that begins elsewhere draws other labels; the same number the same ones."""
    params, batch, estimator, update = make("kfac")
    sums = [
        update(estimator.init(params, batch, first_example=n), params, batch, key).outputs
        for n in (0, 0, 7)
    ]
    jax.tree.map(np.testing.assert_array_equal, sums[0], sums[1])
    assert not np.allclose(sums[0]["v"], sums[2]["v"])


def with_blank_row(batch, order):
    """Another example, of padding alone, put in some place."""
    none = jnp.zeros((1, 4), batch.valid.dtype)
    blank = Batch(jnp.full((1, 4, 4), 1e9, batch.inputs.dtype), mask=none, valid=none)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y])[np.array(order)], batch, blank)


@each_kind
def test_a_row_of_padding_at_the_end_does_not_matter(kind, key, tolerance):
    params, batch, estimator, update = make(kind)
    padded = with_blank_row(batch, [0, 1, 2, 3])
    start = estimator.init(params, batch)
    whole, state = (update(start, params, b, key) for b in (batch, padded))
    assert state.next_example == 4
    close(renumbered(state, whole), whole, tolerance)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_row_of_padding_in_the_middle_does_not_matter(kind, key, tolerance):
    """It takes a number, so those behind it draw other labels; the exact sums are the same."""
    params, batch, estimator, update = make(kind, fisher="exact")
    padded = with_blank_row(batch, [0, 3, 1, 2])
    start = estimator.init(params, batch)
    whole, state = (update(start, params, b, key) for b in (batch, padded))
    close(renumbered(state, whole), whole, tolerance)


def test_the_order_of_sites_does_not_matter(key, tolerance):
    """Other names, hence another order of parameters, and another order of patterns."""
    program, params, batch = problem("normalised")
    names = {name: f"{chr(ord('z') - i)}_{name}" for i, name in enumerate(sorted(params))}
    renamed = {names[name]: leaf for name, leaf in params.items()}

    def apply(params, x):
        return program.run({name: params[names[name]] for name in names}, x)

    first = estimate(kfac(program.run, Categorical()), params, [batch], key=key)
    second = estimate(kfac(apply, Categorical()), renamed, [batch], key=key)
    for path in ("w", "v"):
        tolerance.check(factors(second, names[path]), factors(first, path))
    selected = [
        estimate(kfac(program.run, Categorical(), select=s), params, [batch], key=key)
        for s in (["w", "^b", "v"], ["v", "w", "^b"])
    ]
    for curvature in selected:
        assert set(curvature.covered) == {"w", "b", "v"}
        tolerance.check(factors(curvature, "w"), factors(first, "w"))


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_jit_equals_eager(kind, key, tolerance):
    params, batch, estimator, update = make(kind)
    start = estimator.init(params, batch)
    eager = estimator.update(start, params, batch, key)
    close(update(start, params, batch, key), eager, tolerance)


@each_kind
def test_vmap_over_models_equals_a_loop(kind, key, tolerance):
    params, batch, estimator, update = make(kind)
    models = [jax.tree.map(lambda x, i=i: x * (1 + i), params) for i in range(2)]
    start = estimator.init(params, batch)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    many = jax.jit(jax.vmap(estimator.update, in_axes=(0, 0, None, None)))
    found = many(states, stacked, batch, key)
    for i, model in enumerate(models):
        one = update(start, model, batch, key)
        close(jax.tree.map(lambda x, i=i: x[i], found), one, tolerance)


@each_kind
def test_scan_over_batches_equals_a_loop(kind, key, tolerance):
    params, batch, estimator, update = make(kind)
    batches = [take(batch, np.roll(np.arange(3), i)) for i in range(3)]
    start = state = estimator.init(params, batch)
    for one in batches:
        state = update(state, params, one, key)

    @jax.jit
    def scan(start, stacked):
        def step(state, one):
            return estimator.update(state, params, one, key), None

        return jax.lax.scan(step, start, stacked)[0]

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    close(scan(start, stacked), state, tolerance)


@each_kind
def test_states_keep_their_structure(kind, key):
    params, batch, estimator, update = make(kind)
    start = estimator.init(params, batch)
    state = update(start, params, batch, key)
    assert jax.tree.structure(state) == jax.tree.structure(start)
    before, after = (
        [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(s)] for s in (start, state)
    )
    assert before == after


@each_kind
def test_one_trace_serves_all_batches(kind, key):
    params, batch, estimator, _ = make(kind)
    num_traces = 0

    def update(*args):
        nonlocal num_traces
        num_traces += 1
        return estimator.update(*args)

    batches = [jax.tree.map(jnp.copy, batch) for _ in range(4)]
    estimate(estimator._replace(update=update), params, batches, key=key)
    assert num_traces == 1


def test_wide_sums_of_a_narrow_model(key):
    program, params, batch = problem()
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    batch = batch._replace(inputs=batch.inputs.astype(jnp.bfloat16))
    curvature = estimate(kfac(program.run, Categorical()), narrow, [batch], key=key)
    leaves = jax.tree.leaves((curvature.factors, curvature.blocks))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    wide = np.asarray(batch.inputs, np.float32)[np.asarray(batch.valid) == 1]
    # The products of bfloat16 numbers are exact in float32, so only their sum rounds.
    np.testing.assert_allclose(
        factors(curvature, "w")[0][:-1, :-1], wide.T @ wide / len(wide), rtol=1e-6, atol=1e-6
    )


def products(jaxpr):
    """(operand dtypes, result dtype) of every product in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield {v.aval.dtype.name for v in equation.invars}, equation.outvars[0].aval.dtype.name
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def test_moments_of_a_narrow_model_are_products_of_narrow_rows(key):
    """A device's fast path; widened first, they would run at a tenth of its rate."""
    program, params, batch = problem()
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    batch = batch._replace(inputs=batch.inputs.astype(jnp.bfloat16))
    estimator = kfac(program.run, Categorical())
    state = estimator.init(narrow, batch)
    traced = jax.make_jaxpr(estimator.update)(state, narrow, batch, key)
    moments = [ins for ins, out in products(traced.jaxpr) if out == "float32"]
    assert len(moments) >= len(state.outputs) + len(state.inputs)
    assert all(operands == {"bfloat16"} for operands in moments)


def test_steps_move_nothing_to_or_from_the_host(key):
    params, batch, estimator, update = make("kfac")
    state = estimator.init(params, batch)
    batches = jax.device_put([batch, take(batch, np.array([2, 0, 1]))])
    update(state, params, batches[0], key)
    with jax.transfer_guard("disallow"):
        for one in batches:
            state = update(state, params, one, key)
    assert state.num_outputs > 0


def test_estimate_keeps_its_loop_on_the_device(key):
    """The guard is up between the first batch and the last: only `finalize` looks at values."""
    params, batch, estimator, _ = make("kfac")
    batches = jax.device_put([batch, batch, batch])
    seen = []

    def guarded():
        yield batches[0]
        with jax.transfer_guard("disallow"):
            yield batches[1]
            seen.append("second")
            yield batches[2]
            seen.append("third")

    estimate(estimator, params, guarded(), key=key)
    assert seen == ["second", "third"]


def test_progress_bar(key, capsys):
    params, batch, estimator, _ = make("kfac")
    estimate(estimator, params, [batch, batch], key=key, progress=True)
    assert "curvature" in (bar := capsys.readouterr().err)
    assert "2/2" in bar


def test_estimate_leaves_its_arguments_alone(key):
    """The state is donated from step to step; params and batches are not."""
    params, batch, estimator, _ = make("kfac")
    for _ in range(2):
        estimate(estimator, params, [batch, batch], key=key)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((params, batch)))
