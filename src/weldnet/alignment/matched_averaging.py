"""Matched averaging: the most likely global units behind all networks' units, layer by layer (PFNM, one-shot FedMA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weldnet.alignment._ascent import start
from weldnet.alignment._method import Alignment, Problem
from weldnet.alignment._pictures import Pictures, from_weights, next_root, norms
from weldnet.alignment._rest import match_rest
from weldnet.assignment import Coupling, Permutation, injection
from weldnet.errors import UsageError
from weldnet.structure import Space, Structure, Wider, unit_rows, widened

__all__ = ["Globals", "MatchedAveraging", "match_space"]


@final
@dataclass(frozen=True, kw_only=True)
class MatchedAveraging:
    """Match units to global ones of which they are noisy copies: a maximum a posteriori estimate.

    Global units are drawn from N(0, sigma0^2), each network's units from N(global unit, sigma^2), and which of them a
    network has from a beta-Bernoulli process of mass ``gamma``. From the input to the output each space is matched by
    the weights that write its units, earlier couplings carried: the network's units go to the global ones in one linear
    assignment, one network after the other; then each is taken out and matched again, in random order.

    Nested spaces are matched last, by the inner product of all weights. The weights that write a space are put on the
    scale of the largest of them.

    Args:
        growth: whether units may go to new global units, which makes the universe wider than the networks: ``fuse``
            then makes the grown network. Without, every unit goes to one of as many global units as there are.
        sigma: deviation of a network's units from the global ones.
        sigma0: deviation of the global units.
        gamma: mass of new global units that is expected; more makes more of them.
        sweeps: over all networks, at most.

    Source: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019, equation 8;
    Wang et al., "Federated Learning with Matched Averaging", https://arxiv.org/abs/2002.06440.
    """

    growth: bool = False
    sigma: float = 1.0
    sigma0: float = 1.0
    gamma: float = 7.0
    sweeps: int = 5
    name = "matched_averaging"
    order_invariant = False
    equivariant = False
    needs_data = False
    any_width = False

    def __post_init__(self) -> None:
        for option in ("sigma", "sigma0", "gamma"):
            if not 0 < getattr(self, option) < float("inf"):
                raise UsageError(f"matched_averaging: {option} is {getattr(self, option)}; give a number above 0")
        if self.sweeps < 1:
            raise UsageError(f"matched_averaging: sweeps is {self.sweeps}; give 1 or more")

    def __call__(self, problem: Problem, /) -> Alignment:
        """Align all networks; the universe begins with the first one's units, in their order."""
        walk = _Walk(self, problem, from_weights(problem), torch.Generator().manual_seed(problem.seed))
        walk.run()
        couplings, ascent = walk.couplings(), start(problem, "root")
        for k, space in ((k, space) for k in ascent.moving for space in walk.targets):
            known = couplings[ascent.names[k]][space]
            if isinstance(known, Permutation):
                ascent.couplings[space][k - 1] = known.source
        _, settled = match_rest(ascent, frozenset(ascent.couplings) - walk.targets.keys())
        stats = {"converged": walk.converged and settled}
        if all(isinstance(c, Permutation) for found in couplings.values() for c in found.values()):
            return ascent.alignment(repr(self), {"objective": ascent.objective(), **stats}, problem.names)
        found = ascent.alignment(repr(self), stats, problem.names)
        named = {n: {s: couplings[n].get(s, c) for s, c in found[n].items()} for n in problem.names}
        return Alignment(named, repr(self), stats)


def match_space(method: MatchedAveraging, problem: Problem, done: Sequence[str]) -> tuple[str, dict[str, Tensor], int]:
    """Match the next space, from the input to the output, of networks that are in one order in the spaces before it.

    Args:
        method: the settings.
        problem: the networks.
        done: the spaces that are matched; there is another one, and none of it is nested.

    Returns:
        The space, the global unit of each unit by network, and how many global units there are. Global units begin with
        the first network's, in their order.
    """
    structure = problem.structure
    walk = _Walk(method, problem, from_weights(problem), torch.Generator().manual_seed(problem.seed))
    for name in done:
        walk.units[name] = structure.space(name).size
        walk.targets[name] = {network: torch.arange(walk.units[name]) for network in problem.names}
    root = next_root(walk.pictures, [root for root in structure.roots if root.name not in done], walk.targets)
    walk.match(root)
    return root.name, walk.targets[root.name], walk.units[root.name]


@dataclass
class Globals:
    """The global units of one space, and who has them.

    Args:
        precision: of a network's units, 1 / sigma^2.
        prior: precision of the global units, 1 / sigma0^2.
        mass: gamma.
        networks: their number.
        totals: sum of the units that each global one has, times ``precision``; shape (global units, d).
        counts: how many these are.
    """

    precision: float
    prior: float
    mass: float
    networks: int
    totals: Tensor
    counts: Tensor

    def match(self, rows: Tensor, *, growth: bool) -> Tensor:
        """Return the most likely global units of one network that has none yet; new ones are numbered on.

        Args:
            rows: the network's units, shape (units, d).
            growth: whether there may be new ones.
        """
        scores = self.scores(rows)
        if growth:
            scores = torch.cat([scores, self.new_scores(rows)], dim=1)
        _, columns = linear_sum_assignment(scores.cpu().numpy(), maximize=True)
        return torch.from_numpy(columns)

    def scores(self, rows: Tensor) -> Tensor:
        """Twice the log posterior that each unit adds at each global one, shape (units, global units)."""
        own = rows * self.precision
        before = self.prior + self.counts * self.precision
        both = own.square().sum(1)[:, None] + self.totals.square().sum(1)[None, :] + 2 * own @ self.totals.T
        popular = (self.counts / (self.networks - self.counts)).log() * 2
        return both / (before + self.precision) - self.totals.square().sum(1) / before + popular

    def new_scores(self, rows: Tensor) -> Tensor:
        """The same at the first, second, ... new global unit, shape (units, units)."""
        number = torch.arange(1, len(rows) + 1, dtype=rows.dtype, device=rows.device)
        gain = (rows * self.precision).square().sum(1) / (self.prior + self.precision)
        return gain[:, None] + 2 * (self.mass / self.networks / number).log()[None, :]

    def add(self, rows: Tensor, targets: Tensor, sign: int = 1) -> None:
        """Give global units a network's units, or take them away; new numbers make new global units."""
        missing = max(0, int(targets.max()) + 1 - len(self.counts))
        self.totals = torch.cat([self.totals, self.totals.new_zeros(missing, self.totals.shape[1])])
        self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
        where = targets.to(self.totals.device)
        self.totals[where] += sign * self.precision * rows
        self.counts[where] += sign


@dataclass
class _Walk:
    """One pass over the spaces that are not nested.

    Args:
        method: the settings.
        problem: the networks.
        pictures: what units are compared by.
        generator: of the random orders.
        targets: global units found so far, by space and network; in the order of the first network.
        units: how many there are, by space.
    """

    method: MatchedAveraging
    problem: Problem
    pictures: Pictures
    generator: torch.Generator
    targets: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    converged: bool = True

    def run(self) -> None:
        structure = self.problem.structure
        roots = [root for root in structure.roots if not structure.children(root.name)]
        while roots:
            root = next_root(self.pictures, roots, self.targets)
            roots.remove(root)
            self.match(root)

    def match(self, root: Space) -> None:
        """Match one space, given those that are matched."""
        features = {name: self._features(name, root) for name in self.problem.names}
        growth = self.method.growth and _can_grow(self.problem.structure, root)
        found = self._match(features, growth)
        self.targets[root.name], self.units[root.name] = _as_the_first(found)

    def couplings(self) -> dict[str, dict[str, Coupling]]:
        found: dict[str, dict[str, Coupling]] = {name: {} for name in self.problem.names}
        for space, targets in self.targets.items():
            for name, target in targets.items():
                units = self.units[space]
                found[name][space] = Permutation(target).inverse() if units == len(target) else injection(target, units)
        return found

    def _match(self, features: Mapping[str, Tensor], growth: bool) -> dict[str, Tensor]:
        rows = list(features.values())
        precision, prior = self.method.sigma**-2, self.method.sigma0**-2
        empty = rows[0].new_zeros(0, rows[0].shape[1])
        pool = Globals(precision, prior, self.method.gamma, len(rows), empty, empty.new_zeros(0))
        found = [torch.arange(len(rows[0]))]
        pool.add(rows[0], found[0])
        for own in rows[1:]:
            found.append(pool.match(own, growth=growth))
            pool.add(own, found[-1])
        settled = False
        for _ in range(self.method.sweeps):
            settled = True
            for k in torch.randperm(len(rows), generator=self.generator).tolist():
                pool.add(rows[k], found[k], sign=-1)
                _drop_empty(pool, found, k)
                again = self._again(pool, rows[k], found[k], growth)
                settled &= torch.equal(again, found[k])
                found[k] = again
                pool.add(rows[k], found[k])
            if settled:
                break
        self.converged &= settled
        return dict(zip(features, found, strict=True))

    def _again(self, pool: Globals, rows: Tensor, old: Tensor, growth: bool) -> Tensor:
        """Match a network again; it stays where nothing is better by more than rounding."""
        new = pool.match(rows, growth=growth)
        scores = torch.cat([pool.scores(rows), pool.new_scores(rows)], dim=1).cpu()
        each = torch.arange(len(rows))
        gain = float((scores[each, new] - scores[each, old]).sum())
        return new if gain > 1e-9 * float(scores[each, old].abs().sum()) else old

    def _features(self, network: str, space: Space) -> Tensor:
        """Put side by side all that writes a space and whose other axes are matched, on the scale of the largest."""
        numbers = self.pictures.places(space.name)
        ready = [i for i in numbers if self.pictures.ready(i, self.targets, (space,))]
        if not ready:
            return torch.cat([norms(self.pictures, network, i) for i in numbers], dim=1)
        places = {i: self.problem.structure.places[i] for i in ready}
        main = max(places.values(), key=lambda p: self.pictures.tensors[network][p.tensor].numel()).tensor
        first = self.problem.names
        squares = [float(self.problem.states[n][main].detach().double().square().mean()) for n in first]
        return torch.cat([self._rows(network, i) for i in ready], dim=1) * (sum(squares) / len(squares)) ** 0.5

    def _rows(self, network: str, number: int) -> Tensor:
        structure = self.problem.structure
        place = structure.places[number]
        tensor = self.pictures.tensors[network][place.tensor]
        others = {p.space for p in structure.places_in(place.tensor) if p.axes != place.axes}
        targets = {s: self.targets[s][network][None] for s in others}
        moved = widened(place.tensor, [tensor], Wider(structure, targets, self.units), [1.0]) if others else tensor
        return unit_rows(moved, structure, place)


def _can_grow(structure: Structure, root: Space) -> bool:
    """Whether a space may have more units: it has plain axes, and no tensor holds nested units beside its own."""
    places = structure.places_of(root.name)
    tensors = {place.tensor for place in places}
    beside = {place.space for tensor in tensors for place in structure.places_in(tensor)}
    nested = any(structure.space(name).parent or structure.children(name) for name in beside)
    return not nested and all(p.view is None and p.role != "both" for p in places)


def _drop_empty(pool: Globals, found: Sequence[Tensor], k: int) -> None:
    """Forget global units that nobody has; those of network ``k``, which is out, are numbered behind the rest."""
    alive = pool.counts > 0
    rank = torch.cumsum(alive, 0).cpu() - 1
    own = ~alive.cpu()
    rank[own] = int(alive.sum()) + torch.arange(int(own.sum()))
    for targets in found:
        targets.copy_(rank[targets])
    pool.totals, pool.counts = pool.totals[alive], pool.counts[alive]


def _as_the_first(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Number the global units as the first network does, those that it lacks behind."""
    first = next(iter(found.values()))
    units = 1 + max(int(targets.max()) for targets in found.values())
    lacking = torch.ones(units, dtype=torch.bool)
    lacking[first] = False
    order = torch.cat([first, lacking.nonzero().flatten()])
    rank = torch.empty_like(order)
    rank[order] = torch.arange(units)
    return {name: rank[targets] for name, targets in found.items()}, units
