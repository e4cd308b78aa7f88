"""Budget: which units are kept side by side, if a fused network may be larger than one parent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from weldnet.alignment import Alignment
from weldnet.assignment import Coupling, injection, targets_of
from weldnet.fusion._room import Room
from weldnet.structure import Structure, Wider, unit_rows, used_entries

__all__ = ["keep_apart"]

State = Mapping[str, Tensor]

#: A space's units leave in at most this many steps, so that spaces can take turns.
STEPS = 8


def keep_apart(
    size: float, states: Mapping[str, State], room: Room, alignment: Alignment, parameters: Sequence[str]
) -> Alignment:
    """Choose the units to keep apart and return the injections of all networks.

    At every universe unit each network stays with the others or gets a unit of its own; one always stays. What a
    network's leaving is worth is the error that merging makes in what the unit passes on, relative to its layer: with
    the incoming weights ``a_k`` and ``a`` of network k and of the mean of the others, and the outgoing ones ``b_k``
    and ``b``,

        |a_k - a|^2 |b_k - b|^2 / (mean over units of |a_k|^2 + |a|^2, times the sum of |b_k|^2 + |b|^2)

    (merging two units ``(a, b)`` gives ``(a + a')(b + b') / 4`` in place of ``(a b + a' b') / 2``; the difference is
    ``(a - a')(b - b') / 4``). Step by step the space whose next units are worth most for the entries that they add
    takes them, until nothing fits the budget any more. Next to units that are apart already leaving costs less.

    Args:
        size: the budget, in parents.
        states: the networks' tensors in the universe, by name.
        room: what can be widened.
        alignment: permutations.
        parameters: names of the tensors that count, each once.

    Returns:
        The alignment, with injections in the spaces where units are kept apart.
    """
    choice = _Choice(list(states.values()), room, parameters)
    choice.fill(math.floor(size * choice.used()))
    wider = choice.wider({})
    couplings = {
        name: {s: _composed(c, wider, s, k) for s, c in alignment[name].items()} for k, name in enumerate(states)
    }
    return Alignment(couplings, alignment.method, alignment.stats)


def _composed(coupling: Coupling, wider: Wider, space: str, k: int) -> Coupling:
    units = wider.units.get(space, len(coupling))
    if units == len(coupling):
        return coupling
    return injection(wider.targets[space][k][targets_of(coupling)], units)


class _Choice:
    """How many of each space's units have left, the most worthwhile first."""

    def __init__(self, states: Sequence[State], room: Room, parameters: Sequence[str]) -> None:
        self.room, self.parameters, self.networks = room, parameters, len(states)
        self.queues = {space: _queue(states, room.structure, space) for space in room.spaces}
        self.left = dict.fromkeys(room.spaces, 0)

    @cached_property
    def tensors(self) -> dict[str, list[str]]:
        """The parameters in which each space has places."""
        held = {s: {place.tensor for place in self.room.structure.places_of(s)} for s in self.room.spaces}
        return {s: [name for name in self.parameters if name in names] for s, names in held.items()}

    def fill(self, budget: int) -> None:
        """Let units leave while the parameters in use do not exceed ``budget``."""
        used = self.used()
        offers: dict[str, tuple[float, int, int]] = {}  # worth for its price, how many leave, price
        while True:
            for space in self.room.spaces:
                if space not in offers:
                    offers[space] = self._offer(space, budget - used)
            space = max(offers, key=lambda s: offers[s][0], default=None)
            if space is None or not offers[space][1]:
                return
            _, count, price = offers[space]
            if price > budget - used:  # an older offer: less may fit now
                del offers[space]
                continue
            self.left[space] += count
            used += price
            touched = set(self.tensors[space])
            offers = {s: offer for s, offer in offers.items() if s != space and not touched & set(self.tensors[s])}

    def used(self, names: Sequence[str] | None = None, more: Mapping[str, int] | None = None) -> int:
        """Count the parameters in use, with ``more`` units leaving."""
        wider = self.wider(more or {})
        return sum(used_entries(name, wider) for name in (self.parameters if names is None else names))

    def wider(self, more: Mapping[str, int]) -> Wider:
        """Return where the units lie, with ``more`` units leaving."""
        targets, units = {}, {}
        for space, queue in self.queues.items():
            size = self.room.structure.space(space).size
            targets[space] = torch.arange(size).repeat(self.networks, 1)
            leaving = sorted(queue[i][1:] for i in range(self.left[space] + more.get(space, 0)))
            for number, (unit, network) in enumerate(leaving):
                targets[space][network, unit] = size + number
            units[space] = size + len(leaving)
        return Wider(self.room.structure, targets, units)

    def _offer(self, space: str, budget: int) -> tuple[float, int, int]:
        """The next units of a space: a whole step, or as many of it as the budget allows."""
        queue, names = self.queues[space], self.tensors[space]
        before = self.used(names)
        step = min(math.ceil(len(queue) / STEPS), len(queue) - self.left[space])
        low, high = 0, step
        while low < high:  # the whole step first: mostly it fits
            middle = high if high == step and low == 0 else (low + high + 1) // 2
            if self.used(names, {space: middle}) - before <= budget:
                low = middle
            else:
                high = middle - 1
        if not low:
            return -1.0, 0, 0
        price = self.used(names, {space: low}) - before
        worth = sum(queue[i][0] for i in range(self.left[space], self.left[space] + low))
        return worth / max(price, 1), low, price


def _queue(states: Sequence[State], structure: Structure, space: str) -> list[tuple[float, int, int]]:
    """All units of a space that could leave as (worth, unit, network), the most worthwhile first."""
    worth = _worth(states, structure, space)
    leaving = worth.argsort(dim=0, stable=True)[1:]  # the one that fits the others best stays
    found = [(float(worth[k, unit]), unit, k) for unit in range(worth.shape[1]) for k in leaving[:, unit].tolist()]
    return sorted(found, key=lambda entry: (-entry[0], entry[1:]))


def _worth(states: Sequence[State], structure: Structure, space: str) -> Tensor:
    """The error that merging makes, see :func:`keep_apart`; shape (networks, units)."""
    sides: dict[str, list[Tensor]] = {"writes": [], "reads": []}
    for place in structure.places_of(space):
        rows = torch.stack(
            [unit_rows(state[place.tensor].detach(), structure, place).double().cpu() for state in states]
        )
        others = (rows.sum(0) - rows) / (len(rows) - 1)
        size = (rows.square() + others.square()).sum(2).mean()
        sides[place.role].append((rows - others).square().sum(2) / size.clamp_min(torch.finfo(size.dtype).tiny))
    return combine([torch.stack(found).mean(0) for found in sides.values() if found])


def combine(sides: list[Tensor]) -> Tensor:
    """Put the distances of the incoming and the outgoing weights, each (networks, units), together."""
    return torch.stack(sides).prod(0) / sides[0].shape[1]
