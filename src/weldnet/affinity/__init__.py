"""Affinity: how alike units are, from the weights around them, as matrix products."""

from weldnet.affinity._kernel import Gaussian, InnerProduct, Kernel, Pool, VectorNorm
from weldnet.affinity._moments import LIKENESSES, CrossMoments, Likeness
from weldnet.affinity._pairs import (
    exact_gaussian_affinity,
    expansion_terms,
    gaussian_affinity,
    vector_affinity,
)

__all__ = [
    "LIKENESSES",
    "CrossMoments",
    "Gaussian",
    "InnerProduct",
    "Kernel",
    "Likeness",
    "Pool",
    "VectorNorm",
    "exact_gaussian_affinity",
    "expansion_terms",
    "gaussian_affinity",
    "vector_affinity",
]
