"""`jedit plan` for Llamas of 1, 8 and 70 billion parameters on one device or many.

    python -m tests.bench.plan_on_paper [--models 1B,70B] [--devices 1,8] [--methods kfade]

Nothing is loaded: the shapes are those of the configurations below, in bfloat16, and the programs
are compiled for them by this machine's CPU, which widens bfloat16 for its products; so temporaries
are an upper bound of an accelerator's. Devices are CPUs of this process, and share the parameters
and the rows ("data"). Rows and steps are the defaults of `jedit plan`; no relearning attack. The
seconds are the plan's flops by `on_paper`'s constants: of a `make gpu` run where there is one.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax

from jedit.curvature import Factorize
from jedit.recipes.plan.advice import advice
from jedit.recipes.plan.plan import Work, asked, counted
from tests.bench.on_paper import STATED, constants

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
}


def sizes(layers, width, hidden, heads, *, is_tied=False):
    return LLAMA | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "head_dim": width // heads,
        "tie_word_embeddings": is_tied,
    }


MODELS = {
    "1B": sizes(16, 2048, 8192, 32, is_tied=True),
    "8B": sizes(32, 4096, 14336, 32),
    "70B": sizes(80, 8192, 28672, 64),
}


def seconds_of(plan, known):
    """Seconds of the whole edit: passes at the bfloat16 rate, decompositions at float32's.

    The plan counts a decomposition as so many flops of products as it takes on a CPU, which are the
    stated constants'; a run that has met an accelerator knows better.
    """
    total = 0.0
    for phase in plan.phases:
        if phase.name == "decompose":
            total += phase.flops * known.eigh / STATED.eigh / known.float32_rate
        else:
            total += phase.flops * known.fit / known.rate
    return total / plan.num_devices


def row(name, number, method, known, *, is_advised):
    """One line of the table, and what would make it fit."""
    mesh = None
    if number > 1:
        kinds = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((number,), ("data",), axis_types=kinds)
    # Factors of the hidden width are dense in all three, so that one number means one thing.
    work = Work(method=method, attack=False, factorize=Factorize(max_dim=32768))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[name]))
        found = asked(folder, work, mesh=mesh)
        plan = counted(found, work)
        seconds = time.perf_counter() - begin
        better = []
        if is_advised and plan.peak > known.memory:
            better = advice(folder, work, found, known.memory, mesh=mesh)[:1]
    sizes = (plan.weights, plan.masters, plan.sums, plan.factors)
    sizes += (max(phase.temporaries for phase in plan.phases), plan.peak)
    cells = [f"{size / 1e9:.3g}" for size in sizes]
    told = "fits" if plan.peak <= known.memory else "does not"
    if better:
        told = f"{better[0].text.split(' (--')[0]}: {better[0].plan.peak / 1e9:.3g}"
        told += "" if better[0].plan.peak <= known.memory else ", too much"
    cells += [plan.at_peak.name, told, f"{seconds_of(plan, known):.3g}"]
    return [name, str(number), method, *cells, f"{seconds:.0f}"]


HEADINGS = ("model", "devices", "method", "weights", "masters", "sums", "factors")
HEADINGS += ("temporaries", "peak", "in", "on {memory:.0f} GB", "edit, s", "planned in, s")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="1B,8B,70B")
    parser.add_argument("--devices", default="1,8")
    parser.add_argument("--methods", default="natural,kfade")
    parser.add_argument("--advice", action="store_true", help="say what would make it fit")
    parser.add_argument("--constants", type=Path, help="gpu.json of a run; out/gpu's, if there")
    given = parser.parse_args()
    try:
        known = constants(given.constants)
    except ValueError as error:
        parser.error(str(error))
    numbers = [int(x) for x in given.devices.split(",")]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(numbers))
    headings = " | ".join(HEADINGS).format(memory=known.memory / 1e9)
    print(f"Constants {known.source}.\n\n| {headings} |")
    print("| " + " | ".join("---" for _ in HEADINGS) + " |")
    for name in given.models.split(","):
        for number in numbers:
            for method in given.methods.split(","):
                cells = row(name, number, method, known, is_advised=given.advice)
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
