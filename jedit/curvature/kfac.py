"""Kronecker-factored approximate curvature (Martens & Grosse 2015; sharing after Eschenhagen 2023).

    A = E[a aᵀ]     over valid positions              (bias: a's last coordinate is one)
    G = (1/M) Σ_n Σ_s g gᵀ                            sharing="expand"
    A = E[ā āᵀ], G = (1/M) Σ_n ĝ ĝᵀ, ā mean, ĝ sum    sharing="reduce", over an example's positions

g is the gradient of the summed loss at the site's output, M the number of unmasked outputs, so that
A ⊗ G approximates a block of the Gauss-Newton matrix of the *mean* loss. Norm gains and other vectors
get the exact diagonal instead. A parameter used at several sites gets the Kronecker product that has
the sum's two partial traces: A ∝ Σ_k A_k tr G_k, G ∝ Σ_k G_k tr A_k, with the sum's own trace.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jedit.capture import Site
from jedit.capture.capture import scatter_rows
from jedit.curvature.blocks import Curvature, Diagonal, Factor, Kronecker
from jedit.curvature.estimator import Estimator
from jedit.curvature.factorize import check_finite, factorize
from jedit.curvature.grouping import Block, Member, group_sites
from jedit.curvature.likelihoods import Likelihood
from jedit.curvature.moments import add_moment, symmetrize
from jedit.curvature.scores import Pass, is_matched, run_pass
from jedit.curvature.squares import add_squared_gradients

PADDING_HINT = (
    "its positions cannot be matched with the outputs' leading shape, and some batch has padding "
    "(a zero in `valid`); leave the parameter out by `select`, or give batches without padding"
)


@dataclasses.dataclass(frozen=True)
class KfacState:
    """Sums over batches; states of disjoint data merge by adding them leaf by leaf.

    Attributes:
        moments: by input group, Σ a aᵀ (layers, d, d), lower block triangle, or its diagonal.
        sums: by input group, Σ a (layers, d): the bias's off-diagonal part of A.
        counts: by input group, the positions summed (layers,), int32.
        outputs: by site, Σ g gᵀ (layers, d, d), lower block triangle, or its diagonal.
        squares: by block of a vector parameter, Σ_n (∂ℓ_n)² (layers, 1, d).
        num_outputs: M, int32.
        num_examples: the running example number, int32.
        blocks: static.
        draws: static; how many pullbacks a batch's gradients are the mean of.
    """

    moments: dict[str, Array]
    sums: dict[str, Array]
    counts: dict[str, Array]
    outputs: dict[str, Array]
    squares: dict[str, Array]
    num_outputs: Array
    num_examples: Array
    blocks: tuple[Block, ...]
    draws: int


jax.tree_util.register_dataclass(
    KfacState,
    data_fields=[f.name for f in dataclasses.fields(KfacState)][:-2],
    meta_fields=["blocks", "draws"],
)


def kfac(
    apply: Callable,
    likelihood: Likelihood,
    *,
    select=None,
    fisher: str = "sampled",
    samples: int = 1,
    sharing: str = "expand",
    max_dim: int = 16384,
) -> Estimator:
    """K-FAC of the mean output loss.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`.
        likelihood: what the outputs mean, e.g. `Categorical()`.
        select: regular expression, or several, on parameter paths; None: all that can be captured.
        fisher: labels "sampled" from the model (the Gauss-Newton matrix of the output KL), "exact"
            (all classes of every output: as many backward passes), or "empirical" (given targets).
        samples: draws of labels a batch, for "sampled".
        sharing: "expand" or "reduce" over an example's positions.
        max_dim: longest axis that gets a dense factor; longer ones (vocabularies) a diagonal one.

    Returns:
        The estimator. A pass costs one forward, one activation-backward pass and the moments,
        d_in² + d_out² multiply-adds a position and site (about half of that for large d); its state
        takes the factors' size.

    Raises:
        ValueError: an unknown `sharing`.
    """
    if sharing not in ("expand", "reduce"):
        raise ValueError(f'sharing must be "expand" or "reduce", got {sharing!r}')

    def run(params, batch, key, first) -> Pass:
        options = {"select": select, "fisher": fisher, "samples": samples}
        return run_pass(apply, likelihood, params, batch, key, first, **options)

    def init(params, batch):
        check_padding(run, params, batch)
        shape = jax.eval_shape(lambda p, b: accumulate(None, p, b, jax.random.key(0)), params, batch)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)

    def update(state, params, batch, key):
        return accumulate(state, params, batch, key)

    def accumulate(state, params, batch, key):
        first = jnp.zeros((), jnp.int32) if state is None else state.num_examples
        done = run(params, batch, key, first)
        sites = done.captured.sites
        matched = {name: is_matched(site, done.lead) for name, site in sites.items()}
        blocks = group_sites(sites, matched)
        old = state or KfacState({}, {}, {}, {}, {}, 0, 0, blocks, 0)
        moments, sums, counts = {}, {}, {}
        for block in blocks:
            for member in block.members:
                group = str(member.group)
                if block.is_diagonal or group in moments:
                    continue
                site = sites[member.site]
                sums_of = _input_sums(done, site, old, group, sharing, max_dim)
                moments[group], sums[group], counts[group] = sums_of

        def gradients(pulled):
            outputs = {
                m.site: _output_sums(done, sites[m.site], pulled, sharing, max_dim)
                for b in blocks
                if not b.is_diagonal
                for m in b.members
            }
            squares = {
                b.name: add_squared_gradients(done, b, pulled, None) for b in blocks if b.is_diagonal
            }
            return outputs, squares

        outputs, squares = done.sum_over_cotangents(gradients)
        add = lambda new, before: {k: before[k] + v if before else v for k, v in new.items()}  # noqa: E731
        return KfacState(
            moments,
            sums,
            counts,
            add(outputs, old.outputs),
            add(squares, old.squares),
            old.num_outputs + done.num_outputs,
            old.num_examples + jnp.int32(done.lead[0]),
            blocks,
            samples if fisher == "sampled" else 1,
        )

    return Estimator(init, jax.tree_util.Partial(update), _finalize)


def check_padding(run, params, batch) -> None:
    """Refuse a first batch with padding for sites whose padding cannot be told.

    Raises:
        ValueError: such a site is selected; it is named.
    """
    if batch.valid is None or isinstance(batch.valid, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return
    if bool(jnp.all(jnp.asarray(batch.valid).astype(bool))):
        return
    names: list[str] = []

    def look(params, batch):
        done = run(params, batch, jax.random.key(0), jnp.zeros((), jnp.int32))
        names.extend(n for n, s in done.captured.sites.items() if not is_matched(s, done.lead))
        return 0

    jax.eval_shape(look, params, batch)
    if names:
        raise ValueError(f"{', '.join(names)}: {PADDING_HINT}")


def _input_sums(done: Pass, site: Site, old, group, sharing, max_dim):
    """(Σ a aᵀ, Σ a, count) of one input group, added to what was there."""
    a, v = done.inputs(site)
    layers, examples, positions = a.shape[:3]
    counts = jnp.full((layers,), examples * positions, jnp.int32)
    if v is not None:
        counts = jnp.broadcast_to(jnp.sum(v, axis=(1, 2), dtype=jnp.int32), (layers,))
    d = site.weight.d_in
    if site.kind == "embedding":
        return _embedding_sums(done, site, a, v, counts, old, group)
    if sharing == "reduce":
        number = jnp.float32(positions) if v is None else jnp.sum(v, axis=2).astype(jnp.float32)
        number = jnp.broadcast_to(jnp.maximum(number, 1).astype(a.dtype), (layers, examples))
        a = (jnp.sum(a, axis=2) / number[..., None])[:, :, None]
        counts = jnp.full((layers,), examples, jnp.int32)
        if v is not None:
            counts = jnp.broadcast_to(jnp.sum(jnp.any(v, 2), 1, dtype=jnp.int32), (layers,))
    rows = a.reshape(layers, -1, d)
    total = old.moments.get(group)
    if d > max_dim:
        total = jnp.zeros((layers, d), a.dtype) if total is None else total
        total = total + jnp.sum(rows**2, axis=1)
    else:
        total = jnp.zeros((layers, d, d), a.dtype) if total is None else total
        total = add_moment(total, rows)
    sums, number = jnp.sum(rows, axis=1), counts
    if group in old.sums:
        sums, number = sums + old.sums[group], number + old.counts[group]
    return total + done.poison(site), sums, number


def _embedding_sums(done: Pass, site: Site, indices, v, counts, old, group):
    """Token frequencies: the diagonal of the moment of one-hot rows."""
    layers = indices.shape[0]
    ones = jnp.ones(indices.shape, done.dtype)
    ones = ones if v is None else jnp.where(v, ones, 0)
    flat = (indices.reshape(layers, -1), ones.reshape(layers, -1, 1))
    sums = jax.vmap(lambda i, x: scatter_rows(site, i, x))(*flat)[..., 0]
    if group in old.moments:
        sums, counts = sums + old.moments[group], counts + old.counts[group]
    return sums + done.poison(site), sums, counts


def _output_sums(done: Pass, site: Site, pulled, sharing, max_dim) -> Array:
    """Σ g gᵀ, or its diagonal."""
    g = done.gradients(site, pulled)
    if sharing == "reduce":
        g = jnp.sum(g, axis=2, keepdims=True)
    layers, d = g.shape[0], g.shape[-1]
    rows = g.reshape(layers, -1, d)
    if d > max_dim:
        return jnp.sum(rows**2, axis=1)
    return add_moment(jnp.zeros((layers, d, d), g.dtype), rows)


def _finalize(state: KfacState) -> Curvature:
    """Normalise, merge sites of one parameter, decompose; shared factors once."""
    factors: dict[str, Factor] = {}
    blocks = {}
    total = jnp.maximum(state.num_outputs, 1)
    for block in state.blocks:
        if block.is_diagonal:
            values = state.squares[block.name]
            values = values / (total * state.draws).astype(values.dtype)
            hint = "" if all(m.is_matched for m in block.members) else PADDING_HINT
            check_finite(values, block.name, hint)
            blocks[block.name] = Diagonal(block.weight, values)
            continue
        pairs = []
        for member in block.members:
            output = state.outputs[member.site]
            output = output / (total * state.draws).astype(output.dtype)
            g = symmetrize(output) if output.ndim == 3 else output
            pairs.append((_input_factor(state, block, member), g))
        hint = "" if all(m.is_matched for m in block.members) else PADDING_HINT
        if len(pairs) == 1:
            member = block.members[0]
            with_bias = f"+bias*{member.bias_scale}" if block.weight.bias_path else ""
            name = f"input {member.group}{with_bias}*{member.scale}"
            a, g = pairs[0]
        else:
            name = f"input {block.name}"
            flips = [m.is_flipped for m in block.members]
            a, g = _merge([p[::-1] if f else p for p, f in zip(pairs, flips, strict=True)])
        output_name = f"output {block.name}"
        if name not in factors:
            factors[name] = factorize(a, block.name, hint=hint)
        factors[output_name] = factorize(g, block.name, hint=hint)
        blocks[block.name] = Kronecker(block.weight, name, output_name)
    return Curvature(blocks, factors, state.num_outputs)


def _input_factor(state: KfacState, block: Block, member: Member) -> Array:
    """A of one site, its homogeneous coordinate included."""
    group = str(member.group)
    moment, count = state.moments[group], jnp.maximum(state.counts[group], 1)
    if moment.ndim == 2:
        count = count.astype(moment.dtype)[:, None]
        diagonal = moment / count * member.scale**2
        if block.weight.bias_path is None:
            return diagonal
        ones = jnp.full((len(moment), 1), member.bias_scale**2, moment.dtype)
        return jnp.concatenate([diagonal, ones], axis=1)
    count = count.astype(moment.dtype)[:, None, None]
    a = symmetrize(moment) / count * member.scale**2
    if block.weight.bias_path is None:
        return a
    mean = state.sums[group] / count[..., 0] * (member.scale * member.bias_scale)
    ones = jnp.full((len(a), 1), member.bias_scale**2, a.dtype)
    last = jnp.concatenate([mean, ones], axis=1)[:, None]
    return jnp.concatenate([jnp.concatenate([a, mean[..., None]], axis=2), last], axis=1)


def _merge(pairs: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The Kronecker product with the partial traces of a sum of Kronecker products."""

    def trace_of(x):
        return jnp.sum(x if x.ndim == 2 else jnp.diagonal(x, axis1=1, axis2=2), axis=-1)

    def weighted(matrices, weights):
        if any(m.ndim == 3 for m in matrices):
            eye = jnp.eye(matrices[0].shape[1], dtype=matrices[0].dtype)
            matrices = [m if m.ndim == 3 else m[..., None] * eye[None] for m in matrices]
        shape = (-1, *(1 for _ in matrices[0].shape[1:]))
        return sum(m * w.reshape(shape) for m, w in zip(matrices, weights, strict=True))

    traces = [(trace_of(a), trace_of(g)) for a, g in pairs]
    whole = sum(a * g for a, g in traces)
    whole = jnp.where(whole > 0, whole, 1)
    a = weighted([p[0] for p in pairs], [g / whole for _, g in traces])
    g = weighted([p[1] for p in pairs], [a for a, _ in traces])
    return a, g


def merge_states(states: Mapping | list) -> KfacState:
    """The state of the union of disjoint data: the sum of states."""
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *states)
