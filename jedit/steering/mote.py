"""MoTE (Dahlke et al., arXiv 2502.11096): experts found by what they are chosen for, and switched.

    y = sum_e γ_e g_e E_e(x)        the block's output; γ = 1 is the model, 0 an expert switched off
    score_e = mean of g_e over the tokens of the target rows - its mean over those of the others

    g_e   weight that the router gives expert e for a token, 0 where it is not chosen   (`routed`)
    γ_e   gain

The experts of the highest scores, over all layers together, are what the target behaviour runs
through: of DeepSeek-R1's 14,848, ten switched off cut its refusals of sensitive questions by 40 to
52%.  The gain is one of the expert's last product, so it folds into that product's matrix: no other
expert takes the place of one that is off.

Differences.  Score and gain are the paper's, as the notes have them [notes].  That the activation
is the router's weight after its choice, and not the scores before it or the size of the expert's
output, is ours; so is the mean over all counted tokens, whereas the paper looks at tokens at chosen
places: `Batch.mask` says here which count.  The experts' weights of a token sum to one in every
layer, so that the scores of a layer sum to zero: an expert's high score is others' low one.  The
rule by which a router weighs experts is in no parameter: it is given, and `routed` unless said.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_function, check_params, checked_batches
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, FINITE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import check_contents, counted_outputs
from jedit.core.paths import parameter_paths
from jedit.core.precision import wide
from jedit.models.experts import routed
from jedit.steering.steering import Affine, Steering, run_steered, whole_outputs
from jedit.tracing import Site, Sites, find_sites

# Of a router's outputs (..., experts), bias and all, and the number of chosen experts: the weight
# of each expert for each token, 0 where it is not chosen. Hashable, as it is static to a program.
Gates = Callable[[Array, int], Array]
ROUTER, DOWN = r"^(?:(.*)/)?router/kernel$", r"down(?:_proj)?$"


class ExpertSite(NamedTuple):
    """One product that leaves experts, such as the one of all of a layer's.

    Attributes:
        name: the site's name, as `find_sites` prints it.
        experts: which expert each of the site's layers is.
        width: number of its units.
    """

    name: str
    experts: tuple[int, ...]
    width: int


class ExpertLayer(NamedTuple):
    """One mixture of experts of a model.

    Attributes:
        router: the site of the scores of all experts.
        down: the sites of what the experts put out, each expert's once.
        number: number of experts.
        chosen: number of experts that a token is sent to.
    """

    router: str
    down: tuple[ExpertSite, ...]
    number: int
    chosen: int


class Expert(NamedTuple):
    """One expert: its layer's name, and its number there."""

    layer: str
    number: int


def expert_layers(
    apply: Callable, params: PyTree, inputs: PyTree, *, chosen: int
) -> dict[str, ExpertLayer]:
    """Find the mixtures of experts of a `gpt`, or of a Qwen 3 folder that `load_model` read.

    A mixture is a parameter "<layer>/router/kernel" with one beside it, "<layer>/down" or
    "<layer>/down_proj", that leads with the experts. Whether the program multiplies the experts'
    matrices at once or one by one does not matter; a program that sorts tokens and multiplies
    ragged groups has no sites, and is refused.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: the parameters.
        inputs: inputs of the shape that it is called on; none is read.
        chosen: number of experts that a token is sent to, which no parameter tells.

    Returns:
        The mixtures by their names, in the program's order.

    Raises:
        ValueError: there are none, more experts are chosen than there are, or an expert's output is
            not covered; as in `find_sites`.
    """
    check_numbers(COUNT, chosen=chosen)
    sites = find_sites(apply, params, inputs)
    found = {}
    for name, site in sites.items():
        match = re.match(ROUTER, name)
        if match is None:
            continue
        number = site.weight.d_out
        if site.weight.layers > 1:
            raise ValueError(f"{name} is stacked over layers; write the blocks one after the other")
        if chosen > number:
            raise ValueError(f"{chosen} experts cannot be chosen of the {number} of {name}")
        layer = match[1] or ""
        down = _down(sites, layer, number)
        found[layer] = ExpertLayer(name, down, number, chosen)
    if not found:
        raise ValueError(
            "there is no mixture of experts: no site of a parameter called router/kernel is among "
            f"{list(sites)[:12]}, and what is not covered is {sites.uncovered}"
        )
    return found


def expert_scores(
    apply: Apply,
    params: PyTree,
    layers: Mapping[str, ExpertLayer],
    target: Iterable[Batch] | Batch,
    others: Iterable[Batch] | Batch,
    *,
    gates: Gates = routed,
) -> dict[str, Float[np.ndarray, " experts"]]:
    """Return how much more each expert is used by the target rows than by others.

    Args:
        apply: a pure function `apply(params, inputs) -> logits`.
        params: the parameters.
        layers: what `expert_layers` found.
        target: rows that show the behaviour, refusals for example; the positions in `mask` and
            `valid` count, all of a batch that has neither.
        others: rows that do not.
        gates: how the model's routers weigh the experts, as in `expert_use`.

    Returns:
        By layer the scores of its experts, in float64; with `routed` they are from -1 to 1, and a
        layer's sum to zero.

    Raises:
        ValueError: a set counts no position.
    """
    used = [expert_use(apply, params, layers, rows, gates=gates) for rows in (target, others)]
    return {name: used[0][name] - used[1][name] for name in layers}


def expert_use(
    apply: Apply,
    params: PyTree,
    layers: Mapping[str, ExpertLayer],
    batches: Iterable[Batch] | Batch,
    *,
    gates: Gates = routed,
) -> dict[str, Float[np.ndarray, " experts"]]:
    """Return the mean weight that each expert has over the counted tokens of all rows.

    Args:
        apply: a pure function `apply(params, inputs) -> logits`.
        params: the parameters.
        layers: what `expert_layers` found.
        batches: the rows. Costs one forward pass.
        gates: `(a router's outputs, number of chosen experts) -> weights`, as the model itself has
            it; `routed`, the softmax of the chosen ones, is that of `gpt` and of Qwen 3. A router
            with sigmoid gates, for example, needs its own rule here.

    Raises:
        ValueError: no position counts.
    """
    check_function(apply)
    check_params(params)
    static = tuple(layers.items())
    parts = []
    for number, batch in enumerate(checked_batches(batches)):
        check_contents(batch, f"batch {number}", must_count=False)
        parts.append(_sums(apply, static, gates, params, batch))
    totals, counts = zip(*jax.device_get(parts), strict=True) if parts else ((), ())
    count = sum(map(int, counts))
    if count == 0:
        raise ValueError("no position counts: there are no rows, or mask and valid leave out all")
    return {name: np.sum([t[name] for t in totals], axis=0, dtype=float) / count for name in layers}


def top_experts(scores: Mapping[str, Float[np.ndarray, " experts"]], number: int) -> list[Expert]:
    """Return the experts of the highest scores over all layers, the highest first.

    Raises:
        ValueError: more are asked for than there are.
    """
    check_numbers(COUNT, number=number)
    named = [(Expert(layer, i), x) for layer, part in scores.items() for i, x in enumerate(part)]
    if number > len(named):
        raise ValueError(f"{number} experts were asked for, and there are {len(named)}")
    return [expert for expert, _ in sorted(named, key=lambda pair: -pair[1])[:number]]


def switch_experts(
    layers: Mapping[str, ExpertLayer], experts: Iterable[Expert], *, gain: float | Array = 0.0
) -> Steering:
    """Return the steering that multiplies what some experts put out, and leaves the others.

    Args:
        layers: what `expert_layers` found.
        experts: the experts to switch, such as `top_experts` returns.
        gain: γ; 0.0 switches them off, the paper's, and more than 1 makes them stronger.

    Returns:
        A steering for `steered`, or for `fold` into the matrices.

    Raises:
        ValueError: an expert is none of the layers', or the gain is not finite.
    """
    check_numbers(FINITE, gain=gain)
    chosen: dict[str, set[int]] = {}
    for layer, number in experts:
        if layer not in layers or not 0 <= number < layers[layer].number:
            raise ValueError(
                f"there is no expert {number} in {layer!r}; the layers are "
                f"{ {name: one.number for name, one in layers.items()} }"
            )
        chosen.setdefault(layer, set()).add(number)
    maps = {}
    for layer, numbers in chosen.items():
        for site in layers[layer].down:
            is_switched = np.array([expert in numbers for expert in site.experts])
            if is_switched.any():
                gains = jnp.where(is_switched[:, None], jnp.asarray(gain), 1)
                maps[site.name] = Affine(gain=jnp.broadcast_to(gains, (len(gains), site.width)))
    return Steering(maps)


def _down(sites: Sites, layer: str, number: int) -> tuple[ExpertSite, ...]:
    """Return the sites of the experts' outputs, by which expert each is.

    Raises:
        ValueError: an expert has none, or several.
    """
    prefix = f"{layer}/" if layer else ""
    pattern = re.compile(re.escape(prefix) + DOWN)
    found = []
    for site in sites.values():
        if site.kind == "dense" and pattern.fullmatch(site.path) and len(site.weight.shape) == 3:
            found.append(ExpertSite(site.name, _experts_of(site), site.weight.d_out))
    seen = sorted(expert for site in found for expert in site.experts)
    if seen != list(range(number)):
        reasons = {p: why for p, why in sites.uncovered.items() if p.startswith(prefix)}
        raise ValueError(
            f"{layer!r} has a router of {number} experts, and the products that leave its experts "
            f"are of {seen}, each of which should stand there once; not covered: {reasons}"
        )
    return tuple(found)


def _experts_of(site: Site) -> tuple[int, ...]:
    """Return which entry of the leaf's first axis each of the site's matrices is.

    Raises:
        ValueError: a matrix is of several.
    """
    places = site.weight.places(0)
    first, last = places.min(axis=(1, 2)), places.max(axis=(1, 2))
    if not np.array_equal(first, last):
        raise ValueError(f"{site.name} reads a matrix that is of several experts")
    return tuple(int(i) for i in np.broadcast_to(first, site.weight.layers))


@on_auto_axes
@partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(
    apply: Apply,
    layers: tuple[tuple[str, ExpertLayer], ...],
    gates: Gates,
    params: PyTree,
    batch: Batch,
) -> tuple[dict[str, Array], Array]:
    """Return each layer's sum of weights over the counted positions, and their number."""
    still = Steering({one.router: Affine() for _, one in layers})
    run = run_steered(apply, params, batch.inputs, still)
    scores = whole_outputs(run, dict(parameter_paths(params)))
    lead = run.outputs.shape[:-1]
    counted = counted_outputs(batch, lead)
    totals = {}
    for name, one in layers:
        weights = gates(wide(scores[one.router][0]), one.chosen)
        kept = jnp.where(counted[..., None], weights.reshape(*lead, one.number), 0)
        totals[name] = kept.sum(axis=tuple(range(len(lead))))
    return totals, jnp.sum(counted)
