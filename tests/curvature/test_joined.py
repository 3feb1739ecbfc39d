"""Curvature where a parameter is not the whole of an operand: joined, multiplied, mapped over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jedit.curvature import diagonal, eigenvalues, ekfac, estimate, trace
from jedit.curvature.types import Diagonal
from tests.curvature.programs import CLASSES, TEMPERED, Program, exact_kfac, plus
from tests.curvature.references import factors_by_hand, rows_as_trees, score_rows
from tests.curvature.test_exact_cases import in_basis
from tests.curvature.test_factors import check_factors

MEAN, VARIANCE = np.array([0.3, -0.2, 0.1, 0.5, 0.0]), np.array([0.5, 1.5, 0.7, 2.0, 0.1])


def columns(params, x, tap):
    parts = [plus(tap(n, x, x @ params[n]), params["b" + n]) for n in "qkv"]
    hidden = jnp.tanh(jnp.concatenate(parts, axis=-1))
    return tap("o", hidden, hidden @ params["o"])


def apply_columns(params, x):
    weight = jnp.concatenate([params[n] for n in "qkv"], axis=1)
    bias = jnp.concatenate([params["b" + n] for n in "qkv"])
    return jnp.tanh(plus(x @ weight, bias)) @ params["o"]


def rows(params, x, tap):
    left, right = jnp.sin(x), jnp.cos(x)[..., :3]
    hidden = tap("p", left, left @ params["p"]) + tap("q", right, right @ params["q"])
    hidden = jnp.tanh(hidden)
    return tap("o", hidden, hidden @ params["o"])


def apply_rows(params, x):
    joined = jnp.concatenate([jnp.sin(x), jnp.cos(x)[..., :3]], axis=-1)
    return jnp.tanh(joined @ jnp.concatenate([params["p"], params["q"]])) @ params["o"]


def stacked(params, x, tap):
    for n in "pqr":
        x = jnp.tanh(tap(n, x, x @ params[n])) * jnp.broadcast_to(params["g" + n], x.shape)
    return tap("o", x, x @ params["o"])


def apply_stacked(params, x):
    def step(h, sliced):
        w, g = sliced
        return jnp.tanh(h @ w) * jnp.broadcast_to(g, h.shape), None

    pair = tuple(jnp.stack([params[s + n] for n in "pqr"]) for s in ("", "g"))
    return lax.scan(step, x, pair)[0] @ params["o"]


def normalised(params, x, tap):
    hidden = tap("w", x, x @ params["w"])
    inverse = jnp.asarray(1 / np.sqrt(VARIANCE), x.dtype)
    hidden = (hidden - plus(0 * hidden, jnp.asarray(MEAN, x.dtype))) * plus(
        0 * hidden, params["g"] * inverse
    )
    hidden = jnp.tanh(plus(hidden, params["b"] * inverse))
    return tap("v", hidden, hidden @ params["v"])


def prompted(params, x, tap):
    prompt = jnp.broadcast_to(params["prompt"], (len(x), 2, 4))
    hidden = jnp.concatenate([prompt, x[:, None]], axis=1)
    hidden = jnp.tanh(tap("w", hidden, hidden @ params["w"])).mean(axis=1)
    return tap("v", hidden, hidden @ params["v"])


def looked_up(params, tokens, tap):
    x = tap("e", jax.nn.one_hot(tokens, 6), params["e"][tokens])
    hidden = jnp.tanh(tap("w", x, x @ params["w"]))
    return tap("e", hidden, hidden @ params["e"].T, site=1, is_flipped=True)


def apply_looked_up(params, tokens):
    def one(tokens):
        x = jax.vmap(lambda i: params["e"][i])(tokens)
        return jnp.tanh(x @ params["w"]) @ params["e"].T

    return jax.vmap(one)(tokens)


def rounded(params, x, tap):
    w = params["w"] + lax.stop_gradient(jnp.round(2 * params["w"]) / 2 - params["w"])
    hidden = jnp.tanh(tap("w", x, x @ w))
    return tap("v", hidden, hidden @ params["v"])


SQUARES = {n: (4, 4) for n in "pqr"} | {"g" + n: (4,) for n in "pqr"}
PROGRAMS = [
    Program(
        "joined columns",
        {"q": (4, 3), "k": (4, 2), "v": (4, 2), "bq": (3,), "bk": (2,), "bv": (2,)}
        | {"o": (7, CLASSES)},
        columns,
        apply=apply_columns,
    ),
    Program("joined rows", {"p": (4, 5), "q": (3, 5), "o": (5, CLASSES)}, rows, apply=apply_rows),
    Program("stacked when called", SQUARES | {"o": (4, CLASSES)}, stacked, apply=apply_stacked),
    Program(
        "batch norm",
        {"w": (4, 5), "g": (5,), "b": (5,), "v": (5, CLASSES)},
        normalised,
        inputs="rows",
    ),
    Program(
        "prompted",
        {"prompt": (2, 4), "w": (4, 5), "v": (5, CLASSES)},
        prompted,
        inputs="rows",
    ),
    Program(
        "looked up", {"e": (6, 4), "w": (4, 4)}, looked_up, inputs="tokens", apply=apply_looked_up
    ),
    Program("rounded", {"w": (4, 5), "v": (5, CLASSES)}, rounded),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_factors_and_spectra(program, key, tolerance):
    """K-FAC against sums at taps; EK-FAC and the diagonal against every output's gradients."""
    params, batch, first = exact_kfac(program)
    expected = factors_by_hand(program, params, batch, TEMPERED)
    kronecker = {name for name, block in first.blocks.items() if not isinstance(block, Diagonal)}
    # A bias joined with others stays apart from its weight: it has a diagonal of its own.
    assert kronecker == set(expected)
    check_factors(first, expected, tolerance)
    gradients, number = score_rows(program.run, TEMPERED, params, batch)
    trees = rows_as_trees(gradients, params)
    makers = [diagonal(program.run, TEMPERED, fisher="exact")]
    if program.name in ("joined columns", "looked up"):
        makers.append(ekfac(program.run, TEMPERED, first, fisher="exact"))
    for maker in makers:
        curvature = estimate(maker, params, [batch], key=key)
        assert set(curvature.covered) == set(params)
        for name in curvature.blocks:
            squares = (in_basis(curvature, name, trees) ** 2).sum(0) / number
            tolerance.check(eigenvalues(curvature, name), squares)
        tolerance.check(trace(curvature), (gradients**2).sum() / number)
