"""GAMF: graduated assignment model fusion, for any structure and any number of networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from weldnet.affinity import Gaussian, InnerProduct, Kernel, VectorNorm
from weldnet.alignment._ascent import WEIGHTINGS, Ascent, by_norm, start
from weldnet.alignment._evidence import add_activations
from weldnet.alignment._method import Alignment, Problem
from weldnet.alignment._rough import PRECISIONS, Precision, Rough
from weldnet.alignment._sweeps import hard_sweeps
from weldnet.alignment._tree import Tree
from weldnet.assignment import Potentials, block_sinkhorn, sinkhorn, standardise
from weldnet.errors import UsageError
from weldnet.structure import Space

__all__ = ["Gamf"]


@final
@dataclass(frozen=True, kw_only=True)
class Gamf:
    """Match units by annealing: soft couplings first, harder and harder, permutations in the end.

    Every network k is mapped to a common universe. For one space the affinities of its units to the universe are
    ``A_k[a, u] = sum_places sum_j sum_(k' != k) sum_b kappa(F_k[a, j], F_k'[b, j]) U_k'[b, u]``, with features F whose
    other axes are carried by the current couplings. Spaces are visited in turn; each visit standardises A and
    replaces the space's couplings by Sinkhorn's plan at temperature tau, and tau falls from ``tau`` by ``gamma`` to
    ``tau_min``. Then Hungarian sweeps in alternating direction, until hardly a unit moves: the result is never soft.
    Networks are taken in the order of their norm, so that neither their order nor the numbering of their units matters.
    A nested space (inside groups, inside heads) has an inner plan for every pair of blocks; what that is worth joins
    the scores of the blocks.

    With ``activations`` above 0, A also has ``sum_(k' != k) sum_b corr(x_k[a], x_k'[b]) U_k'[b, u]``: what units do on
    unlabelled inputs counts beside their weights. Correlations alone would be a linear problem; with the weights' edges
    they tell the annealing where to go.

    Args:
        sigma: width of the Gaussian kernel in units of each tensor's mean square; ``inf`` is the inner product.
        affinity: ``"edge"`` compares weight by weight as the paper does; ``"vector"`` whole unit vectors as the
            authors' code does (then ``sigma`` has no meaning and must stay at its default).
        weighting: how much a tensor counts: ``"raw"`` by its values, ``"entry"`` by its number of entries,
            ``"root"`` by the square root of that, ``"tensor"`` all alike.
        tau: first temperature, in standard deviations of the affinities.
        gamma: factor from one temperature to the next.
        tau_min: last temperature.
        sweeps: at most, for each temperature and pair; N networks get 1/(N-1) of it, since each of their sweeps
            already makes N-1 updates of every space.
        settled: a temperature is left once a sweep moves less than this share of the units' mass.
        sinkhorn_iterations: for each visit, warm-started.
        hard_sweeps: at most, at the end.
        hard_settled: these end once a sweep moves no more than this share of the units; many networks would go on for
            long with exchanges that gain nothing that matters.
        tolerance: relative error of the fast Gaussian expansion; 0 forces the exact kernel.
        activations: how much the activations count; with 1, those of unlike units differ as much as what their weights
            say. Needs unlabelled inputs, and the inner product of edges.
        samples: inputs to look at, at most.
        precision: of the products behind soft couplings: ``"bfloat16"`` saves time where the processor is made for it
            and spaces are wide, ``"tf32"`` is for CUDA devices. Scores are held to a sample in float32; spaces where
            more than 1% of their spread is off are scored in float32, as are nested spaces and the Hungarian sweeps.

    Source: Liu et al., "Deep Neural Network Fusion via Graph Matching", ICML 2022, in the general form of
    ``docs/methods.md``; defaults by the study in ``docs/results/gamf-defaults.md``.
    """

    sigma: float = math.inf
    affinity: Literal["edge", "vector"] = "edge"
    weighting: Literal["raw", "entry", "root", "tensor"] = "root"
    tau: float = 1.0
    gamma: float = 0.8
    tau_min: float = 0.03
    sweeps: int = 5
    settled: float = 0.02
    sinkhorn_iterations: int = 20
    hard_sweeps: int = 100
    hard_settled: float = 0.005
    tolerance: float = 1e-3
    activations: float = 0.0
    samples: int = 1024
    precision: Precision = "float32"
    name = "gamf"
    order_invariant = True
    equivariant = True
    any_width = False

    def __post_init__(self) -> None:
        limits = {
            "sigma": (self.sigma > 0, "above 0, or inf"),
            "affinity": (self.affinity in ("edge", "vector"), "edge or vector"),
            "weighting": (self.weighting in WEIGHTINGS, ", ".join(WEIGHTINGS)),
            "tau": (0 < self.tau < math.inf, "above 0"),
            "gamma": (0 < self.gamma < 1, "between 0 and 1"),
            "tau_min": (0 < self.tau_min <= self.tau, f"above 0 and at most tau ({self.tau})"),
            "sweeps": (self.sweeps >= 1, "1 or more"),
            "settled": (self.settled >= 0, "0 or more"),
            "sinkhorn_iterations": (self.sinkhorn_iterations >= 1, "1 or more"),
            "hard_sweeps": (self.hard_sweeps >= 1, "1 or more"),
            "hard_settled": (0 <= self.hard_settled < 1, "at least 0 and below 1"),
            "tolerance": (0 <= self.tolerance < 1, "at least 0 and below 1"),
            "activations": (0 <= self.activations < math.inf, "0 or more"),
            "samples": (self.samples >= 2, "2 or more"),
            "precision": (self.precision in PRECISIONS, ", ".join(PRECISIONS)),
        }
        for option, (fine, allowed) in limits.items():
            if not fine:
                raise UsageError(f"gamf: {option} is {getattr(self, option)!r}; give {allowed}")
        if self.affinity == "vector" and self.sigma != math.inf:
            raise UsageError(f"gamf: sigma is {self.sigma} but the vector affinity has no sigma; leave one of them out")
        if self.activations and (self.affinity == "vector" or self.sigma != math.inf):
            raise UsageError(
                f"gamf: activations is {self.activations} and they are compared by inner products; leave sigma and "
                "affinity at their defaults"
            )
        if self.precision != "float32" and (self.affinity == "vector" or self.sigma != math.inf):
            raise UsageError(
                f"gamf: precision is {self.precision!r}, which is for inner products of edges; leave sigma and "
                "affinity at their defaults, or precision at float32"
            )

    @property
    def needs_data(self) -> bool:
        """Whether it looks at activations."""
        return self.activations > 0

    def __call__(self, problem: Problem, /) -> Alignment:
        """Align all networks; the universe is given in the order of the first."""
        weights = ascent = start(problem, self.weighting, by_norm(problem))
        if self.activations:
            ascent = add_activations(weights, problem, self.name, share=self.activations, samples=self.samples)
        rough = Rough.of(self.precision, ascent.device)
        if (kept := ascent.resume("hard")) is None:
            soft_sweeps, exact = self._anneal(ascent, rough)
        else:
            soft_sweeps, exact = int(kept["count"]), list(kept["exact"])
        roots = problem.structure.roots
        directions = itertools.islice(itertools.cycle([roots, roots[::-1]]), self.hard_sweeps)
        count, converged = hard_sweeps(ascent, self._kernel(), directions, settled=self.hard_settled)
        stats = {
            "objective": weights.objective(),
            "soft_sweeps": soft_sweeps,
            "sweeps": count,
            "converged": converged,
            **({"float32_spaces": exact} if rough is not None else {}),
        }
        return weights.alignment(repr(self), stats, problem.names)

    def _kernel(self) -> Kernel:
        if self.affinity == "vector":
            return VectorNorm()
        return InnerProduct() if self.sigma == math.inf else Gaussian(self.sigma, self.tolerance)

    def _anneal(self, ascent: Ascent, rough: Rough | None) -> tuple[int, list[str]]:
        """Bring the couplings from uniform to nearly hard, then to the nearest permutations.

        Returns:
            The number of sweeps, and the spaces that rough products were too far off for.
        """
        kernel = self._kernel()
        roots = ascent.structure.roots
        ascent.soften()
        ascent.multiply_with(rough)
        warm: dict[str, Potentials] = {}
        temperatures = list(_temperatures(self.tau, self.gamma, self.tau_min))
        limit = max(1, round(self.sweeps / len(ascent.moving)))
        step, sweep, count = 0, 0, 0
        if (kept := ascent.resume("anneal")) is not None:
            step, sweep, count = (int(kept[key]) for key in ("step", "sweep", "count"))
            warm |= _potentials(kept["tensors"])
            if rough is not None:
                rough.exact.update(kept["exact"])
        exact: list[str] = []
        while step < len(temperatures):
            order, before = (roots, roots[::-1]) if count % 2 == 0 else (roots[::-1], roots)
            count, sweep = count + 1, sweep + 1
            ascent.begin(f"temperature {step + 1} of {len(temperatures)}, sweep {count}", order)
            rule = _Soft(temperatures[step], self.sinkhorn_iterations, warm)
            # Turning round, the last space has seen no news.
            seen = before[-1] if sweep > 1 else None
            moved = sum(_visit(ascent, kernel, root, rule) for root in order if root != seen)
            if sweep == limit or moved <= self.settled * max(1, sum(s.size for s in ascent.structure.spaces)):
                step, sweep = step + 1, 0
            exact = [] if rough is None else sorted(rough.exact)
            ascent.keep("anneal", {"step": step, "sweep": sweep, "count": count, "exact": exact}, _tensors(warm))
        ascent.multiply_with(None)
        ascent.harden()
        ascent.keep("hard", {"sweeps": 0, "converged": False})
        return count, exact


def _tensors(warm: Mapping[str, Potentials]) -> dict[str, Tensor]:
    return {f"{side}/{key}": getattr(found, side) for key, found in warm.items() for side in Potentials._fields}


def _potentials(tensors: Mapping[str, Tensor]) -> dict[str, Potentials]:
    keys = dict.fromkeys(name.partition("/")[2] for name in tensors)
    return {key: Potentials(*(tensors[f"{side}/{key}"] for side in Potentials._fields)) for key in keys}


@dataclass(frozen=True)
class _Soft:
    """Sinkhorn's plans at one temperature, warm-started."""

    temperature: float
    iterations: int
    warm: dict[str, Potentials]

    def inside(self, space: str, k: int, blocks: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Return inner plans and the free energies of all pairs of blocks."""
        key = f"{space}/{k}"
        found = block_sinkhorn(blocks, self.temperature, iterations=self.iterations, start=self.warm.get(key))
        self.warm[key] = found.potentials
        return found.plans, found.values

    def outside(self, space: str, k: int, scores: Tensor, old: Tensor) -> Tensor:
        """Return the plan of a root space."""
        key = f"{space}/{k}"
        plan, self.warm[key] = sinkhorn(
            standardise(scores), self.temperature, iterations=self.iterations, start=self.warm.get(key)
        )
        return plan


def _visit(ascent: Ascent, kernel: Kernel, root: Space, rule: _Soft) -> float:
    """Update one root space and what is nested in it; return how many units' mass moved, averaged over the networks."""
    if ascent.structure.children(root.name):
        tree = Tree(ascent, root, kernel)
        return sum(tree.update(k, rule) for k in ascent.moving) / len(ascent.moving)
    moved = 0.0
    pool = ascent.pool(root, kernel)
    for k in ascent.moving:
        old = ascent.couplings[root.name][k - 1]
        plan = rule.outside(root.name, k, pool.scores(k), old)
        moved += float((plan - old).abs_().sum()) / 2
        ascent.put(root.name, k, whole=plan)
        pool.replace(k, plan, last=k == ascent.moving[-1])
    return moved / len(ascent.moving)


def _temperatures(tau: float, gamma: float, tau_min: float) -> Iterator[float]:
    while tau >= tau_min:
        yield tau
        tau *= gamma
