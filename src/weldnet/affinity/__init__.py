"""Affinity: how alike units are, from the weights around them, as matrix products."""

from weldnet.affinity._kernel import Gaussian, InnerProduct, Kernel, Pool, VectorNorm
from weldnet.affinity._pairs import (
    exact_gaussian_affinity,
    expansion_terms,
    gaussian_affinity,
    vector_affinity,
)

__all__ = [
    "Gaussian",
    "InnerProduct",
    "Kernel",
    "Pool",
    "VectorNorm",
    "exact_gaussian_affinity",
    "expansion_terms",
    "gaussian_affinity",
    "vector_affinity",
]
