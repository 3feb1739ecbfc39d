"""ignore-top-k: leave the largest entries of a whole change out (arXiv 2504.09522).

    θ₀ + Δ ∘ [ |Δ| not in the top ρ of its tensor ]

    Δ   what training changed                                 `edit`
    ρ   share of a tensor's entries that is left out          `fraction`

The formula and its share of 8% are the paper's [notes]. It means the text to be recalled without
them while its surprising word no longer comes up elsewhere; tests/bench/claims/memorised.md says
what was seen of that here. `jedit.transforms.ignore_top_fraction` does the same to every update of
a training, so that what is left out may be made up for in the steps after; here nothing can.
"""

import jax.numpy as jnp

from jedit.core.arguments import check_kind
from jedit.core.checks import SHARE, check_finite, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.magnitudes import bound_below_top
from jedit.core.precision import wide
from jedit.edits.edit import Edit
from jedit.edits.low_rank import Delta, dense


@on_auto_axes
def without_top_fraction(edit: Edit, fraction: float = 0.08) -> Edit:
    """Set the largest entries of every block to zero.

        learnt = edit_between(before, after)
        after = apply_edit(before, without_top_fraction(learnt))
        top = learnt - without_top_fraction(learnt)  # the converse: the largest alone

    Args:
        edit: the whole change, such as `edit_between` returns of a training.
        fraction: ρ of every block, rounded to a whole number of entries; 0.08 (paper). A block is
            a whole parameter: of one that holds all layers stacked the share is of them together.
            Entries equal to the smallest that is left out are kept, so that next to nothing is left
            out after a single step of Adam, which changes all entries by one size.

    Returns:
        An edit of the same blocks, dense ones in place of `LowRank`, in their own dtypes.

    Raises:
        TypeError: the argument is no edit.
        ValueError: a fraction outside 0 to 1.
        FloatingPointError: a block holds NaN or infinity.
    """
    check_numbers(SHARE, fraction=fraction)
    check_kind(edit, Edit, "edit", "of `edit_between` or a method")
    check_finite("the edit", edit.blocks, "its largest entries cannot be told")

    def rest(block: Delta):
        delta = dense(block)
        size = wide(jnp.abs(delta))
        return jnp.where(size <= bound_below_top(size.ravel(), fraction), delta, 0)

    return Edit({path: rest(block) for path, block in edit.blocks.items()})
