"""Writes ``docs/results/speed.md`` from the records of ``profile_steps.py``."""

from __future__ import annotations

from pathlib import Path

from weldnet.records import Record, Records

HEAD = """# Speed and memory

Measured by us: `python benchmarks/profile_steps.py` (its docstring says how), random weights, one thread. CPU
seconds, the median of the rounds, on a machine with much other work beside it; so read ratios rather than seconds. The
floor is what the step's matrix products and bytes take at the rates that the same process measured. That of `gamf`
counts all affinities of every sweep: what is not computed again saves part of it. "Before" is commit bb5bb40. A dash
was not measured. Peak memory is the growth of the process over the models, in MB. Records: `speed.jsonl`.

| network | step | before, s | floor, s | before / floor | after, s | after / floor | memory before | after |
|---|---|---|---|---|---|---|---|---|
"""


def write(page: Path, records: Records) -> None:
    """Write the page."""
    found = {(r.cell["stage"], r.cell["architecture"], r.cell["step"]): r for r in records.of("result")}
    keys = dict.fromkeys((name, step) for _, name, step in found)
    page.write_text(HEAD + "".join(_row(found, name, step) for name, step in keys), encoding="utf-8")


def _row(found: dict[tuple[object, object, object], Record], name: object, step: object) -> str:
    before, after = found.get(("before", name, step)), found.get(("after", name, step))
    floor = next((r.values["floor"] for r in (before, after) if r is not None and r.values.get("floor")), None)
    cells = [name, step, _seconds(before), f"{floor:.2g}" if floor else "-", _ratio(before)]
    cells += [_seconds(after), _ratio(after), _memory(before), _memory(after)]
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _seconds(record: Record | None) -> str:
    return "-" if record is None else f"{record.values['seconds']:.3g}"


def _ratio(record: Record | None) -> str:
    floor = None if record is None else record.values.get("floor")
    return f"{(record.values['seconds'] or 0) / floor:.2f}" if record is not None and floor else "-"


def _memory(record: Record | None) -> str:
    models = None if record is None else record.values.get("models_mb")
    return f"{(record.values['peak_mb'] or 0) - models:.0f}" if record is not None and models else "-"
