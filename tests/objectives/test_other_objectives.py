"""The other objectives in NumPy float64: values, and what gradient flows past a constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jedit import objectives
from jedit.core.batch import Batch
from jedit.objectives import (
    CEU,
    DPO,
    RMU,
    UNDIAL,
    WGA,
    RandomLabel,
    RetainKL,
    RetainStates,
    SatImp,
    SimNPO,
    with_retain,
)
from tests.objectives.references import (
    VOCAB,
    apply,
    make_problem,
    numpy_counted,
    numpy_kl,
    numpy_logits,
    numpy_mean_nll,
    numpy_nll,
)


@pytest.fixture
def problem():
    return make_problem()


def check(objective, problem, expected, tolerance):
    """The value alone, and with the retain KL at a weight of 0.6."""
    params, reference, forget, retain = problem
    given = (apply, params, forget, retain, reference)
    bare, aux = objective(*given)
    tolerance.check(bare, expected)
    assert "retain_kl" not in aux
    whole, aux = with_retain(objective, RetainKL(), weight=0.6, forget_weight=1.7)(*given)
    kl = numpy_kl(reference, params, retain)
    tolerance.check(aux["retain_kl"], kl)
    tolerance.check(whole, 1.7 * expected + 0.6 * kl)


@pytest.mark.parametrize(("beta", "delta", "gamma"), [(4.5, 0.0, 0.125), (0.7, 1.3, 2.0)])
def test_simnpo(problem, beta, delta, gamma, tolerance):
    params, _, forget, _ = problem
    counted = numpy_counted(forget)
    is_example = counted.any(axis=1)
    mean = numpy_nll(params, forget).sum(axis=1)[is_example] / counted.sum(axis=1)[is_example]
    terms = -(2 / beta) * np.log(scipy.special.expit(beta * (mean - delta)))
    check(SimNPO(beta, delta, gamma), problem, gamma * terms.mean(), tolerance)


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_wga(problem, beta, tolerance):
    params, _, forget, _ = problem
    nll, counted = numpy_nll(params, forget), numpy_counted(forget)
    expected = -(np.exp(-nll) ** beta * nll)[counted].mean()
    check(WGA(beta), problem, expected, tolerance)


@pytest.mark.parametrize(("saturation", "importance"), [(5.0, 1.0), (0.5, 2.0)])
def test_satimp(problem, saturation, importance, tolerance):
    params, _, forget, _ = problem
    nll, counted = numpy_nll(params, forget), numpy_counted(forget)
    p = np.exp(-nll)
    expected = -(p**saturation * (1 - p) ** importance * nll)[counted].mean()
    check(SatImp(saturation, importance), problem, expected, tolerance)


def test_a_tokens_weight_is_a_constant(problem, tolerance):
    """The gradient is that of weights frozen beforehand."""
    params, _, forget, _ = problem
    weights = jnp.asarray(np.exp(-numpy_nll(params, forget)) ** 1.5)
    counted = jnp.asarray(numpy_counted(forget))

    def frozen(p):
        nll = objectives.token_nll(apply(p, forget.inputs), jnp.maximum(forget.targets, 0))
        return -jnp.sum(jnp.where(counted, weights.astype(nll.dtype) * nll, 0)) / jnp.sum(
            counted
        ).astype(nll.dtype)

    wga = lambda p: WGA(beta=1.5)(apply, p, forget)[0]  # noqa: E731
    tolerance.check(jax.grad(wga)(params), jax.grad(frozen)(params))


def soft_ce(logits, teacher, counted):
    q = scipy.special.softmax(teacher, axis=-1)
    return -(q * scipy.special.log_softmax(logits, axis=-1)).sum(axis=-1)[counted].mean()


def at_labels(logits, batch, value):
    """Logits with the label's replaced by `value(old)`."""
    out = logits.copy()
    for row, position in zip(*np.nonzero(numpy_counted(batch)), strict=True):
        label = batch.targets[row, position]
        out[row, position, label] = value(out[row, position, label])
    return out


@pytest.mark.parametrize("beta", [10.0, 0.5])
def test_undial(problem, beta, tolerance):
    params, reference, forget, _ = problem
    teacher = at_labels(numpy_logits(reference, forget), forget, lambda z: z - beta)
    expected = soft_ce(numpy_logits(params, forget), teacher, numpy_counted(forget))
    check(UNDIAL(beta), problem, expected, tolerance)


def test_ce_u(problem, tolerance):
    params, _, forget, _ = problem
    logits = numpy_logits(params, forget)
    teacher = at_labels(logits, forget, lambda _: -np.inf)
    q = scipy.special.softmax(teacher, axis=-1)
    terms = -np.where(q > 0, q * scipy.special.log_softmax(logits, axis=-1), 0).sum(axis=-1)
    check(CEU(), problem, terms[numpy_counted(forget)].mean(), tolerance)


def test_ce_us_gradient_in_the_logits_is_bounded(tolerance):
    """p - q, with q the prediction without the label: the label's own logit gets p."""
    logits = jnp.asarray([[9.0, 1.0, -2.0]])
    batch = Batch(jnp.zeros((1, 1)), jnp.asarray([0]))
    gradient = jax.grad(lambda z: CEU()(lambda z, _: z, z, batch)[0])(logits)
    p = scipy.special.softmax(np.asarray(logits, np.float64))
    q = np.concatenate([[[0]], scipy.special.softmax(np.asarray(logits, np.float64)[:, 1:])], 1)
    tolerance.check(gradient, p - q)


@pytest.mark.parametrize("beta", [0.1, 1.4])
def test_dpo(problem, beta, tolerance):
    params, reference, answers, refusals = problem
    growth = [
        (numpy_nll(params, b) - numpy_nll(reference, b)).sum(axis=1) for b in (answers, refusals)
    ]
    is_pair = numpy_counted(answers).any(axis=1) & numpy_counted(refusals).any(axis=1)
    assert not is_pair.all()
    growth = [g[is_pair] for g in growth]
    expected = np.mean(-(2 / beta) * np.log(scipy.special.expit(beta * (growth[0] - growth[1]))))
    given = (apply, params, (answers, refusals), refusals, reference)
    loss, aux = DPO(beta)(*given)
    tolerance.check(loss, expected)
    tolerance.check(aux["answer_nll_growth"], growth[0].mean())
    tolerance.check(aux["refusal_nll_growth"], growth[1].mean())
    whole, _ = with_retain(DPO(beta), weight=0.3)(*given)
    tolerance.check(whole, expected + 0.3 * numpy_mean_nll(params, refusals))


def test_random_labels_are_others_and_uniform(problem, key, tolerance):
    params, _, forget, _ = problem
    many = Batch(jnp.zeros((6000, 1)), jnp.asarray(np.arange(6000) % 4))
    new = np.asarray(objectives.relabel(many, 4, key=key).targets)
    shift = (new - np.asarray(many.targets)) % 4
    counts = np.bincount(shift, minlength=4)
    assert counts[0] == 0
    # Three classes of probability 1/3: five standard errors.
    assert np.abs(counts[1:] - 2000).max() < 5 * np.sqrt(6000 * 2 / 9)
    relabelled = objectives.relabel(forget, VOCAB, key=jax.random.fold_in(key, 1))
    expected = numpy_mean_nll(params, relabelled)
    check(RandomLabel(), (*problem[:2], relabelled, problem[3]), expected, tolerance)


def test_random_labels_among_a_tasks_own_know_nothing_of_the_right_ones(problem, key, tolerance):
    params, _, forget, _ = problem
    labels = [1, 3, 4]
    right = np.repeat(labels, 2000)
    many = Batch(jnp.zeros((6000, 1)), jnp.asarray(right, jnp.int16))
    new = objectives.relabel_among(many, labels, key=key).targets
    assert new.dtype == jnp.int16
    counts = np.array([[np.sum((right == a) & (new == b)) for b in labels] for a in labels])
    assert counts.sum() == 6000
    # Nine cells of probability 1/9: five standard errors.
    assert np.abs(counts - 2000 / 3).max() < 5 * np.sqrt(6000 * 8 / 81)
    relabelled = objectives.relabel_among(forget, [1, 3], key=jax.random.fold_in(key, 1))
    expected = numpy_mean_nll(params, relabelled)
    check(RandomLabel(), (*problem[:2], relabelled, problem[3]), expected, tolerance)
    for wrong in ([2], [2, 2], [[0, 1]]):
        with pytest.raises(ValueError, match="labels must be two at least"):
            objectives.relabel_among(forget, wrong, key=key)
    with pytest.raises(ValueError, match="labels must not be negative|labels must be at least 0"):
        objectives.relabel_among(forget, [-1, 2], key=key)


def hidden(apply, params, inputs):
    del apply
    return params["embed"][inputs]


def test_rmu(problem, tolerance):
    params, reference, forget, retain = problem
    direction = objectives.random_direction(3, key=jax.random.key(7))
    assert float(jnp.linalg.norm(direction)) == pytest.approx(1, abs=1e-6)
    assert np.all(np.asarray(direction) >= 0)
    rmu = RMU(hidden, seed=7, steering=1.5)
    objective = with_retain(rmu, RetainStates(hidden), weight=1.9, forget_weight=0.7)
    loss, aux = objective(apply, params, forget, retain, reference)
    h_f, h_r, h_0 = (
        np.asarray(hidden(apply, p, b.inputs), np.float64)
        for p, b in ((params, forget), (params, retain), (reference, retain))
    )
    away = ((h_f - 1.5 * np.asarray(direction)) ** 2).mean(axis=-1)[numpy_counted(forget)].mean()
    held = ((h_r - h_0) ** 2).mean(axis=-1)[numpy_counted(retain)].mean()
    tolerance.check(loss, 0.7 * away + 1.9 * held)
    tolerance.check(aux["retain_distance"], held)


def test_missing_targets_get_a_sentence(problem, key):
    params, reference, forget, _ = problem
    bare = forget._replace(targets=None)
    for objective in (UNDIAL(), CEU()):
        with pytest.raises(ValueError, match="expected one label per output"):
            objective(apply, params, bare, None, reference)
    with pytest.raises(ValueError, match="relabel needs targets"):
        objectives.relabel(bare, VOCAB, key=key)
    with pytest.raises(ValueError, match="relabel_among needs targets"):
        objectives.relabel_among(bare, [0, 1], key=key)


def ragged(lengths):
    """Rows whose first so many outputs count, as framework and jedit alike label them."""
    rng = np.random.default_rng(8)
    counted = np.arange(4)[None] < np.asarray(lengths)[:, None]
    tokens, labels = rng.integers(0, VOCAB, size=(2, *counted.shape))
    return Batch(*map(jnp.asarray, (tokens, labels, counted, counted)))


def test_undial_beside_open_unlearning(problem, tolerance):
    """Theirs: a mean over all positions. The same where all count, and not elsewhere."""
    params, reference, _, _ = problem
    for lengths, is_same in (((4, 4, 4), True), ((4, 2, 3), False)):
        batch = ragged(lengths)
        labels = np.where(np.asarray(batch.mask), np.asarray(batch.targets), -100)
        teacher = numpy_logits(reference, batch)
        at = np.where(labels < 0, labels % VOCAB, labels)  # an index from the end, as theirs
        teacher = teacher - 10.0 * np.eye(VOCAB)[at]
        theirs = soft_ce(numpy_logits(params, batch), teacher, np.ones(labels.shape, bool))
        ours, _ = UNDIAL()(apply, params, batch, None, reference)
        assert np.isclose(float(ours), theirs, rtol=tolerance.contraction, atol=0) == is_same


def test_ce_u_without_first_tokens_is_open_unlearnings(problem, tolerance):
    """Theirs leaves out each answer's first token; here the mask does."""
    params, _, _, _ = problem
    batch = ragged((4, 2, 3))
    counted = np.asarray(batch.mask) & (np.cumsum(np.asarray(batch.mask), axis=1) > 1)
    logits = numpy_logits(params, batch)
    others = at_labels(logits, batch, lambda _: -1e300)
    theirs = soft_ce(logits, others, counted)
    ours, _ = CEU()(apply, params, batch._replace(mask=jnp.asarray(counted)))
    tolerance.check(ours, theirs)
    whole, _ = CEU()(apply, params, batch)
    assert abs(float(whole) - theirs) > 1e-3


def test_rmu_beside_open_unlearning(problem, tolerance):
    """Theirs: each row's mean, then that of rows. The same for rows of one length."""
    params, _, _, _ = problem
    direction = objectives.random_direction(3, key=jax.random.key(0))
    for lengths, is_same in (((2, 2, 2), True), ((4, 2, 3), False)):
        batch = ragged(lengths)
        _, aux = RMU(hidden)(apply, params, batch)
        states = np.asarray(params["embed"], np.float64)[np.asarray(batch.inputs)]
        counted = np.asarray(batch.mask)
        away = ((states - 2.0 * np.asarray(direction)) ** 2).mean(axis=-1)
        theirs = np.mean((away * counted).sum(axis=1) / counted.sum(axis=1))
        ours = float(aux["forget_distance"])
        assert np.isclose(ours, theirs, rtol=tolerance.contraction, atol=0) == is_same


def test_ihl(problem, tolerance):
    """Token by token: one, and by how much the label is ahead of the likeliest other."""
    params, _, forget, _ = problem
    p = scipy.special.softmax(numpy_logits(params, forget), axis=-1)
    terms = []
    for row, position in zip(*np.nonzero(numpy_counted(forget)), strict=True):
        label = int(forget.targets[row, position])
        others = np.delete(p[row, position], label)
        terms.append(1 + p[row, position, label] - others.max())
    check(objectives.IHL(), problem, np.mean(terms), tolerance)
