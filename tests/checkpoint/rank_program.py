"""Leading eigenvectors in two processes of four devices, killed and gone on with.

For `test_processes`. Imports once, then forks the processes of each attempt, as
`process_program` does. Prints how each ended as JSON, and leaves the numbers in the folder.
"""

import json
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType

import jedit
from jedit.curvature import Factorize, sketch, subspace
from jedit.curvature.likelihoods import Categorical
from tests.checkpoint.process_program import apply, attempt, gathered, placed

# 2m = 2(2k + 8) = 24 columns: the hidden side of 64 is iterated, the classes' 16 decomposed.
HIDDEN, RANK = 64, 2


def estimates(folder, axes, kind=AxisType.Auto):
    """Curvatures of leading eigenvectors in each way, saved and read; all that came of them."""
    params, (_, _, *batches) = placed(axes, kind, HIDDEN)
    saves, found, first = jedit.Checkpoint(folder / "job", every=1), {}, None
    for name, streamed in (("iterated", False), ("streamed", True), ("refined", True)):
        start = first if name == "refined" else None
        how = Factorize(rank=RANK, streamed=streamed, start=start)
        estimator = jedit.kfac(apply, Categorical(), factorize=how)
        curvature = jedit.estimate(
            estimator, params, batches, key=jax.random.key(1), checkpoint=saves.part(name)
        )
        first = curvature if name == "streamed" else first
        place = folder / f"{name} curvature"
        if not place.exists():
            jedit.save_curvature(curvature, place)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), curvature
        )
        found[name] = jedit.load_curvature(place, like=like).factors
        solved = jedit.solve(curvature, params, damping=0.1)
        found[f"solve {name}"] = {"up": solved["up"], "down": solved["down"]}
    return found


def on_another_machine(work):
    """Let the second process's decompositions come out otherwise, as another machine's may."""

    def there():
        if jax.process_index() == 1:
            qr, nystrom = subspace._orthonormal, sketch._nystrom
            subspace._orthonormal = lambda y: -qr(y)
            subspace.TOLERANCE = 1e-9  # what is still there is not still here
            sketch._nystrom = lambda *given: (nystrom(*given)[0], -nystrom(*given)[1])
        return work()

    return there


def told(found):
    """Of eigenvectors, whose signs are nobody's, the matrix that they make."""
    numbers = gathered(found)
    for name in [x for x in numbers if x.endswith("/basis")]:
        basis, values = numbers.pop(name), numbers[name.replace("basis", "eigenvalues")]
        kept = values[:, -basis.shape[-1] :]
        numbers[name] = np.einsum("lik,lk,ljk->lij", basis, kept, basis)
    return numbers


def main(folder):
    """All attempts, in turn."""
    two, found = (4, 2), {}

    def doing(place, axes, kind=AxisType.Auto):
        return lambda: ({}, told(estimates(place, axes, kind)))

    killed = folder / "killed"
    killed.mkdir()
    found["killed"] = attempt(doing(killed, two), folder / "never", death=("parts", 2, None))
    found["saves"] = sorted(str(x.relative_to(killed)) for x in killed.glob("job/*/step-*"))
    work = on_another_machine(doing(killed, two, AxisType.Explicit))
    found["two"] = attempt(work, folder / "two-out")
    (folder / "alone").mkdir()
    found["one"] = attempt(doing(folder / "alone", (1, 1)), folder / "one-out", count=1, devices=1)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # JAX warns of forks; it is not yet started here
    main(Path(sys.argv[1]))
