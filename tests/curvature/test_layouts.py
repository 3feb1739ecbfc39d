"""Where the examples are, when lengths say nothing: as many examples as positions and features.

The same function is written in many layouts, and once plainly: whatever is estimated must agree.
What cannot be told (tokens sorted and put back, a table that all examples share) flows back one by
one, and a batch in one piece, in halves and in another order must agree; or it is refused by name.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import diagonal, ekfac, estimate, factors, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.curvature.positions import align
from jedit.curvature.types import Diagonal
from jedit.tracing.discover import trace_program
from tests.curvature.programs import plus
from tests.curvature.references import rows_as_trees, score_rows

N = T = D = CLASSES = 4
MASK = np.array([[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]])
VALID = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])


def layer(p, x):
    """Features last, whatever leads."""
    return jnp.tanh(plus(x @ p["w"], p["b"])) * jnp.broadcast_to(p["gain"], x.shape)


def time_first(p, x):
    return layer(p, x.swapaxes(0, 1)).swapaxes(0, 1)


def flat_time_first(p, x):
    return layer(p, x.swapaxes(0, 1).reshape(-1, D)).reshape(T, -1, D).swapaxes(0, 1)


def in_the_middle(p, x):
    """Two copies in front, of which one is taken."""
    return layer(p, jnp.broadcast_to(x, (2, *x.shape)))[0]


def features_first(p, x):
    """(features, time, examples)."""
    x = jnp.transpose(x, (2, 1, 0))
    bias, gain = (jnp.broadcast_to(p[name][:, None, None], x.shape) for name in ("b", "gain"))
    hidden = jnp.tanh(jnp.einsum("io,itn->otn", p["w"], x) + bias) * gain
    return hidden.transpose(2, 1, 0)


def example_by_example(p, x):
    return jax.lax.map(lambda row: layer(p, row), x)


def step_by_step(p, x):
    """A weight that a scan over time closes over."""
    _, out = jax.lax.scan(lambda s, row: (s, layer(p, row)), (), x.swapaxes(0, 1))
    return out.swapaxes(0, 1)


LAYOUTS = {
    f.__name__: f
    for f in (
        time_first,
        flat_time_first,
        in_the_middle,
        features_first,
        example_by_example,
        step_by_step,
    )
}


def laid_out(params, x):
    """The sum of one layer in each layout, behind a layer of attention."""
    x = attended(params["attention"], x)
    return sum(layout(params[name], x) for name, layout in LAYOUTS.items())


def plainly(params, x):
    """The same."""
    x = attended(params["attention"], x)
    return sum(layer(params[name], x) for name in LAYOUTS)


def attended(p, x):
    """A token sees itself and those before; queries and keys come of one matrix."""
    scores = (x @ p["q"]) @ jnp.sin(x @ p["q"]).swapaxes(1, 2)
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
    return x + jax.nn.softmax(scores, axis=-1) @ (x @ p["o"])


@functools.cache
def problem():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / 2, float)

    params = {name: {"w": draw(D, D), "b": draw(D), "gain": draw(D)} for name in LAYOUTS}
    params["attention"] = {"q": draw(D, D), "o": draw(D, D)}
    targets = jnp.asarray(rng.integers(CLASSES, size=(N, T)))
    return params, Batch(draw(N, T, D), targets, jnp.asarray(MASK), jnp.asarray(VALID))


def estimator_of(kind, fisher, apply):
    if kind == "ekfac":
        return ekfac(apply, Categorical(), estimated("expand", "exact", plainly), fisher=fisher)
    if kind == "diagonal":
        return diagonal(apply, Categorical(), fisher=fisher)
    return kfac(apply, Categorical(), fisher=fisher, sharing=kind)


@functools.cache
def estimated(kind, fisher, apply):
    params, batch = problem()
    return estimate(estimator_of(kind, fisher, apply), params, [batch], key=jax.random.key(0))


def numbers(curvature):
    """What was estimated, by parameter."""
    found = {}
    for name, block in curvature.blocks.items():
        if isinstance(block, Diagonal):
            found[name] = block.values
        elif block.corrected is not None:
            found[name] = block.corrected
        else:
            found[name] = factors(curvature, name)
    return found


@pytest.mark.parametrize(
    ("kind", "fisher"), [("expand", "exact"), ("reduce", "sampled"), ("ekfac", "empirical")]
)
def test_the_layout_does_not_matter(kind, fisher, tolerance):
    found, expected = (numbers(estimated(kind, fisher, f)) for f in (laid_out, plainly))
    tolerance.check(found, expected)


def test_the_diagonal_is_that_of_the_gradients(tolerance):
    params, batch = problem()
    rows, number = score_rows(laid_out, Categorical(), params, batch)
    trees = rows_as_trees(rows, params)
    curvature = estimated("diagonal", "exact", laid_out)
    for block in curvature.blocks.values():
        expected = jax.tree.map(lambda g: np.square(g).sum(0) / number, trees)
        leaves = {"/".join(path): expected[path[0]][path[1]] for path in _paths(expected)}
        for path, found in block.weight.scatter(block.values).items():
            tolerance.check(found, leaves[path])


def _paths(tree):
    return [(a, b) for a, inner in tree.items() for b in inner]


def shared(params, x):
    """Tokens that are sorted and put back, and a lookup that all examples share."""
    x = x + jnp.broadcast_to(params["table"][jnp.arange(T)][None], x.shape)
    tokens = x.reshape(-1, D)
    order = jnp.argsort(tokens[:, 0])
    routed = jnp.tanh(tokens[order] @ params["expert"])
    back = jnp.zeros_like(routed).at[order].set(routed)
    return back.reshape(x.shape) @ params["head"]


@functools.cache
def shared_problem():
    params, batch = problem()
    names = dict(zip(("table", "expert", "head"), LAYOUTS, strict=False))
    return {k: params[name]["w"] for k, name in names.items()}, batch._replace(valid=None)


def take(batch, index):
    return jax.tree.map(lambda x: x[np.array(index)], batch)


@pytest.mark.parametrize(
    ("make", "fisher"), [(kfac, "exact"), (diagonal, "exact"), (diagonal, "empirical")]
)
def test_what_examples_share_flows_back_one_by_one(make, fisher, tolerance):
    params, batch = shared_problem()
    estimator = make(shared, Categorical(), fisher=fisher)
    update = jax.jit(estimator.update)
    found = []
    for parts in ([range(N)], [[2, 0, 3, 1]], [range(2), range(2, N)]):
        state = estimator.init(params, batch)
        for part in parts:
            state = update(state, params, take(batch, part), jax.random.key(0))
        found.append(numbers(estimator.finalize(state)))
    tolerance.check(found[1], found[0])
    tolerance.check(found[2], found[0])
    if make is diagonal:
        gradients, number = gradients_of(fisher, params, batch)
        expected = jax.tree.map(lambda g: np.square(g).sum(0) / number, gradients)
        tolerance.check({name: found[0][name][0] for name in params}, expected)


def gradients_of(fisher, params, batch):
    """Gradients whose squares sum to M times the diagonal, by `jax.jacrev` and `jax.grad`."""
    rows, number = score_rows(shared, Categorical(), params, batch)
    if fisher == "exact":
        return rows_as_trees(rows, params), number

    def loss(params, n):
        nll = Categorical().nll(shared(params, batch.inputs), batch.targets)
        return jnp.sum(jnp.where(batch.mask[n], nll[n], 0))

    per_example = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
    return per_example(params, jnp.arange(N)), number


def test_what_examples_share_is_refused_by_name():
    params, batch = shared_problem()
    names = "table, expert"
    with pytest.raises(ValueError, match=f"positions of {names} cannot be matched"):
        kfac(shared, Categorical()).init(params, batch._replace(valid=jnp.asarray(VALID)))
    with pytest.raises(ValueError, match=r"reduce.* table \(test_layouts.py:\d+\) has no axis"):
        kfac(shared, Categorical(), sharing="reduce").init(params, batch)


def test_padding_changes_nothing():
    """Bit for bit, in every layout."""
    params, batch = problem()
    estimator = kfac(laid_out, Categorical())
    update, start = jax.jit(estimator.update), estimator.init(params, batch)
    garbage = jnp.where(batch.valid[..., None] == 1, batch.inputs, 1e4 + batch.inputs)
    sums = [
        update(start, params, batch._replace(inputs=x), jax.random.key(0))
        for x in (batch.inputs, garbage)
    ]
    jax.tree.map(np.testing.assert_array_equal, *sums)


def test_outputs_that_lead_with_time_are_refused():
    """With as many steps as examples, no length would tell."""
    params, batch = problem()
    with pytest.raises(ValueError, match=r"4 examples are axis 1 of the outputs .* leading axis"):
        kfac(lambda p, x: laid_out(p, x).swapaxes(0, 1), Categorical()).init(params, batch)


def test_a_token_picked_of_every_example():
    """`x[arange(n), last]` leaves examples apart, so that they need not flow back one by one."""
    params, batch = problem()

    def last(params, x):
        number = jnp.sum(x[..., 0] > 0, axis=1)
        return time_first(params["time_first"], x)[jnp.arange(len(x)), number - 1]

    for alignment in align(trace_program(last, params, batch.inputs), (N,)).values():
        assert alignment.example == (1, 1, N)
        assert alignment.is_maskable
