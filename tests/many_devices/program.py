"""One program for any number of devices; writes what it computes, for `test_many_devices`.

python -m tests.many_devices.program OUT.npz KIND [ADDRESS PROCESS PROCESSES]
"""

import contextlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jedit
from jedit.curvature import to_device
from jedit.curvature.likelihoods import Categorical
from jedit.objectives import NPO, RetainKL, with_retain
from tests.many_devices import scene


def leaves_of(tree, prefix):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {prefix + jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in found}


def compute(kind):
    """All numbers by name, and what the checks on the way were."""
    mesh = scene.mesh_of(kind)
    is_explicit = kind.endswith(" explicit")
    params, split = scene.placed(kind, mesh)
    batches = [split(scene.rows(seed)) for seed in (1, 2)]
    key = jax.random.key(0)
    kfac = jedit.kfac(scene.apply, Categorical())
    curvature = jedit.estimate(kfac, params, batches, key=key)
    out = {}
    for name, factor in curvature.factors.items():
        out[f"matrix/{name}"], out[f"eigenvalues/{name}"] = factor.matrix, factor.eigenvalues
    limit = 3 * scene.HIDDEN**2 * 8
    grouped = jedit.estimate(kfac, params, batches, key=key, group_bytes=limit, offload=True)
    assert jax.tree.structure(grouped) == jax.tree.structure(curvature)
    assert "pinned_host" in {f.matrix.sharding.memory_kind for f in grouped.factors.values()}
    again = to_device(grouped)
    out |= {f"grouped/{n}": f.matrix for n, f in again.factors.items()}
    estimator = jedit.ekfac(scene.apply, Categorical(), curvature)
    corrected = jedit.estimate(estimator, params, batches, key=key)
    alone = is_explicit  # where JAX itself would be told how this model's lookups are to lie
    given = (scene.initial(), scene.rows(1)) if alone else (params, batches[0])
    gradient = jax.jit(jax.grad(mean_loss))(*given)
    gradient = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), gradient, params)
    solved = jedit.solve(curvature, gradient, damping=0.1)
    out |= leaves_of(solved, "solve/")
    out |= leaves_of(
        jax.jit(lambda c, g: jedit.solve(c, g, damping=0.1))(grouped, gradient),
        "solve offloaded/",
    )
    solve_corrected = jax.jit(lambda c, g: jedit.solve(c, g, damping=0.1))
    out |= leaves_of(solve_corrected(corrected, gradient), "solve ekfac/")
    pruned, _ = jedit.methods.curvature_pruning(params, corrected, mass=0.7)
    pruned = jedit.apply_edit(params, pruned)
    out |= leaves_of(pruned, "pruned/")
    centred = jedit.kfac(scene.apply, Categorical(), fisher="empirical", centred=True)
    centred = jedit.estimate(centred, params, batches[:1], key=key)
    out |= {f"centred/{name}": factor.matrix for name, factor in centred.factors.items()}
    requests = split(jax.tree.map(lambda x: x[:, None], scene.rows(3, 16)))
    edits, info = jedit.batch_unlearn(
        scene.apply,
        params,
        grouped,
        requests,
        predicted_kl=1e-3,
        solver=jedit.requests.Solver(rank=4, chunk=2),
    )
    out |= leaves_of(info, "batch info/")
    summed = jedit.sum_edits(edits, like=None if mesh is None else params)
    out |= leaves_of(summed, "batch sum/")
    edited = jedit.apply_edit(params, summed)
    out |= leaves_of(edited, "edited/")
    if is_explicit:  # JAX would be told how a row of what is split is to lie
        edits = jax.device_put(edits, NamedSharding(mesh, P()))
    one = jax.tree.map(lambda x: x[0], edits)
    out |= leaves_of(jedit.apply_edit(params, one), "edited thin/")
    if jax.process_count() == 1:  # as an edit comes from a folder: on one device
        read = jax.tree.map(np.asarray, (one, jedit.sum_edits(edits)))
        brought = jax.device_put(read, jax.devices()[0])
        for edit, expected in zip(brought, (jedit.apply_edit(params, one), edited), strict=True):
            found = jedit.apply_edit(params, edit)
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-12, atol=1e-14)
                assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        del read, brought, edit, found, x, y
    objective = with_retain(NPO(beta=0.5), RetainKL())  # with a reference, which lies as params do
    method = jedit.TrainingMethod(objective, optax.adam(1e-2), batch_size=8)
    sets = (split(scene.rows(4)), split(scene.rows(5)))
    trained, history = jedit.unlearn(method, scene.apply, params, *sets, steps=3, key=key)
    out |= leaves_of(trained, "trained/") | leaves_of(history, "history/")
    if mesh is not None and not jax.process_index() and jax.process_count() == 1:
        check_saved(corrected)
    if mesh is not None:
        trees = {"solved": solved, "sum": summed.blocks, "edited": edited, "trained": trained}
        trees |= {"pruned": pruned}
        check_places(params, curvature, corrected, trees)
        if not is_explicit:  # this program's own arrays are copied to all devices in its context
            check_live()
        if not is_explicit:
            check_programs(kind, mesh, params, curvature, gradient, edits, batches[0], kfac)
    return out


def mean_loss(params, batch):
    logits = scene.apply(params, batch.inputs)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(nll * batch.mask) / jnp.sum(batch.mask)


def largest_share(x):
    """The largest part of an array that some device of this process holds, over all of it."""
    return max(shard.data.size for shard in x.addressable_shards) / max(x.size, 1)


def check_places(params, curvature, corrected, trees):
    """What has a parameter's shape lies as it does; factors follow the axes of their weight."""
    shardings = leaves_of(jax.tree.map(lambda x: x.sharding, params), "")
    for what, tree in trees.items():
        for name, leaf in leaves_of(tree, "").items():
            wanted = shardings[name]
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (what, name, leaf.sharding)
    for name, block in curvature.blocks.items():
        if name not in scene.KERNELS:
            continue
        leaf = dict(leaves_of(params, ""))[name]
        share = largest_share(leaf)
        a, g = curvature.factors[block.input], curvature.factors[block.output]
        # Every axis that splits the weight splits G, and A unless the bias makes its side odd.
        found = [largest_share(g.basis), largest_share(g.matrix)]
        if block.weight.bias_path is None:
            found += [largest_share(a.basis), largest_share(a.matrix)]
        found.append(largest_share(corrected.blocks[name].corrected))
        assert found == [share] * len(found), (name, share, found)


def check_live():
    """No device holds a whole weight of those that are split, of all that is alive by now."""
    stacked = {(scene.LAYERS, *scene.KERNELS[name]) for name in ("up", "down")}
    for x in jax.live_arrays():
        if x.shape in stacked or x.shape == scene.KERNELS["head/kernel"]:
            assert largest_share(x) < 1, (x.shape, x.sharding)


def check_saved(curvature):
    """A curvature comes back from a folder as it lay."""
    with tempfile.TemporaryDirectory() as folder:
        jedit.save_curvature(curvature, f"{folder}/it")
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), curvature
        )
        read = jedit.load_curvature(f"{folder}/it", like=like)
    assert jax.tree.structure(read) == jax.tree.structure(curvature)
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(curvature), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def check_programs(kind, mesh, params, curvature, gradient, edits, batch, kfac):
    """No instruction of a compiled program makes a whole weight of those that are split."""
    if kind == "stages":
        return  # its layers are whole, each on some devices
    solve = jax.jit(lambda c, g: jedit.solve(c, g, damping=0.1))
    solve_text = solve.lower(curvature, gradient).compile().as_text()
    assert not whole_weights(solve_text), whole_weights(solve_text)
    # Nor the bases of all layers at once.
    side = max(scene.WIDTH, scene.HIDDEN)
    assert f"[{scene.LAYERS},{side},{side}]" not in solve_text
    places = jax.tree.map(lambda x: x.sharding, params)
    apply_text = jax.jit(jedit.apply_edit, out_shardings=places)
    one = jedit.sum_edits(edits, like=params)
    text = apply_text.lower(params, one).compile().as_text()
    assert not whole_weights(text), whole_weights(text)
    # The check sees a whole weight where there is one.
    everywhere = NamedSharding(mesh, P())
    copied = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), out_shardings=everywhere)
    assert whole_weights(copied.lower(params).compile().as_text())
    state = kfac.init(params, batch)
    update = jax.jit(
        lambda s, p, b: kfac.update(s, p, b, jax.random.key(0)),
        out_shardings=jax.tree.map(lambda x: x.sharding, state),
    )
    found = whole_weights(update.lower(state, params, batch).compile().as_text())
    if kind == "tensor":
        assert not found, found
    else:
        # Under FSDP a model's own forward and backward passes fetch one layer's weight at a time.
        def passes(p, b):
            out, pullback = jax.vjp(lambda p: scene.apply(p, b.inputs), p)
            return pullback(jnp.ones_like(out))

        own = whole_weights(jax.jit(passes).lower(params, batch).compile().as_text())
        assert set(found) <= set(own), (found, own)


def whole_weights(text):
    """Results in a compiled program that have a kernel's whole shape, either way round."""
    shapes = {s for i, o in scene.KERNELS.values() for s in ((i, o), (o, i))}
    # The head with its bias, as it is and with as many more rows of zeros as are even to cut.
    rows = {scene.WIDTH + n for n in (1, 2, 4, 8)}
    shapes |= {s for i in rows for s in ((i, scene.CLASSES), (scene.CLASSES, i))}
    found = []
    for line in text.splitlines():
        made = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]+)\]", line)
        if made and "parameter(" not in line:
            sizes = tuple(int(n) for n in made[1].split(",") if n not in {"1"})
            if sizes[-2:] in shapes:
                found.append(line.strip()[:100].split(" = ")[1].split("{")[0])
    return found


if __name__ == "__main__":
    path, kind, *distributed = sys.argv[1:]
    jax.config.update("jax_enable_x64", True)
    if distributed:
        address, process, processes = distributed
        jax.distributed.initialize(address, int(processes), int(process))
        assert jax.process_count() == int(processes)
    # Explicit axes come as the arrays' alone, or as the context's too.
    within = scene.mesh_of(kind) if kind == "fsdp explicit" else None
    with contextlib.nullcontext() if within is None else jax.set_mesh(within):
        numbers = compute(kind)
    gathered = {
        name: np.asarray(multihost_utils.process_allgather(x, tiled=True))
        for name, x in numbers.items()
    }
    if jax.process_index() == 0:
        np.savez(path, **gathered)
