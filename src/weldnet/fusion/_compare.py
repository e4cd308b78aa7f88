"""Compare: all combinations of methods and repairs on the same networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weldnet._arrays import find_device
from weldnet._modules import home, placed
from weldnet.activations import Inputs, unlabelled_batches
from weldnet.alignment import METHODS, AlignmentMethod, describe, resolve
from weldnet.checkpoints import load_into
from weldnet.errors import UsageError
from weldnet.evaluation import Labelled, Metrics, barrier, evaluate, evaluate_together
from weldnet.fusion._comparison import Combination, Comparison, Reference
from weldnet.fusion._effort import Effort, counted_inputs, measured, one_reason
from weldnet.fusion._judging import Judge, few_inputs, make_judge, twins
from weldnet.fusion._memory import MEMORY_NOTE
from weldnet.fusion._repair import Repair, make_repair
from weldnet.fusion._steps import Aligned, Clock, Prepared, align_parents, average_parents, prepare

__all__ = ["compare"]


def compare(
    networks: Sequence[nn.Module] | Mapping[str, nn.Module],
    example_input: Any,
    *,
    methods: Sequence[str | AlignmentMethod] | None = None,
    repairs: Sequence[str | Repair] = ("auto",),
    evaluate_on: Labelled | Judge | None = None,
    data: Inputs | None = None,
    samples: int = 4096,
    outputs: str | Sequence[str] | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    points: int = 11,
    check: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Comparison:
    """Fuse networks with every method and every repair, and put the results side by side.

    The structure is captured and proven once, each method aligns once, and its alignment is used for all repairs. A
    combination that fails is a row with its reason.

    Args:
        networks: as for :func:`weldnet.fuse`; not changed.
        example_input: what the networks take.
        methods: names or method objects; all methods of weldnet if None.
        repairs: names or repair objects.
        evaluate_on: what scores are measured on: as for :func:`weldnet.fuse`.
        data: unlabelled inputs for methods and repairs that take some.
        samples: how many of them at most; they are held in memory.
        outputs: as for :func:`weldnet.fuse`.
        weights: shares of the networks in the average.
        points: on the lines between the first network and the others, for the barrier; 0 leaves it out.
        check: prove the structure on every parent.
        seed: of everything random.
        device: where to compute, as for :func:`weldnet.fuse`.
        progress: show a bar on stderr, if that is a terminal.

    Returns:
        One row for each combination, and the parents and their ensemble.

    Raises:
        UsageError: there is no method, no repair, or only one point; arguments as for :func:`weldnet.fuse`.
        WeldnetError: the networks cannot be prepared: as :func:`weldnet.fuse`.

    Example:
        >>> import torch, weldnet
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = (torch.randn(20, 4), torch.arange(20) % 3)
        >>> found = weldnet.compare([make(), make()], data[0][:1], methods=["identity", "gamf"], evaluate_on=data)
        >>> [row.method for row in found.rows]
        ['identity', 'gamf']
    """
    asked = list(METHODS) if methods is None else list(methods)
    if not asked or not repairs or isinstance(methods, str) or isinstance(repairs, str):
        raise UsageError("compare needs a list of methods and one of repairs, with at least one entry each")
    if points == 1 or points < 0:
        raise UsageError(f"points {points!r}; give 2 or more for the barrier, or 0 to leave it out")
    inputs = None if data is None else torch.cat(list(unlabelled_batches(data, samples=samples)))
    judge = make_judge(list(evaluate_on) if isinstance(evaluate_on, Iterator) else evaluate_on)
    with _bar(progress, 1 + len(asked) * (1 + len(repairs))) as tick:
        tick("capture and check")
        prepared = prepare(
            networks, example_input, Clock(False), outputs=outputs, weights=weights, check=check, seed=seed
        )
        target, where = find_device(device), home(prepared.parents.first)
        bench = _Bench(prepared.on(target), judge, inputs, points, where, tick)
        references = bench.references()
        rows = [row for method in asked for row in bench.rows(method, repairs)]
    return Comparison(rows=tuple(rows), references=references, notes=tuple(_notes(judge, points, inputs, prepared)))


def _notes(judge: Any, points: int, inputs: Tensor | None, prepared: Prepared) -> Iterator[str]:
    if judge is None:
        yield "nothing was scored; give labelled data (evaluate_on= or --data)"
    elif points:
        yield f"barrier of the loss on {points} points from the first network to the others aligned to it, not repaired"
    yield "seconds are those of aligning, transport, averaging and repairing; one alignment serves all its repairs"
    yield MEMORY_NOTE
    known = f"of {len(inputs)} that were given" if inputs is not None else "and none were given"
    yield f"samples are the different unlabelled inputs that were read, {known}"
    yield from (note.rstrip(".") for note in few_inputs(inputs))
    yield from (note.rstrip(".") for note in twins(prepared.parents.fingerprints()))


@dataclass(frozen=True)
class _Bench:
    """What all combinations have in common; ``home`` is where a judge that is a function gets its networks."""

    prepared: Prepared
    judge: Labelled | Judge | None
    inputs: Tensor | None
    points: int
    home: torch.device
    tick: Callable[[str], None]

    def references(self) -> tuple[Reference, ...]:
        """Score the parents and, on labelled data, their ensemble."""
        modules = self.prepared.parents.modules
        if self.judge is None:
            return ()
        if callable(self.judge):
            return tuple(Reference(name=n, role="parent", scores=self.score(m)) for n, m in modules.items())
        found = evaluate_together(list(modules.values()), self.judge)
        parents = [
            Reference(name=name, role="parent", scores=metrics.scores)
            for name, metrics in zip(modules, found.metrics, strict=True)
        ]
        return (*parents, Reference(name="", role="ensemble", scores=found.ensemble.scores))

    def rows(self, method: str | AlignmentMethod, repairs: Sequence[str | Repair]) -> list[Combination]:
        """Align once, and repair in every way."""
        name = method if isinstance(method, str) else _name(method)
        self.tick(f"{name}: align")
        seen = counted_inputs(self.inputs)
        try:
            states = self.prepared.parents.states.values()
            chosen, _ = resolve(method, has_data=seen is not None, states=states)
            name = describe(chosen) if method != "auto" else f"auto: {describe(chosen)}"
            with measured(seen) as effort:
                aligned = align_parents(self.prepared, chosen, Clock(False), data=seen)
            height = self.barrier(aligned)
        except Exception as error:
            reason = one_reason(error)
            for _ in repairs:
                self.tick(f"{name}: failed")
            return [Combination(method=name, repair=_name(repair), error=reason) for repair in repairs]
        return [self.row(name, aligned, effort[0], height, repair) for repair in repairs]

    def row(
        self, name: str, aligned: Aligned, align: Effort, height: float | None, repair: str | Repair
    ) -> Combination:
        """Average, repair and score one combination."""
        label = _name(repair)
        self.tick(f"{name}: {label}")
        seen = counted_inputs(self.inputs)
        try:
            with measured(seen) as effort:
                averaged = average_parents(self.prepared, aligned)
                repaired = make_repair(repair, averaged.model)(averaged, seen)
            scores = self.score(repaired.model)
        except Exception as error:
            return Combination(method=name, repair=label, error=one_reason(error))
        known = [m for m in (align.memory, effort[0].memory) if m is not None]
        return Combination(
            method=name,
            repair=label,
            scores=scores,
            barrier=height,
            seconds=align.seconds + effort[0].seconds,
            memory=max(known) if known else None,
            samples=max(align.samples, effort[0].samples),
            done=repaired.summary,
        )

    def score(self, model: nn.Module) -> Mapping[str, float]:
        """Return what the judge says about a network."""
        if self.judge is None:
            return {}
        found = self.judge(placed(model, self.home)) if callable(self.judge) else evaluate(model, self.judge)
        if isinstance(found, Metrics):
            return found.scores
        return dict(found) if isinstance(found, Mapping) else {"score": float(found)}

    def barrier(self, aligned: Aligned) -> float | None:
        """Return the highest barrier from the first network to the others; None where there is no loss to measure."""
        first, *others = aligned.states
        modules = self.prepared.parents.modules
        if not self.points or self.judge is None:
            return None
        if callable(self.judge) and "loss" not in self.score(modules[first]):
            return None
        heights = []
        for name in others:
            moved = copy.deepcopy(modules[first])
            load_into(moved, aligned.states[name], name)
            found = barrier(modules[first], moved, evaluate=lambda m: self.score(m)["loss"], points=self.points)
            heights.append(found.height)
        return max(heights)


def _name(thing: object) -> str:
    if isinstance(thing, str):
        return thing
    return describe(thing) if isinstance(thing, AlignmentMethod) else repr(thing)


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[str], None]]:
    """One bar for everything; each tick says what comes next."""
    from rich.console import Console

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda step: None
        return
    from rich.progress import Progress

    with Progress(console=console) as bar:
        task = bar.add_task("compare", total=total, completed=-1)

        def tick(step: str) -> None:
            bar.update(task, advance=1, description=step)

        yield tick
        bar.update(task, completed=total)
