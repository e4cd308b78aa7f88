"""Straight-through: permutations learned by the loss of the average (Git Re-Basin's third method)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weldnet.affinity import InnerProduct
from weldnet.alignment._ascent import Ascent
from weldnet.alignment._method import Alignment, Problem
from weldnet.alignment._mixture import Lesson, Mixture
from weldnet.alignment._rebasin import first_pass, start_weights
from weldnet.alignment._sweeps import hard_sweeps, random_orders
from weldnet.assignment import as_matrix, best_inside, best_permutation, unfold
from weldnet.errors import DataError, UsageError
from weldnet.structure import Maps, Structure

__all__ = ["StraightThrough"]

_SWEEPS = 100


@final
@dataclass(frozen=True, kw_only=True)
class StraightThrough:
    """Learn permutations so that the average of the networks answers as the networks do together.

    Every network and space has a table of scores, whose best assignment is used in the forward pass of the average of
    all networks; gradients go past the assignment straight to the scores. Labels are never used: the target is the mean
    of the parents' outputs, and the loss is one minus the correlation with it over a batch: a loss that knows the scale
    falls fastest by making the average answer nothing. Starts from weight matching, passes over the inputs ``epochs``
    times, and keeps the permutations of the lowest loss over all inputs: those of the start if nothing is lower.
    BatchNorm layers normalise by each batch, as after a repair.

    Args:
        epochs: passes over the inputs.
        rate: how far scores move in a step, in standard deviations of the gradient; the start's units are 1 ahead.
        samples: inputs to look at, at most.
        batch_size: inputs for each step.

    Source: Ainsworth et al., "Git Re-Basin", https://arxiv.org/abs/2209.04836, section 3.3, with the parents' outputs
    in place of labels.
    """

    epochs: int = 10
    rate: float = 0.3
    samples: int = 1024
    batch_size: int = 128
    name = "straight_through"
    order_invariant = False
    equivariant = False
    needs_data = True
    any_width = False

    def __post_init__(self) -> None:
        for option, least in (("epochs", 1), ("samples", 2), ("batch_size", 2)):
            if getattr(self, option) < least:
                raise UsageError(f"straight_through: {option} is {getattr(self, option)}; give {least} or more")
        if not self.rate > 0:
            raise UsageError(f"straight_through: rate is {self.rate}; give a number above 0")

    def __call__(self, problem: Problem, /) -> Alignment:
        """Align all networks; the universe is given in the order of the first."""
        mixture = Mixture.of(problem, self.name)
        assert problem.data is not None
        lessons = mixture.lessons(problem.data, self.samples, self.batch_size)
        if not lessons:
            raise DataError("straight_through learns from batches of 2 inputs or more; data= holds none")
        ascent = start_weights(problem)
        first_pass(ascent)
        generator = torch.Generator().manual_seed(problem.seed)
        hard_sweeps(ascent, InnerProduct(), random_orders(problem.structure.roots, _SWEEPS, generator))
        scores = _Scores.of(ascent)
        losses, best = [mixture.loss_over(lessons, scores.hard())], scores.hard()
        settled = not scores.outer  # without spaces there is nothing to learn
        for _ in range(0 if settled else self.epochs):
            before = scores.hard()
            for i in torch.randperm(len(lessons), generator=generator).tolist():
                scores.learn(mixture, lessons[i], self.rate)
            now = scores.hard()
            settled = all(torch.equal(now.whole[s], before.whole[s]) for s in now.whole)
            loss = mixture.loss_over(lessons, now)
            if loss < min(losses) * (1 - 1e-6):
                best = now
            losses.append(loss)
        _settle(ascent, best)
        stats = {
            "objective": ascent.objective(),
            "loss": min(losses),
            "first_loss": losses[0],
            "sweeps": len(losses) - 1,
            "converged": settled,
        }
        return ascent.alignment(repr(self), stats, problem.names)


@dataclass
class _Scores:
    """How much each network's units want to go where: tables of root spaces, and inside every pair of blocks.

    Args:
        structure: where the units lie.
        outer: of root spaces, shape (networks - 1, units, universe).
        inner: of nested spaces, shape (networks - 1, blocks, universe blocks, inner, inner).
    """

    structure: Structure
    outer: dict[str, Tensor]
    inner: dict[str, Tensor]

    @staticmethod
    def of(ascent: Ascent) -> _Scores:
        """Start one ahead at the units that hard couplings chose."""
        roots = {root.name: as_matrix(ascent.couplings[root.name], torch.float32) for root in ascent.structure.roots}
        return _Scores(ascent.structure, roots, {s: as_matrix(c, torch.float32) for s, c in ascent.inner.items()})

    def hard(self) -> Maps:
        """Return the best assignments, as integers."""
        outer = {
            s: torch.stack([best_permutation(t) for t in tables]).to(tables.device) for s, tables in self.outer.items()
        }
        inner = {s: best_inside(tables).to(tables.device) for s, tables in self.inner.items()}
        return self._maps(outer, inner)

    def learn(self, mixture: Mixture, lesson: Lesson, rate: float) -> None:
        """Take one step against the gradient that the best assignments get."""
        chosen = self.hard()
        tables = [*self.outer.values(), *self.inner.values()]
        with torch.enable_grad():
            outer = {s: as_matrix(chosen.whole[s], mixture.dtype).requires_grad_() for s in self.outer}
            inner = {s: as_matrix(chosen.inner[s], mixture.dtype).requires_grad_() for s in self.inner}
            leaves = [*outer.values(), *inner.values()]
            loss = mixture.loss(lesson, self._maps(outer, inner))
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        for table, gradient in zip(tables, gradients, strict=True):
            size = gradient.flatten(1).std(1).clamp_min(torch.finfo(gradient.dtype).tiny)
            table.sub_((gradient / size.reshape(-1, *[1] * (gradient.dim() - 1))).to(table), alpha=rate)

    def _maps(self, outer: Mapping[str, Tensor], inner: Mapping[str, Tensor]) -> Maps:
        whole = dict(outer)
        for space in self.structure.spaces:  # parents come first
            if space.parent is not None:
                pairs = zip(whole[space.parent], inner[space.name], strict=True)
                whole[space.name] = torch.stack([unfold(blocks, inside) for blocks, inside in pairs])
        return Maps(whole, inner)


def _settle(ascent: Ascent, maps: Maps) -> None:
    ascent.couplings = {s: sources.to(ascent.device) for s, sources in maps.whole.items()}
    ascent.inner = {s: sources.to(ascent.device) for s, sources in maps.inner.items()}
