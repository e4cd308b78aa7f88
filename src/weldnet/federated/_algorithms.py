"""The client algorithms by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weldnet.federated._algorithm import ClientAlgorithm, Plain
from weldnet.federated._fedprox import FedProx
from weldnet.federated._moon import Moon
from weldnet.federated._server import build

__all__ = ["ALGORITHMS", "make_algorithm"]

ALGORITHMS: dict[str, type[ClientAlgorithm]] = {"plain": Plain, "fedprox": FedProx, "moon": Moon}
"""The client algorithms by name."""


def make_algorithm(algorithm: str | ClientAlgorithm | Mapping[str, Any]) -> ClientAlgorithm:
    """Return a client algorithm by name, from a mapping with ``name`` and options, or as it is.

    Raises:
        UsageError: an unknown name or option; the message lists the known ones.

    >>> make_algorithm({"name": "moon", "mu": 5})
    Moon(mu=5, temperature=0.5)
    """
    if not isinstance(algorithm, str | Mapping):
        return algorithm
    return build(ALGORITHMS, "client algorithm", algorithm)
