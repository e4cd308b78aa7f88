"""Transport: carry a state dict along an alignment."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weldnet.assignment import Coupling, NestedPlan, Permutation, Plan
from weldnet.errors import AlignmentError, WidthError
from weldnet.structure import Maps, Shares, Space, Structure, blend, carried, renumber, require_correspondence

__all__ = ["transport", "truncation"]


def transport(
    state: Mapping[str, Tensor],
    structure: Structure,
    couplings: Mapping[str, Coupling],
    target: Structure | None = None,
) -> dict[str, Tensor]:
    """Carry a network's tensors to the universe: every unit to the number that its coupling gives it.

    Along permutations the function of the network does not change, and tensors of any type go bit for bit. Along soft
    couplings every universe unit is a weighted mean of units, and what is read from a unit is split over the universe
    units that it goes to. The function then changes, unless the units that are brought together are equal.

    Args:
        state: tensors by name; not changed.
        structure: where the units lie.
        couplings: one for each space, such as ``alignment["b"]``; spaces left out stay.
        target: the universe's structure, where its widths are other ones.

    Returns:
        A new dict with the same keys, dtypes and devices, and the universe's shapes.

    Raises:
        AlignmentError: the state lacks a tensor of the structure; a coupling names an unknown space, has another size
            than its space, or breaks up blocks; or a soft coupling meets a tensor of integers.
        WidthError: the target differs in more than the sizes of spaces without blocks, or from the couplings.
    """
    known = {space.name for space in structure.spaces}
    unknown = [name for name in couplings if name not in known]
    if unknown:
        raise AlignmentError(f"the structure has no space {unknown[0]!r}; was the alignment made for another model?")
    missing = [name for name in structure.shapes if name not in state]
    if missing:
        raise AlignmentError(
            f"the state has no tensor {missing[0]!r}, which the structure lists; give the state dict of the model that "
            "the structure was captured from"
        )
    if target is not None:
        require_correspondence(structure, target, ("the network", "the universe"))
    for space in structure.spaces:
        if space.name in couplings:
            _check_size(space, couplings[space.name])
        _check_width(space, couplings.get(space.name), (target or structure).space(space.name).size)
        if space.parent is not None and (space.name in couplings or space.parent in couplings):
            _check_blocks(space, couplings)
    hard = {name: c.source for name, c in couplings.items() if isinstance(c, Permutation)}
    if len(hard) == len(couplings):
        return renumber(state, structure, hard)
    return _transport_softly(state, structure, couplings, target or structure)


def truncation(structure: Structure, target: Structure) -> dict[str, Coupling]:
    """Return what cutting off does: units keep their numbers; those behind the universe's last one are dropped.

    Args:
        structure: of the network.
        target: of the universe. Where that is wider, its last units get nothing: zeros.
    """
    found: dict[str, Coupling] = {}
    for space, end in zip(structure.spaces, target.spaces, strict=True):
        if space.size == end.size:
            found[space.name] = Permutation.identity(space.size)
        else:
            values = torch.eye(space.size, end.size, dtype=torch.float64)
            found[space.name] = Plan(values, values.sum(1), values.sum(0))
    return found


def _check_size(space: Space, coupling: Coupling) -> None:
    if len(coupling) != space.size:
        raise AlignmentError(f"space {space.name!r} has {space.size} units, its coupling {len(coupling)}")
    if isinstance(coupling, NestedPlan) and (space.parent is None or coupling.block != space.block):
        nested = "is not nested" if space.parent is None else f"is nested in blocks of {space.block}"
        raise AlignmentError(
            f"space {space.name!r} {nested}; its coupling is a nested plan in blocks of {coupling.block}"
        )
    if isinstance(coupling, Plan) and space.parent is not None:
        raise AlignmentError(f"space {space.name!r} is nested in {space.parent!r}; give a NestedPlan, not a Plan")


def _check_width(space: Space, coupling: Coupling | None, width: int) -> None:
    units = coupling.values.shape[1] if isinstance(coupling, Plan) else space.size
    if units != width:
        what = "it has no coupling" if coupling is None else f"its coupling brings it to {units}"
        raise WidthError(
            f"space {space.name!r} has {space.size} units in the network and {width} in the universe, and {what}; give "
            "target= the structure that the coupling was made for"
        )


def _check_blocks(space: Space, couplings: Mapping[str, Coupling]) -> None:
    assert space.parent is not None
    coupling = couplings.get(space.name, Permutation.identity(space.size))
    parent = couplings.get(space.parent, Permutation.identity(space.size // space.block))
    if isinstance(coupling, Permutation) and isinstance(parent, Permutation):
        blocks = coupling.source.reshape(-1, space.block) // space.block
        fits = bool((blocks == parent.source[:, None]).all())
    else:
        outer = coupling.outer.double() if isinstance(coupling, NestedPlan) else None
        fits = outer is not None and torch.allclose(parent.matrix(), outer, rtol=1e-4, atol=1e-5)
    if not fits:
        raise AlignmentError(
            f"space {space.name!r}: its coupling does not keep the blocks of {space.parent!r} together"
        )


def _transport_softly(
    state: Mapping[str, Tensor], structure: Structure, couplings: Mapping[str, Coupling], target: Structure
) -> dict[str, Tensor]:
    """Carry along permutations and plans that keep every unit's weight as stacks, along other plans axis by axis."""
    moved: dict[str, Tensor] = {}
    known: dict[tuple[torch.device, torch.dtype], Maps] = {}
    shares = {s: Shares(c.means, c.splits) for s, c in couplings.items() if isinstance(c, Plan) and not c.balanced}
    steady = {s: c for s, c in couplings.items() if s not in shares}
    for name, tensor in state.items():
        spaces = [place.space for place in structure.places_in(name)]
        soft = [s for s in spaces if not isinstance(couplings.get(s), Permutation | None)]
        if not soft:
            hard = {s: c.source for s in spaces if isinstance(c := couplings.get(s), Permutation)}
            moved |= renumber({name: tensor}, structure, hard)
            continue
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise AlignmentError(
                f"{name} holds {tensor.dtype} and lies in space {soft[0]!r}, whose coupling is soft; integers have no "
                "weighted means: give that space a permutation"
            )
        # Half precision would lose the shares of small weights.
        precise = torch.promote_types(tensor.dtype, torch.float32)
        key = (tensor.device, precise)
        maps = known.get(key) or known.setdefault(key, _maps(structure, steady, *key))
        carried_there = carried(tensor[None].to(precise), structure, name, maps)[0]
        moved[name] = blend(carried_there, structure, name, target, shares).to(tensor.dtype)
    for alias, name in structure.aliases.items():
        if alias in moved and name in moved:
            moved[alias] = moved[name]
    return moved


def _maps(structure: Structure, couplings: Mapping[str, Coupling], device: torch.device, dtype: torch.dtype) -> Maps:
    """See one network's couplings as a stack of one."""
    whole: dict[str, Tensor] = {}
    inner: dict[str, Tensor] = {}
    for name, coupling in couplings.items():
        if isinstance(coupling, Permutation):
            whole[name] = coupling.source[None].to(device)
        else:
            whole[name] = coupling.matrix(dtype)[None].to(device)
        space = structure.space(name)
        if isinstance(coupling, NestedPlan):
            values = coupling.inner if coupling.hard_inside else coupling.inner.to(dtype)
            inner[name] = values[None].to(device)
        elif isinstance(coupling, Permutation) and space.parent is not None:
            inner[name] = _inner_of(coupling, space.block)[None].to(device)
    return Maps(whole, inner)


def _inner_of(coupling: Permutation, block: int) -> Tensor:
    """What a permutation does inside the pairs of blocks that it couples; the others stay in order."""
    source = coupling.source.reshape(-1, block)
    inner = torch.arange(block).repeat(len(source), len(source), 1)
    inner[source[:, 0] // block, torch.arange(len(source))] = source % block
    return inner
