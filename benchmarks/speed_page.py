"""Writes ``docs/results/speed.md`` from the records of ``profile_steps.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from weldnet.records import Record, Records

HEAD = """# Speed and memory

Measured by us: `python benchmarks/profile_steps.py` (its docstring says how), random weights, one thread. CPU
seconds, medians, on a machine with other work beside it; so read ratios rather than seconds. The floor is what the
step's matrix products and bytes take at the rates that the same process measured, in float32. That of `gamf` counts all
affinities of every sweep: what is not computed again saves part of it. "Before" is commit bb5bb40. A dash
was not measured. Peak memory is the growth of the process over the models, in MB. Records: `speed.jsonl`.

| network | step | before, s | floor, s | ratio | after, s | floor, s | ratio | memory before | after |
|---|---|---|---|---|---|---|---|---|---|
"""


TAIL = """
## Kernels, at an earlier commit (c827c40)

`OMP_NUM_THREADS=1 make bench` (medians of 3 rounds in one run): Gaussian affinity at sigma = 4 times the variance

| 512 units x | inner product | expansion (9 terms, relative error 2e-5) | exact, blocked in place | exact, as written |
|---|---|---|---|---|
| 512 features | 3.2 ms | 27.7 ms | 207.6 ms (7.5 times the expansion) | 195.1 ms (7.1 times) |
| 4608 features | 24.1 ms | 283.1 ms | 1825 ms (6.4 times) | 2014 ms (7.1 times) |

The exact kernel runs at 1.5 ns an entry here, because PyTorch's vectorised `exp` is fast on this processor, and the
expansion is bound by its matrix products. A single broadcast over all pairs (2 GB of temporaries) took 85 times as long
as the expansion in one earlier run.

Alignment of N trained networks, CPU seconds (median of 3, one thread): MNIST MLP 0.34 / 2.22 / 3.31 for N = 2 / 4 / 8
(9.6 times from 2 to 8), quarter-width VGG11 1.05 / 2.12 / 3.41 (3.3 times). A pair needs no running sums over networks
and converges in few sweeps, which is why the step from 2 to 4 is the steepest.
"""

GROWTH = """
A pair of VGG11 at widths 1/4, 1/2, 1: gamf takes time as width to the power {time:.2f} (fitted), the matrix products of
its sweeps as width to the power {floor:.2f} (by their floors: counted it is 3, the rest is the rate). Quarter-width
VGG11: time(N=16) / time(N=4) is {ratio:.2f}, with {few:.0f} hard sweeps at N = 4 and {many:.0f} at N = 16. With as many
sweeps for every N: `docs/performance.md`.

"""

WIDTHS = {"vgg11 x 1/4": 1.0, "vgg11 x 1/2": 2.0, "vgg11": 4.0}


def write(page: Path, records: Records) -> None:
    """Write the page."""
    found = {(r.cell["stage"], r.cell["architecture"], r.cell["step"]): r for r in records.of("result")}
    keys = dict.fromkeys((name, step) for _, name, step in found)
    rows = "".join(_row(found, name, step) for name, step in keys)
    page.write_text(HEAD + rows + _growth(found) + TAIL, encoding="utf-8")


def _growth(found: dict[tuple[object, object, object], Record]) -> str:
    """Say how time grows with width and with the number of networks, where that was measured."""
    keys = [
        *(("after", name, "gamf") for name in WIDTHS),
        *(("after", "vgg11 x 1/4", f"gamf, N = {n}") for n in (4, 16)),
    ]
    if any(key not in found for key in keys):
        return ""
    *pairs, four, sixteen = (found[key].values for key in keys)
    return GROWTH.format(
        time=_exponent(list(WIDTHS.values()), [row["seconds"] or 0 for row in pairs]),
        floor=_exponent(list(WIDTHS.values()), [row["floor"] or 0 for row in pairs]),
        ratio=(sixteen["seconds"] or 0) / (four["seconds"] or 1),
        few=four["sweeps"],
        many=sixteen["sweeps"],
    )


def _exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    x, y = ([math.log(v) for v in values] for values in (sizes, seconds))
    mean = sum(x) / len(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def _row(found: dict[tuple[object, object, object], Record], name: object, step: object) -> str:
    before, after = found.get(("before", name, step)), found.get(("after", name, step))
    cells = [name, step, *(part(record) for record in (before, after) for part in (_seconds, _floor, _ratio))]
    cells += [_memory(before), _memory(after)]
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _seconds(record: Record | None) -> str:
    return "-" if record is None else f"{record.values['seconds']:.3g}"


def _floor(record: Record | None) -> str:
    floor = None if record is None else record.values.get("floor")
    return f"{floor:.2g}" if floor else "-"


def _ratio(record: Record | None) -> str:
    floor = None if record is None else record.values.get("floor")
    return f"{(record.values['seconds'] or 0) / floor:.2f}" if record is not None and floor else "-"


def _memory(record: Record | None) -> str:
    models = None if record is None else record.values.get("models_mb")
    return f"{(record.values['peak_mb'] or 0) - models:.0f}" if record is not None and models else "-"
