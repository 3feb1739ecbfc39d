"""A stopwatch that does not count the compiler."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.recipes import stopwatch
from jedit.recipes.stopwatch import Stopwatch


def test_the_compiler_is_not_counted_and_the_rest_is():
    def deep(x):
        for i in range(60):
            x = jnp.tanh(x @ x + i)
        return x

    x = jnp.ones((4, 4), jnp.float32)
    jax.block_until_ready(x)
    start = time.perf_counter()
    with Stopwatch() as watch:
        jax.block_until_ready(jax.jit(deep)(x))
        time.sleep(0.2)
    whole = time.perf_counter() - start
    assert watch.seconds >= 0.2
    assert whole - watch.seconds > 0.5 * (whole - 0.2)  # the most of the rest is compiling
    with Stopwatch() as watch:
        pass
    assert watch.seconds < 0.1


def test_what_compiles_after_it_is_no_matter_of_it():
    with Stopwatch() as watch:
        time.sleep(0.05)
    seconds = watch.seconds
    jax.block_until_ready(jax.jit(lambda x: x * 3 + 1)(jnp.ones(5, jnp.float32)))
    assert watch.seconds == seconds
    assert not watch._spans


def test_the_listener_goes_where_the_work_fails():
    from jax._src import monitoring

    before = len(monitoring.get_event_duration_listeners())
    with pytest.raises(ZeroDivisionError), Stopwatch():
        raise ZeroDivisionError
    assert len(monitoring.get_event_duration_listeners()) == before


@pytest.mark.parametrize("seed", range(5))
def test_spans_inside_others_count_once(seed):
    """Against a count of the moments that lie in any span."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 100, 6)
    spans = [(float(a), float(a + n)) for a, n in zip(starts, rng.integers(1, 30, 6), strict=True)]
    moments = {moment for start, end in spans for moment in range(int(start), int(end))}
    assert stopwatch._union(spans) == len(moments)
