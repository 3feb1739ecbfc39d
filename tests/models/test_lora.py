"""Low-rank adapters against the weights they stand for, and as the only thing that is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

import jedit
from jedit.models import gpt, mlp, with_lora


def _normal(key, *shape):
    return jax.random.normal(key, shape, jnp.result_type(float))


def filled(adapted, key):
    """The adapted parameters with no adapter zero."""
    leaves, tree = jax.tree.flatten(adapted.params["lora"])
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return {**adapted.params, "lora": jax.tree.unflatten(tree, drawn)}


def paths(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


def dense(params, x):
    return x @ params["w"] + params["b"][None]


def transposed(params, x):
    return jnp.einsum("oi,bi->bo", params["w"], x)


def weight_first(params, x):
    return (params["w"].T @ x.T).T


def heads(params, x):
    mixed = jnp.einsum("bd,dnh->bnh", x, params["q"])
    return jnp.einsum("bnh,nhd->bd", jnp.tanh(mixed), params["o"])


def several_axes(params, x):
    return jnp.einsum("abcd,ceb->aed", x, params["w"]).reshape(x.shape[0], -1)


def relaid(params, x):
    return x @ params["w"].reshape(5, 3, 2).transpose(1, 2, 0).reshape(6, 5)


def inside(params, x):
    layer = jax.checkpoint(jax.jit(lambda w, x: jnp.tanh(x @ w)))
    return jax.jit(layer)(params["u"], layer(params["w"], x))


def twice(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"]


PROGRAMS = {
    "dense": (dense, {"w": (6, 4), "b": (4,)}, (3, 6)),
    "transposed": (transposed, {"w": (4, 6)}, (3, 6)),
    "weight first": (weight_first, {"w": (6, 4)}, (3, 6)),
    "heads": (heads, {"q": (6, 2, 3), "o": (2, 3, 4)}, (5, 6)),
    "several axes": (several_axes, {"w": (3, 4, 5)}, (2, 5, 3, 6)),
    "relaid": (relaid, {"w": (10, 3)}, (3, 6)),
    "inside": (inside, {"w": (6, 4), "u": (4, 5)}, (3, 6)),
    "twice": (twice, {"w": (4, 4)}, (3, 4)),
}


def program(name, key):
    apply, shapes, shape = PROGRAMS[name]
    keys = jax.random.split(key, len(shapes) + 1)
    params = {n: _normal(k, *s) for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    return apply, params, _normal(keys[-1], *shape)


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_adapters_do_what_merged_weights_do(name, key, tolerance):
    first, second, third = jax.random.split(key, 3)
    apply, params, x = program(name, first)
    adapted = with_lora(apply, params, x, rank=2, key=second, scale=0.7)
    assert set(adapted.params["lora"]) == {n for n, p in params.items() if p.ndim > 1}
    assert_array_equal(adapted.apply(adapted.params, x), apply(params, x))
    moved = filled(adapted, third)
    merged = adapted.merge(moved)
    want = apply(merged, x)
    assert np.abs(np.asarray(want - apply(params, x))).max() > 0.1
    tolerance.check(jax.jit(adapted.apply)(moved, x), want)
    # As many rows again: what is known of the example's shape is not used.
    more = jnp.concatenate([x, 2 * x])
    tolerance.check(adapted.apply(moved, more), apply(merged, more))


def test_merging_by_hand(key, tolerance):
    apply, params, x = program("heads", key)
    adapted = with_lora(apply, params, x, rank=3, key=key, scale=0.5)
    moved = filled(adapted, jax.random.fold_in(key, 1))
    lora = jax.tree.map(np.asarray, moved["lora"])
    assert lora["q"]["a"].shape == (6, 3)
    assert lora["o"]["a"].shape == (6, 3)
    assert lora["o"]["b"].shape == (3, 4)
    want = {
        "q": np.asarray(params["q"]) + 0.5 * (lora["q"]["a"] @ lora["q"]["b"]).reshape(6, 2, 3),
        "o": np.asarray(params["o"]) + 0.5 * (lora["o"]["a"] @ lora["o"]["b"]).reshape(2, 3, 4),
    }
    tolerance.check(adapted.merge(moved), want)


@pytest.fixture
def float_dtype():
    return jnp.result_type(float)


@pytest.fixture
def language_model(key, float_dtype):
    apply, params = gpt(
        key=key,
        vocab=11,
        width=8,
        num_layers=2,
        num_heads=2,
        max_len=6,
        dtype=float_dtype,
    )
    tokens = jax.random.randint(jax.random.fold_in(key, 1), (4, 6), 0, 11)
    return apply, params, tokens[:, :-1], tokens[:, 1:]


def test_training_the_adapters_leaves_the_base_alone(language_model, key):
    apply, params, inputs, targets = language_model
    adapted = with_lora(apply, params, inputs, rank=2, key=key, select="attn/(query|value)/kernel")
    assert set(adapted.params["lora"]["blocks"]) == {"0", "1"}
    likelihood = jedit.likelihoods.Categorical()

    def objective(apply, params, forget, retain, reference):
        del retain, reference
        logits = apply(params, forget.inputs)
        return -jnp.mean(likelihood.nll(logits, forget.targets)), {}

    method = jedit.TrainingMethod(objective, optax.sgd(0.5), trainable="^lora/")
    rows, key = jedit.Batch(inputs, targets), jax.random.fold_in(key, 2)
    trained, _ = jedit.unlearn(method, adapted.apply, adapted.params, rows, steps=3, key=key)
    jax.tree.map(assert_array_equal, trained["base"], params)
    changed = paths(jax.tree.map(lambda a, b: bool((a != b).any()), trained, adapted.params))
    assert all(changed[path] for path in changed if path.startswith("lora/")), changed
    merged = adapted.merge(trained)
    differing = paths(jax.tree.map(lambda a, b: bool((a != b).any()), merged, params))
    assert {path for path, differs in differing.items() if differs} == {
        f"blocks/{i}/attn/{name}/kernel" for i in range(2) for name in ("query", "value")
    }


def test_capture_sees_the_adapters(language_model, key):
    apply, params, inputs, _ = language_model
    adapted = with_lora(apply, params, inputs, rank=2, key=key)
    moved = filled(adapted, jax.random.fold_in(key, 1))
    sites = jedit.find_sites(adapted.apply, moved, inputs)
    assert not sites.uncovered, str(sites)
    of_adapters = {name: site.kind for name, site in sites.items() if name.startswith("lora/")}
    assert set(of_adapters) == {p for p in paths(moved) if p.startswith("lora/")}
    assert set(of_adapters.values()) == {"dense"}
    assert "lora/blocks/0/mlp/up/kernel/a" in of_adapters
    assert "embed" not in moved["lora"]


def test_a_curvature_edit_of_the_adapters_alone(key, float_dtype, tolerance):
    apply, params = mlp(key=key, sizes=(5, 4, 3), dtype=float_dtype)
    inputs = jax.random.normal(key, (8, 5), float_dtype)
    batch = jedit.Batch(inputs, jnp.arange(8) % 3)
    adapted = with_lora(apply, params, inputs, rank=2, key=key)
    moved = filled(adapted, jax.random.fold_in(key, 1))
    likelihood = jedit.likelihoods.Categorical()
    estimator = jedit.kfac(adapted.apply, likelihood, select="^lora/layers/1")
    curvature = jedit.estimate(estimator, moved, [batch], key=jax.random.fold_in(key, 2))
    edit, info = jedit.methods.kfade(
        adapted.apply, moved, curvature, batch, batch, budget=0.01, ascent=jedit.methods.Ascent(1)
    )
    assert bool(info.within_budget[-1])
    changed = {path for path, norm in jedit.edit_norms(edit).items() if norm > 0}
    assert changed == {"lora/layers/1/kernel/a", "lora/layers/1/kernel/b"}
    edited = jedit.apply_edit(moved, edit)
    jax.tree.map(assert_array_equal, edited["base"], params)
    tolerance.check(adapted.apply(edited, inputs), apply(adapted.merge(edited), inputs))


def test_half_precision(key):
    apply, params = mlp(key=key, sizes=(5, 4, 3), dtype=jnp.bfloat16)
    x = jnp.ones((2, 5), jnp.bfloat16)
    adapted = with_lora(apply, params, x, rank=2, key=key)
    moved = filled(adapted, jax.random.fold_in(key, 1))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((moved, adapted.merge(moved)))}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert adapted.apply(moved, x).dtype == jnp.bfloat16


def test_the_key_decides_and_the_selection_does_not(language_model, key):
    apply, params, inputs, _ = language_model
    all_of_them = with_lora(apply, params, inputs, rank=2, key=key).params["lora"]
    few = with_lora(apply, params, inputs, rank=2, key=key, select="blocks/1/").params["lora"]
    assert set(few["blocks"]) == {"1"}
    other = with_lora(apply, params, inputs, rank=2, key=jax.random.fold_in(key, 1)).params["lora"]
    one, same, different = (
        tree["blocks"]["1"]["mlp"]["up"]["kernel"]["a"] for tree in (all_of_them, few, other)
    )
    assert_array_equal(one, same)
    assert (np.asarray(one) != np.asarray(different)).all()
    assert np.abs(np.asarray(one)).max() <= 1 / np.sqrt(8)


def test_what_cannot_be_adapted(language_model, key):
    apply, params, inputs, _ = language_model
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        with_lora(apply, params, inputs, rank=0, key=key)
    with pytest.raises(ValueError, match="embed/embedding cannot have an adapter: it stands in no"):
        with_lora(apply, params, inputs, rank=1, key=key, select="embed")
    with pytest.raises(ValueError, match="leaves no parameter"):
        with_lora(apply, params, inputs, rank=1, key=key, select="nothing of that name")

    def check(apply, shape, message):
        params = {"w": jnp.ones(shape)}
        with pytest.raises(ValueError, match=message):
            with_lora(apply, params, jnp.ones((2, 4)), rank=1, key=key, select="w")

    check(
        lambda params, x: jnp.tanh(x @ params["w"]) @ params["w"].T,
        (4, 4),
        "it is read by different axes in two products",
    )
    check(lambda params, x: params["w"] + 0 * x.sum(), (2, 3), "it stands in no product")
    check(
        lambda params, x: (x @ params["w"], params["w"])[1],
        (4, 3),
        "it is returned by apply",
    )
    check(
        lambda params, x: jnp.einsum("bi,bio->bo", x, params["w"]),
        (2, 4, 3),
        "a batch of matrices",
    )
    check(lambda params, x: jax.lax.stop_gradient(x @ params["w"]) + x @ params["w"], (4, 3), "too")
    check(
        lambda params, x: jax.lax.scan(lambda x, _: (x @ params["w"], None), x, length=3)[0],
        (4, 4),
        "it stands in a loop",
    )
    check(
        lambda params, x: jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0],
        (2, 4, 4),
        "it stands in a loop",
    )
    check(lambda params, x: x + 0 * len(params), (4, 3), "it is not used by apply")
