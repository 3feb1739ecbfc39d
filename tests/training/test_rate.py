"""The rate in an optimizer's state is set at every place, and none is made where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.methods import ofmu
from jedit.methods.row import ADAM
from jedit.recipes.folders.edits import at_rate
from jedit.training.rate import with_learning_rate


def test_both_optimizers_of_a_method_take_the_rate():
    params = {"w": jnp.ones(3)}
    state = with_learning_rate(ofmu(ADAM).optimizer.init(params), 0.25)
    rates = optax.tree_utils.tree_get_all_with_path(state, "learning_rate")
    assert [float(rate) for _, rate in rates] == [0.25, 0.25]
    before = ofmu(ADAM).optimizer.init(params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, before)
    plain = optax.sgd(0.1).init(params)
    jax.tree.map(np.testing.assert_array_equal, with_learning_rate(plain, 0.25), plain)


def test_a_rate_that_cannot_be_set_is_refused():
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="holds no learning_rate"):
        at_rate(optax.sgd(0.1), 0.25).init(params)
    state = at_rate(ADAM, 0.25).init(params)
    assert float(optax.tree_utils.tree_get(state, "learning_rate")) == 0.25
