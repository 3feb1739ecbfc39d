"""The distribution a network's outputs stand for: its loss, its score and its Hessian.

Outputs `z` are an array whose last axis is the *event* (the classes, or the features of one
prediction) and whose other axes, the *lead*, are the outputs that a mask counts: `(batch,)` for a
classifier, `(batch, seq)` for a language model.  Every method works output by output and ignores
masks; zeroing what a mask leaves out is the caller's part, who also knows the normalisation.

Arithmetic is done in float32 or wider.  Cotangents and Hessian products come back in the dtype of
the outputs, because they are fed to a `vjp`; losses and divergences keep the wide one.

    z   outputs               s(z)  softmax or sigmoid of z / T
    T   temperature           p     s(z), the model's own probabilities
    H   Hessian of the negative log-likelihood in z; also the Fisher information of the output, and
        the second derivative of KL(p(z) || p(z + d)) in d at d = 0
"""

import abc
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import register_static
from jaxtyping import Array, Float, Int, Key

from jedit.core.arguments import check_kind, check_labels
from jedit.core.checks import POSITIVE, check_numbers
from jedit.core.outputs import Limits, kl_terms
from jedit.core.precision import wide


class Likelihood(abc.ABC):
    """An output distribution, as far as curvature needs it; subclass it to bring your own.

    Instances are frozen, hashable and static in a pytree: they can be arguments of `jax.jit` or be
    closed over.
    """

    def lead_shape(self, outputs: Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
        """Return the shape that masks and losses have: all axes of the outputs but the last.

        Raises:
            ValueError: if the outputs are not real numbers with at least one axis, or the last of
                them is empty.
        """
        if outputs.ndim == 0 or not jnp.issubdtype(outputs.dtype, jnp.floating):
            raise ValueError(
                f"{type(self).__name__} needs real outputs with an event axis, (..., classes or "
                f"features), got {outputs.dtype}{list(outputs.shape)}; z[..., None] adds the axis"
            )
        if outputs.shape[-1] == 0:
            raise ValueError(
                f"the outputs have shape {outputs.shape}: no classes or features on the last axis"
            )
        return outputs.shape[:-1]

    @abc.abstractmethod
    def nll(self, outputs: Array, targets: Array) -> Array:
        """Return the negative log-likelihood of `targets`, in nats, of the lead shape."""

    @abc.abstractmethod
    def noise(
        self, outputs: Array, example_ids: Int[Array, " batch"], *, key: Key[Array, ""]
    ) -> Array:
        """Return the randomness of one draw of labels, a function of each example's id alone."""

    @abc.abstractmethod
    def sampled_cotangent(self, outputs: Array, noise: Array) -> Array:
        """Return the gradient of `nll` in the outputs at labels drawn from the model itself."""

    @abc.abstractmethod
    def empirical_cotangent(self, outputs: Array, targets: Array) -> Array:
        """Return the gradient of `nll` in the outputs at the given labels."""

    @abc.abstractmethod
    def exact_cotangent(self, outputs: Array, index: int | Array) -> Array:
        """Return column `index` of a square root of H: the sum over columns of c cᵀ is H."""

    @abc.abstractmethod
    def hessian_product(self, outputs: Array, tangent: Array) -> Array:
        """Return H times `tangent`, output by output."""

    @abc.abstractmethod
    def kl(self, outputs: Array, other_outputs: Array) -> Array:
        """Return KL(p || q) in nats, of the lead shape; p is read off the first argument."""

    def label_limits(self, outputs: Array | jax.ShapeDtypeStruct) -> Limits | None:
        """Return the lowest and the highest label; None: any number is one."""
        del outputs
        return None

    def num_columns(self, outputs: Array) -> int:
        """Return how many columns `exact_cotangent` has."""
        return outputs.shape[-1]


@register_static
@dataclass(frozen=True)
class Categorical(Likelihood):
    """One label out of the classes of the last axis, with logits `z / temperature`.

    A temperature above one keeps the Fisher information alive where the model is saturated, which a
    memorised model is everywhere.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a temperature that is not positive and finite."""
        check_numbers(POSITIVE, temperature=self.temperature)

    def label_limits(self, outputs: Array | jax.ShapeDtypeStruct) -> Limits:
        """Return the first class and the last."""
        return 0, outputs.shape[-1] - 1

    def nll(self, outputs: Array, targets: Int[Array, "..."]) -> Array:
        """Return logsumexp(z / T) - z_y / T."""
        _check_shape(targets, self.lead_shape(outputs), "Categorical targets (one per output)")
        check_labels(targets, "Categorical targets")
        logits = wide(outputs) / self.temperature
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    def noise(
        self, outputs: Array, example_ids: Int[Array, " batch"], *, key: Key[Array, ""]
    ) -> Array:
        """Return one uniform number per output."""
        return _per_example(jax.random.uniform, self.lead_shape(outputs), outputs, example_ids, key)

    def sampled_cotangent(self, outputs: Array, noise: Float[Array, "..."]) -> Array:
        """Return (s(z) - e_y) / T, y drawn by inverting the distribution function at `noise`.

        The unnormalised probabilities that locate the label are those the softmax needs anyway, so
        a draw costs little more than the softmax itself.
        """
        _check_shape(noise, self.lead_shape(outputs), "Categorical noise (one uniform per output)")
        weights = _unnormalised(wide(outputs) / self.temperature)
        labels = _inverse_cdf(weights, noise.astype(weights.dtype))
        probabilities = weights / jnp.sum(weights, axis=-1, keepdims=True)
        score = (probabilities - _one_hot(labels, weights)) / self.temperature
        return score.astype(outputs.dtype)

    def empirical_cotangent(self, outputs: Array, targets: Int[Array, "..."]) -> Array:
        """Return (s(z) - e_y) / T."""
        _check_shape(targets, self.lead_shape(outputs), "Categorical targets (one per output)")
        check_labels(targets, "Categorical targets")
        p = self._probabilities(outputs)
        return ((p - _one_hot(targets, p)) / self.temperature).astype(outputs.dtype)

    def exact_cotangent(self, outputs: Array, index: int | Array) -> Array:
        """Return sqrt(p_k) (p - e_k) / T: the score of class k, weighted by its frequency."""
        p = self._probabilities(outputs)
        labels = jnp.broadcast_to(jnp.asarray(index), self.lead_shape(outputs))
        p_k = jnp.take_along_axis(p, labels[..., None], axis=-1)
        score = jnp.sqrt(p_k) * (p - _one_hot(labels, p)) / self.temperature
        return score.astype(outputs.dtype)

    def hessian_product(self, outputs: Array, tangent: Array) -> Array:
        """Return (diag(p) - p pᵀ) t / T², as p times the tangent less its mean under p."""
        p, t = self._probabilities(outputs), wide(tangent)
        # Centred before it is weighted: the two terms nearly cancel where p is nearly one label.
        centred = t - jnp.sum(p * t, axis=-1, keepdims=True)
        return (p * centred / self.temperature**2).astype(outputs.dtype)

    def kl(self, outputs: Array, other_outputs: Array) -> Array:
        """Return the sum over classes of p log(p / q)."""
        z, other = wide(outputs) / self.temperature, wide(other_outputs) / self.temperature
        # Summing p log p/q as it stands would lose a small KL; these terms are never negative.
        terms = kl_terms(jax.nn.log_softmax(z, axis=-1), jax.nn.log_softmax(other, axis=-1))
        return jnp.sum(terms, axis=-1)

    def _probabilities(self, outputs: Array) -> Array:
        return jax.nn.softmax(wide(outputs) / self.temperature, axis=-1)


@register_static
@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Independent normal features on the last axis, of mean `z` and standard deviation `scale`."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a scale that is not positive and finite."""
        check_numbers(POSITIVE, scale=self.scale)

    def nll(self, outputs: Array, targets: Float[Array, "..."]) -> Array:
        """Return ½‖(z - y) / scale‖² plus the normalising constant, summed over the features."""
        _check_shape(targets, outputs.shape, "Gaussian targets (one per feature)")
        residual = (wide(outputs) - targets.astype(wide(outputs).dtype)) / self.scale
        constant = outputs.shape[-1] * math.log(self.scale * math.sqrt(2 * math.pi))
        return 0.5 * jnp.sum(residual**2, axis=-1) + constant

    def noise(
        self, outputs: Array, example_ids: Int[Array, " batch"], *, key: Key[Array, ""]
    ) -> Array:
        """Return one standard normal number per feature."""
        self.lead_shape(outputs)
        return _per_example(jax.random.normal, outputs.shape, outputs, example_ids, key)

    def sampled_cotangent(self, outputs: Array, noise: Float[Array, "..."]) -> Array:
        """Return (z - y) / scale² at y = z + scale · noise, which is -noise / scale."""
        _check_shape(noise, outputs.shape, "Gaussian noise (one normal per feature)")
        return (-wide(noise) / self.scale).astype(outputs.dtype)

    def empirical_cotangent(self, outputs: Array, targets: Float[Array, "..."]) -> Array:
        """Return (z - y) / scale²."""
        _check_shape(targets, outputs.shape, "Gaussian targets (one per feature)")
        residual = wide(outputs) - targets.astype(wide(outputs).dtype)
        return (residual / self.scale**2).astype(outputs.dtype)

    def exact_cotangent(self, outputs: Array, index: int | Array) -> Array:
        """Return e_k / scale."""
        labels = jnp.broadcast_to(jnp.asarray(index), self.lead_shape(outputs))
        return (_one_hot(labels, wide(outputs)) / self.scale).astype(outputs.dtype)

    def hessian_product(self, outputs: Array, tangent: Array) -> Array:
        """Return t / scale²."""
        return (wide(tangent) / self.scale**2).astype(outputs.dtype)

    def kl(self, outputs: Array, other_outputs: Array) -> Array:
        """Return ½‖(z - z') / scale‖²."""
        difference = (wide(outputs) - wide(other_outputs)) / self.scale
        return 0.5 * jnp.sum(difference**2, axis=-1)


@register_static
@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent yes-or-no features on the last axis, with logits `z / temperature`.

    Targets lie in [0, 1] and have the outputs' whole shape; the loss sums over the features.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a temperature that is not positive and finite."""
        check_numbers(POSITIVE, temperature=self.temperature)

    def label_limits(self, outputs: Array | jax.ShapeDtypeStruct) -> Limits:
        """Return no and yes; what lies between is a probability of yes."""
        del outputs
        return 0, 1

    def nll(self, outputs: Array, targets: Array) -> Array:
        """Return the sum over features of -y log p - (1 - y) log(1 - p)."""
        _check_shape(targets, outputs.shape, "Bernoulli targets (one per feature)")
        logits = wide(outputs) / self.temperature
        y = targets.astype(logits.dtype)
        # softplus(z) - y z, written so that a certain label never meets an infinite logit.
        yes, no = jax.nn.softplus(-logits), jax.nn.softplus(logits)
        terms = jnp.where(y == 1, yes, jnp.where(y == 0, no, y * yes + (1 - y) * no))
        return jnp.sum(terms, axis=-1)

    def noise(
        self, outputs: Array, example_ids: Int[Array, " batch"], *, key: Key[Array, ""]
    ) -> Array:
        """Return one uniform number per feature."""
        self.lead_shape(outputs)
        return _per_example(jax.random.uniform, outputs.shape, outputs, example_ids, key)

    def sampled_cotangent(self, outputs: Array, noise: Float[Array, "..."]) -> Array:
        """Return (p - y) / T at y = 1 where the noise lies below p."""
        _check_shape(noise, outputs.shape, "Bernoulli noise (one uniform per feature)")
        p, _ = self._yes_and_no(outputs)
        return self.empirical_cotangent(outputs, noise.astype(p.dtype) < p)

    def empirical_cotangent(self, outputs: Array, targets: Array) -> Array:
        """Return (p - y) / T, written without the cancellation as p nears y."""
        _check_shape(targets, outputs.shape, "Bernoulli targets (one per feature)")
        p, q = self._yes_and_no(outputs)
        y = targets.astype(p.dtype)
        return (((1 - y) * p - y * q) / self.temperature).astype(outputs.dtype)

    def exact_cotangent(self, outputs: Array, index: int | Array) -> Array:
        """Return sqrt(p_k (1 - p_k)) e_k / T."""
        labels = jnp.broadcast_to(jnp.asarray(index), self.lead_shape(outputs))
        p, q = self._yes_and_no(outputs)
        return (jnp.sqrt(p * q) * _one_hot(labels, p) / self.temperature).astype(outputs.dtype)

    def hessian_product(self, outputs: Array, tangent: Array) -> Array:
        """Return p (1 - p) t / T²."""
        p, q = self._yes_and_no(outputs)
        return (p * q * wide(tangent) / self.temperature**2).astype(outputs.dtype)

    def kl(self, outputs: Array, other_outputs: Array) -> Array:
        """Return the sum over features and over both answers of p log(p / q)."""
        z, other = wide(outputs) / self.temperature, wide(other_outputs) / self.temperature
        yes = kl_terms(jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(other))
        no = kl_terms(jax.nn.log_sigmoid(-z), jax.nn.log_sigmoid(-other))
        return jnp.sum(yes + no, axis=-1)

    def _yes_and_no(self, outputs: Array) -> tuple[Array, Array]:
        logits = wide(outputs) / self.temperature
        return jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)


def check_likelihood(likelihood: Likelihood) -> None:
    """Refuse what is no likelihood, such as a class that was not called.

    Raises:
        TypeError: the argument is no likelihood.
    """
    check_kind(likelihood, Likelihood, "likelihood", "such as Categorical()")


def _one_hot(labels: Array, like: Array) -> Array:
    classes = lax.broadcasted_iota(labels.dtype, like.shape, like.ndim - 1)
    return (classes == labels[..., None]).astype(like.dtype)


def _per_example(draw, shape, outputs, example_ids, key) -> Array:
    if example_ids.shape != shape[:1]:
        raise ValueError(
            f"example_ids has shape {example_ids.shape}, expected one id per example, {shape[:1]}"
        )
    dtype = jnp.float64 if outputs.dtype == jnp.float64 else jnp.float32
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i), shape[1:], dtype))(example_ids)


def _unnormalised(logits: Array) -> Array:
    return jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))


def _inverse_cdf(weights: Array, uniforms: Array) -> Array:
    """Return the class of each output whose share of the summed weights holds `uniforms`.

    Two levels, blocks and then the classes of one block, so that the running sums touch about
    2 sqrt(classes) numbers per output; the block sums are one more reading of the weights.
    """
    num_classes = weights.shape[-1]
    block = 2 ** round(math.log2(num_classes) / 2)
    num_whole = num_classes // block
    whole, ragged = jnp.split(weights, [num_whole * block], axis=-1)
    sums = jnp.sum(whole.reshape(*weights.shape[:-1], num_whole, block), axis=-1)
    if ragged.shape[-1]:
        sums = jnp.concatenate([sums, jnp.sum(ragged, axis=-1, keepdims=True)], axis=-1)
    which, rest = _first_above(sums, uniforms * jnp.sum(sums, axis=-1))
    offsets = lax.broadcasted_iota(jnp.int32, (*which.shape, block), which.ndim)
    classes = which[..., None] * block + offsets
    # Gathered out of the weights as they lie: padding them to whole blocks would copy them all.
    held = jnp.minimum(classes, num_classes - 1)
    inside = jnp.take_along_axis(weights, held, axis=-1, mode="promise_in_bounds")
    label, _ = _first_above(jnp.where(classes < num_classes, inside, 0), rest)
    return which * block + label


def _first_above(weights: Array, level: Array) -> tuple[Array, Array]:
    """Return the first index at which the running sum passes `level`, and what is left of it.

    Parallel sums are not monotone to the last bit, and `level` can round up to the whole sum.  So
    an index is eligible only if its own weight is positive, and the last of these catches the rest.
    """
    size = weights.shape[-1]
    running = jnp.cumsum(weights, axis=-1)
    index = lax.broadcasted_iota(jnp.int32, weights.shape, weights.ndim - 1)
    is_positive = weights > 0
    is_passed = (running > level[..., None]) & is_positive
    first = jnp.min(jnp.where(is_passed, index, size), axis=-1)
    last = jnp.max(jnp.where(is_positive, index, 0), axis=-1)
    first = jnp.where(first < size, first, last)
    before = jnp.take_along_axis(running - weights, first[..., None], axis=-1)[..., 0]
    return first, jnp.maximum(level - before, 0)


def _check_shape(array: Array, expected: tuple[int, ...], what: str) -> None:
    if array.shape != expected:
        raise ValueError(f"{what} must have shape {expected}, got {array.shape}")
