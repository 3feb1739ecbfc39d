"""A random folder of Llama-3.2-1B's shape: written, loaded, fitted by groups, edited, saved.

    python -m tests.bench.gpu_run.folder --do write|edit|plan --folder FOLDER --json FILE [--toy]

"write" draws the weights on the device; "edit" loads the folder, fits K-FAC of all attention and
MLP matrices group by group, every axis dense and none decomposed (`factorize="cholesky"`), takes a
K-FADE step at a budget of true retain KL, and saves the edited folder; "plan" asks `jedit plan` of
the same work, whose peaks the table sets beside those that were measured.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.gpu_run.stages import write_json

BUDGET = 0.01  # nats an output
SCALE = 0.02  # of the random weights, as Llama's are initialised


class Size(NamedTuple):
    """A folder, and the work on it.

    Attributes:
        config: config.json.
        forget: rows.
        retain: rows.
        length: tokens of a row.
        batch: rows at a time.
        group_bytes: of K-FAC's sums.
    """

    config: dict[str, Any]
    forget: int
    retain: int
    length: int
    batch: int
    group_bytes: int


def size_of(is_toy: bool) -> Size:
    from tests.bench.plan_on_paper import MODELS, sizes

    if not is_toy:
        return Size(MODELS["1B"], 16, 256, 256, 8, 2**33)
    toy = sizes(2, 32, 48, 4, is_tied=True) | {"vocab_size": 64, "num_key_value_heads": 2}
    return Size(toy | {"rope_theta": 1e4}, 2, 8, 12, 2, 2**16)


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A tied Llama's tensors, as PyTorch has them: (outputs, inputs)."""
    width, hidden, head = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = (config[f"num_{k}_heads"] * head for k in ("attention", "key_value"))
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    found = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (width,)}


def write(size: Size, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Write config.json and model.safetensors in bfloat16."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    @jax.jit(static_argnums=1)
    def drawn(key, shape):
        if len(shape) == 1:
            return jnp.ones(shape, jnp.bfloat16)
        return SCALE * jax.random.normal(key, shape, jnp.bfloat16)

    folder.mkdir(parents=True, exist_ok=True)
    key, tensors = jax.random.key(seed), {}
    for i, (name, shape) in enumerate(shapes(size.config).items()):
        tensors[name] = np.asarray(drawn(jax.random.fold_in(key, i), shape))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(size.config))
    count = sum(x.size for x in tensors.values())
    return {"parameters": count, "GiB": sum(x.nbytes for x in tensors.values()) / 2**30}


def rows(size: Size, count: int, seed: int) -> list:
    """Batches of random tokens."""
    import jax

    from jedit.core.batch import Batch

    shape = (count, size.length + 1)
    tokens = jax.random.randint(jax.random.key(seed), shape, 0, size.config["vocab_size"])
    whole = Batch(tokens[:, :-1], tokens[:, 1:])
    parts = range(0, count, size.batch)
    return [jax.tree.map(lambda x, i=i: x[i : i + size.batch], whole) for i in parts]


def edit(size: Size, folder: Path, path: Path) -> dict[str, Any]:
    """Load, fit, edit, evaluate and save, the file of numbers written after each."""
    import jax

    import jedit
    from jedit.metrics import nll, output_kl
    from jedit.models import load_model, save_model
    from jedit.recipes.folders.places import SELECT
    from tests.bench.gpu_run.phases import Phases
    from tests.bench.gpu_run.rates import factor_flops, matmul_rates, matrices_of

    found: dict[str, Any] = {"budget": BUDGET}

    def keep(phases: dict[str, Any]) -> None:
        write_json(path, found | {"phases": phases})

    phases = Phases(keep)
    with phases("load"):
        apply, params, _ = load_model(folder)
        jax.block_until_ready(params)
    found["weights GiB"] = sum(x.nbytes for x in jax.tree.leaves(params)) / 2**30
    forget, retain = rows(size, size.forget, 1), rows(size, size.retain, 2)
    unseen = rows(size, size.batch, 3)
    likelihood = jedit.likelihoods.Categorical()
    estimator = jedit.kfac(apply, likelihood, select=SELECT, factorize="cholesky")
    groups = estimator.groups(params, retain[0], size.group_bytes)
    found["groups"] = len(groups)
    given = {"key": jax.random.key(0), "group_bytes": size.group_bytes}
    with phases("fit"):
        curvature = jax.block_until_ready(jedit.estimate(estimator, params, retain, **given))
    found["factors GiB"] = sum(x.nbytes for x in jax.tree.leaves(curvature)) / 2**30
    # The moments once, the model's products once a group, as if every group went all the way back.
    matrices = matrices_of(apply, params, retain[0].inputs, SELECT)
    once = factor_flops(matrices, is_narrow=True).model
    passes = sum(4 * d_in * d_out for d_in, d_out in matrices)
    positions = size.retain * size.length
    found["fit flops"] = positions * (once + (len(groups) - 1) * passes)
    keep(phases.found)
    with phases("edit"):
        ascent = jedit.methods.Ascent(steps=1)
        made, info = jedit.methods.kfade(
            apply, params, curvature, forget, retain[:4], budget=BUDGET, ascent=ascent
        )
        edited = jax.block_until_ready(jedit.apply_edit(params, made))
    found["true KL"] = float(info.true_kl[-1])
    with phases("evaluate"):
        found["forget nll"] = [nll(apply, p, forget) for p in (params, edited)]
        found["unseen KL"] = output_kl(apply, params, edited, unseen)
    with phases("save"):
        save_model(edited, folder.with_name(f"{folder.name}-edited"), source=folder)
    # Last: its matrices take memory that is not the edit's.
    sizes = 8192 if math.prod(matrices[0]) > 2**20 else 128
    found["matmul rate"] = matmul_rates("bfloat16", sizes).peak
    # A group's program is compiled in each fit anew, so there is no fit without it to be timed. The
    # share is at most this: cotangents stop at a group's layers, so that the flops are fewer;
    # and a batch may still be computed while a program is compiled, so that the seconds are more.
    # Where compiling takes most of them it says little, and may pass one.
    computing = phases.found["fit"]["seconds"] - phases.found["fit"]["of them compiling"]
    found["fit share"] = found["fit flops"] / computing / found["matmul rate"]
    return found | {"phases": phases.found}


def plan(size: Size, folder: Path) -> dict[str, Any]:
    """What `jedit plan` tells of the same work, GiB by phase."""
    from jedit.curvature import Factorize
    from jedit.recipes.plan.plan import Work
    from jedit.recipes.plan.plan import plan as planned

    work = Work(
        "kfade",
        forget=size.forget,
        retain=size.retain,
        max_len=size.length + 1,
        batch_size=size.batch,
        group_bytes=size.group_bytes,
        attack=False,
        factorize=Factorize("cholesky"),
    )
    told = planned(folder, work)
    names = ("weights", "sums", "factors", "peak")
    return {
        **{f"{name} GiB": getattr(told, name) / 2**30 for name in names},
        "groups": told.num_groups,
        "phases": {phase.name: phase.peak / 2**30 for phase in told.phases},
    }


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--do", choices=("write", "edit", "plan"), required=True)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--toy", action="store_true")
    given = options.parse_args(arguments)
    size = size_of(given.toy)
    if given.do == "write":
        found = write(size, given.folder)
    elif not (given.folder / "config.json").exists():
        found = {"skipped": f"there is no {given.folder}: the stage that writes it did not"}
    else:
        found = (
            edit(size, given.folder, given.json) if given.do == "edit" else plan(size, given.folder)
        )
    write_json(given.json, found)


if __name__ == "__main__":
    main()
