"""The checker of annotations that the tests' import hook applies to every function of jedit."""

from beartype import beartype


def check(function):
    """Checks every function but a dataclass's `__init__`.

    JAX rebuilds a registered dataclass around whatever a tree map or `eval_shape` returns (shapes,
    axes, sentinels), so its fields need not hold what their annotations say.
    """
    return function if function.__qualname__.endswith(".__init__") else beartype(function)
