"""The laws' table: every method and every repair against every law that it claims, network by network.

The laws and the networks are those of ``tests/test_laws.py`` and ``tests/test_repairs.py``, which hold them too, and
show that each law catches a wrong method. Writes one JSON line for each law and method.

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


def cases() -> Iterator[dict[str, Any]]:
    """Yield a record for each law and method, then for each law and repair."""
    for law, holds in laws.TABLE.items():
        for method in laws.ALL:
            reason = laws.exempt(law, method)
            record = {"kind": "method", "law": law, "name": describe(method)}
            found = {"exempt": reason} if reason else _judge(holds, method, laws.NETWORKS)
            yield {**record, **found}
    for law, holds in repairs.TABLE.items():
        for repair in repairs.ALL:
            reason = repairs.exempt(law, repair)
            record = {"kind": "repair", "law": law, "name": repr(repair)}
            found = {"exempt": reason} if reason else _judge(holds, repair, repairs.networks_for(repair))
            yield {**record, **found}


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
        f"was tried. Commit {records[0]['commit']}; records: `laws.jsonl`.",
    ]
    method_networks = [str(n) for n in laws.NETWORKS]
    for kind, networks, table in (("method", method_networks, laws.TABLE), ("repair", repairs.NAMES, repairs.TABLE)):
        own = [r for r in records if r["kind"] == kind]
        columns = list(dict.fromkeys(r["law"] for r in own))
        names = list(dict.fromkeys(r["name"] for r in own))
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
        page([json.loads(line) for line in args.out.read_text().splitlines()], args.table)
        return
    origin = provenance()
    records = list(cases())
    args.out.write_text("".join(json.dumps({**r, **origin}) + "\n" for r in records))
    broken = [f"{r['law']} by {r['name']}" for r in records if r.get("broken")]
    if broken:
        raise SystemExit(f"broken: {', '.join(broken)}")


if __name__ == "__main__":
    main()
