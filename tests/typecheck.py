"""The checker of annotations that the tests' import hook applies to every function of jedit."""

import functools
import operator
import types
import typing

from beartype import beartype


def check(function):
    """Checks every function but a dataclass's `__init__`.

    JAX rebuilds a registered dataclass around whatever a tree map or `eval_shape` returns (shapes,
    axes, sentinels), so its fields need not hold what their annotations say.

    Of a `Literal` the kind is checked alone: a word that is none of its own the function refuses
    itself, in a sentence that tests look at.
    """
    if function.__qualname__.endswith(".__init__"):
        return function
    hints = function.__annotations__
    function.__annotations__ = {name: _of_any_word(hint) for name, hint in hints.items()}
    checked = beartype(function)
    function.__annotations__ = hints
    checked.__annotations__ = hints
    return checked


def _of_any_word(hint):
    if typing.get_origin(hint) is typing.Literal:
        return functools.reduce(operator.or_, {type(word) for word in typing.get_args(hint)})
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return functools.reduce(operator.or_, map(_of_any_word, typing.get_args(hint)))
    return hint
