"""Fuse: from trained networks to one, with proof and numbers."""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from weldnet._arrays import find_device
from weldnet._modules import bare
from weldnet.activations import Inputs, held
from weldnet.alignment import (
    AlignmentMethod,
    Identity,
    Problem,
    describe,
    make_method,
    named_states,
    transport,
)
from weldnet.checkpoints import load_into, match_states, validate_finite
from weldnet.errors import StructureError, UsageError
from weldnet.evaluation import Labelled
from weldnet.fusion._average import average, normalise_weights
from weldnet.fusion._averaged import Averaged
from weldnet.fusion._fusion import Fusion
from weldnet.fusion._judging import Judge, make_judge, notes, scored
from weldnet.fusion._repair import NoRepair, Repair, make_repair
from weldnet.fusion._report import Report, Row
from weldnet.structure import Referee, Structure, capture
from weldnet.structure import check as run_check

__all__ = ["fuse"]

logger = logging.getLogger("weldnet")


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
    judge = make_judge(evaluate_on)
    parents = _gather(networks, weights)
    first = next(iter(parents.modules.values()))
    target = find_device(device)
    data = None if data is None else held(data)
    clock = _Clock(progress)

    with clock.step("capture"):
        structure = capture(first, example_input, outputs)
    with clock.step("check"):
        proof = _prove(parents, example_input, structure, seed) if check else "not made (check=False)"
    with clock.step("align"), torch.no_grad():
        problem = Problem(structure, parents.states, seed=seed, device=target, networks=parents.modules, data=data)
        alignment = chosen(problem)
    with clock.step("transport"):
        moved = {name: transport(state, structure, alignment[name]) for name, state in parents.states.items()}
        errors = _equivalences(parents, moved, example_input, structure, seed) if check else {}
    shares = list(parents.shares.values())
    with clock.step("average"):
        averaged = Averaged(
            _with_state(first, average(list(moved.values()), shares)),
            parents.modules,
            parents.shares,
            structure,
            alignment,
            example_input=example_input,
            seed=seed,
        )
    with clock.step("repair"):
        mend = make_repair(repair, averaged.model, data)
        repaired = mend(averaged, data)
    with clock.step("evaluate"):
        naive = _with_state(first, average(list(parents.states.values()), shares))
        if judge is not None:
            still = Identity()(Problem(structure, parents.states))
            naive = mend(replace(averaged, model=naive, alignment=still), data).model
        rows = scored(
            [Row(n, "parent", {}, w, alignment.moved[n], errors.get(n)) for n, w in parents.shares.items()],
            parents.modules,
            naive,
            repaired.model,
            judge,
        )
    report = Report(
        rows=tuple(rows),
        method=describe(chosen),
        repair=repaired.summary,
        objective=alignment.stats.get("objective"),
        check=proof,
        spaces=len(structure.spaces),
        free_share=structure.free_share,
        parameters=sum(p.numel() for p in repaired.model.parameters()),
        seconds=clock.seconds,
        repair_numbers=repaired.numbers,
        notes=tuple(notes(rows, structure, alignment, isinstance(mend, NoRepair), repaired.model, data)),
    )
    config = {
        "method": repr(chosen),
        "outputs": list(structure.outputs),
        "weights": dict(parents.shares),
        "repair": repaired.summary,
        "check": check,
        "seed": seed,
    }
    prints = {name: _fingerprint(state) for name, state in parents.states.items()}
    return Fusion(repaired.model, alignment, structure, report, config, prints)


@dataclass(frozen=True)
class _Parents:
    """The networks by name: as modules, as state dicts, and with their shares in the average."""

    modules: dict[str, nn.Module]
    states: dict[str, Mapping[str, Tensor]]
    shares: dict[str, float]


def _gather(networks: Any, weights: Sequence[float] | Mapping[str, float] | None) -> _Parents:
    """Name the networks, and check that they can be averaged."""
    states = named_states(networks)
    names = list(states)
    if len(names) < 2:
        raise UsageError(f"fusing needs two networks or more; got {len(names)}")
    given = networks.values() if isinstance(networks, Mapping) else networks
    modules = {name: bare(network) for name, network in zip(names, given, strict=True)}
    shares = normalise_weights(_by_name(weights, names), len(names))
    match_states(states)
    for name, state in states.items():
        validate_finite(state, name)
    return _Parents(modules, states, dict(zip(names, shares, strict=True)))


def _prove(parents: _Parents, example_input: Any, structure: Structure, seed: int) -> str:
    """Renumber every parent at random; its output must stay."""
    results = [run_check(module, example_input, structure, seed=seed) for module in parents.modules.values()]
    return str(max(results, key=lambda result: result.error))


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


def _by_name(weights: Sequence[float] | Mapping[str, float] | None, names: Sequence[str]) -> Sequence[float] | None:
    if not isinstance(weights, Mapping):
        return weights
    unknown = sorted(set(weights) ^ set(names))
    if unknown:
        raise UsageError(
            f"weights and networks differ in {unknown[0]!r}; give one weight for each of {', '.join(names)}"
        )
    return [weights[name] for name in names]


def _equivalences(
    parents: _Parents, moved: Mapping[str, Mapping[str, Tensor]], example_input: Any, structure: Structure, seed: int
) -> dict[str, float]:
    """The proof on the alignment itself: every transported parent still answers as the parent does."""
    errors = {}
    for name, module in parents.modules.items():
        referee = Referee(module, example_input, torch.Generator().manual_seed(seed), structure.outputs)
        error = referee.error({k: t.to("cpu", referee.state[k].dtype) for k, t in moved[name].items()})
        if not error <= referee.tolerance:
            raise StructureError(
                f"{type(module).__name__}: its transport changed the output by {error:.1e} "
                f"(relative, {referee.tolerance:.0e} allowed); nothing was averaged: capture its own structure"
            )
        errors[name] = error
    return errors


def _with_state(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(module)
    load_into(model, state, "fused")
    return model


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
