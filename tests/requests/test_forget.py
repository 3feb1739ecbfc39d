"""`forget` on rows that share no parameter, where every loss and every stop can be told by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import jedit
from jedit.core.batch import Batch
from jedit.curvature import Factorize, estimate, kfac, quadratic_form
from jedit.curvature.likelihoods import Categorical
from jedit.metrics import output_kl
from jedit.objectives import NPO, RetainNLL, with_retain
from jedit.requests.comeback import interval
from jedit.requests.forget import forget
from jedit.requests.forgetting import Forgetting, Natural, Recovery, Rewind
from jedit.requests.unseen import Unseen, p_value_of, targets
from jedit.training import TrainingMethod

FORGOTTEN, KEPT, UNSEEN, CLASSES = 12, 30, 9, 5
KEY = jax.random.key(3)
HELD_OUT = (0, 14, 29)  # a tenth of the rows to be kept, at equal distances
pytestmark = pytest.mark.usefixtures("standard_promotion")


def apply(params, inputs):
    return inputs["row"] @ params["table"] + inputs["shared"] @ params["shared"]


@pytest.fixture(scope="module")
def scene():
    """A table with logits for each row, all of which have been learnt, and one shared matrix."""
    rng = np.random.default_rng(0)
    number = FORGOTTEN + KEPT + UNSEEN
    labels = rng.integers(0, CLASSES, number)
    table = 3.0 * np.eye(CLASSES)[labels] * rng.uniform(0.5, 1, (number, 1))
    table[FORGOTTEN + KEPT :] = 0
    params = {"table": jnp.asarray(table), "shared": jnp.asarray(rng.normal(size=(3, CLASSES)))}
    params = jax.tree.map(lambda x: x.astype(jnp.zeros(()).dtype), params)
    shared = 0.3 * rng.normal(size=(number, 3))

    def rows(first, last):
        inputs = {"row": np.eye(number)[first:last], "shared": shared[first:last]}
        inputs = jax.tree.map(lambda x: jnp.asarray(x, params["table"].dtype), inputs)
        return Batch(inputs, jnp.asarray(labels[first:last], jnp.int32))

    ends = np.cumsum((0, FORGOTTEN, KEPT, UNSEEN))
    return params, *(rows(i, j) for i, j in zip(ends, ends[1:], strict=False))


def losses_of(params, rows):
    logits = np.array(apply(params, rows.inputs), np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    picked = logits[np.arange(len(logits)), np.asarray(rows.targets)]
    return np.log(np.exp(logits).sum(axis=1)) - picked


def by_row(optimizer):
    """Each row rises by itself: a row that is not drawn does not move, unless by momentum."""
    return TrainingMethod(NPO(beta=0.01), optimizer, trainable="table", batch_size=4)


ADAM = by_row(optax.adam(0.2))


def test_rows_rise_to_the_quantiles_of_unseen_rows_and_no_further(scene):
    params, gone, kept, unseen = scene
    how = Forgetting(method=by_row(optax.sgd(2.0)), steps=60, every=1, significance=0.999)
    edit, info = forget(apply, params, gone, kept, unseen=unseen, key=KEY, how=how)
    after = losses_of(jedit.apply_edit(params, edit), gone)
    np.testing.assert_allclose(info.loss_before, losses_of(params, gone), rtol=1e-5)
    np.testing.assert_allclose(info.loss_after, after, rtol=1e-5)
    level = np.sort(losses_of(params, unseen))
    np.testing.assert_allclose(info.unseen_score, level, rtol=1e-5)
    assert info.stopped == "unseen"
    assert info.steps < 60
    assert info.p_value[-1] == stats.ks_2samp(after, level, alternative="greater").pvalue
    assert np.all(info.p_value[:-1] <= 0.999)
    assert np.all(np.diff(info.p_value) >= -1e-9)  # each look was further on
    # Every row was drawn until it was done, and no more: one step of its own is what it overshot.
    without = dataclasses.replace(how, steps=info.steps)
    _, blind = forget(apply, params, gone, kept, key=KEY, how=without)
    assert np.sum(blind.loss_after > level[-1]) > np.sum(after > level[-1])
    assert blind.stopped == "steps"
    assert not blind.is_done.any()
    assert np.isnan(blind.p_value).all()


def test_a_piece_that_leads_past_unseen_rows_is_shortened(scene):
    params, gone, kept, unseen = scene
    how = Forgetting(method=by_row(optax.sgd(30.0)), steps=8, every=8)
    edit, info = forget(apply, params, gone, kept, unseen=unseen, key=KEY, how=how)
    whole, blind = forget(apply, params, gone, kept, key=KEY, how=how)
    level = losses_of(params, unseen)

    def p_values(scale):
        after = losses_of(jedit.apply_edit(params, whole, scale), gone)
        ways = ("greater", "less")  # the first is small where the rows' losses are the smaller
        return [stats.ks_2samp(after, level, alternative=way).pvalue for way in ways]

    assert p_values(1.0)[1] < how.significance  # by knowing less they could be told
    assert blind.loss_after.min() > level.max()
    scales = np.arange(1, 65) / 64
    first = next(x for x in scales if p_values(x)[1] < p_values(x)[0])
    expected = first * np.asarray(whole.blocks["table"])
    np.testing.assert_allclose(edit.blocks["table"], expected, rtol=1e-4, atol=1e-6)
    assert info.stopped == "unseen"
    assert min(p_values(first)) > how.significance


def test_a_recovery_that_costs_is_taken_back(scene):
    params, gone, kept, unseen = scene
    natural = Natural(select="shared", predicted_kl=1e-3, recovery=None)
    plain = Forgetting(natural, steps=4, every=2)
    given = {"unseen": unseen, "key": KEY}
    before, found = forget(apply, params, gone, kept, how=plain, **given)
    costly = Recovery(steps=6, predicted_kl=1e-2, forget_weight=30.0)
    how = dataclasses.replace(plain, method=dataclasses.replace(natural, recovery=costly))
    edit, info = forget(apply, params, gone, kept, how=how, **given)
    assert info.steps > found.steps
    assert info.true_kl[:-1].max() > 2 * found.true_kl[-1]
    np.testing.assert_allclose(info.true_kl[-1], found.true_kl[-1], rtol=1e-5)
    np.testing.assert_array_equal(edit.blocks["shared"], before.blocks["shared"])
    np.testing.assert_array_equal(info.loss_after, found.loss_after)


def test_small_steps_add_up_in_narrow_weights(scene):
    params, gone, kept, unseen = scene
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    method = by_row(
        optax.sgd(2e-3)
    )  # a step of a thousandth, where a weight of 2 has steps of .016
    given = {"unseen": unseen, "key": KEY, "how": Forgetting(method=method, steps=12)}
    edit, info = forget(apply, narrow, gone, kept, **given)
    # By hand: masters in float32, rounded where they are used.
    wide = {**narrow, "table": narrow["table"].astype(jnp.float32)}

    def rounded(params, inputs):
        return apply({**params, "table": params["table"].astype(jnp.bfloat16)}, inputs)

    expected, found = forget(rounded, wide, gone, kept, **given)
    np.testing.assert_array_equal(edit.blocks["table"], expected.blocks["table"])
    np.testing.assert_array_equal(info.loss_after, found.loss_after)
    assert edit.blocks["table"].dtype == jnp.float32
    moved = np.abs(np.asarray(edit.blocks["table"])).max()
    lost, _ = jedit.run_method(method, apply, narrow, gone, kept, steps=12, key=KEY)
    assert np.abs(np.asarray(lost.blocks["table"])).max() < 0.5 * moved


def test_a_row_that_is_done_keeps_its_parameters(scene):
    params, gone, kept, unseen = scene
    # One row is unlikely from the start: above every unseen loss, so that it is done at once.
    table = params["table"].at[0, gone.targets[0]].add(-30.0)
    start = {**params, "table": table}
    how = Forgetting(method=by_row(optax.sgd(0.5)), steps=6, every=2, significance=1.0)
    edit, info = forget(apply, start, gone, kept, unseen=unseen, key=KEY, how=how)
    first, _ = forget(
        apply, start, gone, kept, unseen=unseen, key=KEY, how=dataclasses.replace(how, steps=2)
    )
    assert info.is_done[0]
    # It was drawn before the first look alone, if at all.
    np.testing.assert_array_equal(edit.blocks["table"][0], first.blocks["table"][0])
    assert np.any(np.asarray(edit.blocks["table"][1:]) != np.asarray(first.blocks["table"][1:]))


def test_the_budget_is_kept_in_truth_on_rows_that_no_step_sees(scene):
    params, gone, kept, _ = scene
    budget = 0.02
    shared = TrainingMethod(NPO(beta=0.01), optax.sgd(1.0), trainable="shared", batch_size=4)
    how = Forgetting(method=shared, steps=50, every=3)
    edit, info = forget(apply, params, gone, kept, budget=budget, key=KEY, how=how)
    held = jax.tree.map(lambda x: x[jnp.asarray(HELD_OUT)], kept)
    edited = jedit.apply_edit(params, edit)
    true = output_kl(apply, params, edited, held)
    assert info.stopped == "budget"
    assert info.steps < 50
    np.testing.assert_allclose(info.true_kl[-1], true, rtol=1e-4)
    assert 0.985 * budget < true <= budget
    # One step less than the shortened piece is within as well; the whole piece is not.
    free = dataclasses.replace(how, steps=info.steps)
    whole, _ = forget(apply, params, gone, kept, key=KEY, how=free)
    assert output_kl(apply, params, jedit.apply_edit(params, whole), held) > budget


def test_held_out_rows_are_not_drawn(scene):
    params, gone, kept, _ = scene
    held = jax.tree.map(lambda x: x[:7], kept)
    how = Forgetting(method=ADAM._replace(objective=with_retain(NPO())), steps=12, heldout=held)
    edit, _ = forget(apply, params, gone, jax.tree.map(lambda x: x[7:], kept), key=KEY, how=how)
    table = np.asarray(edit.blocks["table"])
    assert not table[FORGOTTEN : FORGOTTEN + 7].any()
    assert table[FORGOTTEN + 7 :].any()


def test_natural_steps_are_the_default_and_cover_what_the_curvature_covers(scene):
    params, gone, kept, unseen = scene
    natural = Natural(select="shared", predicted_kl=1e-3, recovery=None)
    how = Forgetting(natural, steps=4, every=2)
    edit, info = forget(apply, params, gone, kept, unseen=unseen, budget=0.5, key=KEY, how=how)
    assert set(edit.blocks) == {"shared"}
    assert info.loss_after.mean() > info.loss_before.mean()
    # Four steps of predicted cost 1e-3: the sum's is at most 16 times that, were they parallel.
    assert 0 < info.predicted_kl < 16e-3 * 1.5
    # A curvature that is given is the one that is used.
    chunk = jax.tree.map(lambda x: np.delete(np.asarray(x), HELD_OUT, 0), kept)
    curvature = jedit.estimate(
        jedit.kfac(apply, Categorical(), select="shared"), params, [chunk],
        key=jax.random.split(KEY, 3)[0],
    )  # fmt: skip
    given = dataclasses.replace(natural, curvature=curvature)
    given = dataclasses.replace(how, method=given)
    same, _ = forget(apply, params, gone, kept, unseen=unseen, budget=0.5, key=KEY, how=given)
    np.testing.assert_allclose(same.blocks["shared"], edit.blocks["shared"], rtol=1e-4, atol=1e-7)


def test_rows_that_are_as_unseen_from_the_start_cost_nothing(scene):
    params, _, kept, unseen = scene
    fresh, control = (jax.tree.map(lambda x, i=i: x[i::2], unseen) for i in (0, 1))
    assert len(fresh.targets) + len(control.targets) == UNSEEN
    edit, info = forget(apply, params, fresh, kept, unseen=control, key=KEY)
    assert info.stopped == "unseen"
    assert (info.steps, info.true_kl.tolist(), info.predicted_kl) == (0, [0.0], 0.0)
    assert not edit.blocks
    np.testing.assert_array_equal(info.loss_before, info.loss_after)


def test_scores_are_losses_less_those_of_other_answers(scene):
    params, gone, kept, unseen = scene

    def other(rows, k):
        """Rows with other labels: k for each."""
        again = jax.tree.map(lambda x: jnp.repeat(x, k, axis=0), rows)
        shift = 1 + jnp.arange(len(again.targets), dtype=jnp.int32) % k
        return again._replace(targets=(again.targets + shift) % CLASSES)

    beside = Unseen(unseen, other(gone, 2), other(unseen, 2))
    how = Forgetting(method=ADAM, steps=2, every=2)
    edit, info = forget(apply, params, gone, kept, unseen=beside, key=KEY, how=how)
    edited = jedit.apply_edit(params, edit)
    for found, rows, at in ((info.score, gone, edited), (info.unseen_score, unseen, params)):
        others = losses_of(at, other(rows, 2)).reshape(-1, 2).mean(axis=1)
        expected = losses_of(at, rows) - others
        expected = np.sort(expected) if rows is unseen else expected
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_recovery_is_adam_at_a_predicted_kl_on_the_same_rows_and_parameters(scene):
    params, gone, kept, _ = scene
    # Both terms move the shared matrix: where one acts alone, Adam does not see its weight.
    weight, price, steps = 0.3, 0.02, 6
    objective = with_retain(NPO(beta=0.01))
    curvature = estimate(kfac(apply, Categorical(), select="^shared$"), params, [kept], key=KEY)
    recovery = Recovery(steps, price, weight, batch_size=99)
    natural = Natural(objective, curvature, predicted_kl=0.05, batch_size=99, recovery=recovery)
    how = Forgetting(natural, steps=3, every=3, heldout=kept)
    without = dataclasses.replace(how, method=dataclasses.replace(natural, recovery=None))
    first, _ = forget(apply, params, gone, kept, key=KEY, how=without)
    edit, info = forget(apply, params, gone, kept, key=KEY, how=how)
    assert info.steps == 3 + steps
    # By hand, with every row in every step: Adam's moments begin at nothing, the length of its
    # steps ends there, and the reference of NPO is the untouched model.
    matrix = np.asarray(jedit.apply_edit(params, first)["shared"], np.float64)
    moment, square = np.zeros_like(matrix), np.zeros_like(matrix)

    def loss(matrix):
        given = (apply, {**params, "shared": matrix}, gone, kept, params)
        return weight * NPO(beta=0.01)(*given)[0] + RetainNLL()(*given)[0]

    for step in range(steps):
        gradient = np.asarray(jax.grad(loss)(jnp.asarray(matrix, params["shared"].dtype)))
        moment = 0.9 * moment + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        down = (moment / (1 - 0.9 ** (step + 1))) / (
            np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
        )
        curved = float(quadratic_form(curvature, {**params, "shared": jnp.asarray(down)}))
        matrix = matrix - np.sqrt(2 * price * (1 - step / steps) ** 2 / curved) * down
    assert set(edit.blocks) == {"shared"}
    np.testing.assert_allclose(
        jedit.apply_edit(params, edit)["shared"], matrix, rtol=1e-4, atol=1e-5
    )


def test_the_curvature_s_factors_are_kept_as_asked_for(scene):
    """The same edit as with the curvature that one estimates oneself, kept so."""
    params, gone, kept, _ = scene
    settings = {"predicted_kl": 1e-3, "recovery": None}

    def edited(**more):
        how = Forgetting(Natural(**settings, **more), Categorical(), steps=2, every=2, heldout=kept)
        return forget(apply, params, gone, kept, key=KEY, how=how)[0].blocks["shared"]

    curvature_key = jax.random.split(KEY, 3)[0]
    found = []
    for how in ("eigh", "cholesky"):
        estimator = kfac(apply, Categorical(), select="^shared$", factorize=how)
        curvature = estimate(estimator, params, [kept], key=curvature_key)
        found.append(edited(select="^shared$", curvature=Factorize(how)))
        np.testing.assert_array_equal(found[-1], edited(curvature=curvature))
    assert np.any(found[0] != found[1])


def test_the_recovery_brings_back_what_is_kept_after_an_early_stop(scene):
    params, gone, kept, unseen = scene
    natural = Natural(with_retain(NPO(beta=0.01)), predicted_kl=0.05, damping=0.1, recovery=None)
    # In this scene rows share so little that others cannot tell what comes back.
    how = Forgetting(natural, steps=40, every=2, heldout=kept)
    longer = dataclasses.replace(natural, recovery=Recovery(steps=6, predicted_kl=1e-3))
    short, before = forget(apply, params, gone, kept, unseen=unseen, key=KEY, how=how)
    how = dataclasses.replace(how, method=longer)
    edit, after = forget(apply, params, gone, kept, unseen=unseen, key=KEY, how=how)
    assert before.stopped == after.stopped == "unseen"
    assert 0 < before.steps < 40
    assert after.steps == before.steps + 6
    np.testing.assert_array_equal(after.p_value[: len(before.p_value)], before.p_value)
    start, end = (losses_of(jedit.apply_edit(params, e), kept).mean() for e in (short, edit))
    assert end < start
    # Nothing to forget, nothing to recover from.
    none, info = forget(apply, params, unseen, kept, unseen=gone, key=KEY, how=how)
    assert info.steps == 0
    assert not none.blocks


@pytest.fixture(scope="module")
def rewinding(scene):
    """A way back of twelve steps, then one natural step that is as good as none."""
    params, _, kept, _ = scene
    rng = np.random.default_rng(7)
    start = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    rewind = Rewind(start, 0.05, steps=12, share=0.4, forget_weight=0.6, batch_size=99)
    curvature = estimate(kfac(apply, Categorical(), select="^shared$"), params, [kept], key=KEY)
    objective = with_retain(NPO(beta=0.5))
    natural = Natural(objective, curvature, predicted_kl=1e-14, recovery=None, rewind=rewind)
    return Forgetting(natural, steps=1, every=3, heldout=kept)


@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_a_rewind_is_adam_from_a_share_of_the_way_back(scene, rewinding, weight):
    params, gone, kept, _ = scene
    rewind = dataclasses.replace(rewinding.method.rewind, forget_weight=weight)
    natural = dataclasses.replace(rewinding.method, rewind=rewind)
    rewinding = dataclasses.replace(rewinding, method=natural)
    edit, info = forget(apply, params, gone, kept, key=KEY, how=rewinding)
    assert info.steps == 13
    assert len(info.true_kl) == 3  # before the first step, after the rewind, at the end
    start, dtype = rewind.start, params["shared"].dtype

    def loss(now):
        given = (apply, now, gone, kept, params)  # the reference is the untouched model
        return weight * NPO(beta=0.5)(*given)[0] + RetainNLL()(*given)[0]

    hand = {k: 0.6 * np.array(x, float) + 0.4 * np.array(start[k]) for k, x in params.items()}
    moment, square = (jax.tree.map(np.zeros_like, hand) for _ in range(2))
    for step in range(12):
        gradient = jax.grad(loss)({k: jnp.asarray(x, dtype) for k, x in hand.items()})
        # A sixth of the steps, two, to warm up in; then a cosine.
        rate = 0.05 * (step / 2 if step < 2 else (1 + np.cos(np.pi * (step - 2) / 10)) / 2)
        for k in hand:
            g = np.asarray(gradient[k], float)
            moment[k] = 0.9 * moment[k] + 0.1 * g
            square[k] = 0.999 * square[k] + 0.001 * g**2
            root = np.sqrt(square[k] / (1 - 0.999 ** (step + 1)))
            hand[k] -= rate * moment[k] / (1 - 0.9 ** (step + 1)) / (root + 1e-8)
    edited = jedit.apply_edit(params, edit)
    for k, x in hand.items():
        np.testing.assert_allclose(edited[k], x, rtol=1e-4, atol=1e-5)


def test_natural_steps_after_a_rewind_have_the_metric_of_where_they_begin(scene, rewinding):
    params, gone, kept, _ = scene
    edit, _ = forget(apply, params, gone, kept, key=KEY, how=rewinding)
    estimator, key = kfac(apply, Categorical(), select="^shared$"), jax.random.split(KEY, 3)[0]
    found = []
    for at in (None, jedit.apply_edit(params, edit), params):
        metric = None if at is None else estimate(estimator, at, [kept], key=jax.random.clone(key))
        natural = dataclasses.replace(
            rewinding.method, curvature=metric, select="^shared$", predicted_kl=0.05
        )
        how = dataclasses.replace(rewinding, method=natural, likelihood=Categorical())
        after, _ = forget(apply, params, gone, kept, key=KEY, how=how)
        found.append(np.asarray(after.blocks["shared"]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_a_rewind_is_within_the_budget_and_needless_where_nothing_is_known(scene, rewinding):
    params, gone, kept, unseen = scene
    with_recovery = dataclasses.replace(rewinding.method, recovery=Recovery(steps=2))
    how = dataclasses.replace(rewinding, method=with_recovery)
    edit, info = forget(apply, params, gone, kept, budget=0.01, key=KEY, how=how)
    assert (info.stopped, info.steps) == ("budget", 12)
    true = output_kl(apply, params, jedit.apply_edit(params, edit), kept)
    assert 0.0098 < true <= 0.01
    none, info = forget(apply, params, unseen, kept, unseen=gone, key=KEY, how=how)
    assert (info.steps, none.blocks) == (0, {})


@pytest.mark.parametrize("name", ["recovery", "rewind"])
def test_what_weighs_the_objective_needs_a_retain_term(name, rewinding):
    settings = {"recovery": None, name: getattr(rewinding.method, name) or Recovery()}
    with pytest.raises(ValueError, match=f"{name} weighs an objective against its retain term"):
        Natural(NPO(beta=0.04), **settings)
    Natural(NPO(beta=0.04), recovery=None)


def test_an_attack_brings_back_what_was_hidden(scene):
    params, gone, kept, unseen = scene
    how = Forgetting(method=ADAM, steps=20, attack=optax.adam(0.1))
    edit, info = forget(apply, params, gone, kept, unseen=unseen, key=KEY, how=how)
    others = np.delete(np.arange(FORGOTTEN), slice(None, None, 6))
    edited = losses_of(jedit.apply_edit(params, edit), gone)[others]
    mean, low, high = info.comeback.before
    np.testing.assert_allclose(mean, np.exp(-edited).mean(), rtol=1e-5)
    assert low < mean < high
    assert info.comeback.after != info.comeback.before
    assert len(info.comeback.unseen) == 3


def test_an_attack_is_made_in_wide_weights_and_ends_no_edit(scene):
    params, gone, kept, _ = scene
    narrow = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    # Of a weight without a gradient Adam divides 0 by 0 in float16, whose epsilon is nothing there.
    shared = by_row(optax.sgd(0.1))._replace(trainable="shared")
    how = Forgetting(method=shared, steps=2, attack=optax.adam(0.1))
    _, info = forget(apply, narrow, gone, kept, key=KEY, how=how)
    assert np.isfinite(info.comeback.after).all()
    assert info.comeback.after != info.comeback.before
    wild = dataclasses.replace(how, attack=optax.sgd(1e38))
    edit, info = forget(apply, narrow, gone, kept, key=KEY, how=wild)
    assert np.isnan(info.comeback.after).all()
    assert np.isfinite(info.comeback.before).all()
    assert edit.blocks


def test_targets_and_test_by_hand():
    losses = np.array([3.0, 1.0, 2.0])
    level = np.array([10.0, 20.0, 30.0, 40.0])
    np.testing.assert_allclose(targets(losses, level), np.quantile(level, [5 / 6, 1 / 6, 1 / 2]))
    rng = np.random.default_rng(1)
    low, high = rng.normal(size=40), rng.normal(size=40) + 2
    assert p_value_of(low, high) < 1e-6
    assert p_value_of(high, low) == 1.0, "one-sided"
    mean, least, most = interval(low)
    error = low.std() / np.sqrt(40)
    np.testing.assert_allclose([least, most], mean + 1.96 * error * np.array([-1, 1]), atol=0.1)


def test_what_is_refused(scene):
    params, gone, kept, _ = scene
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Forgetting(steps=0)
    with pytest.raises(ValueError, match="or none of both"):
        forget(apply, params, gone, kept, unseen=Unseen(kept, gone), key=KEY)
    with pytest.raises(ValueError, match="as many other answers for each of the 12 rows; got 30"):
        forget(apply, params, gone, kept, unseen=Unseen(kept, kept, kept), key=KEY)
    with pytest.raises(ValueError, match="significance must be from 0 to 1"):
        Forgetting(significance=1.5)
    with pytest.raises(ValueError, match="budget must be positive"):
        forget(apply, params, gone, kept, budget=0.0, key=KEY)
    pair = jax.tree.map(lambda x: x[:2], gone)
    with pytest.raises(ValueError, match="2 forget rows and 2 unseen ones are too few"):
        forget(apply, params, pair, kept, unseen=jax.tree.map(lambda x: x[:2], kept), key=KEY)
    with pytest.raises(ValueError, match="damping must not be negative"):
        Natural(damping=-1.0)
    one = jax.tree.map(lambda x: x[:1], kept)
    with pytest.raises(ValueError, match="teaches some forget rows and asks about others"):
        forget(apply, params, one, kept, key=KEY, how=Forgetting(ADAM, attack=optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"at least 2 are needed; got 1. Give heldout="):
        forget(apply, params, gone, one, key=KEY)
    other = {**params, "shared": params["shared"][:1]}
    rewind = Rewind(other, 0.1, steps=2)
    with pytest.raises(ValueError, match="params' structure and shapes; they differ in shared"):
        forget(apply, params, gone, kept, key=KEY, how=Forgetting(Natural(rewind=rewind)))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    how = Forgetting(Natural(rewind=Rewind(narrow, 0.1, steps=2)))
    with pytest.raises(ValueError, match="shared is bfloat16, in which small steps are lost"):
        forget(apply, narrow, gone, kept, key=KEY, how=how)
    with pytest.raises(TypeError, match="rewind must be a Rewind"):
        Natural(rewind=params)
