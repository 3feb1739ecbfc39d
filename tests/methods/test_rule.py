"""RULE on a bandit whose best policy is known; what its stages leave alone; what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.edits import apply_edit
from jedit.methods import RuleStages, rule
from jedit.objectives import GRPO, Dialogue, Played

ARMS, GROUP = 5, 8
REFUSE, FORGET, RETAIN = 4, 0, 1


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def bandit(params, inputs):
    """One answer of one token to each of two questions."""
    return params["w"][inputs]


PARAMS = {"w": jnp.zeros((2, ARMS)).at[:, 2].set(3.0)}


class Play:
    """Refusing earns 1 on the forget question, the right arm 2 on the retain question."""

    def __init__(self):
        self.keys = []

    def __call__(self, params, *, key):
        self.keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        inputs = jnp.repeat(jnp.array([FORGET, RETAIN]), GROUP)
        drawn = jax.random.categorical(key, bandit(params, inputs))
        wanted = jnp.where(inputs == FORGET, REFUSE, 2)
        rewards = np.asarray(drawn == wanted).astype(float).reshape(2, GROUP)
        return Played(Batch(inputs, drawn), rewards)


def made(play, **changed):
    refusals = Batch(jnp.array([FORGET]), jnp.array([REFUSE]))
    boundary = Batch(jnp.array([RETAIN]), jnp.array([2]))
    return Dialogue(refusals, boundary, play, tuning_rate=0.1, rate=0.1)._replace(**changed)


def chances(edit):
    return jax.nn.softmax(apply_edit(PARAMS, edit)["w"])


def test_both_stages_move_the_policy_to_what_is_rewarded(key):
    play = Play()
    stages = RuleStages(tuning_steps=15, steps=20, updates=3)
    edit, info = rule(bandit, PARAMS, made(play), key=key, stages=stages)
    tuned, early = rule(
        bandit, PARAMS, made(play), key=jax.random.clone(key), stages=RuleStages(15, 0)
    )
    assert 0.05 < float(chances(tuned)[FORGET, REFUSE]) < 0.6
    assert float(chances(edit)[FORGET, REFUSE]) > 0.85
    assert float(chances(edit)[RETAIN, 2]) > 0.85
    assert np.mean(info.rewards[-5:]) > np.mean(info.rewards[:5]) + 0.1
    assert info.tuning_loss.shape == (15,)
    np.testing.assert_array_equal(info.tuning_loss, early.tuning_loss)
    # The KL is to the tuned model, where it begins at nothing, and is there after each update.
    assert info.reference_kl.shape == (60,)
    assert abs(info.reference_kl[0]) < 1e-12
    assert info.reference_kl[-1] > 0.01
    assert len(set(play.keys)) == len(play.keys) == 20
    again, _ = rule(bandit, PARAMS, made(Play()), key=jax.random.clone(key), stages=stages)
    jax.tree.map(np.testing.assert_array_equal, again, edit)


def test_a_heavy_kl_keeps_the_tuned_model(key):
    stages = RuleStages(tuning_steps=0, steps=30)
    moves = []
    for weight in (0.0, 100.0):
        objective = GRPO(kl_weight=weight)
        given = {"key": jax.random.clone(key), "stages": stages, "objective": objective}
        moved = chances(rule(bandit, PARAMS, made(Play()), **given)[0])
        moves.append(float(jnp.abs(moved - jax.nn.softmax(PARAMS["w"])).max()))
    assert moves[1] < 0.3 * moves[0]


def test_equal_rewards_teach_nothing_and_the_steps_are_compiled_once(key):
    traces = []

    def counting(params, inputs):
        traces.append(1)
        return bandit(params, inputs)

    def flat(params, *, key):
        return Play()(params, key=key)._replace(rewards=np.ones((2, GROUP)))

    def run(steps):
        stages = RuleStages(tuning_steps=0, steps=steps)
        given = {"key": jax.random.clone(key), "stages": stages}
        return rule(counting, PARAMS, made(flat), **given)[0]

    run(1)
    traced = len(traces)
    edit = run(4)
    assert len(traces) == traced
    np.testing.assert_allclose(edit.blocks["w"], 0, atol=1e-6)


def test_rewards_of_other_rows_are_refused(key):
    def wrong(params, *, key):
        return Play()(params, key=key)._replace(rewards=np.eye(3))

    with pytest.raises(ValueError, match=r"16 rows and rewards of shape \(3, 3\)"):
        rule(bandit, PARAMS, made(wrong), key=key)
    with pytest.raises(ValueError, match="rate must"):
        rule(bandit, PARAMS, made(Play(), rate=-1.0), key=key)
    with pytest.raises(TypeError, match="dialogue"):
        rule(bandit, PARAMS, None, key=key)


def test_small_steps_add_up_in_narrow_weights_and_play_sees_narrow_ones(key):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    seen = []

    def play(params, *, key):
        seen.append(params["w"].dtype)
        return Play()(params, key=key)

    rates = {"tuning_rate": 2e-4, "rate": 2e-4}
    stages = RuleStages(tuning_steps=20, steps=2)
    edit, _ = rule(bandit, narrow, made(play, **rates), key=key, stages=stages)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    # Three has steps of 1/64 there, and a fiftieth of that is moved each time.
    moved = np.asarray(edit.blocks["w"])[:, 2]
    assert (np.abs(moved) > 2e-3).all()


def test_what_is_not_trained_stays_and_the_draws_are_watched(key):
    def apply(params, inputs):
        return bandit(params, inputs) + params["bias"][None]

    class Other(Play):
        def __call__(self, params, *, key):
            return super().__call__({"w": params["w"] + params["bias"][None]}, key=key)

    params, looks = PARAMS | {"bias": jnp.zeros(ARMS)}, []
    stages = RuleStages(tuning_steps=2, steps=3)
    edit, _ = rule(
        apply, params, made(Other()), key=key, stages=stages, trainable="^w$",
        look=lambda draws, now: looks.append((draws, np.array(now["w"]))),
    )  # fmt: skip
    assert set(edit.blocks) == {"w"}
    assert [draws for draws, _ in looks] == [0, 1, 2, 3]
    np.testing.assert_allclose(looks[-1][1], apply_edit(params, edit)["w"], rtol=1e-6)
    # The way to fewer draws is the beginning of this one.
    shorter = RuleStages(tuning_steps=2, steps=1)
    given = {"key": jax.random.clone(key), "stages": shorter, "trainable": "^w$"}
    first, _ = rule(apply, params, made(Other()), **given)
    np.testing.assert_allclose(looks[1][1], apply_edit(params, first)["w"], rtol=1e-6)


def test_sets_of_two_widths_are_refused_with_both(key):
    wide = Batch(jnp.array([[1, 0]]), jnp.array([[2, 2]]))
    with pytest.raises(ValueError, match="encode them to one width"):
        rule(bandit, PARAMS, made(Play(), boundary=wide), key=key)
