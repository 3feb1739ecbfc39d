"""A model of every kind of block, its data, and how both lie on a mesh; for `program.py`.

A table of words, a scanned stack of two layers (gain, two kernels), a head with a bias; the widths
are all different, so that a shape in a compiled program tells which parameter it is of.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jedit.core.batch import Batch

VOCAB, WIDTH, HIDDEN, CLASSES, LAYERS, LENGTH, ROWS = 64, 16, 48, 40, 2, 7, 32
KERNELS = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "head/kernel": (WIDTH, CLASSES)}
PARALLEL = {
    "one": {},
    "fsdp": {
        "table": P("data"),
        "up": P(None, "data"),
        "down": P(None, "data"),
        "head/kernel": P("data"),
    },
    "tensor": {
        "table": P(None, "model"),
        "up": P(None, None, "model"),
        "down": P(None, "model"),
        "head/kernel": P(None, "model"),
        "head/bias": P("model"),
    },
    "stages": {
        "gain": P("model"),
        "up": P("model"),
        "down": P("model", "data"),
        "head/kernel": P("data"),
    },
    "both": {
        "table": P("data", "model"),
        "up": P(None, "data", "model"),
        "down": P(None, "model", "data"),
        "head/kernel": P("data", "model"),
        "head/bias": P("model"),
    },
}


def apply(params, tokens):
    x = params["table"][tokens]

    def layer(x, weights):
        gain, up, down = weights
        y = x * gain[None, None]
        return x + jax.nn.gelu(y @ up) @ down, None

    x, _ = jax.lax.scan(layer, x, (params["gain"], params["up"], params["down"]))
    return x @ params["head"]["kernel"] + params["head"]["bias"][None, None]


def initial():
    draw = np.random.default_rng(0)

    def normal(*shape):
        return (draw.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float64)

    return {
        "table": normal(VOCAB, WIDTH) * 4,
        "gain": np.ones((LAYERS, WIDTH)),
        "up": normal(LAYERS, WIDTH, HIDDEN),
        "down": normal(LAYERS, HIDDEN, WIDTH),
        "head": {"kernel": normal(WIDTH, CLASSES), "bias": np.zeros(CLASSES)},
    }


def rows(seed, number=ROWS):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, VOCAB, (number, LENGTH))
    mask = (np.arange(LENGTH)[None] < draw.integers(2, LENGTH + 1, (number, 1))).astype(np.float64)
    return Batch(tokens, draw.integers(0, CLASSES, (number, LENGTH)), mask, mask)


def mesh_of(kind):
    """The mesh, or None for one device."""
    if kind == "one":
        return None
    kind, *types = kind.split()
    number = len(jax.devices())
    model = {"fsdp": 1, "tensor": number // 2, "stages": LAYERS, "both": number // 4}[kind]
    axes = (number // model, model)
    return jax.make_mesh(
        axes, ("data", "model"), axis_types=(AxisType.Explicit if types else AxisType.Auto,) * 2
    )


def placed(kind, mesh):
    """(params, function that puts rows on the mesh)."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, initial()), lambda x: jax.tree.map(jnp.asarray, x)
    specs = PARALLEL[kind.split()[0]]

    def put(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.device_put(leaf, NamedSharding(mesh, specs.get(name, P())))

    def split(x):
        return jax.tree.map(lambda y: jax.device_put(y, NamedSharding(mesh, P("data"))), x)

    return jax.tree_util.tree_map_with_path(put, initial()), split
