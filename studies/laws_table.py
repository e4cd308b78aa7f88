"""The laws' table: every method and every repair against every law that it claims, network by network.

The laws and the networks are those of ``tests/test_laws.py`` and ``tests/test_repairs.py``, which hold them too, and
show that each law catches a wrong method. Appends one JSON line for each law and method, and skips
what is there.

    python studies/laws_table.py --out docs/results/laws.jsonl
    python studies/laws_table.py --out docs/results/laws.jsonl --table docs/results/laws.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import one_line, provenance

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import test_laws as laws
import test_repairs as repairs
from weldnet.alignment import describe


def run(out: Path) -> list[str]:
    """Judge what is not in the records yet; return what is broken, old and new."""
    records = _read(out)
    done = {(r["kind"], r["law"], r["name"]) for r in records}
    origin = provenance()
    for record, judge in _cases():
        if (record["kind"], record["law"], record["name"]) in done:
            continue
        records.append({**record, **judge(), **origin})
        with out.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
    return [f"{r['law']} by {r['name']}" for r in records if r.get("broken")]


def _cases() -> Iterator[tuple[dict[str, str], Callable[[], dict[str, Any]]]]:
    """Yield what a law is asked of, and what judges it: methods first, then repairs."""
    for law, holds in laws.TABLE.items():
        for method in laws.ALL:
            reason = laws.exempt(law, method)
            found = partial(dict, exempt=reason) if reason else partial(_judge, holds, method, laws.NETWORKS)
            yield {"kind": "method", "law": law, "name": describe(method)}, found
    for law, holds in repairs.TABLE.items():
        for repair in repairs.ALL:
            reason, names = repairs.exempt(law, repair), repairs.networks_for(repair)
            found = partial(dict, exempt=reason) if reason else partial(_judge, holds, repair, names)
            yield {"kind": "repair", "law": law, "name": repr(repair)}, found


def _read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def _judge(holds: Callable[[Any, Any], None], subject: Any, networks: Sequence[Any]) -> dict[str, Any]:
    """Say on which networks a law holds, and what it says on the others."""
    kept, broken = [], {}
    for network in networks:
        try:
            holds(subject, network)
            kept.append(str(network))
        except Exception as error:  # a law is broken by whatever goes wrong
            broken[str(network)] = one_line(f"{type(error).__name__}: {error}")
    return {"holds": kept, "broken": broken}


def page(records: list[dict[str, Any]], target: Path) -> None:
    """Write the records as Markdown."""
    lines = [
        "# The laws' table",
        "",
        "Written by `python studies/laws_table.py`, which runs the laws of `tests/test_laws.py` and",
        "`tests/test_repairs.py`; these also hold every law against deliberately wrong methods and repairs, of which",
        "each law must catch at least one. A cell is the number of networks on which a law holds, of those on which it",
        f"was tried. Commits {', '.join(sorted({r['commit'] for r in records}))}; records: `laws.jsonl`.",
    ]
    method_networks = [str(n) for n in laws.NETWORKS]
    for kind, networks, table in (("method", method_networks, laws.TABLE), ("repair", repairs.NAMES, repairs.TABLE)):
        own = [r for r in records if r["kind"] == kind]
        columns = list(dict.fromkeys(r["law"] for r in own))
        there = {r["name"] for r in own}
        subjects = map(describe, laws.ALL) if kind == "method" else map(repr, repairs.ALL)
        names = [name for name in subjects if name in there]
        reasons = list(dict.fromkeys(r["exempt"] for r in own if r.get("exempt")))
        cells = {(r["name"], r["law"]): _cell(r, reasons) for r in own}
        lines += ["", f"## {kind.capitalize()}s", "", f"Networks: {', '.join(networks)}.", ""]
        lines += [f"| {kind} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        lines += [f"| {name} | " + " | ".join(cells[name, law] for law in columns) + " |" for name in names]
        lines += ["", *(f"- *{law}*: {_doc(table[law])}" for law in columns)]
        lines += [f"- ({i}) not claimed: {reason}" for i, reason in enumerate(reasons, start=1)]
    broken = [(r, n, says) for r in records for n, says in r.get("broken", {}).items()]
    lines += ["", "## Broken", "", *(f"- {r['law']}, {r['name']}, {n}: {says}" for r, n, says in broken)]
    lines += [] if broken else ["Nothing."]
    target.write_text("\n".join(lines) + "\n")


def _doc(holds: Callable[..., None]) -> str:
    law = holds.func if isinstance(holds, partial) else holds
    return (law.__doc__ or "").strip().partition("\n")[0]


def _cell(record: dict[str, Any], reasons: list[str]) -> str:
    if record.get("exempt"):
        return f"({reasons.index(record['exempt']) + 1})"
    return f"{len(record['holds'])}/{len(record['holds']) + len(record['broken'])}"


def main() -> None:
    """Run every law and end with 1 if one is broken, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.table:
        page(_read(args.out), args.table)
        return
    broken = run(args.out)
    if broken:
        raise SystemExit(f"broken: {', '.join(broken)}")


if __name__ == "__main__":
    main()
