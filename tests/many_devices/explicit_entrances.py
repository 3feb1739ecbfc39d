"""Entrances of jedit whose arguments lie on a mesh with explicit axes; prints differences.

Run by `test_many_devices`, in a process with eight devices: each gives the numbers of one device.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jedit
from jedit.geometry.trust_region import RetainKl
from jedit.tracing.intervene import intervene

VOCAB, WIDTH, HIDDEN, SEQ, ROWS = 12, 8, 16, 4, 16
SPECS = {"embed": P(None, "model"), "up": P("data", "model"), "down": P("model"), "head": P()}


def apply(params, tokens):
    x = params["embed"][tokens]
    seen = jnp.cumsum(x, axis=1) / jnp.arange(1, SEQ + 1, dtype=x.dtype)[None, :, None]
    x = x + jnp.tanh(seen @ params["up"]) @ params["down"]
    return x @ params["head"]


def found(params, rows, facts):
    """What each entrance computes, by name; `params` and rows lie where they do."""
    key = jax.random.key(0)
    outputs, activations, pullback = jedit.capture(apply, params, rows.inputs)
    gradients = pullback(outputs)

    @jax.jit
    def traced(params, inputs):
        outputs, activations, pullback = jedit.capture(apply, params, inputs)
        return outputs, activations, pullback(outputs)

    changed = intervene(apply, params, rows.inputs, add={"down": jnp.ones(WIDTH)})
    associations = jedit.methods.Associations(facts, jnp.arange(len(facts.inputs)) % SEQ)
    search = jedit.methods.Search(steps=3)
    values, info = jedit.methods.target_values(
        apply, params, associations, layer="down", search=search
    )
    subject = jax.tree.map(lambda x: x == x[:, :1], facts.inputs)  # lies where the rows do
    traced_back = jedit.methods.causal_trace(
        apply,
        params,
        facts,
        corruption=jedit.methods.Corruption("embed", subject, samples=2),
        restoration=jedit.methods.Restoration(["up", "down"], window=1),
        key=key,
    )
    salun = jedit.methods.salun(apply, params, rows, optax.sgd(0.1))
    ones = jax.tree.map(jnp.ones_like, params)
    state = salun.optimizer.init(params)
    salient, _ = salun.optimizer.update(ones, state, params)
    price = RetainKl(apply, params, rows, likelihood=jedit.likelihoods.Categorical())
    move = {"up": params["up"], "head": -params["head"]}
    estimator = jedit.kfac(apply, jedit.likelihoods.Categorical(), fisher="exact")
    grouped = jedit.estimate_in_groups(estimator, params, [rows], key=key, group_bytes=1)
    in_parts, _ = jedit.methods.kfade(
        apply, params, grouped, facts, rows, budget=0.05, ascent=jedit.methods.Ascent(1)
    )
    host = jax.tree.map(np.asarray, rows)
    stream = jedit.continual(
        apply,
        estimator,
        host,
        enough=6.0,
        predicted_kl=0.5,
        key=key,
        answering=jedit.requests.Answering(relearn=4),
        refresh=jedit.requests.Refresh(every=1, chunk=8),
    )
    after, forgotten = stream.forget(stream.init(params), [3])
    after, again = stream.forget(after, [5])
    natural = jedit.Natural(
        damping=0.3,
        batch_size=8,
        recovery=jedit.Recovery(2, batch_size=8),
        rewind=jedit.Rewind(jax.tree.map(jnp.cos, params), 1e-2, steps=2),
    )
    how = jedit.Forgetting(natural, steps=2, every=1)
    edit, told = jedit.forget(apply, params, facts, rows, unseen=rows, key=key, how=how)
    return {
        "capture": (outputs, activations, gradients),
        "capture, traced": traced(params, rows.inputs),
        "intervene": tuple(changed),
        "target_values": (values, tuple(info)),
        "causal_trace": tuple(traced_back),
        "salun": salient,
        "RetainKl": (price(move, 0.1), price.predicted(move)),
        "kfade in parts": in_parts.blocks,
        "forget": (edit.blocks, told.true_kl, told.loss_after),
        "continual": (after.params, forgotten.loss_after, again.loss_after),
    }


def compare(found, check=lambda *_: None):
    """Print how far what `found(params, rows, facts)` gives on explicit axes is from one device's.

    `check(seen, mesh)` looks at what was found on the mesh before it is compared.
    """
    draw = np.random.default_rng(0)
    shapes = {
        "embed": (VOCAB, WIDTH),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
        "head": (WIDTH, VOCAB),
    }
    host = {
        name: (draw.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
        for name, shape in shapes.items()
    }
    tokens, labels = draw.integers(0, VOCAB, (2, ROWS, SEQ))
    rows = jedit.Batch(tokens, labels)
    facts = jax.tree.map(lambda x: x[:8], rows)
    expected = found(host, *jax.tree.map(jnp.asarray, (rows, facts)))

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params = {n: jax.device_put(x, NamedSharding(mesh, SPECS[n])) for n, x in host.items()}
    sets = jax.device_put((rows, facts), NamedSharding(mesh, P("data")))
    differences = {}
    for within in (False, True):
        if within:
            with jax.set_mesh(mesh):
                seen = found(params, *sets)
        else:
            seen = found(params, *sets)
        check(seen, mesh)
        for name, one in expected.items():
            pairs = zip(jax.tree.leaves(one), jax.tree.leaves(seen[name]), strict=True)
            differences[f"{name}, {within=}"] = max(
                float(np.max(np.abs(np.asarray(x, float) - np.asarray(y, float)), initial=0))
                for x, y in pairs
            )
    sys.stdout.write(json.dumps(differences))


def stays(seen, mesh):
    """What a stream leaves lies where the parameters lay."""
    kept = seen["continual"][0]
    for name, spec in SPECS.items():
        assert kept[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), kept[name].ndim)


if __name__ == "__main__":
    compare(found, stays)
