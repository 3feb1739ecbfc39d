"""Which factors keep their eigenvectors: by size, and up to what the libraries can do."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import Factorize, estimate, estimator, factors, kfac, limits, solve
from jedit.curvature.estimator import add_batch
from jedit.curvature.factorization import choose
from jedit.curvature.likelihoods import Categorical

# Two matrices that read one input, one of them long; a chain behind them; and one by itself.
SHAPES = {"q": (4, 4), "up": (4, 9), "down": (9, 4), "head": (4, 3)}
LONG = 8
BLOCKS = {"q": "short", "up": "long", "down": "long", "head": "short"}


def apply(params, x):
    hidden = jnp.tanh(x @ params["q"]) + jnp.tanh(x @ params["up"]) @ params["down"]
    return jnp.tanh(hidden) @ params["head"]


@pytest.fixture
def problem():
    rng = np.random.default_rng(5)
    params = {name: jnp.asarray(rng.normal(size=shape), float) for name, shape in SHAPES.items()}
    return params, Batch(jnp.asarray(rng.normal(size=(7, 4)), float))


def estimated(problem, how):
    params, batch = problem
    estimator = kfac(apply, Categorical(), fisher="exact", factorize=how)
    return estimate(estimator, params, batch, key=jax.random.key(0))


def forms(curvature):
    return {
        name: tuple(curvature.factors[f].form for f in (block.input, block.output))
        for name, block in curvature.blocks.items()
    }


def test_a_block_of_a_long_axis_is_kept_by_its_matrices_and_takes_along_what_shares(problem):
    found = forms(estimated(problem, Factorize("auto", eigh_dim=LONG)))
    # q shares its input's factor with up, which is long: a damped solve needs neither's basis.
    assert found == {
        "q": ("undecomposed", "undecomposed"),
        "up": ("undecomposed", "undecomposed"),
        "down": ("undecomposed", "undecomposed"),
        "head": ("eigenbasis", "eigenbasis"),
    }


def test_with_a_rank_long_axes_alone_are_cut(problem):
    found = forms(estimated(problem, Factorize("auto", rank=3, eigh_dim=LONG)))
    assert found == {
        "q": ("eigenbasis", "eigenbasis"),
        "up": ("eigenbasis", "leading"),
        "down": ("leading", "eigenbasis"),
        "head": ("eigenbasis", "eigenbasis"),
    }


@pytest.mark.parametrize("rank", [None, 3])
def test_what_is_chosen_is_what_one_can_ask_for_oneself(problem, rank):
    """Each block's solve is that of the curvature that was asked for by its name, to the bit."""
    params, _ = problem
    chosen = estimated(problem, Factorize("auto", rank=rank, eigh_dim=LONG))
    alone = estimated(problem, Factorize("cholesky") if rank is None else Factorize(rank=rank))
    whole = estimated(problem, "eigh")
    found = solve(chosen, params, damping=0.1)
    factored = ("q", "up", "down") if rank is None else ()
    for name in SHAPES:
        if rank is None:
            expected = solve(alone if name in factored else whole, params, damping=0.1)
            np.testing.assert_array_equal(found[name], expected[name])
        elif name in ("head", "q"):
            expected = solve(whole, params, damping=0.1)
            np.testing.assert_array_equal(found[name], expected[name])
    if rank is not None:
        # By NumPy: the long axis alone is rounded off.
        a, g = map(np.asarray, factors(whole, "down"))
        values, vectors = np.linalg.eigh(a)
        values[:-rank] = values[:-rank].mean()
        a = (vectors * values) @ vectors.T
        level = 0.1 * np.trace(a) * np.trace(g) / a.shape[0] / g.shape[0]
        flat = np.linalg.solve(
            np.kron(a, g) + level * np.eye(a.shape[0] * g.shape[0]),
            np.asarray(params["down"]).reshape(-1),
        )
        rtol = 1e-6 if jax.config.jax_enable_x64 else 2e-3
        np.testing.assert_allclose(
            found["down"], flat.reshape(SHAPES["down"]), rtol=rtol, atol=rtol
        )


def test_short_axes_give_the_same_numbers_as_before(problem):
    both = [estimated(problem, how) for how in ("eigh", "auto")]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_choice_spreads_over_all_that_shares_and_no_further():
    """A chain of blocks through shared factors, against a search of the graph."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        sides = {f"f{i}": int(rng.integers(0, 12)) for i in range(12)}
        pairs = [tuple(rng.choice(list(sides), 2, replace=False)) for _ in range(8)]
        adjacent = np.eye(12, dtype=bool)
        for one, other in pairs:
            i, j = int(one[1:]), int(other[1:])
            adjacent[i, j] = adjacent[j, i] = True
        reached = np.linalg.matrix_power(adjacent.astype(int), 12) > 0
        long = np.array([d > LONG for d in sides.values()])
        found = choose(pairs, sides, Factorize("auto", eigh_dim=LONG))
        kept = [found[name].by == "cholesky" for name in sides]
        assert kept == (reached @ long).tolist()


def test_planned_shapes_are_those_of_what_is_made(problem):
    params, batch = problem
    for rank in (None, 3):
        how = Factorize("auto", rank=rank, eigh_dim=LONG)
        _, planned = kfac(apply, Categorical(), factorize=how).planned(params, batch)
        assert forms(planned) == forms(estimated(problem, how))


@pytest.mark.parametrize("group_bytes", [None, 1])
def test_what_no_library_decomposes_is_refused_before_a_batch_is_summed(
    problem, group_bytes, monkeypatch
):
    params, batch = problem
    monkeypatch.setattr(limits, "LAPACK", limits.Limit(8, "LAPACK"))
    summed = []

    def add(*given):
        summed.append(given)
        return add_batch(*given)

    monkeypatch.setattr(estimator, "add_batch", add)

    def run(how):
        made = kfac(apply, Categorical(), factorize=how)
        return estimate(made, params, [batch], key=jax.random.key(0), group_bytes=group_bytes)

    with pytest.raises(ValueError, match=r"curvature of '\w+' has a factor of 9 columns") as caught:
        run("eigh")
    assert "(and 1 more factors)" in str(caught.value)
    with pytest.raises(ValueError, match="has a factor of 9 columns"):  # as good as all of them
        run(Factorize(rank=3))
    assert 'factorize="cholesky"' in str(caught.value)
    assert not summed
    # What it says to do instead.
    for how in ("cholesky", Factorize("auto", eigh_dim=8), Factorize(max_dim=8)):
        run(how)
    assert summed


def test_a_sketch_is_not_refused_for_what_only_its_moment_is_too_long_for(monkeypatch):
    monkeypatch.setattr(limits, "LAPACK", limits.Limit(10, "LAPACK"))
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(12, 4)), float)}
    batch = Batch(jnp.asarray(rng.normal(size=(7, 12)), float))

    def run(how):
        made = kfac(lambda p, x: jnp.tanh(x @ p["w"]), Categorical(), factorize=how)
        return estimate(made, params, batch, key=jax.random.key(0))

    # 10 columns: more than half of 12, so that the whole moment would be decomposed, were it there.
    with pytest.raises(ValueError, match="curvature of 'w' has a factor of 12 columns"):
        run(Factorize(rank=1))
    assert forms(run(Factorize(rank=1, streamed=True)))["w"][0] == "leading"
    # Sketches no smaller than the moment are none.
    with pytest.raises(ValueError, match="curvature of 'w' has a factor of 12 columns"):
        run(Factorize(rank=2, streamed=True))


def test_limits_are_those_of_the_workspaces():
    """The last size whose workspace a 32-bit integer counts, and not one more."""
    n = limits.LAPACK.columns
    assert 1 + 6 * n + 2 * n**2 < 2**31 <= 1 + 6 * (n + 1) + 2 * (n + 1) ** 2
    assert 3 * limits.CUSOLVER.columns**2 < 2**31

    def device(platform, version):
        client = types.SimpleNamespace(platform_version=version)
        return types.SimpleNamespace(platform=platform, client=client)

    assert limits.eigh_limit(device("gpu", "PJRT C API\ncuda 12090")) is limits.CUSOLVER
    assert limits.eigh_limit(device("gpu", "PJRT C API\ncuda 13000")) is None
    assert limits.eigh_limit(device("gpu", "rocm 60300")) is None
    assert limits.eigh_limit(jax.devices("cpu")[0]) is limits.LAPACK


def test_long_axes_beside_a_scale_are_told_of_by_shapes(monkeypatch, key):
    """A norm's scale has a diagonal block, whose sums have no numbers yet to be looked at."""
    monkeypatch.setattr(limits, "LAPACK", limits.Limit(8, "LAPACK"))

    def scaled(params, x):
        return (jnp.tanh(x @ params["w"]) * params["scale"][None]) @ params["v"]

    shapes = {"w": (9, 4), "scale": (4,), "v": (4, 3)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    batch = Batch(jax.random.normal(key, (6, 9)))
    with pytest.raises(ValueError, match="curvature of 'w' has a factor of 9 columns"):
        kfac(scaled, Categorical()).init(params, batch)
    _, planned = kfac(scaled, Categorical()).planned(params, batch)
    assert planned.blocks["scale"].values.shape == (1, 1, 4)
