"""What a rule takes and gives, and the plain one: the weighted mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from weldnet.activations import Inputs
from weldnet.assignment import Coupling
from weldnet.errors import UsageError
from weldnet.federated._blueprint import Blueprint
from weldnet.federated._mean import Mean
from weldnet.federated._update import ClientUpdate, Screen, Sound

__all__ = [
    "Carried",
    "Combined",
    "FedAvg",
    "Rule",
    "Setting",
    "Weighting",
    "check_weighting",
    "mean_of",
    "suffixed",
]

Weighting = Literal["examples", "uniform"]


@final
@dataclass(frozen=True, eq=False)
class Carried:
    """A client in the universe.

    Args:
        sound: the client as it came.
        state: its tensors in the universe.
        couplings: who went where, by space; None if nothing was matched.
        moved: the share of units that changed their number.
        objective: what the method says of the alignment.
    """

    sound: Sound
    state: Mapping[str, Tensor]
    couplings: Mapping[str, Coupling] | None = None
    moved: float = 0.0
    objective: float | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What a rule needs beside the updates.

    Args:
        reference: the model that the server has; where ``began`` is true, the one that every client began from.
        blueprint: what is known about it.
        began: whether the clients began from the reference.
        seed: of everything random.
        device: where to align, run networks and repair; the networks' own device if None.
        data: unlabelled inputs on the server, for methods that look at activations.
    """

    reference: Mapping[str, Tensor]
    blueprint: Blueprint
    began: bool = True
    seed: int = 0
    device: torch.device | None = None
    data: Inputs | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Combined:
    """What a rule made of the updates.

    Args:
        state: the network.
        shares: of the clients in it, by name, summing to 1.
        moved: share of units that changed their number, by client.
        objective: what the method says of its alignments (mean over the clients), if it says anything.
        spread: mean squared distance of the clients from the reference, after matching.
        couplings: who went where, by client and space; empty without matching.
    """

    state: dict[str, Tensor]
    shares: Mapping[str, float]
    moved: Mapping[str, float] = field(default_factory=dict[str, float])
    objective: float | None = None
    spread: float = 0.0
    couplings: Mapping[str, Mapping[str, Coupling]] = field(default_factory=dict[str, Mapping[str, Coupling]])


@runtime_checkable
class Rule(Protocol):
    """A rule is a frozen value. ``name`` is the word in configs and records, ``any_width`` says whether clients may
    have other widths, ``needs_classes`` whether they must send class counts.
    """

    @property
    def name(self) -> str: ...
    @property
    def any_width(self) -> bool: ...
    @property
    def needs_classes(self) -> bool: ...

    def __call__(self, screen: Screen, setting: Setting, /) -> Combined | None:
        """Combine the updates that the screen lets through; None if there are none."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """The weighted mean of the clients' networks, unit by unit as they are.

    Args:
        weighting: ``"examples"`` (a client counts by its samples) or ``"uniform"``.

    Source: McMahan et al., https://arxiv.org/abs/1602.05629, algorithm 1.
    """

    weighting: Weighting = "examples"
    any_width = False
    needs_classes = False

    def __post_init__(self) -> None:
        check_weighting("fedavg", self.weighting)

    @property
    def name(self) -> str:
        """``fedavg``, or ``fedavg-uniform``."""
        return suffixed("fedavg", self.weighting)

    def __call__(self, screen: Screen, setting: Setting, /) -> Combined | None:
        """Average."""
        return mean_of((Carried(sound, sound.state) for sound in screen), setting, self.weighting)


def check_weighting(name: str, weighting: str) -> None:
    if weighting not in ("examples", "uniform"):
        raise UsageError(f"{name}: weighting is {weighting!r}; give 'examples' or 'uniform'")


def suffixed(name: str, weighting: Weighting) -> str:
    return f"{name}-uniform" if weighting == "uniform" else name


def mean_of(
    carried: Iterable[Carried], setting: Setting, weighting: Weighting, classes: bool = False
) -> Combined | None:
    """Sum what comes, one client at a time."""
    blueprint = setting.blueprint
    mean = Mean(setting.reference, blueprint.parameters, blueprint.last if classes else None)
    weights: dict[str, float] = {}
    couplings: dict[str, Mapping[str, Coupling]] = {}
    moved: dict[str, float] = {}
    objectives: list[float] = []
    for one in carried:
        update = one.sound.update
        weight = float(update.examples) if weighting == "examples" else 1.0
        mean.add(one.state, weight, _class_weights(update, blueprint) if classes else None)
        weights[update.client] = weight
        if one.couplings is not None:
            couplings[update.client], moved[update.client] = one.couplings, one.moved
        if one.objective is not None:
            objectives.append(one.objective)
    if not weights:
        return None
    total = sum(weights.values())
    return Combined(
        state=mean.result(),
        shares={client: weight / total for client, weight in weights.items()},
        moved=moved,
        objective=sum(objectives) / len(objectives) if objectives else None,
        spread=mean.spread,
        couplings=couplings,
    )


def _class_weights(update: ClientUpdate, blueprint: Blueprint) -> Tensor:
    assert update.classes is not None
    outputs = max((blueprint.structure.shapes[t][axis] for t, axis in blueprint.last.items()), default=0)
    return torch.tensor([float(update.classes.get(c, 0)) for c in range(outputs)], dtype=torch.float64)
