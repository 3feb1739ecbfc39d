"""GRPO against NumPy in float64, and its gradient against every answer there is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jedit.core.batch import Batch
from jedit.objectives import GRPO, Answers, group_advantages
from tests.objectives.references import (
    apply,
    make_problem,
    numpy_counted,
    numpy_nll,
)


@pytest.mark.parametrize(("clip", "kl_weight"), [(0.2, 0.01), (0.05, 0.7)])
def test_the_loss_is_numpy_s(tolerance, clip, kl_weight):
    params, reference, forget, _ = make_problem()
    drawn = jax.tree.map(lambda p: p + 0.1 * jnp.sin(7 * p), params)
    advantages = np.array([0.9, -1.3, 0.4, -0.2, 0.0])
    counted = numpy_counted(forget)
    old = numpy_nll(drawn, forget)
    garbage = jnp.where(counted, jnp.asarray(old), 55.0)  # where nothing counts
    found, aux = GRPO(clip, kl_weight)(
        apply, params, Answers(forget, garbage, jnp.asarray(advantages)), None, reference
    )
    now, before = numpy_nll(params, forget), numpy_nll(reference, forget)
    each, kls, clipped = [], [], []
    for i, is_token in enumerate(counted):
        if not is_token.any():
            continue
        ratio = np.exp(old[i] - now[i])[is_token]
        held = np.clip(ratio, 1 - clip, 1 + clip)
        gain = np.minimum(ratio * advantages[i], held * advantages[i])
        ref_over_now = np.exp(now[i] - before[i])[is_token]
        kl = ref_over_now - np.log(ref_over_now) - 1
        each.append(np.mean(gain - kl_weight * kl))
        kls.append(kl.mean())
        clipped.append(np.mean(ratio != held))
    tolerance.check(found, -np.mean(each))
    tolerance.check(aux["reference_kl"], np.mean(kls))
    tolerance.check(aux["clipped"], np.mean(clipped))
    assert 0 < np.mean(clipped) < 1


def test_its_gradient_is_the_policy_gradient_of_all_answers(tolerance):
    """Answers of two tokens out of three: all nine, each weighted by its probability.

    E_p[R ∇log p] = ∇ Σ_o p(o) R(o), by `jax.grad` of the sum itself; and the estimated KL's mean is
    the KL of the two distributions over answers.
    """
    vocab = 3
    answers = np.array(list(itertools.product(range(vocab), repeat=2)))
    rng = np.random.default_rng(1)
    params, other = (
        {"first": jnp.asarray(rng.normal(size=vocab)), "next": jnp.asarray(rng.normal(size=(3, 3)))}
        for _ in range(2)
    )
    reward = jnp.asarray(rng.normal(size=len(answers)))

    def model(params, inputs):
        """Position 0 is the question; position 1 reads the answer's first token."""
        first = jnp.broadcast_to(params["first"], (len(inputs), vocab))
        return jnp.stack([first, params["next"][inputs[:, 1]]], axis=1)

    inputs = np.concatenate([np.zeros((len(answers), 1), int), answers[:, :1]], axis=1)
    rows = Batch(jnp.asarray(inputs), jnp.asarray(answers))

    def log_p(params):
        scores = jax.nn.log_softmax(model(params, rows.inputs), axis=-1)
        return jnp.sum(jnp.take_along_axis(scores, rows.targets[..., None], -1)[..., 0], axis=1)

    expected = jax.grad(lambda p: jnp.sum(jnp.exp(log_p(p)) * reward))(params)
    # The mean over answers is uniform and over an answer's two tokens: undo both by the weights.
    weights = jnp.exp(log_p(params)) * len(answers) * 2
    nll = -jnp.take_along_axis(
        jax.nn.log_softmax(model(params, rows.inputs), axis=-1), rows.targets[..., None], -1
    )[..., 0]
    objective = GRPO(kl_weight=0.0)

    def loss(p):
        return objective(model, p, Answers(rows, nll, weights * reward), None, other)[0]

    jax.tree.map(lambda a, b: tolerance.check(-a, b), jax.grad(loss)(params), expected)
    # k3 of whole answers, one by one, has the KL for its mean.
    kls = []
    for i in range(len(answers)):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], rows)
        given = Answers(one, nll[i : i + 1], jnp.zeros(1))
        kls.append(2 * float(GRPO(kl_weight=1.0)(model, params, given, None, other)[0]))
    p, q = np.exp(np.asarray(log_p(params))), np.exp(np.asarray(log_p(other)))
    # Token by token: the KL of the first tokens, and of the second ones given the first.
    tolerance.check(np.sum(p * kls), np.sum(scipy.special.rel_entr(p, q)))


def test_advantages_are_standardised_within_a_group(tolerance):
    rewards = np.array([[0.0, 0.5, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    found = np.asarray(group_advantages(rewards))
    tolerance.check(found[0], (rewards[0] - 0.625) / (np.std(rewards[0], ddof=1) + 1e-6))
    np.testing.assert_array_equal(found[1], 0)
    with pytest.raises(ValueError, match=r"two answers or more; got \(3, 1\)"):
        group_advantages(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="rewards must be a finite number"):
        group_advantages(np.array([[1.0, np.nan]]))
