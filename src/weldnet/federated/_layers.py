"""FedMA's layer rounds: match one layer, freeze it, train the rest, match the next one."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from weldnet.alignment import MatchedAveraging, Problem
from weldnet.alignment.matched_averaging import match_space
from weldnet.errors import FusionError, UsageError
from weldnet.federated._blueprint import Blueprint
from weldnet.federated._rule import Carried, Setting, Weighting, mean_of
from weldnet.federated._update import ClientUpdate, Dropped, Screen, Sound
from weldnet.fusion import find_room
from weldnet.structure import Structure, Wider, widened

__all__ = ["LayerRounds", "Matching", "cut_out"]

State = Mapping[str, Tensor]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Matching:
    """What matching one layer gave.

    Args:
        space: the layer's units.
        states: what each client goes on from: its own network, its units of this space in the place of the global ones,
            and all that is matched by now averaged.
        frozen: the tensors that are matched by now.
        targets: the global unit of each of a client's units, by client.
        units: how many global units there are.
        seconds: that it took.
    """

    space: str
    states: dict[str, dict[str, Tensor]]
    frozen: frozenset[str]
    targets: dict[str, Tensor]
    units: int
    seconds: float

    @property
    def moved(self) -> dict[str, float]:
        """The share of units that change their number, by client."""
        found = {n: (t != torch.arange(len(t))).double().mean() for n, t in self.targets.items()}
        return {name: float(share) for name, share in found.items()}


@final
@dataclass
class LayerRounds:
    """One communication round of FedMA, from the input to the output.

    In phase 0 clients train their whole networks. :meth:`match` takes these and matches the first layer; clients go on
    from what it gives, with all that is matched frozen; and so on through all layers. What clients send after the last
    one differs in the output layer only: :meth:`finish` averages that by class counts.

    Args:
        method: of the matching; with ``growth`` layers become wider where units have no counterpart.
        blueprint: of the clients' networks as they are now.
        weighting: of the clients in the average.
        seed: of the random order in which clients are matched again.
        device: where to match; the networks' own device if None.
        done: the spaces that are matched, in order.
        dropped: who is out of the round, and why.

    Raises:
        UsageError: the network has spaces with blocks, which are not matched layer by layer.

    Source: Wang et al., "Federated Learning with Matched Averaging", https://arxiv.org/abs/2002.06440, algorithm 1.
    """

    method: MatchedAveraging
    blueprint: Blueprint
    weighting: Weighting = "examples"
    seed: int = 0
    device: torch.device | None = None
    done: list[str] = field(default_factory=list[str])
    dropped: list[Dropped] = field(default_factory=list[Dropped])

    def __post_init__(self) -> None:
        nested = next((s for s in self.blueprint.structure.spaces if s.parent is not None), None)
        if nested is not None:
            raise UsageError(
                f"space {nested.name!r} lies in blocks of {nested.parent!r}, which FedMA's layer rounds do not match; "
                "give the rule fedma without layers"
            )

    @property
    def layers(self) -> int:
        """How many layers there are to match."""
        return len(self.blueprint.structure.roots)

    @property
    def finished(self) -> bool:
        """Whether all of them are matched."""
        return len(self.done) >= self.layers

    def match(self, updates: Sequence[ClientUpdate], expected: State) -> Matching | None:
        """Match the next layer.

        Args:
            updates: of all clients that are in the round.
            expected: names, shapes and dtypes that they must have.

        Returns:
            None if fewer than two updates are sound: there is nothing to match.

        Raises:
            FusionError: the method wants a layer wider that cannot be.
        """
        start = time.perf_counter()
        screen = Screen(updates, expected, self.blueprint, classes=True)
        sounds = list(screen)
        self.dropped += screen.dropped
        if len(sounds) < 2:
            return None
        structure = self.blueprint.structure
        problem = Problem(structure, {sound.client: sound.state for sound in sounds}, self.seed, self.device)
        with torch.no_grad():
            space, targets, units = match_space(self.method, problem, self.done)
            self._check_growth(space, units)
            states, frozen = self._carried(sounds, space, targets, units)
        self.done.append(space)
        if units != structure.space(space).size:
            model = self.blueprint.module(next(iter(states.values())))
            self.blueprint = Blueprint.of(model, self.blueprint.example_input, structure.outputs or None)
        return Matching(
            space=space,
            states=states,
            frozen=frozen,
            targets=targets,
            units=units,
            seconds=time.perf_counter() - start,
        )

    def finish(self, updates: Sequence[ClientUpdate], expected: State) -> dict[str, Tensor] | None:
        """Average what clients send after the last layer was matched; the output layer class by class.

        Returns:
            The global network, or None if no update is sound.
        """
        screen = Screen(updates, expected, self.blueprint, classes=True)
        setting = Setting(reference=expected, blueprint=self.blueprint)
        with torch.no_grad():
            found = mean_of((Carried(s, s.state) for s in screen), setting, self.weighting, classes=True)
        self.dropped += screen.dropped
        return found.state if found else None

    def _carried(
        self, sounds: Sequence[Sound], space: str, targets: Mapping[str, Tensor], units: int
    ) -> tuple[dict[str, dict[str, Tensor]], frozenset[str]]:
        structure, last = self.blueprint.structure, self.blueprint.last
        rows = torch.stack([targets[sound.client] for sound in sounds])
        wider = Wider(structure, {space: rows}, {space: units})
        counts = [sound.update.examples if self.weighting == "examples" else 1 for sound in sounds]
        shares = [count / sum(counts) for count in counts]
        matched = {*self.done, space}
        frozen = frozenset(
            name
            for name in structure.shapes
            if name not in last
            and (places := structure.places_in(name))
            and all(place.space in matched for place in places)
        )
        states: dict[str, dict[str, Tensor]] = {sound.client: {} for sound in sounds}
        for name in sounds[0].state:
            tensors = [sound.state[name] for sound in sounds]
            here = any(place.space == space for place in structure.places_in(name))
            if here and name in frozen:
                mean = _lay(name, tensors, wider, shares)
                tensors = [mean] * len(sounds)
            elif here:
                tensors = [
                    _lay(name, [t], Wider(structure, {space: rows[k : k + 1]}, {space: units}), [1.0])
                    for k, t in enumerate(tensors)
                ]
            for sound, tensor in zip(sounds, tensors, strict=True):
                states[sound.client][name] = tensor
        return states, frozen

    def _check_growth(self, space: str, units: int) -> None:
        blueprint = self.blueprint
        if units == blueprint.structure.space(space).size:
            return
        room = find_room(blueprint.model, blueprint.structure, blueprint.example_input, self.seed)
        if space not in room.spaces:
            raise FusionError(f"space {space!r} cannot grow: {room.kept.get(space, 'no reason')}; leave growth out")


def cut_out(state: State, structure: Structure, own: Structure, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a client's own sub-network out of the global one: the units that its own went to, in its own order.

    Args:
        state: the global network.
        structure: of the global network.
        own: of the client's network.
        targets: by space, the global unit of each of the client's units; of spaces left out the first units are taken.
    """
    found: dict[str, Tensor] = {}
    pairs = list(zip(structure.places, own.places, strict=True))
    for name, tensor in state.items():
        places = [(whole, part) for whole, part in pairs if whole.tensor == name]
        for axis in dict.fromkeys(whole.axes[0] for whole, _ in places):
            source = torch.full((own.shapes[name][axis],), -1)
            free = torch.ones(tensor.shape[axis], dtype=torch.bool)
            for whole, part in places:
                if whole.axes[0] != axis:
                    continue
                there, here = torch.as_tensor(structure.positions(whole)), torch.as_tensor(own.positions(part))
                chosen = targets.get(whole.space, torch.arange(len(here)))
                source[here.reshape(-1)] = there[chosen].reshape(-1)
                free[there.reshape(-1)] = False
            source[source < 0] = free.nonzero().flatten()
            tensor = tensor.index_select(axis, source)
        found[name] = tensor.clone()
    return found


def _lay(name: str, tensors: Sequence[Tensor], wider: Wider, shares: Sequence[float]) -> Tensor:
    if tensors[0].is_floating_point() or tensors[0].is_complex():
        return widened(name, tensors, wider, shares)
    return functools.reduce(torch.maximum, tensors)  # counters; all other integers are equal
