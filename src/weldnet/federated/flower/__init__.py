"""Federated learning on Flower: a strategy around any aggregation rule, and the engines that carry the messages.

``import weldnet.federated`` needs none of this; importing this package needs the extra ``weldnet[federated]``.
"""

from __future__ import annotations

from weldnet.errors import FederatedError

try:
    import flwr as _flwr
except ImportError as error:
    raise FederatedError(f"Flower is not installed ({error}); pip install 'weldnet[federated]'") from error

from weldnet.federated.flower._client import client_app
from weldnet.federated.flower._deployment import Certificates, Deployment
from weldnet.federated.flower._engines import ENGINES, Plan, federate
from weldnet.federated.flower._flower_round import FlowerRound
from weldnet.federated.flower._folder import write_app
from weldnet.federated.flower._grid import LocalGrid
from weldnet.federated.flower._serve import describe, run_rounds, server_app
from weldnet.federated.flower._settings import RunSettings
from weldnet.federated.flower._strategy import FusionStrategy
from weldnet.federated.flower._wire import to_record, to_state

__all__ = [
    "ENGINES",
    "Certificates",
    "Deployment",
    "FlowerRound",
    "FusionStrategy",
    "LocalGrid",
    "Plan",
    "RunSettings",
    "client_app",
    "describe",
    "federate",
    "run_rounds",
    "server_app",
    "to_record",
    "to_state",
    "write_app",
]

del _flwr
