"""Do both routes to a model's operations, the recorded pass and torch.export, give the same renumberings?

Every architecture of ``zoo.py`` and every small network of ``tests/networks.py``, each in a process of its own. What
export finds is also checked by random renumberings wherever the two differ. The 7 billion weights of a LLaMA are never
allocated.

    make study-routes
    python studies/structure_routes.py --out docs/results/structure-routes.jsonl --page docs/results/structure-routes.md
    python studies/structure_routes.py ... --only resnet18 gpt2      # runs these and replaces their records
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import one_line, provenance, run_alone
from torch import nn
from zoo import ZOO, declare_torchvision

import weldnet
from weldnet.structure import Structure, same_group

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from networks import NETWORKS

LIMIT = 900.0  # seconds for one network
META = "llama 7B (meta device)"
ROUTES = ("dispatch", "export")
SMALL = "small"
Made = tuple[nn.Module, Any]


def _llama() -> Made:
    declare_torchvision()
    import transformers

    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig()), torch.arange(6).reshape(1, 6)


CASES: dict[str, tuple[str, Callable[[], Made]]] = {
    **{name: (entry.family, lambda entry=entry: (entry.build(), entry.example())) for name, entry in ZOO.items()},
    META: ("transformers", _llama),
    **{f"{SMALL}: {name}": (SMALL, lambda n=n: (n.model(), n.example())) for name, n in NETWORKS.items()},
}


# -- one network, in its own process ----------------------------------------------------------------


def measure(name: str) -> dict[str, Any]:
    """Capture a network by both routes and compare."""
    torch.manual_seed(0)
    model, example = CASES[name][1]()
    model = model.eval()
    record: dict[str, Any] = {}
    found: dict[str, Structure] = {}
    for route in ROUTES:
        start = time.process_time()
        try:
            found[route] = weldnet.capture(model, example, route=route)
            record[route] = {"log10": found[route].log10_renumberings, "unknown": dict(found[route].unknown)}
        except weldnet.WeldnetError as error:
            record[route] = {"error": one_line(error, 300)}
        record[route] |= {"seconds": round(time.process_time() - start, 2), "memory": _memory()}
    if len(found) == len(ROUTES):
        record["same"] = same_group(*found.values())
        if not record["same"] and name != META:
            record["change"] = weldnet.check(model, example, found["export"]).error
    return record


def _memory() -> float:
    """Most memory that the process has held so far, in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


# -- all of them, and the page ----------------------------------------------------------------------


def run(out: Path, only: list[str]) -> None:
    """Measure, replacing earlier records of the same networks."""
    kept = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    kept = [record for record in kept if record["model"] not in only]
    source = provenance("torchvision", "timm", "transformers")
    for name in only:
        kept.append({"model": name, "family": CASES[name][0], **run_alone(partial(measure, name), LIMIT), **source})
        kept.sort(key=lambda record: list(CASES).index(record["model"]))
        out.write_text("".join(json.dumps(record) + "\n" for record in kept))
        print(name, kept and [r.get("same", r.get("error")) for r in kept if r["model"] == name], flush=True)


HEAD = """# Two routes to a model's operations

Measured by us: `make study-routes` (`studies/structure_routes.py` says how), seed 0, commit `{commit}`, PyTorch
{torch}, torchvision {torchvision}, timm {timm}, transformers {transformers}; {machine}, one thread, shared with other
jobs, so seconds are CPU seconds; they are of the whole capture. Records: `structure-routes.jsonl`.

`dispatch` records one forward pass; `export` takes the graph of `torch.export` (not strict, math attention kernel, core
ATen decompositions but for what a rule knows as a whole). **same**: `weldnet.structure.same_group`: the same places and
the same renumberings, whatever the names. **log10**: of the number of renumberings.

"""


def write_page(out: Path, page: Path) -> None:
    """Write the records as Markdown."""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    commits = ", ".join(sorted({r["commit"] for r in records}))
    large, small = ([r for r in records if (r["family"] == SMALL) == is_small] for is_small in (False, True))
    lines = [HEAD.format(**{**records[0], "commit": commits})]
    lines += [f"- {what}: {_tally(some)}" for what, some in (("Architectures", large), ("Small networks", small))]
    head = ["", "| network | log10 dispatch | log10 export | same | s dispatch | s export |", "|---" * 6 + "|"]
    lines += ["\n## Architectures", *head, *map(_row, large)]
    lines += ["\n## Small networks\n", "Only those that are not the same, or that a route does not capture:"]
    lines += [*head, *(_row(r) for r in small if r.get("same") is not True)]
    lines += ["\n## What a route says or does not know\n", *(note for r in records for note in _notes(r))]
    page.write_text("\n".join(lines) + "\n")


def _tally(records: list[dict[str, Any]]) -> str:
    both = [r for r in records if "same" in r]
    median = {k: sorted(r[k]["seconds"] for r in both)[len(both) // 2] for k in ROUTES} if both else {}
    times = ", ".join(f"{route} {seconds:.2f} s" for route, seconds in median.items())
    captured = ", ".join(f"{k} {sum('log10' in r.get(k, {}) for r in records)}" for k in ROUTES)
    return (
        f"{len(records)}; captured by {captured}; the same renumberings in {sum(r['same'] for r in both)} of the "
        f"{len(both)} that both capture; median {times}"
    )


def _row(record: dict[str, Any]) -> str:
    log10, seconds = [], []
    for route in ROUTES:
        one = record.get(route, {})
        log10.append(f"{one['log10']:.1f}" if "log10" in one else "fails")
        seconds.append(f"{one['seconds']:.2f}" if one else "")
    same = {True: "yes", False: "**no**", None: ""}[record.get("same")]
    return f"| {record['model']} | {' | '.join(log10)} | {same} | {' | '.join(seconds)} |"


def _notes(record: dict[str, Any]) -> list[str]:
    notes = [f"- {record['model']}: {record['error']}"] if "error" in record else []
    for route in ROUTES:
        one = record.get(route, {})
        unknown = ", ".join(f"{op} ({count}x)" for op, count in one.get("unknown", {}).items())
        said = one.get("error") or (f"no rule for {unknown}" if unknown and not record.get("same") else "")
        notes += [f"- {record['model']}, {route}: {said}"] if said else []
    if "change" in record:
        notes.append(f"- {record['model']}: renumbering what export finds changes the output by {record['change']:.0e}")
    if record["model"] == META:
        memory = ", ".join(f"{route} {record[route]['memory']} GB" for route in ROUTES if route in record)
        notes.append(f"- {META}: most memory held by the process so far: {memory} (about 0.4 GB of it are libraries)")
    return notes


def main() -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    declare_torchvision()
    for route in ROUTES:  # the first time pays for torch's own start
        weldnet.capture(NETWORKS["linear"].model(), NETWORKS["linear"].example(), route=route)
    run(args.out, args.only)
    write_page(args.out, args.page)


if __name__ == "__main__":
    main()
