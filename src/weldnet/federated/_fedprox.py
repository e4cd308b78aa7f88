"""FedProx: stay near the model that was sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from weldnet.errors import UsageError
from weldnet.federated._algorithm import Task, labels_of
from weldnet.training import Labels, Objective

__all__ = ["FedProx"]


@final
@dataclass(frozen=True, kw_only=True)
class FedProx:
    """Cross-entropy plus ``mu / 2 sum |w - w_sent|^2`` over all parameters.

    In a round that did not begin from the model that was sent, the term is left out: the units are in another order
    there, and a distance between the two says nothing.

    Args:
        mu: 0 is plain training.

    Source: Li et al., "Federated Optimization in Heterogeneous Networks", https://arxiv.org/abs/1812.06127, equation 2.
    """

    mu: float = 0.01
    name = "fedprox"

    def __post_init__(self) -> None:
        if not 0 <= self.mu < float("inf"):
            raise UsageError(f"fedprox: mu is {self.mu}; give a number of 0 or more")

    def objective(self, task: Task, /) -> Objective:
        """See :class:`ClientAlgorithm`."""
        return Proximal(labels_of(task), task.sent, self.mu) if task.began else labels_of(task)

    def remember(self, state: Mapping[str, Tensor], task: Task, /) -> dict[str, Tensor]:
        """Keep nothing."""
        return {}


class Proximal:
    """A loss on labels, and the squared distance from given weights."""

    def __init__(self, labels: Labels, sent: Mapping[str, Tensor], mu: float) -> None:
        self.labels, self.sent, self.mu = labels, sent, mu
        self.inputs, self.name = labels.inputs, labels.name
        self.identity: Mapping[str, Any] = {"mu": mu}
        self.networks: Sequence[nn.Module] = ()
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def attach(self, model: nn.Module) -> None:
        """See :class:`weldnet.training.Objective`."""
        self._pairs = [
            (parameter, self.sent[name].detach().to(parameter))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def __call__(self, logits: Tensor, rows: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`weldnet.training.Objective`."""
        loss, right = self.labels(logits, rows, batch)
        return loss + self.term(), right

    def term(self) -> Tensor:
        """Return ``mu / 2 sum |w - w_sent|^2`` of the attached network."""
        squares = [(parameter - sent).square().sum() for parameter, sent in self._pairs]
        return self.mu / 2 * torch.stack(squares).sum()
