"""Fuse: from trained networks to one, with proof and numbers."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from weldnet._arrays import find_device
from weldnet._modules import bare
from weldnet.alignment import (
    Alignment,
    AlignmentMethod,
    Problem,
    describe,
    make_method,
    named_states,
    transport,
)
from weldnet.checkpoints import load_into, match_states, provenance, save, validate_finite
from weldnet.errors import StructureError, UsageError
from weldnet.evaluation import Labelled, ensemble_metrics, evaluate
from weldnet.fusion._average import average, normalise_weights
from weldnet.fusion._inputs import Inputs
from weldnet.fusion._repair import NoRepair, Repair, has_statistics, make_repair
from weldnet.fusion._report import Report, Row
from weldnet.structure import Referee, Structure, capture
from weldnet.structure import check as run_check

__all__ = ["Fusion", "fuse"]

logger = logging.getLogger("weldnet")

#: Turns a network into numbers: one, or several by name.
Judge = Callable[[nn.Module], float | Mapping[str, float]]


@final
@dataclass(frozen=True)
class Fusion:
    """What :func:`fuse` gives.

    Args:
        model: the fused network, of the first parent's class.
        alignment: who went where.
        structure: what was renumbered.
        report: the numbers; print it.
        config: the resolved settings, for the record.
        parents: by name, a SHA-256 of each parent's tensors.
    """

    model: nn.Module
    alignment: Alignment
    structure: Structure
    report: Report
    config: Mapping[str, Any]
    parents: Mapping[str, str]

    def __str__(self) -> str:
        return str(self.report)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the fused network's tensors."""
        return dict(self.model.state_dict())

    def save(self, path: str | os.PathLike[str], *, files: Sequence[str | os.PathLike[str]] = ()) -> None:
        """Write the fused weights with their provenance, atomically.

        Args:
            path: ``.safetensors`` (with metadata), ``.pt``, ``.pth`` or ``.bin``.
            files: the parents' checkpoints, whose names and SHA-256 go into the metadata; without them the hashes of
                the parents' tensors do.

        Raises:
            CheckpointError: the file cannot be written; nothing is left behind.
        """
        save(self.state_dict(), path, metadata=self.provenance(files))

    def provenance(self, files: Sequence[str | os.PathLike[str]] = ()) -> dict[str, str]:
        """Return where the fused network comes from, as :meth:`save` writes it.

        Args:
            files: the parents' checkpoints.

        Raises:
            CheckpointError: a parent's file cannot be read.
        """
        metadata = provenance(files, dict(self.config), int(self.config.get("seed", 0)))
        if not files:
            metadata["parents"] = json.dumps([{"name": n, "tensors_sha256": h} for n, h in self.parents.items()])
        return metadata


def fuse(
    networks: Sequence[nn.Module] | Mapping[str, nn.Module],
    example_input: Any,
    *,
    outputs: str | Sequence[str] | None = None,
    method: str | AlignmentMethod = "gamf",
    weights: Sequence[float] | Mapping[str, float] | None = None,
    repair: str | Repair = "auto",
    data: Inputs | None = None,
    evaluate_on: Labelled | tuple[Tensor, Tensor] | Judge | None = None,
    size: float = 1.0,
    check: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    **options: Any,
) -> Fusion:
    """Fuse two or more trained networks of one architecture into one.

    Captures the structure, proves on every parent that renumbering keeps its function, aligns, carries all parents to
    the first one's order, averages, and repairs.

    Args:
        networks: modules of one architecture, in a list (named ``"a"``, ``"b"``, ...) or by name; not changed.
        example_input: what the networks take: a tensor, a tuple of arguments or a dict of keyword arguments.
        outputs: key paths of what counts as output in what the networks return, as for :func:`weldnet.capture`.
        method: ``"gamf"``, ``"weight_matching"``, ``"identity"``, or a method object such as ``Gamf(sigma=4.0)``.
        weights: shares of the networks in the average, summing to 1; a sequence or by name; equal if None.
        repair: ``"auto"`` (re-estimate BatchNorm statistics if there are any and ``data`` is given), ``"none"``,
            ``"data"``, or a repair object.
        data: optional unlabelled inputs for the repair: a tensor, a Dataset, a DataLoader or an iterable of batches;
            labels in it are ignored.
        evaluate_on: what fills the report's scores, and nothing else: (inputs, labels), a labelled Dataset or
            DataLoader, or a function of a network that returns a number or several by name.
        size: of the fused network in parents; this version makes 1.0.
        check: prove the structure on every parent before anything is averaged.
        seed: of everything random.
        device: where to align; the networks' own device if None.
        progress: show the steps on stderr, if that is a terminal.
        options: of the method, if it is given by name.

    Returns:
        The fused network with alignment, structure and report.

    Raises:
        UsageError: arguments that make no sense together.
        CheckpointError: different architectures, or NaN or Inf in the weights.
        ModelError: the networks fail on the example input, or cannot be traced.
        StructureError: renumbering would change a parent's function; nothing was averaged.
        WidthError: unequal widths.
        DataError: data that does not fit.

    Example:
        >>> import torch, weldnet
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> result = weldnet.fuse([make(), make()], example_input=torch.zeros(1, 4))
        >>> [row.role for row in result.report.rows]
        ['parent', 'parent', 'naive', 'fused']
    """
    if size != 1.0:
        raise UsageError(f"size {size} is not available in this version; leave it at 1.0")
    chosen = make_method(method, **options)
    _check_arguments(networks, example_input, data, seed)
    judge = _judge(evaluate_on)
    states = named_states(networks)
    names = list(states)
    if len(names) < 2:
        raise UsageError(f"fusing needs two networks or more; got {len(names)}")
    given = networks.values() if isinstance(networks, Mapping) else networks
    modules = {name: bare(network) for name, network in zip(names, given, strict=True)}
    shares = normalise_weights(_by_name(weights, names), len(names))
    target = find_device(device)
    match_states(states)
    for name, state in states.items():
        validate_finite(state, name)
    clock = _Clock(progress)

    with clock.step("capture"):
        structure = capture(modules[names[0]], example_input, outputs)
    proof = "not made (check=False)"
    if check:
        with clock.step("check"):
            results = [run_check(module, example_input, structure, seed=seed) for module in modules.values()]
            proof = str(max(results, key=lambda result: result.error))
    with clock.step("align"), torch.no_grad():
        alignment = chosen(Problem(structure, states, seed=seed, device=target))
    with clock.step("transport"):
        moved = {name: transport(state, structure, alignment[name]) for name, state in states.items()}
        errors = (
            {name: _equivalence(modules[name], moved[name], example_input, structure, seed) for name in names}
            if check
            else {}
        )
    with clock.step("average"):
        fused = _with_state(modules[names[0]], average(list(moved.values()), shares))
    with clock.step("repair"):
        mend = make_repair(repair, fused, data)
        fused, repaired = mend(fused, data)
    rows = [
        Row(name, "parent", {}, share, alignment.moved[name], errors.get(name))
        for name, share in zip(names, shares, strict=True)
    ]
    with clock.step("evaluate"):
        naive = _with_state(modules[names[0]], average(list(states.values()), shares))
        naive = mend(naive, data)[0] if judge is not None else naive
        rows = _scored(rows, modules, naive, fused, judge)
    report = Report(
        rows=tuple(rows),
        method=describe(chosen),
        repair=repaired,
        objective=alignment.stats.get("objective"),
        check=proof,
        spaces=len(structure.spaces),
        free_share=structure.free_share,
        parameters=sum(p.numel() for p in fused.parameters()),
        seconds=clock.seconds,
        notes=tuple(_notes(rows, structure, alignment, isinstance(mend, NoRepair), fused, data)),
    )
    config = {
        "method": repr(chosen),
        "outputs": list(structure.outputs),
        "weights": dict(zip(names, shares, strict=True)),
        "repair": repaired,
        "check": check,
        "seed": seed,
    }
    return Fusion(fused, alignment, structure, report, config, {n: _fingerprint(s) for n, s in states.items()})


def _check_arguments(networks: Any, example_input: Any, data: Any, seed: Any) -> None:
    """Refuse at once what would fail late and obscurely."""
    if isinstance(networks, nn.Module | str) or not isinstance(networks, Sequence | Mapping):
        raise UsageError(
            f"networks is a {type(networks).__name__}; give a list of nn.Modules, or a dict of them by name"
        )
    for network in networks.values() if isinstance(networks, Mapping) else networks:
        if not isinstance(network, nn.Module):
            raise UsageError(f"a network is a {type(network).__name__}; give nn.Modules with their weights loaded")
    if isinstance(example_input, tuple | list) and all(isinstance(n, int) for n in example_input):
        raise UsageError(
            f"example_input is {example_input!r}; give a tensor, such as torch.zeros{tuple(example_input)!r}"
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UsageError(f"seed is {seed!r}; give an integer of 0 or more")
    if data is not None and not isinstance(data, Iterable | Dataset):
        raise UsageError(f"data is a {type(data).__name__}; give a tensor of inputs, a Dataset, or a DataLoader")


def _judge(evaluate_on: Any) -> Labelled | Judge | None:
    """Read what the report is scored on; a pair (inputs, labels) is a dataset too."""
    pair = isinstance(evaluate_on, tuple | list) and len(evaluate_on) == 2
    if pair and all(isinstance(t, Tensor) for t in evaluate_on):
        if len(evaluate_on[0]) != len(evaluate_on[1]):
            raise UsageError(
                f"evaluate_on has {len(evaluate_on[0])} inputs and {len(evaluate_on[1])} labels; give pairs"
            )
        return cast(Labelled, TensorDataset(*evaluate_on))
    if evaluate_on is None or callable(evaluate_on):
        return cast("Judge | None", evaluate_on)
    if isinstance(evaluate_on, Tensor) or not isinstance(evaluate_on, Iterable | Dataset):
        raise UsageError(
            f"evaluate_on is a {type(evaluate_on).__name__}; give (inputs, labels), a Dataset, a DataLoader, "
            "or a function of a network"
        )
    return evaluate_on


def _by_name(weights: Sequence[float] | Mapping[str, float] | None, names: Sequence[str]) -> Sequence[float] | None:
    if not isinstance(weights, Mapping):
        return weights
    unknown = sorted(set(weights) ^ set(names))
    if unknown:
        raise UsageError(
            f"weights and networks differ in {unknown[0]!r}; give one weight for each of {', '.join(names)}"
        )
    return [weights[name] for name in names]


def _equivalence(
    module: nn.Module, moved: Mapping[str, Tensor], example_input: Any, structure: Structure, seed: int
) -> float:
    """The proof on the alignment itself: the transported parent still answers as the parent does."""
    referee = Referee(module, example_input, torch.Generator().manual_seed(seed), structure.outputs)
    error = referee.error({k: t.to("cpu", referee.state[k].dtype) for k, t in moved.items()})
    if not error <= referee.tolerance:
        raise StructureError(
            f"{type(module).__name__}: its transport changed the output by {error:.1e} "
            f"(relative, {referee.tolerance:.0e} allowed); nothing was averaged: capture the structure of this model"
        )
    return error


def _with_state(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(module)
    load_into(model, state, "fused")
    return model


def _scored(
    rows: Sequence[Row],
    modules: Mapping[str, nn.Module],
    naive: nn.Module,
    fused: nn.Module,
    judge: Labelled | Judge | None,
) -> list[Row]:
    def scores(model: nn.Module) -> Mapping[str, float]:
        if judge is None:
            return {}
        if not callable(judge):
            found = evaluate(model, judge)
            return {"accuracy": found.accuracy, "loss": found.loss}
        value = judge(model)
        return dict(value) if isinstance(value, Mapping) else {"score": float(value)}

    scored = [Row(r.name, r.role, scores(modules[r.name]), r.weight, r.moved, r.equivalence) for r in rows]
    if judge is not None and not callable(judge):
        found = ensemble_metrics(list(modules.values()), judge)
        scored.append(Row("ensemble", "ensemble", {"accuracy": found.accuracy, "loss": found.loss}))
    return [*scored, Row("naive average", "naive", scores(naive)), Row("fused", "fused", scores(fused))]


def _notes(
    rows: Sequence[Row],
    structure: Structure,
    alignment: Alignment,
    unrepaired: bool,
    fused: nn.Module,
    data: Inputs | None,
) -> Iterator[str]:
    if structure.unknown:
        yield f"no rule for {', '.join(structure.unknown)}: what reaches it was left in place."
    if not structure.spaces:
        yield "nothing in this model can be renumbered: the result is the naive average."
    if alignment.stats.get("converged") is False:
        yield "the alignment stopped before it settled; give it more sweeps."
    if unrepaired and has_statistics(fused):
        yield (
            "the network has BatchNorm statistics, which averaging breaks: expect it to be far worse than its parents "
            "until a few hundred unlabelled inputs restore them (data= or --data)."
        )
    elif unrepaired and data is not None:
        yield "the unlabelled data was not used: there are no BatchNorm statistics to restore, or repair is 'none'."
    accuracy = {row.role: row.scores["accuracy"] for row in rows if "accuracy" in row.scores}
    if not any(row.scores for row in rows):
        yield "not measured: the check is about renumbering, not quality; give labelled data (evaluate_on= or --data)."
    if not accuracy:
        return
    parents = [row.scores["accuracy"] for row in rows if row.role == "parent"]
    if accuracy["fused"] < accuracy["naive"]:
        yield f"aligning did not help: the naive average is {_points(accuracy['naive'] - accuracy['fused'])} better."
    if accuracy["fused"] < max(parents):
        yield f"the fused network is {_points(max(parents) - accuracy['fused'])} below the best parent."
    if accuracy["fused"] < min(parents) - 0.05:
        yield "that is far below every parent: fine-tune it, or keep the ensemble, before you use it."


def _points(difference: float) -> str:
    return f"{100 * difference:.2f} percentage points"


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


class _Clock:
    """Seconds of every step; says on stderr what is going on if asked to."""

    def __init__(self, progress: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        if self._progress:
            from rich.console import Console

            with Console(stderr=True).status(f"{name} ..."):
                yield
        else:
            yield
        self.seconds[name] = round(time.perf_counter() - start, 4)
        logger.info("%s: %.2f s", name, self.seconds[name])
