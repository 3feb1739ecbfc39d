"""What enters one site, or leaves it, as functions that are equal by value."""

import dataclasses
import re
from collections.abc import Callable

from jaxtyping import Array, Float, PyTree

from jedit.tracing.intervene import intervene


@dataclasses.dataclass(frozen=True)
class Entering:
    """The hidden states that enter a site.

        hidden = Entering("blocks/3/attn/query/kernel")
        states = hidden(apply, params, inputs)

    Attributes:
        site: the site's name, as `find_sites` prints it.
    """

    site: str

    def __call__(
        self, apply: Callable, params: PyTree, inputs: PyTree
    ) -> Float[Array, "batch *lead width"]:
        """Return the states; costs one forward pass.

        Raises:
            ValueError: the function has no such site; as in `find_sites`.
        """
        return _of_site(self.site, apply, params, inputs, "activations")


@dataclasses.dataclass(frozen=True)
class Leaving:
    """The outputs of a site, before its bias is added.

        outputs = Leaving("blocks/3/mlp/down/kernel")(apply, params, inputs)

    Attributes:
        site: the site's name, as `find_sites` prints it.
    """

    site: str

    def __call__(
        self, apply: Callable, params: PyTree, inputs: PyTree
    ) -> Float[Array, "batch *lead width"]:
        """Return the outputs; costs one forward pass.

        Raises:
            ValueError: the function has no such site; as in `find_sites`.
        """
        return _of_site(self.site, apply, params, inputs, "site_outputs")


def _of_site(site: str, apply: Callable, params: PyTree, inputs: PyTree, field: str) -> Array:
    path = re.sub(r"#\d+$", "", site)  # the parameter's further sites are "path#1", ...
    found = getattr(intervene(apply, params, inputs, select=f"^{re.escape(path)}$"), field)
    if site not in found:
        raise ValueError(f"{site!r} is no site; those of this parameter: {list(found)}")
    return found[site]
