"""Arguments of the wrong type or structure, refused with one sentence before anything is computed.

Of types it knows `Batch` alone; what an array's numbers may be is not asked here.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from jedit.core.batch import Batch, Resumable
from jedit.core.display import described, is_array, with_article
from jedit.core.paths import leaves_with_paths

NUM_NEAREST = 3


def check_kind(value: Any, kind: type, name: str, example: str) -> None:
    """Refuse what is no instance of a class.

    Args:
        value: what was given as the argument.
        kind: the class that it must be an instance of.
        name: the argument's name, for the message.
        example: where such an instance comes from.

    Raises:
        TypeError: the value is no such instance.
    """
    if isinstance(value, kind):
        return
    if isinstance(value, type) and kind in value.__mro__:
        raise TypeError(f"{name} is the class {value.__name__} itself; call it: {value.__name__}()")
    raise TypeError(
        f"{name} must be {with_article(kind.__name__)}, {example}, got {described(value)}; look "
        "at the order of the arguments"
    )


def check_word(words: Any, **given: Any) -> None:
    """Refuse words that are none of those an option may be.

    Args:
        words: a `Literal` of them.
        **given: by the name of the option.

    Raises:
        ValueError: a word is none of them; the message says which there are.
    """
    known = get_args(words)
    for name, word in given.items():
        if word not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {word!r}")


def check_function(value: Any, name: str = "apply", form: str = "(params, inputs)") -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: the value cannot be called, or is a class.
    """
    if not callable(value) or isinstance(value, type):
        raise TypeError(
            f"{name} must be a function {name}{form}, got {described(value)}; look at the order of "
            "the arguments"
        )


def check_optimizer(optimizer: Any) -> None:
    """Refuse what is no optax transform.

    Raises:
        TypeError: it has no `init` or no `update`.
    """
    if isinstance(optimizer, type) or not (
        hasattr(optimizer, "init") and hasattr(optimizer, "update")
    ):
        raise TypeError(
            "optimizer must be an optax transform, such as optax.adam(1e-3), got "
            f"{described(optimizer)}; look at the order of the arguments"
        )


def check_params(params: PyTree, name: str = "params") -> None:
    """Refuse parameters that are a batch, or hold something else than arrays and numbers.

    Raises:
        TypeError: a leaf is something else; the message says what, and where.
    """
    if is_batch(params):
        raise TypeError(
            f"{name} must be a pytree of arrays, got {described(params)}; look at the order of the "
            "arguments"
        )
    for path, leaf in leaves_with_paths(params):
        if is_array(leaf) or isinstance(leaf, int | float | complex):
            continue
        hint = "leave out of it what is no parameter"
        if callable(leaf):
            hint = (
                "of an Equinox model take the arrays alone, `params, static = equinox.partition("
                "model, equinox.is_inexact_array)`, and put it together in apply by "
                "`equinox.combine(params, static)`"
            )
        raise TypeError(
            f"{name} must be a pytree of arrays, but at {path!r} it holds {described(leaf)}; "
            + hint
        )


def check_inputs(inputs: PyTree) -> None:
    """Refuse a whole batch in place of its inputs.

    Raises:
        TypeError: the inputs are a batch.
    """
    if is_batch(inputs):
        raise TypeError("inputs must be what apply takes, got a Batch; give batch.inputs")


def check_key(key: Any) -> None:
    """Refuse what is no random key.

    Raises:
        TypeError: the value is no random key.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or jnp.issubdtype(dtype, jnp.uint32)
    ):
        raise TypeError(
            f"key must be a random key, jax.random.key(0) for instance, got {described(key)}"
        )


def check_checkpoint(checkpoint: Any) -> None:
    """Refuse what a job cannot save itself with; None passes.

    Raises:
        TypeError: it is something else, a folder for instance.
    """
    if checkpoint is not None:
        check_kind(checkpoint, Resumable, "checkpoint", "such as Checkpoint(folder, every=100)")


def refuse_tracers(what: str, given: PyTree, instead: str) -> None:
    """Refuse to run under a transformation of JAX, where numbers are not known yet.

    Args:
        what: the name of the job that cannot run so.
        given: the arguments of the job.
        instead: what to do instead, as the end of a sentence.

    Raises:
        ValueError: some of the arguments are traced.
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(given)):
        raise ValueError(
            f"{what} looks at numbers while it runs, so it cannot run under jit, grad, vmap or "
            f"scan; {instead}"
        )


def is_batch(value: Any) -> bool:
    """Say whether a value is a `Batch`, or has all that one has."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in Batch._fields)


def check_batch(value: Any, name: str) -> None:
    """Refuse what is no batch.

    Raises:
        TypeError: the value is no batch, or its targets, mask or valid are no arrays.
    """
    if not is_batch(value):
        raise TypeError(
            f"{name} must be a jedit.Batch, got {described(value)}; write "
            "Batch(inputs, targets), with mask and valid where not all outputs count"
        )
    for field in ("targets", "mask", "valid"):
        held = getattr(value, field)
        if held is not None and not is_array(held):
            raise TypeError(
                f"{name}.{field} must be an array or None, got {described(held)}; make it one by "
                "jax.numpy.asarray"
            )


def checked_batches(batches: Iterable[Batch] | Batch, name: str = "batches") -> Iterable[Batch]:
    """Return batches that are checked as they come.

    One batch by itself is a tuple, and would iterate its fields. What can be gone through several
    times still can be.

    Raises:
        TypeError: it is neither a batch nor several.
    """
    if is_batch(batches):
        return _Checked([batches], name)
    is_other = is_array(batches) or isinstance(batches, str | Mapping)
    is_pair = isinstance(batches, tuple) and any(map(is_array, batches))
    if is_other or is_pair or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be a jedit.Batch, or several in a list, got {described(batches)}; write "
            "Batch(inputs, targets), with mask and valid where not all outputs count"
        )
    # An iterator stays one: it comes once, and must not look like a list.
    checked = _Checked(batches, name)
    return iter(checked) if iter(batches) is batches else checked


def batch_list(batches: Iterable[Batch] | Batch, name: str) -> list[Batch]:
    """Return at least one batch.

    Raises:
        TypeError: it is neither a batch nor several.
        ValueError: there is no batch.
    """
    found = list(checked_batches(batches, name))
    if not found:
        raise ValueError(f"{name} holds no batch; give a jedit.Batch, or several in a list")
    return found


class _Checked:
    def __init__(self, batches: Any, name: str):
        self.batches, self.name = batches, name

    def __len__(self) -> int:
        return len(self.batches)  # where they have one: a progress bar asks

    def __iter__(self) -> Iterator[Batch]:
        for i, batch in enumerate(self.batches):
            check_batch(batch, f"{self.name}[{i}]")
            yield batch


def check_labels(targets: Any, name: str) -> None:
    """Refuse labels that are no integers; their shape and range are not asked.

    Raises:
        TypeError: the labels are no integers.
    """
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integers, the numbers of classes, got {targets.dtype}; "
            ".astype(int) makes them, and real-valued targets want another likelihood or loss"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Say what there is instead of a name that is missing."""
    known = list(known)
    if not known:
        return "there is none"
    near = difflib.get_close_matches(name, known, n=NUM_NEAREST, cutoff=0.0)
    sentence = f"nearest: {', '.join(map(repr, near))}"
    if f"{name}/value" in known or name.removesuffix("/value") in known:
        sentence += (
            "; one of the two still holds Flax's variables: take nnx.as_pure(state) as params in "
            "both places"
        )
    return sentence
