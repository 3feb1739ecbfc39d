"""Second-order statistics of linear sites: estimate them, solve with them, measure with them."""

from jedit.curvature import likelihoods
from jedit.curvature.blocks import (
    Curvature,
    Diagonal,
    Factor,
    Kronecker,
    eigenvalues,
    factors,
    matvec,
    power,
    quadratic_form,
    rotate,
    solve,
    trace,
)
from jedit.curvature.ekfac import diagonal, ekfac
from jedit.curvature.estimator import Estimator, estimate
from jedit.curvature.ggn import ggn_vector_product, quadratic_kl
from jedit.curvature.kfac import kfac

__all__ = [
    "Curvature",
    "Diagonal",
    "Estimator",
    "Factor",
    "Kronecker",
    "diagonal",
    "eigenvalues",
    "ekfac",
    "estimate",
    "factors",
    "ggn_vector_product",
    "kfac",
    "likelihoods",
    "matvec",
    "power",
    "quadratic_form",
    "quadratic_kl",
    "rotate",
    "solve",
    "trace",
]
