"""Random programs out of everything that capture promises, with what must come out uncovered.

Every block maps an activation (BATCH, TIME, WIDTH) to one of that shape, so that any block fits
behind, beside or inside any other. Parameters are new or, where the shape fits, used again.
"""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from tests.tracing.oracle import normal

BATCH, TIME, WIDTH, VOCAB = 2, 3, 4, 5
INPUTS = {"x": normal(BATCH, TIME, WIDTH), "ids": np.array([[1, 0, VOCAB - 1], [3, 3, 0]])}


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@jax.custom_vjp
def opaque(x, w):
    return x * w[None, None]


def opaque_backward(kept, g):
    x, w = kept
    return g * w[None, None], (g * x).sum((0, 1))


opaque.defvjp(lambda x, w: (opaque(x, w), (x, w)), opaque_backward)

ACTIVATIONS = (jnp.tanh, jnp.sin, jax.nn.relu, straight_through, lambda h: h)

LAYOUTS = (
    lambda h, w: h @ w,
    lambda h, w: jnp.einsum("dk,btk->btd", w, h),
    lambda h, w: jnp.einsum("dk,btk->dbt", 0.5 * w, h).transpose(1, 2, 0),
    lambda h, w: h.reshape(-1, WIDTH) @ (w / 3 - 0.1),
    lambda h, w: jnp.einsum("tbd,dij->btij", h.swapaxes(0, 1), w.reshape(WIDTH, 2, 2)),
    lambda h, w: jnp.einsum("bthi,hij->bthj", halves(h), w[::2].reshape(2, 2, 2)),
    lambda h, w: jnp.einsum("bthi,jhi->btj", halves(h), w.reshape(WIDTH, 2, 2)),
    lambda h, w: halves(h)[:, :, 0] @ jnp.split(w, 2)[0] + halves(h)[:, :, 1] @ w[2:],
)
BIASES = {
    "none": None,
    "plain": lambda y, b: y + b,
    "left": lambda y, b: b + y,
    "time": lambda y, b: y + b,
    "minus": lambda y, b: y - 2 * b,
    "negative": lambda y, b: b - y,
    "twice": lambda y, b: (y + b) * jnp.cos(y),
    "jit": lambda y, b: jax.jit(jnp.add)(b, y),
    "around": lambda y, b: (y + 1.5) + b,
}


def halves(h):
    return h.reshape(*h.shape[:2], 2, WIDTH // 2)


class Builder:
    """Draws a program: nested closures (environment, h) -> h, and the shapes of its parameters.

    `choice` picks one item of a list.
    """

    def __init__(self, choice):
        self.choice = choice
        self.visible = [{}]  # names and shapes by scope: a scan's are not seen outside of it
        self.owned = [[]]  # what each scan around here takes apart, inner scans' included
        self.lead = ()
        self.shapes = {}
        self.good, self.bad, self.idle = set(), set(), set()

    def choose(self, *options):
        return self.choice(options)

    def param(self, *shape, used="good"):
        """A parameter of this shape, as seen here: a new one, or one that was used before."""
        old = [name for scope in self.visible for name, s in scope.items() if s == shape]
        name = self.choice([None, None, *old])
        if name is None:
            name = f"p{len(self.shapes)}"
            self.shapes[name] = (*self.lead, *shape)
            self.visible[-1][name] = shape
            self.owned[-1].append(name)
        getattr(self, used).add(name)
        return name

    def block(self, depth):
        leaves = [getattr(self, name) for name in dir(self) if name.startswith("leaf_")]
        nests = [getattr(self, name) for name in dir(self) if name.startswith("nest_")]
        options = leaves + 2 * nests if depth > 0 else leaves
        make = self.choose(*options)
        return make(depth - 1) if make in nests else make()

    def leaf_dense(self):
        w = self.param(WIDTH, WIDTH)
        layout = self.choose(*LAYOUTS)
        b = self.bias()
        activation = self.choose(*ACTIVATIONS)

        def run(p, h):
            y = activation(b(p, layout(h, p[w])))
            return y.reshape(*h.shape[:2], WIDTH)

        return run

    def bias(self):
        kind = self.choose(*BIASES)
        if kind == "none":
            return lambda _, y: y
        shape = (TIME, 1) if kind == "time" else (WIDTH,)
        b = self.param(*shape)

        return lambda p, y: BIASES[kind](y.reshape(-1, TIME, WIDTH), p[b])

    def leaf_heads(self):
        w, b = self.param(WIDTH, 2, 3), self.param(2, 3)
        v = self.param(2, 3, WIDTH)

        def run(p, h):
            y = jnp.tanh(jnp.einsum("btd,dhk->bthk", h, p[w]) + p[b])
            return jnp.einsum("bthk,hkd->btd", y, p[v])

        return run

    def leaf_scale(self):
        shape = self.choose((WIDTH,), (TIME, 1), ())
        g = self.param(*shape)
        change = self.choose(lambda h, g: h * g, lambda h, g: (1 + g) * h, lambda h, g: h - g / 2)
        return lambda p, h: change(h, p[g])

    def leaf_conv(self):
        groups = self.choose(1, 2)
        k = self.param(2, WIDTH // groups, WIDTH)
        dilation = self.choose(1, 2)

        def run(p, h):
            return lax.conv_general_dilated(
                h,
                p[k],
                (1,),
                "SAME",
                rhs_dilation=(dilation,),
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=groups,
            )

        return run

    def leaf_embedding(self):
        e = self.param(VOCAB, WIDTH)
        read = self.choose(
            lambda e, ids: e[ids],
            lambda e, ids: jnp.take(e, ids - 1, axis=0, mode="clip"),
            lambda e, ids: e.at[ids + 3].get(mode="fill", fill_value=0),
        )
        return lambda p, h: h + read(p[e], p["ids"])

    def leaf_mapped_lookup(self):
        e = self.param(VOCAB, WIDTH)
        return lambda p, h: h + jax.vmap(jax.vmap(lambda i: p[e][i]))(p["ids"])

    def leaf_joined(self):
        """Several leaves in one product: as its columns, its heads, its rows or its batch."""
        kind = self.choose("columns", "heads", "rows", "batch", "vectors")
        if kind == "vectors":
            d, e = self.param(2), self.param(2)
            join = jnp.concatenate
            return lambda p, h: h * join([p[d], jnp.ones(2)]) + join([p[d], p[e]])
        b, c = self.param(WIDTH, 2), self.param(2, WIDTH)
        if kind == "rows":
            return lambda p, h: h @ jnp.concatenate([p[c], p[b].T])
        if kind == "columns":
            return lambda p, h: h @ jnp.concatenate([2 * p[b], p[c].T], axis=1)
        if kind == "heads":
            cut = (WIDTH, 2, 2)
            return lambda p, h: jnp.einsum(
                "btd,dhk->bthk", h, jnp.concatenate([p[b], p[c].T], axis=1).reshape(cut)
            ).reshape(h.shape)
        batch = "bti,kij->btkj"
        return lambda p, h: jnp.einsum(batch, h, jnp.stack([p[b], p[c].T / 3])).reshape(h.shape)

    def leaf_stacked(self):
        first, second = self.param(WIDTH, WIDTH), self.param(WIDTH, WIDTH)
        options = self.choose({}, {"reverse": True}, {"unroll": 2})

        def run(p, h):
            stacked = jnp.stack([p[first], p[second], p[first]])
            return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, stacked, **options)[0]

        return run

    def leaf_prompt(self):
        prompt, w = self.param(2, WIDTH), self.param(WIDTH, WIDTH)

        def run(p, h):
            before = jnp.broadcast_to(p[prompt], (len(h), 2, WIDTH))
            longer = jnp.sin(jnp.concatenate([before, h], axis=1)) @ p[w]
            return longer[:, 2:] * jnp.tanh(longer[:, :2].sum(1, keepdims=True))

        return run

    def leaf_rounded(self):
        w = self.param(WIDTH, WIDTH)
        return lambda p, h: h @ (p[w] + lax.stop_gradient(jnp.round(p[w]) - p[w]))

    def leaf_normalised_in_eval_mode(self):
        g, b = self.param(WIDTH), self.param(WIDTH)
        variance = np.array([0.5, 2.0, 1.5, 0.7])
        return lambda p, h: h * (p[g] * lax.rsqrt(variance + 1e-3)) + p[b]

    def leaf_tied(self):
        e = self.param(VOCAB, WIDTH)
        return lambda p, h: jax.nn.softmax(h @ p[e].T) @ p[e]

    def leaf_opaque(self):
        w = self.param(WIDTH, used="bad")
        return lambda p, h: opaque(h, p[w])

    def leaf_normalized(self):
        w = self.param(WIDTH, WIDTH, used="bad")
        return lambda p, h: h @ (p[w] / (1 + jnp.sum(p[w] ** 2)))

    def leaf_idle(self):
        w = self.param(WIDTH, WIDTH, used="idle")
        kind = self.choose("stop", "dead", "dead jit")
        if kind == "stop":
            return lambda p, h: jnp.sin(h @ lax.stop_gradient(p[w]))
        if kind == "dead":
            return lambda p, h: (h @ p[w], jnp.cos(h))[1]
        return lambda p, h: jax.jit(lambda w, h: (h @ w, jnp.cos(h)))(p[w], h)[1]

    def nest_sequence(self, depth):
        first, second = self.block(depth), self.block(depth)
        return lambda p, h: second(p, first(p, h))

    def nest_parallel(self, depth):
        first, second = self.block(depth), self.block(depth)
        return lambda p, h: h + first(p, h) * jnp.tanh(second(p, h))

    def nest_call(self, depth):
        inner = self.block(depth)
        policy = self.choose(None, jax.checkpoint_policies.dots_saveable)
        wrap = self.choose(jax.jit, lambda f: jax.checkpoint(f, policy=policy))
        return lambda p, h: wrap(lambda p, h: inner(p, h))(p, h)

    def nest_vmap(self, depth):
        inner = self.block(depth)

        def run(p, h):
            def one(h, ids):
                return inner({**p, "ids": ids[None]}, h[None])[0]

            return jax.vmap(one)(h, p["ids"])

        return run

    def nest_cond(self, depth):
        first, second = self.block(depth), self.block(depth)
        sign = self.choose(1, -1)

        def run(p, h):
            is_first = sign * p["total"] > sign * 6
            return lax.cond(is_first, lambda h: first(p, h), lambda h: second(p, h), h)

        return run

    def nest_scan(self, depth):
        length, options = 2, self.choose({}, {"reverse": True}, {"unroll": 2})
        old_lead = self.lead
        self.lead = (*old_lead, length)
        self.visible.append({})
        self.owned.append([])
        inner = self.block(depth)
        self.visible.pop()
        own = self.owned.pop()
        self.owned[-1] += own
        self.lead = old_lead

        def run(p, h):
            def step(h, sliced):
                return jnp.tanh(inner({**p, **sliced}, h)), h

            h, before = lax.scan(step, h, {n: p[n] for n in own}, length=length, **options)
            return h + before[0]

        return run


def make_program(choice):
    """(apply, params, the paths that must be uncovered); `choice` picks one item of a list."""
    builder = Builder(choice)
    body = builder.block(choice([1, 2, 3, 4]))
    head = builder.leaf_dense()

    def apply(params, inputs):
        env = {**params, "ids": inputs["ids"], "total": inputs["ids"].sum()}
        return head(env, body(env, inputs["x"]))

    params = {
        name: normal(*shape, seed=i) for i, (name, shape) in enumerate(builder.shapes.items())
    }
    uncovered = builder.bad | (builder.idle - builder.good)
    return apply, params, uncovered


@st.composite
def programs(draw):
    """What `make_program` makes, drawn and shrunk by hypothesis."""
    return make_program(lambda options: draw(st.sampled_from(options)))
