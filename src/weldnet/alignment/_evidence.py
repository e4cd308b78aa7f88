"""What units do on unlabelled inputs, as tensors beside the weights, for methods of coordinate ascent.

Correlations of activations are inner products: of vectors that one pass over any number of inputs gives. So a space's
activations are one more tensor, with the units on its first axis and nothing on its second, and what compares weights
compares them too.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weldnet.activations import Site
from weldnet.affinity import CrossMoments
from weldnet.alignment._ascent import Ascent
from weldnet.alignment._method import Problem
from weldnet.errors import DataError, UsageError
from weldnet.structure import Place, Structure

__all__ = ["add_activations"]

#: Correlations that differ by less than this do not differ.
_ROUNDING = 1e-9


def add_activations(ascent: Ascent, problem: Problem, method: str, *, share: float, samples: int) -> Ascent:
    """Return an ascent with the activations of all spaces that layers show, beside the weights.

    ``share`` counts in units of chance: with 1, the correlations of unlike units vary as much as the inner products of
    unlike units' weights do, summed over a space's tensors.

    Args:
        ascent: the networks, with their weights; not changed, but the couplings are shared.
        problem: the same networks, with modules and data.
        method: who asks, for messages.
        share: how much activations count.
        samples: inputs to look at, at most.

    Raises:
        UsageError: the problem has no modules or no data, or its networks stay on disk.
        DataError: layers that show only one sample.
    """
    if ascent.workspace is not None:
        raise UsageError(f"{method}: activations need networks in memory; leave the workspace or the activations out")
    places, shapes = list(ascent.structure.places), dict(ascent.structure.shapes)
    stacks: dict[str, Tensor] = {}
    weights = dict(ascent.weights)
    for space, found in _correlations(problem, ascent.names, method, samples).items():
        size = ascent.structure.space(space).size
        spread = _chance(found, size)
        if spread < _ROUNDING:
            continue  # all units do the same
        name = f"activations of {space}"
        stacks[name] = _features(found, size).to(ascent.device, torch.float32)
        weights[name] = share * _noise(ascent, space) / spread
        places.append(Place(name, space, (0,)))
        shapes[name] = tuple(stacks[name].shape[1:])
    structure = replace(ascent.structure, places=tuple(places), shapes=shapes)
    return replace(ascent, structure=structure, stacks={**ascent.stacks, **stacks}, weights=weights)


def _correlations(problem: Problem, names: Sequence[str], method: str, samples: int) -> dict[str, Tensor]:
    """Correlate the units of all networks, those of one after those of the other, by space; summed over layers."""
    observer = problem.observer(method)
    assert problem.data is not None
    places = {s: p for s, p in observer.places(names[0]).items() if s[1] == "output"}
    moments: dict[tuple[Site, Place], CrossMoments] = defaultdict(CrossMoments)
    for seen in observer.sites(problem.data, samples=samples):
        for site in (site for site in places if site in seen[names[0]]):
            for place in places[site]:
                rows = torch.cat([_units(seen[n], site, problem.structure, place) for n in names], dim=1)
                moments[site, place].add(rows, rows)
    found: dict[str, Tensor] = {}
    for (site, place), known in moments.items():
        if known.samples < 2:
            raise DataError(
                f"{method}: layer {site[0]!r} showed {known.samples} sample; one alone correlates with nothing: give 2 "
                "inputs or more in data="
            )
        scores = known.scores("correlation").cpu()
        found[place.space] = found[place.space] + scores if place.space in found else scores
    return found


def _units(seen: Mapping[Site, Tensor], site: Site, structure: Structure, place: Place) -> Tensor:
    """Pick the channels of a space's units; copies of a unit are further samples. Shape (rows x copies, units)."""
    rows = seen[site]
    index = torch.as_tensor(structure.positions(place), device=rows.device)
    return rows[:, index].transpose(1, 2).flatten(0, 1)


def _features(correlations: Tensor, size: int) -> Tensor:
    """Return vectors of which the correlations are the inner products, shape (networks, units, rank)."""
    values, vectors = torch.linalg.eigh(correlations)
    kept = values > _ROUNDING * values[-1]
    return (vectors[:, kept] * values[kept].sqrt()).reshape(len(correlations) // size, size, -1)


def _chance(correlations: Tensor, size: int) -> float:
    """Return the deviation of the correlations between two networks, row and column means removed; the pairs' mean."""
    blocks = correlations.unflatten(0, (-1, size)).unflatten(2, (-1, size))
    found = []
    for i, j in itertools.combinations(range(len(blocks)), 2):
        block = blocks[i, :, j]
        block = block - block.mean(0, keepdim=True) - block.mean(1, keepdim=True) + block.mean()
        found.append(float(block.square().mean().sqrt()))
    return sum(found) / len(found)


def _noise(ascent: Ascent, space: str) -> float:
    """Return the deviation of a space's scores by weights if all of these were independent, of mean square 1."""
    structure = ascent.structure
    tensors = [place.tensor for place in structure.places_of(space)]
    squares = [ascent.weights[t] ** 2 * math.prod(structure.shapes[t]) for t in tensors]
    return (sum(squares) / structure.space(space).size) ** 0.5
