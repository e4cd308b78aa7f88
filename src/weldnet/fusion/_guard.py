"""Guard: how far a network is from its parents' ensemble on unlabelled inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from weldnet.activations import run
from weldnet.errors import DataError
from weldnet.fusion._averaged import Averaged
from weldnet.structure import output_tensors

__all__ = ["Guard", "answers"]


@final
class Guard:
    """The parents' ensemble on unlabelled inputs.

    One output of shape (..., classes) with two classes or more is read as logits: the ensemble is the mean, by shares,
    of the parents' probabilities, and the distance the mean Kullback-Leibler divergence from it, in nats. Other outputs
    are compared by squared differences, relative to the ensemble's mean square.

    Args:
        averaged: whose parents.
        batches: unlabelled inputs.
    """

    def __init__(self, averaged: Averaged, batches: Sequence[Tensor]) -> None:
        self.outputs = averaged.structure.outputs or None
        self._batches = batches
        self.count = sum(map(len, batches))
        self.targets: list[list[Tensor]] = []
        shares = {name: share for name, share in averaged.shares.items() if share > 0}
        for inputs in batches:
            total: list[Tensor] = []
            for name, share in shares.items():
                found = [t.detach().double() for t in answers(averaged.parents[name], inputs, self.outputs)]
                self.is_classifier = len(found) == 1 and found[0].dim() in (2, 3) and found[0].shape[-1] > 1
                found = [(t.softmax(-1) if self.is_classifier else t) * share for t in found]
                total = [a + b.to(a.device) for a, b in zip(total, found, strict=True)] if total else found
            self.targets.append(total)

    def distance(self, model: nn.Module) -> float:
        """Return how far a network is from the ensemble; infinite if its outputs are not finite."""
        total = scale = 0.0
        for inputs, targets in zip(self._batches, self.targets, strict=True):
            outputs = [t.double() for t in answers(model, inputs, self.outputs)]
            if self.is_classifier:
                p, log_q = targets[0].to(outputs[0].device), outputs[0].log_softmax(-1)
                rows = (torch.xlogy(p, p) - p * log_q).sum(-1)
                total, scale = total + float(rows.sum()), scale + rows.numel()
                continue
            for output, target in zip(outputs, targets, strict=True):
                target = target.to(output.device)
                total += float((output - target).square().sum())
                scale += float(target.square().sum())
        value = total / scale if scale else total
        return value if value == value else float("inf")


def answers(model: nn.Module, inputs: Tensor, outputs: Sequence[str] | None) -> list[Tensor]:
    """Return the floating tensors that count in what a network gives for unlabelled inputs.

    Raises:
        DataError: there are none.
    """
    found = [t for t in output_tensors(run(model, inputs), outputs) if t.is_floating_point()]
    if not found:
        raise DataError(f"{type(model).__name__} gives no floating output that could be compared; give repair='none'")
    return found
