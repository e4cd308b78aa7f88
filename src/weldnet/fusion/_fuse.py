"""Fuse: from trained networks to one, with proof and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from weldnet._arrays import find_device, state_home
from weldnet._modules import bring, home, no_module
from weldnet._shares import check_size
from weldnet.activations import Inputs, held, unlabelled_batches
from weldnet.alignment import (
    AlignmentMethod,
    Diagnosis,
    describe,
    diagnose_states,
    named_states,
    require_device,
    resolve,
)
from weldnet.errors import UsageError
from weldnet.evaluation import Labelled
from weldnet.fusion._averaged import Averaged
from weldnet.fusion._batch_norm import BatchNormReset, has_statistics
from weldnet.fusion._familiar import strangeness
from weldnet.fusion._fusion import Fusion
from weldnet.fusion._judging import Judge, few_inputs, make_judge, mixed_types, notes, scored, twins
from weldnet.fusion._protocol import NoRepair
from weldnet.fusion._repair import Repair, make_repair
from weldnet.fusion._report import Report, Row
from weldnet.fusion._samples import refuse_labels
from weldnet.fusion._size import average_at, size_notes
from weldnet.fusion._steps import Clock, align_parents, naive_average, prepare
from weldnet.fusion._variances import with_variances

__all__ = ["fuse"]


def fuse(
    networks: Sequence[nn.Module] | Mapping[str, nn.Module],
    example_input: Any,
    *,
    outputs: str | Sequence[str] | None = None,
    route: str = "auto",
    method: str | AlignmentMethod = "gamf",
    weights: Sequence[float] | Mapping[str, float] | None = None,
    repair: str | Repair = "auto",
    data: Inputs | None = None,
    evaluate_on: Labelled | tuple[Tensor, Tensor] | Judge | None = None,
    size: float = 1.0,
    into: str | None = None,
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
        route: how the operations are found, as for :func:`weldnet.capture`.
        method: ``"gamf"``, ``"weight_matching"``, ``"identity"``, or a method object such as ``Gamf(sigma=4.0)``;
            ``"auto"`` is what :data:`weldnet.alignment.AUTO` says, and the report names it.
        weights: shares of the networks in the average, summing to 1; a sequence or by name; equal if None.
        repair: ``"auto"`` (the best of the others, judged on held-back inputs, if ``data`` is given), ``"none"``,
            ``"data"`` (activation statistics), ``"refit"`` (least squares), or a repair object such as ``Refit()``.
        data: optional unlabelled inputs for the repair: a tensor, a Dataset, a DataLoader or an iterable of batches;
            labels in it are ignored.
        evaluate_on: what fills the report's scores, and nothing else: (inputs, labels), a labelled Dataset or
            DataLoader, or a function of a network that returns a number or several by name.
        size: of the fused network in parents, from 1.0 (everything averaged) to their number (every parent kept
            whole, which answers as the mean of their outputs). In between, the units that match worst are kept side by
            side; numbers that are 0 just because they lie between such units do not count.
        into: the network, by name, whose class, widths and order the fused one has; the first if None. Networks of
            one architecture and other widths need a method for that: ``"optimal_transport"``.
        check: prove the structure on every parent before anything is averaged.
        seed: of everything random.
        device: where to compute: alignment, average, repair, and scores on labelled data; where the network ``into``
            lies if None. The structure is captured and proven on the CPU. The result lies where ``into`` does.
        progress: show the steps on stderr, if that is a terminal.
        options: of the method, if it is given by name.

    Returns:
        The fused network with alignment, structure and report.

    Raises:
        UsageError: arguments that make no sense together, or a device that is not here.
        CheckpointError: different architectures, or NaN or Inf in the weights.
        ModelError: the networks fail on the example input, or cannot be traced.
        StructureError: renumbering would change a parent's function; nothing was averaged.
        WidthError: unequal widths, and a method that needs equal ones; or groups and heads of unequal widths.
        DataError: data that does not fit.

    Example:
        >>> import torch, weldnet
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> result = weldnet.fuse([make(), make()], example_input=torch.zeros(1, 4))
        >>> [row.role for row in result.report.rows]
        ['parent', 'parent', 'naive', 'fused']
    """
    _check_arguments(networks, example_input, data, seed)
    chosen, reason = resolve(method, has_data=data is not None, states=named_states(networks).values(), **options)
    size = check_size(size, max(1, len(networks)))
    judge = make_judge(evaluate_on)
    target = find_device(device)
    _check_means(chosen, networks, into, target, has_data=data is not None)
    data = None if data is None else held(data)
    if data is not None and chosen.needs_data:  # a repair looks for itself
        refuse_labels(example_input, next(unlabelled_batches(data, samples=1)))
    clock = Clock(progress)

    prepared = prepare(
        networks,
        example_input,
        clock,
        outputs=outputs,
        route=route,
        weights=weights,
        into=into,
        check=check,
        seed=seed,
    )
    given, prepared = prepared.parents, prepared.on(target)
    aligned = align_parents(prepared, chosen, clock, data=data)
    with clock.step("average"):
        averaged, sized = average_at(size, prepared, aligned)
    with clock.step("repair"):
        mend = make_repair(repair, averaged.model)
        repaired = with_variances(averaged, mend(averaged, data), data)
    parents, structure, alignment = prepared.parents, prepared.structure, averaged.alignment
    diagnosis = Diagnosis(())
    if aligned.states:
        diagnosis = diagnose_states(aligned.alignment, parents.states, structure, aligned.states)
    with clock.step("evaluate"):
        naive = naive_average(prepared, averaged)
        if judge is not None:
            naive = replace(naive, model=_with_statistics(naive, mend, data))
        rows = scored(
            [Row(n, "parent", {}, w, alignment.moved[n], aligned.errors.get(n)) for n, w in parents.shares.items()],
            parents.modules,
            naive.model,
            repaired.model,
            judge,
            home(given.first),
        )
    if prepared.structures:
        rows = [replace(row, name="naive truncation") if row.role == "naive" else row for row in rows]
    fingerprints = given.fingerprints()
    used = None if chosen.needs_data else data
    parameters = sum(p.numel() for p in repaired.model.parameters())
    report = Report(
        rows=tuple(rows),
        method=f"{describe(chosen)} ({reason})" if reason else describe(chosen),
        repair=repaired.summary,
        objective=alignment.stats.get("objective"),
        check=prepared.proof,
        spaces=len(structure.spaces),
        free_share=structure.free_share,
        parameters=parameters,
        size=sized,
        seconds=clock.seconds,
        repair_numbers=repaired.numbers,
        diagnosis=diagnosis,
        notes=(
            *size_notes(sized, parameters),
            *notes(rows, structure, alignment, repaired.model is averaged.model, repaired.model, used),
            *strangeness(averaged, data),
            *few_inputs(data, used=chosen.needs_data or not isinstance(mend, NoRepair)),
            *mixed_types(given.states, repaired.model.state_dict()),
            *twins(fingerprints),
        ),
    )
    config = {
        "method": repr(chosen),
        "outputs": list(structure.outputs),
        "route": route,
        "weights": dict(parents.shares),
        "into": parents.into,
        "repair": repaired.summary,
        "size": size,
        "check": check,
        "seed": seed,
    }
    model = bring(repaired.model, home(given.first))
    return Fusion(model, alignment, averaged.structure, report, config, fingerprints)


def _with_statistics(naive: Averaged, mend: Repair, data: Inputs | None) -> nn.Module:
    """Return the naive average, its BatchNorm statistics re-estimated: without them it is hardly a network.

    No more than that: what a repair makes of it is another method's result, and takes as long as the fusion's own.
    """
    if data is None or isinstance(mend, NoRepair) or not has_statistics(naive.model):
        return naive.model
    return BatchNormReset()(naive, data).model


def _check_arguments(networks: Any, example_input: Any, data: Any, seed: Any) -> None:
    """Refuse at once what would fail late and obscurely."""
    if isinstance(networks, nn.Module | str) or not isinstance(networks, Sequence | Mapping):
        raise UsageError(
            f"networks is a {type(networks).__name__}; give a list of nn.Modules, or a dict of them by name"
        )
    for network in networks.values() if isinstance(networks, Mapping) else networks:
        if not isinstance(network, nn.Module):
            raise UsageError(no_module(network))
    if isinstance(example_input, tuple | list) and all(isinstance(n, int) for n in example_input):
        raise UsageError(
            f"example_input is {example_input!r}; give a tensor, such as torch.zeros{tuple(example_input)!r}"
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UsageError(f"seed is {seed!r}; give an integer of 0 or more")
    if data is not None and not isinstance(data, Iterable | Dataset):
        raise UsageError(f"data is a {type(data).__name__}; give a tensor of inputs, a Dataset, or a DataLoader")


def _check_means(
    method: AlignmentMethod,
    networks: Sequence[nn.Module] | Mapping[str, nn.Module],
    into: str | None,
    device: torch.device | None,
    *,
    has_data: bool,
) -> None:
    """Refuse a method that has not got what it needs, before the networks are proven."""
    if method.needs_data and not has_data:
        raise UsageError(f"{describe(method)} looks at activations and has not got unlabelled inputs; give data=")
    states = named_states(networks)
    state = states.get(into or "") or next(iter(states.values()), {})
    require_device(method, device or state_home(state))
