"""Leading eigenvectors: iterated against NumPy's, sketched against NumPy's sketch of moments."""

import dataclasses
import functools
import json
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.checkpoint import Checkpoint
from jedit.checkpoint.json import curvature_from_json, curvature_to_json
from jedit.core import row_blocks
from jedit.core.batch import Batch
from jedit.curvature import Factorize, ekfac, estimate, kfac, matvec, solve, subspace, trace
from jedit.curvature.likelihoods import Categorical
from jedit.curvature.sketch import Sketch, add_rows, zero_sketch
from jedit.curvature.subspace import TOLERANCE, leading, num_columns

RANK, EXAMPLES, LENGTH, VOCAB = 4, 12, 5, 40
COLUMNS = num_columns(RANK)
CHAIN = {"w": (36, 30), "b": (30,), "stack": (2, 30, 30), "c": (2, 30), "v": (30, 7)}
TIED = {"e": (VOCAB, 30), "w": (30, 30)}


def chain(params, x):
    """A dense layer with a bias, two layers in a scan, and a head that is not long enough."""

    def layer(x, one):
        w, b = one
        return jnp.tanh(x @ w + jnp.broadcast_to(b, x.shape)), None

    hidden = x @ (0.5 * params["w"])
    hidden = jnp.tanh(hidden + jnp.broadcast_to(params["b"] / 4, hidden.shape))
    return jax.lax.scan(layer, hidden, (params["stack"], params["c"]))[0] @ params["v"]


def tied(params, tokens):
    """A table that is also the head: a diagonal moment and a sketched one make a factor."""
    hidden = jnp.tanh(params["e"][tokens] @ params["w"])
    return hidden @ (2 * params["e"]).T


def problem(name):
    """Params and a padded batch of one of the two."""
    rng = np.random.default_rng(5)
    shapes = CHAIN if name == "chain" else TIED
    params = {
        n: jnp.asarray(rng.normal(size=s) / np.sqrt(s[-2:][0]), float) for n, s in shapes.items()
    }
    if name == "chain":
        # Inputs with a mean and a decaying spectrum, as activations have.
        scale = np.arange(1, 37) ** -0.7
        inputs = jnp.asarray(0.3 + rng.normal(size=(EXAMPLES, LENGTH, 36)) * scale, float)
    else:
        inputs = jnp.asarray(rng.integers(VOCAB, size=(EXAMPLES, LENGTH)), jnp.int32)
    valid = jnp.asarray(np.arange(LENGTH) < rng.integers(2, LENGTH + 1, size=(EXAMPLES, 1)))
    return params, Batch(inputs, valid=valid.astype(jnp.int32))


MODELS = {"chain": chain, "tied": tied}


STREAMED = Factorize(rank=RANK, streamed=True)


def taken(name, how, **options):
    params, batch = problem(name)
    estimator = kfac(MODELS[name], Categorical(), factorize=how, **options)
    return estimate(estimator, params, batch, key=jax.random.key(7))


@functools.cache
def dense_and_streamed(name, **options):
    """The two curvatures of one model and set of options, estimated once for all tests."""
    return taken(name, "eigh", **options), taken(name, STREAMED, **options)


def sketched_by_hand(matrix, columns, rcond=1e-13):
    """(basis, 1 + k eigenvalues) of one moment, by NumPy from the image of these columns."""
    image = matrix @ columns
    nystrom = image @ np.linalg.pinv(columns.T @ image, rcond=rcond, hermitian=True) @ image.T
    values, vectors = np.linalg.eigh((nystrom + nystrom.T) / 2)
    values, vectors = values[-RANK:], vectors[:, -RANK:]
    rest = (np.trace(matrix) - values.sum()) / (len(matrix) - RANK)
    return vectors, np.concatenate([[rest], values])


def random_columns(d, has_bias, dtype=float):
    """Ω as a sketch has it, the bias's column beside it."""
    number = d - 1 if has_bias else d
    columns = jax.random.normal(jax.random.key(0), (number, COLUMNS), dtype)
    columns = np.asarray(columns, np.float64) / np.sqrt(number)
    if not has_bias:
        return columns
    whole = np.zeros((d, COLUMNS + 1))
    whole[:-1, :-1], whole[-1, -1] = columns, 1
    return whole


def check_factor(factor, matrix, columns, tolerance):
    """That a factor is what NumPy makes of the dense one."""
    for layer, one in enumerate(np.asarray(matrix, np.float64)):
        vectors, values = sketched_by_hand(one, columns)
        found = np.asarray(factor.basis[layer], np.float64)
        kept = np.asarray(factor.eigenvalues[layer], np.float64)
        tolerance.check(kept, values, "factorization")
        expected = (vectors * values[1:]) @ vectors.T
        tolerance.check((found * kept[1:]) @ found.T, expected, "factorization")
        tolerance.check(found.T @ found, np.eye(RANK), "factorization")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("chain", {}),
        ("chain", {"sharing": "reduce"}),
        ("chain", {"centred": True, "samples": 2}),
        ("tied", {"fisher": "exact"}),
    ],
    ids=["chain", "reduce", "centred", "tied"],
)
def test_one_pass_is_the_sketch_of_the_dense_moments(name, options, tolerance):
    dense, streamed = dense_and_streamed(name, **options)
    assert dense.factors.keys() == streamed.factors.keys()
    forms = set()
    for n, factor in streamed.factors.items():
        matrix = dense.factors[n].matrix
        forms.add(factor.form)
        if factor.form != "leading":
            tolerance.check(factor.matrix, matrix, "contraction")
            continue
        d = matrix.shape[-1]
        if matrix.ndim == 2 or d <= COLUMNS:
            continue
        has_bias = "bias" in n and not options.get("centred")
        check_factor(factor, matrix, random_columns(d, has_bias), tolerance)
    assert "leading" in forms


def test_nothing_of_a_moments_size_is_held_and_the_plan_says_so(key):
    params, batch = problem("chain")
    estimator = kfac(chain, Categorical(), factorize=STREAMED)
    state = estimator.init(params, batch)
    shapes = {x.shape for x in jax.tree.leaves(state)}
    assert (1, 36, COLUMNS) in shapes
    assert (2, 30, COLUMNS) in shapes
    assert not {s for s in shapes if s[-2:] in ((36, 36), (30, 30))}
    assert isinstance(state.inputs["w"].moment, Sketch)
    planned_state, planned = estimator.planned(params, batch)
    found = estimator.finalize(estimator.update(state, params, batch, key))
    for one, other in ((planned_state, state), (planned, found)):
        for shape, value in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert (shape.shape, shape.dtype) == (value.shape, value.dtype)
    # 1,000 bytes hold the sums of one site at most.
    assert len(estimator.groups(params, batch, 1000)) == 3


def test_sums_of_parts_add_up(key, tolerance, monkeypatch):
    """Of shards, of blocks of rows, under jit, and starting from an earlier curvature."""
    params, batch = problem("chain")
    how = dataclasses.replace(STREAMED, start=dense_and_streamed("chain")[1])
    estimator = kfac(chain, Categorical(), factorize=how)
    empty = estimator.init(params, batch)
    whole = estimator.update(empty, params, batch, key)
    monkeypatch.setattr(row_blocks, "MOST_BYTES", 8 * 7 * LENGTH * 4)  # four rows at a time
    update = jax.jit(lambda *given: estimator.update(*given))
    assert "scan" in str(jax.make_jaxpr(update)(empty, params, batch, key))
    in_blocks = update(empty, params, batch, key)
    monkeypatch.undo()
    tolerance.check(in_blocks.inputs, whole.inputs, "contraction")
    tolerance.check(in_blocks.outputs, whole.outputs, "contraction")
    halves = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 6), slice(6, None))]
    step = jax.jit(lambda *given: estimator.update(*given))
    parts = [
        step(estimator.init(params, part, first), params, part, key)
        for part, first in zip(halves, (0, 6), strict=True)
    ]
    joined = jax.tree.map(jnp.add, *parts)
    tolerance.check(joined.inputs, whole.inputs, "contraction")
    tolerance.check(joined.outputs, whole.outputs, "contraction")


def span_error(factor, matrix):
    """How much of the leading eigenvalues' sum a basis misses, relative."""
    lost = 0.0
    for layer, one in enumerate(np.asarray(matrix, np.float64)):
        basis = np.asarray(factor.basis[layer], np.float64)
        best = np.linalg.eigvalsh(one)[-basis.shape[1] :].sum()
        lost = max(lost, 1 - np.trace(basis.T @ one @ basis) / best)
    return lost


def test_a_second_pass_refines_the_first():
    dense, first = dense_and_streamed("chain")
    second = taken("chain", Factorize(rank=RANK, streamed=True, start=first))
    sketched = [n for n, f in first.factors.items() if f.dimension > COLUMNS]
    assert len(sketched) == 5
    found = {
        name: [span_error(c.factors[name], dense.factors[name].matrix) for c in (first, second)]
        for name in sketched
    }
    assert max(before for before, _ in found.values()) > 1e-4, found
    # To float32's rounding; a factor of fewer directions than columns has no error to begin with.
    assert all(after < 0.3 * before + 2e-6 for before, after in found.values()), found


def decaying(rng, d, power=1.0, layers=2):
    """Moments of a power law's spectrum in random bases, and their eigenvalues, ascending."""
    values = np.sort(np.arange(1, d + 1) ** -power)
    bases = [np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(layers)]
    return np.stack([(q * values) @ q.T for q in bases]), values


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_iterated_eigenvectors_are_numpys(power):
    matrices, values = decaying(np.random.default_rng(1), 90, power)
    factor = leading(jnp.asarray(matrices, float), 6)
    assert factor.form == "leading"
    for layer, matrix in enumerate(matrices):
        found, basis = (
            np.asarray(x[layer], np.float64) for x in (factor.eigenvalues, factor.basis)
        )
        np.testing.assert_allclose(found[1:], values[-6:], rtol=3 * TOLERANCE)
        np.testing.assert_allclose(found.sum() + 83 * found[0], values.sum(), rtol=1e-5)
        np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-5)
        assert span_error(factor, matrices) < TOLERANCE
        # Ritz vectors: the matrix is diagonal among them.
        np.testing.assert_allclose(basis.T @ matrix @ basis, np.diag(found[1:]), atol=1e-5)


@pytest.fixture
def steps(monkeypatch):
    """How many products with a matrix were made."""
    calls = []
    product = subspace._product

    def watched(*given):
        calls.append(1)
        return product(*given)

    monkeypatch.setattr(subspace, "_product", watched)
    return calls


def test_a_start_saves_steps_and_the_answer_is_the_same_every_time(steps):
    matrices, _ = decaying(np.random.default_rng(2), 120, 0.7, layers=1)
    matrix = jnp.asarray(matrices, float)
    first = leading(matrix, 5)
    cold = len(steps)
    again = leading(matrix, 5)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    steps.clear()
    # Another matrix near by, from the first one's eigenvectors.
    moved = leading(1.01 * matrix, 5, first.basis)
    assert len(steps) < cold
    np.testing.assert_allclose(moved.eigenvalues, 1.01 * first.eigenvalues, rtol=3 * TOLERANCE)


def test_matrices_of_low_rank_and_of_none(steps):
    x = np.random.default_rng(3).normal(size=(1, 3, 80))
    low = jnp.asarray(np.einsum("lni,lnj->lij", x, x), float)
    factor = leading(low, 6)
    assert len(steps) <= 4  # what rounding leaves of zero is not waited for
    exact = np.linalg.eigvalsh(np.asarray(low[0], np.float64))
    np.testing.assert_allclose(factor.eigenvalues[0, -3:], exact[-3:], rtol=1e-5)
    assert float(factor.eigenvalues[0, 0]) < 1e-6 * exact[-1]
    nothing = leading(jnp.zeros((1, 80, 80)), 6)
    assert not np.any(np.asarray(nothing.eigenvalues))
    assert np.all(np.isfinite(np.asarray(nothing.basis)))


def test_values_that_have_not_come_to_rest_are_told_of(monkeypatch):
    monkeypatch.setattr(subspace, "MAX_STEPS", 1)
    matrix = jnp.diag(jnp.arange(1.0, 61.0))[None]
    with pytest.warns(UserWarning, match=r"the 2 leading eigenvalues of a factor of 60 columns"):
        subspace.leading(matrix, 2)


def test_an_estimate_starts_from_an_earlier_one(steps, monkeypatch):
    # So few columns that even axes as short as these are iterated.
    monkeypatch.setattr(subspace, "num_columns", lambda rank: 2 * rank)
    first = taken("chain", Factorize(rank=RANK))
    cold = len(steps)
    steps.clear()
    again = taken("chain", Factorize(rank=RANK, start=first))
    assert 0 < len(steps) < cold
    for name, factor in first.factors.items():
        np.testing.assert_allclose(
            again.factors[name].eigenvalues, factor.eigenvalues, rtol=10 * TOLERANCE, atol=1e-7
        )


def test_rows_in_bfloat16_are_summed_in_float32():
    params, batch = problem("chain")
    params, inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, batch.inputs))
    batch = batch._replace(inputs=inputs)
    dense, streamed = (
        estimate(kfac(chain, Categorical(), factorize=how), params, batch, key=jax.random.key(0))
        for how in ("eigh", STREAMED)
    )
    for name, factor in streamed.factors.items():
        assert factor.eigenvalues.dtype == jnp.float32
        matrix = np.asarray(dense.factors[name].matrix, np.float64)
        if matrix.ndim == 2 or matrix.shape[-1] <= COLUMNS:
            continue
        columns = random_columns(matrix.shape[-1], "bias" in name, jnp.float32)
        for layer, one in enumerate(matrix):
            # The dense moment itself is rounded to float32 here, and what it is divided by.
            values = sketched_by_hand(one, columns, rcond=1e-6)[1]
            found = np.asarray(factor.eigenvalues[layer], np.float64)
            np.testing.assert_allclose(found, values, rtol=5e-3, atol=2e-5 * values[-1])


def test_a_sum_that_is_not_finite_names_its_block(key):
    params, batch = problem("chain")
    estimator = kfac(chain, Categorical(), factorize=STREAMED)
    state = estimator.update(estimator.init(params, batch), params, batch, key)
    sums = state.inputs["w"]
    broken = sums._replace(
        moment=sums.moment._replace(image=sums.moment.image.at[0, 0, 0].set(jnp.nan))
    )
    state = dataclasses.replace(state, inputs={**state.inputs, "w": broken})
    with pytest.raises(FloatingPointError, match="curvature of 'w' is not finite"):
        estimator.finalize(state)


def test_what_goes_with_a_rank_is_refused_without():
    with pytest.raises(ValueError, match=r"streamed=True and start= .* rank=k"):
        Factorize(streamed=True)
    with pytest.raises(TypeError, match="start must be a Curvature"):
        Factorize(rank=2, start="earlier")  # type: ignore[arg-type]


def squares_by_hand(gradient, factors):
    """One gradient's squares in two factors' bases, and the means of what is off leading ones."""
    found = gradient
    rest = []
    for axis, (basis, has_rest) in enumerate(factors):
        whole = np.linalg.qr(basis, mode="complete")[0] if has_rest else basis
        if has_rest:  # any basis of the rest beside the leading ones
            whole = np.concatenate([whole[:, basis.shape[1] :], basis], axis=1)
        found = np.moveaxis(np.tensordot(whole.T, found, axes=(1, axis)), 0, axis)
        rest.append(len(basis) - basis.shape[1] if has_rest else 0)
    squares = found**2
    for axis, number in enumerate(rest):
        if number:
            first, others = np.split(squares, [number], axis=axis)
            squares = np.concatenate([first.mean(axis, keepdims=True), others], axis=axis)
    return squares


def bases_of(curvature, name, layer):
    """(basis, whether it is leading) of both factors of a block, in NumPy."""
    block = curvature.blocks[name]
    for factor in (curvature.factors[block.input], curvature.factors[block.output]):
        if factor.basis is None:
            yield np.eye(factor.dimension), False
        else:
            yield np.asarray(factor.basis[layer], np.float64), factor.form == "leading"


@pytest.mark.parametrize(("name", "length"), [("chain", LENGTH), ("chain", 1), ("tied", LENGTH)])
def test_corrected_values_are_squared_gradients(name, length, tolerance):
    curvature = dense_and_streamed(name)[1]
    params, batch = problem(name)
    rng = np.random.default_rng(8)
    classes = VOCAB if name == "tied" else 7
    targets = jnp.asarray(rng.integers(classes, size=(EXAMPLES, LENGTH)), jnp.int32)
    batch = jax.tree.map(lambda x: x[:, :length], batch._replace(targets=targets))
    estimator = ekfac(MODELS[name], Categorical(), curvature, fisher="empirical")
    found = estimate(estimator, params, batch, key=jax.random.key(0))

    def loss(params, inputs, targets, valid):
        logits = jax.nn.log_softmax(MODELS[name](params, inputs[None])[0])
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return -jnp.sum(jnp.where(valid, chosen, 0))

    of_each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0)))
    gradients = of_each(params, batch.inputs, batch.targets, batch.valid.astype(bool))
    gradients = {n: np.asarray(x, np.float64) for n, x in gradients.items()}
    if name == "chain":
        gradients["w"] = np.concatenate([gradients["w"], gradients.pop("b")[:, None]], axis=1)
        gradients["stack"] = np.concatenate(
            [gradients["stack"], gradients.pop("c")[:, :, None]], axis=2
        )
    number = np.asarray(batch.valid).sum()
    for block, gradient in gradients.items():
        corrected = np.asarray(found.blocks[block].corrected)
        layers = gradient[:, None] if gradient.ndim == 3 else gradient
        for layer in range(layers.shape[1]):
            bases = list(bases_of(curvature, block, layer))
            squares = sum(squares_by_hand(one[layer], bases) for one in layers) / number
            tolerance.check(corrected[layer], squares, "factorization")
    # The trace is that of the squares, whatever the basis.
    whole = sum(float((x**2).sum()) for x in gradients.values()) / number
    np.testing.assert_allclose(trace(found), whole, rtol=1e-5)
    if name == "chain" and length > 1:
        back = curvature_from_json(json.loads(json.dumps(curvature_to_json(found))), "here")
        shapes = [b.corrected.shape for b in back.blocks.values()]
        assert shapes == [b.corrected.shape for b in found.blocks.values()]
        step = {n: jnp.ones_like(x) for n, x in params.items()}
        round_trip = matvec(found, solve(found, step, damping=0.1), damping=0.1)
        tolerance.check(round_trip, step, "factorization")


def test_a_pass_from_another_start_does_not_go_on_from_a_checkpoint(tmp_path):
    """Its sums are images of other columns, of one shape with these."""
    params, batch = problem("chain")

    def one_pass(start):
        how = dataclasses.replace(STREAMED, start=start)
        estimator = kfac(chain, Categorical(), factorize=how)
        job = Checkpoint(tmp_path, every=1)
        return estimate(estimator, params, batch, key=jax.random.key(7), checkpoint=job)

    start = dense_and_streamed("chain")[1]
    second = one_pass(start)
    jax.tree.map(np.testing.assert_array_equal, one_pass(start), second)
    for other in (None, second):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            one_pass(other)


def test_a_start_of_another_model_is_refused():
    params, batch = problem("tied")
    how = dataclasses.replace(STREAMED, start=dense_and_streamed("chain")[1])
    with pytest.raises(ValueError, match="which the start covers|the start's parameter has"):
        kfac(tied, Categorical(), factorize=how).init(params, batch)


def test_factors_without_eigenvectors_cannot_be_corrected():
    curvature = taken("chain", "cholesky")
    with pytest.raises(ValueError, match="curvature of 'stack' has no eigenvectors"):
        ekfac(chain, Categorical(), curvature)


def test_its_programs_are_made_for_a_gpu_too():
    """Lowered for CUDA; nothing is said of their speed there."""
    d, n, layers = 64, 96, 2
    zero = zero_sketch(layers, d, jnp.dtype(jnp.float32), STREAMED)
    rows = jax.ShapeDtypeStruct((layers, n, d), jnp.bfloat16)
    wide = jax.ShapeDtypeStruct((d, COLUMNS), jnp.float32)
    square = jax.ShapeDtypeStruct((COLUMNS, COLUMNS), jnp.float32)
    for function, given in (
        (lambda s, x: add_rows(s, x, None), (jax.eval_shape(lambda: zero), rows)),
        (subspace._orthonormal, (wide,)),
        (jnp.linalg.eigh, (square,)),
        (lambda x: jnp.linalg.svd(x), (square,)),
    ):
        made = jax.export.export(jax.jit(function), platforms=["cuda"])(*given)
        assert made.platforms == ("cuda",)
