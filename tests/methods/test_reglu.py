"""REGLU against outputs that are there: its directions, and a run of adapters by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.curvature import Factorize, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.edits import apply_edit
from jedit.methods import Directions, reglu
from jedit.models import with_lora
from jedit.objectives import IHL, RetainNLL
from jedit.training import run_method

D_IN, WIDTH, CLASSES, SEQ = 5, 9, 4, 3
DIRECTIONS = Directions(rank=2, retain_rank=3, share=0.5, balance=0.6)


@pytest.fixture(autouse=True)
def _standard_promotion():
    """What optax's Adam mixes, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None, None]) @ params["v"]


POOLED = kfac(network, Categorical(), sharing="reduce")
SINGLE = kfac(network, Categorical())


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(8)
    shapes = {"w": (D_IN, WIDTH), "b": (WIDTH,), "v": (WIDTH, CLASSES)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def rows(count, spread):
        x = rng.normal(size=(count, SEQ, D_IN)) * spread
        valid = np.arange(SEQ)[None] < 1 + np.arange(count)[:, None] % SEQ
        y = rng.integers(0, CLASSES, (count, SEQ))
        return Batch(*map(jnp.asarray, (x, y, valid, valid)))

    return params, rows(12, np.geomspace(2, 0.3, D_IN)), rows(18, np.geomspace(0.3, 2, D_IN))


def moments(estimator, scene):
    params, *sets = scene
    return [estimate(estimator, params, [rows], key=jax.random.key(1)) for rows in sets]


def numpy_outputs(params, rows, name, *, pooled):
    """Each row's outputs of a matrix, at what is valid; their means over a row's positions."""
    w, b, v = (np.asarray(params[n], np.float64) for n in "wbv")
    h = np.asarray(rows.inputs, np.float64) @ w + b
    h = h if name == "w" else np.tanh(h) @ v
    found = []
    for row, is_valid in zip(h, np.asarray(rows.valid), strict=True):
        # A mean of tanh is no tanh of a mean: what is pooled is the matrix's own inputs.
        found.extend([row[is_valid].mean(axis=0)] if pooled else row[is_valid])
    return np.stack(found)


def numpy_projections(params, forget, retain, name, *, pooled):
    f, r = (numpy_outputs(params, rows, name, pooled=pooled) for rows in (forget, retain))
    f, r = f.T @ f / len(f), r.T @ r / len(r)
    rank, retain_rank = DIRECTIONS.of(len(f))
    q = np.linalg.eigh(0.4 * f - 0.6 * r)[1][:, -rank:]
    q_r = np.linalg.eigh(r)[1][:, -retain_rank:]
    return q @ q.T, q_r @ q_r.T


@pytest.mark.parametrize("pooled", [True, False])
def test_adapters_begin_in_the_top_directions_of_the_outputs(scene, pooled, tolerance):
    params, forget, retain = scene
    target, rest = moments(POOLED if pooled else SINGLE, scene)
    method = reglu(params, target, rest, optax.sgd(0.1), directions=DIRECTIONS)
    adapters = method.optimizer.init(params).adapters
    assert set(adapters) == {"w", "v"}
    for name, one in adapters.items():
        q, q_r = numpy_projections(params, forget, retain, name, pooled=pooled)
        w = np.asarray(params[name], np.float64)
        tolerance.check(one.a[0] @ one.b[0], w @ q, "factorization")
        tolerance.check(one.b[0].T @ one.b[0], q, "factorization")
        tolerance.check(one.off[0] @ one.off[0].T, q_r, "factorization")
    assert DIRECTIONS.of(WIDTH) == (2, 3)
    assert DIRECTIONS.of(CLASSES) == (2, 2), "half of four"


@pytest.mark.parametrize(("scale", "weight"), [(2.0, 0.5), (0.7, 0.0)])
def test_a_run_is_that_of_adapters_with_their_own_gradients(scene, scale, weight, key, tolerance):
    """The same start, loss and optimizer on `with_lora`, where JAX differentiates A and B."""
    params, forget, retain = scene
    target, rest = moments(POOLED, scene)
    optimizer = optax.adam(0.02)
    how = {"directions": DIRECTIONS, "scale": scale, "weight": weight}
    method = reglu(params, target, rest, optimizer, **how)
    edit, info = run_method(
        method._replace(batch_size=64), network, params, forget, retain, steps=5, key=key
    )
    assert set(edit.blocks) == {"w", "v"}, "a bias has no adapter"
    assert set(info.history) == {"loss", "forget_nll", "retain_nll"}

    start = method.optimizer.init(params).adapters
    adapted = with_lora(network, params, forget.inputs, rank=2, key=key, scale=scale)
    begun = adapted.start({name: (one.a[0], one.b[0]) for name, one in start.items()})
    tolerance.check(adapted.apply(begun, forget.inputs), network(params, forget.inputs))

    def loss(lora):
        now = {**begun, "lora": lora}
        total = (
            IHL()(adapted.apply, now, forget)[0] + RetainNLL()(adapted.apply, now, None, retain)[0]
        )
        held = (lora[name]["b"] @ one.off[0] for name, one in start.items())
        return total + weight * sum(jnp.sum(x**2) for x in held)

    lora, state = begun["lora"], optimizer.init(begun["lora"])
    for _ in range(5):
        updates, state = optimizer.update(jax.grad(loss)(lora), state)
        lora = optax.apply_updates(lora, updates)
    expected = adapted.merge({**begun, "lora": lora})
    tolerance.check(apply_edit(params, edit), expected, "factorization")
    ranks = {n: np.linalg.matrix_rank(np.asarray(x), 1e-6) for n, x in edit.blocks.items()}
    assert ranks == {"w": 4, "v": 4}, "twice the adapters' rank"


def test_what_has_no_outputs_to_start_from_is_refused(scene):
    params, forget, retain = scene
    target, rest = moments(SINGLE, scene)
    part = kfac(network, Categorical(), select="w")
    few = estimate(part, params, [retain], key=jax.random.key(2))
    with pytest.raises(ValueError, match="curvatures of the same sites"):
        reglu(params, target, few, optax.sgd(0.1))
    with pytest.raises(ValueError, match="REGLU looks at numbers while it runs"):
        jax.jit(lambda p: reglu(p, target, rest, optax.sgd(0.1)))(params)
    longest = kfac(network, Categorical(), factorize=Factorize(max_dim=2))
    diagonal = estimate(longest, params, [forget], key=jax.random.key(2))
    with pytest.raises(ValueError, match="REGLU needs a matrix whose inputs have a dense moment"):
        reglu(params, diagonal, diagonal, optax.sgd(0.1))
