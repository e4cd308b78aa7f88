"""CPU seconds and peak memory of every method on full-size pairs; one process a case, so that peaks do not mix.

Networks are untrained (random weights of a fixed seed); methods that look at activations see 256 random inputs. Peaks
are the whole process's resident memory, with PyTorch, both networks and their structure. Appends one JSON line for each
case and skips what is there.

    python benchmarks/full_size.py --out docs/results/full-size.jsonl                      # VGG11, every method
    python benchmarks/full_size.py --out docs/results/full-size.jsonl --network resnet50 --methods gamf
    python benchmarks/full_size.py --out docs/results/full-size.jsonl --table docs/results/full-size.md
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import weldnet
from weldnet import models
from weldnet.alignment import METHODS as KNOWN
from weldnet.alignment import AlignmentMethod, Gamf, OptimalTransport, StraightThrough, make_method

sys.path.append(str(Path(__file__).resolve().parents[1] / "studies"))

from records import provenance

OPTIONS: dict[str, dict[str, Any]] = {"vgg11": {"bias": False}}
METHODS: dict[str, AlignmentMethod] = {
    **{name: make_method(name) for name in KNOWN},
    "straight_through": StraightThrough(epochs=1),
    "gamf sigma=4": Gamf(sigma=4.0),
    "gamf activations=0.3": Gamf(activations=0.3),
    "optimal_transport entropic": OptimalTransport(plan="entropic"),
    "optimal_transport on activations": OptimalTransport(on="activations"),
}
INPUTS = 256


def measure(network: str, label: str) -> dict[str, Any]:
    """Align one pair in this process."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    pair = [models.build(network, **OPTIONS.get(network, {})).eval() for _ in range(2)]
    data = torch.randn(INPUTS, 3, 32, 32)
    structure = weldnet.capture(pair[0], data[:1])
    before = _peak()
    start, cpu = time.perf_counter(), time.process_time()
    alignment = weldnet.align(pair, structure, method=METHODS[label], data=data)
    return {
        "network": network,
        "parameters": sum(p.numel() for p in pair[0].parameters()),
        "method": label,
        "setting": repr(METHODS[label]),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_gb": round(_peak(), 3),
        "before_gb": round(before, 3),
        "threads": torch.get_num_threads(),
        "stats": dict(alignment.stats),
    }


def _peak() -> float:
    """The most resident memory that this process ever had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run(out: Path, network: str, methods: list[str]) -> None:
    """Measure what is not in the records yet, each case in a process of its own."""
    lines = out.read_text().splitlines() if out.exists() else []
    done = {(r["network"], r["method"]) for r in map(json.loads, lines)}
    origin = provenance()
    for label in methods:
        if (network, label) in done:
            continue
        command = [sys.executable, __file__, "--case", network, label]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        with out.open("a") as file:
            file.write(json.dumps({**found, **origin}) + "\n")


def table(out: Path, target: Path) -> None:
    """Write the records as Markdown; seconds as ratios to gamf's, too."""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    commits = ", ".join(sorted({r["commit"] for r in records}))
    lines = [
        "# Time and memory of every method at full size",
        "",
        "Measured by us: `python benchmarks/full_size.py` (its docstring says how): untrained pairs, a process a case,",
        f"{records[0]['threads']} thread, {records[0]['machine']}, PyTorch {records[0]['torch']}, commits {commits}.",
        "Seconds are processor time of aligning, which a busy machine lengthens, but less than the clock's: read the",
        "ratios. Peak: resident memory of the whole process; growth: over what it was before aligning, with PyTorch,",
        f"both networks and their structure. `straight_through` makes one pass over {INPUTS} inputs here, ten by",
        f"default. Records: `{out.name}`.",
        '`weight_matching` here is that of before its first pass (`begin="identity"`).',
    ]
    for network in dict.fromkeys(r["network"] for r in records):
        rows = [r for r in records if r["network"] == network]
        base = next((r["cpu_seconds"] for r in rows if r["method"] == "gamf"), None)
        lines += [
            "",
            f"## {network}, {rows[0]['parameters'] / 1e6:.1f} M parameters",
            "",
            "| method | CPU seconds | of gamf's | peak GB | growth GB |",
            "|---|---|---|---|---|",
        ]
        for r in sorted(rows, key=lambda r: r["cpu_seconds"]):
            ratio = f"{r['cpu_seconds'] / base:.2f}" if base else ""
            growth = f"{r['peak_gb'] - r['before_gb']:.2f}"
            lines.append(f"| {r['method']} | {r['cpu_seconds']:.1f} | {ratio} | {r['peak_gb']:.2f} | {growth} |")
    target.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run cases, or write their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("full-size.jsonl"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--network", default="vgg11")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--case", nargs=2, metavar=("NETWORK", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*args.case), default=str))
    elif args.table:
        table(args.out, args.table)
    else:
        run(args.out, args.network, args.methods)


if __name__ == "__main__":
    main()
