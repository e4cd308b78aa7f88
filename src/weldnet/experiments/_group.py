"""One group of networks: scored with its ensemble, or fused by one method with every repair, and fine-tuned."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, final

import torch
from torch import Tensor, nn

from weldnet._arrays import send
from weldnet._modules import bring
from weldnet.alignment import Alignment, diagnose_states
from weldnet.checkpoints import load_into
from weldnet.data import Split
from weldnet.evaluation import Barrier, Metrics, barrier, evaluate, evaluate_together
from weldnet.experiments._cells import Cell, Context, Made, here
from weldnet.experiments._data import load_split
from weldnet.experiments._methods import NAIVE, parse_method
from weldnet.experiments._networks import obtain
from weldnet.experiments._protocol import Protocol
from weldnet.experiments._tasks import GroupTask
from weldnet.fusion import (
    Aligned,
    Averaged,
    Clock,
    Counted,
    Effort,
    Prepared,
    Repaired,
    align_parents,
    average_at,
    counted_inputs,
    fold,
    leave_parents,
    make_repair,
    measured,
    one_reason,
    prepare,
    variances,
)
from weldnet.records import Record
from weldnet.training import Recipe, fine_tune

__all__ = ["run_group"]

_POOLED = 48
_VARIANCE_SAMPLES = 256


def run_group(cell: Cell, context: Context) -> list[Record]:
    """Do a cell of a group: what it makes decides which repairs and stages are computed."""
    task: GroupTask = cell.work
    device = torch.device(context.device)
    networks = {
        _letter(number): bring(obtain(spec, context.cache, say=context.say).model, device)
        for number, spec in enumerate(task.specs)
    }
    test = load_split(task.protocol.dataset, "test", task.protocol.test_rows)
    bench = _Bench(cell, context, task, networks, test)
    if task.method is None:
        return bench.references()
    if task.method == "fold":
        return [bench.folded(made) for made in cell.makes]
    return list(bench.fusions(task.method))


@final
@dataclass(frozen=True)
class _Bench:
    """What all results of a cell have in common."""

    cell: Cell
    context: Context
    task: GroupTask
    networks: dict[str, nn.Module]
    test: Split

    @property
    def protocol(self) -> Protocol:
        return self.task.protocol

    def references(self) -> list[Record]:
        """Score the networks and their ensemble."""
        start = time.perf_counter()
        found = evaluate_together(list(self.networks.values()), self.test, device=self.context.device)
        seconds = time.perf_counter() - start
        best = max(found.metrics, key=lambda metrics: metrics.accuracy)
        scores = {
            "individual": _mean_scores(found.metrics),
            "best parent": best.scores,
            "ensemble": found.ensemble.scores,
        }
        return [
            self.record(made, {**scores[str(made.words["method"])], "seconds": seconds}, {}) for made in self.cell.makes
        ]

    def folded(self, made: Made) -> Record:
        """Fold the second network, which is wider, into the widths of the first."""
        narrow, wide, *_ = self.networks.values()
        with measured(None) as effort:
            model = fold(wide, narrow, self.example)
        return self.record(
            made, {**self.score(model), **_effort(effort[0])}, {"done": "fold: the first network's width"}
        )

    def fusions(self, method: str) -> Iterator[Record]:
        """Align once, and make every result from that."""
        inputs = self.unlabelled()
        prepared = prepare(self.networks, self.example, Clock(False), seed=0)
        seen = counted_inputs(inputs)
        with measured(seen) as effort:
            aligned = self.align(prepared, method, seen)
        shared: dict[str, Any] = {
            "moved": fmean([share for name, share in aligned.alignment.moved.items() if name != "a"]),
            "objective": aligned.alignment.stats.get("objective"),
        }
        facts: dict[str, Any] = {"options": aligned.alignment.method, "spaces": _spaces(prepared, aligned)}
        line = self.line(aligned)
        if line is not None:
            shared["barrier"] = line.height
            yield from (self.curve(made, line) for made in self.cell.makes if made.kind == "curve")
        yield from (self.couplings(made, aligned.alignment) for made in self.cell.makes if made.kind == "couplings")
        results = [made for made in self.cell.makes if made.kind == "result"]
        for size, repair in dict.fromkeys((m.words["size"], m.words["repair"]) for m in results):
            made = [m for m in results if (m.words["size"], m.words["repair"]) == (size, repair)]
            try:
                yield from self.results(prepared, aligned, effort[0], inputs, made, shared, facts)
            except Exception as error:
                if isinstance(error.__cause__, OSError):
                    raise
                yield from (self.record(entry, {}, {**facts, "error": one_reason(error)}) for entry in made)

    def align(self, prepared: Prepared, method: str, seen: Counted | None) -> Aligned:
        """Bring the networks into one order, or leave them in theirs."""
        if method == NAIVE:
            return leave_parents(prepared)
        return align_parents(prepared, parse_method(method), Clock(False), data=seen)

    def results(
        self,
        prepared: Prepared,
        aligned: Aligned,
        align: Effort,
        inputs: Tensor | None,
        made: Sequence[Made],
        shared: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> Iterator[Record]:
        """Average, repair and score; then fine-tune, if that is asked for."""
        size, repair = float(made[0].words["size"] or 1), str(made[0].words["repair"])
        seen = counted_inputs(inputs)
        with measured(seen) as effort:
            averaged, sized = average_at(size, prepared, aligned)
            repaired = make_repair(repair, averaged.model)(averaged, seen)
        known = [m for m in (align.memory, effort[0].memory) if m is not None]
        values = {
            **shared,
            "seconds": align.seconds + effort[0].seconds,
            "memory": max(known) if known else None,
            "samples": max(align.samples, effort[0].samples),
            "size_used": 1.0 if sized is None else sized.used,
        }
        extra = {**facts, "done": repaired.summary, "variances": self.variances(averaged, repaired, inputs, size)}
        for entry in made:
            if entry.words["stage"] == "one-shot":
                yield self.record(entry, {**values, **self.score(repaired.model)}, extra)
            else:
                yield self.tuned(entry, repaired, values)

    def tuned(self, made: Made, repaired: Repaired, values: Mapping[str, Any]) -> Record:
        """Fine-tune a fused network on all labelled rows."""
        assert self.protocol.fine_tuning is not None
        recipe = replace(Recipe(**self.protocol.fine_tuning.recipe), seed=int(made.words["group"] or 0))
        rows = load_split(self.protocol.dataset, "train", self.protocol.rows)
        state = self.context.folder / "states" / f"{made.key}.state"
        found = fine_tune(
            repaired.model, rows, recipe, device=self.context.device, state_path=state, resume=True, progress=False
        )
        history = [{"epoch": e.epoch, "loss": e.loss, "accuracy": e.accuracy} for e in found.history]
        numbers = {key: values[key] for key in ("moved", "objective", "samples", "memory")}
        numbers["seconds"] = values["seconds"] + found.seconds
        extra = {"done": f"{repaired.summary}; fine-tuned", "recipe": asdict(recipe), "history": history}
        return self.record(made, {**numbers, **self.score(found.model)}, extra)

    def variances(self, averaged: Averaged, repaired: Repaired, inputs: Tensor | None, size: float) -> dict[str, Any]:
        """Return by layer the variance of its outputs before and after the repair, in parts of the parents'."""
        if inputs is None or size != 1:
            return {}
        batches = list(send(inputs[:_VARIANCE_SAMPLES], self.device).split(128))
        found = variances(averaged, repaired.model, batches)
        return {layer or "network": [ratio["before"], ratio["after"]] for layer, ratio in found.items()}

    def line(self, aligned: Aligned) -> Barrier | None:
        """Return the line from the first network to the other with the highest barrier."""
        points = self.protocol.barrier.points
        asked = any(made.kind == "curve" or made.words.get("size") == 1 for made in self.cell.makes)
        if not points or not aligned.states or not asked:
            return None
        rows = load_split(self.protocol.dataset, "test", self.protocol.barrier.rows or self.protocol.test_rows)

        def score(model: nn.Module) -> dict[str, float]:
            return evaluate(model, rows, device=self.context.device).scores

        first, *others = aligned.states
        found: list[Barrier] = []
        for name in others:
            moved = copy.deepcopy(self.networks[first])
            load_into(moved, aligned.states[name], name)
            found.append(barrier(self.networks[first], moved, evaluate=score, points=points))
        return max(found, key=lambda line: line.height)

    def curve(self, made: Made, line: Barrier) -> Record:
        """Make the record of a barrier."""
        y = {"loss": list(line.values), "accuracy": list(line.scores["accuracy"])}
        extra = {"about": "barrier", "x": list(line.points), "y": y}
        return self.record(made, {"barrier": line.height, "area": line.area}, extra)

    def couplings(self, made: Made, alignment: Alignment) -> Record:
        """Make the record of who went where, of the second network."""
        spaces = {}
        for name, coupling in alignment["b"].items():
            matrix = coupling.matrix(torch.float32)
            spaces[name] = {"units": list(matrix.shape), "matrix": _pooled(matrix)}
        return self.record(made, {}, {"spaces": spaces})

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return torch.device(self.context.device)

    @property
    def example(self) -> Tensor:
        """One image."""
        return send(self.test.images[:1], self.device)

    def unlabelled(self) -> Tensor | None:
        """Return training images without their labels."""
        count = self.protocol.samples
        if not count:
            return None
        rows = load_split(self.protocol.dataset, "train", min(count, self.protocol.rows or count))
        return rows.images

    def score(self, model: nn.Module) -> dict[str, float]:
        """Return what a network gets on the test rows."""
        return evaluate(model, self.test, device=self.context.device).scores

    def record(self, made: Made, values: Mapping[str, Any], extra: Mapping[str, Any]) -> Record:
        """Make a record of the cell."""
        seeds = [spec.seed for spec in self.task.specs]
        about = {**extra, "seeds": seeds, "networks": [spec.key for spec in self.task.specs]}
        return Record(kind=made.kind, key=made.key, cell=made.words, values=values, extra=about, seed=0, where=here())


def _mean_scores(metrics: Sequence[Metrics]) -> dict[str, float]:
    names = metrics[0].scores
    return {name: fmean(found.scores[name] for found in metrics) for name in names}


def _effort(effort: Effort) -> dict[str, Any]:
    return {"seconds": effort.seconds, "memory": effort.memory, "samples": effort.samples}


def _spaces(prepared: Prepared, aligned: Aligned) -> dict[str, Any]:
    """Return how well every space was matched."""
    if not aligned.states:
        return {}
    found = diagnose_states(aligned.alignment, prepared.parents.states, prepared.structure, aligned.states)
    return {row.space: {"units": row.units, "moved": row.moved, "quality": row.quality} for row in found.rows}


def _pooled(matrix: Tensor) -> list[list[float]]:
    """Return a matrix; a large one as the means of its blocks."""
    height, width = (min(size, _POOLED) for size in matrix.shape)
    if (height, width) != tuple(matrix.shape):
        matrix = torch.nn.functional.adaptive_avg_pool2d(matrix[None, None], (height, width))[0, 0]
    return [[round(value, 4) for value in row] for row in matrix.tolist()]


def _letter(number: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[number] if number < 26 else f"n{number}"
