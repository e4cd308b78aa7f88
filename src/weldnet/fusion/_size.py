"""Size: units that match badly are kept side by side instead of averaged, as far as a budget goes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch

from weldnet.alignment import Alignment, transport
from weldnet.assignment import Coupling, Permutation, targets_of
from weldnet.errors import FusionError, StructureError, UsageError
from weldnet.fusion._averaged import Averaged
from weldnet.fusion._budget import keep_apart
from weldnet.fusion._room import Room, find_room, wider_model
from weldnet.fusion._steps import Aligned, Prepared, average_parents, grown_spaces, universe_size
from weldnet.structure import Referee, Wider, capture, used_entries

__all__ = ["Sized", "average_at", "size_notes"]


@final
@dataclass(frozen=True)
class Sized:
    """How large a fused network came out.

    Args:
        asked: the budget, in parents; None where the method itself grew the network.
        used: numbers that are not 0 just because they lie between units kept apart, in parents.
        parameters: how many these are.
        apart: for every widened space its units before and after.
        kept: spaces that were not widened, with the reason.
    """

    asked: float | None
    used: float
    parameters: int
    apart: Mapping[str, tuple[int, int]]
    kept: Mapping[str, str]

    def __str__(self) -> str:
        if not self.apart:
            return f"nothing was kept apart, {self.asked:g} parents were allowed"
        units = ", ".join(f"{space} {before} to {after}" for space, (before, after) in self.apart.items())
        budget = "" if self.asked is None else f" of {self.asked:g}"
        return f"{self.parameters:,} in use, {self.used:.3f}{budget} parents; units: {units}"


def size_notes(sized: Sized | None, stored: int) -> Iterator[str]:
    """Say what a reader should know about the size, in full sentences; ``stored`` is the number of all parameters."""
    if sized is None:
        return
    if not sized.apart:
        yield "no units are kept apart: " + ("the size leaves room for none." if not sized.kept else "see below.")
    elif stored > sized.parameters:
        yield (
            "the numbers between units kept apart are 0 and are stored all the same, so that the network has the "
            "class of its parents."
        )
    if sized.kept:
        listed = [f"{space} ({why})" for space, why in sized.kept.items()]
        more = f", and {len(listed) - 3} more" if len(listed) > 3 else ""
        yield f"spaces that keep their width: {'; '.join(listed[:3])}{more}."


def average_at(size: float, prepared: Prepared, aligned: Aligned) -> tuple[Averaged, Sized | None]:
    """Average aligned networks, and keep units apart where the size or the alignment itself says so.

    Args:
        size: the budget, in parents; what an alignment with injections keeps apart takes no notice of it.
        prepared: the parents and their structure.
        aligned: the parents in the universe.

    Returns:
        What a repair works on, and how large it came out; None for the latter if nothing was to be kept apart.

    Raises:
        UsageError: a size above 1 for an alignment that has units side by side already.
        FusionError: the alignment wants a space wider that cannot be.
        StructureError: a parent does not answer as before in the wider network; nothing was averaged.
    """
    alignment, grown = aligned.alignment, grown_spaces(aligned.alignment, prepared.structure)
    if size == 1 and not grown:
        return average_parents(prepared, aligned), None
    if size != 1:
        _refuse_size(size, alignment)
    first, structure = prepared.parents.first, prepared.structure
    room = find_room(first, structure, prepared.example_input, prepared.seed)
    refused = next((name for name in grown if name not in room.spaces), None)
    if refused is not None:
        raise FusionError(f"space {refused!r} cannot grow: {room.kept[refused]}; align without growth")
    parameters = list(dict(first.named_parameters()))
    if not grown:
        alignment = keep_apart(size, aligned.states, room, alignment, parameters)
    wider = _wider_of(alignment, room)
    whole = sum(math.prod(structure.shapes[name]) for name in parameters)
    used = sum(used_entries(name, wider) for name in parameters) if wider.targets else whole
    apart = {s: (structure.space(s).size, n) for s, n in wider.units.items()}
    sized = Sized(None if grown else size, used / whole, used, apart, room.kept)
    if not wider.targets:
        return average_parents(prepared, aligned), sized
    return _widen(prepared, alignment, wider), sized


def _refuse_size(size: float, alignment: Alignment) -> None:
    """Only networks whose units go one to one can be kept apart unit by unit."""
    if any(not isinstance(c, Permutation) for spaces in alignment.couplings.values() for c in spaces.values()):
        raise UsageError(
            f"size is {size:g}, but {alignment.method} gives no permutations to choose units by; leave size at 1.0, or "
            "take a method for networks of equal widths, such as gamf"
        )


# -- building --------------------------------------------------------------------------------------


def _wider_of(alignment: Alignment, room: Room) -> Wider:
    found = {s: [spaces[s] for spaces in alignment.couplings.values()] for s in grown_spaces(alignment, room.structure)}
    units = {s: universe_size(couplings[0]) for s, couplings in found.items()}
    return Wider(room.structure, {s: torch.stack([targets_of(c) for c in cs]) for s, cs in found.items()}, units)


def _widen(prepared: Prepared, alignment: Alignment, wider: Wider) -> Averaged:
    parents, structure = prepared.parents, prepared.structure
    still = {n: {s: c for s, c in alignment[n].items() if s not in wider.targets} for n in parents.states}
    if prepared.checked:
        _prove(prepared, still, wider)
    moved = [transport(state, structure, still[name]) for name, state in parents.states.items()]
    model = wider_model(parents.first, moved, list(parents.shares.values()), wider)
    return Averaged(
        model,
        parents.modules,
        parents.shares,
        capture(model, prepared.example_input, structure.outputs or None),
        alignment,
        structures=dict.fromkeys(parents.states, structure),
        example_input=prepared.example_input,
        seed=prepared.seed,
    )


def _prove(prepared: Prepared, still: Mapping[str, Mapping[str, Coupling]], wider: Wider) -> None:
    """Every parent, alone in the wider network, must answer as it does."""
    for k, (name, module) in enumerate(prepared.parents.modules.items()):
        generator = torch.Generator().manual_seed(prepared.seed)
        referee = Referee(module, prepared.example_input, generator, prepared.structure.outputs)
        alone = replace(wider, targets={s: targets[k : k + 1] for s, targets in wider.targets.items()})
        state = transport(referee.state, prepared.structure, still[name])
        error = referee.error_of(wider_model(referee.model, [state], [1.0], alone))
        if not error <= referee.tolerance:
            raise StructureError(
                f"{type(module).__name__}: laid into a wider network, {name!r} changes its output by {error:.1e} "
                f"(relative, {referee.tolerance:.0e} allowed); nothing was averaged: leave size at 1.0"
            )
