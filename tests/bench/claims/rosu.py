"""Claim: where forget and retain gradients point the same way, a retain-orthogonal perturbation of
the same length raises the retain loss less than an unconstrained one; at a right angle they agree.

    python -m tests.bench.claims.rosu [--seeds 10] [--epochs 2] [--radius 0.05]

A digits CNN is stopped early, so that its gradients are not nothing. The forget batch is a mixture
of one class and of retain rows: the share of the latter sets the cosine of the two gradients. For
each share the retain loss is measured at θ + δ, δ = ρ g_f/‖g_f‖ (UAM) and δ = ρ q/‖q‖ (ROSU).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jedit.geometry import retain_neutral_perturbation
from jedit.objectives import GA, RetainNLL
from jedit.report.figure import save_png
from tests.bench.claims.evidence import interval, parser, shown, write
from tests.bench.claims.scenes import Scene, digits

SHARES = tuple(k / 40 for k in range(41))
EDGES = (-1.0, -0.1, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def at_surrogates(found: Scene, radius: float, shares=SHARES, *, key) -> list[dict[str, float]]:
    """Both perturbations at every share: the angle, and what each does to either loss."""
    size = len(found.forget.targets)
    rows = []
    for share, k in zip(shares, jax.random.split(key, len(shares)), strict=True):
        num_retain = round(share * size)
        drawn = jax.random.permutation(k, len(found.retain.targets))[:num_retain]
        kept = jax.tree.map(lambda x, n=size - num_retain: x[:n], found.forget)
        added = jax.tree.map(lambda x, rows=drawn: x[rows], found.retain)
        mixed = jax.tree.map(lambda *parts: jnp.concatenate(parts), kept, added)
        numbers = _both(found.apply, found.params, mixed, found.retain, radius)
        rows.append({"share": share} | {name: float(x) for name, x in numbers.items()})
    return rows


@functools.partial(jax.jit, static_argnames="apply")
def _both(apply, params, forget, retain, radius):
    def forget_loss(params):
        return -GA()(apply, params, forget)[0]

    def retain_loss(params):
        return RetainNLL()(apply, params, None, retain)[0]

    forget_at, forget_grads = jax.value_and_grad(forget_loss)(params)
    retain_at, retain_grads = jax.value_and_grad(retain_loss)(params)
    nothing = jax.tree.map(jnp.zeros_like, retain_grads)
    out = {}
    for name, minded in (("uam", nothing), ("rosu", retain_grads)):
        delta, info = retain_neutral_perturbation(forget_grads, minded, radius=radius)
        there = jax.tree.map(jnp.add, params, delta)
        out[f"{name}_retain"] = retain_loss(there) - retain_at
        out[f"{name}_forget"] = forget_loss(there) - forget_at
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(retain_grads)))
    first_order = radius * norm * info.cos
    return out | {"cos": info.cos, "first_order": first_order, "retain": retain_at}


def binned(by_seed: list[list[dict[str, float]]]) -> list[dict]:
    """By range of the cosine, over seeds: what the constraint saves, and what it costs."""
    found = []
    for low, high in zip(EDGES[:-1], EDGES[1:], strict=True):
        saved, kept = [], []
        for rows in by_seed:
            inside = [r for r in rows if low <= r["cos"] < high]
            if inside:
                saved.append(np.mean([r["uam_retain"] - r["rosu_retain"] for r in inside]))
                kept.append(np.mean([r["rosu_forget"] / r["uam_forget"] for r in inside]))
        if len(saved) > 1:
            line = {"from": low, "to": high, "seeds": len(saved)}
            found.append(line | {"saved": interval(saved), "forget_kept": interval(kept)})
    return found


def figure(by_seed: list[list[dict[str, float]]]) -> Figure:
    """Retain loss saved against the cosine, with the first-order prediction."""
    picture = Figure(figsize=(6.5, 4.2), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    for i, rows in enumerate(by_seed):
        rows = sorted(rows, key=lambda r: r["cos"])
        cos = [r["cos"] for r in rows]
        saved = [r["uam_retain"] - r["rosu_retain"] for r in rows]
        label = "measured" if i == 0 else None
        axes.plot(cos, saved, "o", ms=4, mfc="none", color="#1b4f9c", label=label)
        label = "first order, ρ‖g_r‖ cos" if i == 0 else None
        axes.plot(cos, [r["first_order"] for r in rows], "-", lw=0.7, color="#6b6b6b", label=label)
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xlabel("cosine of forget and retain gradient")
    axes.set_ylabel("retain loss at the surrogate,\nunconstrained minus constrained, nats")
    axes.legend(frameon=False)
    return picture


def main() -> None:
    """Run over the seeds and write what came out."""
    options = parser(__doc__, seeds=10)
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--radius", type=float, default=0.05)
    given = options.parse_args()
    by_seed = []
    for seed in range(given.seeds):
        found = digits(seed, epochs=given.epochs)
        by_seed.append(at_surrogates(found, given.radius, key=jax.random.key(1000 + seed)))
    table = binned(by_seed)
    print("| cosine | seeds | retain loss saved, nats | share of the forget gain kept |")
    print("| --- | --- | --- | --- |")
    for line in table:
        bounds = f"{line['from']:g} to {line['to']:g}"
        kept = shown(line["forget_kept"])
        print(f"| {bounds} | {line['seeds']} | {shown(line['saved'])} | {kept} |")
    numbers = {"radius": given.radius, "epochs": given.epochs, "table": table, "by_seed": by_seed}
    path = write("rosu", given.out, numbers)
    save_png(figure(by_seed), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
