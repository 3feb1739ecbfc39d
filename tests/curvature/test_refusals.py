"""Bad input gets a sentence, and a sum that is no number gets a name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import diagonal, ekfac, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from tests.curvature.programs import BY_NAME, POSITIONED, make_problem

MLP = BY_NAME["perceptron"]


@pytest.fixture
def mlp(key):
    """Params and a batch without padding."""
    return make_problem(MLP, key, is_padded=False)


def run(params, batch, key, apply=MLP.run, **options):
    return estimate(kfac(apply, Categorical(), **options), params, [batch], key=key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "true"}, "fisher must be one of sampled, exact, empirical, got 'true'"),
        ({"sharing": "share"}, "sharing must be one of expand, reduce, got 'share'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        kfac(MLP.run, Categorical(), **options)


def test_no_batch(mlp, key):
    with pytest.raises(ValueError, match="estimate got no batch"):
        estimate(kfac(MLP.run, Categorical()), mlp[0], [], key=key)


def test_shapes_that_disagree(mlp, key):
    params, batch = mlp
    for name in ("mask", "valid"):
        with pytest.raises(ValueError, match=rf"batch\.{name} has shape \(3,\), .* \(3, 4\)"):
            run(params, batch._replace(**{name: jnp.ones(3)}), key)
        with pytest.raises(ValueError, match=rf"batch\.{name} has shape \(2, 4\), .* \(3, 4\)"):
            run(params, batch._replace(**{name: jnp.ones((2, 4))}), key)
    targets = jnp.zeros((2, 4), int)
    for fisher in ("sampled", "empirical"):
        with pytest.raises(ValueError, match=r"batch\.targets has shape \(2, 4\), .* 3 examples"):
            run(params, batch._replace(targets=targets), key, fisher=fisher)
    with pytest.raises(ValueError, match=r"targets .* must have shape \(3, 4\), got \(3, 5\)"):
        run(params, batch._replace(targets=jnp.zeros((3, 5), int)), key, fisher="empirical")
    inputs = {"x": batch.inputs, "more": jnp.ones((2, 4))}
    with pytest.raises(ValueError, match="leading axes of the inputs disagree"):
        run(params, batch._replace(inputs=inputs), key, apply=lambda p, i: MLP.run(p, i["x"]))


def test_outputs_that_do_not_lead_with_the_examples(mlp, key):
    params, batch = mlp

    def flat(params, x):
        return MLP.run(params, x).reshape(12, -1)

    with pytest.raises(ValueError, match=r"leading shape is \(12,\), but the inputs lead with 3"):
        run(params, batch, key, apply=flat)
    with pytest.raises(ValueError, match=r"leading shape is \(\), but the inputs lead with 3"):
        run(params, batch, key, apply=lambda p, x: jnp.sum(MLP.run(p, x), axis=(0, 1)))


def test_missing_targets(mlp, key):
    params, batch = mlp
    for make in (kfac, diagonal):
        with pytest.raises(ValueError, match='fisher="empirical" needs batch.targets'):
            estimate(make(MLP.run, Categorical(), fisher="empirical"), params, [batch], key=key)


def test_selected_parameters_that_are_not_covered(mlp, key):
    params, batch = mlp
    params = {**params, "rate": jnp.ones(3)}

    def apply(params, x):
        logits = MLP.run(params, x)
        return logits * jnp.broadcast_to(jax.nn.relu(params["rate"]), logits.shape)

    with pytest.raises(ValueError, match=r"cannot be captured:\n  rate: .*custom derivative"):
        run(params, batch, key, apply=apply, select=["w", "rate"])
    assert "rate" not in run(params, batch, key, apply=apply).covered
    with pytest.raises(ValueError, match=r"no parameter can be captured:(.|\n)*rate: "):
        run({"rate": params["rate"]}, batch, key, apply=lambda p, x: apply({**params, **p}, x))
    with pytest.raises(ValueError, match="'nothing' matches no parameter"):
        run(params, batch, key, apply=apply, select="nothing")


def test_overlapping_layouts(key):
    """One leaf as a whole matrix and as another matrix of a part of it."""

    def apply(params, x):
        return (x @ params["w"]) + jnp.tanh(x[:, :2] @ params["w"][:2])

    with pytest.raises(ValueError, match="layouts that overlap without being equal or transposed"):
        run({"w": jnp.ones((4, 3))}, Batch(jnp.ones((5, 4))), key, apply=apply)


def test_reduce_needs_examples(key):
    params, batch = make_problem(POSITIONED, key, is_padded=False)
    with pytest.raises(ValueError, match=r"reduce.* p \(programs.py:\d+\) has no axis"):
        run(params, batch, key, apply=POSITIONED.run, sharing="reduce")


def backwards(params, x):
    """Positions are in another order inside, so that a site's axes match no mask."""
    return MLP.run(params, x[:, ::-1])[:, ::-1]


PADDED = jnp.ones((3, 4)).at[1, 2].set(0)
WHY = (
    r"the positions of (w, v|w|v) cannot be matched with the outputs' leading axes, and some batch"
)


def test_padding_that_cannot_be_told_is_refused_at_once(mlp, key):
    params, batch = mlp
    padded = batch._replace(valid=PADDED)
    whole = run(params, batch._replace(valid=jnp.ones((3, 4))), key, apply=backwards)
    for estimator in (
        kfac(backwards, Categorical()),
        ekfac(backwards, Categorical(), whole),
        diagonal(backwards, Categorical()),
    ):
        with pytest.raises(ValueError, match=WHY):
            estimator.init(params, padded)


def test_padding_that_shows_later_names_the_block(mlp, key):
    """In a later batch, or where the first is traced, what is summed is made not a number."""
    params, batch = mlp
    first, later = batch._replace(valid=jnp.ones((3, 4))), batch._replace(valid=PADDED)
    whole = run(params, first, key, apply=backwards)
    for estimator in (
        kfac(backwards, Categorical()),
        ekfac(backwards, Categorical(), whole),
        diagonal(backwards, Categorical()),
    ):
        estimate(estimator, params, [first, first], key=key)
        with pytest.raises(FloatingPointError, match=r"curvature of 'w' is not finite: " + WHY):
            estimate(estimator, params, [first, later], key=key)
        state = jax.jit(lambda p, b, k, e=estimator: e.update(e.init(p, b), p, b, k))(
            params, later, key
        )
        with pytest.raises(FloatingPointError, match=WHY):
            estimator.finalize(state)


def test_padding_of_a_bias_needs_no_matching(key):
    """A table of positions is a bias of examples: it has no input that padding could pollute."""
    program = BY_NAME["normalised"]
    params, batch = make_problem(program, key)
    curvature = estimate(kfac(program.run, Categorical()), params, [batch], key=key)
    assert "positions" in curvature.covered


def test_a_sum_that_is_not_finite_is_named(mlp, key):
    params, batch = mlp
    params = {**params, "v": params["v"].at[0, 0].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match="curvature of 'w' is not finite: .*overflowed"):
        run(params, batch, key)
    with pytest.raises(FloatingPointError, match="curvature of 'w' is not finite: .*overflowed"):
        estimate(diagonal(MLP.run, Categorical()), params, [batch], key=key)


def test_the_layer_that_is_not_finite_is_named(key):
    program = BY_NAME["stack"]
    params, batch = make_problem(program, key)
    estimator = kfac(program.run, Categorical())
    state = estimator.update(estimator.init(params, batch), params, batch, key)
    state.outputs["w"] = state.outputs["w"].at[1, 0, 0].set(np.inf)
    with pytest.raises(
        FloatingPointError, match=r"curvature of 'w' \(layers \[1\]\) is not finite"
    ):
        estimator.finalize(state)
