"""REGLU: adapters that begin where the forget outputs are, off the retain ones (arXiv 2604.17396).

    C   = (1 - β) C_f - β C_r,   C_f, C_r second moments of a matrix's outputs    `balance`
    Q   its top r eigenvectors;  Q_r the top k of C_r           `rank`, `retain_rank`
    B₀  = Qᵀ,  A₀ = W Q,  W_res = W - s A₀ B₀                   the function is kept exactly
    min  L_f + L_r + λ Σ ‖B Q_r‖²   over A and B alone          `objective`, `weight`

    W, A, B     (d_in, d_out), (d_in, r), (r, d_out): rows are inputs. The code's W, B and A are
                our Wᵀ, Bᵀ and Aᵀ: B₀ = Q, A₀ = Qᵀ W there
    s           the adapters' scale, α / r                      `scale`
    L_f         the inverted hinge loss, or minus the NLL       `IHL()`, `GA()`
    L_r         the NLL of the retain rows

Outputs need no statistic of their own: they are a W, so their moment is Wᵀ A W with A the moment of
the inputs, and with the bias in A's last coordinate and W's last row it is that of a W + b.

Differences. What is above is confirmed [code], and so are the defaults: r = 32, α = 64, λ = 0.5,
k = 128, β = 0.7 on phi-1.5, with a learning rate of 1e-4. That the code's outputs are those with
their bias is derived. It averages outputs over the positions of a row's answer before it takes
moments: `kfac(..., sharing="reduce")` gives that, and the catalogue's moments, which are of single
tokens, do not. r and k are at most a share of a matrix's outputs here (ours: both are an eighth
or less of phi-1.5's), since all of a narrow model's outputs would be both. Where the forget and the
retain outputs are alike, C is negative at a β above a half, and its top eigenvectors are the
directions that are used least: the adapters then have hardly anything to begin from. Adapters are
trained through the gradient of the whole matrix (`transforms.train_adapters`), which is the same
and needs that gradient's memory; every matrix that the moments cover has one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_kind, check_optimizer
from jedit.core.checks import COUNT, FINITE, NOT_NEGATIVE, POSITIVE_SHARE, SHARE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.paths import exactly
from jedit.core.precision import HIGHEST
from jedit.curvature import Curvature
from jedit.curvature.eigenbases import eigh
from jedit.methods._outputs import Served, kernel_of, served_matrices
from jedit.objectives import IHL, Objective, with_retain
from jedit.training.method import TrainingMethod
from jedit.transforms import Adapter, train_adapters


@dataclasses.dataclass(frozen=True)
class Directions:
    """How many directions of a matrix's outputs the adapters begin in, and are kept off.

    Attributes:
        rank: r, the adapters' rank, 32 at most (code).
        retain_rank: k, how many retain directions are kept off, 128 at most (code).
        share: r and k are at most this share of a matrix's outputs, and at least 1; 0.125 is
            arbitrary.
        balance: β, the weight of the retain outputs in C; 0.7 (code).
    """

    rank: int = 32
    retain_rank: int = 128
    share: float = 0.125
    balance: float = 0.7

    def __post_init__(self) -> None:
        check_numbers(COUNT, rank=self.rank, retain_rank=self.retain_rank)
        check_numbers(POSITIVE_SHARE, share=self.share)
        check_numbers(SHARE, balance=self.balance)

    def of(self, d_out: int) -> tuple[int, int]:
        """Return r and k of a matrix with so many outputs."""
        most = max(1, int(self.share * d_out))
        return min(self.rank, most), min(self.retain_rank, most)


def solve(
    C_f: Float[Array, "d_out d_out"],
    C_r: Float[Array, "d_out d_out"],
    *,
    rank: int,
    retain_rank: int,
    balance: float,
) -> tuple[Float[Array, "d_out r"], Float[Array, "d_out k"]]:
    """Return Q and Q_r: the top eigenvectors of (1 - β) C_f - β C_r, and of C_r."""
    d_out = len(C_f)
    Q = jnp.asarray(eigh((1 - balance) * C_f - balance * C_r, C_f.dtype)[1])
    Q_r = jnp.asarray(eigh(C_r, C_r.dtype)[1])
    return Q[:, d_out - rank :], Q_r[:, d_out - retain_rank :]


def reglu(
    params: PyTree,
    target: Curvature,
    rest: Curvature,
    optimizer: optax.GradientTransformation,
    *,
    directions: Directions = Directions(),  # noqa: B008 - frozen
    scale: float = 2.0,
    weight: float = 0.5,
    objective: Objective = with_retain(IHL()),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make REGLU around any optimizer, which trains the adapters alone.

        estimator = jedit.kfac(apply, Categorical(), select="kernel", sharing="reduce")
        target, rest = (
            jedit.estimate(estimator, params, map(answers_only, batches(rows, 32)), key=key)
            for rows in (forget, retain)
        )
        method = reglu(params, target, rest, optax.adam(1e-4))
        edit, info = jedit.run_method(method, apply, params, forget, retain, steps=100, key=key)

    Args:
        params: the trained parameters, whose outputs the moments are of.
        target: curvature of the forget rows, of a text at its answers' tokens alone; only the
            factors A are read.
        rest: curvature of the retain rows, of the same sites.
        optimizer: of A and B, learning rate included (code: AdamW at 1e-4).
        directions: r, k, β, and how much of a narrow matrix they may take.
        scale: s = α / r; 2.0 is the code's 64 / 32.
        weight: λ of what keeps B off the retain directions; 0.5 (code).
        objective: L_f + L_r; `with_retain(GA())` is the code's gradient difference.

    Returns:
        A method for `jedit.unlearn`. A step costs one gradient; making it, two eigendecompositions
        a matrix. Its edit is of rank 2 r at most in each matrix.

    Raises:
        ValueError: a number out of its range, curvatures of different sites or of no outputs, a
            parameter that is used at several sites, or no matrix to adapt.
        FloatingPointError: a moment is not finite.
    """
    check_numbers(FINITE, scale=scale)
    check_numbers(NOT_NEGATIVE, weight=weight)
    check_kind(directions, Directions, "directions", "such as Directions(rank=32)")
    check_optimizer(optimizer)
    adapters = {
        name: _adapter(served, directions)
        for name, served in served_matrices(params, target, rest, "REGLU")
    }
    transform = train_adapters(optimizer, adapters, scale=scale, weight=weight)
    trainable = "|".join(exactly({one.weight.path: None for one in adapters.values()}))
    return TrainingMethod(objective, transform, trainable=trainable)


@on_auto_axes
def _adapter(served: Served, directions: Directions) -> Adapter:
    """Return A₀, B₀ and what B is kept off, in the moments' dtype."""
    weight, matrix = kernel_of(served)
    rank, retain_rank = (min(n, weight.rows) for n in directions.of(weight.d_out))
    span = None
    if weight.d_out > served.matrix.shape[1]:
        # More outputs than inputs lie in a space of as many directions: no moment of a
        # vocabulary's outputs is ever formed.
        span, triangle = jnp.linalg.qr(jnp.swapaxes(served.matrix, 1, 2))
        served = served._replace(matrix=jnp.swapaxes(triangle, 1, 2))
    how = {"rank": rank, "retain_rank": retain_rank, "balance": directions.balance}
    moments = zip(served.outputs(served.target), served.outputs(served.rest), strict=True)
    # One at a time: several batched decompositions side by side can deadlock.
    pairs = [jax.block_until_ready(solve(*pair, **how)) for pair in moments]
    top, retained = (jnp.stack(side) for side in zip(*pairs, strict=True))
    if span is not None:
        top, retained = (jnp.matmul(span, side, precision=HIGHEST) for side in (top, retained))
    a = jnp.matmul(matrix, top, precision=HIGHEST)
    return Adapter(weight, a, jnp.swapaxes(top, 1, 2), retained)
