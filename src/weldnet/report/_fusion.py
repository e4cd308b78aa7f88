"""One fusion as records, so that its page is a page like any other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weldnet._words import counted
from weldnet.records import Record, where

if TYPE_CHECKING:
    from torch import nn

    from weldnet.evaluation import Labelled
    from weldnet.fusion import Fusion, Report
    from weldnet.streaming import Streamed

__all__ = ["fusion_records"]

_POINTS = 11
#: How long the curves may take that nobody asked for, in seconds.
_PATIENCE = 30.0


def fusion_records(
    fusion: Fusion | Streamed,
    *,
    parents: Mapping[str, nn.Module] | None = None,
    evaluate_on: Labelled | None = None,
    command: str = "",
    device: str | None = None,
) -> list[Record]:
    """Turn a fusion into records: its networks, who went where, and, where that is cheap, the barrier.

    Args:
        fusion: what :func:`weldnet.fuse` gave.
        parents: its networks by name, for the barrier.
        evaluate_on: labelled data, for the barrier. It is left out where it would take longer than half a minute, going
            by how long the scores of the report took, or where the parents have different widths.
        command: what made it, for who reads the page.
        device: where to compute the barrier.

    >>> import torch, weldnet
    >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> records = fusion_records(weldnet.fuse([make(), make()], torch.zeros(1, 4), progress=False))
    >>> [record.kind for record in records]
    ['run', 'result', 'result', 'result', 'result', 'couplings']
    """
    report = fusion.report
    here = where()
    seed = int(fusion.config.get("seed", 0))
    method = re.split(r"\W", report.method, maxsplit=1)[0]
    found = [Record(kind="run", extra=_run(fusion, command), where=here, seed=seed)]
    found += [_result(report, index, method, here, seed) for index in range(len(report.rows))]
    for name, couplings in list(fusion.alignment.couplings.items())[1:]:
        spaces = {space: _plain(coupling) for space, coupling in couplings.items()}
        cell = {"network": name, "method": method}
        found.append(Record(kind="couplings", cell=cell, extra={"spaces": spaces}, where=here, seed=seed))
    if parents is not None and evaluate_on is not None and _is_cheap(fusion, parents):
        found += _barriers(fusion, parents, evaluate_on, method, here, device)
    return found


def _run(fusion: Fusion | Streamed, command: str) -> dict[str, Any]:
    report = fusion.report
    agreement = (report.row("fused") or report.rows[-1]).agreement
    protocol: dict[str, Any] = {
        "method": report.method,
        "objective": None if report.objective is None else f"{report.objective:.4f}",
        "structure": f"{counted(report.spaces, 'space')}, {report.free_share:.1%} of the hidden positions free",
        "check": report.check,
        "repair": report.repair,
        "size": f"{report.parameters:,} parameters" + ("" if report.size is None else f"; {report.size}"),
        "seconds": ", ".join(f"{step} {value:.2f}" for step, value in report.seconds.items()),
        "agreement of the fused network's answers": ", ".join(f"{n} {share:.2%}" for n, share in agreement.items()),
        "seed": fusion.config.get("seed"),
        **{f"SHA-256 of {name}'s tensors": digest for name, digest in fusion.parents.items()},
    }
    title = f"Fusion of {' and '.join(fusion.parents)}"
    return {"title": title, "command": command, "notes": list(report.notes), **protocol}


def _result(report: Report, index: int, method: str, here: Mapping[str, Any], seed: int) -> Record:
    row = report.rows[index]
    fused = row.role == "fused"
    words = {"parent": "individual", "ensemble": "ensemble", "naive": "naive", "fused": method}
    numbers = {"weight": row.weight, "moved": row.moved, "equivalence": row.equivalence}
    values = {**row.scores, **{name: value for name, value in numbers.items() if value is not None}}
    if row.agreement.get("ensemble") is not None:
        values["agreement"] = row.agreement["ensemble"]
    extra: dict[str, Any] = {}
    if fused:
        ratios = report.repair_numbers.get("variance") or {}
        extra = {
            "done": report.repair,
            "spaces": report.diagnosis.to_dict(),
            "variances": {layer: [ratio["before"], ratio["after"]] for layer, ratio in ratios.items()},
        }
    cell = {"network": row.name, "method": words[row.role]}
    return Record(kind="result", cell=cell, values=values, extra=extra, where=here, seed=seed)


def _plain(coupling: Any) -> Any:
    """Return a permutation as its sources, anything soft as a matrix."""
    source = getattr(coupling, "source", None)
    return source.tolist() if source is not None else coupling.matrix().numpy()


# -- the barrier -----------------------------------------------------------------------------------


def _is_cheap(fusion: Fusion | Streamed, parents: Mapping[str, nn.Module]) -> bool:
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in parents.values()]
    if any(other != shapes[0] for other in shapes[1:]) or fusion.report.size is not None:
        return False
    scored = sum(bool(row.scores) for row in fusion.report.rows)
    each = fusion.report.seconds.get("evaluate", 0.0) / max(1, scored)
    return scored > 0 and 2 * _POINTS * each <= _PATIENCE


def _barriers(
    fusion: Fusion | Streamed,
    parents: Mapping[str, nn.Module],
    evaluate_on: Labelled,
    method: str,
    here: Mapping[str, Any],
    device: str | None,
) -> list[Record]:
    """Measure the line between the first two parents, as they are and aligned."""
    import copy

    from weldnet.alignment import transport
    from weldnet.checkpoints import load_into
    from weldnet.evaluation import barrier

    first, second = list(parents)[:2]
    carried = copy.deepcopy(parents[second])
    alignment = fusion.alignment.relative_to(first)
    load_into(carried, transport(carried.state_dict(), fusion.structure, alignment[second]), second)
    found: list[Record] = []
    for word, other in (("naive", parents[second]), (method, carried)):
        line = barrier(parents[first], other, evaluate=evaluate_on, points=_POINTS, device=device)
        y = {"loss": list(line.values)}
        y |= {name: list(values) for name, values in line.scores.items() if name != "calibration_error"}
        extra = {"about": "barrier", "x": list(line.points), "y": y, "x_label": f"from {first} to {second}"}
        found.append(
            Record(kind="curve", cell={"method": word}, values={"barrier": line.height}, extra=extra, where=here)
        )
    return found
