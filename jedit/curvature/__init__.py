"""Second-order statistics of linear sites: estimate them, solve with them, measure with them."""

from jedit.curvature import likelihoods
from jedit.curvature.algebra import (
    eigenvalues,
    factors,
    matvec,
    power,
    quadratic_form,
    rotate,
    trace,
)
from jedit.curvature.diagonal import diagonal
from jedit.curvature.ekfac import ekfac
from jedit.curvature.estimator import Estimator, estimate, estimate_in_groups
from jedit.curvature.factorization import Factorize
from jedit.curvature.ggn import ggn_vector_product, quadratic_kl
from jedit.curvature.inverted import Inverted, inverted, solve
from jedit.curvature.kfac import kfac
from jedit.curvature.memory import to_device, to_host
from jedit.curvature.temperature import choose_temperature
from jedit.curvature.types import Curvature, Diagonal, Factor, Kronecker

__all__ = [
    "Curvature",
    "Diagonal",
    "Estimator",
    "Factor",
    "Factorize",
    "Inverted",
    "Kronecker",
    "choose_temperature",
    "diagonal",
    "eigenvalues",
    "ekfac",
    "estimate",
    "estimate_in_groups",
    "factors",
    "ggn_vector_product",
    "inverted",
    "kfac",
    "likelihoods",
    "matvec",
    "power",
    "quadratic_form",
    "quadratic_kl",
    "rotate",
    "solve",
    "to_device",
    "to_host",
    "trace",
]
