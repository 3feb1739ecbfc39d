"""What enters one site, as a function that is equal by value."""

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
        path = re.sub(r"#\d+$", "", self.site)  # the parameter's further sites are "path#1", ...
        found = intervene(apply, params, inputs, select=f"^{re.escape(path)}$").activations
        if self.site not in found:
            raise ValueError(f"{self.site!r} is no site; those of this parameter: {list(found)}")
        return found[self.site]
