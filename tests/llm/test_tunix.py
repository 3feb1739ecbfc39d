"""Capture on tunix's language models at toy size, unmodified.

tunix computes its norms and its logits in float32 whatever the parameters' dtype, so agreement is
that of float32 sums taken in another order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3

from jedit.tracing import capture
from tests.tracing.oracle import as_users_write, check_capture, filled

TOLERANCE = 2e-5
SIZES = {
    "num_layers": 2,
    "vocab_size": 19,
    "embed_dim": 8,
    "hidden_dim": 12,
    "num_heads": 4,
    "head_dim": 6,
    "num_kv_heads": 2,
    "rope_theta": 10_000,
    "norm_eps": 1e-6,
}
TOKENS = np.array([[3, 1, 18, 7, 7], [0, 2, 4, 6, 5]])


def model(create, config):
    """(apply, params) of a model, with positions and a causal mask of its own."""
    module = nnx.eval_shape(lambda: create(config, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def apply(params, tokens):
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
        mask = jnp.broadcast_to(jnp.tri(length, dtype=bool)[None], (batch, length, length))
        return nnx.merge(graph, params, rest)(tokens, positions, None, mask)[0]

    drawn = filled(nnx.to_pure_dict(params))
    return as_users_write(apply), jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), drawn)


MODELS = {
    "qwen3": lambda remat: (
        qwen3.Qwen3,
        qwen3.ModelConfig(**SIZES, remat_config=qwen3.RematConfig[remat]),
    ),
    "qwen3 tied": lambda remat: (
        qwen3.Qwen3,
        qwen3.ModelConfig(**SIZES, use_tied_embedding=True, remat_config=qwen3.RematConfig[remat]),
    ),
    "qwen3 experts": lambda remat: (
        qwen3.Qwen3,
        qwen3.ModelConfig(
            **SIZES,
            num_experts=3,
            num_experts_per_tok=2,
            remat_config=qwen3.RematConfig[remat],
        ),
    ),
    "llama3": lambda remat: (
        llama3.Llama3,
        llama3.ModelConfig(**SIZES, remat_config=llama3.RematConfig[remat]),
    ),
    "llama3 tied": lambda remat: (
        llama3.Llama3,
        llama3.ModelConfig(**SIZES, weight_tying=True, remat_config=llama3.RematConfig[remat]),
    ),
}


@pytest.mark.parametrize(
    ("name", "remat"),
    [(name, "NONE") for name in MODELS]
    + [
        ("qwen3", "BLOCK"),
        ("qwen3 experts", "DECODER"),
        ("llama3", "BLOCK"),
        ("llama3", "DECODER"),
    ],
)
def test_every_parameter_is_covered(name, remat):
    apply, params = model(*MODELS[name](remat))
    sites = check_capture(apply, params, TOKENS, tol=TOLERANCE)
    kinds = {path: {s.kind for s in sites.values() if s.path == path} for path in sites.covered}
    assert all(kind == {"scale"} for path, kind in kinds.items() if "norm" in path)
    table = {"embedding", "dense"} if "tied" in name else {"embedding"}
    assert kinds["embedder/input_embedding"] == table
    for layer in ("layers/0", "layers/1"):
        if name != "llama3":
            names = [f"{layer}/attn/{n}/w" for n in ("q_proj", "k_proj", "v_proj")]
            assert len({sites[n].record for n in names}) == 1


def test_half_precision():
    config = qwen3.ModelConfig(**SIZES, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    apply, params = model(qwen3.Qwen3, config)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    sites = check_capture(apply, params, TOKENS, tol=0.05)
    assert not sites.uncovered
    _, activations, _ = capture(apply, params, TOKENS)
    assert activations["layers/0/attn/q_proj/w"].dtype == jnp.bfloat16
