"""RFT: the filter in a loop, what a draw teaches in NumPy, and a bandit that it teaches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.edits import apply_edit
from jedit.methods import RftStages, filter_rollouts, rft
from jedit.objectives import GRPO, Played

ARMS, GROUP = 5, 8
REWARDS = np.array([[0.0, 0.2, 0.9], [0.1, 0.0, 0.4], [0.5, 0.6, 1.0]])


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """Optax mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def bandit(params, inputs):
    """One answer of one token to each question."""
    return params["w"][inputs]


# To question 0 it now and then says the right thing, 3; to question 1 never; to 2 always.
PARAMS = {"w": jnp.zeros((3, ARMS)).at[1, 0].set(30.0).at[2, 3].set(30.0)}


class Play:
    def __init__(self):
        self.keys, self.drawn = [], []

    def __call__(self, params, *, key):
        self.keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        inputs = jnp.repeat(jnp.arange(3), GROUP)
        drawn = jax.random.categorical(key, bandit(params, inputs))
        self.drawn.append(np.asarray(drawn))
        rewards = np.asarray(drawn == 3).astype(float).reshape(3, GROUP)
        return Played(Batch(inputs, drawn), rewards)


@pytest.mark.parametrize("keep", ["rewarded", "learnable"])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_the_filter_is_the_loops(keep, threshold):
    expected = np.zeros(REWARDS.shape, bool)
    for i, row in enumerate(REWARDS):
        for j, reward in enumerate(row):
            others = row if keep == "learnable" else [reward]
            expected[i, j] = any(x >= threshold for x in others)
    np.testing.assert_array_equal(
        filter_rollouts(REWARDS, threshold=threshold, keep=keep), expected
    )


def test_one_update_is_the_gradient_of_the_rewarded_answers_alone(key, tolerance):
    play = Play()
    edit, info = rft(
        bandit, PARAMS, play, optax.sgd(0.7), key=key, stages=RftStages(steps=1, updates=1)
    )
    w = np.asarray(PARAMS["w"], np.float64)
    inputs, drawn = np.repeat(np.arange(3), GROUP), play.drawn[0]
    kept = drawn == 3
    assert 0 < kept[:GROUP].sum() < GROUP
    expected = np.zeros_like(w)
    for i, y in zip(inputs[kept], drawn[kept], strict=True):
        p = np.exp(w[i] - w[i].max())
        expected[i] += (np.eye(ARMS)[y] - p / p.sum()) / kept.sum()
    moved = apply_edit(PARAMS, edit)["w"] - PARAMS["w"]
    np.testing.assert_allclose(moved, 0.7 * expected, atol=tolerance.contraction)
    np.testing.assert_allclose(info.kept, [kept.mean()])
    np.testing.assert_allclose(info.rewards, [kept.mean()])


@pytest.mark.parametrize("objective", [None, GRPO(kl_weight=0.0)])
def test_what_a_draw_answers_is_learnt_and_what_none_answers_is_left_as_it_is(key, objective):
    play, looks = Play(), []
    edit, info = rft(
        bandit,
        PARAMS,
        play,
        optax.sgd(1.0),
        key=key,
        stages=RftStages(steps=15),
        objective=objective,
        look=lambda n, params: looks.append((n, params)),
    )
    after = apply_edit(PARAMS, edit)["w"]
    assert float(jax.nn.softmax(after[0])[3]) > 0.8
    np.testing.assert_array_equal(after[1], PARAMS["w"][1])  # no draw, no gradient
    assert np.mean(info.rewards[-3:]) > np.mean(info.rewards[:3]) + 0.1
    assert [n for n, _ in looks] == [*range(16)]
    np.testing.assert_array_equal(looks[-1][1]["w"], after)
    assert len(set(play.keys)) == 15
    if objective is not None:
        # The question that none answers is left out, and 0 where none of a draw happens to.
        assert set(info.kept.tolist()) <= {1 / 3, 2 / 3}
        assert max(info.kept) == 2 / 3
    assert info.loss.shape == (30,)


def test_a_draw_of_which_nothing_is_kept_teaches_nothing(key):
    class Wrong(Play):
        def __call__(self, params, *, key):
            played = super().__call__(params, key=key)
            return played._replace(rewards=0 * played.rewards)

    edit, info = rft(bandit, PARAMS, Wrong(), optax.adam(0.1), key=key, stages=RftStages(steps=2))
    np.testing.assert_array_equal(apply_edit(PARAMS, edit)["w"], PARAMS["w"])
    np.testing.assert_array_equal(info.kept, [0, 0])
    assert info.loss.shape == (0,)


@pytest.mark.usefixtures("unchecked_annotations")
def test_what_cannot_be_gets_a_sentence(key):
    class Odd(Play):
        def __call__(self, params, *, key):
            played = super().__call__(params, key=key)
            return played._replace(rewards=played.rewards[:2])

    with pytest.raises(ValueError, match="play gave 24 rows and rewards of shape"):
        rft(bandit, PARAMS, Odd(), optax.sgd(0.1), key=key)
    with pytest.raises(ValueError, match="keep must be one of rewarded, learnable, got 'all'"):
        filter_rollouts(REWARDS, keep="all")
    with pytest.raises(ValueError, match=r"rewards must be \(questions, answers to each\)"):
        filter_rollouts(REWARDS[0])
    with pytest.raises(TypeError, match="objective must be a GRPO, or None"):
        rft(bandit, PARAMS, Play(), optax.sgd(0.1), key=key, objective=3)
