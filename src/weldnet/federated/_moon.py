"""MOON: bring what the network sees nearer to the global model's view, and away from its own last one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from weldnet._arrays import find_device
from weldnet._modules import placed
from weldnet.errors import ModelError, UsageError
from weldnet.federated._algorithm import Task, labels_of
from weldnet.training import Labels, Objective

__all__ = ["Headed", "Moon", "contrast", "with_head"]

_PREVIOUS = "previous/"


@final
@dataclass(frozen=True, kw_only=True)
class Moon:
    """Cross-entropy plus ``mu`` times a contrast between representations.

    With z what the network makes of an image, z_glob what the global model makes of it that was sent, and z_prev what
    the client's own network of its last round does, see :func:`contrast`. z is what the projection of
    :class:`Headed` gives, or what the last linear layer reads where the model has no such head. In a client's first
    round there is no last one, and the term is left out; so it is in the round after one that did not begin from the
    model that was sent: its units are in another order. Nor is it compared with a network of other widths.

    Args:
        mu: weight of the contrast; the paper takes 5 on CIFAR-10, 1 on CIFAR-100 and Tiny-ImageNet.
        temperature: of the contrast.

    Source: Li et al., "Model-Contrastive Federated Learning", https://arxiv.org/abs/2103.16257, equations 3 and 4.
    """

    mu: float = 1.0
    temperature: float = 0.5
    name = "moon"

    def __post_init__(self) -> None:
        if not 0 <= self.mu < float("inf"):
            raise UsageError(f"moon: mu is {self.mu}; give a number of 0 or more")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"moon: temperature is {self.temperature}; give a number above 0")

    def objective(self, task: Task, /) -> Objective:
        """See :class:`ClientAlgorithm`."""
        before = {n.removeprefix(_PREVIOUS): t for n, t in task.client_state.items() if n.startswith(_PREVIOUS)}
        if not before or not task.began or any(before[name].shape != t.shape for name, t in task.sent.items()):
            return labels_of(task)
        return _Contrasted(
            labels_of(task), task.network(task.sent, "sent"), task.network(before, "previous"), self, task.device
        )

    def remember(self, state: Mapping[str, Tensor], task: Task, /) -> dict[str, Tensor]:
        """Keep the network of this round, unless its units are in an order of their own."""
        return {_PREVIOUS + name: tensor for name, tensor in state.items()} if task.began else {}


def contrast(z: Tensor, z_global: Tensor, z_previous: Tensor, temperature: float) -> Tensor:
    """Return ``-log(exp(cos(z, z_glob) / T) / (exp(cos(z, z_glob) / T) + exp(cos(z, z_prev) / T)))``, averaged.

    Args:
        z: shape (samples, features).
        z_global: the same shape.
        z_previous: the same shape.
        temperature: T.
    """
    near = functional.cosine_similarity(z, z_global, dim=1)
    far = functional.cosine_similarity(z, z_previous, dim=1)
    scores = torch.stack([near, far], dim=1) / temperature
    return functional.cross_entropy(scores, torch.zeros(len(z), dtype=torch.long, device=z.device))


class Headed(nn.Module):
    """A classifier with a projection head: ``classes <- projection (256) <- ReLU <- hidden (d) <- body (d)``.

    Args:
        body: the model without its last linear layer.
        features: what it gives, d.
        projected: units of the projection.
        classes: outputs.
    """

    def __init__(self, body: nn.Module, features: int, projected: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.hidden = nn.Linear(features, features)
        self.projection = nn.Linear(features, projected)
        self.classifier = nn.Linear(projected, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs of the model to logits (N, classes)."""
        return self.classifier(self.projection(self.hidden(self.body(x)).relu()))


def with_head(model: nn.Module, projected: int = 256) -> Headed:
    """Put a projection head in the place of a model's last linear layer.

    Args:
        model: not changed; the head is initialised from PyTorch's random generator.
        projected: units of the projection.

    Raises:
        ModelError: the model has no linear layer.

    >>> from weldnet.models import mlp
    >>> with_head(mlp((4, 3, 2)), 8)(torch.zeros(5, 4)).shape
    torch.Size([5, 2])
    """
    if projected < 1:
        raise UsageError(f"projection is {projected}; give a number of units, 1 or more")
    body = copy.deepcopy(model)
    path, last = _last_linear(body)
    parent, _, name = path.rpartition(".")
    setattr(body.get_submodule(parent), name, nn.Identity())
    return Headed(body, last.in_features, projected, last.out_features)


def _last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found or not found[-1][0]:
        raise ModelError(f"{type(model).__name__} has no linear layer inside; MOON contrasts what the last one reads")
    return found[-1]


class _View:
    """What a network makes of the images that it saw last: its representation z."""

    def __init__(self, model: nn.Module) -> None:
        self.z = torch.empty(0)
        if isinstance(model, Headed):
            model.projection.register_forward_hook(self._see_output)
        else:
            _last_linear(model)[1].register_forward_pre_hook(self._see_input)

    def _see_output(self, module: nn.Module, given: Any, output: Tensor) -> None:
        self.z = output.flatten(1).float()

    def _see_input(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.z = given[0].flatten(1).float()


class _Contrasted:
    """A loss on labels, and the contrast with two frozen networks."""

    def __init__(
        self,
        labels: Labels,
        sent: nn.Module,
        previous: nn.Module,
        moon: Moon,
        device: str | torch.device | None,
    ) -> None:
        self.labels, self.moon = labels, moon
        self.inputs, self.name = labels.inputs, labels.name
        self.identity: Mapping[str, Any] = {"mu": moon.mu, "temperature": moon.temperature}
        self.networks = [placed(network, find_device(device)) for network in (sent, previous)]
        self._views = [_View(network) for network in self.networks]

    def attach(self, model: nn.Module) -> None:
        """See :class:`weldnet.training.Objective`."""
        self._own = _View(model)

    def __call__(self, logits: Tensor, rows: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`weldnet.training.Objective`."""
        loss, right = self.labels(logits, rows, batch)
        with torch.no_grad():
            for network in self.networks:
                network(batch)
        near, far = (view.z for view in self._views)
        return loss + self.moon.mu * contrast(self._own.z, near, far, self.moon.temperature), right
