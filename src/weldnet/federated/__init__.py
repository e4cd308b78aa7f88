"""Federated learning: fusion as the server's aggregation step, and the clients' training; free of any engine."""

from __future__ import annotations

from weldnet.federated._aggregate import Aggregated, aggregate
from weldnet.federated._algorithm import ClientAlgorithm, ClientResult, Plain, Task, train_locally
from weldnet.federated._algorithms import ALGORITHMS, make_algorithm
from weldnet.federated._blueprint import Blueprint
from weldnet.federated._clients import ClientStore
from weldnet.federated._config import FederatedConfig, LocalConfig, PartitionConfig
from weldnet.federated._federation import Federation, Order, Worked
from weldnet.federated._fedprox import FedProx
from weldnet.federated._layers import LayerRounds, Matching, cut_out
from weldnet.federated._matched import FedMA, Matched
from weldnet.federated._moon import Headed, Moon, contrast, with_head
from weldnet.federated._rounds import CHECKPOINT, CLIENTS, MODEL, Server, simulate
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
from weldnet.federated._state_file import StateFile
from weldnet.federated._update import ClientUpdate, Dropped

__all__ = [
    "ALGORITHMS",
    "CHECKPOINT",
    "CLIENTS",
    "MODEL",
    "OPTIMISERS",
    "RULES",
    "Aggregated",
    "Blueprint",
    "ClientAlgorithm",
    "ClientResult",
    "ClientStore",
    "ClientUpdate",
    "Combined",
    "Dropped",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedExP",
    "FedMA",
    "FedProx",
    "FederatedConfig",
    "Federation",
    "Headed",
    "LayerRounds",
    "LocalConfig",
    "Matched",
    "Matching",
    "Moon",
    "NoOptimiser",
    "Order",
    "PartitionConfig",
    "Plain",
    "Rule",
    "Server",
    "ServerOptimiser",
    "Setting",
    "StateFile",
    "Step",
    "Task",
    "Worked",
    "aggregate",
    "contrast",
    "cut_out",
    "make_algorithm",
    "make_optimiser",
    "make_rule",
    "simulate",
    "train_locally",
    "with_head",
]
