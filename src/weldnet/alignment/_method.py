"""What every alignment method takes and gives: a leaf module that the methods share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Protocol, final, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from weldnet._words import counted
from weldnet.activations import Inputs, Layer, Observer
from weldnet.alignment._workspace import Workspace
from weldnet.assignment import Coupling, NestedPlan, Permutation, Plan
from weldnet.checkpoints import atomic_path, validate_finite
from weldnet.errors import AlignmentError, CheckpointError, UsageError, WidthError
from weldnet.structure import Structure, require_correspondence

__all__ = ["Alignment", "AlignmentMethod", "Problem", "require_width"]

State = Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class Problem:
    """Networks of one structure, to be aligned.

    Args:
        structure: where the units lie.
        states: state dict of each network, by name; two or more.
        seed: of everything random in a method.
        device: where to compute; the networks' own device if None.
        networks: the modules that the states are of, for methods that look at activations.
        data: unlabelled inputs, for methods that look at activations.
        structures: of the networks whose widths are not those of ``structure``, by name.
        workspace: for states that are read from disk and do not fit in memory: where couplings and progress are kept.
            Who reads such states has checked their shapes and numbers.

    Raises:
        AlignmentError: fewer than two networks, or tensors missing.
        WidthError: a tensor's shape is not the structure's.
        CheckpointError: a tensor holds NaN or Inf.
    """

    structure: Structure
    states: Mapping[str, State]
    seed: int = 0
    device: torch.device | None = None
    networks: Mapping[str, nn.Module] | None = None
    data: Inputs | None = None
    structures: Mapping[str, Structure] = field(default_factory=lambda: MappingProxyType({}))
    workspace: Workspace | None = None

    def __post_init__(self) -> None:
        if len(self.states) < 2:
            raise AlignmentError(f"alignment needs two networks or more; got {len(self.states)}")
        for name, state in self.states.items() if self.workspace is None else ():
            _check_shapes(self.structure_of(name), name, state)
            validate_finite(state, name)

    def structure_of(self, name: str) -> Structure:
        """Return the structure of one network."""
        return self.structures.get(name, self.structure)

    def observer(self, method: str, choose: Callable[[Layer], bool] = lambda layer: True) -> Observer:
        """Return what shows all networks' activations.

        Args:
            method: who asks, for the message.
            choose: which layers to look at.

        Raises:
            UsageError: the problem has no modules or no data.
        """
        if self.networks is None or self.data is None:
            lacking = "the networks' modules" if self.networks is None else "unlabelled inputs"
            raise UsageError(f"{method} looks at activations and has not got {lacking}; give nn.Modules, and data=")
        return Observer(self.networks, {name: self.structure_of(name) for name in self.names}, choose)

    @property
    def names(self) -> tuple[str, ...]:
        """The networks' names, in order."""
        return tuple(self.states)


@final
@dataclass(frozen=True)
class Alignment:
    """Who went where: one coupling per space, per network.

    ``alignment["b"]["features.0"]`` is the coupling of network b in that space: a :class:`Permutation`, or a soft
    :class:`Plan` (:class:`NestedPlan` in nested spaces). The universe is in the order of the first network, whose
    couplings are identities, except where a method brings all networks to a soft barycentre.

    Args:
        couplings: by network and space.
        method: what made it, for the record.
        stats: what the method measured: ``objective``, ``sweeps``, ``converged``.
    """

    couplings: Mapping[str, Mapping[str, Coupling]]
    method: str = ""
    stats: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __getitem__(self, network: str) -> Mapping[str, Coupling]:
        try:
            return self.couplings[network]
        except KeyError:
            known = ", ".join(self.couplings)
            raise AlignmentError(f"no network {network!r} in this alignment; it has {known}") from None

    def __str__(self) -> str:
        spaces = max((len(found) for found in self.couplings.values()), default=0)
        moved = ", ".join(f"{name} {share:.1%}" for name, share in self.moved.items())
        objective = self.stats.get("objective")
        quality = f"; objective {objective:.4f}" if isinstance(objective, float) else ""
        return f"{self.method or 'alignment'}: {counted(spaces, 'space')}; units moved: {moved}{quality}"

    def __repr__(self) -> str:
        return f"<Alignment {self}>"

    @property
    def soft(self) -> dict[str, int]:
        """How many spaces of each network have a soft coupling, which changes the network's function."""
        return {n: sum(not isinstance(c, Permutation) for c in found.values()) for n, found in self.couplings.items()}

    @property
    def moved(self) -> dict[str, float]:
        """The share of units that change their number, for each network."""
        return {
            name: sum(p.moved * len(p) for p in spaces.values()) / max(1, sum(len(p) for p in spaces.values()))
            for name, spaces in self.couplings.items()
        }

    def relative_to(self, network: str) -> Alignment:
        """Return the same alignment with the universe in the order of one network.

        Raises:
            AlignmentError: that network's couplings are soft, so that the universe has no order of its own.
        """
        back: dict[str, Permutation] = {}
        for space, coupling in self[network].items():
            if not isinstance(coupling, Permutation):
                raise AlignmentError(
                    f"space {space!r}: the coupling of {network!r} is soft and has no inverse; choose a network whose "
                    "couplings are permutations"
                )
            back[space] = coupling.inverse()
        couplings = {
            name: {space: coupling.onto(back[space]) for space, coupling in spaces.items()}
            for name, spaces in self.couplings.items()
        }
        return Alignment(couplings, self.method, self.stats)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the alignment as one ``.safetensors`` file, atomically.

        Raises:
            CheckpointError: the file cannot be written.
        """
        names = {str(i): name for i, name in enumerate(self.couplings)}
        tensors = {
            f"{i}.{part}/{space}": tensor
            for i, name in names.items()
            for space, coupling in self.couplings[name].items()
            for part, tensor in coupling.tensors.items()
        }
        metadata = {
            "content": "weldnet-alignment",
            "networks": json.dumps(list(names.values())),
            "method": self.method,
            "stats": json.dumps(dict(self.stats), default=str),
        }
        try:
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be written: {error}; free some space or write elsewhere") from error

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Alignment:
        """Read an alignment that :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing or is not an alignment.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("content") != "weldnet-alignment":
                    raise CheckpointError(f"{path} is not an alignment; Alignment.save() writes one")
                networks: list[str] = json.loads(metadata["networks"])
                parts: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in networks}
                for key in file.keys():  # noqa: SIM118  (safe_open has no iterator)
                    head, _, space = key.partition("/")
                    number, _, part = head.partition(".")
                    parts[networks[int(number)]].setdefault(space, {})[part or "source"] = file.get_tensor(key)
            couplings = {
                name: {space: _coupling(tensors) for space, tensors in spaces.items()} for name, spaces in parts.items()
            }
        except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read as an alignment: {error}") from error
        return Alignment(couplings, metadata.get("method", ""), json.loads(metadata.get("stats", "{}")))


def _coupling(tensors: Mapping[str, Tensor]) -> Coupling:
    """Put a coupling together from the tensors that it is made of."""
    kind = next((k for k in (Permutation, Plan, NestedPlan) if set(tensors) == {f.name for f in fields(k)}), None)
    if kind is None:
        raise KeyError(f"no coupling is made of {', '.join(tensors)}")
    return kind(**tensors)


@runtime_checkable
class AlignmentMethod(Protocol):
    """A method is a frozen value; the networks come with the call.

    ``name`` is the word that the registry, the command line and reports use; ``order_invariant`` says whether
    the order of the networks leaves the result's function unchanged; ``equivariant`` whether renumbering an
    input does; ``needs_data`` whether it looks at activations; ``any_width`` whether widths may differ.
    """

    @property
    def name(self) -> str: ...
    @property
    def order_invariant(self) -> bool: ...
    @property
    def equivariant(self) -> bool: ...
    @property
    def needs_data(self) -> bool: ...
    @property
    def any_width(self) -> bool: ...

    def __call__(self, problem: Problem, /) -> Alignment:
        """Align the networks of a problem."""
        ...


def require_width(method: AlignmentMethod, problem: Problem) -> None:
    """Refuse networks of unequal widths for a method that needs equal ones.

    Raises:
        WidthError: naming the space, both widths, and a method that can.
        AlignmentError: the structures do not correspond.
    """
    first = problem.structure_of(problem.names[0])
    for name in problem.names[1:]:
        other = problem.structure_of(name)
        require_correspondence(first, other, (problem.names[0], name))
        for one, two in zip(first.spaces, other.spaces, strict=True):
            if one.size != two.size and not method.any_width:
                raise WidthError(
                    f"space {one.name!r} has {one.size} units in {problem.names[0]!r} and {two.size} in {name!r}; "
                    f"{method.name} needs equal widths: take optimal_transport, or train networks of one width"
                )


def _check_shapes(structure: Structure, name: str, state: State) -> None:
    for tensor, shape in structure.shapes.items():
        if tensor not in state:
            raise AlignmentError(
                f"network {name!r} has no tensor {tensor!r}, which the structure lists; give one architecture"
            )
        got = tuple(state[tensor].shape)
        if got == shape:
            continue
        for place in structure.places_in(tensor):
            axis = place.axes[0]
            if place.view is None and len(got) == len(shape) and got[axis] != shape[axis]:
                raise WidthError(
                    f"space {place.space!r}: {tensor} has {shape[axis]} positions on axis {axis} in the structure, "
                    f"{got[axis]} in {name!r}; train or load networks of equal widths, or give each its structure and "
                    "a method such as optimal_transport"
                )
        raise AlignmentError(f"network {name!r}: {tensor} has shape {got}, the structure {shape}")
