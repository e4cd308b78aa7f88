"""Client algorithms: what a client lowers in local training, and what it keeps between rounds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

from weldnet.checkpoints import load_into
from weldnet.data import Split
from weldnet.errors import CheckpointError
from weldnet.training import Labels, Objective, Recipe, run

__all__ = ["ClientAlgorithm", "ClientResult", "Plain", "Task", "labels_of", "train_locally"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A client's work in one round.

    Args:
        model: the network that training begins from; not changed.
        data: the client's samples.
        recipe: how to train; its seed is the round's own.
        sent: the global model that the server sent.
        began: whether the model has the weights that were sent.
        client_state: what the algorithm kept from the client's last round; empty at first.
        frozen: tensors that must not change.
        device: where to train; by default where the model is.
    """

    model: nn.Module
    data: Split
    recipe: Recipe
    sent: Mapping[str, Tensor]
    began: bool = True
    client_state: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    frozen: frozenset[str] = frozenset()
    device: str | torch.device | None = None

    def network(self, state: Mapping[str, Tensor], name: str) -> nn.Module:
        """Return a copy of the model with other weights, in evaluation mode and without gradients."""
        other = copy.deepcopy(self.model)
        load_into(other, state, name)
        return other.eval().requires_grad_(False)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ClientResult:
    """What local training gave.

    Args:
        state: the trained network's tensors.
        client_state: for the client's next round.
        values: ``loss`` and ``train_accuracy`` of the last epoch, ``seconds``.
    """

    state: dict[str, Tensor]
    client_state: dict[str, Tensor]
    values: dict[str, float]


@runtime_checkable
class ClientAlgorithm(Protocol):
    """An algorithm is a frozen value; the task comes with the call."""

    @property
    def name(self) -> str: ...

    def objective(self, task: Task, /) -> Objective:
        """Return what is lowered."""
        ...

    def remember(self, state: Mapping[str, Tensor], task: Task, /) -> dict[str, Tensor]:
        """Return what to keep for the next round, given the network that is sent to the server."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Plain:
    """Cross-entropy and nothing else: local training as in FedAvg."""

    name = "plain"

    def objective(self, task: Task, /) -> Objective:
        """See :class:`ClientAlgorithm`."""
        return labels_of(task)

    def remember(self, state: Mapping[str, Tensor], task: Task, /) -> dict[str, Tensor]:
        """Keep nothing."""
        return {}


def labels_of(task: Task) -> Labels:
    """Return the cross-entropy of a task's samples."""
    data = task.data
    return Labels(data.images, data.labels, data.name, task.recipe.label_smoothing)


def train_locally(algorithm: ClientAlgorithm, task: Task) -> ClientResult:
    """Train a client's network for one round; the same task gives bit-equal weights.

    Args:
        algorithm: what to lower.
        task: the network, the samples and the rest.

    Raises:
        CheckpointError: the frozen tensors or the state that was sent are not the model's.
        TrainingError: the loss is not finite.
        DataError: the samples do not fit the model.

    Example:
        >>> import weldnet.data, weldnet.models
        >>> net = weldnet.models.mlp((64, 8, 10))
        >>> task = Task(
        ...     model=net, data=weldnet.data.load("digits"), recipe=Recipe(epochs=1), sent=net.state_dict()
        ... )
        >>> sorted(train_locally(Plain(), task).values)
        ['loss', 'seconds', 'train_accuracy']
    """
    model = copy.deepcopy(task.model).train()
    parameters = dict(model.named_parameters())
    begun = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    unknown = sorted(task.frozen - begun.keys())
    if unknown:
        raise CheckpointError(
            f"{type(model).__name__} has no tensor {unknown[0]!r} to freeze; give its state dict's names"
        )
    for name in task.frozen & parameters.keys():
        parameters[name].requires_grad_(False)
    recipe = replace(task.recipe, epochs=0) if task.frozen >= parameters.keys() else task.recipe
    found = run(model, algorithm.objective(replace(task, model=model)), recipe, device=task.device, progress=False)
    state = {name: tensor.detach().clone() for name, tensor in found.model.state_dict().items()}
    state |= {name: begun[name] for name in task.frozen}
    last = found.history[-1] if found.history else None
    values = {"loss": last.loss, "train_accuracy": last.accuracy} if last else {}
    return ClientResult(
        state=state, client_state=algorithm.remember(state, task), values={**values, "seconds": found.seconds}
    )
