"""An aggregator for NVIDIA FLARE (tested against 2.9.0): any rule of weldnet where its ``FedAvg`` workflow sums.

Importing this module needs ``pip install nvflare``.
"""

# NVIDIA FLARE is no dependency of any extra: where it is not installed its types are unknown.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weldnet.errors import FederatedError
from weldnet.federated import (
    Aggregated,
    Blueprint,
    ClientUpdate,
    Rule,
    ServerOptimiser,
    aggregate,
    make_optimiser,
    make_rule,
)

try:
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
except ImportError as error:
    raise FederatedError(f"NVIDIA FLARE is not installed ({error}); pip install nvflare") from error

__all__ = ["FusionAggregator"]

_CLIENT, _STEPS = "client_name", "NUM_STEPS_CURRENT_ROUND"


class FusionAggregator(ModelAggregator):
    """Collects the clients' networks of a round and combines them by a rule; give it as ``aggregator=`` of ``FedAvg``.

    A client counts by ``NUM_STEPS_CURRENT_ROUND`` in its model's metadata (1 if it says nothing), as in FLARE's own
    average. Whole networks and differences are taken, as NumPy arrays or tensors; what comes back is a whole network of
    the same kind.

    Args:
        model: the server's network; clients begin the first round from these weights.
        example_input: what it takes.
        rule: a name for :func:`weldnet.federated.make_rule`, or a rule.
        optimiser: a name for :func:`weldnet.federated.make_optimiser`, or a server optimiser.
        min_replies: how many sound updates a round needs; with fewer the model stays.
        seed: of everything random.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        rule: str | Rule = "gamf",
        optimiser: str | ServerOptimiser = "none",
        min_replies: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.blueprint = Blueprint.of(model, example_input)
        self.rule, self.optimiser = make_rule(rule), make_optimiser(optimiser)
        self.min_replies, self.seed = min_replies, seed
        self.state: Mapping[str, Tensor] = {n: t.detach().clone() for n, t in model.state_dict().items()}
        self.last: Aggregated | None = None
        self._round = 0
        self._optimiser_state: Mapping[str, Tensor] = {}
        self.reset_stats()

    def accept_model(self, model: FLModel) -> None:
        """Keep one client's network."""
        params = model.params or {}
        self._arrays |= any(isinstance(value, np.ndarray) for value in params.values())
        state = {name: torch.as_tensor(value).cpu() for name, value in params.items()}
        if model.params_type == ParamsType.DIFF:
            state = {name: self.state[name] + change for name, change in state.items() if name in self.state}
        meta = model.meta or {}
        client = str(meta.get(_CLIENT, f"client {len(self._updates)}"))
        self._updates.append(ClientUpdate(client=client, state=state, examples=int(meta.get(_STEPS, 1))))

    def aggregate_model(self) -> FLModel:
        """Combine what was kept, and forget it."""
        self._round += 1
        found = aggregate(
            self._updates,
            self.state,
            self._round,
            rule=self.rule,
            blueprint=self.blueprint,
            optimiser=self.optimiser,
            optimiser_state=self._optimiser_state,
            min_updates=self.min_replies,
            seed=self.seed,
        )
        self.state, self._optimiser_state, self.last = found.state, found.optimiser_state, found
        for entry in found.dropped:
            self.warning(f"dropped {entry}")
        params = {name: tensor.numpy() if self._arrays else tensor for name, tensor in found.state.items()}
        self.reset_stats()
        return FLModel(params_type=ParamsType.FULL, params=params)

    def reset_stats(self) -> None:
        """Forget what was kept of a round."""
        self._updates: list[ClientUpdate] = []
        self._arrays = False
