"""The two models with data, twice: as the library has them, and by hand with a hook at each matrix.

The contenders that need hooks share parameters and arithmetic with the one that needs none.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jedit.models.gpt import gpt
from jedit.models.mlp import mlp
from tests.bench.cases import Case


class Problem(NamedTuple):
    """A case's model and data.

    Attributes:
        case: the case.
        apply: the library's model.
        params: its parameters.
        batches: its inputs.
        matrices: `{name: (kernel, bias)}` of the selected matrices, for `forward`.
    """

    case: Case
    apply: object
    params: dict
    batches: list
    matrices: dict


def make(case: Case) -> Problem:
    """The model with random parameters, and random data."""
    model_key, data_key = jax.random.split(jax.random.key(0))
    if case.name == "mlp":
        apply, params = mlp(key=model_key, sizes=case.sizes)
        data = jax.random.normal(data_key, (case.num_examples, case.sizes[0]), jnp.float32)
        layers = {f"layers/{i}": params["layers"][i] for i in params["layers"]}
    else:
        vocab, width, num_layers, num_heads = case.sizes
        apply, params = gpt(
            key=model_key,
            vocab=vocab,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            max_len=case.positions,
        )
        shape = (case.num_examples, case.positions)
        data = jax.random.randint(data_key, shape, 0, vocab)
        layers = {
            f"blocks/{i}/{part}/{name}": block[part][name]
            for i, block in params["blocks"].items()
            for part, names in (("attn", ("query", "key", "value", "out")), ("mlp", ("up", "down")))
            for name in names
        }
    matrices = {name: (layer["kernel"], layer["bias"]) for name, layer in layers.items()}
    return Problem(
        case, apply, params, list(data.reshape(-1, case.batch, *data.shape[1:])), matrices
    )


def forward(case: Case, matrices, params, inputs, dense):
    """Logits (batch * positions, classes); `dense(name, x, kernel, bias)` is called at each matrix.

    Rows are flattened to (batch * positions, features), which is what every factor sums over.
    """
    if case.name == "mlp":
        x = inputs
        for i in range(len(case.sizes) - 1):
            x = x if i == 0 else jax.nn.relu(x)
            x = dense(f"layers/{i}", x, *matrices[f"layers/{i}"])
        return x
    _, width, num_layers, num_heads = case.sizes
    batch, seq = inputs.shape
    heads = (batch, seq, num_heads, width // num_heads)
    causal = jnp.tril(jnp.ones((seq, seq), bool))[None, None]
    x = params["embed"]["embedding"][inputs] + params["positions"][:seq][None]
    x = x.reshape(batch * seq, width)
    for i in range(num_layers):
        block, name = params["blocks"][str(i)], f"blocks/{i}"

        def at(part, x, name=name):
            return dense(f"{name}/{part}", x, *matrices[f"{name}/{part}"])

        y = _norm(x, block["attn_norm"])
        q, k, v = (at(f"attn/{part}", y).reshape(heads) for part in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / heads[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch * seq, width)
        x = x + at("attn/out", mixed)
        x = x + at("mlp/down", jax.nn.gelu(at("mlp/up", _norm(x, block["mlp_norm"]))))
    return _norm(x, params["norm"]) @ params["head"]["kernel"]


def _norm(x, params):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    deviation = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    return centred * deviation * params["scale"][None] + params["bias"][None]
