"""Likelihoods against jax.grad, jax.hessian, scipy and their own standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jedit.core.batch import Batch
from jedit.core.outputs import counted_outputs
from jedit.curvature import likelihoods
from jedit.curvature.likelihoods import Bernoulli, Categorical, Gaussian

LEAD, EVENT = (3, 2), 5
ALL = [Categorical(2.5), Gaussian(scale=0.3), Bernoulli(temperature=0.6)]
each_likelihood = pytest.mark.parametrize("likelihood", ALL, ids=str)


def logits(key, *, spread=2.0, lead=LEAD, event=EVENT):
    return spread * jax.random.normal(key, (*lead, event))


def targets_for(likelihood, outputs, key):
    if isinstance(likelihood, Categorical):
        return jax.random.randint(key, outputs.shape[:-1], 0, outputs.shape[-1])
    if isinstance(likelihood, Gaussian):
        return jax.random.normal(key, outputs.shape)
    return jax.random.bernoulli(key, 0.4, outputs.shape).astype(outputs.dtype)


def dense_hessian(likelihood, outputs, targets):
    """The Hessian of each output's own loss, (*lead, event, event), by autodiff."""
    flat = outputs.reshape(-1, outputs.shape[-1])
    flat_targets = targets.reshape(len(flat), *targets.shape[outputs.ndim - 1 :])
    one = jax.jit(jax.vmap(jax.hessian(lambda z, y: likelihood.nll(z[None], y[None])[0])))
    return one(flat, flat_targets).reshape(*outputs.shape, outputs.shape[-1])


@each_likelihood
def test_nll_is_scipys_log_density(likelihood, key, tolerance):
    k_z, k_y = jax.random.split(key)
    z = logits(k_z)
    y = targets_for(likelihood, z, k_y)
    z64, y64 = np.asarray(z, np.float64), np.asarray(y)
    if isinstance(likelihood, Categorical):
        log_p = scipy.special.log_softmax(z64 / likelihood.temperature, axis=-1)
        expected = -np.take_along_axis(log_p, y64[..., None], -1)[..., 0]
    elif isinstance(likelihood, Gaussian):
        expected = -scipy.stats.norm.logpdf(y64, z64, likelihood.scale).sum(-1)
    else:
        p = scipy.special.expit(z64 / likelihood.temperature)
        expected = -scipy.stats.bernoulli.logpmf(y64, p).sum(-1)
    assert likelihood.lead_shape(z) == LEAD
    tolerance.check(likelihood.nll(z, y), expected, "rounding")


@each_likelihood
def test_empirical_cotangent_is_the_gradient(likelihood, key, tolerance):
    k_z, k_y = jax.random.split(key)
    z = logits(k_z)
    y = targets_for(likelihood, z, k_y)
    expected = jax.grad(lambda z: jnp.sum(likelihood.nll(z, y)))(z)
    tolerance.check(likelihood.empirical_cotangent(z, y), expected, "rounding")


def test_soft_bernoulli_targets(key, tolerance):
    likelihood = Bernoulli(temperature=0.6)
    k_z, k_y = jax.random.split(key)
    z = logits(k_z)
    y = jax.random.uniform(k_y, z.shape)
    p = scipy.special.expit(np.asarray(z, np.float64) / 0.6)
    expected = -(np.asarray(y) * np.log(p) + (1 - np.asarray(y)) * np.log1p(-p)).sum(-1)
    tolerance.check(likelihood.nll(z, y), expected, "rounding")
    gradient = jax.grad(lambda z: jnp.sum(likelihood.nll(z, y)))(z)
    tolerance.check(likelihood.empirical_cotangent(z, y), gradient, "rounding")


def exact_cotangents(likelihood, z):
    """All columns of the square root of H, stacked in front."""
    columns = jnp.arange(likelihood.num_columns(z))
    return jax.vmap(lambda k: likelihood.exact_cotangent(z, k))(columns)


@each_likelihood
def test_hessian_product_and_exact_columns_are_the_dense_hessian(likelihood, key, tolerance):
    k_z, k_y, k_t = jax.random.split(key, 3)
    z = logits(k_z)
    dense = dense_hessian(likelihood, z, targets_for(likelihood, z, k_y))
    tangent = jax.random.normal(k_t, z.shape)
    expected = jnp.einsum("...ij,...j->...i", dense, tangent)
    tolerance.check(likelihood.hessian_product(z, tangent), expected)
    columns = exact_cotangents(likelihood, z)
    assert columns.shape == (likelihood.num_columns(z), *z.shape)
    tolerance.check(jnp.einsum("k...i,k...j->...ij", columns, columns), dense)
    tolerance.check(likelihood.exact_cotangent(z, 2), columns[2], "rounding")


@each_likelihood
def test_sampled_fisher_converges_to_the_exact_one(likelihood, key):
    num_draws = 4000
    k_z, k_noise = jax.random.split(key)
    z = logits(k_z, lead=(2,))
    repeated = jnp.broadcast_to(z[:, None], (2, num_draws, EVENT))
    noise = likelihood.noise(repeated, jnp.arange(2), key=k_noise)
    c = np.asarray(likelihood.sampled_cotangent(repeated, noise), np.float64)
    outer = c[..., :, None] * c[..., None, :]
    columns = np.asarray(exact_cotangents(likelihood, z), np.float64)
    exact = np.einsum("kni,knj->nij", columns, columns)
    error = outer.std(axis=1, ddof=1) / np.sqrt(num_draws)
    # 50 entries and two first moments of 5: five standard errors are one miss in 10^4 such tests.
    assert np.all(np.abs(outer.mean(axis=1) - exact) <= 5 * error + 1e-6)
    mean_error = c.std(axis=1, ddof=1) / np.sqrt(num_draws)
    assert np.all(np.abs(c.mean(axis=1)) <= 5 * mean_error + 1e-6)


@pytest.mark.parametrize("event", [1, 3, 64, 65, 257])
def test_labels_are_those_of_a_searched_cumulative_sum(event, key):
    """Every output's label against NumPy's cumulative sum in float64, away from the boundaries."""
    k_z, k_u = jax.random.split(key)
    z = logits(k_z, lead=(500,), event=event)
    u = jax.random.uniform(k_u, (500,), z.dtype)
    draw = jax.jit(lambda z, u: likelihoods._inverse_cdf(likelihoods._unnormalised(z), u))
    labels = np.asarray(draw(z, u))
    edges = np.cumsum(scipy.special.softmax(np.asarray(z, np.float64), axis=-1), axis=-1)
    expected = np.minimum((edges <= np.asarray(u)[:, None]).sum(-1), event - 1)
    is_clear = np.min(np.abs(edges - np.asarray(u)[:, None]), axis=-1) > 1e-6
    assert is_clear.mean() > 0.9
    np.testing.assert_array_equal(labels[is_clear], expected[is_clear])


def test_label_frequencies_match_the_probabilities(key):
    num_draws, event = 40_000, 11
    k_z, k_noise = jax.random.split(key)
    z = jnp.broadcast_to(logits(k_z, lead=(1,), event=event), (num_draws, event))
    likelihood = Categorical(temperature=1.7)
    noise = likelihood.noise(z, jnp.arange(num_draws), key=k_noise)
    # The only negative entry of a score is the drawn class.
    drawn = np.argmin(np.asarray(likelihood.sampled_cotangent(z, noise)), axis=-1)
    p = scipy.special.softmax(np.asarray(z[0], np.float64) / 1.7)
    error = np.sqrt(p * (1 - p) / num_draws)
    frequency = np.bincount(drawn, minlength=event) / num_draws
    assert np.all(np.abs(frequency - p) <= 4.5 * error)


@pytest.mark.parametrize("event", [5, 1000, 4097])
def test_impossible_classes_are_never_drawn(event, key):
    """Neither a uniform at the edge nor rounding of a parallel sum selects a class without mass."""
    k_z, k_hole = jax.random.split(key)
    z = logits(k_z, lead=(400,), event=event).astype(jnp.float32)
    is_hole = jax.random.bernoulli(k_hole, 0.6, z.shape).at[:, 0].set(True).at[:, -1].set(True)
    is_hole = is_hole.at[:, event // 2].set(False)
    z = jnp.where(is_hole, -jnp.inf, z)
    weights = likelihoods._unnormalised(z)
    below_one = np.nextafter(np.float32(1), np.float32(0))
    edges = np.cumsum(np.asarray(weights / weights.sum(-1, keepdims=True)), axis=-1)
    uniforms = [np.full(400, u, np.float32) for u in (0, 1e-30, 0.5, 1 - 1e-6, below_one, 1)]
    # The boundaries between classes are where rounding decides.
    uniforms += [edges[:, column] for column in range(0, event, max(event // 50, 1))]
    draw = jax.jit(likelihoods._inverse_cdf)
    for u in uniforms:
        labels = np.asarray(draw(weights, jnp.asarray(u)))
        assert np.all(np.take_along_axis(np.asarray(weights), labels[:, None], 1) > 0)


@pytest.mark.parametrize("event", [3, 64, 67])
def test_labels_stay_inside_the_classes(event, key):
    weights = jax.random.uniform(key, (400, event), jnp.float32, minval=0.1)
    for u in (np.nextafter(np.float32(1), np.float32(0)), 1.0):
        labels = likelihoods._inverse_cdf(weights, jnp.full(400, u, jnp.float32))
        np.testing.assert_array_equal(labels, event - 1)


def test_a_running_sum_that_is_not_monotone_selects_no_empty_class(monkeypatch):
    """A parallel prefix sum may round equal sums differently; here the empty class 1 is higher."""
    wobbly = jnp.array([[0.5, 0.5000001, 1.0]], jnp.float32)
    monkeypatch.setattr(likelihoods.jnp, "cumsum", lambda *_, **__: wobbly)
    weights, level = jnp.array([[0.5, 0.0, 0.5]], jnp.float32), jnp.array([0.5], jnp.float32)
    first, _ = likelihoods._first_above(weights, level)
    assert first[0] == 2


def test_certain_and_huge_logits_stay_finite(key):
    z = jnp.array([[1e4, 0.0, -1e4], [0.0, -jnp.inf, -jnp.inf], [-jnp.inf, 3.0, 3.0]])
    likelihood = Categorical()
    y = jnp.array([0, 0, 2])
    np.testing.assert_allclose(likelihood.nll(z, y), [0, 0, np.log(2)], rtol=1e-6, atol=1e-12)
    noise = likelihood.noise(z, jnp.arange(3), key=key)
    certain = likelihood.sampled_cotangent(z, noise)[:2]
    np.testing.assert_array_equal(certain, np.zeros((2, 3)))
    assert np.all(np.isfinite(exact_cotangents(likelihood, z)))
    np.testing.assert_allclose(likelihood.kl(z, z), 0, atol=1e-12)
    product = likelihood.hessian_product(z, jnp.ones_like(z).at[2, 1].set(2.0))
    np.testing.assert_allclose(product, [[0, 0, 0], [0, 0, 0], [0, 0.25, -0.25]], atol=1e-7)
    extreme = Bernoulli()
    z = jnp.array([[-jnp.inf, jnp.inf, 200.0]])
    assert extreme.nll(z, jnp.array([[0.0, 1.0, 1.0]])) <= 1e-80
    assert np.all(np.isfinite(extreme.empirical_cotangent(z, jnp.array([[1.0, 0.0, 0.0]]))))


@each_likelihood
def test_kl_is_the_closed_form(likelihood, key, tolerance):
    k_p, k_q = jax.random.split(key)
    z, other = logits(k_p), logits(k_q, spread=4.0)
    p64, q64 = np.asarray(z, np.float64), np.asarray(other, np.float64)
    if isinstance(likelihood, Gaussian):
        expected = ((p64 - q64) ** 2).sum(-1) / (2 * likelihood.scale**2)
    elif isinstance(likelihood, Categorical):
        p, q = (scipy.special.softmax(x / likelihood.temperature, axis=-1) for x in (p64, q64))
        expected = scipy.special.rel_entr(p, q).sum(-1)
    else:
        p, q = (scipy.special.expit(x / likelihood.temperature) for x in (p64, q64))
        pairs = scipy.special.rel_entr(p, q) + scipy.special.rel_entr(1 - p, 1 - q)
        expected = pairs.sum(-1)
    tolerance.check(likelihood.kl(z, other), expected)


@each_likelihood
def test_kl_has_the_hessian_as_second_derivative(likelihood, key, tolerance):
    k_z, k_y = jax.random.split(key)
    z = logits(k_z, lead=(1,))
    dense = dense_hessian(likelihood, z, targets_for(likelihood, z, k_y))
    kl = jax.jit(jax.hessian(lambda d: likelihood.kl(z, z + d[None])[0]))
    second = kl(jnp.zeros(EVENT, z.dtype))
    tolerance.check(second, dense[0])


@pytest.mark.parametrize("likelihood", [Categorical(1.5), Bernoulli(1.5)], ids=str)
def test_small_kl_keeps_its_digits_in_float32(likelihood, key):
    """A direct sum of p log(p / q) is wrong by several times the KL at this distance."""
    k_z, k_d = jax.random.split(key)
    z = logits(k_z, lead=(20,), event=1000).astype(jnp.float32)
    other = z + 3e-4 * jax.random.normal(k_d, z.shape, jnp.float32)
    expected = 0.5 * jnp.sum((other - z) * likelihood.hessian_product(z, other - z), axis=-1)
    actual = likelihood.kl(z, other)
    assert np.all(np.asarray(actual) >= 0)
    np.testing.assert_allclose(actual, expected, rtol=5e-3)


def test_kl_where_one_side_excludes_a_class():
    p, q = jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([0.0, 0.0, 0.0])
    np.testing.assert_allclose(Categorical().kl(p, q), np.log(1.5), rtol=1e-6)
    assert Categorical().kl(q, p) == jnp.inf


@each_likelihood
def test_noise_belongs_to_the_example(likelihood, key):
    z = logits(key, lead=(6, 4))
    ids = jnp.array([7, 3, 0, 2**31 - 1, 11, 4], jnp.int32)
    whole = likelihood.noise(z, ids, key=key)
    split = [likelihood.noise(z[s], ids[s], key=key) for s in (slice(0, 1), slice(1, 6))]
    np.testing.assert_array_equal(whole, np.concatenate(split))
    shuffled = likelihood.noise(z, ids[::-1], key=key)
    np.testing.assert_array_equal(whole[::-1], shuffled)
    assert len(np.unique(np.asarray(whole))) == whole.size


@each_likelihood
def test_jit_vmap_and_bfloat16(likelihood, key, tolerance):
    k_z, k_y, k_u = jax.random.split(key, 3)
    z = logits(k_z)
    y = targets_for(likelihood, z, k_y)
    noise = likelihood.noise(z, jnp.arange(3), key=k_u)
    tolerance.check(
        jax.jit(type(likelihood).sampled_cotangent)(likelihood, z, noise),
        likelihood.sampled_cotangent(z, noise),
        "rounding",
    )
    tolerance.check(jax.vmap(likelihood.nll)(z, y), likelihood.nll(z, y), "rounding")
    narrow = z.astype(jnp.bfloat16)
    assert likelihood.nll(narrow, y).dtype == jnp.float32
    assert likelihood.kl(narrow, narrow).dtype == jnp.float32
    assert likelihood.noise(narrow, jnp.arange(3), key=k_u).dtype == jnp.float32
    for cotangent in (
        likelihood.sampled_cotangent(narrow, noise),
        likelihood.empirical_cotangent(narrow, y),
        likelihood.hessian_product(narrow, narrow),
        likelihood.exact_cotangent(narrow, 1),
    ):
        assert cotangent.dtype == jnp.bfloat16
    # Arithmetic is wide: one rounding of the result away from that of the same values in float32.
    exact = likelihood.empirical_cotangent(narrow.astype(jnp.float32), y)
    rounded = likelihood.empirical_cotangent(narrow, y)
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_values_are_frozen_hashable_and_static():
    assert Categorical(2.0) == Categorical(temperature=2.0)
    assert len({Categorical(), Categorical(1.0), Categorical(2.0), Gaussian(), Bernoulli()}) == 4
    assert jax.tree.leaves(Categorical()) == []


def test_output_mask_combines_mask_and_valid():
    batch = Batch(
        inputs=None, mask=jnp.array([[1.0, 0.0, 1.0]]), valid=jnp.array([[True, True, False]])
    )
    np.testing.assert_array_equal(counted_outputs(batch, (1, 3)), [[True, False, False]])
    np.testing.assert_array_equal(counted_outputs(Batch(inputs=None), (1, 3)), [[True] * 3])


def test_bad_input_gets_a_sentence():
    for make in (lambda: Categorical(0.0), lambda: Gaussian(-1.0), lambda: Bernoulli(0.0)):
        with pytest.raises(ValueError, match="must be positive"):
            make()
    with pytest.raises(ValueError, match=r"must have shape \(4,\), got \(3,\)"):
        Categorical().nll(jnp.zeros((4, 5)), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="add"):
        Gaussian().lead_shape(jnp.zeros(()))
    with pytest.raises(ValueError, match="int32"):
        Bernoulli().lead_shape(jnp.zeros((2, 2), jnp.int32))
    with pytest.raises(ValueError, match="one id per example"):
        Categorical().noise(jnp.zeros((4, 5)), jnp.arange(3), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"batch\.mask has shape \(2,\)"):
        counted_outputs(Batch(inputs=None, mask=jnp.ones(2)), (2, 3))
