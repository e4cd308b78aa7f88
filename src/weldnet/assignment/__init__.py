"""Assignment: scores in, couplings out. Pure mathematics that knows no network."""

from weldnet.assignment._coupling import Permutation
from weldnet.assignment._linear import best_permutation
from weldnet.assignment._nested import Nest, best_nested_permutations
from weldnet.assignment._sinkhorn import Potentials, sinkhorn, standardise

__all__ = [
    "Nest",
    "Permutation",
    "Potentials",
    "best_nested_permutations",
    "best_permutation",
    "sinkhorn",
    "standardise",
]
