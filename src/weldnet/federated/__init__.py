"""Federated learning: fusion as the server's aggregation step, and the clients' training; free of any engine."""

from __future__ import annotations

from weldnet.federated._aggregate import Aggregated, aggregate
from weldnet.federated._blueprint import Blueprint
from weldnet.federated._matched import FedMA, Matched
from weldnet.federated._rule import Combined, FedAvg, Rule, Setting
from weldnet.federated._rules import RULES, make_rule
from weldnet.federated._server import (
    OPTIMISERS,
    FedAdam,
    FedAvgM,
    FedExP,
    NoOptimiser,
    ServerOptimiser,
    Step,
    make_optimiser,
)
from weldnet.federated._update import ClientUpdate, Dropped

__all__ = [
    "OPTIMISERS",
    "RULES",
    "Aggregated",
    "Blueprint",
    "ClientUpdate",
    "Combined",
    "Dropped",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedExP",
    "FedMA",
    "Matched",
    "NoOptimiser",
    "Rule",
    "ServerOptimiser",
    "Setting",
    "Step",
    "aggregate",
    "make_optimiser",
    "make_rule",
]
