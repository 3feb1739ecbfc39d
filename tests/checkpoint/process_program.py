"""Jobs of two processes of four devices, killed and gone on with; for `test_processes`.

Imports once, then forks the processes of each attempt; nothing of JAX's is started before a fork.
Prints what happened as JSON, and leaves each attempt's numbers in the folder.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jedit
from jedit.checkpoint import arrays, processes
from jedit.checkpoint import job as job_module
from jedit.checkpoint.entry import params_hash
from jedit.core.devices import offloaded
from jedit.curvature.likelihoods import Categorical
from jedit.objectives import NPO, RetainKL, with_retain

WIDTH, HIDDEN, CLASSES, ROWS, STEPS, BATCHES = 8, 24, 16, 16, 6, 4
SPECS = {"up": P("data", "model"), "down": P("model", "data"), "bias": P("model")}
HEARTBEAT = 5  # seconds after which a process that is dead is missed


def apply(params, inputs):
    return jnp.tanh(inputs @ params["up"]) @ params["down"] + params["bias"][None]


def host(hidden=HIDDEN):
    """Parameters and rows, as NumPy's."""
    draw = np.random.default_rng(0)
    params = {
        "up": draw.normal(size=(WIDTH, hidden)) / 3,
        "down": draw.normal(size=(hidden, CLASSES)) / 5,
        "bias": draw.normal(size=CLASSES),
    }
    rows = [
        jedit.Batch(draw.normal(size=(ROWS, WIDTH)), draw.integers(0, CLASSES, ROWS))
        for _ in range(2 + BATCHES)
    ]
    return params, rows


def placed(axes, kind, hidden=HIDDEN):
    """Parameters and rows on a mesh of so many devices along each axis, or on one device."""
    params, rows = host(hidden)
    if axes == (1, 1):
        return jax.tree.map(jnp.asarray, (params, rows))
    mesh = jax.make_mesh(axes, ("data", "model"), axis_types=(kind,) * 2)

    def put(x, spec):  # each process gives its own part alone
        place = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, place, lambda part: x[part])

    params = {name: put(x, SPECS[name]) for name, x in params.items()}
    return params, jax.tree.map(lambda x: put(x, P("data")), rows)


def job(folder, axes, kind=AxisType.Auto):
    """An estimate and a loop, each with saves; all that came of them."""
    params, (forget, retain, *batches) = placed(axes, kind)
    estimator = jedit.kfac(apply, Categorical())
    saves = jedit.Checkpoint(folder, every=1)
    curvature = jedit.estimate(
        estimator, params, batches, key=jax.random.key(1), checkpoint=saves.part("estimate")
    )
    method = jedit.TrainingMethod(
        with_retain(NPO(beta=0.5), RetainKL()), optax.adam(1e-2), batch_size=8
    )
    trained, history = jedit.unlearn(
        method,
        apply,
        params,
        forget,
        retain,
        steps=STEPS,
        key=jax.random.key(2),
        watch=jedit.Watch(checkpoint=saves.part("loop", every=2)),
    )
    matrices = {name: factor.matrix for name, factor in curvature.factors.items()}
    return curvature, params, {"trained": trained, "history": history, "factors": matrices}


def gathered(tree):
    """All numbers by name; in every process."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(
            x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
        )
        for path, x in found
    }


def whole(folder, axes):
    """The job in peace; then values in folders and a ledger, and the errors that all share."""
    curvature, params, tree = job(folder / "job", axes)
    return written(folder, curvature, params), gathered(tree)


def written(folder, curvature, params):
    """What all processes see of what they write together."""
    rank, seen = jax.process_index(), {}
    jedit.save_curvature(curvature, folder / "curvature")
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), curvature
    )
    read = jedit.load_curvature(folder / "curvature", like=like)
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(curvature), strict=True):
        assert one.sharding == other.sharding
        for a, b in zip(one.addressable_shards, other.addressable_shards, strict=True):
            np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
    edit = jedit.Edit({"up": params["up"] * 0.5, "bias": params["bias"] * 0.25})
    other = jedit.Edit({"down": -params["down"]})
    jedit.save_edit(edit, folder / "edit")
    model = jedit.Ledger.create(folder / "ledger", params)
    records = [
        model.record(edit, request=["a row"], method="half", effect={"kl": 0.5}),
        model.record(other, request=["another"], method="none"),
        model.revert(1),
    ]
    seen["records"] = [[x.number, x.action, x.date, x.seal] for x in records]
    now = gathered(model.params(params))
    if rank == 0:
        np.savez(folder / "model.npz", **now)
    away = jax.tree.map(offloaded, params)
    seen["offloaded"] = params_hash(away) == model.base
    seen["explicit"] = explicit_ledger(folder / "explicit", now) == model.base
    errors = {
        "there is one": lambda: jedit.save_edit(edit, folder / "edit"),
        "another edit": lambda: jedit.save_edit(other if rank else edit, folder / "other"),
        "reverted": lambda: model.revert(1),
        "another model": lambda: model.params({**params, "bias": params["bias"] * 2}),
        "other data": lambda: begun(folder / "begun", params, rank),
        "another part": lambda: processes.together("a part", lambda: [1, 2][2 if rank else 0]),
    }
    for name, call in errors.items():
        try:
            call()
            seen[name] = None
        except Exception as error:
            seen[name] = [type(error).__name__, str(error)]
    processes.PATIENCE = 0.5
    if rank == 0:
        try:
            jedit.save_edit(edit, folder / "alone")
        except TimeoutError as error:
            seen["alone"] = str(error)
        # Now, for the other may look while this one is at it.
        seen["left"] = sorted(x.name for x in folder.iterdir())
    return seen


def explicit_ledger(folder, expected):
    """The same ledger on a mesh with explicit axes, in its context; the hash of its base."""
    params, _ = placed((4, 2), AxisType.Explicit)
    with jax.set_mesh(params["up"].sharding.mesh):
        model = jedit.Ledger.create(folder, params)
        edit = jedit.Edit({"up": params["up"] * 0.5, "bias": params["bias"] * 0.25})
        model.record(edit, request=["a row"], method="half")
        model.record(jedit.Edit({"down": -params["down"]}), request=["another"], method="none")
        model.revert(1)
        found = model.params(params)
    for name, x in gathered(found).items():
        assert found[name].sharding.mesh.axis_types == (AxisType.Explicit,) * 2
        assert x.tobytes() == expected[name].tobytes(), name
    return model.base


def begun(folder, params, data):
    """A job of one step, whose data each process has for itself."""
    saves = jedit.Checkpoint(folder, every=1)
    with contextlib.closing(saves):
        saves.resume("a job", params, params)
        saves.see(data)
        saves.save(1, params)


def alone(folder):
    """On one device: the job in peace, and gone on with; and what two processes have written."""
    _, params, tree = job(folder / "oracle", (1, 1))
    _, _, other = job(folder / "one device", (1, 1))
    told, read = read_alone(folder / "values", params)
    return told, gathered({"oracle": tree, "one device": other, "read": read})


def read_alone(folder, params):
    """What a single process with one device reads of what two have written."""
    model = jedit.Ledger(folder / "ledger")
    model.verify()
    tree = {
        "params": model.params(params),
        "edit": jedit.load_edit(folder / "edit").blocks,
        "curvature": jedit.load_curvature(folder / "curvature"),
    }
    return {"hash": model.base == jedit.checkpoint.params_hash(params)}, tree


def die_at(moment, number, rank):
    """Kill this process in its so many-th save, at a moment of it."""
    module, name = {"parts": (processes, "write_parts"), "sealed": (job_module, "seal_folder")}[
        moment
    ]
    do, left = getattr(module, name), [number]

    def then_die(*given):
        found = do(*given)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    if rank is None or rank == jax.process_index():
        setattr(module, name, then_die)


def child(work, out, rank, count, port, devices, death):
    """In a process of its own: do a piece of work, and write what came of it."""
    faulthandler.enable()
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_x64", True)
    if count > 1:
        jax.distributed.initialize(
            f"localhost:{port}", count, rank, heartbeat_timeout_seconds=HEARTBEAT
        )
    arrays.BLOCK_BYTES = 1000  # what is hashed is brought to each process in several blocks
    if death is not None:
        die_at(*death)
    told, numbers = work()
    np.savez(f"{out}-{rank}.npz", **numbers)
    Path(f"{out}-{rank}.json").write_text(json.dumps(told))
    if count > 1:
        jax.distributed.shutdown()  # waits for the others: the first must not be gone before them


def attempt(work, out, *, count=2, devices=4, death=None):
    """Fork the processes of one attempt; how each ended, and how long after the first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = {}
    for rank in range(count):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                child(work, out, rank, count, port, devices, death)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        running[process] = rank
    ended, first = {}, None
    until = time.monotonic() + 120
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            first = first or time.monotonic()
            ended[running.pop(process)] = [
                os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status),
                os.WIFSIGNALED(status),
                time.monotonic() - first,
            ]
        elif time.monotonic() > until:
            for other in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGABRT)  # it says where it hung
        else:
            time.sleep(0.02)
    return [ended[rank] for rank in range(count)]


def main(folder):
    """All attempts, in turn."""
    found, seconds = {}, time.monotonic()

    def doing(place, axes, kind=AxisType.Auto):
        def work():
            _, _, tree = job(place, axes, kind)
            return {}, gathered(tree)

        return work

    def note(name, ended):
        nonlocal seconds
        now = time.monotonic()
        found[name] = {"ended": ended, "seconds": now - seconds}
        seconds = now

    two, auto, explicit = (4, 2), AxisType.Auto, AxisType.Explicit
    values, killed = folder / "values", folder / "killed"
    values.mkdir()
    note("peace", attempt(lambda: whole(values, two), folder / "peace-out"))
    deaths = {
        "both in a save of the sums": ("parts", 2, None, auto),
        "the second in its part": ("parts", 2, 1, explicit),
        "the first before the name": ("sealed", 3, 0, auto),
        "both in a save of the loop": ("parts", 2, None, explicit),
    }
    for name, (*death, kind) in deaths.items():
        note(name, attempt(doing(killed, two, kind), folder / "never", death=death))
        parts = {
            part.name: sorted(x.name for x in part.glob("step-*")) for part in killed.iterdir()
        }
        found[name]["saves"] = parts
    for name in ("2 x 2", "one process", "one device"):
        shutil.copytree(killed, folder / name)
    note("killed", attempt(doing(killed, two), folder / "killed-out"))
    work = doing(folder / "2 x 2", (2, 2), explicit)
    note("2 x 2", attempt(work, folder / "2 x 2-out", devices=2))
    work = doing(folder / "one process", two)
    note("one process", attempt(work, folder / "one process-out", count=1, devices=8))
    note("alone", attempt(lambda: alone(folder), folder / "alone-out", count=1, devices=1))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # JAX warns of forks; it is not yet started here
    main(Path(sys.argv[1]))
