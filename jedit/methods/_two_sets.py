"""What methods share that compare the curvatures of two sets: which blocks they may edit."""

from collections.abc import Mapping, Sequence

from jaxtyping import Array, PyTree

from jedit.core.arguments import refuse_tracers
from jedit.curvature import Curvature
from jedit.curvature.checks import check_counted, check_covers, matrix_of
from jedit.curvature.types import Kronecker

Parts = Curvature | Sequence[Curvature]


def input_sums(curvature: Curvature, name: str) -> Array:
    """Return the sum over outputs of a block's inputs' outer products, (layers, d_in, d_in).

    It is the factor A times the number of outputs; of a factor that holds its diagonal alone, that
    diagonal, (layers, d_in).
    """
    block = curvature.blocks[name]
    assert isinstance(block, Kronecker)
    matrix = matrix_of(curvature.factors[block.input], name)
    return matrix * curvature.num_outputs.astype(matrix.dtype)


def add_changes(changes: dict[str, Array], parts: Mapping[str, Array]) -> None:
    """Add a block's changes to those of the parameters: several blocks may be slices of one."""
    for path, part in parts.items():
        changes[path] = changes[path] + part if path in changes else part


def comparable(
    params: PyTree, target: Parts, rest: Parts, what: str
) -> tuple[list[Curvature], list[Curvature], dict[str, Kronecker], dict[str, Array]]:
    """Check the curvatures of two sets, and return what a method edits by them.

    Args:
        params: the parameters that both are of.
        target: curvature of what is to be forgotten, or of several disjoint parts of it.
        rest: curvature of other data, or of several disjoint parts of it.
        what: what is made of them, for the messages, such as "an engram".

    Returns:
        Both groups as lists, the Kronecker blocks by name, and the parameters by path.

    Raises:
        TypeError: an argument that holds no parameters or curvatures.
        ValueError: nothing in a group, curvatures of different sites or of no outputs, no Kronecker
            block, or a parameter that is used at several sites.
    """
    targets, rests = ([x] if isinstance(x, Curvature) else list(x) for x in (target, rest))
    if not targets or not rests:
        raise ValueError("target and rest must hold a curvature each, or several; one is empty")
    leaves: dict[str, Array] = {}
    for curvature in (*targets, *rests):
        leaves = dict(check_covers(curvature, params))
    refuse_tracers(what, (params, targets, rests), "take it outside")
    blocks = {n: b for n, b in targets[0].blocks.items() if isinstance(b, Kronecker)}
    if merged := [name for name, block in blocks.items() if block.is_merged]:
        raise ValueError(
            f"{merged} are used at several sites, whose input moments a curvature merges with "
            "weights of their own; leave them out by `select`"
        )
    if not blocks or any(set(c.blocks) != set(targets[0].blocks) for c in (*targets, *rests)):
        raise ValueError(
            "target and rest must be curvatures of the same sites, with a Kronecker block at least"
        )
    for name, group in (("target", targets), ("rest", rests)):
        for curvature in group:
            check_counted(curvature.num_outputs, f"a curvature of {name}")
    return targets, rests, blocks, leaves
