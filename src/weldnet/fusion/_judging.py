"""Judge: scores of parents, ensemble, naive and fused, and what a reader should know about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from weldnet._modules import placed
from weldnet._words import counted
from weldnet.activations import Inputs, unlabelled_batches
from weldnet.alignment import Alignment
from weldnet.errors import UsageError
from weldnet.evaluation import Labelled, evaluate_together
from weldnet.fusion._batch_norm import has_statistics
from weldnet.fusion._report import Row
from weldnet.structure import Structure

__all__ = ["Judge", "few_inputs", "make_judge", "mixed_types", "notes", "scored", "twins"]

#: Fewer unlabelled inputs than this say little about a network.
_FEW = 64

#: Turns a network into numbers: one, or several by name.
Judge = Callable[[nn.Module], float | Mapping[str, float]]


def make_judge(evaluate_on: Any) -> Labelled | Judge | None:
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


def scored(
    rows: Sequence[Row],
    modules: Mapping[str, nn.Module],
    naive: nn.Module,
    fused: nn.Module,
    judge: Labelled | Judge | None,
    device: torch.device,
) -> list[Row]:
    """Fill in what the judge says about the parents, their ensemble, the naive and the fused network.

    A judge that is a function gets networks on ``device``, where the user gave them.
    """
    whole = [*rows, Row("naive average", "naive"), Row("fused", "fused")]
    networks = [*(modules[row.name] for row in rows), naive, fused]
    if judge is not None and not callable(judge):
        return _on_data(whole, networks, len(rows), judge)
    if judge is None:
        return whole
    values = [judge(placed(network, device)) for network in networks]
    scores = [dict(value) if isinstance(value, Mapping) else {"score": float(value)} for value in values]
    return [replace(row, scores=found) for row, found in zip(whole, scores, strict=True)]


def _on_data(rows: Sequence[Row], networks: Sequence[nn.Module], parents: int, judge: Labelled) -> list[Row]:
    found = evaluate_together(networks, judge, members=parents)
    names = [row.name for row in rows[:parents]]
    filled = [
        replace(row, scores=metrics.scores, agreement={**dict(zip(names, shares, strict=True)), "ensemble": whole})
        for row, metrics, shares, whole in zip(rows, found.metrics, found.agreement, found.with_ensemble, strict=True)
    ]
    filled.insert(parents, Row("ensemble", "ensemble", found.ensemble.scores))
    return filled


def notes(
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
        yield "the alignment stopped before it settled; give the method more of its sweeps, iterations or epochs."
    soft = [name for name, count in alignment.soft.items() if count]
    if soft:
        yield (
            f"the couplings of {', '.join(soft)} are soft: they bring several units to one, which changes what a "
            "network computes. The check is of the structure; no equivalence is proven for them."
        )
    if any(row.name == "naive truncation" for row in rows):
        yield "the widths differ: the naive row cuts off the wider networks' last units and fills up with zeros."
    if not unrepaired and any(row.role == "naive" and row.scores for row in rows):
        reset = ", but for new BatchNorm statistics" if data is not None and has_statistics(fused) else ""
        yield f"the naive average has no repair{reset}; weldnet compare has one that is repaired too (identity)."
    if unrepaired and has_statistics(fused):
        yield (
            "the network has BatchNorm statistics, which averaging breaks: expect it to be far worse than its parents "
            "until a few hundred unlabelled inputs restore them (data= or --data)."
        )
    elif unrepaired and data is not None:
        yield "the fused network was left as averaged, although there is unlabelled data; see repair."
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


def few_inputs(data: Inputs | None, *, used: bool = True) -> Iterator[str]:
    """Warn of unlabelled inputs so few that what is measured on them is hardly more than chance."""
    count = sum(map(len, unlabelled_batches(data, samples=_FEW))) if data is not None and used else _FEW
    if count < _FEW:
        yield (
            f"there {'is' if count == 1 else 'are'} only {counted(count, 'unlabelled input')}, and what is measured on "
            "so few is hardly more than chance; give a few hundred."
        )


def mixed_types(states: Mapping[str, Mapping[str, Tensor]], fused: Mapping[str, Tensor]) -> Iterator[str]:
    """Say which floating type the fused network has, where the networks' differ.

    >>> half, single = {"w": torch.zeros(1).half()}, {"w": torch.zeros(1)}
    >>> list(mixed_types({"a": half, "b": single}, half))
    ["the networks' types differ (a: float16, b: float32); the fused network is float16, as is 'a'."]
    """
    types = {name: _types(state) for name, state in states.items()}
    if len(set(types.values())) > 1:
        found = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        kind = _types(fused)
        whose = next((f", as is {name!r}" for name, other in types.items() if other == kind), "")
        yield f"the networks' types differ ({found}); the fused network is {kind}{whose}."


def _types(state: Mapping[str, Tensor]) -> str:
    return "/".join(sorted({str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()}))


def twins(fingerprints: Mapping[str, str]) -> Iterator[str]:
    """Name networks that have the weights of one before them.

    >>> list(twins({"a": "5f", "b": "5f", "c": "a0"}))
    ["'b' has the very weights of 'a': one network counts twice in the average."]
    """
    first: dict[str, str] = {}
    for name, fingerprint in fingerprints.items():
        if first.setdefault(fingerprint, name) != name:
            yield f"{name!r} has the very weights of {first[fingerprint]!r}: one network counts twice in the average."


def _points(difference: float) -> str:
    return f"{100 * difference:.2f} percentage points"
