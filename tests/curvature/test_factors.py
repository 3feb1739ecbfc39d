"""K-FAC's factors equal sums that NumPy makes in float64, for every kind of site."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import Factorize, diagonal, ekfac, estimate, factors, kfac
from jedit.curvature.likelihoods import Bernoulli, Categorical, Gaussian
from jedit.curvature.types import Diagonal
from jedit.models import gpt
from tests.curvature.programs import (
    BY_NAME,
    EXAMPLES,
    PROGRAMS,
    TEMPERED,
    exact_kfac,
    make_problem,
    untapped,
)
from tests.curvature.references import counted, factors_by_hand, label_scores

each_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
REDUCED = ["heads", "convolution", "stack", "recurrent", "branches"]
POSITION_WISE = ["heads", "convolution", "stack", "mixture", "normalised"]


def check_factors(curvature, expected, tolerance):
    for path, (a, g) in expected.items():
        found_a, found_g = factors(curvature, path)
        if found_a.ndim < a.ndim:  # token frequencies
            np.testing.assert_array_equal(a, np.diag(np.diag(a)))
            a = np.diag(a)
        tolerance.check(found_a, a)
        tolerance.check(found_g, g)


@each_program
def test_factors_are_numpy_sums(program, tolerance):
    params, batch, curvature = exact_kfac(program)
    by_hand = program.model(params, batch.inputs, untapped)
    tolerance.check(program.run(params, batch.inputs), by_hand, "rounding")
    expected = factors_by_hand(program, params, batch, TEMPERED)
    names = {name for name, block in curvature.blocks.items() if not isinstance(block, Diagonal)}
    assert names == set(expected)
    assert int(curvature.num_outputs) == counted(batch, program.lead).sum()
    check_factors(curvature, expected, tolerance)


@pytest.mark.parametrize("name", REDUCED)
def test_reduced_factors_are_numpy_sums(name, key, tolerance):
    program = BY_NAME[name]
    params, batch = make_problem(program, key)
    estimator = kfac(program.run, Categorical(), fisher="exact", sharing="reduce")
    curvature = estimate(estimator, params, [batch], key=key)
    expected = factors_by_hand(program, params, batch, Categorical(), "reduce")
    check_factors(curvature, expected, tolerance)


def test_reduced_lookup_keeps_the_diagonal_of_mean_rows(key, tolerance):
    program = BY_NAME["embedding"]
    params, batch = make_problem(program, key)
    estimator = kfac(program.run, Categorical(), select="e", fisher="exact", sharing="reduce")
    found = factors(estimate(estimator, params, [batch], key=key), "e")
    a, g = factors_by_hand(program, params, batch, Categorical(), "reduce")["e"]
    assert not np.allclose(a, np.diag(np.diag(a)))
    tolerance.check(found, (np.diag(a), g))


@pytest.mark.parametrize("likelihood", [Gaussian(0.7), Bernoulli(1.3)], ids=str)
def test_factors_for_other_likelihoods(likelihood, key, tolerance):
    program = BY_NAME["perceptron"]
    params, batch = make_problem(program, key)
    curvature = estimate(kfac(program.run, likelihood, fisher="exact"), params, [batch], key=key)
    check_factors(curvature, factors_by_hand(program, params, batch, likelihood), tolerance)


def test_bias_coordinate_by_hand(tolerance):
    """The mean of valid inputs, and one in the corner."""
    _, batch, curvature = exact_kfac(BY_NAME["perceptron"])
    a, _ = factors(curvature, "w")
    valid = np.asarray(batch.valid).astype(bool)
    x = np.asarray(batch.inputs, np.float64)[valid]
    tolerance.check(a[-1], np.append(x.mean(0), 1))
    tolerance.check(a[:-1, :-1], x.T @ x / len(x))


def test_top_layer_gradients_are_those_of_the_softmax(tolerance):
    program = BY_NAME["perceptron"]
    params, batch, curvature = exact_kfac(program)
    scores = label_scores(TEMPERED, program.run(params, batch.inputs))
    scores = scores[:, counted(batch, program.lead)]
    expected = np.einsum("kni,knj->ij", scores, scores) / scores.shape[1]
    tolerance.check(factors(curvature, "v")[1], expected)


@pytest.mark.parametrize("name", POSITION_WISE)
def test_garbage_in_padding_changes_nothing(name, key):
    """Bit for bit, for all three estimators, through one compiled step each."""
    program = BY_NAME[name]
    params, batch, curvature = exact_kfac(program)
    estimators = [
        kfac(program.run, TEMPERED),
        ekfac(program.run, TEMPERED, curvature),
        diagonal(program.run, TEMPERED),
    ]
    is_padding = np.asarray(batch.valid) == 0
    for estimator in estimators[: 3 if name == "normalised" else 1]:
        update = jax.jit(estimator.update)
        start = estimator.init(params, batch)
        clean = update(start, params, batch, key)
        for garbage in (1e30, np.inf, np.nan):
            inputs = np.array(batch.inputs)
            inputs[is_padding] = garbage
            dirty = update(start, params, batch._replace(inputs=jnp.asarray(inputs)), key)
            jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_any_token_may_stand_in_padding(key):
    program = BY_NAME["tied"]
    params, batch, _ = exact_kfac(program)
    estimator = kfac(program.run, TEMPERED)
    update, start = jax.jit(estimator.update), estimator.init(params, batch)
    clean = update(start, params, batch, key)
    for garbage in (-7, 1_000_000):
        tokens = jnp.where(batch.valid == 1, batch.inputs, garbage)
        dirty = update(start, params, batch._replace(inputs=tokens), key)
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_masked_outputs_still_enter_the_inputs_moment(key, tolerance):
    """`mask` is about the loss, `valid` about data: a prompt is data that has no loss."""
    program = BY_NAME["perceptron"]
    params, batch = make_problem(program, key, is_padded=False)
    mask = jnp.zeros(program.lead).at[:, -1].set(1)
    curvature = estimate(
        kfac(program.run, Categorical()), params, [batch._replace(mask=mask)], key=key
    )
    x = np.asarray(batch.inputs, np.float64).reshape(-1, 4)
    tolerance.check(factors(curvature, "w")[0][:-1, :-1], x.T @ x / len(x))
    assert curvature.num_outputs == EXAMPLES


def test_long_axes_get_diagonal_factors(key, tolerance):
    program = BY_NAME["perceptron"]
    params, batch, whole = exact_kfac(program)
    short = kfac(program.run, TEMPERED, fisher="exact", factorize=Factorize(max_dim=4))
    short = estimate(short, params, [batch], key=key)
    for path, is_long in {"w": (False, True), "v": (True, False)}.items():
        pairs = zip(factors(whole, path), factors(short, path), is_long, strict=True)
        for dense, found, is_diagonal in pairs:
            tolerance.check(found, jnp.diagonal(dense) if is_diagonal else dense)
    rows = str(short).splitlines()
    assert rows[1].split() == ["w", "+", "b", "5", "x", "5", "dense", "diagonal", "products"]
    assert rows[2].split() == ["v", "5", "x", "3", "diagonal", "dense", "products"]


def test_a_long_input_axis_keeps_its_bias(key, tolerance):
    program = BY_NAME["factored"]
    params, batch, whole = exact_kfac(program)
    short = kfac(program.run, TEMPERED, fisher="exact", factorize=Factorize(max_dim=3))
    short = estimate(short, params, [batch], key=key)
    tolerance.check(factors(short, "w")[0], jnp.diagonal(factors(whole, "w")[0]))


def test_sites_that_read_one_activation_share_its_factor(key):
    """Query, key and value: one moment, one eigenbasis; with a bias, or a factor, another one."""
    shapes = {"q": (4, 4), "k": (4, 4), "v": (4, 4), "half": (4, 4), "biased": (4, 4), "b": (4,)}
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), float) for name, shape in shapes.items()}

    def apply(params, x):
        x = jnp.tanh(x)
        out = (x @ params["q"]) * (x @ params["k"]) + x @ params["v"]
        biased = x @ params["biased"] + jnp.broadcast_to(params["b"], x.shape)
        return out + x @ (0.5 * params["half"]) + jnp.sin(biased)

    estimator = kfac(apply, Categorical())
    batch = Batch(jnp.asarray(rng.normal(size=(6, 4)), float))
    assert len(estimator.init(params, batch).inputs) == 1
    curvature = estimate(estimator, params, [batch], key=key)
    used = {name: block.input for name, block in curvature.blocks.items()}
    assert used["q"] == used["k"] == used["v"]
    assert len({used["q"], used["half"], used["biased"]}) == 3
    assert len(curvature.factors) == 3 + 5
    np.testing.assert_allclose(factors(curvature, "half")[0], factors(curvature, "q")[0] / 4)


def test_a_branch_counts_only_what_ran_in_it(key, tolerance):
    """Two batches that take different branches: each weight's A is over its own batch alone."""

    def apply(params, inputs):
        x, is_first = inputs
        return jax.lax.cond(is_first[0], lambda: x @ params["u"], lambda: x @ params["w"])

    rng = np.random.default_rng(6)
    params = {name: jnp.asarray(rng.normal(size=(4, 3))) for name in ("u", "w")}
    batches, expected = [], {}
    for name, is_first in (("u", True), ("w", False)):
        x, valid = rng.normal(size=(7, 4)), np.arange(7) % 3 > 0
        batches.append(Batch((jnp.asarray(x), jnp.full((7,), is_first)), valid=jnp.asarray(valid)))
        expected[name] = x[valid].T @ x[valid] / valid.sum()
    curvature = estimate(kfac(apply, Categorical()), params, batches, key=key)
    for name, a in expected.items():
        tolerance.check(factors(curvature, name)[0], a)


def test_blocks_of_one_input_give_their_basis_to_the_step_once(key):
    """So that what the three read is rotated once: of two arguments XLA cannot know it."""
    apply, params = gpt(key=key, vocab=7, width=8, num_layers=1, num_heads=2, max_len=3)
    batch = Batch(jnp.zeros((2, 3), jnp.int32))
    estimator = kfac(apply, Categorical(), select="(query|key|value)/kernel")
    curvature = estimate(estimator, params, [batch], key=jax.random.key(0))
    held = jax.tree.leaves(ekfac(apply, Categorical(), curvature).update)
    # One of the input, three of the outputs.
    assert len(held) == len(curvature.factors) == 4
