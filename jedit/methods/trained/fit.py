"""FIT: filter, importance, targeted layers, for requests that keep coming (arXiv 2601.21682).

    filter       a request is new if cos(e, e_k) <= τ for every request k kept so far, or else if
                 |L(those like it, and it) - L(those like it)| > ε        `distinct_requests`
    importance   IMP(x) = ‖∂L(x) / ∂h₀‖, h₀ the embedding's outputs        `gradient_importance`
                 low: random label; middle: NPO; high: NPO + KL            `objectives.FIT`
    targets      the 8 layers l with the largest |L_masked(l) - L|        `influential_layers`

    L         mean NLL, of a row its tokens'
    e         a request's embedding, any                                  `embeddings`
    τ, ε      `similarity`, `tolerance`

Differences.  The three parts, their quantities and the number of layers are the paper's [notes];
its thresholds are not in what we have.  τ = 0.9, ε = 0.05 nats and terciles of the given rows
between low, middle and high are arbitrary; a lone row is middle.  L is the mean loss under the
model as it is, of the kept requests with a cosine above τ [derived]: of all kept ones, one odd
request would let every later one pass.  A layer is masked by setting its parameters to zero
[derived].  A block of a transformer with norms before its matrices then adds nothing to the
residual stream, so that it is skipped; what it makes of other networks is no skip: with norms after
them, or in a convolutional net, a masked layer puts out zeros.  Blocks whose parameters are
stacked, for a scan, are one layer, and without numbers in the paths every parameter is one.  Only
parameters of the chosen layers are trained: of a model with eight layers or fewer, all of them, and
the embedding and the head are not.  Inputs that are no tokens are their own embeddings.

In a stream, each request passes the filter, is graded and forgotten from where the last one ended:

    is_new = distinct_requests(embeddings, losses)
    method = fit_unlearning(apply, params, rows, optimizer)
    params, _ = jedit.unlearn(method, apply, params, graded_rows(apply, params, rows), retain, ...)

`requests.continual` takes lists of row numbers: what `distinct_requests` keeps of them.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, FINITE, NOT_NEGATIVE, Range, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import by_example
from jedit.core.paths import parameter_paths
from jedit.core.precision import wide
from jedit.core.row_blocks import cut, num_blocks
from jedit.objectives import FIT, GradedRows, Importance, Objective, relabel
from jedit.objectives.token_nll import counted_nll, masked_mean, nll_of
from jedit.tracing import find_sites
from jedit.tracing.pullback import run_capture
from jedit.training.method import TrainingMethod

COSINE = Range(-1, 1)
NUMBERED = re.compile(r"^(.*?(?:^|/)\d+)/")


def distinct_requests(
    embeddings: Float[np.ndarray | Array, "..."],
    losses: Float[np.ndarray | Array, "..."],
    *,
    similarity: float = 0.9,
    tolerance: float = 0.05,
) -> Bool[np.ndarray, " n"]:
    """Return which requests of a stream are to be answered: not those that repeat a kept one.

    Args:
        embeddings: (n, width), one for each request, in the stream's order: averaged hidden states,
            say.
        losses: (n,), mean loss of each request under the model, nats per token.
        similarity: τ, the cosine up to which no two requests are taken for one; 0.9 is arbitrary.
        tolerance: ε, how far a request may move the mean loss of those like it and still be left
            out, nats per token; 0.05 is arbitrary.

    Raises:
        ValueError: a number out of its range, or not one embedding and loss for each request.
    """
    check_numbers(COSINE, similarity=similarity)
    check_numbers(NOT_NEGATIVE, tolerance=tolerance)
    vectors, losses = np.asarray(embeddings, np.float64), np.asarray(losses, np.float64)
    if vectors.ndim != 2 or losses.shape != vectors.shape[:1]:
        raise ValueError(
            f"expected embeddings (n, width) and n losses, got {vectors.shape} and {losses.shape}"
        )
    check_numbers(FINITE, embeddings=vectors, losses=losses)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.where(norms > 0, norms, 1)
    kept: list[int] = []
    for i, unit in enumerate(units):
        like = [k for k in kept if units[k] @ unit > similarity]
        if like and abs(np.mean(losses[[*like, i]]) - np.mean(losses[like])) <= tolerance:
            continue
        kept.append(i)
    return np.isin(np.arange(len(units)), kept)


@on_auto_axes
def gradient_importance(apply: Apply, params: PyTree, batch: Batch) -> Float[Array, " n"]:
    """Return IMP of each row: the norm of its loss's gradient where it has just been embedded.

    One forward pass and one backward pass without weight gradients, in blocks of rows where the
    outputs are large. Of a model without a token embedding it is the gradient at the inputs. A row
    that counts nothing has 0.

    Raises:
        ValueError: the batch has no targets, or is packed.
    """
    check_batch(batch, "the batch")
    batch = jax.tree.map(jnp.asarray, batch)
    number = num_blocks(jax.eval_shape(apply, params, batch.inputs))
    if number == 1:
        return _importance(apply, params, batch)
    parts = cut(batch, number)
    found = [
        _importance(apply, params, jax.tree.map(lambda x, j=j: x[j], parts)) for j in range(number)
    ]
    return jnp.stack(found, axis=1).reshape(-1)  # the rows in their order again


@functools.partial(jax.jit, static_argnums=0)
def _importance(apply: Apply, params: PyTree, batch: Batch) -> Float[Array, " n"]:
    def loss(outputs: Array) -> Array:
        nll, counted = nll_of(outputs, batch)
        number = jnp.maximum(jnp.sum(by_example(batch, counted), axis=1), 1)
        return jnp.sum(jnp.sum(by_example(batch, nll), axis=1) / number.astype(nll.dtype))

    if jnp.issubdtype(jnp.result_type(*jax.tree.leaves(batch.inputs)), jnp.inexact):
        gradient = jax.grad(lambda inputs: loss(apply(params, inputs)))(batch.inputs)
        leaves = jax.tree.leaves(gradient)
    else:
        sites = find_sites(apply, params, batch.inputs).values()
        tables = [site for site in sites if site.kind == "embedding"]
        if not tables:
            raise ValueError("the model has no embedding site, at whose outputs IMP is measured")
        # Positions may have a table too, which is shorter.
        site = max(tables, key=lambda site: site.weight.rows)
        captured = run_capture(apply, params, batch.inputs, f"^{re.escape(site.path)}$")
        leaves = [captured.pullback(jax.grad(loss)(captured.outputs))[site.name]]
    squares = [jnp.sum(jnp.square(wide(x)).reshape(len(x), -1), axis=1) for x in leaves]
    return jnp.sqrt(sum(squares[1:], squares[0]))


@on_auto_axes
def graded_rows(apply: Apply, params: PyTree, batch: Batch, *, key: Key[Array, ""]) -> GradedRows:
    """Return forget rows as `objectives.FIT` takes them: a third of each importance.

    The thirds are of the rows that count anything; of equal ones, a lone one too, all are middle.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the parameters, where IMP is measured.
        batch: the rows to forget.
        key: the random key of the labels that unimportant rows get.

    Raises:
        ValueError: the batch has no targets, or is packed, or an importance is not finite.
    """
    rows = jax.tree.map(jnp.asarray, batch)
    measured = np.asarray(gradient_importance(apply, params, rows))
    check_numbers(FINITE, importance=measured)
    importance = np.full(measured.shape, int(Importance.MIDDLE))
    # A row that counts nothing has no gradient, and none of the thirds.
    if (among := measured[measured > 0]).size and among.min() < among.max():
        low, high = np.quantile(among, [1 / 3, 2 / 3])
        importance = np.where(measured > high, Importance.HIGH, importance)
        is_low = (measured <= low) & (measured > 0)
        importance = np.where(is_low, Importance.LOW, importance)
    num_classes = jax.eval_shape(apply, params, rows.inputs).shape[-1]
    taught = relabel(rows, num_classes, key=key)
    assert taught.targets is not None
    return GradedRows(rows, taught.targets, jnp.asarray(importance, jnp.int32))


@on_auto_axes
def influential_layers(
    apply: Apply, params: PyTree, batch: Batch, *, layers: int = 8
) -> tuple[str, ...]:
    """Return the layers without which the loss changes most, the one that matters most first.

    Costs a forward pass for each layer. A layer is what has one number in its path, as
    "blocks/3/"; in a model without numbers, each parameter is one.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the parameters.
        batch: rows whose loss is looked at, those to forget.
        layers: how many layers to return, at most; 8, the paper's.

    Returns:
        The paths with which the layers' parameters begin.

    Raises:
        ValueError: the loss of the rows is not finite.
    """
    check_numbers(COUNT, layers=layers)
    names = [_layer_of(path) for path, _ in parameter_paths(params)]
    found = list(dict.fromkeys(name for name in names if name is not None))
    places = [-1 if name is None else found.index(name) for name in names]
    number = jax.tree.unflatten(jax.tree.structure(params), places)
    if not found:
        paths = [path for path, _ in parameter_paths(params)]
        found, number = paths, jax.tree.unflatten(jax.tree.structure(params), range(len(paths)))
    rows = jax.tree.map(jnp.asarray, batch)
    losses = [float(_masked_loss(apply, params, rows, number, i)) for i in (-2, *range(len(found)))]
    check_numbers(FINITE, loss=losses[0])
    effects = np.abs(np.array(losses[1:]) - losses[0])
    # What a masked layer makes of the loss may be no number, and then it matters.
    order = np.argsort(-np.nan_to_num(effects, nan=np.inf), kind="stable")
    return tuple(found[i] for i in order[:layers])


def fit_unlearning(
    apply: Apply,
    params: PyTree,
    forget: Batch,
    optimizer: optax.GradientTransformation,
    *,
    layers: int = 8,
    objective: Objective = FIT(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make FIT's training of the layers that the rows to forget stand on.

        method = fit_unlearning(apply, params, rows, optax.adam(1e-4))
        graded = graded_rows(apply, params, rows, key=key)
        params, history = jedit.unlearn(method, apply, params, graded, retain, steps=100, key=key)

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the parameters before unlearning.
        forget: the rows to forget, by which layers are chosen.
        optimizer: the optimizer.
        layers: how many layers are trained, at most; 8, the paper's.
        objective: what is lowered, on `GradedRows`.

    Returns:
        A method for `jedit.unlearn`, whose forget set is `graded_rows` of the rows.
    """
    chosen = influential_layers(apply, params, forget, layers=layers)
    names = "|".join(re.escape(name) for name in sorted(chosen))
    return TrainingMethod(objective, optimizer, trainable=rf"^(?:{names})(?:/|$)")


def _layer_of(path: str) -> str | None:
    found = NUMBERED.match(path)
    return None if found is None else found[1]


@functools.partial(jax.jit, static_argnums=0)
def _masked_loss(
    apply: Apply, params: PyTree, batch: Batch, number: PyTree, masked: Array
) -> Float[Array, ""]:
    """Return the mean loss with the parameters of one layer at zero."""
    given = jax.tree.map(lambda p, i: jnp.where(i == masked, jnp.zeros_like(p), p), params, number)
    nll, counted = counted_nll(apply, given, batch)
    return masked_mean(nll, counted)
