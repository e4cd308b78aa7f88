"""Random networks (``tests/random_networks.py``) captured and judged: soundness, power, completeness.

A block of 25 networks is one seed of hypothesis and one line of the records; blocks that are there are not run again.
The page counts what was seen, and lists every counter-example as a spec that can be pasted into a test.

    python studies/structure_fuzz.py --networks 10000 --out docs/results/structure-fuzz.jsonl \
        --page docs/results/structure-fuzz.md
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from records import one_line, provenance

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from fuzz_properties import UNSEEN, Verdict, judge
from random_networks import Spec, specs

BLOCK = 25
FIRST_SEED = 1000  # the test suite has the seeds below
MOST = 50_000  # reorderings to try for completeness


def run_block(number: int) -> dict[str, Any]:
    """Judge the networks of one seed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts, faults = Counter[str](), list[dict[str, str]]()
    start = time.process_time()

    @seed(number)
    @settings(
        max_examples=BLOCK,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(specs(tiny=True), specs(tiny=False)))
    def run(spec: Spec) -> None:
        counts["networks"] += 1
        try:
            verdict = judge(spec, most=MOST, seed=number)
        except Exception as error:
            faults.append({"property": "crash", "spec": repr(spec), "words": one_line(f"{error!r}")})
            return
        counts.update(seen(verdict))
        if verdict is not None:
            faults.extend({"property": k, "spec": repr(spec), "words": w} for k, w in verdict.faults.items())

    run()
    return {"block": number, "counts": dict(counts), "faults": faults, "seconds": time.process_time() - start}


def seen(verdict: Verdict | None) -> Counter[str]:
    """Count what one verdict is about."""
    if verdict is None:
        return Counter({"without an answer": 1})
    structure, found = verdict.structure, Counter[str]()
    found["spaces"] = len(structure.spaces)
    found["nested"] = sum(space.parent is not None for space in structure.spaces)
    found["places"] = len(structure.places)
    found["free"] = bool(structure.spaces)
    found["hidden"] = len(verdict.hidden)
    if verdict.completeness is not None:
        found["tried"] = 1
        found["tried, with freedom"] = verdict.completeness.found > 1
        found["reorderings"] = verdict.completeness.tried
    return found


def page(records: list[dict[str, Any]]) -> str:
    """Write what was seen as Markdown."""
    total = Counter[str]()
    for record in records:
        total.update(record["counts"])
    faults = [fault for record in records for fault in record["faults"]]
    kinds = Counter(fault["property"] for fault in faults)
    answered = max(total["networks"] - total["without an answer"], 1)
    seeds = f"{min(r['block'] for r in records)} to {max(r['block'] for r in records)}"
    origins = [record["provenance"] for record in records]
    origin = {key: " and ".join(dict.fromkeys(o[key] for o in origins)) for key in origins[-1]}
    share = f"{total['free']} ({total['free'] / answered:.1%})"
    rows = {
        "networks": total["networks"],
        "of which without an answer (NaN, Inf or all zero)": total["without an answer"],
        "spaces found (nested)": f"{total['spaces']} ({total['nested']})",
        "places": total["places"],
        "networks with at least one free space": share,
        "soundness counter-examples": kinds["soundness"],
        "power counter-examples, of all places": kinds["power"],
        "places that only the algebra of the operations hides": total["hidden"],
        "networks small enough to try all reorderings": total["tried"],
        "of which with freedom": total["tried, with freedom"],
        "reorderings tried": total["reorderings"],
        "completeness counter-examples": kinds["completeness"],
        "crashes": kinds["crash"],
        "CPU seconds": round(sum(r["seconds"] for r in records)),
    }
    left_out = ", ".join(sorted(UNSEEN))
    lines = [
        "# Random networks",
        "",
        "Measured; written by `python studies/structure_fuzz.py` (`make study`). Each network is random in its layers,",
        "wiring, sharing and storage of weights (`tests/random_networks.py`), with random weights in float64.",
        "",
        "- *Soundness*: random renumberings of all spaces together and of each alone keep the output to 1e-9.",
        "- *Power*: forgetting any one place changes the output.",
        f"- *Completeness*: where there are at most {MOST} reorderings of all axes, all are tried. As many",
        "  keep the function as were captured, not counting those that move an axis that is frozen with a reason",
        f"  (no rule, the order matters, units tied to two spaces). Left out: the steps {left_out}, which have more",
        "  freedom than weldnet sees.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        f"Seeds {seeds}, {BLOCK} networks each; " + ", ".join(f"{k} {v}" for k, v in origin.items()) + ".",
        "",
    ]
    for fault in faults:
        lines += [f"- {fault['property']}: {one_line(fault['words'], 300)}", f"  `{fault['spec']}`"]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    blocks = range(FIRST_SEED, FIRST_SEED + -(-args.networks // BLOCK))
    missing = sorted(set(blocks) - {record["block"] for record in known})
    origin = provenance()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool, args.out.open("a") as out:
        for record in pool.imap_unordered(run_block, missing):
            known.append({**record, "provenance": origin})
            out.write(json.dumps(known[-1]) + "\n")
            out.flush()
    args.page.write_text(page(sorted(known, key=lambda record: record["block"])))


if __name__ == "__main__":
    main()
