"""What a method that goes from space to space compares: weights whose other axes are carried, or activations.

Activations are tensors like any other: shape (samples, channels), with the layer's units on axis 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from weldnet.activations import find_layers
from weldnet.alignment._method import Problem
from weldnet.assignment import Coupling, Permutation, Plan
from weldnet.structure import Place, Shares, Space, Structure, blend, partners, renumber, unit_rows

__all__ = ["Pictures", "couplings_as_shares", "from_activations", "from_weights", "next_root", "norms"]

#: Of one layer's outputs; more rows are thinned out evenly.
_ROWS = 32768


@dataclass(frozen=True)
class Pictures:
    """Tensors in which the units of networks can be compared.

    Args:
        structures: where the units lie, by network; the first one's is the universe.
        tensors: by network and name, float64.
        shown: spaces that are compared by these tensors only (activations), by space.
    """

    structures: Mapping[str, Structure]
    tensors: Mapping[str, Mapping[str, Tensor]]
    shown: Mapping[str, frozenset[str]]

    @property
    def universe(self) -> Structure:
        """The structure of the universe."""
        return next(iter(self.structures.values()))

    def places(self, space: str) -> list[int]:
        """Return the numbers of the places by which a space's units are compared: those that write them, if any do."""
        places = [(i, p) for i, p in enumerate(self.universe.places) if p.space == space]
        places = [(i, p) for i, p in places if p.tensor in self.shown.get(space, (p.tensor,))]
        return [i for i, p in places if p.role != "reads"] or [i for i, _ in places]

    def ready(self, number: int, done: Mapping[str, object], tree: Sequence[Space]) -> bool:
        """Whether all other axes of a place's tensor are coupled, or depend on the same blocks as the place's."""
        place = self.universe.places[number]
        names = {space.name for space in tree}
        tied = partners(self.universe, place)
        return all(
            (other.space in done and other.space not in names) or (other in tied and other.space in names)
            for other in self.universe.places_in(place.tensor)
            if other.axes != place.axes
        )

    def features(self, network: str, space: Space, couplings: Mapping[str, Coupling]) -> Tensor:
        """Put all that can be compared of a flat space side by side, shape (units, d); norms where that is nothing."""
        numbers = self.places(space.name)
        ready = [i for i in numbers if self.ready(i, couplings, (space,))]
        rows = [self.rows(network, i, couplings) for i in ready]
        return torch.cat(rows or [norms(self, network, i) for i in numbers], dim=1)

    def rows(self, network: str, number: int, couplings: Mapping[str, Coupling]) -> Tensor:
        """Unfold a network's tensor along one place, its other axes carried; shape (units, everything else)."""
        structure = self.structures[network]
        place = structure.places[number]
        others = [p.space for p in structure.places_in(place.tensor) if p.axes != place.axes]
        moved = self.carried(network, place.tensor, {s: couplings[s] for s in others if s in couplings})
        return unit_rows(moved, structure, place)

    def carried(self, network: str, tensor: str, couplings: Mapping[str, Coupling]) -> Tensor:
        """Carry one tensor of a network along couplings of some of its spaces."""
        structure = self.structures[network]
        hard = {s: c.source for s, c in couplings.items() if isinstance(c, Permutation)}
        moved = renumber({tensor: self.tensors[network][tensor]}, structure, hard)[tensor]
        return blend(moved, structure, tensor, self.universe, couplings_as_shares(couplings))


def couplings_as_shares(couplings: Mapping[str, Coupling]) -> dict[str, Shares]:
    """Return how the spaces with a plan go to the universe."""
    return {s: Shares(c.means, c.splits) for s, c in couplings.items() if isinstance(c, Plan)}


def from_weights(problem: Problem) -> Pictures:
    """Return the networks' own tensors, each scaled to mean square 1 over all networks."""
    structures = {name: problem.structure_of(name) for name in problem.names}
    names = list(dict.fromkeys(place.tensor for place in problem.structure.places))
    home = problem.device
    raw = {
        network: {name: problem.states[network][name].detach().to(home, torch.float64) for name in names}
        for network in problem.names
    }
    return Pictures(structures, _scaled(raw), {})


def from_activations(problem: Problem, method: str, samples: int) -> Pictures:
    """Return what the units do on unlabelled inputs: the outputs of affine layers, before any nonlinearity.

    Spaces that are no layer's output (attention heads, say) are compared by weights.

    Raises:
        UsageError: the problem has no modules or no data.
    """
    observer = problem.observer(method, lambda layer: layer.kind != "norm" and bool(layer.places))
    assert problem.data is not None
    seen: dict[str, dict[str, list[Tensor]]] = {name: {} for name in problem.names}
    for batch in observer.batches(problem.data, samples=samples):
        for network, layers in batch.items():
            for layer, rows in layers.items():
                seen[network].setdefault(layer, []).append(rows.to(problem.device, torch.float64))
    outputs = {n: {_key(layer): _thin(torch.cat(rows)) for layer, rows in seen[n].items()} for n in problem.names}
    weights = from_weights(problem)
    structures = {n: _with_outputs(s, observer.networks[n], outputs[n]) for n, s in weights.structures.items()}
    scaled = _scaled(outputs)
    pictures = Pictures(structures, {n: {**weights.tensors[n], **scaled[n]} for n in problem.names}, {})
    names = {s.name: [p.tensor for p in pictures.universe.places_of(s.name)] for s in pictures.universe.spaces}
    shown = {s: frozenset(t for t in tensors if t in outputs[problem.names[0]]) for s, tensors in names.items()}
    return replace(pictures, shown={space: tensors for space, tensors in shown.items() if tensors})


def next_root(pictures: Pictures, roots: Sequence[Space], done: Mapping[str, object]) -> Space:
    """Return the root space of which the largest share can be compared now; the first of equals.

    In a chain that is the order from the input to the output.
    """

    def share(root: Space) -> float:
        tree = pictures.universe.tree(root.name)
        numbers = [i for space in tree for i in pictures.places(space.name)]
        sizes = {i: pictures.tensors[_first(pictures)][pictures.universe.places[i].tensor].numel() for i in numbers}
        ready = sum(size for i, size in sizes.items() if pictures.ready(i, done, tree))
        return ready / max(1, sum(sizes.values()))

    return max(roots, key=share)


def norms(pictures: Pictures, network: str, number: int) -> Tensor:
    """Return the norm of every unit's weights at one place, which no coupling changes; shape (units, 1)."""
    structure = pictures.structures[network]
    place = structure.places[number]
    return unit_rows(pictures.tensors[network][place.tensor], structure, place).square().mean(1, keepdim=True).sqrt()


def _first(pictures: Pictures) -> str:
    return next(iter(pictures.structures))


def _key(layer: str) -> str:
    return f"outputs of {layer or 'the network'}"


def _thin(rows: Tensor) -> Tensor:
    return rows[:: -(-len(rows) // _ROWS)] if len(rows) > _ROWS else rows


def _scaled(raw: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Scale every tensor by one number for all networks, so that its mean square is 1."""
    scales: dict[str, float] = {}
    for name in next(iter(raw.values())):
        squares = sum(float(tensors[name].square().sum()) for tensors in raw.values())
        count = sum(tensors[name].numel() for tensors in raw.values())
        scales[name] = (squares / max(1, count)) ** 0.5 or 1.0
    return {n: {name: tensor / scales[name] for name, tensor in tensors.items()} for n, tensors in raw.items()}


def _with_outputs(structure: Structure, network: nn.Module, outputs: Mapping[str, Tensor]) -> Structure:
    """Add layers' outputs to a structure, as tensors with the layer's units on axis 1."""
    places = [
        Place(_key(layer.name), place.space, (1,), place.layout)
        for layer in find_layers(network, structure)
        if _key(layer.name) in outputs
        for place in layer.places
    ]
    shapes = {**structure.shapes, **{name: tuple(rows.shape) for name, rows in outputs.items()}}
    return replace(structure, places=(*structure.places, *places), shapes=shapes)
