"""More entrances that take parameters on a mesh with explicit axes; prints differences.

Run by `test_many_devices` as `explicit_entrances` is, whose model this is: each entrance gives the
numbers of one device. An entrance that raises is named with what it says.
"""

import json
import sys
import traceback

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
    edit = jedit.Edit({"up": step["up"]})

    def learnt():
        anchor = methods.anchored(
            jedit.diagonal(apply, Categorical(), fisher="exact"), params, rows, key=key
        )
        return methods.anchored(
            jedit.diagonal(apply, Categorical(), fisher="exact"),
            params,
            facts,
            key=key,
            before=anchor,
        )

    def stored():
        first = methods.stored_gradients(apply, params, rows, rank=4, samples=8, key=key)
        found = methods.stored_gradients(
            apply, params, facts, rank=6, samples=8, key=key, before=first
        )
        # The space, not its basis, whose signs are anybody's.
        basis = jax.tree.leaves(found)[0]
        return jnp.abs(basis @ basis.T) if basis.shape[0] < basis.shape[1] else basis.T @ basis

    def relearned():
        def measure(params):
            return np.asarray(jnp.sum(params["up"] ** 2))

        return jedit.attacks.relearned_values(
            apply,
            params,
            facts,
            optimizer=optax.sgd(0.1),
            looks=(1, 2),
            measure=measure,
            key=key,
        )

    def trained(optimizer):
        method = jedit.TrainingMethod(jedit.objectives.GA(), optimizer, batch_size=8)
        return jedit.run_method(method, apply, params, facts, rows, steps=2, key=key)[0].blocks

    def adapted():
        found = jedit.models.with_lora(apply, params, rows.inputs, rank=2, key=key)
        return found.apply(found.params, rows.inputs)

    transforms = jedit.transforms
    return {
        "anchored": lambda: learnt().curvature,
        "stored_gradients": stored,
        "activation_intervals": lambda: methods.activation_intervals(
            apply, params, [rows], ["down"]
        ),
        "repselect_moments": lambda: methods.repselect_moments(apply, params, [facts], key=key),
        "graded_rows": lambda: methods.graded_rows(apply, params, facts, key=key),
        "ggn_vector_product": lambda: jedit.ggn_vector_product(
            apply, params, rows, step, likelihood=Categorical()
        ),
        "quadratic_kl": lambda: quadratic_kl(apply, params, rows, step, likelihood=Categorical()),
        "membership_scores": lambda: metrics.membership_scores(apply, params, rows),
        "relearned_values": relearned,
        "with_lora": adapted,
        "greedy_decode": lambda: jedit.models.greedy_decode(apply, params, rows.inputs, 0),
        "revert_edit": lambda: jedit.revert_edit(jedit.apply_edit(params, edit), edit),
        "solve": lambda: jedit.solve(curvature, step, damping=0.1),
        "trace": lambda: jedit.trace(curvature),
        "null_space": lambda: jedit.project(jedit.null_space(curvature, threshold=0.1), step),
        "scale_by_curvature": lambda: trained(
            optax.chain(transforms.scale_by_curvature(curvature, damping=0.1), optax.sgd(0.1))
        ),
        "natural_steps": lambda: trained(
            transforms.natural_steps(curvature, damping=0.1, predicted_kl=1e-3)
        ),
        "clip_by_curvature_norm": lambda: trained(
            optax.chain(
                optax.sgd(0.1), transforms.clip_by_curvature_norm(curvature, predicted_kl=1e-3)
            )
        ),
        "params_hash": lambda: jnp.asarray(
            list(bytes.fromhex(jedit.checkpoint.params_hash(params))), jnp.int32
        ),
    }


def found(*given):
    """The numbers of each entrance, or what it says."""
    results = {}
    for name, call in entrances(*given).items():
        try:
            results[name] = jax.tree.map(np.asarray, call())
        except Exception as error:
            traceback.print_exc()
            results[name] = f"{type(error).__name__}: {error}"
    return results


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
            if isinstance(one, str) or isinstance(seen[name], str):
                differences[f"{name}, {within=}: {one!s:.300} | {seen[name]!s:.300}"] = 1.0
                continue
            pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(seen[name]), strict=True))
            differences[f"{name}, {within=}"] = max(
                float(np.max(np.abs(np.asarray(x, float) - np.asarray(y, float)), initial=0))
                for x, y in pairs
            )
    sys.stdout.write(json.dumps(differences))
