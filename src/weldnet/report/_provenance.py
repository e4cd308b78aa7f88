"""Where the numbers come from: commands, commits, versions, machines, seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from weldnet._version import __version__
from weldnet._words import counted
from weldnet.records import KINDS, Record, Records
from weldnet.report._page import Facts, Section

__all__ = ["provenance", "section", "settings"]

#: What of a run's ``extra`` is shown elsewhere on the page.
_ELSEWHERE = ("title", "notes", "about", "warning", "command")
_LABELS = {"weldnet": "weldnet", "commit": "commit", "torch": "PyTorch", "python": "Python", "gpu": "GPU"}
_MOST_SEEDS = 24


def provenance(records: Records) -> dict[str, Any]:
    """Return where records come from, as plain data."""
    made = [record for record in records if record.kind != "published"]
    where: dict[str, list[Any]] = {}
    for record in made:
        for name, value in record.where.items():
            if value is not None and value not in where.setdefault(name, []):
                where[name].append(value)
    times = sorted(record.time for record in made if record.time)
    return {
        "commands": _commands(records),
        "seeds": _seeds(made),
        "where": {name: values for name, values in where.items() if values},
        "first": times[0] if times else None,
        "last": times[-1] if times else None,
        "records": {kind: count for kind in KINDS if (count := sum(r.kind == kind for r in records))},
        "corrupt": records.corrupt,
        "sources": list(dict.fromkeys(r.source for r in records if r.kind == "published" and r.source)),
        "report": __version__,
    }


def _commands(records: Iterable[Record]) -> list[str]:
    found = [_command(record.extra) for record in records if record.kind == "run"]
    return list(dict.fromkeys(command for command in found if command))


def _command(extra: Mapping[str, Any]) -> str:
    """Return the command of a run; of a table that ``reproduce`` ran it follows from table and scale."""
    given = extra.get("command")
    if not given and extra.get("table") and extra.get("scale"):
        return f"weldnet reproduce {extra['table']} --scale {extra['scale']}"
    return " ".join(map(str, given)) if isinstance(given, list) else str(given or "")


def _seeds(records: Iterable[Record]) -> list[Any]:
    """Return the seeds: those of records and those that name their cells."""
    given = [
        r.extra["seeds"] if isinstance(r.extra.get("seeds"), list) else (r.seed, r.cell.get("seed")) for r in records
    ]
    return sorted({seed for seeds in given for seed in seeds if isinstance(seed, int) and not isinstance(seed, bool)})


def section(found: Mapping[str, Any]) -> Section:
    """Return the page's section on where its numbers come from."""
    entries: list[tuple[str, str]] = [("command", command) for command in found["commands"]]
    for name, values in found["where"].items():
        entries.append((_LABELS.get(str(name)) or str(name), ", ".join(map(str, values))))
    if found["seeds"]:
        entries.append(("seeds", _listed(found["seeds"])))
    times = [_time(str(time)) for time in (found["first"], found["last"]) if time]
    if times:
        entries.append(("measured", " to ".join(dict.fromkeys(times))))
    entries.append(("records", ", ".join(f"{count} {kind}" for kind, count in found["records"].items())))
    if found["corrupt"]:
        entries.append(("skipped", f"{counted(found['corrupt'], 'line')} that could not be read"))
    entries.append(("page", f"written by weldnet {found['report']}"))
    blocks = [Facts(entries=tuple(entries))]
    if found["sources"]:
        blocks.append(
            Facts(title="Sources of published numbers", entries=tuple(("", text) for text in found["sources"]))
        )
    return Section(name="provenance", title="Where the numbers come from", blocks=tuple(blocks))


def _time(text: str) -> str:
    """Write a time for people.

    >>> _time("2026-01-31T10:00:59+00:00")
    '2026-01-31 10:00 UTC'
    """
    return f"{text[:10]} {text[11:16]}" + (" UTC" if text.endswith("+00:00") else "")


def _listed(seeds: list[int]) -> str:
    shown = ", ".join(map(str, seeds[:_MOST_SEEDS]))
    return shown if len(seeds) <= _MOST_SEEDS else f"{shown}, ... ({len(seeds)} in all)"


def settings(records: Iterable[Record]) -> list[Section]:
    """Return how the study was set up, if its run says so."""
    blocks: list[Facts] = []
    for record in records:
        entries = [
            pair for name, value in record.extra.items() if name not in _ELSEWHERE for pair in _flat(name, value)
        ]
        if entries:
            blocks.append(Facts(entries=tuple(entries)))
    return [Section(name="protocol", title="How it was done", blocks=tuple(blocks))] if blocks else []


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    """Write nested settings one a line, under dotted names.

    >>> _flat("protocol", {"epochs": 3, "seeds": [0, 1]})
    [('protocol.epochs', '3'), ('protocol.seeds', '0, 1')]
    """
    if isinstance(value, Mapping):
        return [pair for key, entry in value.items() for pair in _flat(f"{name}.{key}", entry)]
    if isinstance(value, list | tuple):
        if any(isinstance(entry, Mapping) for entry in value):
            return [pair for index, entry in enumerate(value) for pair in _flat(f"{name}.{index + 1}", entry)]
        return [(name, ", ".join(map(str, value)))] if value else []
    return [(name, str(value))] if value not in (None, "") else []
