"""Experts found and switched: scores by loops in NumPy, and outputs by a model without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jedit.core.batch import Batch
from jedit.edits import apply_edit
from jedit.models import Experts, gpt, mlp
from jedit.steering import (
    Affine,
    Expert,
    expert_layers,
    expert_scores,
    expert_use,
    fold,
    steered,
    switch_experts,
    top_experts,
    why_not_folded,
)
from jedit.tracing import Weight, find_sites
from jedit.tracing.entering import Entering
from tests.models.test_experts import numpy_mixture, small, tokens_of
from tests.models.test_models import numpy_gpt, numpy_tree

NAMES = ("blocks/0/mlp", "blocks/1/mlp")


def rows(key, batch=4, seq=6):
    """Rows of which some positions count in the loss, and the last are padding in some."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    valid = np.arange(seq)[None] < rng.integers(3, seq + 1, batch)[:, None]
    mask = rng.random((batch, seq)) < 0.7
    tokens = tokens_of(key, batch, seq)
    return Batch(tokens, tokens, jnp.asarray(mask, float), jnp.asarray(valid, float))


def use_by_hand(apply, params, batch, layer):
    """One token after the other: which experts its scores choose, and their softmax."""
    entering = np.asarray(
        Entering(f"{layer}/router/kernel")(apply, params, batch.inputs), np.float64
    )
    kernel = numpy_tree(params)["blocks"][layer.split("/")[1]]["mlp"]["router"]["kernel"]
    total, count = np.zeros(kernel.shape[1]), 0
    for i, row in enumerate(entering):
        for t, x in enumerate(row):
            if not (batch.mask[i, t] and batch.valid[i, t]):
                continue
            scores = x @ kernel
            best = np.argsort(-scores)[:2]
            weights = np.exp(scores[best]) / np.exp(scores[best]).sum()
            total[best] += weights
            count += 1
    return total / count


def test_scores_are_the_mean_weight_on_the_target_less_that_on_others(key, tolerance):
    apply, params = small(key)
    target, *others = (rows(jax.random.fold_in(key, i)) for i in (2, 3, 4))
    layers = expert_layers(apply, params, target.inputs, chosen=2)
    assert tuple(layers) == NAMES
    got = expert_scores(apply, params, layers, target, others)
    # Tokens of several batches weigh alike, whichever batch they are in.
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *others)
    for name in NAMES:
        want = [use_by_hand(apply, params, part, name) for part in (target, joined)]
        tolerance.check(got[name], want[0] - want[1], "contraction")
        assert_allclose(got[name].sum(), 0, atol=1e-6)
        assert np.abs(got[name]).max() > 0.01


def test_what_does_not_count_is_not_looked_at(key):
    apply, params = small(key)
    batch = rows(jax.random.fold_in(key, 2))
    layers = expert_layers(apply, params, batch.inputs, chosen=2)
    used = expert_use(apply, params, layers, batch)
    last = np.asarray(batch.valid).sum(1).astype(int)
    for i, stop in enumerate(last):
        other = batch._replace(inputs=batch.inputs.at[i, stop:].set(3))
        for name, part in expert_use(apply, params, layers, other).items():
            assert_allclose(part, used[name], atol=1e-6)
    plain = expert_use(apply, params, layers, Batch(batch.inputs))
    assert any(np.abs(plain[name] - used[name]).max() > 1e-3 for name in NAMES)


def test_the_highest_come_first_over_all_layers():
    scores = {"a": np.array([0.1, -0.4, 0.3]), "b": np.array([0.2, 0.3, -0.5])}
    assert top_experts(scores, 4) == [("a", 2), ("b", 1), ("b", 0), ("a", 0)]
    with pytest.raises(ValueError, match="7 experts were asked for, and there are 6"):
        top_experts(scores, 7)


@pytest.mark.parametrize("gain", [0.0, 0.25, 3.0])
def test_a_switched_expert_is_one_whose_output_is_multiplied(key, tolerance, gain):
    """Steered, folded, and by hand in NumPy: three ways to one function."""
    apply, params = small(key)
    tokens = tokens_of(jax.random.fold_in(key, 2))
    layers = expert_layers(apply, params, tokens, chosen=2)
    experts = [Expert("blocks/0/mlp", 3), Expert("blocks/1/mlp", 0), Expert("blocks/1/mlp", 4)]
    steering = switch_experts(layers, experts, gain=gain)
    tree, block = numpy_tree(params), iter("01" * 3)

    def switched(mixture, h):
        here = f"blocks/{next(block)}/mlp"
        gains = [gain if (here, e) in experts else 1.0 for e in range(5)]
        down = mixture["down"] * np.array(gains)[:, None, None]
        return numpy_mixture(mixture | {"down": down}, h, 2)

    want = numpy_gpt(tree, tokens, 2, switched)
    assert np.abs(want - np.asarray(apply(params, tokens))).max() > 1e-2
    tolerance.check(jax.jit(steered(apply, steering))(params, tokens), want)
    edit = fold(apply, params, tokens, steering)
    assert set(edit.blocks) == {"blocks/0/mlp/down", "blocks/1/mlp/down"}
    tolerance.check(apply(apply_edit(params, edit), tokens), want)
    # Experts that are not named keep every bit.
    changed = apply_edit(params, edit)["blocks"]["0"]["mlp"]["down"]
    kept = [e for e in range(5) if e != 3]
    assert_array_equal(
        changed[jnp.array(kept)], params["blocks"]["0"]["mlp"]["down"][jnp.array(kept)]
    )


def one_by_one(mixed):
    """The same mixture as tunix writes it: a product for each expert, in another order."""

    def apply(params, x):
        scores = x @ params["router"]["kernel"]
        order = (2, 0, 1)
        parts = [jnp.tanh(x @ params["up"][e]) @ params["down"][e] for e in order]
        weights = jax.nn.softmax(scores, axis=-1)[..., jnp.array(order)]
        return mixed(weights, jnp.stack(parts, axis=-1))

    return apply


def test_experts_multiplied_one_by_one_are_told_apart_by_what_they_read(key, tolerance):
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)  # noqa: E731
    params = {"router": {"kernel": draw(0, 4, 3)}, "up": draw(1, 3, 4, 5), "down": draw(2, 3, 5, 4)}
    apply = one_by_one(lambda w, parts: jnp.sum(parts * w[..., None, :], axis=-1))
    x = draw(3, 6, 4)
    layers = expert_layers(apply, params, x, chosen=3)
    assert [site.experts for site in layers[""].down] == [(2,), (0,), (1,)]
    steering = switch_experts(layers, [Expert("", 0), Expert("", 1)])
    without = params | {"down": params["down"].at[:2].set(0)}
    tolerance.check(steered(apply, steering)(params, x), apply(without, x))
    tolerance.check(
        apply(apply_edit(params, fold(apply, params, x, steering)), x), apply(without, x)
    )


def test_nothing_of_the_size_of_a_leaf_is_made_to_tell_experts_apart(monkeypatch):
    """Experts of a real model's size, in shapes alone: a whole leaf would be 800 MB."""

    def apply(params, x):
        weights = jax.nn.softmax(x @ params["router"]["kernel"], axis=-1)
        parts = [weights[:, e, None] * (x @ params["down"][e]) for e in range(128)]
        return sum(parts[1:], parts[0])

    def refuse(*_):
        raise AssertionError("a whole leaf was made")

    monkeypatch.setattr(Weight, "scatter", refuse)
    shapes = {"router": {"kernel": (768, 128)}, "down": (128, 768, 2048)}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    x = jax.ShapeDtypeStruct((2, 768), jnp.float32)
    found = expert_layers(apply, params, x, chosen=8)[""]
    assert [site.experts for site in found.down] == [(e,) for e in range(128)]
    sites = find_sites(apply, params, x)
    assert why_not_folded(sites["down#3"], Affine(gain=jnp.zeros(2048)), sites) is None


def test_a_router_with_a_bias_and_gates_of_its_own_is_scored_by_them(key, tolerance):
    """Sigmoid gates, of the experts that the scores choose: the model's own are what it returns."""

    def gates(scores, chosen):
        least = jnp.sort(scores, axis=-1)[..., -chosen, None]
        return jnp.where(scores >= least, jax.nn.sigmoid(scores), 0)

    def apply(params, x):
        router = params["router"]
        scores = x @ router["kernel"] + router["bias"][None]
        sent = jnp.broadcast_to(x, (3, *x.shape))
        parts = jnp.einsum("eni,eio->eno", sent, params["down"])
        return jnp.sum(gates(scores, 2).T[..., None] * parts, axis=0)

    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)  # noqa: E731
    params = {
        "router": {"kernel": draw(0, 4, 3), "bias": 3 * draw(1, 3)},
        "down": draw(2, 3, 4, 5),
    }
    x = draw(3, 6, 4).at[:, 0].set(1)
    layers = expert_layers(apply, params, x, chosen=2)
    used = expert_use(apply, params, layers, Batch(x), gates=gates)[""]
    # Each expert in turn answers one, and the others nothing: what is returned is its gate.
    for e in range(3):
        alone = params | {"down": jnp.zeros((3, 4, 5)).at[e, 0].set(1)}
        tolerance.check(used[e], apply(alone, x)[:, 0].mean(), "contraction")
    others = expert_use(apply, params, layers, Batch(x))[""]
    assert np.abs(others - used).max() > 1e-2
    target, rest = Batch(x[:3]), Batch(x[3:])
    scores = expert_scores(apply, params, layers, target, rest, gates=gates)[""]
    parts = [expert_use(apply, params, layers, rows, gates=gates)[""] for rows in (target, rest)]
    tolerance.check(scores, parts[0] - parts[1])


def test_bfloat16_weights_go_back_in_their_own_dtype(key):
    apply, params = small(key, jnp.bfloat16)
    tokens = tokens_of(jax.random.fold_in(key, 2))
    layers = expert_layers(apply, params, tokens, chosen=2)
    steering = switch_experts(layers, [Expert("blocks/0/mlp", 1)])
    edited = apply_edit(params, fold(apply, params, tokens, steering))
    down = edited["blocks"]["0"]["mlp"]["down"]
    assert down.dtype == jnp.bfloat16
    assert not np.asarray(down[1], np.float32).any()
    assert expert_use(apply, params, layers, Batch(tokens))["blocks/0/mlp"].sum() == pytest.approx(
        1, abs=1e-3
    )


def test_what_has_no_experts_is_refused_by_name(key):
    plain, params = mlp(key=key, sizes=(4, 3))
    with pytest.raises(ValueError, match="no mixture of experts: no site of a parameter called r"):
        expert_layers(plain, params, jnp.zeros((2, 4), jnp.float32), chosen=1)
    apply, params = small(jax.random.fold_in(key, 1))
    tokens = tokens_of(jax.random.fold_in(key, 2))
    with pytest.raises(ValueError, match="6 experts cannot be chosen of the 5"):
        expert_layers(apply, params, tokens, chosen=6)
    layers = expert_layers(apply, params, tokens, chosen=2)
    with pytest.raises(ValueError, match="there is no expert 5 in 'blocks/0/mlp'"):
        switch_experts(layers, [Expert("blocks/0/mlp", 5)])
    with pytest.raises(ValueError, match="no position counts"):
        expert_use(apply, params, layers, Batch(tokens, mask=jnp.zeros(tokens.shape)))


def test_ragged_products_are_refused_with_their_reason(key):
    """A program that sorts tokens by expert has no site for them."""

    def apply(params, x):
        scores = x @ params["router"]["kernel"]
        best = jnp.argmax(scores, axis=-1)
        order = jnp.argsort(best)
        sizes = jnp.bincount(best, length=3).astype(jnp.int32)
        ragged = jax.lax.ragged_dot(x[order], params["down"], sizes)
        return ragged[jnp.argsort(order)] * jnp.max(jax.nn.softmax(scores), axis=-1, keepdims=True)

    params = {
        "router": {"kernel": jax.random.normal(key, (4, 3))},
        "down": jax.random.normal(jax.random.fold_in(key, 1), (3, 4, 4)),
    }
    with pytest.raises(ValueError, match="router of 3 experts.*of .., each.*not covered.*down"):
        expert_layers(apply, params, jnp.ones((6, 4)), chosen=1)


def test_the_size_of_a_mixture_is_what_gpt_was_given():
    _, params = gpt(
        key=jax.random.key(0), vocab=9, width=8, num_layers=1, num_heads=2, max_len=4,
        mlp=Experts(6, 2, 5),
    )  # fmt: skip
    mixture = params["blocks"]["0"]["mlp"]
    assert mixture["router"]["kernel"].shape == (8, 6)
    assert (mixture["up"].shape, mixture["down"].shape) == ((6, 8, 5), (6, 5, 8))
