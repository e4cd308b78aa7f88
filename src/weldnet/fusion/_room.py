"""Room: which spaces of a network can hold more units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weldnet.checkpoints import load_into, resized
from weldnet.errors import ModelError
from weldnet.fusion._average import average
from weldnet.structure import Referee, Structure, Wider, live_referee, widened

__all__ = ["Room", "find_room", "wider_model"]


@dataclass(frozen=True)
class Room:
    """Which spaces can be widened.

    Args:
        structure: of the network.
        spaces: that can hold more units without any other change of what the network computes.
        kept: the other root spaces, with the reason.
    """

    structure: Structure
    spaces: tuple[str, ...]
    kept: Mapping[str, str]


def find_room(model: nn.Module, structure: Structure, example_input: Any, seed: int) -> Room:
    """Find the spaces that can be widened, and prove it.

    A space qualifies if every unit works by itself: some units are doubled, what reads them is shared out between the
    two, and the network must answer as before (float64, live activations). Norms and softmaxes over the units, widths
    that are written into the forward pass, and tensors that weldnet reads wrongly all show there.

    Args:
        model: not changed.
        structure: its structure.
        example_input: what it takes.
        seed: of everything random.
    """
    kept = {root.name: why for root in structure.roots if (why := _excluded(structure, root.name))}
    names = [root.name for root in structure.roots if root.name not in kept]
    if not names:
        return Room(structure, (), kept)
    generator = torch.Generator().manual_seed(seed)
    referee = live_referee(model, example_input, structure, generator)
    room = Room(structure, tuple(names), kept)
    if _doubling_fails(room, referee, names, generator):
        kept |= {name: why for name in names if (why := _doubling_fails(room, referee, [name], generator))}
    return Room(structure, tuple(name for name in names if name not in kept), kept)


def wider_model(
    model: nn.Module, states: Sequence[Mapping[str, Tensor]], shares: Sequence[float], wider: Wider
) -> nn.Module:
    """Return a copy of a model that holds several networks' tensors in the wider universe, averaged where they meet.

    Args:
        model: gives the class.
        states: of the networks.
        shares: of the networks.
        wider: where their units lie.

    Raises:
        ModelError: the model has modules whose sizes weldnet cannot change.
        FusionError: integer tensors differ.
    """
    aliases = wider.structure.aliases
    state: dict[str, Tensor] = {}
    for name, tensor in states[0].items():
        if name not in aliases:
            tensors = [other[name] for other in states]
            moves = tensor.is_floating_point() or tensor.is_complex()
            state[name] = (
                widened(name, tensors, wider, shares) if moves else average([{name: t} for t in tensors])[name]
            )
    state |= {alias: state[name] for alias, name in aliases.items()}
    other = resized(model, state)
    load_into(other, state, "fused")
    return other


def _excluded(structure: Structure, root: str) -> str:
    if len(structure.tree(root)) > 1:
        return "other spaces are nested in it"
    if any(place.view is not None for place in structure.places_of(root)):
        return "it lies across joint axes of a tensor"
    if any(place.role == "both" for place in structure.places_of(root)):
        return "a tied tensor writes and reads it"
    return ""


def _doubling_fails(room: Room, referee: Referee, names: Sequence[str], generator: torch.Generator) -> str:
    """Say why a network with some doubled units is not the same, or nothing if it is."""
    targets, units = {}, {}
    taken: set[int] = set()  # widths that must agree show only where they do not
    for name in names:
        size = room.structure.space(name).size
        drawn = [1 + i for i in torch.randperm(size, generator=generator).tolist()]
        extra = next((n for n in drawn if n not in taken), drawn[0])
        taken.add(extra)
        twin = torch.arange(size)
        twin[torch.randperm(size, generator=generator)[:extra]] = size + torch.arange(extra)
        targets[name], units[name] = torch.stack([torch.arange(size), twin]), size + extra
    wider = Wider(room.structure, targets, units)
    try:
        error = referee.error_of(wider_model(referee.model, [referee.state] * 2, (0.3, 0.7), wider))
    except ModelError as failure:
        return f"other widths do not run ({str(failure).partition(';')[0]})"
    return "" if error <= referee.tolerance else "its units do not work one by one: a norm or a softmax is over them"
