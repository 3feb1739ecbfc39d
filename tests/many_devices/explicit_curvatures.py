"""Entrances to which a curvature or parameters on explicit axes come; prints differences.

Run by `test_many_devices` as `explicit_entrances` is, whose model this is: each entrance gives the
numbers of one device.
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
from jedit.curvature.ggn import quadratic_kl
from jedit.curvature.likelihoods import Categorical
from tests.many_devices.explicit_entrances import HIDDEN, ROWS, SEQ, SPECS, VOCAB, WIDTH, apply


def entrances(params, rows, facts):
    """What each entrance computes, by name, when it is called."""
    key = jax.random.key(0)
    methods, metrics = jedit.methods, jedit.metrics
    step = jax.tree.map(lambda x: x * 0.1, params)
    curvature = jedit.estimate(
        jedit.kfac(apply, Categorical(), fisher="exact"), params, rows, key=key
    )

    def trained(optimizer):
        method = jedit.TrainingMethod(jedit.objectives.GA(), optimizer, batch_size=8)
        return jedit.run_method(method, apply, params, facts, rows, steps=2, key=key)[0].blocks

    transforms = jedit.transforms
    return {
        "anchored": lambda: (
            methods.anchored(
                jedit.diagonal(apply, Categorical(), fisher="exact"), params, rows, key=key
            ).curvature
        ),
        "graded_rows": lambda: methods.graded_rows(apply, params, facts, key=key),
        "ggn_vector_product": lambda: jedit.ggn_vector_product(
            apply, params, rows, step, likelihood=Categorical()
        ),
        "quadratic_kl": lambda: quadratic_kl(apply, params, rows, step, likelihood=Categorical()),
        "membership_scores": lambda: metrics.membership_scores(apply, params, rows),
        "trace": lambda: jedit.trace(curvature),
        "natural_steps": lambda: trained(
            transforms.natural_steps(curvature, damping=0.1, predicted_kl=1e-3)
        ),
        "clip_by_curvature_norm": lambda: trained(
            optax.chain(
                optax.sgd(0.1), transforms.clip_by_curvature_norm(curvature, predicted_kl=1e-3)
            )
        ),
    }


def found(*given):
    """The numbers of each entrance, or what it says."""
    return {name: jax.tree.map(np.asarray, call()) for name, call in entrances(*given).items()}


if __name__ == "__main__":
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
    tokens, labels = draw.integers(0, VOCAB, (2, ROWS, SEQ)).astype(np.int32)
    rows = jedit.Batch(tokens, labels)
    facts = jax.tree.map(lambda x: x[:8], rows)
    expected = found(*jax.tree.map(jnp.asarray, (host, rows, facts)))
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
        for name, one in expected.items():
            pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(seen[name]), strict=True))
            differences[f"{name}, {within=}"] = max(
                float(np.max(np.abs(np.asarray(x, float) - np.asarray(y, float)), initial=0))
                for x, y in pairs
            )
    sys.stdout.write(json.dumps(differences))
