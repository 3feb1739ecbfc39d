"""Small models with every kind of site, and what K-FAC's factors are for them by another way.

Each model is written out by hand with a hook at its linear maps, `tap(path, a, y)`, that returns y.
`a` is what the *parameter* is contracted with, its constant factor and its bias's coordinate
included, one-hot rows for a lookup, explicit patches for a convolution. Nothing of jedit.capture is
used: gradients at the taps come from `jax.jacrev`, sums and normalisation from NumPy in float64.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical

EXAMPLES, LENGTH, CLASSES = 3, 4, 3
VALID = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
MASK = np.array([[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])


TEMPERED = Categorical(1.7)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model under test.

    Attributes:
        name: for the test's id.
        shapes: of the parameters.
        model: `model(params, inputs, tap) -> outputs`, by hand.
        inputs: "vectors" (examples, length, 4), "rows" (examples, 4), "tokens" or "images".
        apply: the same without taps, where that is written in another way (scans).
        stacked: parameters whose taps "path@i" are the layers of one block.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    model: Callable
    inputs: str = "vectors"
    apply: Callable | None = None
    stacked: tuple[str, ...] = ()

    def run(self, params, inputs):
        """The model as jedit gets it."""
        if self.apply is not None:
            return self.apply(params, inputs)
        return self.model(params, inputs, untapped)

    def make_params(self, key):
        """Random parameters, of the run's default precision."""
        rng = generator(key)
        return {
            path: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2:][0]), float)
            for path, shape in self.shapes.items()
        }

    def make_inputs(self, key):
        """One batch of inputs."""
        shapes = {"rows": (4,), "vectors": (LENGTH, 4), "images": (5, 4, 2)}
        rng = generator(key)
        if self.inputs == "tokens":
            return jnp.asarray(rng.integers(6, size=(EXAMPLES, LENGTH)), jnp.int32)
        return jnp.asarray(rng.normal(size=(EXAMPLES, *shapes[self.inputs])), float)

    @property
    def lead(self):
        """The outputs' leading shape."""
        has_positions = self.inputs in ("vectors", "tokens")
        return (EXAMPLES, LENGTH) if has_positions else (EXAMPLES,)


def generator(key):
    """NumPy's generator of a key: its draws need no compilation for each shape."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def make_problem(program, key, *, is_padded=True):
    """Params and a batch, padded and masked: positions of sequences, whole rows of the others."""
    k_params, k_inputs = jax.random.split(key)
    batch = Batch(program.make_inputs(k_inputs))
    if is_padded and program.lead == (EXAMPLES, LENGTH):
        batch = batch._replace(mask=jnp.asarray(MASK), valid=jnp.asarray(VALID))
    elif is_padded:
        batch = batch._replace(valid=jnp.asarray(VALID[:, 1]))
    return program.make_params(k_params), batch


@functools.cache
def exact_kfac(program):
    """(params, batch, K-FAC with exact labels) of a program, estimated once for all tests."""
    key = jax.random.key(zlib.crc32(program.name.encode()))
    params, batch = make_problem(program, key, is_padded=program is not POSITIONED)
    estimator = kfac(program.run, TEMPERED, fisher="exact")
    return params, batch, estimate(estimator, params, [batch], key=key)


def untapped(path, a, y, **site):
    """The hook that does nothing."""
    del path, a, site
    return y


def one(x, value=1.0):
    """With the bias's coordinate."""
    return jnp.concatenate([x, jnp.full((*x.shape[:-1], 1), value, x.dtype)], axis=-1)


def plus(y, b):
    """A bias added to every position."""
    return y + jnp.broadcast_to(b, y.shape)


def dense(tap, params, w, b, x, **site):
    """Tap and value of x @ w + b."""
    return tap(w, one(x), plus(x @ params[w], params[b]), **site)


def perceptron(params, x, tap):
    hidden = jnp.tanh(dense(tap, params, "w", "b", x))
    return tap("v", hidden, hidden @ params["v"])


def factored(params, x, tap):
    """Constant factors on a weight and on a bias; the output on the left, as many write it."""
    w, b = 0.5 * params["w"], params["b"] / 4
    hidden = jnp.tanh(tap("w", one(0.5 * x, 0.25), plus(x @ w, b)))
    return tap("v", -hidden, jnp.moveaxis(jnp.einsum("co,bto->cbt", -params["v"].T, hidden), 0, -1))


def flattened(params, x, tap):
    """Sites on (examples · length, features) activations, as `apply_flattened` has them."""
    hidden = jnp.tanh(dense(tap, params, "w", "b", x))
    return tap("v", hidden, hidden @ params["v"])


def apply_flattened(params, x):
    flat = x.reshape(-1, x.shape[-1])
    hidden = jnp.tanh(plus(flat @ params["w"], params["b"]))
    return (hidden @ params["v"]).reshape(*x.shape[:-1], -1)


def heads(params, x, tap):
    """A weight on (examples, length, heads, features): several positions of one output."""
    hidden = jnp.tanh(tap("w", x, x @ params["w"]))
    split = hidden.reshape(*x.shape[:-1], 3, 2)
    mixed = tap("u", split, split @ params["u"])
    mixed = mixed.reshape(*x.shape[:-1], 6)
    return tap("v", mixed, mixed @ params["v"])


def apply_heads(params, x):
    """`heads`, with the heads on a flattened activation."""
    hidden = jnp.tanh(x @ params["w"])
    split = hidden.reshape(-1, 3, 2)
    return (split @ params["u"]).reshape(*x.shape[:-1], 6) @ params["v"]


def patches_of(x, window, stride):
    """Explicit patches (n, h, w, channels · window) of a zero-padded image, channel-major."""
    (kh, kw), (sh, sw) = window, stride
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))
    height, width = (padded.shape[1] - kh) // sh + 1, (padded.shape[2] - kw) // sw + 1
    rows = [
        [
            jnp.moveaxis(padded[:, i * sh : i * sh + kh, j * sw : j * sw + kw], 3, 1).reshape(
                len(x), -1
            )
            for j in range(width)
        ]
        for i in range(height)
    ]
    return jnp.stack([jnp.stack(row, axis=1) for row in rows], axis=1)


def convolution(params, x, tap):
    patches = patches_of(x, (3, 2), (2, 1))
    kernel = jnp.transpose(params["k"], (2, 0, 1, 3)).reshape(-1, 5)  # HWIO, channel-major
    hidden = jnp.tanh(tap("k", one(patches), plus(patches @ kernel, params["b"])))
    pooled = jnp.mean(hidden, axis=(1, 2))
    return tap("v", pooled, pooled @ params["v"])


def apply_convolution(params, x):
    hidden = jax.lax.conv_general_dilated(
        x, params["k"], (2, 1), ((1, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean(jnp.tanh(plus(hidden, params["b"])), axis=(1, 2)) @ params["v"]


def embedding(params, tokens, tap):
    x = tap("e", jax.nn.one_hot(tokens, 6), params["e"][tokens])
    hidden = jnp.tanh(dense(tap, params, "w", "b", x))
    return tap("v", hidden, hidden @ params["v"])


def tied(params, tokens, tap):
    """A table that is also the head, with an odd number of columns and a factor on one use."""
    x = tap("e", jax.nn.one_hot(tokens, 6), params["e"][tokens])
    hidden = jnp.tanh(tap("w", x, x @ params["w"]))
    return tap("e", 2.0 * hidden, hidden @ (2.0 * params["e"]).T, site=1, is_flipped=True)


def shared_twice(params, x, tap):
    hidden = jnp.tanh(dense(tap, params, "w", "b", x, site=0))
    hidden = jnp.sin(dense(tap, params, "w", "b", hidden, site=1))
    return tap("v", hidden, hidden @ params["v"])


def stack(params, x, tap):
    for i in range(3):
        w, b = params["w"][i], params["b"][i]
        x = jnp.tanh(tap(f"w@{i}", one(x), plus(x @ w, b)))
    return tap("v", x, x @ params["v"])


def apply_scan(params, x):
    @jax.checkpoint
    def layer(x, sliced):
        w, b = sliced
        return jnp.tanh(plus(x @ w, b)), None

    return jax.lax.scan(layer, x, (params["w"], params["b"]))[0] @ params["v"]


def unrolled(params, x, tap):
    """Layers sliced out of one leaf, each a block of its own: "w", "w#1", "w#2"."""
    for i, name in enumerate(("w", "w#1", "w#2")):
        x = jnp.tanh(tap(name, x, x @ params["w"][i]))
    return tap("v", x, x @ params["v"])


def recurrent(params, x, tap):
    state, out = jnp.zeros((len(x), 5), x.dtype), []
    for i in range(LENGTH):
        fed = x[:, i : i + 1]
        before = state[:, None]
        drive = tap("w", one(fed), plus(fed @ params["w"], params["b"]), use=i)
        state = jnp.tanh(drive + tap("r", before, before @ params["r"], use=i))[:, 0]
        out.append(state)
    hidden = jnp.stack(out, axis=1)
    return tap("v", hidden, hidden @ params["v"])


def apply_recurrent(params, x):
    def step(state, fed):
        state = jnp.tanh(plus(fed @ params["w"], params["b"]) + state @ params["r"])
        return state, state

    start = jnp.zeros((len(x), 5), x.dtype)
    hidden = jax.lax.scan(step, start, jnp.moveaxis(x, 1, 0))[1]
    return jnp.moveaxis(hidden, 0, 1) @ params["v"]


def mixture(params, x, tap):
    """Three experts, each on every position, weighted by a gate."""
    gate = jax.nn.softmax(tap("gate", x, x @ params["gate"]), axis=-1)
    out = 0.0
    for i in range(3):
        hidden = jnp.tanh(tap(f"up@{i}", x, x @ params["up"][i]))
        down = tap(f"down@{i}", hidden, hidden @ params["down"][i])
        out = out + gate[..., i, None] * down
    return out


def apply_mixture(params, x):
    gate = jax.nn.softmax(x @ params["gate"], axis=-1)
    copies = jnp.broadcast_to(x, (3, *x.shape))
    hidden = jnp.tanh(jnp.einsum("ebtd,edf->ebtf", copies, params["up"]))
    down = jnp.einsum("ebtf,efc->btec", hidden, params["down"])
    return jnp.einsum("bte,btec->btc", gate, down)


def ensemble(params, x, tap):
    """Two models whose logits are averaged."""
    out = 0.0
    for i in range(2):
        one_model = {name: leaf[i] for name, leaf in params.items()}
        hidden = jnp.tanh(tap(f"w@{i}", one(i + x), plus((i + x) @ one_model["w"], one_model["b"])))
        out = out + tap(f"v@{i}", hidden, hidden @ one_model["v"]) / 2
    return out


def apply_ensemble(params, x):
    shifted = jnp.stack([x, 1 + x])
    logits = jax.vmap(lambda p, x: perceptron(p, x, untapped))(params, shifted)
    return jnp.mean(logits, axis=0)


def branches(params, x, tap):
    """The second branch of `apply_branches` runs where the sum of the batch is positive."""
    is_positive = jnp.sum(x) > 0
    first = jnp.tanh(tap("w", x, x @ params["w"], ran=~is_positive))
    second = jnp.sin(tap("u", x, x @ params["u"], ran=is_positive))
    hidden = jnp.where(is_positive, second, first)
    return tap("v", hidden, hidden @ params["v"])


def apply_branches(params, x):
    hidden = jax.lax.cond(
        jnp.sum(x) > 0,
        lambda x: jnp.sin(x @ params["u"]),
        lambda x: jnp.tanh(x @ params["w"]),
        x,
    )
    return hidden @ params["v"]


def normalised(params, x, tap):
    """Gains, and a table of positions added: vectors, whose blocks are diagonal."""
    x = plus(x, params["positions"])
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    gained = centred * jnp.broadcast_to(params["gain"], x.shape)
    hidden = jnp.tanh(dense(tap, params, "w", "b", gained))
    hidden = hidden * jnp.broadcast_to(2.0 * params["late_gain"], hidden.shape)
    return tap("v", hidden, hidden @ params["v"])


def positioned(params, tokens, tap):
    """A lookup of positions, which has no axis of examples."""
    places = jnp.arange(LENGTH)
    x = params["e"][tokens] + jnp.broadcast_to(params["p"][places][None], (len(tokens), LENGTH, 4))
    hidden = jnp.tanh(dense(tap, params, "w", "b", x))
    return tap("v", hidden, hidden @ params["v"])


def gained_rows(params, x, tap):
    """A gain where each example has one position."""
    hidden = dense(tap, params, "w", "b", x) * jnp.broadcast_to(params["gain"], (len(x), 5))
    return tap("v", jnp.tanh(hidden), jnp.tanh(hidden) @ params["v"])


MLP = {"w": (4, 5), "b": (5,), "v": (5, CLASSES)}
PROGRAMS = [
    Program("perceptron", MLP, perceptron),
    Program("rows", MLP, perceptron, inputs="rows"),
    Program("factored", MLP, factored),
    Program("flattened", MLP, flattened, apply=apply_flattened),
    Program("heads", {"w": (4, 6), "u": (2, 2), "v": (6, CLASSES)}, heads, apply=apply_heads),
    Program(
        "convolution",
        {"k": (3, 2, 2, 5), "b": (5,), "v": (5, CLASSES)},
        convolution,
        inputs="images",
        apply=apply_convolution,
    ),
    Program("embedding", {"e": (6, 4), **MLP}, embedding, inputs="tokens"),
    Program("tied", {"e": (6, 4), "w": (4, 4)}, tied, inputs="tokens"),
    Program("shared_twice", {"w": (4, 4), "b": (4,), "v": (4, CLASSES)}, shared_twice),
    Program(
        "stack",
        {"w": (3, 4, 4), "b": (3, 4), "v": (4, CLASSES)},
        stack,
        apply=apply_scan,
        stacked=("w",),
    ),
    Program("unrolled", {"w": (3, 4, 4), "v": (4, CLASSES)}, unrolled),
    Program(
        "recurrent",
        {"w": (4, 5), "b": (5,), "r": (5, 5), "v": (5, CLASSES)},
        recurrent,
        apply=apply_recurrent,
    ),
    Program(
        "mixture",
        {"gate": (4, 3), "up": (3, 4, 5), "down": (3, 5, CLASSES)},
        mixture,
        apply=apply_mixture,
        stacked=("up", "down"),
    ),
    Program(
        "ensemble",
        {"w": (2, 4, 5), "b": (2, 5), "v": (2, 5, CLASSES)},
        ensemble,
        apply=apply_ensemble,
        stacked=("w", "v"),
    ),
    Program(
        "branches", {"w": (4, 5), "u": (4, 5), "v": (5, CLASSES)}, branches, apply=apply_branches
    ),
    Program(
        "normalised",
        {"positions": (LENGTH, 4), "gain": (4,), "late_gain": (5,), **MLP},
        normalised,
    ),
    Program("gained_rows", {"gain": (5,), **MLP}, gained_rows, inputs="rows"),
]
POSITIONED = Program(
    "positioned", {"e": (6, 4), "p": (LENGTH, 4), **MLP}, positioned, inputs="tokens"
)
BY_NAME = {program.name: program for program in [*PROGRAMS, POSITIONED]}
