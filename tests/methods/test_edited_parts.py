"""What is not edited costs nothing: no gradient, no copy, no block of the edit."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, inverted, kfac, solve
from jedit.curvature.likelihoods import Categorical
from jedit.edits import apply_edit
from jedit.geometry import RetainKl, null_space, scale_to_kl_budget, trust_region
from jedit.geometry.parts import moved
from jedit.methods import Ascent, kfade
from jedit.objectives import GA
from jedit.transforms import project_to_null_space, scale_by_curvature

DEEP, WIDE = 6, 96
KFADE = import_module("jedit.methods.curvature.kfade")  # the package's attribute is the function


def deep(params, x):
    """Six square matrices that stay, and a small one with its bias that is edited."""
    h = jnp.tanh(x[:, :16] @ params["w"] + params["b"][None])
    h = jnp.concatenate([h, x[:, 16:]], axis=1)
    for i in range(DEEP):
        h = jnp.tanh(h @ params[f"stays{i}"])
    return h[:, :3]


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {f"stays{i}": normal(WIDE, WIDE) / 8 for i in range(DEEP)}
    params |= {"w": normal(16, 16) / 4, "b": normal(16)}
    forget = Batch(normal(8, WIDE), jnp.asarray(rng.integers(0, 3, 8)))
    retain = Batch(normal(8, WIDE), jnp.asarray(rng.integers(0, 3, 8)))
    estimator = kfac(deep, Categorical(), select="^w$|^b$")
    return params, forget, retain, estimate(estimator, params, [retain], key=jax.random.key(0))


def num_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_an_edit_holds_the_covered_parameters_and_no_others(scene):
    params, forget, retain, curvature = scene
    edit, _ = kfade(deep, params, curvature, forget, retain, budget=0.05, ascent=Ascent(2))
    assert set(edit.blocks) == {"w", "b"} == set(curvature.covered)
    edited = apply_edit(params, edit)
    for path, leaf in params.items():
        assert (edited[path] is leaf) == path.startswith("stays")


def test_a_function_of_the_parameters_gets_the_same_arrays_where_nothing_moves(scene):
    params, forget, retain, curvature = scene
    seen = []
    refit = lambda current: seen.append(current) or curvature  # noqa: E731
    ascent = Ascent(2, step_size=1e-4, refit=refit)
    kfade(deep, params, curvature, forget, retain, ascent=ascent)
    assert all(seen[0][f"stays{i}"] is params[f"stays{i}"] for i in range(DEEP))
    assert seen[0]["w"] is not params["w"]


def _contractions(jaxpr, found):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(eqn.outvars[0].aval.shape)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                _contractions(inner, found)
    return found


def test_no_gradient_of_what_stays_is_computed(scene):
    params, forget, retain, _ = scene
    change = {p: jnp.zeros_like(params[p]) for p in ("w", "b")}
    shapes = {}
    for name, paths in (("edited", ("b", "w")), ("all", tuple(params))):
        gradient = partial(KFADE._add_gradient, GA(), deep, paths)
        jaxpr = jax.make_jaxpr(gradient)(params, change, forget, retain, 1.0, None)
        shapes[name] = _contractions(jaxpr.jaxpr, [])
    # The weight gradient of a square matrix is a contraction that has its shape.
    assert shapes["all"].count((WIDE, WIDE)) == DEEP
    assert shapes["edited"].count((WIDE, WIDE)) == 0
    assert (16, 16) in shapes["edited"]


def test_beside_the_weights_there_is_the_edit_thrice_and_one_backward_pass(scene):
    """Bytes of each compiled program, and of what stands beside it between the programs."""
    params, forget, retain, curvature = scene
    change = {p: jnp.zeros_like(params[p]) for p in ("w", "b")}
    edited, weights = num_bytes(change), num_bytes(params)
    where = (("b", "w"), params, change)

    def held(function, *args, beside=0):
        found = function.lower(*args).compile().memory_analysis()
        fresh = found.output_size_in_bytes - found.alias_size_in_bytes
        return found.temp_size_in_bytes + fresh + beside

    # What one backward pass in one bias needs, and one forward pass.
    one = {"b": change["b"]}
    fixed = (KFADE._add_gradient, GA(), deep)
    backward = held(*fixed, ("b",), params, one, forget, retain, 1.0, None)
    total = (jnp.zeros((), jnp.float32), change)
    price = RetainKl(deep, params, retain, likelihood=Categorical())
    at = (deep, Categorical(), params, price._base[0], retain)
    peaks = {
        "gradient": held(*fixed, *where, forget, retain, 1.0, total, beside=2 * edited),
        "cosine": held(
            KFADE._cosine, deep, Categorical(), *where, change, retain, beside=2 * edited
        ),
        "direction": held(
            KFADE._direction, inverted(curvature, damping=0.1), change, beside=2 * edited
        ),
        # The change, the move and where both lead, of which a leaf at a time is made.
        "search": held(trust_region._mean_kl, *at, beside=3 * edited),
    }
    assert max(peaks.values()) <= 3 * edited + backward, (peaks, edited, backward)
    assert max(peaks.values()) < weights / 4


def test_a_direction_is_found_one_block_at_a_time(scene):
    """Equal to the solve of the whole, and equal blocks share one program."""
    params, _, retain, _ = scene
    curvature = estimate(kfac(deep, Categorical()), params, [retain], key=jax.random.key(1))
    gradient = jax.tree.map(jnp.cos, params)
    whole = jax.tree.map(jnp.negative, solve(curvature, gradient, damping=0.3))
    KFADE._direction.clear_cache()
    found = KFADE._block_by_block(inverted(curvature, damping=0.3), dict(gradient))
    for path, block in whole.items():
        np.testing.assert_allclose(found[path], block, rtol=1e-4, atol=1e-4 * np.abs(block).max())
    assert KFADE._direction._cache_size() == 2  # the square matrices, and the one with a bias


def test_the_line_search_moves_nothing_that_does_not_change(scene):
    params, _, retain, curvature = scene
    step = solve(curvature, jax.tree.map(jnp.cos, params), damping=0.1)
    options = {"budget": 1e-3}
    scaled, info = scale_to_kl_budget(
        deep, params, step, retain, likelihood=Categorical(), **options
    )
    part = {path: step[path] for path in curvature.covered}
    again, same = scale_to_kl_budget(
        deep, params, part, retain, likelihood=Categorical(), **options
    )
    assert (info, set(again)) == (same, {"w", "b"})
    for path, block in again.items():
        np.testing.assert_array_equal(scaled[path], block)
    assert all(scaled[f"stays{i}"] is step[f"stays{i}"] for i in range(DEEP))
    candidate = moved(params, part, 0.5)
    assert [p for p in params if candidate[p] is not params[p]] == ["w", "b"]
    with pytest.raises(ValueError, match=r"a change of 'c' .* none of that path"):
        scale_to_kl_budget(
            deep, params, {"c": part["b"]}, retain, likelihood=Categorical(), **options
        )
    with pytest.raises(ValueError, match=r"a change of 'b' has shape \(2,\)"):
        scale_to_kl_budget(
            deep, params, {"b": jnp.ones(2)}, retain, likelihood=Categorical(), **options
        )
    price = RetainKl(deep, params, retain, likelihood=Categorical())
    with pytest.raises(ValueError, match=r"a change of 'c' .* none of that path"):
        price({"c": part["b"]})
    with pytest.raises(ValueError, match=r"a change of 'b' has shape \(2,\)"):
        price(part, start={"b": jnp.ones(2)})


def test_outputs_that_are_not_kept_are_computed_again_to_the_same_numbers(scene):
    params, forget, retain, curvature = scene
    batches = [retain, forget]
    bytes_of_outputs = (8 + 8) * 3 * 4
    change = {"w": 0.1 * jnp.cos(params["w"]), "b": jnp.ones(16, jnp.float32)}
    prices = {
        limit: RetainKl(deep, params, batches, kept_bytes=limit, likelihood=Categorical())
        for limit in (bytes_of_outputs, bytes_of_outputs - 1)
    }
    kept, computed = prices.values()
    assert [x.shape for x in kept._base] == [(8, 3), (8, 3)]
    assert computed._base is None
    for alpha in (0.0, 0.3, 1.0):
        assert kept(change, alpha) == computed(change, alpha)
    assert kept(change, 0.2, start={"b": change["b"]}) == computed(
        change, 0.2, start={"b": change["b"]}
    )
    assert kept(change, 0.0) < 1e-9 < kept(change)


@pytest.mark.parametrize("transform", ["scale_by_curvature", "project_to_null_space"])
def test_a_training_step_computes_no_gradient_of_what_a_transform_freezes(scene, transform):
    """Counted in the compiled step, whose dead code is gone."""
    params, forget, _, curvature = scene
    made = {
        "scale_by_curvature": lambda: scale_by_curvature(curvature),
        "project_to_null_space": lambda: project_to_null_space(
            null_space(curvature, threshold=0.2)
        ),
    }[transform]()

    def flops(update):
        def step(params, state):
            gradient = jax.grad(lambda p: GA()(deep, p, forget)[0])(params)
            return optax.apply_updates(params, update(gradient, state, params)[0])

        compiled = jax.jit(step).lower(params, made.init(params)).compile()
        return compiled.cost_analysis()["flops"]

    square = 2 * 8 * WIDE**2  # of one weight gradient
    whole = flops(lambda gradient, state, _: made.update(gradient, state))
    assert whole - flops(made.update) > 0.9 * DEEP * square
