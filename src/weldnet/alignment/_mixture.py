"""The average of the networks as a function of their couplings, for methods that learn these by what it answers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from weldnet._arrays import send
from weldnet._modules import home
from weldnet.activations import Inputs, run, unlabelled_batches
from weldnet.alignment._method import Problem
from weldnet.structure import Maps, Structure, carried, output_tensors

__all__ = ["Lesson", "Mixture"]

#: A batch of inputs, and what is to be answered to it.
Lesson = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Mixture:
    """The average of the networks, as a function of their couplings.

    Args:
        model: computes with given tensors.
        networks: copies of the parents; all BatchNorm layers normalise by each batch, so that copies of one network
            answer as it does.
        structure: where the units lie.
        stacks: every tensor that the model takes, of all networks, shape (networks, ...).
    """

    model: nn.Module
    networks: Sequence[nn.Module]
    structure: Structure
    stacks: Mapping[str, Tensor]

    @staticmethod
    def of(problem: Problem, method: str, names: Sequence[str] | None = None) -> Mixture:
        """Put the networks of a problem together, in the order of ``names``, the first of which stays as it lies."""
        found = problem.observer(method).networks
        names = names or list(found)
        networks = [_by_batch(found[name]) for name in names]
        model = networks[0]
        taken = [n for n in model.state_dict() if n not in problem.structure.aliases]
        states = [problem.states[name] for name in names]
        stacks = {n: torch.stack([s[n].detach().to(home(model)) for s in states]) for n in taken if n in states[0]}
        return Mixture(model, networks, problem.structure, stacks)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next((t.dtype for t in self.stacks.values() if t.is_floating_point()), torch.float32)

    def lessons(self, data: Inputs, samples: int, batch_size: int) -> list[Lesson]:
        """Return batches of two inputs or more, where the model is, with the parents' answers to them."""
        batches = unlabelled_batches(data, samples=samples, batch_size=batch_size)
        there = [send(inputs, home(self.model)) for inputs in batches if len(inputs) > 1]
        return [(inputs, self.targets(inputs)) for inputs in there]

    def targets(self, inputs: Tensor) -> list[Tensor]:
        """Return the mean of the parents' outputs."""
        outputs = [output_tensors(run(network, inputs), self.structure.outputs) for network in self.networks]
        return [torch.stack(same).mean(0) for same in zip(*outputs, strict=True) if same[0].is_floating_point()]

    def loss(self, lesson: Lesson, maps: Maps, shares: Tensor | None = None) -> Tensor:
        """Return how far the average's outputs are from the targets, from 0 to 2.

        Args:
            lesson: a batch of inputs, and the targets for it.
            maps: the couplings of all networks but the first.
            shares: of the networks in the average, all the same if None.
        """
        inputs, targets = lesson
        given = inputs.to(home(self.model), self.dtype if inputs.is_floating_point() else None)
        outputs = output_tensors(
            functional_call(self.model, self._state(maps, shares), (given,)), self.structure.outputs
        )
        outputs = [output for output in outputs if output.is_floating_point()]
        return torch.stack([_distance(o, target) for o, target in zip(outputs, targets, strict=True)]).mean()

    def loss_over(self, lessons: Sequence[Lesson], maps: Maps) -> float:
        """Return the loss over all inputs."""
        losses = torch.stack([self.loss(lesson, maps) for lesson in lessons]).cpu().tolist()
        total = sum(loss * len(inputs) for loss, (inputs, _) in zip(losses, lessons, strict=True))
        return total / sum(len(inputs) for inputs, _ in lessons)

    def _state(self, maps: Maps, shares: Tensor | None) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, stack in self.stacks.items():
            if not stack.is_floating_point():
                state[name] = stack[0]
                continue
            precise = stack.to(self.dtype)
            moved = carried(precise[1:], self.structure, name, maps) if self.structure.places_in(name) else precise[1:]
            every = torch.cat([precise[:1], moved])
            mixed = every.mean(0) if shares is None else torch.tensordot(shares.to(every), every, 1)
            state[name] = mixed.to(stack.dtype)
        for alias, name in self.structure.aliases.items():
            if name in state:
                state[alias] = state[name]
        return state


def _by_batch(network: nn.Module) -> nn.Module:
    """Copy a network for evaluation, with BatchNorm layers that normalise by each batch."""
    model = copy.deepcopy(network).eval()
    for module in model.modules():
        if isinstance(module, _NormBase):  # without statistics of its own it takes the batch's, also in eval mode
            module.register_buffer("running_mean", None)
            module.register_buffer("running_var", None)
    return model


def _distance(output: Tensor, target: Tensor) -> Tensor:
    """One minus the correlation over a batch, with every output's mean over the inputs removed."""
    centred = [(values - values.mean(0)).flatten() for values in (output, target)]
    return 1 - torch.nn.functional.cosine_similarity(*centred, dim=0)
