"""Transport: carry a state dict along an alignment."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from weldnet.assignment import Permutation
from weldnet.errors import AlignmentError
from weldnet.structure import Structure, renumber

__all__ = ["transport"]


def transport(
    state: Mapping[str, Tensor], structure: Structure, couplings: Mapping[str, Permutation]
) -> dict[str, Tensor]:
    """Carry a network's tensors to the universe: every unit to the number that its coupling gives it.

    The function of the network does not change.

    Args:
        state: tensors by name; not changed.
        structure: where the units lie.
        couplings: a permutation for each space, such as ``alignment["b"]``; spaces left out stay.

    Returns:
        A new dict with the same keys, shapes, dtypes and devices.

    Raises:
        AlignmentError: a coupling names an unknown space, has another size than its space, or breaks up blocks.
    """
    for space in structure.spaces:
        if space.name in couplings:
            _check_coupling(structure, space.name, couplings)
    unknown = [name for name in couplings if name not in {s.name for s in structure.spaces}]
    if unknown:
        raise AlignmentError(f"the structure has no space {unknown[0]!r}; was the alignment made for another model?")
    return renumber(state, structure, {name: p.source for name, p in couplings.items()})


def _check_coupling(structure: Structure, name: str, couplings: Mapping[str, Permutation]) -> None:
    space, coupling = structure.space(name), couplings[name]
    if len(coupling) != space.size:
        raise AlignmentError(f"space {name!r} has {space.size} units, its coupling {len(coupling)}")
    if space.parent is None:
        return
    blocks = coupling.source.reshape(-1, space.block) // space.block
    parent = couplings.get(space.parent, Permutation.identity(space.size // space.block))
    if not bool((blocks == parent.source[:, None]).all()):
        raise AlignmentError(f"space {name!r}: its coupling does not keep the blocks of {space.parent!r} together")
