"""What a training run lowers: cross-entropy to labels, or the divergence from an ensemble."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from weldnet._arrays import send
from weldnet._modules import bring, explained, home
from weldnet.checkpoints import tensors_sha256
from weldnet.errors import DataError

__all__ = ["Ensemble", "Labels", "Objective", "check_fits", "in_layout"]


class Objective(Protocol):
    """The inputs of a run, and what is to be lowered on them.

    ``inputs`` has shape (N, ...), ``name`` says where they come from, ``identity`` tells runs apart that must not go on
    from each other's states, and ``networks`` are those that it runs on the batches beside the trained one.
    """

    @property
    def inputs(self) -> Tensor: ...
    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...
    @property
    def networks(self) -> Sequence[nn.Module]: ...

    def attach(self, model: nn.Module) -> None:
        """See the copy that is about to be trained, once, before its first step; most objectives need not."""
        ...

    def __call__(self, logits: Tensor, rows: Tensor, batch: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return the loss of a batch, and for how many of its samples the largest logit is the right one.

        Both are single numbers on the logits' device: nobody waits for them here. The second may be a plain number too.

        Args:
            logits: what the network answers, shape (batch, classes).
            rows: the numbers of the samples, shape (batch,).
            batch: the inputs as the network got them, augmented and on its device.
        """
        ...


class Labels:
    """Cross-entropy to labels."""

    def __init__(self, inputs: Tensor, labels: Tensor, name: str, smoothing: float) -> None:
        self.inputs, self.labels, self.name, self.smoothing = inputs, labels, name, smoothing
        self.identity: Mapping[str, Any] = {}
        self.networks: Sequence[nn.Module] = ()

    def attach(self, model: nn.Module) -> None:
        """See :class:`Objective`."""

    def __call__(self, logits: Tensor, rows: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        labels = send(self.labels[rows], logits.device)
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        return loss, (logits.argmax(1) == labels).sum()


class Ensemble:
    """Kullback-Leibler divergence from the parents' mean probabilities to the network's, at a temperature.

    ``T^2 KL(mean_k softmax(z_k / T) || softmax(z / T))``; Hinton et al. (2015), https://arxiv.org/abs/1503.02531.
    """

    def __init__(
        self, parents: Sequence[nn.Module], inputs: Tensor, name: str, temperature: float, device: torch.device
    ) -> None:
        self.inputs, self.name, self.temperature = inputs, name, temperature
        prints = [tensors_sha256(parent.state_dict()) for parent in parents]
        self.identity: Mapping[str, Any] = {"parents": prints, "temperature": temperature}
        self.networks = [bring(copy.deepcopy(parent), device).eval().requires_grad_(False) for parent in parents]

    def attach(self, model: nn.Module) -> None:
        """See :class:`Objective`."""

    def __call__(self, logits: Tensor, rows: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Objective`; right is what the ensemble says."""
        # In float64 a network that is its own teacher has no gradient that Adam could blow up from rounding errors.
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        logits = logits.to(wide)
        with torch.no_grad():
            answers = [parent(batch).to(wide) for parent in self.networks]
            target = torch.stack([(answer / self.temperature).softmax(1) for answer in answers]).mean(0)
        loss = functional.kl_div((logits / self.temperature).log_softmax(1), target, reduction="batchmean")
        return self.temperature**2 * loss, (logits.argmax(1) == target.argmax(1)).sum()


def check_fits(model: nn.Module, inputs: Tensor, name: str) -> int:
    """Refuse inputs that the model rejects, before anything is trained; return the number of its classes."""
    probe = copy.deepcopy(model).eval()
    with torch.no_grad(), explained(model, f"{name}: images of shape {tuple(inputs.shape[1:])}"):
        found = probe(inputs[:1].to(home(model)))
    if not isinstance(found, Tensor) or found.dim() != 2:
        got = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise DataError(f"{name}: the model's output for one image is {got}; training needs logits (1, classes)")
    return found.shape[1]


def in_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Put a model's four-dimensional tensors into a memory layout."""
    return model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
