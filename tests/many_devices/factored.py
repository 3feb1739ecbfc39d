"""Damped factors on a mesh of eight devices: where the pieces lie, and whether they are right.

Run by `test_many_devices`, in a process of its own. Prints by name how far each solution is from
NumPy's, and by name the largest share of a matrix that a device holds, of the inverses and of all
arrays of the compiled program; and that of a solve by leading eigenvectors alone.
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jedit.core.batch import Batch
from jedit.curvature import (
    Factor,
    Factorize,
    estimate,
    inverted,
    kfac,
    matvec,
    quadratic_form,
    solve,
    to_host,
)
from jedit.curvature.likelihoods import Categorical
from jedit.curvature.mesh.placement import whole
from jedit.requests.solution import _inverse

# "up" has sides that the devices divide; "odd" is filled up; "stack" is split by layers.
SPECS = {"up": P("data", "model"), "odd": P("data", None), "stack": P("model", None, "data")}
SHAPES = {"up": (48, 32), "odd": (32, 13), "stack": (2, 32, 32)}
ROWS, DAMPING = 64, 0.1


def apply(params, x):
    hidden = jnp.tanh(x @ params["up"])
    for layer in params["stack"]:
        hidden = jnp.tanh(hidden @ layer)
    return hidden @ params["odd"]


def expected(matrices, tree):
    """(A + λ_A)⁻¹ T (G + λ_G)⁻¹ in NumPy, and the products that undo it."""

    def damped(matrix):
        return matrix + np.sqrt(DAMPING) * np.trace(matrix) / len(matrix) * np.eye(len(matrix))

    solved, moved = {}, {}
    for name, leaf in tree.items():
        layers = np.asarray(leaf, np.float64).reshape(-1, *leaf.shape[-2:])
        pairs = [(damped(a), damped(g)) for a, g in matrices[name]]
        triples = [(a, t, g) for (a, g), t in zip(pairs, layers, strict=True)]
        solved[name] = [np.linalg.solve(a, t) @ np.linalg.inv(g) for a, t, g in triples]
        moved[name] = [a @ t @ g for a, t, g in triples]
    return solved, moved


def distance(found, reference):
    """The largest difference, over the largest entry, of all leaves."""
    differences = []
    for name, layers in reference.items():
        x = np.asarray(found[name], np.float64).reshape(np.shape(layers))
        differences.append(np.max(np.abs(x - layers)) / np.max(np.abs(layers)))
    return float(max(differences))


def largest_share(inverse):
    """The largest part of a dense factor's inverse that one device holds."""
    shares = []
    for side in inverse.inverses.values():
        values = side.values
        if values.ndim == 4:
            shares += [shard.data.size / values.size for shard in values.addressable_shards]
    return max(shares)


def largest_program_share(function, *args):
    """The largest array of the compiled program, over the largest factor of one layer."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = re.findall(r"f(?:32|64)\[([\d,]+)\]", text)
    return max(np.prod([int(n) for n in s.split(",")]) for s in shapes) / 48**2


def renamed(tree, mesh):
    """The same arrays, split alike on another mesh of the same devices."""

    def moved(x):
        is_spread = isinstance(x.sharding, NamedSharding)
        return jax.device_put(x, NamedSharding(mesh, x.sharding.spec)) if is_spread else x

    return jax.tree.map(moved, tree)


def kept_by(curvature, by):
    """The curvature with the dense factors to be inverted in another way."""
    factors = {n: dataclasses.replace(f, by=by) for n, f in curvature.factors.items()}
    return dataclasses.replace(curvature, factors=factors)


def shared_inverse(place, d=256):
    """How far an inverse that many requests share is from NumPy's, and its program's collectives.

    Of a factor that is split by rows, and long enough to be inverted by products of slices.
    """
    rows = np.random.default_rng(1).normal(size=(2 * d, d))
    matrix = rows.T @ rows / (2 * d)
    factor = Factor(jax.device_put(jnp.asarray(matrix)[None], place), None, None, "cholesky")
    compiled = _inverse.lower(factor, jnp.asarray(DAMPING), whole(place)).compile()
    reference = np.linalg.inv(matrix + np.sqrt(DAMPING) * np.trace(matrix) / d * np.eye(d))
    found = compiled(factor, jnp.asarray(DAMPING))
    collectives = re.findall(
        r"= \S+ (?:all-gather|all-reduce|all-to-all|collective-permute)", compiled.as_text()
    )
    return distance({"": found}, {"": reference[None]}), len(collectives)


def main():
    """Compare both forms on both kinds of mesh with NumPy."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    params, tree = (
        {n: jnp.asarray(rng.normal(size=s) / s[-2] ** 0.5) for n, s in SHAPES.items()}
        for _ in range(2)
    )
    rows = Batch(jnp.asarray(rng.normal(size=(ROWS, 48))))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    explicit = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    places = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    estimator = kfac(apply, Categorical(), factorize="cholesky")
    batch = jax.device_put(rows, NamedSharding(mesh, P()))
    curvature = estimate(estimator, jax.device_put(params, places), batch, key=jax.random.key(0))
    matrices = {}
    for name, block in curvature.blocks.items():
        ends = [np.asarray(curvature.factors[f].matrix) for f in (block.input, block.output)]
        matrices.setdefault(name.split("#")[0], []).extend(zip(*ends, strict=True))
    solved, moved = expected(matrices, tree)
    form = sum(
        np.sum(np.asarray(tree[n]) * np.asarray(x).reshape(tree[n].shape)) for n, x in moved.items()
    )
    there, how = jax.device_put(tree, places), {"damping": DAMPING}
    found = {}
    for by in ("cholesky", "inverse"):
        kept = kept_by(curvature, by)
        inverse = inverted(kept, **how)
        found[by] = {
            "solve": distance(inverse(there), solved),
            "explicit": distance(
                solve(renamed(kept, explicit), renamed(there, explicit), **how), solved
            ),
        }
        # On the host, and on an explicit mesh, where a jitted call fetches them.
        away = {"offloaded": to_host(kept), "offloaded explicit": to_host(renamed(kept, explicit))}
        for name, one in away.items():
            tree = renamed(there, explicit) if "explicit" in name else there
            inverse_there = inverted(one, **how)
            kinds = {side.values.sharding.memory_kind for side in inverse_there.inverses.values()}
            assert kinds == {"pinned_host"}, kinds
            solutions = (jax.jit(lambda i, t: i(t))(inverse_there, tree), solve(one, tree, **how))
            found[by][name] = max(distance(solution, solved) for solution in solutions)
        shares = {
            "held": largest_share(inverse),
            "making": largest_program_share(lambda c: inverted(c, **how), kept),
            "solving": largest_program_share(lambda i, t: i(t), inverse, there),
        }
        found[by] |= {f"share {name}": share for name, share in shares.items()}
    found["cholesky"] |= {
        "matvec": distance(matvec(curvature, there, **how), moved),
        "form": float(abs(quadratic_form(curvature, there, **how) / form - 1)),
    }
    # What is left of a matrix beside its leading part is taken where it lies, too.
    estimator = kfac(apply, Categorical(), factorize=Factorize(rank=4))
    curvature = estimate(estimator, jax.device_put(params, places), batch, key=jax.random.key(0))
    share = largest_program_share(lambda c, t: solve(c, t, **how), curvature, there)
    found["rank"] = {"share solving": share}
    # The measure sees a whole matrix where there is one.
    everywhere = jax.device_put(tree, NamedSharding(mesh, P()))
    assert largest_program_share(lambda c, t: solve(c, t, **how), curvature, everywhere) > 0.25
    apart, collectives = shared_inverse(NamedSharding(mesh, P(None, ("data", "model"))))
    assert collectives == 1, collectives
    found["shared"] = {"inverse": apart}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
