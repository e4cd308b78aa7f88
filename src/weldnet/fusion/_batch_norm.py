"""BatchNorm statistics, re-estimated on unlabelled inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from weldnet._arrays import send
from weldnet._modules import explained, home
from weldnet.activations import Inputs, unlabelled_batches
from weldnet.errors import DataError, UsageError
from weldnet.fusion._averaged import Averaged, Repaired
from weldnet.fusion._samples import refuse_labels

__all__ = ["BatchNormReset", "has_statistics"]


@final
@dataclass(frozen=True, kw_only=True)
class BatchNormReset:
    """Re-estimate BatchNorm's running statistics on unlabelled inputs.

    The average of two networks has smaller activations than its parents, so the averaged statistics are wrong. One
    pass with every BatchNorm layer in training mode (and nothing else) replaces them by the mean over batches.

    Args:
        samples: inputs to use at most.
        batch_size: inputs a batch, for data that does not come in batches.

    Source: Jordan et al., "REPAIR", https://arxiv.org/abs/2211.08403, section 4 (resetting statistics).
    """

    samples: int = 2048
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.samples < 2 or self.batch_size < 2:
            raise UsageError(f"{self}: samples and batch_size must be at least 2, a variance needs two")

    def __call__(self, averaged: Averaged, data: Inputs | None, /) -> Repaired:
        """Return a copy with new statistics.

        Raises:
            DataError: there is no data, fewer than two inputs, or inputs that the model rejects.
            UsageError: the model has no BatchNorm statistics.
        """
        if data is None:
            raise DataError("repair 'data' needs unlabelled inputs; give data=, or repair='none'")
        model = averaged.model
        example = averaged.example_input
        if not has_statistics(model):
            raise UsageError(f"{type(model).__name__} has no BatchNorm statistics to re-estimate; give repair='none'")
        model = copy.deepcopy(model)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        seen = 0
        with torch.no_grad(), _collecting(model):
            for inputs in self._whole_batches(data):
                refuse_labels(example, inputs)
                inputs = send(inputs, home(model), dtype if inputs.is_floating_point() else None, copy=True)
                with explained(model, f"unlabelled inputs of shape {tuple(inputs.shape)}"):
                    model(inputs)
                seen += len(inputs)
        return Repaired(model, f"data: BatchNorm statistics re-estimated on {seen} unlabelled inputs")

    def _whole_batches(self, data: Inputs) -> Iterator[Tensor]:
        """Join a single leftover input to the batch before it: a variance needs two."""
        held: Tensor | None = None
        for inputs in unlabelled_batches(data, samples=self.samples, batch_size=self.batch_size):
            if held is not None and len(held) > 1 and len(inputs) > 1:
                yield held
                held = inputs
            else:
                held = inputs if held is None else torch.cat([held, inputs])
        if held is None or len(held) < 2:
            raise DataError("there is only one unlabelled input and a variance needs two; give more data")
        yield held


def has_statistics(model: nn.Module) -> bool:
    """Whether a model keeps BatchNorm statistics."""
    return bool(_norms(model))


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _collecting(model: nn.Module) -> Iterator[None]:
    """BatchNorm in training mode with a cumulative mean, all else in eval mode; counters and settings come back."""
    flags = [(module, module.training) for module in model.modules()]
    norms = _norms(model)
    settings = [
        (n, n.momentum, None if n.num_batches_tracked is None else n.num_batches_tracked.clone()) for n in norms
    ]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum, counter in settings:
            norm.momentum, norm.num_batches_tracked = momentum, counter
        for module, flag in flags:
            module.training = flag
