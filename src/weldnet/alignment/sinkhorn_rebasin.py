"""Sinkhorn re-basin: soft permutations, learned by gradients through Sinkhorn's iterations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor

from weldnet.affinity import InnerProduct
from weldnet.alignment._ascent import WEIGHTINGS, Ascent, by_norm, start
from weldnet.alignment._method import Alignment, Problem
from weldnet.alignment._mixture import Mixture
from weldnet.alignment._sweeps import hard_sweeps
from weldnet.assignment import best_inside, best_permutation, unfold
from weldnet.errors import DataError, UsageError
from weldnet.structure import Maps, Structure, carried

__all__ = ["SinkhornRebasin"]

_SWEEPS = 100


@final
@dataclass(frozen=True, kw_only=True)
class SinkhornRebasin:
    """Learn soft permutations by gradient descent, then round them.

    Every network but the anchor, and every space, has a table X of free numbers, all 0 at first; its soft permutation
    is Sinkhorn's plan of X, row and column scalings in the log domain, through which the gradient flows. Adam lowers

    - ``loss="distance"``: the squared distances between all networks' carried weights, summed over pairs;
    - ``loss="product"``: minus their inner products, which for permutations differ from it by a constant only;
    - ``loss="midpoint"``: first the distance, then for ``epochs`` passes over unlabelled inputs how far the average of
      all networks is from answering as they do together (one minus the correlation with the mean of their outputs);
    - ``loss="random"``: the same at a point drawn anew for every batch between the networks, instead of the middle.

    The best assignment of every X follows, and without data assignments by the inner product from there, until nothing
    moves. The anchor is the network with the smallest norm.

    Args:
        loss: what is lowered.
        steps: of Adam, by weights.
        epochs: passes over the inputs, by outputs.
        rate: step size of Adam.
        temperature: of Sinkhorn's plans, in the unit of X.
        iterations: row and column scalings.
        weighting: how much a tensor counts, as for ``gamf``; not by outputs.
        samples: inputs to look at, at most.
        batch_size: inputs for each step.

    Source: Pena et al., "Re-basin via implicit Sinkhorn differentiation", CVPR 2023, https://arxiv.org/abs/2212.12042.
    There two networks and gradients of the limit; here those of the iterations that were run.
    """

    loss: Literal["distance", "product", "midpoint", "random"] = "distance"
    steps: int = 100
    epochs: int = 5
    rate: float = 0.1
    temperature: float = 1.0
    iterations: int = 20
    weighting: Literal["raw", "entry", "tensor", "root"] = "root"
    samples: int = 1024
    batch_size: int = 128
    name = "sinkhorn_rebasin"
    order_invariant = False
    equivariant = False
    any_width = False

    def __post_init__(self) -> None:
        losses = ("distance", "product", "midpoint", "random")
        limits = {
            "loss": (self.loss in losses, ", ".join(losses)),
            "weighting": (self.weighting in WEIGHTINGS, ", ".join(WEIGHTINGS)),
            **{o: (getattr(self, o) >= 1, "1 or more") for o in ("steps", "epochs", "iterations")},
            **{o: (0 < getattr(self, o) < float("inf"), "a number above 0") for o in ("rate", "temperature")},
            **{o: (getattr(self, o) >= 2, "2 or more") for o in ("samples", "batch_size")},
        }
        for option, (fine, allowed) in limits.items():
            if not fine:
                raise UsageError(f"sinkhorn_rebasin: {option} is {getattr(self, option)!r}; give {allowed}")

    @property
    def needs_data(self) -> bool:
        """Whether it looks at outputs."""
        return self.loss in ("midpoint", "random")

    def __call__(self, problem: Problem, /) -> Alignment:
        """Align all networks; the universe is given in the order of the first."""
        ascent = start(problem, self.weighting, by_norm(problem))
        tables = _Tables.of(ascent, self.temperature, self.iterations)
        of_weights = _Distance(ascent, product=self.loss == "product")
        losses = tables.descend([of_weights] * self.steps, self.rate)
        generator = torch.Generator().manual_seed(problem.seed)
        if self.needs_data:
            losses = tables.descend(self._lessons(problem, ascent, generator), self.rate)
        tables.settle(ascent)
        sweeps, converged = self.steps, True
        if not self.needs_data:  # by outputs the permutations stay as they were learned
            sweeps, converged = hard_sweeps(ascent, InnerProduct(), [ascent.structure.roots] * _SWEEPS)
        stats = {
            "objective": ascent.objective(),
            "loss": losses[-1],
            "first_loss": losses[0],
            "sweeps": sweeps,
            "converged": converged,
        }
        return ascent.alignment(repr(self), stats, problem.names)

    def _lessons(
        self, problem: Problem, ascent: Ascent, generator: torch.Generator
    ) -> Sequence[Callable[[Maps], Tensor]]:
        """Return what is lowered step by step: the loss on one batch of inputs after the other."""
        mixture = Mixture.of(problem, self.name, ascent.names)
        assert problem.data is not None
        lessons = mixture.lessons(problem.data, self.samples, self.batch_size)
        if not lessons:
            raise DataError("sinkhorn_rebasin learns from batches of 2 inputs or more; data= holds none")
        count = len(ascent.names)
        steps: list[Callable[[Maps], Tensor]] = []
        for _ in range(self.epochs):
            for i in torch.randperm(len(lessons), generator=generator).tolist():
                shares = torch.full((count,), 1 / count)
                if self.loss == "random":  # evenly over the triangle that the networks span
                    drawn = -torch.rand(count, generator=generator).clamp_min(1e-12).log()
                    shares = drawn / drawn.sum()
                steps.append(
                    lambda maps, lesson=lessons[i], s=shares: mixture.loss(lesson, _to(maps, mixture.dtype), s)
                )
        return steps


@dataclass
class _Tables:
    """The free numbers, whose Sinkhorn plans are the soft permutations.

    Args:
        structure: where the units lie.
        outer: of root spaces, shape (networks - 1, units, universe).
        inner: of nested spaces, shape (networks - 1, blocks, universe blocks, inner, inner).
        temperature: of the plans.
        iterations: of Sinkhorn.
    """

    structure: Structure
    outer: dict[str, Tensor]
    inner: dict[str, Tensor]
    temperature: float
    iterations: int

    @staticmethod
    def of(ascent: Ascent, temperature: float, iterations: int) -> _Tables:
        """Start with zeros: nobody is preferred."""
        ascent.soften()
        outer = {s.name: torch.zeros_like(ascent.couplings[s.name]) for s in ascent.structure.roots}
        inner = {s: torch.zeros_like(c) for s, c in ascent.inner.items()}
        return _Tables(ascent.structure, outer, inner, temperature, iterations)

    def descend(self, steps: Sequence[Callable[[Maps], Tensor]], rate: float) -> list[float]:
        """Take one step of Adam down each of the losses; return what they were."""
        leaves = [table.requires_grad_() for table in (*self.outer.values(), *self.inner.values())]
        losses: list[Tensor] = []
        if not any(leaf.numel() for leaf in leaves):
            return [0.0]
        adam = torch.optim.Adam(leaves, lr=rate)
        with torch.enable_grad():
            for step in steps:
                loss = step(self.plans())
                gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.grad = gradient
                adam.step()
                losses.append(loss.detach())
        for leaf in leaves:
            leaf.requires_grad_(False).grad = None
        return torch.stack(losses).cpu().tolist()  # fetched together: nobody waits for one of them

    def plans(self) -> Maps:
        """Return the soft permutations."""
        outer = {s: self._plan(table) for s, table in self.outer.items()}
        inner = {s: self._plan(table) for s, table in self.inner.items()}
        return self._maps(outer, inner)

    def settle(self, ascent: Ascent) -> None:
        """Give the networks the best assignments of the tables."""
        outer = {s: torch.stack([best_permutation(t) for t in tables]) for s, tables in self.outer.items()}
        inner = {s: best_inside(tables) for s, tables in self.inner.items()}
        found = self._maps(outer, inner)
        ascent.couplings = {s: sources.to(ascent.device) for s, sources in found.whole.items()}
        ascent.inner = {s: sources.to(ascent.device) for s, sources in found.inner.items()}

    def _plan(self, table: Tensor) -> Tensor:
        logs = table / self.temperature
        for _ in range(self.iterations):
            logs = logs - logs.logsumexp(-1, keepdim=True)
            logs = logs - logs.logsumexp(-2, keepdim=True)
        return logs.exp()

    def _maps(self, outer: Mapping[str, Tensor], inner: Mapping[str, Tensor]) -> Maps:
        whole = dict(outer)
        for space in self.structure.spaces:  # parents come first
            if space.parent is not None:
                pairs = zip(whole[space.parent], inner[space.name], strict=True)
                whole[space.name] = torch.stack([unfold(blocks, inside) for blocks, inside in pairs])
        return Maps(whole, inner)


def _to(maps: Maps, dtype: torch.dtype) -> Maps:
    return Maps({s: m.to(dtype) for s, m in maps.whole.items()}, {s: m.to(dtype) for s, m in maps.inner.items()})


@dataclass(frozen=True)
class _Distance:
    """How far all networks' weights are from one another, in parts of how far they are if nobody is preferred.

    Args:
        ascent: the networks' tensors.
        product: whether only the inner products count.
    """

    ascent: Ascent
    product: bool

    def __call__(self, maps: Maps) -> Tensor:
        """Return ``sum |T_j - T_k|^2`` or ``-sum <T_j, T_k>`` over pairs, both relative to the norms as they lie."""
        ascent, count = self.ascent, len(self.ascent.names)
        total = torch.zeros((), device=ascent.device)
        for name, stack in ascent.stacks.items():
            moved = torch.cat([stack[:1], carried(stack[1:], ascent.structure, name, maps)]).flatten(1)
            norms, whole = moved.square().sum(), moved.sum(0).square().sum()
            pairs = (norms - whole) / 2 if self.product else count * norms - whole
            total = total.to(pairs) + ascent.weights[name] * pairs
        return total / self._scale if self._scale else total

    @cached_property
    def _scale(self) -> float:
        weights, pairs = self.ascent.weights, max(1, len(self.ascent.names) - 1)
        return sum(weights[n] * float(stack.square().sum()) * pairs for n, stack in self.ascent.stacks.items())
